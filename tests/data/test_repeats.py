"""Documents that repeat: against sets of Python, and files whose repeats were left out by hand."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest

from gptsmith.cli.main import main
from gptsmith.config.settings import PrepareSettings
from gptsmith.data.prepare import prepare
from gptsmith.data.repeats import stretches_in_training
from gptsmith.data.shards import Dataset
from tests.data.test_overlap import Listed


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def made(source: Path, out: Path, tokenizer: str = "byte", **options) -> Dataset:
    for _ in prepare([str(source)], tokenizer, out, options=PrepareSettings(**options)):
        pass
    return Dataset.open(out)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def some_texts(count: int) -> list[str]:
    """Of them about a third are repeats; a few are nearly so."""
    draw = random.Random(count)
    texts = [f"Document {draw.randrange(count)} of {draw.choice('ab')}." for _ in range(count)]
    return [*texts, texts[0] + " ", texts[1].lower()]


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@pytest.mark.parametrize("count", [2, 3, 40, 400])
def test_repeats_are_dropped(tmp_path: Path, count: int, tokenizer: str) -> None:
    """The result is that of a file without them, whose texts a dict of Python has left."""
    texts = some_texts(count)
    once = list(dict.fromkeys(texts))
    found = made(write_rows(tmp_path / "all.jsonl", texts), tmp_path / "1", tokenizer,
                 deduplicate=True, workers=3)  # fmt: skip
    assert found.info["settings"]["deduplicate"] is True
    expected = made(write_rows(tmp_path / "once.jsonl", once), tmp_path / "2", tokenizer)
    assert shards(tmp_path / "1") == shards(tmp_path / "2")
    lost = sum(map(len, texts)) - sum(map(len, once))
    assert found.info["dropped"] == {"documents": len(texts) - len(once), "bytes": lost}
    assert "dropped" not in expected.info
    for split in ("train", "validation"):
        assert found.info[split] == expected.info[split]
    assert found.info["split"]["rule"] == expected.info["split"]["rule"]
    made(tmp_path / "all.jsonl", tmp_path / "1", tokenizer, deduplicate=True)  # is left as it is
    with pytest.raises(ValueError, match=r"prepared with other (split and )?settings"):
        made(tmp_path / "all.jsonl", tmp_path / "1", tokenizer)


def test_repeated_files_are_dropped_however_long(tmp_path: Path) -> None:
    """Longer than what is read at once; of the last, the only one, the tail is held out."""
    folder, text = tmp_path / "in", "".join(f"Line {i} of many.\n" for i in range(120_000))
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(text)
    found = made(folder, tmp_path / "out", deduplicate=True)
    assert found.info["dropped"] == {"documents": 2, "bytes": 2 * len(text)}
    assert found.info["split"]["rule"] == "tail"
    assert (
        bytes(found.train.read(0, len(found.train)).tolist()).decode()
        == text[: len(text) // 10 * 9]
    )
    rows = write_rows(tmp_path / "rows.jsonl", [text, "other " * 9])
    both = [str(folder), str(rows)]
    list(prepare(both, "byte", tmp_path / "two", options=PrepareSettings(deduplicate=True)))
    assert Dataset.open(tmp_path / "two").info["dropped"]["documents"] == 3


def test_validation_documents_in_training_are_counted(tmp_path: Path) -> None:
    texts = some_texts(300)
    held_out = [i for i in range(len(texts)) if i % 10 == 4]
    learned = {text for i, text in enumerate(texts) if i not in held_out}
    count = sum(texts[i] in learned for i in held_out)
    assert 0 < count < len(held_out)
    path = write_rows(tmp_path / "rows.jsonl", texts)
    with pytest.warns(UserWarning, match=f"{count} of {len(held_out)} validation documents are in"):
        found = made(path, tmp_path / "out")
    assert found.info["overlap"]["documents"] == count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made(path, tmp_path / "once", deduplicate=True).info["overlap"]["documents"] == 0


def test_a_tail_that_repeats_is_warned_of(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["sun", "moon", "rain", "sea", "hill", "wind", "stone", "leaf"]
    text = " ".join(draw.choice(words) for _ in range(4000))
    path, size = tmp_path / "a.txt", len(text)
    path.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overlap = made(path, tmp_path / "fine").info["overlap"]
    assert overlap == {"documents": 0, "stretches": 1000, "repeated_stretches": 0}
    path.write_text(text + text[size // 4 : size // 4 + size // 18])  # half of the last tenth
    with pytest.warns(UserWarning, match=r"about 5\d% of the validation text is in the training"):
        made(path, tmp_path / "out")


def test_stretches_are_found_wherever_they_lie() -> None:
    draw = np.random.default_rng(0)
    learned = bytes(draw.integers(0, 250, 5000).tolist())
    held_out = bytearray(draw.integers(0, 250, 4000).tolist())
    for start in range(0, 4000, 200):
        place = int(draw.integers(0, 4900))
        held_out[start : start + 100] = learned[place : place + 100]
    held_out[2000:2100] = bytes([255]) * 100  # ends of documents
    sought, found = stretches_in_training(Listed(learned), Listed(bytes(held_out)), 255)
    starts = np.unique(np.linspace(0, 4000 - 81, 1000).astype(int))
    stretches = [bytes(held_out[start : start + 81]) for start in starts]
    stretches = [each for each in stretches if 255 not in each[:-1]]
    whole = sum(each in learned for each in stretches)
    any_part = sum(any(each[i : i + 50] in learned for i in range(32)) for each in stretches)
    assert sought == len(stretches)
    assert 90 < whole <= found <= any_part < 500
    assert stretches_in_training(Listed(learned), Listed(learned[:80]), None) == (0, 0)
    assert (
        stretches_in_training(Listed(learned), Listed(b"a" * 40 + b"\xff" + b"b" * 40), 255)[0] == 0
    )


def test_what_the_command_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ["one and the same"] * 3 + ["another", "a third"])
    line = f"prepare {path} --tokenizer byte --out {tmp_path / 'out'}"
    assert main([*line.split(), "--deduplicate"]) == 0
    said = capsys.readouterr().err
    assert "dropped exact repeats of earlier documents: 2 documents, 32 B of text" in said
    assert "note" not in said
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    assert main(f"finetune fresh --data {examples} --deduplicate --out {tmp_path}/r".split()) == 2
    assert "--deduplicate has no effect on the task chat" in capsys.readouterr().err
