"""Examples on disk: what is learned, what is cut and what is held out, against plain Python."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptsmith.config.finetune import FinetuneSettings
from gptsmith.config.settings import PrepareSettings
from gptsmith.data.encoded import Examples, prepare_examples
from gptsmith.machine.files import DamagedError
from gptsmith.tokenizers import Tokenizer, byte_tokenizer, char_tokenizer, gpt2_tokenizer
from gptsmith.tokenizers.chat import ALPACA, COMPLETION

BYTE = byte_tokenizer()
END = 256
WHOLE = {"validation_fraction": 0.0, "test_fraction": 0.0}
SETTINGS = {*PrepareSettings.__dataclass_fields__}


def made(
    data: list[dict[str, Any]] | str | Path,
    out: Path,
    tokenizer: Tokenizer = BYTE,
    *,
    context_length: int = 999,
    seed: int = 1,
    **options: Any,
) -> Examples:
    """The folder of some rows, or of a name."""
    if isinstance(data, list):
        path = out.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
        data = path
    prepare = PrepareSettings(**{k: v for k, v in options.items() if k in SETTINGS})
    finetune = FinetuneSettings(**{k: v for k, v in options.items() if k not in SETTINGS})
    steps = prepare_examples(
        [str(data)], tokenizer, out, prepare, finetune, context_length=context_length, seed=seed
    )
    *_, last = steps
    examples = Examples.open(out)
    examples.verify()
    assert last.bytes_done == last.bytes_total
    assert last.tokens == examples.ends[-1]
    return examples


def rows(examples: Examples, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """All rows of a split."""
    found = examples.split(split)
    read = [found.read(number) for number in range(len(found))]
    assert found.lengths.tolist() == [max(len(tokens) for tokens, _ in each) for each in read]
    return [(tokens.tolist(), targets.tolist()) for each in read for tokens, targets in each]


def pair(prompt: str, answer: str, length: int = 999) -> tuple[list[int], list[int]]:
    """The row of a prompt and an answer in bytes, by hand."""
    ids = [*prompt.encode(), *answer.encode(), END][: length + 1]
    targets = [-1] * (len(prompt.encode()) - 1) + ids[len(prompt.encode()) :]
    return ids[:-1], targets


# -- what is learned


def test_the_answer_and_its_end_are_learned(tmp_path: Path) -> None:
    examples = made([{"prompt": "1+1=", "completion": "zwéi"}], tmp_path / "out", **WHOLE)
    assert rows(examples) == [pair("1+1=", "zwéi")]
    assert (examples.task, examples.labels, examples.info["template"]) == ("chat", (), COMPLETION)
    assert examples.info["splits"]["train"] == {"examples": 1, "tokens": 9, "learned": 6}
    assert examples.tokenizer.usage.templates["default"] == COMPLETION


def test_every_answer_of_a_conversation_is_learned(tmp_path: Path) -> None:
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in talk]
    examples = made([{"messages": messages}], tmp_path / "out", **WHOLE)
    ((tokens, targets),) = rows(examples)
    assert bytes(tokens[-37:]) == b"\n\n### Instruction:\nc\n\n### Response:\nd"
    learned = [(i, target) for i, target in enumerate(targets) if target >= 0]
    assert [target for _, target in learned] == [ord("b"), END, ord("d"), END]
    for place, target in learned[:-1]:
        assert tokens[place + 1] == target
    assert examples.info["template"] == ALPACA


def test_alpaca_is_what_the_book_writes(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    examples = made([row], tmp_path / "out", gpt2_tokenizer(), **WHOLE)
    ((tokens, targets),) = rows(examples)
    prompt = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    ids = gpt2_tokenizer().encode(prompt)
    assert tokens == [*ids, *gpt2_tokenizer().encode("3")]
    assert targets == [-1] * (len(ids) - 1) + [*gpt2_tokenizer().encode("3"), 50256]


def test_no_token_spans_the_beginning_of_an_answer(tmp_path: Path) -> None:
    examples = made(
        [{"prompt": "the", "completion": "re is"}], tmp_path / "o", gpt2_tokenizer(), **WHOLE
    )
    encode = gpt2_tokenizer().encode
    assert rows(examples)[0][0] == encode("the") + encode("re is") != encode("there is")


def test_of_a_text_its_label_is_learned_at_the_last_token(tmp_path: Path) -> None:
    data = [{"text": text, "label": label} for text, label in (("bc", "z"), ("a", "y"), ("d", "x"))]
    examples = made(data, tmp_path / "out", **WHOLE)
    assert examples.labels == ("x", "y", "z")
    assert rows(examples) == [([98, 99], [-1, 2]), ([97], [1]), ([100], [0])]
    long = made(data, tmp_path / "cut", context_length=1, **WHOLE)
    assert rows(long)[0] == ([98], [2])
    assert long.info["counts"]["cut_prompts"] == 1


def test_a_preference_is_two_rows_of_one_prompt(tmp_path: Path) -> None:
    data = [{"prompt": "abcdef", "chosen": "gh", "rejected": "ijkl"}]
    examples = made(data, tmp_path / "out", **WHOLE)
    assert rows(examples) == [pair("abcdef", "gh"), pair("abcdef", "ijkl")]
    cut = made(data, tmp_path / "cut", context_length=6, **WHOLE)
    assert rows(cut) == [pair("ef", "gh"), pair("ef", "ijkl")]
    with pytest.warns(UserWarning, match="1 examples have the same text in 'chosen' and"):
        made([{"prompt": "p", "chosen": "c", "rejected": "c"}], tmp_path / "same", **WHOLE)


@pytest.mark.parametrize(
    ("length", "expected", "cut"),
    [
        (10, pair("abcdef", "ghij"), (0, 0)),
        (9, pair("bcdef", "ghij"), (1, 0)),
        (5, pair("f", "ghij"), (1, 0)),
        (4, ([*b"fghi"], [*b"ghij"]), (1, 1)),  # the end of the answer is not learned
        (1, ([*b"f"], [*b"g"]), (1, 1)),
    ],
)
def test_a_prompt_is_cut_at_its_left_and_only_then_the_answer(
    tmp_path: Path, length: int, expected: Any, cut: tuple[int, int]
) -> None:
    data = [{"prompt": "abcdef", "completion": "ghij"}]
    examples = made(data, tmp_path / "out", context_length=length, **WHOLE)
    assert rows(examples) == [expected]
    counts = examples.info["counts"]
    assert (counts["cut_prompts"], counts["cut_answers"]) == cut


def test_a_tokenizer_without_an_end_gets_one(tmp_path: Path) -> None:
    letters = char_tokenizer("abc")
    examples = made([{"prompt": "a", "completion": "b"}], tmp_path / "out", letters, **WHOLE)
    assert rows(examples) == [([0, 1], [1, 3])]
    assert examples.tokenizer.specials == {3: "<|endoftext|>"}
    with pytest.raises(ValueError, match=r"line 1: unknown character 'z'.*--bad-rows skip"):
        made([{"prompt": "a", "completion": "z"}], tmp_path / "two", letters, **WHOLE)
    skipped = made(
        [{"prompt": "az", "completion": "b"}], tmp_path / "three", letters, unknown="skip", **WHOLE
    )
    assert rows(skipped) == rows(examples)


def test_answers_of_a_fixed_length_are_learned_without_an_end(tmp_path: Path) -> None:
    fixed = {"template": "fixed-length", **WHOLE}
    letters = char_tokenizer("ABC")
    examples = made("sorting", tmp_path / "out", letters, context_length=11, **fixed)
    assert examples.tokenizer.fingerprint == letters.fingerprint, "a token was added"
    assert examples.info["counts"]["cut_prompts"] == examples.info["counts"]["cut_answers"] == 0
    found = {tuple(tokens[:6]): (tokens, targets) for tokens, targets in rows(examples)}
    assert len(found) == 729
    for prompt, row in found.items():
        whole = [*prompt, *sorted(prompt)]
        assert row == (whole[:-1], [-1] * 5 + whole[6:])
    one = made([{"prompt": "C", "completion": "A"}], tmp_path / "one", letters, **fixed)
    assert rows(one) == [([2], [0])]
    with pytest.raises(ValueError, match="its last answer is empty"):
        made([{"prompt": "A", "completion": "z"}], tmp_path / "z", letters, unknown="skip", **fixed)


# -- what is held out


def test_repeats_of_a_prompt_stay_together_and_the_counts_are_exact(tmp_path: Path) -> None:
    data = [{"prompt": f"p{n % 1075}", "completion": f"c{n}"} for n in range(1100)]
    options = {"validation_fraction": 0.05, "test_fraction": 0.1}
    examples = made(data, tmp_path / "out", **options)
    sizes = {name: len(examples.split(name)) for name in ("train", "validation", "test")}
    assert sizes == {"train": 935, "validation": 55, "test": 110}
    assert examples.info["counts"]["repeats"] == 25
    found = {
        name: {bytes(t[: t.index(ord("c"))]) for t, _ in rows(examples, name)} for name in sizes
    }
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 1075
    again = made(data, tmp_path / "again", **options)
    assert again.identity == examples.identity
    other = made(data, tmp_path / "other", seed=2, **options)
    assert other.order.tolist() != examples.order.tolist()
    assert other.identity != examples.identity


def test_rows_may_say_their_own_split(tmp_path: Path) -> None:
    splits = ["test", "train", "validation", "train"]
    data = [{"prompt": "p", "completion": str(n), "split": split} for n, split in enumerate(splits)]
    examples = made(data, tmp_path / "out")
    assert [len(rows(examples, name)) for name in ("train", "validation", "test")] == [2, 1, 1]
    assert rows(examples, "test") == [pair("p", "0")]


# -- the folder


def test_the_same_arguments_leave_it_and_others_are_refused(tmp_path: Path) -> None:
    data = [{"prompt": f"p{n}", "completion": "c"} for n in range(9)]
    examples = made(data, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert made(data, tmp_path / "out").identity == examples.identity
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    for change, word in (({"seed": 2}, "settings"), ({"tokenizer": gpt2_tokenizer()}, "base")):
        with pytest.raises(ValueError, match=f"out was made with other {word}: choose another"):
            made(data, tmp_path / "out", **change)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    with pytest.raises(ValueError, match="full already exists"):
        made(data, tmp_path / "full")
    with (tmp_path / "out" / "tokens.bin").open("ab") as file:
        file.write(b"1234")
    with pytest.raises(DamagedError, match=r"has tokens\.bin or targets\.bin of another size"):
        Examples.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([{"text": "a", "label": "x"}] * 9, {}, "all labels are 'x': at least two different"),
        ([], {}, "there is no example in "),
        ([{"prompt": "p", "completion": "c"}], {}, "1 examples with 1 different prompts are too"),
        ([{"who": 1}], {"bad_rows": "skip"}, "no example in .*; the first bad row: .* has none"),
        ([{"prompt": "p", "completion": "c"}], {"template": "nope"}, "no chat template 'nope'"),
    ],
)
def test_what_cannot_be_learned_from_leaves_nothing(
    tmp_path: Path, data: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        made(data, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_template_of_ones_own_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    data = [{"prompt": "p", "completion": "c"}]
    examples = made(data, tmp_path / "out", template=str(path), **WHOLE)
    # What follows the end is kept, and not learned.
    tokens, targets = pair("u:p\na:", "c")
    assert rows(examples) == [([*tokens, END], [*targets, -1])]
    path.write_text("{% for %}")
    with pytest.raises(ValueError, match="the chat template is not valid Jinja"):
        made(data, tmp_path / "bad", template=str(path), **WHOLE)
