"""Token files: against struct and numpy's own reading, and against every kind of damage."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from gptsmith.data import shards
from gptsmith.data.shards import Dataset, TokenStream, is_dataset
from gptsmith.data.tokenfile import MOST_TOKENS, ShardWriter, layout
from gptsmith.machine.files import DamagedError, sha256


def published(path: Path, tokens: list[int], *, magic: int = 20240520, version: int = 1) -> Path:
    """A shard written by hand, as llm.c documents it."""
    header = struct.pack("<3i", magic, version, len(tokens)).ljust(1024, b"\0")
    kind = "H" if version == 1 else "I"
    path.write_bytes(header + struct.pack(f"<{len(tokens)}{kind}", *tokens))
    return path


def read_shard(path: Path) -> np.ndarray:
    """The tokens of one file, where its layout says that they are."""
    dtype, offset, count = layout(path)
    return np.fromfile(path, dtype, count, offset=offset)


def damaged(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(DamagedError) as caught:
        read_shard(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("magic", "version", "dtype", "tokens"),
    [
        (20240520, 1, np.uint16, [5, 50256, 65535]),
        (20240801, 7, np.uint32, [7, 128_000, 2**32 - 1]),
    ],
)
def test_published_shards_are_read_as_they_are(tmp_path, magic, version, dtype, tokens):
    found = read_shard(published(tmp_path / "a.bin", tokens, magic=magic, version=version))
    assert found.dtype == dtype
    assert found.tolist() == tokens


def test_numpy_files_are_read_where_they_are_rows_of_integers(tmp_path):
    path = tmp_path / "edufineweb_train_000001.npy"
    for dtype in ("<u2", "<u4", "<i4", "<i8"):
        np.save(path, np.array([3, 1, 50256], dtype))
        assert read_shard(path).tolist() == [3, 1, 50256]
    assert is_dataset(tmp_path)
    np.save(path, np.array([3, -1], "<i4"))
    with pytest.raises(ValueError, match="has a token 4,294,967,295, but the vocabulary ends"):
        Dataset.open(tmp_path).check_ids(50257)
    np.save(path, np.zeros((2, 2), "<u2"))
    assert "uint16 of shape (2, 2): a row of integers is needed" in damaged(path)
    np.save(path, np.array([1.5]))
    assert "a row of integers is needed" in damaged(path)
    np.save(path, np.array([{}]), allow_pickle=True)
    assert "a row of integers is needed" in damaged(path)
    np.save(path, np.arange(9, dtype="<u2"))
    path.write_bytes(path.read_bytes()[:-2])
    assert "its header says 9 tokens" in damaged(path)
    path.write_bytes(b"\x93NUMPY\x01\x00\xff\xff{")
    assert "is not a NumPy file" in damaged(path)
    path.write_bytes(b"not numpy")
    assert "is not a NumPy file" in damaged(path)


def test_nanogpt_files_are_read_by_name_only(tmp_path):
    tokens = np.array([3, 1, 50256, 4], "<u2")
    for name in ("train.bin", "val.bin"):
        tokens.tofile(tmp_path / name)
        assert read_shard(tmp_path / name).tolist() == [3, 1, 50256, 4]
    tokens.tofile(tmp_path / "other.bin")
    assert "20240520 version 1" in damaged(tmp_path / "other.bin")
    (tmp_path / "train.bin").write_bytes(b"abc")
    assert "3 bytes" in damaged(tmp_path / "train.bin")


@pytest.mark.parametrize("name", ["fineweb_train_000001.bin", "train.bin"])
def test_damage_is_refused_in_one_line(tmp_path, name):
    path = published(tmp_path / name, [1, 2, 3, 4, 5])
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert "empty" in damaged(path)
    path.write_bytes(whole[:-2])
    assert "cut short" in damaged(path)
    path.write_bytes(whole[:600])
    damaged(path)
    path.write_bytes(whole + b"xx")
    assert "too long" in damaged(path)
    path.write_bytes(struct.pack("<3i", 20240520, 1, 0) + whole[12:])
    assert "has 0 tokens by its header" in damaged(path)
    path.write_bytes(struct.pack("<3i", 20240520, 1, -7) + whole[12:])
    assert "has -7 tokens by its header" in damaged(path)
    path.write_bytes(struct.pack("<3i", 20240520, 2, 5) + whole[12:])
    assert "version 2" in damaged(path)
    path.write_bytes(struct.pack("<3i", 12345, 1, 5) + whole[12:])
    assert "12345" in damaged(path)


def test_stream_is_one_sequence_across_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)  # so that maps are let go and opened again
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 50257, size).tolist() for size in (7, 1, 13, 5)]
    paths = [published(tmp_path / f"{i}.bin", part) for i, part in enumerate(parts)]
    stream, whole = TokenStream(paths), [token for part in parts for token in part]
    assert len(stream) == 26
    for start in range(27):
        for stop in range(start, 27):
            found = stream.read(start, stop)
            assert found.dtype == np.int64
            assert found.tolist() == whole[start:stop]
    assert len(stream._maps) <= 2
    with pytest.raises(AssertionError):
        stream.read(20, 27)


def test_maps_are_let_go_before_memory_grows(tmp_path, monkeypatch):
    stream = TokenStream([published(tmp_path / "a.bin", list(range(100)))])
    stream.read(0, 10)
    first = stream._maps[0]
    assert stream.read(10, 20).tolist() == list(range(10, 20))
    assert stream._maps[0] is first  # opened once
    monkeypatch.setattr(shards, "MAPPED_BYTES", 1)
    assert stream.read(20, 30).tolist() == list(range(20, 30))
    assert stream._maps[0] is not first


@pytest.mark.parametrize(
    ("vocab_size", "kind", "magic"), [(65536, "H", 20240520), (65537, "I", 20240801)]
)
def test_writer_makes_the_published_layout(tmp_path, vocab_size, kind, magic):
    tokens = np.random.default_rng(1).integers(0, vocab_size, 23)
    with ShardWriter(tmp_path, "train", vocab_size, 10) as writer:
        for start in (0, 1, 4, 21):  # pieces that do not fit the shards
            stop = {0: 1, 1: 4, 4: 21, 21: 23}[start]
            writer.write(tokens[start:stop])
    assert [shard["tokens"] for shard in writer.shards] == [10, 10, 3]
    assert writer.tokens == 23
    version = 1 if kind == "H" else 7
    for i, shard in enumerate(writer.shards):
        path = tmp_path / f"train_{i:06d}.bin"
        part = tokens[10 * i : 10 * i + 10].tolist()
        by_hand = published(tmp_path / "by_hand", part, magic=magic, version=version).read_bytes()
        assert path.read_bytes() == by_hand
        assert shard["file"] == path.name
        assert shard["sha256"] == hashlib.sha256(by_hand).hexdigest()
    assert TokenStream(sorted(tmp_path.glob("*.bin"))).read(0, 23).tolist() == tokens.tolist()


def test_writer_refuses_what_a_header_cannot_count(tmp_path):
    for wrong in (0, MOST_TOKENS + 1):
        with pytest.raises(ValueError, match="shard_tokens"):
            ShardWriter(tmp_path, "train", 100, wrong)
    with pytest.raises(AssertionError), ShardWriter(tmp_path, "train", 100, 10) as writer:
        writer.write(np.array([100]))


def prepared(folder: Path) -> Dataset:
    """A small dataset with a dataset.json, put together by hand."""
    folder.mkdir()
    splits = {}
    for split, tokens in (("train", [4, 2, 9, 1, 1]), ("validation", [8, 3])):
        with ShardWriter(folder, split, 11, 3) as writer:
            writer.write(np.array(tokens))
        splits[split] = {"tokens": len(tokens), "shards": writer.shards}
    tokenizer = {"kind": "char", "fingerprint": "abc", "vocab_size": 11}
    info = {"format": "gptsmith-dataset", "version": 1, "tokenizer": tokenizer, **splits}
    (folder / "dataset.json").write_text(json.dumps(info))
    return Dataset.open(folder)


def test_dataset_that_prepare_made(tmp_path):
    dataset = prepared(tmp_path / "data")
    assert dataset.train.read(0, 5).tolist() == [4, 2, 9, 1, 1]
    assert dataset.validation.read(0, 2).tolist() == [8, 3]
    assert (dataset.fingerprint, dataset.vocab_size) == ("abc", 11)
    assert is_dataset(tmp_path / "data")
    dataset.verify()
    dataset.check_ids(10)
    with pytest.raises(ValueError, match=r"train_000000.bin has a token 9\b"):
        dataset.check_ids(9)


def test_dataset_that_was_changed_is_refused(tmp_path):
    dataset = prepared(tmp_path / "data")
    first, last = (tmp_path / "data" / f"train_00000{i}.bin" for i in (0, 1))
    changed = bytearray(first.read_bytes())
    changed[-1] ^= 1
    first.write_bytes(changed)
    with pytest.raises(DamagedError, match=r"train_000000\.bin was changed"):
        dataset.verify()
    published(last, [1])  # whole in itself, but not what dataset.json says
    with pytest.raises(DamagedError, match="1 tokens"):
        Dataset.open(tmp_path / "data")
    last.unlink()
    with pytest.raises(DamagedError, match="missing"):
        Dataset.open(tmp_path / "data")
    info = tmp_path / "data" / "dataset.json"
    for text in (
        '{"format": "gptsmith-dataset", "version": 1}',
        "{",
        '{"format": "gptsmith-dataset"}',
    ):
        info.write_text(text)
        with pytest.raises(DamagedError, match=r"dataset\.json"):
            Dataset.open(tmp_path / "data")


def test_of_much_data_a_sample_is_verified(tmp_path, monkeypatch):
    dataset = prepared(tmp_path / "data")
    read = []
    monkeypatch.setattr(shards, "sha256", lambda path: read.append(path) or sha256(path))
    size = (tmp_path / "data" / "train_000000.bin").stat().st_size
    for sample, wanted in ((0, 1), (10 * size, 3), (None, 3)):
        read.clear()
        dataset.verify(sample_bytes=sample)
        assert len({*read}) == len(read) == wanted


def test_folders_of_published_shards(tmp_path):
    published(tmp_path / "fineweb_train_000002.bin", [3])
    published(tmp_path / "fineweb_train_000001.bin", [1, 2])
    published(tmp_path / "fineweb_val_000000.bin", [4, 5, 6])
    published(tmp_path / "retrieval_000000.bin", [7])
    dataset = Dataset.open(tmp_path)
    assert dataset.train.read(0, 3).tolist() == [1, 2, 3]
    assert dataset.validation.read(0, 3).tolist() == [4, 5, 6]
    assert (dataset.fingerprint, dataset.info) == (None, {})
    dataset.verify()
    with pytest.raises(ValueError, match=r"fineweb_val_000000\.bin has a token 6"):
        dataset.check_ids(6)


def test_what_is_no_dataset(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    assert not is_dataset(tmp_path)
    assert not is_dataset(tmp_path / "absent")
    (tmp_path / "dataset.json").write_text('{"format": "another"}')
    assert not is_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="gptsmith prepare"):
        Dataset.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        Dataset.open(tmp_path / "absent")
