"""Rows like those of HellaSwag: gptsmith and lm-evaluation-harness, in turn on the same file.

    python benchmarks/tasks.py TEXT --model MODEL --items 50

TEXT is any long plain text: its words make the beginnings (20 to 90) and four endings of each (8 to
32), as long as those of HellaSwag. Without MODEL, it is a GPT-2 of 124M random weights. The harness
runs MODEL through transformers, with 1 request at a time, as by default, and with several. Measured
are the seconds from a loaded model to the figures, and those of the whole process. `make test` and
`make clients` install what it needs; elsewhere: pip install lm-eval accelerate.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results import Results, carry_out, over, parser, ratios

Figures = dict[str, Any]
INSTALLED = ("lm-eval", "clients/folders")  # in the environment, by the Makefile


class Watch:
    """Measures from now on: seconds, and those of the processor, which a busy machine adds little
    to."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def read(self) -> Figures:
        """Return the seconds since the beginning."""
        seconds = time.perf_counter() - self.started[0]
        return {"seconds": seconds, "processor_seconds": time.process_time() - self.started[1]}


def make_rows(text: Path, count: int, path: Path) -> None:
    """Write so many rows with the fields of HellaSwag."""
    words, draw = text.read_text(encoding="utf-8").split(), random.Random(0)

    def some(least: int, most: int) -> str:
        length = draw.randint(least, most)
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    rows = []
    for number in range(count):
        first, endings = some(20, 90), [some(8, 32) for _ in range(4)]
        row = {"ctx": first, "ctx_a": first, "ctx_b": "", "activity_label": "Reading"}
        rows.append(row | {"endings": endings, "label": number % 4})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ours(model: str, data: str) -> Figures:
    """Measure the model by gptsmith."""
    import gptsmith
    from gptsmith.evaluation.accuracy import Measured
    from gptsmith.evaluation.task_forms import read_items
    from gptsmith.evaluation.task_requests import Judged
    from gptsmith.evaluation.tasks import measure

    loaded, tokenizer = gptsmith.load(model)
    assert tokenizer is not None
    watch = Watch()
    task, items = read_items(data)
    found = dict(measure(Judged(loaded, tokenizer), task, items))
    figures = Measured([found[number] for number in range(len(items))]).to_json()
    return {**watch.read(), **{n: figures[n] for n in ("accuracy", "accuracy_norm")}}


def theirs(model: str, data: str, batch: int) -> Figures:
    """Measure the model by lm-evaluation-harness, with its own definition of the task."""
    import importlib.util

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    spec = importlib.util.spec_from_file_location("hellaswag_utils", folder / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    task = {
        "task": "rows",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "process_docs": utils.process_docs,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    loaded = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=batch)
    manager = TaskManager(include_defaults=False)
    watch = Watch()
    results = lm_eval.simple_evaluate(model=loaded, tasks=[task], task_manager=manager)
    figures, found = watch.read(), results["results"]["rows"]
    names = {"accuracy": "acc,none", "accuracy_norm": "acc_norm,none"}
    return {**figures, **{ours: found[theirs] for ours, theirs in names.items()}}


def run(words: Sequence[str], threads: int, home: str) -> Figures:
    """Run a way in a process of its own; return its figures and the seconds of the process."""
    beside = [str(Path(sys.prefix, name)) for name in INSTALLED]
    paths = [os.environ["PYTHONPATH"], *(beside if words[0] == "theirs" else ())]
    offline = {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--way", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **offline, **own},
    )
    if done.returncode:
        raise ValueError(f"{words[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return {**figures, "process_seconds": time.perf_counter() - started}


def main() -> None:
    """Make the rows and the model, and compare."""
    known = parser(__doc__)
    known.add_argument("text", type=Path, nargs="?", help="a long plain text")
    known.add_argument("--model", help="a Hugging Face GPT-2 folder (default: random weights)")
    known.add_argument("--items", type=int, default=50, help="rows (default: 50)")
    known.add_argument("--threads", type=int, default=2, help="of each process (default: 2)")
    known.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="of lm-eval (1 and 8)")
    known.add_argument("--rounds", type=int, default=1, help="in turn (default: 1)")
    known.add_argument("--way", nargs="+", help=argparse.SUPPRESS)
    options = known.parse_args()
    if options.way:
        way, model, data, *batch = options.way
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        print(json.dumps(theirs(model, data, int(*batch)) if batch else ours(model, data)))
        return
    if options.text is None:
        known.error("a text is needed")
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as name:
        data, model = Path(name, "rows.jsonl"), options.model or str(Path(name, "gpt2"))
        make_rows(options.text, options.items, data)
        if options.model is None:
            import gptsmith
            from gptsmith.tokenizers import open_tokenizer

            torch.manual_seed(0)
            gptsmith.save(gptsmith.GPT(gptsmith.GPTConfig()), open_tokenizer("gpt2"), model)
        ways = {"gptsmith": ["ours"]} | {f"lm-eval {n}": ["theirs", str(n)] for n in options.batch}
        for turn in range(options.rounds):
            for title, (way, *batch) in ways.items():
                figures = run([way, model, str(data), *batch], options.threads, name)
                results.add({"way": title, "round": turn, "items": options.items, **figures})
                print(f"{title}: {figures}", flush=True)
    for kind in ("seconds", "processor_seconds"):
        times = {
            title: {row["round"]: row[kind] for row in results.rows if row["way"] == title}
            for title in ways
        }
        for title in list(ways)[1:]:
            found = over(ratios(times[title], times["gptsmith"]))
            print(f"{kind.replace('_', ' ')}: {title} takes {found} times as many")


if __name__ == "__main__":
    carry_out(main)
