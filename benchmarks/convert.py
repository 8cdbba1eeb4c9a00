"""Memory and time of every conversion, for a model of any GPT-2 size with random weights.

    python benchmarks/convert.py FOLDER [--preset gpt2-xl] [--formats huggingface nanogpt ...]

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
from torch import Tensor

from gptsmith.checkpoint import saved
from gptsmith.checkpoint.tensors import Stored
from gptsmith.config.cost import components, weight_bytes
from gptsmith.config.model import PRESETS, GPTConfig
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
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - begin, int(done.stdout.split()[-1]) * 1024


def main() -> None:
    """Make the model, carry it to each format and back, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="gpt2-xl", choices=PRESETS)
    parser.add_argument("--dtype", help="as export takes it")
    parser.add_argument("--formats", nargs="*", default=WRITABLE, choices=WRITABLE)
    options = parser.parse_args()
    print(f"{'conversion':<28}{'seconds':>9}{'memory':>10}{'weights':>10}  within weights + 1 GB")
    for name in options.formats:
        config = replace(PRESETS[options.preset], **FORMS.get(name, {}))
        weights = weight_bytes(config)
        model, there, back = (options.folder / part for part in ("model", "there", "back"))
        stored = Stored(config=config, fetch=random_fetch(config), tokenizer=gpt2_tokenizer())
        with written_whole(model) as temporary:
            saved.write(stored, temporary)
        dtype = ["--dtype", options.dtype] if options.dtype else []
        commands = {f"to {name}": ["export", str(model), str(there), "--to", name, *dtype]}
        if name in READABLE:
            commands[f"from {name}"] = ["import", str(there), str(back)]
        for title, words in commands.items():
            seconds, memory = convert(words)
            within = "yes" if memory <= weights + GB else "NO"
            row = f"{title:<28}{seconds:>9.1f}{memory / GB:>9.2f}G{weights / GB:>9.2f}G  {within}"
            print(row, flush=True)
            if words[0] == "export":
                shutil.rmtree(model)
        for path in (there, back):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
