"""Parts of a text: joined, they are byte for byte what one machine makes of it."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gptsmith.cli.main import main
from gptsmith.config.settings import PrepareSettings
from gptsmith.data import encode, join as join_module
from gptsmith.data.join import join
from gptsmith.data.parts import Part, divide, prepare_part
from gptsmith.data.prepare import prepare
from gptsmith.data.sources import find_sources
from tests.data.test_prepare import files, words


def made(sources: list[Path], tokenizer: str, out: Path, **options) -> dict[str, bytes]:
    """What prepare makes of sources on one machine."""
    names = [str(source) for source in sources]
    *_, last = prepare(names, tokenizer, out, options=PrepareSettings(**options))
    assert last.bytes_done == last.bytes_total
    return files(out)


def joined(sources: list[Path], tokenizer: str, out: Path, of: int, **options) -> dict[str, bytes]:
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


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tokenizer", ["byte", "char", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation_fraction": 0.3, "deduplicate": True},
        {"validation_fraction": 0.001},  # too few documents: the tail of each
        {"validation_fraction": 0.005, "deduplicate": True},
        {"validation_fraction": 0},
    ],
    ids=str,
)
def test_joined_parts_are_what_one_machine_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, options: dict
) -> None:
    monkeypatch.setattr(encode, "STRETCH", 300)
    monkeypatch.setattr(join_module, "BLOCK", 1009)
    sources = sources_of_every_kind(tmp_path / "in")
    options = options | {"bad_rows": "skip", "shard_tokens": 5000}
    whole = made(sources, tokenizer, tmp_path / "whole", **options)
    info = json.loads(whole["dataset.json"])
    rules = {0: "none", 0.001: "tail", 0.005: "tail"}
    assert info["split"]["rule"] == rules.get(info["split"]["fraction"], "documents")
    for of in (1, 3, 16):
        assert joined(sources, tokenizer, tmp_path / f"{of}", of, **options) == whole
