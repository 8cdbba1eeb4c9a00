"""Fine-tuning as it is typed: every task learns, resumes to the same bits, and refuses nonsense."""

import json
import math
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

import gptsmith
from gptsmith import GPT, GPTConfig
from gptsmith.checkpoint.finding import checkpoints, find_model
from gptsmith.cli.main import main
from gptsmith.config.recipe import read_toml
from gptsmith.data.encoded import Examples
from gptsmith.data.example_batches import ExampleBatches, padded
from gptsmith.finetuning.batch import first_batch, pieces
from gptsmith.finetuning.classify import LabelledPrefixes
from gptsmith.finetuning.finetune import finetune_settings
from gptsmith.finetuning.task import cut
from gptsmith.machine.terminal import Display
from gptsmith.model.classifier import Classifier
from gptsmith.model.dropout import dropout_seeds
from gptsmith.tokenizers import byte_tokenizer
from tests.training.test_resume import refusal
from tests.training.test_run import records

__all__ = ["refusal"]

WORDS = ["".join(random.Random(n).choice("abcde") for _ in range(1 + n % 5)) for n in range(60)]
DATA = {
    "chat": [{"instruction": f"Say {w}", "input": "", "output": w.upper()} for w in WORDS],
    "classify": [{"text": f"{w} {n % 3}", "label": "abc"[n % 3]} for n, w in enumerate(WORDS)],
    "preference": [
        {"prompt": f"Say {w}.", "chosen": w.upper(), "rejected": w[::-1] + "!"} for w in WORDS
    ],
}
TOY = [
    "--steps", "8", "--save-every", "4", "--evaluate-every", "4", "--warmup-steps", "0",
    "--batch-rows", "6", "--threads", "1", "--dtype", "float32", "--fused", "no",
    "--attention", "kernel", "--sample-tokens", "3", "--learning-rate", "0.01",
]  # fmt: skip

TOY_TEXT = [{"--batch-rows": "--batch-tokens", "6": "400"}.get(word, word) for word in TOY]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a small model of bytes and a file of examples for each task."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    config = GPTConfig(vocab_size=257, context_length=200, n_layer=2, n_head=2, n_embd=8)
    gptsmith.save(GPT(config), byte_tokenizer(), "base")
    for task, rows in DATA.items():
        Path(f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("text.txt").write_text(" ".join(WORDS) * 30)


@pytest.mark.slow
def test_answers_of_a_fixed_length_are_judged_without_an_end(
    capsys: pytest.CaptureFixture,
) -> None:
    sizes = "--steps 8 --evaluate-every 8 --warmup-steps 0 --sample-tokens 9 --n-layer 1 --n-embd 4"
    words = [*sizes.split(), *TOY[TOY.index("--threads") : TOY.index("--sample-tokens")]]
    assert main(["train", "sorting", *words, "--out", "sorts"]) == 0
    said = capsys.readouterr().err
    assert "the answers are learned, 55% of the tokens\n" in said
    assert "gptsmith sample sorts --prompt TEXT" in said
    test = json.loads(Path("sorts/test.json").read_text())
    answers = [json.loads(line) for line in Path("sorts/answers.jsonl").read_text().splitlines()]
    assert "ended" not in test
    assert f"of 73 answers, {test['exact']} are exactly those wanted" in said
    assert test["answers"] == len(answers) == 73
    assert {len(each["answer"]) for each in answers} == {6}
    assert test["exact"] == sum(each["answer"] == each["wanted"] for each in answers)
    everything = records(Path("sorts"))[-1]["sorting_accuracy"] * 729
    assert test["exact"] <= round(everything, 6) == round(everything)


def tuned(task: str, out: str, *words: str, model: str = "base") -> Path:
    """The run of a fine-tuning that must succeed."""
    data = "text.txt" if task == "text" else f"{task}.jsonl"
    toy = TOY if task != "text" else TOY_TEXT
    assert main(["finetune", model, "--data", data, "--out", out, *toy, *words]) == 0
    return Path(out)


def same_weights(one: Path, other: Path) -> bool:
    """Whether the last checkpoints of two runs have the same tensors, whatever these are."""
    name = f"checkpoints/{(one / 'last').read_text().strip()}"
    files = sorted(path.name for path in (one / name).glob("*.safetensors"))
    first, second = ({f: load_file(run / name / f) for f in files} for run in (one, other))
    return all(torch.equal(first[f][n], second[f][n]) for f in files for n in first[f])


# -- learning


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--lora", "2"), ("--freeze", "all-but-last-1")])
@pytest.mark.parametrize("task", ["chat", "classify", "preference", "text"])
def test_a_resumed_run_has_the_same_bits(task: str, lora: tuple[str, ...]) -> None:
    whole = tuned(task, "whole", *lora, "--dropout", "0.2")
    run = tuned(task, "run", *lora, "--dropout", "0.2")
    for path in checkpoints(run):
        if path.name > "step-00000004":
            shutil.rmtree(path)
    assert main(["train", "--resume", "run"]) == 0
    assert same_weights(whole, run)
    assert [r["loss"] for r in records(run)] == [r["loss"] for r in records(whole)]
    assert records(run)[-1]["tokens"] == records(whole)[-1]["tokens"]


@pytest.mark.slow
def test_config_toml_repeats_the_run() -> None:
    run = tuned("classify", "run")
    assert main(["train", str(run / "config.toml"), "--out", "again"]) == 0
    assert same_weights(run, Path("again"))


@pytest.mark.slow
def test_adapters_are_trained_for_longer_as_the_run_advises(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuned("classify", "run", "--lora", "2")
    (advised,) = re.findall(r"^  longer +(.*)", capsys.readouterr().err, re.MULTILINE)
    for command in advised.split(" && "):
        assert main(shlex.split(command)[1:]) == 0
    config = read_toml(Path("runs/config-1/config.toml"))
    assert config.finetune.lora == 2
    assert config.training.start_from == str(Path("run/merged").resolve())


@pytest.mark.parametrize("micro_batch", ["1", "4", "6"])
def test_preferences_begin_at_the_logarithm_of_two(micro_batch: str) -> None:
    run = tuned("preference", "run", "--steps", "1", "--micro-batch", micro_batch)
    assert records(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_preferences_are_learned_from_one_reading_of_the_reference() -> None:
    run = tuned("preference", "run", "--steps", "40", "--beta", "0.5")
    last = records(run)[-1]
    assert last["validation_accuracy"] == 1
    assert last["reward_margin"] > 0.5
    assert json.loads((run / "test.json").read_text())["accuracy"] == 1


@pytest.mark.slow
def test_a_classifier_learns_what_a_text_ends_with() -> None:
    run = tuned("classify", "run", "--steps", "60")
    found = json.loads((run / "test.json").read_text())
    assert found["accuracy"] == 1
    assert found["baselines"]["most_frequent"] < 0.6
    assert (run / "confusion.png").stat().st_size > 1000
    assert records(run)[-1]["validation_accuracy"] == 1


@pytest.mark.slow
def test_new_tokens_get_rows_and_a_tied_head_stays_tied() -> None:
    """A tokenizer of characters has no token that ends an answer."""
    Path("some.txt").write_text("".join(map(chr, range(32, 127))) * 20 + "\n")
    words = "--tokenizer char --n-layer 1 --n-head 2 --n-embd 8 --context-length 16 --steps 1"
    assert main(["train", "some.txt", "--out", "chars", *words.split()]) == 0
    Path("chars.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\n' * 3)
    words = "--steps 1 --batch-rows 1 --out run --test-fraction 0 --validation-fraction 0"
    assert main(["finetune", "chars", "--data", "chars.jsonl", *words.split()]) == 0
    before, after = (gptsmith.load(each) for each in ("chars", "run"))
    assert after[0].config.vocab_size == before[0].config.vocab_size + 1
    assert after[0].lm_head.weight is after[0].wte.weight
    assert after[1].specials == {after[0].config.vocab_size - 1: "<|endoftext|>"}


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_beginnings_of_texts_weigh_what_they_should(micro_batch: int) -> None:
    """Against a loop over texts and their beginnings, each read alone, in float64."""
    torch.manual_seed(3)
    config = GPTConfig(vocab_size=9, context_length=12, n_layer=1, n_head=2, n_embd=8)
    model = Classifier.of(GPT(config), ("a", "b", "c"), 0).double()
    texts, labels, weight = ([1, 2, 3, 4, 5], [6, 7], [8]), (2, 0, 1), 0.6
    tokens, targets = torch.zeros(3, 5, dtype=torch.long), torch.full((3, 5), -1)
    expected = 0.0
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        tokens[row, : len(text)], targets[row, len(text) - 1] = torch.tensor(text), label
        total = sum(range(1, len(text) + 1))
        for length in range(1, len(text) + 1):
            scores = model.lm_head(model.features(torch.tensor([text[:length]])))[0, -1]
            share = weight * length / total + (1 - weight) * (length == len(text))
            expected += share * F.cross_entropy(scores, torch.tensor(label)).item() / 3
    objective = LabelledPrefixes(weight)
    parts = zip(tokens.split(micro_batch), targets.split(micro_batch), strict=True)
    found = sum(objective.loss(model, *part).item() * len(part[0]) / 3 for part in parts)
    assert found == pytest.approx(expected, abs=1e-6)


# -- what is learned is what others compute


def batch_of(run: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows = Examples.open(run / "data").split(split)
    tokens, targets = padded([rows.read(number) for number in range(len(rows))])
    return torch.from_numpy(tokens), torch.from_numpy(targets)


@pytest.mark.slow
def test_the_loss_of_answers_is_that_of_transformers() -> None:
    run = tuned("chat", "run")
    tokens, targets = batch_of(run, "validation")
    theirs = GPT2LMHeadModel.from_pretrained(find_model(run)).eval()
    with torch.no_grad():
        logits = theirs(tokens).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    best = min(r["validation_loss"] for r in records(run) if "validation_loss" in r)
    assert best == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.slow
def test_the_loss_of_labels_is_that_of_transformers() -> None:
    run = tuned("classify", "run")
    tokens, targets = batch_of(run, "validation")
    mask = torch.arange(tokens.shape[1]) <= (targets >= 0).int().argmax(1)[:, None]
    theirs = GPT2ForSequenceClassification.from_pretrained(find_model(run)).eval()
    tokens = tokens.where(mask, theirs.config.pad_token_id)
    with torch.no_grad():
        found = theirs(tokens, attention_mask=mask.int(), labels=targets.max(1).values)
    best = min(r["validation_loss"] for r in records(run) if "validation_loss" in r)
    assert best == pytest.approx(float(found.loss), abs=1e-5)


def test_a_row_of_a_batch_is_read_as_if_it_were_alone() -> None:
    model = GPT(GPTConfig(vocab_size=9, context_length=12, n_layer=2, n_head=2, n_embd=8)).eval()
    rows = [[(np.arange(n) % 9, np.arange(n) % 9)] for n in (3, 12, 7)]
    tokens, _ = padded(rows)
    with torch.no_grad():
        together = model(torch.from_numpy(tokens)).logits
        for row, ((alone, _),) in zip(together, rows, strict=True):
            expected = model(torch.from_numpy(alone)[None]).logits[0]
            torch.testing.assert_close(row[: len(alone)], expected)


# -- batches


class Lengths:
    """Examples of these lengths, each of which has only its own number as tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        tokens = np.full(self.lengths[number], number)
        return [(tokens, tokens)]


def test_an_epoch_has_each_example_once_whatever_the_processes() -> None:
    lengths = [1 + n * 7 % 50 for n in range(131)]
    one = ExampleBatches(Lengths(lengths), 6, seed=3)
    assert one.epoch_steps == 21
    for epoch in range(3):
        steps = range(epoch * 21, (epoch + 1) * 21)
        numbers = np.concatenate([one.numbers(step) for step in steps])
        assert len({*numbers.tolist()}) == 126
    several = [ExampleBatches(Lengths(lengths), 6, seed=3, rank=r, world_size=4) for r in range(4)]
    for step in (0, 20, 21, 50):
        rows = [row[0] for each in several for row in each.at(step)[0]]
        assert sorted(rows) == sorted(one.numbers(step))
    assert any((one.numbers(s) != one.numbers(s + 21)).any() for s in range(21))


def test_texts_of_similar_length_make_a_batch_of_labels() -> None:
    choose = random.Random(1)
    examples = Lengths([choose.randint(5, 200) for _ in range(643)])
    alike, drawn = (ExampleBatches(examples, 8, seed=3, group=group) for group in (16, 1))
    spread = []
    for batches in (alike, drawn):
        numbers = [batches.numbers(step) for step in range(batches.epoch_steps)]
        assert len({*np.concatenate(numbers).tolist()}) == 640
        spread.append(np.mean([np.ptp(examples.lengths[each]) for each in numbers]))
        firsts = [int(examples.lengths[each[0]]) for each in numbers]
        assert firsts != sorted(firsts, reverse=True)
    assert spread[0] < spread[1] / 5
    parts = [ExampleBatches(examples, 8, seed=3, group=16, rank=r, world_size=4) for r in range(4)]
    rows = [row[0] for each in parts for row in each.at(17)[0]]
    assert sorted(rows) == sorted(alike.numbers(17))


def test_the_longest_of_a_batch_come_first_and_padding_is_cut() -> None:
    choose = random.Random(1)
    lengths = [choose.randint(5, 200) for _ in range(160)]
    batches = ExampleBatches(Lengths(lengths), 16, seed=3)
    whole = read = 0
    for step in range(batches.epoch_steps):
        tokens, targets = map(torch.from_numpy, batches.at(step))
        assert tokens.shape[1] == max(lengths[number] for number in batches.numbers(step))
        for part in zip(tokens.split(4), targets.split(4), strict=True):
            fewer, _ = cut(*part)
            whole, read = whole + part[0].numel(), read + fewer.numel()
            assert (part[0][:, fewer.shape[1] :] == 0).all()
    assert sum(batches.tokens(step) for step in range(batches.epoch_steps)) == sum(lengths)
    assert sum(lengths) / read > 0.85 > sum(lengths) / whole


@pytest.mark.parametrize("seeded", [False, True])
def test_what_is_cut_changes_no_loss(seeded: bool) -> None:
    config = GPTConfig(vocab_size=9, context_length=12, n_layer=1, n_head=2, n_embd=8, dropout=0.1)
    model = GPT(config).double()
    tokens, targets = torch.randint(9, (3, 12)), torch.full((3, 12), -1)
    targets[0, 4], targets[2, 6] = 3, 5
    seeds = [dropout_seeds(1, 2, torch.arange(3), 1)] if seeded else []
    assert cut(tokens, targets, *seeds)[0].shape == ((3, 12) if seeded else (3, 7))
    model.train(seeded)
    torch.testing.assert_close(
        model.loss(*cut(tokens, targets, *seeds)), model.loss(tokens, targets, *seeds)
    )


# -- what is seen


def test_the_first_batch_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", "base", "--data", "chat.jsonl", "--batch-rows", "3", "--show-batch"]
    assert main([*words, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3
    for row in rows:
        prompt, answer, *padding = row["pieces"]
        assert prompt["text"].endswith("\n\n### Response:\n")
        word = prompt["text"].partition("Say ")[2].split()[0]
        assert answer == {
            "kind": "answer",
            "text": word.upper() + "<|endoftext|>",
            "tokens": len(word) + 1,
        }
        assert all(piece["kind"] == "padding" for piece in padding)
    assert main(words) == 0
    assert capsys.readouterr().out.count("### Response:") == 3
    assert not Path("runs").exists()


def test_what_follows_an_answer_is_shown_as_no_answer() -> None:
    """The last token of a row is known only as a target, and is none where it is not learned."""
    ids = list(b"ab")
    assert pieces(byte_tokenizer(), ids, [-1, ids[1]], 3) == [
        {"kind": "prompt", "text": "a", "tokens": 1},
        {"kind": "answer", "text": "b", "tokens": 1},
        {"kind": "padding", "text": "", "tokens": 1},
    ]
    template = "{{ messages[0].content }}{% if messages[1] %}{{ messages[1].content }}"
    Path("line.jinja").write_text(template + "{{ eos_token }}\n{{ ' ' }}{% endif %}")
    settings, _ = finetune_settings("base", {"data": "chat.jsonl", "template": "line.jinja"})
    for row in first_batch(settings, Display(quiet=True)):
        kinds = [piece["kind"] for piece in row["pieces"]]
        assert kinds[:2] == ["prompt", "answer"]
        assert row["pieces"][1]["text"].endswith("<|endoftext|>")
        prompts = [piece for piece in row["pieces"] if piece["kind"] == "prompt"]
        assert [piece["text"] for piece in prompts[1:]] == ["\n"]  # and the space is not known
        assert all(piece["tokens"] == len(piece["text"]) for piece in prompts)


# -- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fresh --data preference.jsonl", "use a model that answers already"),
        ("fresh --data text.txt", "use gptsmith train"),
        ("fresh --data chat.jsonl --lora 2", "name one in place of fresh"),
        ("base --data chat.jsonl --lora 0", "--lora is 0: at least 1 is needed"),
        ("base --data chat.jsonl --n-layer 3", "--n-layer cannot go with base"),
        ("base --data chat.jsonl --freeze all-but-last-3", "the model has only 2 blocks"),
        ("base --data chat.jsonl --freeze most", "--freeze is 'most': all-but-last-N is needed"),
        ("base --data chat.jsonl --lora 2 --freeze all-but-last-1", "leave --freeze out"),
        ("base --data chat.jsonl --batch-rows 49", "--batch-rows is 49: from 1"),
        ("base --data text.txt --show-batch", "all of which is learned"),
        ("base --data chat.jsonl --tokenizer gpt2", "is not that of"),
        ("base --data nowhere.jsonl", "nowhere.jsonl"),
        ("base", "add --data"),
        ("missing --data chat.jsonl", "no model at missing"),
        ("--data chat.jsonl", "a model to start from is needed, or fresh"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    words: str, said: str, refusal: Callable[..., str]
) -> None:
    assert said in refusal("finetune", *words.split(), "--out", "run")
    assert not Path("run").exists()
