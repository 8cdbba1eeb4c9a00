"""What lm-evaluation-harness finds by asking the server is what transformers computes itself.

The harness runs as its users run it, in a process of its own, offline, on three tasks made here.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from gptsmith import GPT, GPTConfig, save
from gptsmith.tokenizers import Tokenizer
from gptsmith.tokenizers.build import learn_bpe
from tests.cli.test_serve import started

LM_EVAL = Path(sys.prefix) / "lm-eval"  # `make test` puts it there
CONTEXT = 128
TEXT = """The harbour froze in the night, and by morning the boats stood upright in it like teeth.
Nobody had seen that before — not even old Mærsk, who had seen most things twice.
“It will hold a horse,” he said, and walked out to the third buoy to show us.
We followed him with ropes, a kettle, and the small dog that belonged to no one.
Under the ice the tide went on as if nothing had been decided about it.
By noon there was a market there: eels, coal, candles, and 40 pairs of skates.
"""
LINES = TEXT.splitlines()
NEW_TOKENS = 30
STOP = "d o"  # of "walked out": in two tokens
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "write": f"""
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: ""
generation_kwargs: {{until: ["{STOP}"], max_gen_toks: {NEW_TOKENS}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


@dataclass
class Toy:
    """A model in a folder, and the same as transformers computes it, in float64."""

    folder: Path
    tokenizer: Any
    model: Any

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @torch.no_grad()
    def score(self, row: Sequence[int], count: int) -> tuple[float, bool, int]:
        """The log-probability of the last `count` tokens, whether each is the likeliest, and what
        the likeliest after them is."""
        logits = self.model(torch.tensor([row])).logits[0]  # (T, V)
        wanted = torch.tensor(row[-count:])
        likeliest = logits.argmax(dim=-1)
        own = logits.log_softmax(dim=-1)[-count - 1 : -1].gather(-1, wanted[:, None])
        greedy = bool((likeliest[-count - 1 : -1] == wanted).all())
        return own.sum().item(), greedy, int(likeliest[-1])

    def greedy(self, prompt: str, count: int) -> str:
        """The likeliest continuation, up to the end of the text."""
        row = torch.tensor([self.ids(prompt)])
        found = self.model.generate(row, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return self.tokenizer.decode(found[0, row.shape[1] :], skip_special_tokens=True)


def taught(tokenizer: Tokenizer) -> GPT:
    """A model that knows the lines by heart, and that a text ends after each."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 48}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, context_length=CONTEXT, **sizes))
    rows = [torch.tensor([*tokenizer.encode(line), tokenizer.end_of_text]) for line in LINES]
    inputs = pad_sequence([row[:-1] for row in rows], batch_first=True)  # (B, T)
    targets = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model.loss(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    return model.eval()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("models") / "toy"
    tokenizer = learn_bpe([TEXT], 420)
    save(taught(tokenizer), tokenizer, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    return Toy(folder, transformers.AutoTokenizer.from_pretrained(folder), theirs)


def questions() -> list[dict[str, Any]]:
    """Beginnings with a choice of ends; the first is what the model would write.

    They are cut before a space, where the tokens of both parts are those of the whole.
    """
    found = []
    for number, line in enumerate(LINES):
        for place in (line.index(" ", 20), line.index(" ", 45)):
            choices = [line[place:], " naïve ice", " the dog", f" {line[:9]}"]
            found.append({"question": line[:place], "choices": choices, "answer": number % 3})
    return found


def beginnings() -> list[dict[str, Any]]:
    """Texts to continue: of what the model knows, and of what it does not."""
    return [{"text": line[:16].rstrip()} for line in [*LINES, "Nothing of the kind", "Fjord £5"]]


def write_tasks(folder: Path, **rows: list[dict[str, Any]]) -> None:
    for name, documents in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        head = f"task: toy_{name}\ndataset_path: json\ntest_split: test\n"
        source = f"dataset_kwargs: {{data_files: {{test: {data}}}}}"
        (folder / f"{name}.yaml").write_text(head + source + TASKS[name])


@dataclass
class Found:
    """What the harness wrote: its figures, and each document's requests and answers."""

    folder: Path

    def figure(self, task: str, metric: str) -> float:
        (path,) = self.folder.rglob("results_*.json")
        return json.loads(path.read_text())["results"][f"toy_{task}"][f"{metric},none"]

    def samples(self, task: str) -> Iterator[tuple[dict[str, Any], list[tuple[list[str], Any]]]]:
        """Each document, and the arguments and answer of each of its requests."""
        (path,) = self.folder.rglob(f"samples_toy_{task}_*.jsonl")
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            asked = [list(arguments.values()) for arguments in sample["arguments"].values()]
            answers = [answer for (answer,) in sample["resps"]]
            yield sample["doc"], list(zip(asked, answers, strict=True))


def words_for(ready: str, toy: Toy, tasks: Path, *flags: str, **how: Any) -> list[str]:
    """What is typed to ask a server, which is where the line says that it is ready."""
    address = ready.split(" at ")[1].split()[0]
    how |= {"model": toy.folder.name, "base_url": f"{address}/v1/completions"}
    how |= {"tokenizer": toy.folder, "max_length": CONTEXT, "max_retries": 1}
    names = [f"toy_{path.stem}" for path in tasks.glob("*.yaml")]
    words = ["run", "--model", "local-completions", *flags, "--include_path", str(tasks)]
    words += ["--model_args", ",".join(f"{name}={value}" for name, value in how.items())]
    return [
        *words,
        "--tasks",
        ",".join(names),
        "--output_path",
        str(tasks / "out"),
        "--log_samples",
    ]


# The harness's command, once for each list of words: importing it takes most of the time.
HARNESS = """
import json, sys
from lm_eval.__main__ import cli_evaluate
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    cli_evaluate()
"""


def evaluate(home: Path, *typed: list[str]) -> None:
    """Run the harness, offline."""
    assert LM_EVAL.is_dir(), "lm-eval is missing: `make test` installs it"
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, json.dumps(typed)],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(LM_EVAL)} | offline,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def check_choices(found: Found, toy: Toy) -> None:
    """Log-likelihoods, and so the accuracy, are what transformers has."""
    right, greedy, ended = [], set(), set()
    for document, requests in found.samples("choose"):
        scores = []
        for (context, choice), (logprob, is_greedy) in requests:
            row = toy.ids(context + choice)
            expected, likeliest, following = toy.score(row, len(row) - len(toy.ids(context)))
            assert float(logprob) == pytest.approx(expected, abs=1e-4)
            assert is_greedy == str(likeliest)
            scores.append(expected)
            greedy.add(likeliest)
            ended.add(following == toy.tokenizer.eos_token_id)
        right.append(scores.index(max(scores)) == document["answer"])
    assert len(right) == 12
    assert greedy == ended == {True, False}  # all that can be told apart was there
    assert {*right} == {True, False}
    assert found.figure("choose", "acc") == pytest.approx(sum(right) / len(right))


def check_texts(found: Found, toy: Toy) -> None:
    """Texts are what transformers writes, up to the stop string."""
    stopped, texts = set(), []
    for document, (((_, _), text),) in found.samples("write"):
        whole = toy.greedy(document["text"], NEW_TOKENS)
        assert text == whole.split(STOP)[0]
        stopped.add(STOP in whole)
        texts.append(text)
    assert stopped == {True, False}
    assert len(texts) == 8
    assert not "".join(texts).isascii()


def rolling(toy: Toy, text: str) -> float:
    """The log-probability of a text of any length, as far as the context reaches: each window
    scores what no window before it has, the last after as much as there is room for."""
    row = [toy.tokenizer.bos_token_id, *toy.ids(text)]
    most = CONTEXT - 2  # the harness leaves a place free, and the server writes a token
    total = 0.0
    for start in range(0, len(row) - 1, most):
        end = min(start + most, len(row) - 1)
        total += toy.score(row[max(0, end - most) : end + 1], end - start)[0]
    return total


@pytest.fixture(scope="module")
def asked(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """What the harness found by prompts of tokens, four at a time, and by prompts of text, three
    in a request, of another server."""
    # Nothing to read for prompts of text: where a text begins the harness puts <|endoftext|>, and
    # they never have special tokens.
    ids, texts = tmp_path_factory.mktemp("ids"), tmp_path_factory.mktemp("texts")
    read = [{"text": text} for text in (LINES[1], TEXT)]
    write_tasks(ids, choose=questions(), read=read, write=beginnings())
    write_tasks(texts, choose=questions(), write=beginnings())
    quiet = "--no-log-requests"
    with (
        started(toy.folder, quiet) as (_, one),
        started(toy.folder, quiet, "--compile", "no") as (_, other),
    ):
        evaluate(
            tmp_path_factory.mktemp("hub"),
            words_for(one, toy, ids, num_concurrent=4, tokenized_requests=True),
            words_for(other, toy, texts, "--batch_size=3", tokenized_requests=False),
        )
    return Found(ids / "out"), Found(texts / "out")


@pytest.mark.slow
def test_prompts_of_tokens_four_at_a_time(toy: Toy, asked: tuple[Found, Found]) -> None:
    assert len(toy.ids(LINES[1])) < CONTEXT < len(toy.ids(TEXT))
    found, _ = asked
    check_choices(found, toy)
    check_texts(found, toy)
    size = total = 0.0
    for document, (((text,), logprob),) in found.samples("read"):
        expected = rolling(toy, document["text"])
        assert text == document["text"]
        assert float(logprob) == pytest.approx(expected, abs=1e-4)
        total, size = total + expected, size + len(text.encode())
    bits = -total / size / math.log(2)
    assert found.figure("read", "bits_per_byte") == pytest.approx(bits, abs=1e-6)


@pytest.mark.slow
def test_prompts_of_text_three_in_a_request(toy: Toy, asked: tuple[Found, Found]) -> None:
    _, found = asked
    check_choices(found, toy)
    check_texts(found, toy)
