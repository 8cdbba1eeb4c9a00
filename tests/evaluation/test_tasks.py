"""Tasks with right answers: the arithmetic, by a plain implementation with transformers' logits.

One text at a time, no batches, no cache; tests/clients has lm-evaluation-harness itself. Also how
files are recognised, and what is refused.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptsmith import save
from gptsmith.evaluation.task_forms import read_items
from gptsmith.evaluation.task_requests import Judged
from gptsmith.evaluation.tasks import Outcome, measure
from gptsmith.tokenizers.build import learn_bpe
from tests.serving.test_lm_eval import LINES, TEXT, taught

Rows = list[dict[str, Any]]
TOPICS = ("Ice [header]", "Markets, in winter", "Dogs  and horses")


def rows_of(task: str) -> Rows:
    """Rows on what the taught model knows by heart, with distractors, and some that are long."""
    random_, rows = random.Random(5), Rows()
    starts = [(line, line.rindex(" ", 0, at)) for line in LINES for at in (24, 38, 52, 66)]
    for number, (line, at) in enumerate(starts):
        prompt, rest = line[:at], line[at + 1 : at + 21]
        # Every sixth is longer than the context of 128 tokens.
        prompt = f"{TEXT[:420]} {prompt}" if number % 6 == 5 else prompt
        others = [random_.choice(LINES)[3 * k : 12 + 5 * k].strip() for k in range(1, 4)]
        texts, label = [rest, *others], number % 4
        texts[0], texts[label] = texts[label], texts[0]
        if task == "hellaswag":
            first, _, second = prompt.rpartition(" ")
            texts = [[f"{text} ", f"[step] {text}", f"{text} [title] He  went on."][n % 3] for
                     n, text in enumerate(texts, number)]  # fmt: skip
            row: dict[str, Any] = {"ctx": prompt, "ctx_a": first, "ctx_b": second}
            row |= {"activity_label": TOPICS[number % 3], "endings": texts}
            rows.append(row | {"label": str(label) if number % 2 else label})
        elif task == "choices":
            spaces = " " * (number % 5 == 1)
            rows.append({"prompt": prompt + spaces, "choices": texts, "answer": label})
        elif task == "lambada":
            rows.append({"text": f"{prompt} {rest.split()[0] if number % 3 else texts[1]}"})
        elif task == "pairs":
            rows.append({"good": texts[1], "bad": texts[2]} if number % 2 else
                        {"sentence_good": rest, "sentence_bad": texts[3]})  # fmt: skip
        elif task == "exact":
            rows.append({"prompt": prompt, "answer": line[at:] if number % 3 else texts[2]})
    return rows


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Judged, "Plain"]:
    """A model that knows the lines by heart, here and as transformers loads it."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "toy", learn_bpe([TEXT], 420)
    model = taught(tokenizer)
    save(model, tokenizer, folder)
    return Judged(model, tokenizer), Plain(folder)


class Plain:
    """The tasks, one text at a time, with the logits of transformers in float64."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @torch.no_grad()
    def nats(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        room = self.model.config.n_positions + 1
        ids = (context + continuation)[-room:]
        logits = self.model(torch.tensor([ids[:-1]])).logits[0, -len(continuation) :]
        logprobs, wanted = logits.log_softmax(-1), torch.tensor(continuation)
        greedy = bool((logits.argmax(-1) == wanted).all())
        return float(logprobs[range(len(wanted)), wanted].sum()), greedy

    def pair(self, prompt: str, choice: str) -> tuple[float, bool]:
        while prompt and prompt[-1].isspace():
            prompt, choice = prompt[:-1], prompt[-1] + choice
        if not prompt:
            return self.nats([self.tokenizer.bos_token_id], self.ids(choice))
        start = len(self.ids(prompt))
        return self.nats(self.ids(prompt), self.ids(prompt + choice)[start:])

    def choose(self, prompt: str, choices: Sequence[str], answer: int) -> Outcome:
        nats = [self.pair(prompt, f" {choice}")[0] for choice in choices]
        norm = [n / len(choice) for n, choice in zip(nats, choices, strict=True)]
        return Outcome(nats.index(max(nats)) == answer, norm.index(max(norm)) == answer)

    def choices(self, row: dict[str, Any]) -> Outcome:
        return self.choose(row["prompt"], row["choices"], row["answer"])

    def hellaswag(self, row: dict[str, Any]) -> Outcome:
        def clean(text: str) -> str:
            text = ". ".join(text.strip().split(" [title]"))
            text = "".join(re.split(r"\[[^\]]*\]", text))
            return " ".join(text.split("  "))

        second = row["ctx_b"][:1].upper() + row["ctx_b"][1:].lower()
        prompt = clean(f"{row['activity_label']}: {row['ctx_a']} {second}")
        return self.choose(prompt, list(map(clean, row["endings"])), int(row["label"]))

    def llm_c(self, row: dict[str, Any]) -> Outcome:
        """Tokens apart; the loss summed, and its mean over the tokens."""
        endings = [self.ids(f" {ending}") for ending in row["endings"]]
        losses = [-self.nats(self.ids(row["ctx"]), ending)[0] for ending in endings]
        means = [loss / len(ending) for loss, ending in zip(losses, endings, strict=True)]
        answer = int(row["label"])
        return Outcome(losses.index(min(losses)) == answer, means.index(min(means)) == answer)

    def lambada(self, row: dict[str, Any]) -> Outcome:
        *beginning, word = row["text"].split(" ")
        nats, greedy = self.pair(" ".join(beginning), f" {word}")
        return Outcome(greedy, logprob=nats)

    def pairs(self, row: dict[str, Any]) -> Outcome:
        good, bad = row.values()
        return Outcome(self.pair("", f" {good}")[0] >= self.pair("", f" {bad}")[0])

    def exact(self, row: dict[str, Any]) -> Outcome:
        ids = torch.tensor([self.ids(row["prompt"])[-128:]])
        found = self.model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
        text = self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        return Outcome(text.split("\n")[0].strip() == row["answer"].strip())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["hellaswag", "llm.c", "lambada", "choices", "pairs", "exact"])
def test_each_task_is_the_plain_one(task: str, toy: tuple[Judged, Plain], tmp_path: Path) -> None:
    judged, plain = toy
    rows = rows_of("hellaswag" if task == "llm.c" else task)
    if task == "exact":  # transformers does not write beyond the context
        rows = [row for row in rows if len(row["prompt"]) < 99]
    data = write(tmp_path / "rows.jsonl", rows)
    name, items = read_items(data, style="llm.c" if task == "llm.c" else "lm-eval")
    assert name == ("hellaswag" if task == "llm.c" else task)
    found = dict(measure(judged, name, items))
    expected = [getattr(plain, task.replace(".", "_"))(row) for row in rows]
    ours = [found[number] for number in range(len(items))]
    assert [each.right for each in ours] == [each.right for each in expected]
    assert [each.right_norm for each in ours] == [each.right_norm for each in expected]
    assert {each.right for each in ours} == {True, False}
    if task == "lambada":
        assert [each.logprob for each in ours] == pytest.approx(
            [each.logprob for each in expected], abs=1e-4
        )
    assert any(each.cut for each in ours) == (task not in ("pairs", "exact"))
