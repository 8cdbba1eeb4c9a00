"""Memory and time of every conversion, for a model of any GPT-2 size with random weights.

    python benchmarks/convert.py FOLDER --model gpt2-xl --formats huggingface nanogpt

Each conversion runs in a process of its own, whose largest resident memory is compared with the
weights in float32. FOLDER gets several times the model's size; what was converted is removed.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from results import Results, carry_out, parser
from torch import Tensor

from gptsmith.checkpoint import saving
from gptsmith.checkpoint.described import described_config
from gptsmith.checkpoint.tensors import Stored
from gptsmith.config.cost import components, weight_bytes
from gptsmith.config.model import GPTConfig
from gptsmith.convert.formats import READABLE, WRITABLE
from gptsmith.machine.files import written_whole
from gptsmith.tokenizers import gpt2_tokenizer

GB = 10**9
# What a format needs of a model to say it exactly.
FORMS: dict[str, dict[str, object]] = {
    "nanogpt": {"activation": "gelu_erf"},
    "book": {"tie_weights": False},
}


def random_fetch(config: GPTConfig) -> Callable[[str], Tensor]:
    """Weights of the usual size, made when asked for and always the same."""
    shapes = {part.name: part.shape for part in components(config)}

    def fetch(name: str) -> Tensor:
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        return torch.randn(shapes[name], generator=generator) * 0.02

    return fetch


def convert(words: list[str]) -> tuple[float, int]:
    """Seconds and largest resident bytes of a gptsmith command."""
    code = (
        "import resource, sys; from gptsmith.cli.main import main; status = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"gptsmith {' '.join(words)}: {done.stderr.strip()}")
    return time.perf_counter() - begin, int(done.stdout.split()[-1]) * 1024


def carry(name: str, options: argparse.Namespace, results: Results) -> None:
    """A model to a format and back, a row for each way; its files are removed again."""
    config = replace(described_config(options.model)[0], **FORMS.get(name, {}))
    model, there, back = (options.folder / part for part in ("model", "there", "back"))
    stored = Stored(config=config, fetch=random_fetch(config), tokenizer=gpt2_tokenizer())
    dtype = ["--dtype", options.dtype] if options.dtype else []
    commands = {f"to {name}": ["export", str(model), str(there), "--to", name, *dtype]}
    if name in READABLE:
        commands[f"from {name}"] = ["import", str(there), str(back)]
    try:
        with written_whole(model) as temporary:
            saving.write(stored, temporary)
        for title, words in commands.items():
            seconds, memory = convert(words)
            weights = weight_bytes(config)
            sizes = {"memory_bytes": memory, "weight_bytes": weights}
            results.add({"conversion": title, "seconds": seconds, **sizes})
            within = "yes" if memory <= weights + GB else "NO"
            row = f"{title:<28}{seconds:>9.1f}{memory / GB:>9.2f}G{weights / GB:>9.2f}G  {within}"
            print(row, flush=True)
    finally:
        for path in (model, there, back):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> None:
    """Carry a model to each format and back."""
    known = parser(__doc__)
    known.add_argument("folder", type=Path, help="where there is room for several such models")
    known.add_argument("--model", metavar="PRESET|RECIPE", default="gpt2-xl")
    known.add_argument("--dtype", help="as export takes it")
    known.add_argument("--formats", nargs="*", default=WRITABLE, choices=WRITABLE)
    options = known.parse_args()
    results = Results(options.out)
    print(f"{'conversion':<28}{'seconds':>9}{'memory':>10}{'weights':>10}  within weights + 1 GB")
    for name in options.formats:
        carry(name, options, results)


if __name__ == "__main__":
    carry_out(main)
