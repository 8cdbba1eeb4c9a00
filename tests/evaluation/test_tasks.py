"""Tasks with right answers: the arithmetic, by a plain implementation with transformers' logits.

One text at a time, no batches, no cache; tests/clients has lm-evaluation-harness itself. Also how
files are recognised, and what is refused.
"""

import json
import math
import random
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
import transformers

from gptsmith import GPT, GPTConfig, load, save
from gptsmith.config.settings import PrepareSettings
from gptsmith.evaluation import likelihood
from gptsmith.evaluation.accuracy import Measured, Outcome, compare
from gptsmith.evaluation.likelihood import Request, likelihoods
from gptsmith.evaluation.task_forms import TASKS, read_items
from gptsmith.evaluation.task_requests import Judged
from gptsmith.evaluation.tasks import MEASURES, measure
from gptsmith.tokenizers.build import char_tokenizer, learn_bpe
from tests.conftest import TINY, scrambled
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


# -- likelihoods


@pytest.mark.parametrize("block", [{}, {"block": "modern", "n_embd": 24, "n_kv_head": 1}])
def test_a_context_is_read_once_or_each_time(
    block: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts and continuations of all lengths that fit, in small batches and parts."""
    model, random_ = scrambled(GPTConfig(**TINY | block)), random.Random(1)
    limit, V = model.config.context_length, model.config.vocab_size
    requests = []
    for length in (1, 2, 5, 8, 9, limit):
        context = tuple(random_.choices(range(V), k=length))
        for count in (1, 1, 2, 3, limit + 1 - length):
            if 1 <= count <= limit + 1 - length:
                requests.append(Request(context, tuple(random_.choices(range(V), k=count))))
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 2 * V)
    found = [{}, {}, {}]
    for each, (least, size) in zip(found, [(1, 1 << 28), (1, 5000), (99, 1 << 28)], strict=True):
        monkeypatch.setattr(likelihood, "LEAST_SHARED", least)
        monkeypatch.setattr(likelihood, "CACHE_BYTES", size)
        for part in likelihoods(model, requests):
            assert not each.keys() & part.keys()
            each |= part
    with torch.no_grad():
        for number, (context, continuation) in enumerate(requests):
            logits, wanted = model(torch.tensor([[*context, *continuation[:-1]]])).logits[0], []
            logprobs = logits.log_softmax(-1)[len(context) - 1 :]
            wanted = torch.tensor(continuation)
            greedy = bool((logprobs.argmax(-1) == wanted).all())
            for each in found:
                assert each[number].greedy == greedy
                total = float(logprobs[range(len(wanted)), wanted].double().sum())
                assert each[number].logprob == pytest.approx(total, abs=1e-4)


# -- figures


def test_standard_errors_are_of_the_sample() -> None:
    right = [True, True, False, True, False]
    logprobs = [-1.0, -3.0, -2.5, -0.5, -4.0]
    pairs = zip(right, logprobs, strict=True)
    figures = Measured([Outcome(each, logprob=nats) for each, nats in pairs]).to_json()
    assert figures["accuracy"] == 0.6
    assert figures["accuracy_stderr"] == pytest.approx(statistics.stdev(right) / math.sqrt(5))
    assert figures["perplexity"] == pytest.approx(math.exp(2.2))
    assert "accuracy_norm" not in figures
    assert Measured([Outcome(True)]).to_json()["accuracy_stderr"] is None


def test_two_models_on_the_same_items() -> None:
    def outcomes(*right: int) -> Measured:
        return Measured([Outcome(bool(each), right_norm=True) for each in right * 20])

    plain, norm = compare(outcomes(1, 1, 1, 0), outcomes(1, 0, 0, 1))
    assert (plain.only_first, plain.only_second, plain.items) == (40, 20, 80)
    assert plain.p_value == pytest.approx(scipy.stats.binomtest(20, 60).pvalue)
    found = plain.to_json() | norm.to_json()
    assert found["difference"] == 0.25
    assert found["interval"][0] < 0.25 < found["interval"][1]
    assert (found["verdict"], found["verdict_norm"]) == ("better", "undecided")
    assert plain.sentence("a", "b").startswith("a is better than b by 0.2500 in accuracy (95% ")
    assert "Only a is right on 40 items, only b on 20" in plain.sentence("a", "b")
    (back, _) = compare(outcomes(1, 0, 0, 1), outcomes(1, 1, 1, 0))
    assert back.to_json()["verdict"] == "worse"


# -- files


FORMS: dict[str, dict[str, Any]] = {
    "hellaswag": {"ctx": "a b", "ctx_a": "a", "ctx_b": "", "activity_label": "x", "label": 1,
                  "endings": ["c", "d"]},
    "lambada": {"text": "a b c"},
    "choices": {"prompt": "a", "choices": ["b", "c", "d"], "answer": 2},
    "classify": {"text": "a", "label": "b"},
    "exact": {"prompt": "a", "answer": "b"},
    "pairs": {"good": "a", "bad": "b"},
}  # fmt: skip


def test_there_is_a_form_of_each_task() -> None:
    assert FORMS.keys() == TASKS.keys()
    assert {form.measure for form in TASKS.values()} == MEASURES.keys()


@pytest.mark.parametrize("task", FORMS)
def test_the_fields_tell_the_task(task: str, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [FORMS[task], FORMS[task]])
    name, items = read_items(data)
    assert (name, len(items)) == (task, 2)
    assert items[1].place == f"{data}, line 2"
    assert read_items(data, task)[1] == items


def test_an_answer_is_a_number_or_a_choice(tmp_path: Path) -> None:
    rows = [{**FORMS["choices"], "answer": answer} for answer in (1, "1", "c", "d")]
    rows.append({"prompt": "", "choices": ["2", "1", "0"], "answer": "2", "delimiter": ""})
    _, items = read_items(write(tmp_path / "rows.jsonl", rows))
    assert [item.answer for item in items] == [1, 1, 1, 2, 0]
    assert [item.delimiter for item in items] == [" "] * 4 + [""]


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("choices", {"answer": 3}, "has 3 in 'answer': the number of one of its choices, 0 to 2"),
        ("choices", {"answer": "e"}, "has 'e' in 'answer'"),
        ("choices", {"answer": True}, "has True in 'answer'"),
        ("choices", {"choices": ["b"]}, "has 1 texts in 'choices': at least 2"),
        ("choices", {"choices": "bc"}, "has str in 'choices': a list of texts"),
        ("hellaswag", {"label": ""}, "has '' in 'label'"),
        ("hellaswag", {"ctx_a": None}, r"has no 'ctx_a' \(there are: 'ctx'"),
        ("lambada", {"text": "a b "}, "ends with a space: it must end with its last word"),
        ("pairs", {"bad": " "}, "has an empty 'bad'"),
        ("exact", {"answer": ["b"]}, "has list in 'answer'"),
    ],
)
def test_a_wrong_row_is_named(task: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [FORMS[task], {**FORMS[task], **change}])
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2 .*{said}"):
        read_items(data)
    skipping = PrepareSettings(bad_rows="skip")
    with pytest.warns(UserWarning, match="1 bad rows were skipped"):
        assert len(read_items(data, options=skipping)[1]) == 1


def test_answers_of_a_fixed_length_end_there(tmp_path: Path) -> None:
    model, tokenizer = load(Path(__file__).parents[1] / "inspection" / "sorting_model")
    assert tokenizer is not None
    task, items = read_items("sorting")
    assert (task, len(items)) == ("exact", 729)
    found = list(measure(Judged(model, tokenizer), task, items[::20]))
    assert [outcome for _, outcome in found] == [Outcome(True)] * 37
    row = {"prompt": "CBA", "completion": "CBA", "answer": "ABC"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert read_items(str(tmp_path / "rows.jsonl"))[1][0].answer == "ABC"


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [FORMS["choices"]])
    with pytest.raises(ValueError, match="line 1 has the fields 'prompt', 'choices', 'answer', wh"):
        read_items(data, "hellaswag")
    assert read_items(data, "exact")[0] == "exact"  # it has what that needs
    with pytest.raises(ValueError, match="line 1 has the fields 'x'; needed are those of"):
        read_items(write(tmp_path / "rows.jsonl", [{"x": 1}]))
    with pytest.raises(ValueError, match="has no rows of questions"):
        read_items(write(tmp_path / "rows.jsonl", []), "pairs")
    (tmp_path / "text.txt").write_text("a b c")
    with pytest.raises(ValueError, match=r"text.txt is not a file of rows: .jsonl,"):
        read_items(str(tmp_path / "text.txt"), "lambada")


def test_what_a_model_cannot_be_asked(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("abc d")
    model = GPT(GPTConfig(**(TINY | {"vocab_size": tokenizer.vocab_size})))
    judged = Judged(model, tokenizer)
    for row, said in [
        (FORMS["pairs"], "line 1: there is no prompt, and the model's tokenizer has no token"),
        ({"text": "a bé"}, "line 1: unknown character 'é'"),
        ({"text": "a" + " b" * 3 + " " + "c" * 12}, "line 1: a choice has 13 tokens, but the mo"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 0, "delimiter": ""}, None),
    ]:
        name, items = read_items(write(tmp_path / "rows.jsonl", [row]))
        if said:
            with pytest.raises(ValueError, match=said):
                list(measure(judged, name, items))
        else:
            assert len(list(measure(judged, name, items))) == 1
    assert model.training  # as before
