"""Parts of a text: joined, they are byte for byte what one machine makes of it."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gptsmith.cli.main import main
from gptsmith.config.settings import PrepareSettings
from gptsmith.data import encode
from gptsmith.data import join as join_module
from gptsmith.data.join import join
from gptsmith.data.part_folder import Part
from gptsmith.data.parts import prepare_part
from gptsmith.data.pieces import divide
from gptsmith.data.prepare import prepare
from gptsmith.data.sources import Source, find_sources
from gptsmith.tokenizers import Tokenizer, gpt2_tokenizer
from tests.data.test_prepare import files, words


def made(sources: list[Path], tokenizer: Tokenizer | str, out: Path, **options) -> dict[str, bytes]:
    """What prepare makes of sources on one machine."""
    names = [str(source) for source in sources]
    *_, last = prepare(names, tokenizer, out, options=PrepareSettings(**options))
    assert last.bytes_done == last.bytes_total
    return files(out)


def joined(
    sources: list[Path], tokenizer: Tokenizer | str, out: Path, of: int, **options
) -> dict[str, bytes]:
    """What becomes of sources in parts, which are made in any order."""
    names, folders = [str(source) for source in sources], []
    for number in random.Random(of).sample(range(1, of + 1), of):
        folders.append(out.with_name(f"{out.name}-{number}-of-{of}"))
        steps = prepare_part(
            names, tokenizer, folders[-1], Part(number, of), options=PrepareSettings(**options)
        )
        *_, last = steps
        assert last.bytes_done == last.bytes_total
    *_, last = join(folders, out)
    assert last.bytes_done == last.bytes_total
    assert not list(out.parent.glob(".*.partial"))
    return files(out)


def sources_of_every_kind(folder: Path) -> list[Path]:
    """Rows, tables and texts, with repeats, empty rows, bad rows, and one row that is long."""
    texts = [words(seed, 1 + seed % 40) for seed in range(60)]
    texts[31] = words(99, 1500)
    texts[5:5], texts[40:40] = [texts[2], ""], [texts[31], texts[2], "\ufeff" + texts[3]]
    rows = [json.dumps({"text": text}, ensure_ascii=bool(i % 3)) for i, text in enumerate(texts)]
    rows[17:17] = ["", "{", '{"text": null}', "\ufeff" + rows[0]]
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(rows), newline="")
    pyarrow.parquet.write_table(
        pyarrow.table({"other": texts, "text": texts}), folder / "b.parquet", row_group_size=7
    )
    (folder / "c.txt").write_text(words(7, 900), newline="")
    (folder / "d.txt").write_bytes(b"\xef\xbb\xbf")
    (folder / "e.txt").write_text(words(8, 10) + "\n", newline="")
    (folder / "f.csv").write_text('text,n\n"one, two",1\nthree,2\n')
    return sorted(folder.iterdir())


OPTIONS = [
    {},
    {"validation_fraction": 0.3, "deduplicate": True},
    {"validation_fraction": 0.001},  # too few documents: the tail of each
    {"validation_fraction": 0.005, "deduplicate": True},
    {"validation_fraction": 0},
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("tokenizer", "options", "counts"),
    [
        *(("byte", options, (3, 16)) for options in OPTIONS),
        ("char", OPTIONS[1], (5,)),
        ("char", OPTIONS[2], (5,)),
        ("gpt2", OPTIONS[0], (4,)),
    ],
    ids=str,
)
def test_joined_parts_are_what_one_machine_makes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: str,
    options: dict,
    counts: tuple[int, ...],
) -> None:
    monkeypatch.setattr(encode, "STRETCH", 300)
    monkeypatch.setattr(join_module, "BLOCK", 1009)
    sources = sources_of_every_kind(tmp_path / "in")
    options = options | {"bad_rows": "skip", "shard_tokens": 5000}
    known = gpt2_tokenizer() if tokenizer == "gpt2" else tokenizer
    whole = made(sources, known, tmp_path / "whole", **options)
    split = json.loads(whole["dataset.json"])["split"]
    rules = {0: "none", 0.001: "tail", 0.005: "tail"}
    assert split["rule"] == rules.get(split["fraction"], "documents")
    for of in counts:
        assert joined(sources, known, tmp_path / f"{of}", of, **options) == whole


def contents(source: Source) -> bytes:
    """All bytes of a source."""
    with source.open() as file:
        return file.read()


@pytest.mark.parametrize("of", [1, 2, 7, 400])
def test_parts_have_all_bytes_once(tmp_path: Path, of: int) -> None:
    """Texts and tables are whole; lines and row groups are where they begin."""
    sources = find_sources([str(each) for each in sources_of_every_kind(tmp_path / "in")])
    parts = divide(sources, of, "utf-8")
    assert len(parts) == of
    pieces = [piece for part in parts for piece in part]
    assert [piece.source for piece in pieces] == sorted(piece.source for piece in pieces)
    for number, source in enumerate(sources):
        texts = [piece.text for piece in pieces if piece.source == number]
        read = [contents(text) for text in texts]
        assert b"".join(read) == source.path.read_bytes()
        if source.kind == "jsonl":
            lines = [data for data in read if data]
            assert all(data.endswith(b"\n") for data in lines[:-1])
            assert len(texts) > 1 or of < 7
        elif source.kind != "parquet":
            assert len(texts) == 1
    assert len([piece for part in divide(sources, of, "latin-1") for piece in part]) <= 5 + of


@pytest.mark.system("posix", "is killed by a signal")
def test_a_part_that_was_killed_is_made_again_alone(tmp_path: Path) -> None:
    """kill -9 while it writes leaves no folder of that name."""
    path, out = tmp_path / "rows.jsonl", tmp_path / "2-of-2"
    path.write_text("".join(json.dumps({"text": words(i, 40)}) + "\n" for i in range(40)))
    whole = made([path], "byte", tmp_path / "whole")
    script = (
        "import os, sys; from pathlib import Path; import gptsmith.data.parts as parts\n"
        "parts.with_sums_of_later = lambda *a: os.kill(os.getpid(), 9)\n"
        "list(parts.prepare_part([sys.argv[1]], 'byte', Path(sys.argv[2]), parts.Part(2, 2)))\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, path, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / ".2-of-2.partial" / "documents.bin").exists()
    assert not out.exists()
    folders = [tmp_path / "1-of-2", out]
    for number, folder in enumerate(folders, 1):
        for _ in prepare_part([str(path)], "byte", folder, Part(number, 2)):
            pass
    before = {each: each.stat().st_mtime_ns for each in out.iterdir()}
    for _ in prepare_part([str(path)], "byte", out, Part(2, 2)):  # is left as it is
        pass
    assert {each: each.stat().st_mtime_ns for each in out.iterdir()} == before
    with pytest.raises(ValueError, match="other part: choose another --out"):
        list(prepare_part([str(path)], "byte", out, Part(1, 2)))
    for _ in join(folders, tmp_path / "joined"):
        pass
    assert files(tmp_path / "joined") == whole
    for _ in join(folders, tmp_path / "whole"):  # which is what it would make
        pass


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the parts of two texts, in which the tests run."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(40)))
    Path("b.jsonl").write_text("".join(f'{{"text": "raw {i}"}}\n' for i in range(40)))
    for number in (1, 2, 3):
        assert main(f"prepare a.jsonl --tokenizer byte --part {number}/3".split()) == 0
    return tmp_path


MADE = "prepare {} --tokenizer byte --part 2/3 --out new"
JOIN = "prepare --join data/a-byte-1-of-3 {} data/a-byte-3-of-3 --out OUT"


@pytest.mark.parametrize(
    ("before", "line", "message"),
    [
        ("", "prepare a.jsonl --part 0/3 --out OUT", "--part is 0/3: I/N with I from 1 to N"),
        ("", "prepare a.jsonl --part 4/3 --out OUT", "--part is 4/3: I/N with I from 1 to N"),
        ("", "prepare a.jsonl --part half --out OUT", "--part is half: I/N with I from 1 to N"),
        ("", JOIN.format(""), "of 3 parts, 1 is missing: make --part 2/3"),
        ("", "prepare --join data/a-byte-1-of-3 --out OUT", "2 are missing: make --part 2/3, 3/3"),
        ("", JOIN.format("data/a-byte-2-of-3 data/a-byte-2-of-3"), "part 2/3 is there 2 times"),
        ("", JOIN.format("a.jsonl"), "a.jsonl is no part of a text"),
        ("", JOIN.format("data/a-byte-2-of-3").replace("OUT", "a.jsonl"), "already exists"),
        ("", JOIN.format("") + " --unknown skip", "--unknown cannot go with --join"),
        ("", JOIN.format("data/a-byte-2-of-3").partition(" --out")[0], "--join needs --out"),
        (MADE.format("a.jsonl").replace("2/3", "2/4"), JOIN.format("new"), "parts of the same num"),
        (MADE.format("b.jsonl"), JOIN.format("new"), "different sources: prepare all parts with"),
        (MADE.format("a.jsonl --validation-fraction 0.3"), JOIN.format("new"), "different split"),
        (MADE.format("a.jsonl").replace("byte", "char"), JOIN.format("new"), "different tokenizer"),
        ("changed text", JOIN.format("data/a-byte-2-of-3"), "a.jsonl was changed between"),
        ("ends.bin", JOIN.format("data/a-byte-2-of-3"), "ends.bin was changed since it was"),
        ("dataset-part.json", JOIN.format("data/a-byte-2-of-3"), "part.json was changed since it"),
        ("removed", JOIN.format("data/a-byte-2-of-3"), "tokens_000000.bin is missing: remove"),
        ("", "train data/a-byte-1-of-3 --out OUT", "is a dataset, a run or a model, not text"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_refused(
    before: str, line: str, message: str, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("data/a-byte-2-of-3")
    if before.startswith("prepare"):
        assert main(before.split()) == 0
    elif before == "removed":
        (folder / "tokens_000000.bin").unlink()
    elif before == "changed text":
        Path("a.jsonl").write_text(Path("a.jsonl").read_text().replace("row", "raw"))
        shutil.rmtree(folder)
        assert main("prepare a.jsonl --tokenizer byte --part 2/3".split()) == 0
    elif before:
        with (folder / before).open("ab") as file:
            file.write(b" ")
    capsys.readouterr()
    assert main(line.split()) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert not Path("OUT").exists()
