"""lm-evaluation-harness itself, on the same rows and models through transformers: the same items
right, the same numbers.

Of hellaswag, lambada_openai and BLiMP its own definitions are taken; only the data are ours.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gptsmith
from gptsmith import GPTConfig
from gptsmith.evaluation.accuracy import Measured
from gptsmith.evaluation.task_forms import read_items
from gptsmith.evaluation.task_requests import Judged
from gptsmith.evaluation.tasks import measure
from gptsmith.tokenizers.build import learn_bpe
from tests.conftest import scrambled
from tests.evaluation.test_tasks import rows_of, write
from tests.serving.test_lm_eval import LM_EVAL, TEXT, taught

pytestmark = pytest.mark.clients
ACCELERATE = Path(sys.prefix) / "clients" / "folders"  # `make clients` puts it there
THEIRS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "pairs": "blimp/_template_yaml",
}
OURS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "exact": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 100, do_sample: false}
metric_list: [{metric: exact_match, regexes_to_ignore: ["^ +| +$"]}]
""",
}
NAMES = {
    "accuracy": "acc",
    "accuracy_stderr": "acc_stderr",
    "accuracy_norm": "acc_norm",
    "accuracy_norm_stderr": "acc_norm_stderr",
    "perplexity": "perplexity",
}
HARNESS = """
import json, sys
from lm_eval.__main__ import cli_evaluate
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    cli_evaluate()
"""


def define(folder: Path, task: str) -> None:
    """Write the task, its definition and its rows, where the harness is told to look."""
    rows = rows_of(task)
    if task == "exact":  # the harness leaves no room for more than the answer's tokens
        rows = [row for row in rows if len(row["prompt"]) < 60]
    if task == "pairs":
        rows = [dict(zip(("sentence_good", "sentence_bad"), r.values(), strict=True)) for r in rows]
    if task in THEIRS:
        path = LM_EVAL / "lm_eval" / "tasks" / THEIRS[task]
        known = r"^(task|tag|dataset_path|dataset_name|\w+_split|  ?-).*\n"
        head, mark, metrics = path.read_text().partition("metric_list:")
        text = re.sub(known, "", head, flags=re.MULTILINE) + mark + metrics
        if task == "hellaswag":
            shutil.copy(path.parent / "utils.py", folder)
    else:
        text = OURS[task]
    data = write(folder / f"{task}.jsonl", rows)
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    (folder / f"{task}.yaml").write_text(f"task: our_{task}\ntest_split: test\n{source}{text}")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, tasks, and what the harness found of each model on each task."""
    assert LM_EVAL.is_dir(), "lm-eval is missing: `make test` installs it"
    assert ACCELERATE.is_dir(), "accelerate is missing: `make clients` installs it"
    folder, tokenizer = tmp_path_factory.mktemp("judged"), learn_bpe([TEXT], 420)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 3, "n_embd": 48, "context_length": 128}
    other = scrambled(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))
    for name, model in {"taught": taught(tokenizer), "scrambled": other}.items():
        gptsmith.save(model, tokenizer, folder / name)
    (folder / "tasks").mkdir()
    tasks = [*THEIRS, *OURS]
    for task in tasks:
        define(folder / "tasks", task)
    # One task at a time: where a text of one is the beginning of another's, lm-eval 0.4.13 computes
    # both at once, and takes the log-probability of a single token from the wrong place.
    words = [
        ["run", "--model", "hf", "--device", "cpu", "--batch_size", "5", "--log_samples",
         "--model_args", f"pretrained={folder / name},dtype=float32",
         "--include_path", str(folder / "tasks"), "--output_path", str(folder / f"{name}-{task}"),
         "--tasks", f"our_{task}"]
        for name in ("taught", "scrambled") for task in tasks
    ]  # fmt: skip
    offline = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, json.dumps(words)],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{LM_EVAL}:{ACCELERATE}"} | offline,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["taught", "scrambled"])
@pytest.mark.parametrize("task", [*THEIRS, *OURS])
def test_the_same_items_and_numbers(task: str, name: str, judged: Path) -> None:
    model, tokenizer = gptsmith.load(judged / name)
    assert tokenizer is not None
    found, items = read_items(str(judged / "tasks" / f"{task}.jsonl"))
    assert found == task
    outcomes = dict(measure(Judged(model, tokenizer), task, items))
    ours = Measured([outcomes[number] for number in range(len(items))])
    (path,) = (judged / f"{name}-{task}").rglob(f"samples_our_{task}_*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda s: s["doc_id"])
    right = "exact_match" if task == "exact" else "acc"
    assert ours.values["accuracy"].tolist() == [sample[right] for sample in samples]
    if task in ("hellaswag", "choices"):
        assert ours.values["accuracy_norm"].tolist() == [sample["acc_norm"] for sample in samples]
    (path,) = (judged / f"{name}-{task}").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"][f"our_{task}"]
    figures = ours.to_json()
    compared = 0
    for key, their in NAMES.items():
        their = their.replace("acc", "exact_match") if task == "exact" else their
        if f"{their},none" in theirs:
            assert figures[key] == pytest.approx(theirs[f"{their},none"], rel=1e-4)
            compared += 1
    assert compared == {"hellaswag": 4, "choices": 4, "lambada": 3}.get(task, 2)
    assert (ours.cut > 0) == (task not in ("pairs", "exact"))
