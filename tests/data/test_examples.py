"""Rows of examples: every form from every kind of file, and every refusal names its place."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from gptsmith.config.finetune import FinetuneSettings
from gptsmith.config.settings import PrepareSettings
from gptsmith.data.copying import copying
from gptsmith.data.examples import (
    Conversation,
    Example,
    ExampleReader,
    Labelled,
    Preference,
    recognised_task,
)
from gptsmith.data.shakespeare import comedy_or_tragedy, plays
from gptsmith.data.small_tasks import PAIRS, TASKS, plural, small_tasks
from gptsmith.data.sorting import sorting
from gptsmith.data.sources import find_sources


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(path: Path | str, bad_rows: str = "error", **finetune: Any) -> list[Example]:
    options = PrepareSettings(bad_rows=bad_rows)  # type: ignore[arg-type]
    settings = FinetuneSettings(**finetune)
    reader = ExampleReader([str(path)], options, settings)
    found = [*reader.examples()]
    assert reader.read == reader.size
    assert recognised_task([str(path)], options, settings) == reader.task
    return found


def written(path: Path, rows: list[Any]) -> Path:
    """Rows as a file of JSON lines, JSON or Parquet, by the file's name."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TALK = [{"role": "system", "content": "short"}, user("hé"), says("ho"), user("x"), says("y")]
FORMS: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
    ({"messages": TALK}, ("messages", "", TALK)),
    (
        {"instruction": "add", "input": "1 2", "output": "3"},
        ("alpaca", "", [user("add\n\n### Input:\n1 2"), says("3")]),
    ),
    ({"instruction": "hi", "output": "ho"}, ("alpaca", "", [user("hi"), says("ho")])),
    (
        {"prompt": "1+1=", "completion": "2", "split": "test"},
        ("prompt", "test", [user("1+1="), says("2")]),
    ),
    (
        {"prompt": TALK[:2], "completion": [says("z")]},
        ("messages", "", [*TALK[:2], says("z")]),
    ),
    (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        ("prompt", "", [user("p")], says("c"), says("r")),
    ),
    (
        {"prompt": TALK[:2], "chosen": [says("c")], "rejected": [says("r")]},
        ("messages", "", TALK[:2], says("c"), says("r")),
    ),
    (  # whole conversations
        {"prompt": "hé", "chosen": [*TALK[:2], says("c")], "rejected": [*TALK[:2], says("r")]},
        ("prompt", "", TALK[:2], says("c"), says("r")),
    ),
    (
        {"instruction": "i", "input": "", "output": "o", "chosen": "c", "rejected": "r"},
        ("alpaca", "", [user("i")], says("c"), says("r")),
    ),
    ({"text": "buy now", "label": "spam"}, ("label", "", "buy now", "spam")),
    ({"Text": " a ", "Label": 1}, ("label", "", " a ", "1")),
    ({"text": "a", "label": False}, ("label", "", "a", "false")),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(("row", "expected"), FORMS)
def test_every_form_is_recognised_by_its_fields(
    tmp_path: Path, suffix: str, row: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    (found,) = read(written(tmp_path / f"rows{suffix}", [row]))
    assert found[1:] == expected
    kinds = {4: Conversation, 5: Labelled, 6: Preference}
    assert type(found) is kinds[len(found)]
    assert found.place == f"{tmp_path}/rows{suffix}, {'line' if suffix == '.jsonl' else 'row'} 1"


def test_tables_have_a_header_or_are_given_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('Label,Text\nham,"a, ""b"""\nspam,c\n')
    (tmp_path / "b.tsv").write_text('ham\t"a, ""b"""\nspam\tc\n')
    found = read(tmp_path / "a.csv")
    assert [example[2:] for example in found] == [("", 'a, "b"', "ham"), ("", "c", "spam")]
    assert [e[2:] for e in read(tmp_path / "b.tsv", columns="label,text")] == [e[2:] for e in found]
    with pytest.raises(ValueError, match=r"a\.csv, line 1 is a header: leave out --columns"):
        read(tmp_path / "a.csv", columns="Label,Text")
    with pytest.raises(ValueError, match=r"b\.tsv, line 1 has 2 fields, but the header 3"):
        read(tmp_path / "b.tsv", columns="label,text,more")
    with pytest.raises(ValueError, match=r"line 2 has none of the fields .*'ham'.*text and label"):
        read(tmp_path / "b.tsv")


def test_a_folder_for_each_label_perhaps_for_each_split(tmp_path: Path) -> None:
    for name in ("ham/2.txt", "ham/1.txt", "spam/1.txt"):
        for top in ("train", "test"):
            path = tmp_path / top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{top} {name}")
    found = read(tmp_path / "train")
    assert [(e.text, e.label, e.split) for e in found if isinstance(e, Labelled)] == [
        ("train ham/1.txt", "ham", ""),
        ("train ham/2.txt", "ham", ""),
        ("train spam/1.txt", "spam", ""),
    ]
    both = read(tmp_path)
    assert [e.split for e in both] == ["test"] * 3 + ["train"] * 3
    settings = PrepareSettings(), FinetuneSettings(task="text")
    assert recognised_task([str(tmp_path)], *settings) == "text"


def test_what_is_only_text_is_for_the_task_of_text(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", [{"text": "words"}])
    (tmp_path / "notes.txt").write_text("words")
    for name in (str(rows), str(tmp_path / "notes.txt"), str(tmp_path), "shakespeare"):
        assert recognised_task([name], PrepareSettings(), FinetuneSettings()) == "text"
    with pytest.raises(ValueError, match=r"notes\.txt is a text, not rows of examples"):
        read(tmp_path / "notes.txt", task="chat")
    with pytest.raises(ValueError, match="is a text, not rows of examples"):
        read("shakespeare", task="chat")


def test_the_settings_can_say_what_rows_are_for(tmp_path: Path) -> None:
    row = {"instruction": "i", "output": "o", "chosen": "c", "rejected": "r"}
    (found,) = read(written(tmp_path / "rows.json", [row]), task="chat")
    assert isinstance(found, Conversation)
    assert found.messages == [user("i"), says("o")]


BAD = [
    ({"prompt": "p", "chosen": "c"}, r"has no 'rejected' \(there are: 'prompt', 'chosen'\)"),
    ({"prompt": "p", "rejected": "r"}, "has no 'chosen'"),
    ({"chosen": "c", "rejected": "r"}, "has no 'prompt'"),
    ({"prompt": "p", "completion": ""}, "has an empty 'completion': text is needed"),
    ({"prompt": "p"}, "has no 'completion'"),
    ({"instruction": "i", "input": ""}, "has no 'output'"),
    ({"instruction": "i", "output": " \n"}, "has an empty 'output'"),
    ({"instruction": ["i"], "output": "o"}, "has list in 'instruction': text is needed"),
    ({"messages": "hi"}, "has str in 'messages': a list of messages is needed"),
    ({"messages": ["hi"]}, "has str as message 1 of 'messages': an object with role and content"),
    ({"messages": []}, "has 'messages' that do not end with one of role 'assistant'"),
    ({"messages": TALK[:2]}, "has 'messages' that do not end with one of role 'assistant'"),
    ({"messages": [*TALK, says("")]}, "has an empty 'content' of message 6 in 'messages'"),
    ({"messages": [{"role": "user"}]}, "has no 'content' of message 1 in 'messages'"),
    ({"messages": [{"from": "human", "value": "x"}]}, "has no 'role' of message 1 in 'messages'"),
    (
        {"messages": [{"role": "assistant", "content": None}]},
        "has null in 'content' of message 1 in 'messages'",
    ),
    (
        {"prompt": "p", "completion": [user("x")]},
        "has 'completion' that is not one",
    ),
    (
        {"chosen": TALK, "rejected": [user("x"), says("y")]},
        "has 'chosen' and 'rejected' that",
    ),
    ({"text": "t", "label": None}, r"has no 'label' \(there are: 'text'\)"),
    ({"text": "t", "label": 0.5}, "has float in 'label': text is needed"),
    ({"text": "t", "label": " "}, "has an empty 'label'"),
    ({"label": "x", "body": "t"}, r"has no 'text' \(there are: 'label', 'body'\)"),
    ({"text": "t", "label": "x", "split": "dev"}, "has 'dev' in 'split': train, validation or"),
    ({"prompt": "\ud800", "completion": "c"}, r"has a lone surrogate, U\+D800, in 'prompt'"),
    ({"who": 1}, r"has no 'prompt' \(there are: 'who'\)"),
    ([1], "is not a JSON object"),
]


@pytest.mark.parametrize(("row", "problem"), BAD)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path: Path, row: Any, problem: str) -> None:
    good = {"messages": TALK}
    if isinstance(row, dict):
        good = next(each for each, _ in FORMS if like(each, row))
    path = written(tmp_path / "rows.jsonl", [good, row, good])
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2 {problem}.*--bad-rows skip"):
        [*ExampleReader([str(path)], PrepareSettings(), FinetuneSettings()).examples()]
    reader = ExampleReader([str(path)], PrepareSettings(bad_rows="skip"), FinetuneSettings())
    assert len([*reader.examples()]) == 2
    assert reader.bad_rows.count == 1


def like(good: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a good row has the task of a bad one."""
    names = [{"chosen", "rejected"}, {"label"}]
    return [bool(each & {*row}) for each in names] == [bool(each & {*good}) for each in names]


def test_rows_of_another_task_than_the_first_are_bad(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": "x"}, {"prompt": "p", "completion": "c"}]
    with pytest.raises(ValueError, match="line 2 has no 'text'"):
        read(written(tmp_path / "rows.jsonl", rows))


# -- built in


def test_small_tasks_are_right_and_what_is_held_out_is_new() -> None:
    rows = [*small_tasks()]
    assert rows == [*small_tasks()]
    assert len({row["prompt"] for row in rows}) == len(rows)
    opposites = dict([*PAIRS, *(pair[::-1] for pair in PAIRS)])
    assert len(opposites) == 2 * len(PAIRS), "a word has two opposites"
    inputs: dict[tuple[str, str], set[str]] = {}
    wordings: dict[str, set[str]] = {}
    for row in rows:
        task, prompt, answer = row["task"], row["prompt"], row["completion"]
        words = prompt.strip(".?").split()
        if task == "opposite":
            assert answer == opposites[words[-1]]
            wordings.setdefault(row["split"], set()).add(prompt.replace(words[-1], "{}"))
            continue
        at = {"Write": 1, "Make": 1, "Reverse": 1, "Add": 1, "More": 3, "What": -1}[words[0]]
        text = words[at]
        if task == "sum":
            text = " ".join(words[-3:])
            assert int(answer) == int(words[-3]) + int(words[-1])
        elif task == "reverse":
            assert answer == "".join(reversed(text))
        elif task == "upper-case":
            assert answer == text.upper()
        else:
            assert answer == plural(text)
        inputs.setdefault((task, row["split"]), set()).add(text)
    for task in TASKS:
        train, validation, test = (inputs[task, s] for s in ("train", "validation", "test"))
        assert len(train | validation | test) == len(train) + len(validation) + len(test)
        assert len(validation) == len(test) == 200
    assert not (wordings["train"] & (wordings["test"] | wordings["validation"]))
    assert [plural(word) for word in ("box", "city", "day", "dog", "church")] == [
        *("boxes", "cities", "days", "dogs", "churches")
    ]


def test_copying_is_always_the_same_and_not_to_be_guessed() -> None:
    rows = [*copying()]
    assert rows == [*copying()]
    assert all(row["prompt"] == row["completion"] for row in rows)
    assert {len(row["prompt"]) for row in rows} == {*range(4, 17)}
    assert len({row["prompt"] for row in rows}) > 0.99 * len(rows) > 19_000


def test_sorting_has_every_input_once_and_its_letters_sorted() -> None:
    rows = [*sorting()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 3**6
    for row in rows:
        prompt, completion = row["prompt"], row["completion"]
        assert re.fullmatch("A*B*C*", completion)
        assert [completion.count(c) for c in "ABC"] == [prompt.count(c) for c in "ABC"]
        assert len(prompt) == len(completion) == 6


@pytest.mark.slow
def test_speeches_of_two_plays_of_each_kind_are_held_out() -> None:
    words = {name: {*re.findall(r"[^\s\[\]]+", text)} for name, text in plays()}
    rows = [*comedy_or_tragedy()]
    splits: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        folder = {"comedy": "comedies", "tragedy": "tragedies"}[row["label"]]
        assert {*row["text"].split()} <= words[f"{folder}/{row['play']}"]
        assert "[" not in row["text"]
        assert len(row["text"].split()) >= 20
        splits.setdefault(row["split"], set()).add((row["label"], row["play"]))
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [10, 2, 2]
    assert len(set.union(*splits.values())) == 8 + 6
    for split in ("validation", "test"):
        assert {label for label, _ in splits[split]} == {"comedy", "tragedy"}


def test_built_in_rows_are_sources_and_folders_of_examples_are_passed_over(tmp_path: Path) -> None:
    (source,) = find_sources(["small-tasks"])
    assert (source.name, source.kind) == ("small-tasks", "jsonl")
    made = tmp_path / "made"
    made.mkdir()
    (made / "examples.json").write_text("{}")
    (made / "notes.txt").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    with pytest.warns(UserWarning, match="skipped 1 of its folders, such as made"):
        assert [Path(each.name).name for each in find_sources([str(tmp_path)])] == ["a.txt"]
