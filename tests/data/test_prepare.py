"""Preparing: against encoding each document whole, by hand; whole or not there at all."""

import bz2
import contextlib
import errno
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import tokenizers
import transformers

from gptsmith.cli.main import main
from gptsmith.config.settings import PrepareSettings
from gptsmith.data import encode
from gptsmith.data import prepare as prepare_module
from gptsmith.data.decoding import checked_encoding
from gptsmith.data.encode import SAFE
from gptsmith.data.prepare import Progress, prepare
from gptsmith.data.shards import Dataset, TokenStream
from gptsmith.data.sources import find_sources
from gptsmith.data.split import Reader, is_held_out
from gptsmith.data.tokenfile import ShardWriter
from gptsmith.tokenizers import (
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
)
from tests.advice import followed
from tests.conftest import TOY

END = "<|endoftext|>"


def made(sources, tokenizer: Tokenizer | str, out: Path, **options) -> Dataset:
    """The dataset that prepare makes of one source or several."""
    sources = [str(each) for each in (sources if isinstance(sources, list) else [sources])]
    *_, last = prepare(sources, tokenizer, out, options=PrepareSettings(**options))
    dataset = Dataset.open(out)
    assert isinstance(last, Progress)
    assert last.bytes_done == last.bytes_total
    assert last.tokens == len(dataset.train) + len(dataset.validation or [])
    dataset.verify()
    assert not list(out.parent.glob(".*.partial"))
    return dataset


def ids(stream: TokenStream | None) -> list[int]:
    return [] if stream is None else stream.read(0, len(stream)).tolist()


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def words(seed: int, count: int) -> str:
    """Text with every kind of gap between words, some of them outside ASCII."""
    choose = random.Random(seed)
    gaps = [" ", " ", " ", "\n", "  ", "\n\n", " \n", "\u3000", "\x85 ", "\t", "\x1c "]
    vocabulary = ["the", "sun's", "żółw", "日本語", "1234", "--", "I'll", "e\u0301", "🙂", "."]
    return "".join(choose.choice(vocabulary) + choose.choice(gaps) for _ in range(count))


# -- what is in the shards


def test_one_text_is_split_as_nanogpt_does(tmp_path):
    """It takes text[: int(n * 0.9)] and the rest, and numbers the characters in order."""
    text = words(0, 300)
    plain = "".join(character for character in text if character.isascii())
    path = tmp_path / "input.txt"
    path.write_text(plain, newline="")
    dataset = made(path, "char", tmp_path / "out")
    place = {character: i for i, character in enumerate(sorted(set(plain)))}
    cut = int(len(plain) * 0.9)
    assert ids(dataset.train) == [place[character] for character in plain[:cut]]
    assert ids(dataset.validation) == [place[character] for character in plain[cut:]]
    assert dataset.vocab_size == len(place)
    assert dataset.info["split"]["rule"] == "tail"


def test_a_text_of_tiny_shakespeares_size_has_nanogpts_counts(tmp_path):
    """nanoGPT cuts its 1,115,394 ASCII characters at int(0.9 n); 65 of them are different."""
    letters = [chr(code) for code in range(32, 97)]
    path = tmp_path / "input.txt"
    path.write_text("".join(letters[(7 * i + i // 65) % 65] for i in range(1_115_394)))
    dataset = made(path, "char", tmp_path / "out")
    counts = (dataset.vocab_size, len(dataset.train), len(dataset.validation))
    assert counts == (65, 1_003_854, 111_540)


def test_tail_begins_with_a_whole_character(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("日" * 10)  # 30 bytes; byte 27 - 2 is inside the ninth
    dataset = made(path, byte_tokenizer(), tmp_path / "out", validation_fraction=0.15)
    assert bytes(ids(dataset.train)).decode() == "日" * 9
    assert ids(dataset.validation) == [*"日".encode(), 256]  # only the document's end is marked
    counts = {key: dataset.info["train"][key] for key in ("tokens", "bytes", "documents")}
    assert counts == {"tokens": 27, "bytes": 27, "documents": 1}
    assert dataset.info["validation"]["documents"] == 1


@pytest.mark.parametrize("count", [1, 3])
def test_of_few_rows_the_tails_are_held_out(tmp_path, count):
    """As of few files: each from the first character that begins in its last tenth."""
    documents = ["日" * 20 + "x" * (number + 1) for number in range(count)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    dataset = made(path, byte_tokenizer(), tmp_path / "out")
    train, validation = [], []
    for text in documents:
        size = len(text.encode())
        cut = next(n for n in range(len(text)) if len(text[:n].encode()) >= int(size * 0.9))
        train += text[:cut].encode()
        validation += [*text[cut:].encode(), 256]
    assert ids(dataset.train) == train
    assert ids(dataset.validation) == validation
    assert dataset.info["split"]["rule"] == "tail"
    assert dataset.info["train"]["documents"] == dataset.info["validation"]["documents"] == count


def test_a_newline_ends_documents_where_no_token_does(tmp_path):
    names = ["emma", "olivia", "ava\n", "isabella", "sophia", "mia"]
    path = tmp_path / "names.jsonl"
    path.write_text("".join(json.dumps({"text": name}) + "\n" for name in names))
    dataset = made(path, "char", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(ids(dataset.train)) == "emma\nolivia\nava\nisabella\nmia\n"
    assert tokenizer.decode(ids(dataset.validation)) == "sophia\n"
    counts = [dataset.info[split]["bytes"] for split in ("train", "validation")]
    assert counts == [len(dataset.train), len(dataset.validation)]
    without = char_tokenizer(["".join(names).replace("\n", "")])
    with pytest.warns(UserWarning, match="no token for the end of a document"):
        made(path, without, tmp_path / "glued", unknown="skip")


def test_documents_end_with_the_end_token_that_a_folder_names(tmp_path):
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer().backend.to_str().replace(END, "</s>"))
    judge = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    judge.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "c"}\n')
    dataset = made(path, str(tmp_path / "theirs"), tmp_path / "out", validation_fraction=0)
    assert ids(dataset.train) == [*b"ab", 256, *b"c", 256]
    assert judge.eos_token_id == 256


@pytest.mark.parametrize("kind", ["files", "jsonl", "parquet"])
def test_documents_are_held_out_whole_and_evenly(tmp_path, kind):
    documents = [words(seed, 3 + seed) for seed in range(23)]
    if kind == "files":
        source = tmp_path / "in"
        source.mkdir()
        for i, text in enumerate(documents):
            (source / f"{i:02d}.txt").write_text(text, newline="")
    elif kind == "jsonl":
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    else:
        source = tmp_path / "in.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), source)
    dataset = made(source, byte_tokenizer(), tmp_path / "out", validation_fraction=0.2)
    held_out = [i for i in range(23) if i % 5 == 2]  # where i * 0.2 + 0.5 passes a whole number
    expected = {True: [], False: []}
    for i, text in enumerate(documents):
        expected[i in held_out] += [*text.encode(), 256]
    assert ids(dataset.train) == expected[False]
    assert ids(dataset.validation) == expected[True]
    info = dataset.info
    assert info["split"]["rule"] == "documents"
    assert (info["train"]["documents"], info["validation"]["documents"]) == (18, 5)
    sizes = [
        sum(len(text.encode()) for i, text in enumerate(documents) if (i in held_out) == side)
        for side in (False, True)
    ]
    assert [info["train"]["bytes"], info["validation"]["bytes"]] == sizes


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1 / 3, 0.5, 0.9])
def test_held_out_documents_are_the_fraction(fraction):
    for count in (1, 7, 100, 1003):
        found = sum(is_held_out(i, fraction) for i in range(count))
        assert abs(found - count * fraction) <= 0.5 + 1e-9


def test_nothing_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    dataset = made(tmp_path / "a.txt", byte_tokenizer(), tmp_path / "out", validation_fraction=0)
    assert dataset.validation is None
    assert dataset.info["validation"] is None
    assert ids(dataset.train) == [*b"words", 256]
    assert sorted(files(tmp_path / "out")) == [
        "dataset.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train_000000.bin",
    ]


def test_dataset_json_says_what_it_was_made_of(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"some words " * 9)
    dataset = made(path, "byte", tmp_path / "out", shard_tokens=40, workers=2)
    info = dataset.info
    assert (info["format"], info["version"]) == ("gptsmith-dataset", 1)
    whole = path.read_bytes()
    assert info["sources"] == [
        {"path": str(path), "bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    ]
    assert info["settings"] == {
        "field": "text",
        "bad_rows": "error",
        "encoding": "utf-8",
        "unknown": "error",
        "validation_fraction": 0.1,
        "deduplicate": False,
        "shard_tokens": 40,
    }
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.fingerprint == info["tokenizer"]["fingerprint"] == dataset.fingerprint
    assert [shard["tokens"] for shard in info["train"]["shards"]] == [40, 40, 8]
    assert "moved forward" in info["split"]["text"]


def test_other_encodings_and_unknown_characters(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("déjà vu".encode("utf-16"))
    dataset = made(path, "byte", tmp_path / "out", encoding="utf-16", validation_fraction=0)
    assert ids(dataset.train) == [*"déjà vu".encode(), 256]
    (tmp_path / "b.txt").write_text("abc")
    known = made(tmp_path / "b.txt", "char", tmp_path / "chars", validation_fraction=0)
    assert known.vocab_size == 3
    tokenizer = load_tokenizer(tmp_path / "chars")
    (tmp_path / "c.txt").write_text("abxc")
    with pytest.raises(ValueError, match=r"c\.txt: unknown character 'x'"):
        made(tmp_path / "c.txt", tokenizer, tmp_path / "refused")
    skipping = made(
        tmp_path / "c.txt", tokenizer, tmp_path / "skip", unknown="skip", validation_fraction=0
    )
    assert ids(skipping.train) == [0, 1, 2]


def test_texts_are_all_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    found = find_sources([str(tmp_path / "b.jsonl"), str(tmp_path / "a.txt")])
    passages = Reader(found, PrepareSettings()).passages()
    assert "".join(passage.text for passage in passages) == "twothreeone"


# -- cut, in parallel, and yet the same


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return gpt2_tokenizer()


def test_cut_documents_have_the_ids_of_whole_ones(tmp_path, monkeypatch, gpt2):
    """tiktoken, on the whole text at once, is the judge; stretches of 50 characters are ours."""
    monkeypatch.setattr(encode, "STRETCH", 50)
    text = words(3, 4000)
    (tmp_path / "a.txt").write_text(text, newline="")
    cut = []
    monkeypatch.setattr(
        encode,
        "place_to_cut",
        lambda *a, real=encode.place_to_cut: cut.append(real(*a)) or cut[-1],
    )
    dataset = made(tmp_path / "a.txt", gpt2, tmp_path / "out", validation_fraction=0, workers=3)
    assert sum(map(bool, cut)) > 100
    judge = tiktoken.Encoding(
        "judge",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks={piece: id for id, piece in gpt2.pieces.items() if id not in gpt2.specials},
        special_tokens={},
    )
    assert ids(dataset.train) == [*judge.encode_ordinary(text), 50256]


def test_a_safe_place_is_never_beside_two_spaces_of_any_kind():
    spaces = [
        chr(code)
        for code in range(0x110000)
        if chr(code).isspace() or code in (0x180E, 0x200B, 0xFEFF)
    ]
    assert len(spaces) > 25
    assert not [space for space in spaces if SAFE.search(f"{space} ") or SAFE.search(f"{space}\n")]
    assert SAFE.search("a\n").end() == 1
    assert not SAFE.search("ab\tc\u3000d")


def test_text_without_spaces_is_cut_all_the_same(tmp_path, monkeypatch, gpt2):
    monkeypatch.setattr(encode, "STRETCH", 100)
    monkeypatch.setattr(encode, "LONGEST", 300)
    (tmp_path / "a.txt").write_text("letters" * 500)
    dataset = made(tmp_path / "a.txt", gpt2, tmp_path / "out", validation_fraction=0)
    *found, end = ids(dataset.train)
    assert gpt2.decode(found) == "letters" * 500
    assert end == 50256


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_same_bytes_with_any_number_of_workers(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(encode, "STRETCH", 97)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(words(i, 20 * i * i + 1), newline="")
    first = made(folder, tokenizer, tmp_path / "1", workers=1, shard_tokens=777)
    assert len(first.train.paths) > 2
    for workers in (2, 7):
        made(folder, tokenizer, tmp_path / str(workers), workers=workers, shard_tokens=777)
        assert files(tmp_path / str(workers)) == files(tmp_path / "1")


def test_bad_rows_are_skipped_and_counted_where_asked(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [json.dumps({"text": f"row {n}"}) for n in range(20)]
    path.write_text("\n".join([*good[:5], '{"text": null}', "{", *good[5:], "[]"]))
    with pytest.raises(ValueError, match=r"line 6 has null in 'text'.*--bad-rows skip"):
        made(path, "byte", tmp_path / "out")
    said = "3 bad rows were skipped; the first: .*rows.jsonl, line 6 has null in 'text'"
    with pytest.warns(UserWarning, match=said):
        found = made(path, "byte", tmp_path / "out", bad_rows="skip")
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    expected = made(tmp_path / "good.jsonl", "byte", tmp_path / "good")
    assert ids(found.train) == ids(expected.train)
    assert ids(found.validation) == ids(expected.validation)


def test_a_field_without_rows_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 20)
    with pytest.warns(UserWarning, match="--field has no effect: no source has rows"):
        made(tmp_path / "a.txt", "byte", tmp_path / "out", field="body")


@pytest.mark.parametrize("setting", ["bad_rows", "deduplicate"])
def test_a_dataset_of_before_a_setting_is_the_same(tmp_path, setting):
    (tmp_path / "a.txt").write_text("some words " * 20)
    made(tmp_path / "a.txt", "byte", tmp_path / "out")
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    del info["settings"][setting]
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(info))
    made(tmp_path / "a.txt", "byte", tmp_path / "out")


def test_a_name_that_is_not_utf_8_is_kept_reversibly(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("some words " * 20)
    dataset = made(path, "byte", tmp_path / "out")
    assert os.fsencode(dataset.info["sources"][0]["path"]) == os.fsencode(path)


# -- all or nothing


def test_a_finished_folder_is_left_and_another_refused(tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("some words " * 20)
    made(path, "char", out)
    before = {each: each.stat().st_mtime_ns for each in out.iterdir()}
    made(path, "char", out, workers=1)
    assert {each: each.stat().st_mtime_ns for each in out.iterdir()} == before
    with pytest.raises(ValueError, match="prepared with other tokenizer: choose another --out"):
        made(path, "byte", out)
    with pytest.raises(ValueError, match="other split and settings"):
        made(path, "char", out, validation_fraction=0.3)
    path.write_text("same words " * 20)
    with pytest.raises(ValueError, match=r"other (tokenizer and )?sources"):
        made(path, "char", out)
    assert {each: each.stat().st_mtime_ns for each in out.iterdir()} == before


def test_places_that_cannot_be_written(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some words")
    for occupied in (path, tmp_path):
        with pytest.raises(ValueError, match="already exists"):
            made(path, "byte", occupied)
    with pytest.raises(OSError, match=r"Not a directory|exists"):
        made(path, "byte", path / "below")
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    (tmp_path / "empty").mkdir()
    made(path, "byte", tmp_path / "empty")


@pytest.mark.system("posix", "takes permissions away")
def test_folder_without_write_permission(tmp_path):
    """In a process of its own that is nobody, where the tests run as root."""
    (tmp_path / "a.txt").write_text("some words")
    os.chmod(tmp_path, 0o555)
    script = (
        "import os, sys; from gptsmith.data.prepare import prepare\n"
        "if os.geteuid() == 0: import gptsmith.machine.files as f; real = f.Path.mkdir; "
        "f.Path.mkdir = lambda self, *a, **k: (_ for _ in ()).throw("
        "PermissionError(13, 'Permission denied', str(self)))\n"
        "try: list(prepare([sys.argv[1]], 'byte', sys.argv[2]))\n"
        "except PermissionError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.txt", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    os.chmod(tmp_path, 0o755)
    assert re.fullmatch(r"\[Errno 13\] Permission denied: '.*out.*'\n", done.stdout)
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is no text"),
        (b"\xef\xbb\xbf", "too little text"),
        (b"x", "too little text"),
        (b"fine \xff", "byte 0xff at position 5"),
    ],
)
def test_bad_text_leaves_nothing(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        made(path, "byte", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_too_few_rows_to_hold_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' * 3)
    assert ids(made(path, "byte", tmp_path / "out").validation) == [ord("e"), 256] * 3
    whole = made(path, "byte", tmp_path / "whole", validation_fraction=0.3).validation
    assert ids(whole) == [*b"one", 256]


def test_nothing_known_to_hold_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a" * 9 + "b")
    with pytest.raises(ValueError, match=r"has too little text to hold out 0\.1 of it"):
        made(path, char_tokenizer("a"), tmp_path / "out", unknown="skip")


@pytest.mark.slow
def test_a_disk_too_small_is_seen_first(tmp_path, monkeypatch, gpt2):
    path = tmp_path / "a.txt"
    path.write_text("x" * 5_000_000)
    free = SimpleNamespace(free=7_000_000)
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda place: free)
    with pytest.raises(OSError, match=r"could need 0\.010 GB, but 0\.007 GB are free"):
        made(path, "byte", tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    made(path, gpt2, tmp_path / "out")  # half of that is enough


def test_a_disk_that_fills_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("some words " * 1000)
    real = ShardWriter._begin

    def full(self: ShardWriter) -> None:
        if self.shards:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self)

    monkeypatch.setattr(ShardWriter, "_begin", full)
    with pytest.raises(OSError, match=r"the disk is full: .*out was not written") as caught:
        made(path, "byte", tmp_path / "out", shard_tokens=500)
    assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_an_abandoned_or_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "STRETCH", 50)
    monkeypatch.setattr(prepare_module, "REPORT_SECONDS", 0)
    path = tmp_path / "a.txt"
    path.write_text("some words " * 1000)
    steps = prepare([str(path)], "byte", tmp_path / "out")
    assert next(steps).bytes_done < path.stat().st_size + 1
    assert [each.name for each in sorted(tmp_path.iterdir())] == [".out.partial", "a.txt"]
    steps.close()
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    steps = prepare([str(path)], "byte", tmp_path / "out")
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.system("posix", "is killed by a signal")
@pytest.mark.slow
def test_killed_at_any_instant_and_run_again(tmp_path):
    """kill -9 leaves no folder of that name, and a rerun makes the same bytes."""
    path = tmp_path / "a.txt"
    path.write_text(words(5, 400_000), newline="")
    made(path, "byte", tmp_path / "whole", shard_tokens=100_000)
    script = (
        "import sys; from gptsmith.data.prepare import prepare\n"
        "from gptsmith.config.settings import PrepareSettings\n"
        "print('ready', flush=True)\n"
        "list(prepare([sys.argv[1]], 'byte', sys.argv[2], "
        "options=PrepareSettings(shard_tokens=100_000)))\n"
    )
    killed = 0
    for attempt in range(8):
        out = tmp_path / f"out{attempt}"
        command = [sys.executable, "-c", script, str(path), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(random.Random(attempt).uniform(0, 0.08))
            process.send_signal(signal.SIGKILL)
        if out.exists():
            assert files(out) == files(tmp_path / "whole")  # it was just finished
        else:
            killed += 1
        made(path, "byte", out, shard_tokens=100_000)
        assert files(out) == files(tmp_path / "whole")
        shutil.rmtree(out)
    assert killed >= 2


# -- memory


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """Ten times the text, 50 MB in a single line, takes hardly more memory, and under 350 MB."""
    line = words(1, 100_000).replace("\n", " ")
    script = (
        "import sys; from gptsmith.data.prepare import prepare\n"
        "list(prepare([sys.argv[1]], 'gpt2', sys.argv[2]))\n"
    )
    peaks = []
    for size in (5_000_000, 50_000_000):
        path, out = tmp_path / f"{size}.txt", tmp_path / f"{size}"
        with path.open("w", encoding="utf-8", newline="") as file:
            for _ in range(size // len(line.encode()) + 1):
                file.write(line)
        peak = 0
        with subprocess.Popen([sys.executable, "-c", script, path, out]) as process:
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    peak = max(peak, psutil.Process(process.pid).memory_info().rss)
                time.sleep(0.01)
        assert process.returncode == 0
        assert len(Dataset.open(out).train) > size / 20
        peaks.append(peak)
    assert peaks[0] > 20e6
    assert peaks[1] < min(peaks[0] + 25e6, 350e6)


def test_no_torch_is_imported():
    script = (
        "import sys, gptsmith.data.prepare; print({'torch', 'pyarrow'} & set(sys.modules) or '{}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "{}\n"


def test_names_of_encodings_are_pythons_own():
    assert [checked_encoding(name) for name in ("UTF8", "latin1", "Windows-1252", "utf_16")] == [
        "utf-8",
        "iso8859-1",
        "cp1252",
        "utf-16",
    ]


# -- what is advised


def write_texts() -> None:
    """Texts of which each has something odd."""
    text = Path("text.txt").read_text()
    Path("few.txt").write_text("few words 🙂")  # its last tenth begins within the last character
    Path("latin.txt").write_bytes(b"caf\xe9 " * 99)
    Path("other.jsonl").write_text('{"body": "fox", "number": 3}\n' * 99)
    Path("bad.jsonl").write_text('{"text": "fox"}\n' * 99 + '{"text": 3}\n')
    Path("odd").mkdir()
    Path("odd/text.odd").write_text(text)
    Path("table.txt").write_bytes(b"")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fox"] * 99}), "table.txt")
    shutil.copy("table.txt", "table.parquet")


@pytest.mark.parametrize(
    ("line", "message", "cures"),
    [
        ("other.jsonl", "(there are: body, number): name the right one with --field",
         ["other.jsonl --field body"]),
        ("other.jsonl --field number", "not text: name another --field",
         ["other.jsonl --field body"]),
        ("bad.jsonl", "or skip such rows with --bad-rows skip", ["bad.jsonl --bad-rows skip"]),
        ("latin.txt", "name the file's encoding with --encoding, as latin-1",
         ["latin.txt --encoding latin-1"]),
        ("text.txt --encoding punycode", "encoding, as ",  # which one depends on the Python
         ["text.txt --encoding utf-8", "text.txt --encoding latin-1"]),
        ("text.txt --encoding nonsense", "try utf-8 or latin-1",
         ["text.txt --encoding utf-8", "text.txt --encoding latin-1"]),
        ("text.txt --encoding utf8x", "did you mean 'utf-8'", ["text.txt --encoding utf-8"]),
        ("table.txt", "name it .parquet, and its rows are read", ["table.parquet"]),
        ("few.txt --tokenizer char", "use a larger --validation-fraction, or 0",
         ["few.txt --tokenizer char --validation-fraction 0.5",
          "few.txt --tokenizer char --validation-fraction 0"]),
        ("few.txt --validation-fraction 0.99", "too little text to train on: use more",
         ["text.txt --validation-fraction 0.99"]),
        ("run", "name a file or a folder of text", ["text.txt", "odd/text.odd"]),
        ("odd", "name a file itself to read it whatever its suffix", ["odd/text.odd"]),
        ("'' text.txt", "a file, a folder or - is needed", ["text.txt", "few.txt text.txt"]),
        ("text.txt --tokenizer char --unknown skip --workers 99999", "leave it out",
         ["text.txt --tokenizer char --unknown skip"]),
        ("text.txt --tokenizer nonsense", "gpt2, char, byte or a folder is needed",
         [f"text.txt --tokenizer {kind}" for kind in ("gpt2", "char", "byte", "run")]),
    ],
)  # fmt: skip
def test_what_is_advised_for_a_text_works(
    line: str, message: str, cures: list[str], toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts()
    kind = "" if "--tokenizer" in line else " --tokenizer byte"
    lines = [f"prepare {each}{kind} --out OUT" for each in cures]
    followed(f"prepare {line}{kind} --out OUT", message, lines, capsys)


@pytest.mark.parametrize(("module", "tool"), [(gzip, "gunzip"), (bz2, "bunzip2"), (lzma, "unxz")])
def test_a_compressed_text_is_decompressed_as_advised(
    module: Any, tool: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the program, or where it is not installed by the module of Python for the same format."""
    text = Path("text.txt").read_bytes()
    Path("packed.txt").write_bytes(module.compress(text))
    said = followed("prepare packed.txt --out OUT", "decompress it first, as by ", [], capsys)
    assert said.split()[-1] == tool
    with Path("packed.txt").open("rb") as packed:
        found = (
            subprocess.run([tool], stdin=packed, stdout=subprocess.PIPE, check=True).stdout
            if shutil.which(tool)
            else module.decompress(packed.read())
        )
    assert found == text


def test_what_is_advised_where_the_place_is_taken_works(
    toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes").mkdir()
    Path("notes/mine.txt").touch()
    assert main("prepare text.txt --tokenizer byte --out made".split()) == 0
    for place, message in (
        ("notes", "notes already exists: choose another --out, or remove it first"),
        (
            "made",
            "other split and settings: choose another --out, or remove it first",
        ),
    ):
        line = f"prepare text.txt --tokenizer byte --validation-fraction 0.3 --out {place}"
        followed(line, message, [line.replace(place, f"other-{place}")], capsys)
        shutil.rmtree(place)
        assert main(line.split()) == 0


def publish(folder: str, ids: range) -> None:
    """Shards as others publish them, without a word on the tokenizer."""
    Path(folder).mkdir()
    for split in ("train", "val"):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, 900
        tokens = np.resize(np.array(ids, np.uint16), 900)
        Path(folder, f"web_{split}_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())


@pytest.mark.parametrize(
    ("line", "message", "cures"),
    [
        ("train bytes TOY --out OUT", "add --tokenizer with gpt2, byte, or a folder",
         ["train bytes TOY --out OUT --tokenizer byte", "train bytes TOY --out OUT --tokenizer bpe",
          "train bytes TOY --out OUT --tokenizer gpt2"]),
        ("train more TOY --out OUT --tokenizer byte", "name the tokenizer that made it with --tok",
         ["train more TOY --out OUT --tokenizer bpe"]),
        ("train chars TOY --out OUT --tokenizer byte",
         "prepare the text again, or name its --tokenizer",
         ["train chars TOY --out OUT --tokenizer char", "train again TOY --out OUT",
          "train again TOY --out OUT --tokenizer byte"]),
        ("train text.txt TOY --out OUT --context-length 99999 --batch-tokens 99999",
         "use more text or a smaller context_length",
         ["train text.txt TOY --out OUT", ]),
        ("train tiny.txt TOY --tokenizer char --out OUT", "use --validation-fraction 0, or more",
         ["train tiny.txt TOY --tokenizer char --out OUT --validation-fraction 0",
          "train text.txt TOY --tokenizer char --out OUT"]),
        ("train tiny TOY --out OUT", "prepare the text again and use --validation-fraction 0",
         ["prepare tiny.txt --tokenizer char --out OUT --validation-fraction 0",
          "train cured-0 TOY --out OUT"]),
        ("train default TOY --tokenizer char --out OUT", "add --data with a source or a prepared",
         ["train default TOY --tokenizer char --out OUT --data text.txt",
          "train default TOY --out OUT --data chars"]),
        ("evaluate run --data whole --split validation", "use train",
         ["evaluate run --data whole --split train"]),
        ("evaluate mute --data text.txt", "use data made by `gptsmith prepare`",
         ["prepare text.txt --tokenizer run --out OUT", "evaluate mute --data cured-0"]),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_what_is_advised_for_prepared_data_works(
    line: str, message: str, cures: list[str], toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tiny.txt").write_text("ten bytes!")
    for made in (
        "prepare text.txt --tokenizer char --out chars",
        "prepare text.txt --tokenizer byte --out again",
        "prepare text.txt --tokenizer run --out whole --validation-fraction 0",
        "prepare tiny.txt --tokenizer char --out tiny",
        "tokenizer text.txt --vocab-size 300 --out bpe",
    ):
        assert main(made.split()) == 0, capsys.readouterr().err
    publish("bytes", range(256))
    publish("more", range(300))
    shutil.copytree(next(Path("run/checkpoints").iterdir()), "mute")
    for name in ("manifest.json", "tokenizer.json"):
        Path("mute", name).unlink()
    toy = TOY.replace("--tokenizer char ", "")
    followed(*(each.replace("TOY", toy) for each in (line, message)),
             [cure.replace("TOY", toy) for cure in cures], capsys)  # fmt: skip
