"""What fine-tuning reaches on small data, as a user would type it.

    python benchmarks/finetune.py sms spam.tsv                  labels, from random weights
    python benchmarks/finetune.py small-tasks                   exact answers, from random weights
    python benchmarks/finetune.py instructions data.json        answers, from a small model
    python benchmarks/finetune.py preferences pairs.json --model RUN    DPO, from the model above
    python benchmarks/finetune.py lora gpt2/                    a step with adapters, and a full one

Each is a run of `gptsmith finetune` in a folder (--folder), and a line of JSON with what its test
found. `sms` keeps each distinct message once and as many of both labels, and takes several seeds.
`instructions` first trains a small model of bytes on Shakespeare's plays, which takes minutes.
`lora` times whole steps in turn, and takes the peak memory of each. Words after `--` are further
flags of `gptsmith finetune`.
"""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import Results, carry_out, over, parser

from gptsmith.data.small_tasks import small_tasks

BASE = (
    "train shakespeare --tokenizer byte --n-layer 4 --n-head 4 --n-embd 256 --context-length 512 "
    "--batch-tokens 4096 --steps 1500 --sample-tokens 0 --evaluate-tokens 20000"
)

FOLLOW = (  # the book's split, and Muon, which learns more from few passes
    "--validation-fraction 0.05 --test-fraction 0.1 --epochs 4 --optimizer muon "
    "--muon-learning-rate 0.02 --muon-momentum 0.9 --learning-rate 0.003 --weight-decay 0 "
    "--schedule wsd --decay-fraction 0.8 --warmup-steps 20"
)


def typed(*words: object) -> float:
    """Run a command of gptsmith; return its seconds. ValueError if it fails."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "gptsmith", *map(str, words)], check=False)
    if done.returncode:
        raise ValueError(f"gptsmith {' '.join(map(str, words))} ended with {done.returncode}")
    return time.perf_counter() - started


def tuned(out: Path, *words: object) -> dict[str, Any]:
    """Fine-tune into a folder; return what its test found, and the seconds of it all."""
    seconds = typed("finetune", *words, "--out", out)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluated = [row for row in map(json.loads, lines) if "validation_loss" in row]
    return {
        "seconds": round(seconds, 1),
        "first": {"loss": json.loads(lines[0])["loss"], "validation": evaluated[0]},
        **json.loads((out / "test.json").read_text(encoding="utf-8")),
    }


def balanced(source: Path, target: Path, seed: int) -> int:
    """Write the distinct messages of label TAB text, as many of each label; return how many."""
    lines = dict.fromkeys(source.read_text(encoding="utf-8").splitlines())
    by_label: dict[str, list[str]] = {}
    for line in lines:
        label, tab, text = line.partition("\t")
        if tab:
            by_label.setdefault(label, []).append(text)
    choose, least = random.Random(seed), min(map(len, by_label.values()))
    rows = [(label, t) for label, texts in by_label.items() for t in choose.sample(texts, least)]
    choose.shuffle(rows)
    text = "".join(json.dumps({"text": text, "label": label}) + "\n" for label, text in rows)
    target.write_text(text, encoding="utf-8")
    return len(rows)


def sms(source: Path, folder: Path, seeds: int, more: list[str], results: Results) -> None:
    """Spam or not, from random weights, with several seeds."""
    for seed in range(1, seeds + 1):
        data = folder / f"sms-{seed}.jsonl"
        count = balanced(source, data, seed)
        out = folder / f"sms-{seed}"
        found = tuned(out, "fresh", "--data", data, "--seed", seed, *more)
        results.add({"what": "sms", "seed": seed, "messages": count, **found})
    rows = results.rows
    print(f"accuracy {over(row['accuracy'] for row in rows)}, mean "
          f"{sum(row['accuracy'] for row in rows) / len(rows):.4f}; naive Bayes "
          f"{over(row['baselines']['naive_bayes'] for row in rows)}; "
          f"{over(row['seconds'] for row in rows)} s")  # fmt: skip


def of_each_task(answers: Path) -> dict[str, float]:
    """Return the share of exact answers of each of the small tasks."""
    tasks = {row["prompt"]: row["task"] for row in small_tasks()}
    right: dict[str, list[bool]] = {}
    for line in answers.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        right.setdefault(tasks[row["prompt"]], []).append(row["exact"])
    return {task: sum(each) / len(each) for task, each in sorted(right.items())}


def tasks(folder: Path, more: list[str], results: Results) -> None:
    """The built-in small tasks, from random weights."""
    out = folder / "small-tasks"
    found = tuned(out, "fresh", "--data", "small-tasks", *more)
    each = of_each_task(out / "answers.jsonl")
    results.add({"what": "small-tasks", "exact_by_task": each, **found})
    print(f"exact answers {sum(each.values()) / len(each):.1%} on average: {each}")


def instructions(source: Path, folder: Path, more: list[str], results: Results) -> None:
    """Answers to instructions, from a small model that is trained first."""
    base = folder / "base"
    if not base.exists():
        typed(*BASE.split(), "--out", base)
    found = tuned(folder / "instructions", base, "--data", source, *FOLLOW.split(), *more)
    results.add({"what": "instructions", **found})
    first = found["first"]["validation"]
    print(f"validation loss {first['validation_loss']:.4f} at step {first['step']}, test loss "
          f"{found['loss']:.4f}, {found['ended']} of {found['answers']} answers ended; "
          "these did not:")  # fmt: skip
    answers = (folder / "instructions" / "answers.jsonl").read_text(encoding="utf-8")
    for row in map(json.loads, answers.splitlines()):
        if not row["ended"]:
            print(f"wanted: {row['wanted']}\nanswer: {row['answer']}")


def preferences(source: Path, model: Path, folder: Path, more: list[str], results: Results) -> None:
    """DPO on pairs of answers."""
    words = ["--beta", 0.1, "--learning-rate", 2e-4, *more]
    found = tuned(folder / "preferences", model, "--data", source, *words)
    results.add({"what": "preferences", **found})
    print(f"begins at {found['first']['loss']:.6f}, reward accuracy {found['accuracy']:.4f}")


def lora(model: Path, folder: Path, rounds: int, results: Results) -> None:
    """Whole steps of all weights and of adapters, in turn, with the peak memory of each."""
    data = folder / "rows.jsonl"
    row = json.dumps({"prompt": "word " * 200, "completion": "word " * 50})
    data.write_text(f"{row}\n" * 64, encoding="utf-8")
    ways = {"full": [], "lora": ["--lora", "16"]}
    for round in range(rounds):
        for name, flags in ways.items():
            out = folder / f"{name}-{round}"
            command = ["/usr/bin/time", "-v", sys.executable, "-m", "gptsmith", "finetune"]
            words = [model, "--data", data, "--steps", 6, "--batch-rows", 4, "--sample-tokens", 0]
            words += ["--evaluate-every", 1000, "--validation-fraction", 0, "--test-fraction", 0]
            done = subprocess.run(
                [*command, *map(str, words), *flags, "--out", str(out)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            peak = re.search(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)
            lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            ends = [json.loads(line)["seconds"] for line in lines]
            step = (ends[-1] - ends[1]) / (len(ends) - 2)
            results.add({
                "what": "lora", "way": name, "round": round, "step_seconds": round_to(step),
                "peak_bytes": int(peak[1]) * 1024 if peak else None,
            })  # fmt: skip
    for name in ways:
        rows = [row for row in results.rows if row["way"] == name]
        print(f"{name}: {over(row['step_seconds'] for row in rows)} s a step, peak "
              f"{over(row['peak_bytes'] / 1e9 for row in rows)} GB")  # fmt: skip


def round_to(seconds: float) -> float:
    """Milliseconds are enough."""
    return round(seconds, 3)


def main() -> None:
    """Run what the command line names."""
    known = parser(__doc__)
    known.add_argument(
        "what", choices=["sms", "small-tasks", "instructions", "preferences", "lora"]
    )
    known.add_argument("source", nargs="?", type=Path, help="the data, or the model of lora")
    known.add_argument("--model", type=Path, help="the model that preferences are learned by")
    known.add_argument("--folder", type=Path, default=Path("finetune"), help="for the runs")
    known.add_argument("--seeds", type=int, default=3, help="runs of sms (default: %(default)s)")
    known.add_argument("--rounds", type=int, default=3, help="of lora (default: %(default)s)")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, more = known.parse_args(words[:end]), words[end + 1 :]
    if options.what != "small-tasks" and options.source is None:
        raise ValueError(f"{options.what} needs its data: name the file")
    options.folder.mkdir(parents=True, exist_ok=True)
    results, folder = Results(options.out), options.folder
    if options.what == "sms":
        sms(options.source, folder, options.seeds, more, results)
    elif options.what == "small-tasks":
        tasks(folder, more, results)
    elif options.what == "instructions":
        instructions(options.source, folder, more, results)
    elif options.what == "preferences":
        if options.model is None:
            raise ValueError("preferences need --model: a run that answers already")
        preferences(options.source, options.model, folder, more, results)
    else:
        lora(options.source, folder, options.rounds, results)


if __name__ == "__main__":
    carry_out(main)
