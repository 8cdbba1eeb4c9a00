"""Text to GPT-2 tokens on disk: gptsmith, and nanoGPT's way, in turn on the same files.

    python benchmarks/prepare.py TEXT --megabytes 100

TEXT is any long plain text; its paragraphs, drawn at random, make the files: one document per line
of a .jsonl, and one plain text. For documents, nanoGPT maps tiktoken over a dataset of the library
`datasets` (pip install datasets), in one process per core; for one text it is one call.
Beside it, the leanest pool of processes that does the same. All end in a file of uint16 tokens.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from results import Results, carry_out, over, parser

from gptsmith.machine.environment import cores
from gptsmith.tokenizers import open_tokenizer

END = 50256  # <|endoftext|>


@lru_cache
def encoding() -> Any:
    """tiktoken's GPT-2, from the merges that gptsmith finds on this machine: nothing is fetched."""
    found = open_tokenizer("gpt2")._tiktoken
    assert found is not None
    return found


def make_files(text: Path, megabytes: float, folder: Path) -> list[Path]:
    """The two files of so many megabytes; documents of 2 to 4 KB."""
    paragraphs = text.read_text(encoding="utf-8").split("\n\n")
    draw, size, documents = random.Random(0), 0, []
    while size < megabytes * 1e6:
        pieces: list[str] = []
        while sum(map(len, pieces)) < 2000:
            pieces.append(draw.choice(paragraphs))
        documents.append("\n\n".join(pieces))
        size += len(documents[-1])
    whole, lines = folder / "text.txt", folder / "documents.jsonl"
    whole.write_text("\n\n".join(documents), encoding="utf-8")
    lines.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return [lines, whole]


def encode_line(line: str) -> list[int]:
    """A line of the .jsonl to ids, in a process of the pool."""
    return [*encoding().encode_ordinary(json.loads(line)["text"]), END]


def encode_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the dataset to ids and how many they are, in a process of the map."""
    ids = [*encoding().encode_ordinary(row["text"]), END]
    return {"ids": ids, "len": len(ids)}


def one_call(source: Path, out: Path) -> None:
    """The whole text by one call."""
    ids = encoding().encode_ordinary(source.read_text(encoding="utf-8"))
    np.array(ids, dtype=np.uint16).tofile(out)


def dataset_map(source: Path, out: Path) -> None:
    """A mapped dataset, then its rows into a memory map, a hundred parts one after another."""
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(source), split="train", cache_dir=f"{out}.cache")
    rows = rows.map(encode_row, remove_columns=["text"], num_proc=cores())
    stored = np.memmap(out, dtype=np.uint16, mode="w+", shape=(sum(rows["len"]),))
    position, parts = 0, 100
    for number in range(parts):
        part = rows.shard(num_shards=parts, index=number, contiguous=True).with_format("numpy")
        ids = np.concatenate(part["ids"][:])
        stored[position : position + len(ids)] = ids
        position += len(ids)
    stored.flush()


def lean_pool(source: Path, out: Path) -> None:
    """A pool of processes that encode lines, and their ids into a memory map."""
    with source.open(encoding="utf-8") as lines, multiprocessing.Pool(cores()) as pool:
        documents = pool.map(encode_line, lines, chunksize=64)
    total = sum(map(len, documents))
    stored = np.memmap(out, dtype=np.uint16, mode="w+", shape=(total,))
    position = 0
    for ids in documents:
        stored[position : position + len(ids)] = ids
        position += len(ids)
    stored.flush()


WAYS = {way.__name__: way for way in (dataset_map, lean_pool, one_call)}


def run(words: list[str]) -> tuple[float, float]:
    """Seconds and peak megabytes, of all its processes together, that a command takes."""
    started, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, sum(memory(process.pid)) / 1e6)
        time.sleep(0.05)
    if process.returncode:
        raise ValueError(f"{' '.join(words)} ended with {process.returncode}")
    return time.perf_counter() - started, peak


def memory(pid: int) -> Iterator[int]:
    """Resident bytes of a process and those that it started."""
    try:
        whole = psutil.Process(pid)
        for process in [whole, *whole.children(recursive=True)]:
            yield process.memory_info().rss
    except psutil.NoSuchProcess:
        return


def compare(source: Path, way: str, folder: Path, pairs: int, results: Results) -> None:
    """Print tokens per second of gptsmith and another way, in turn, and their ratio."""
    ours, theirs, rows = folder / "ours", folder / "theirs.bin", []
    prepare = ["-m", "gptsmith", "prepare", str(source), "--tokenizer", "gpt2", "--out", str(ours)]
    other = [__file__, "--way", way, str(source), str(theirs)]
    for _ in range(pairs):
        shutil.rmtree(ours, ignore_errors=True)
        shutil.rmtree(f"{theirs}.cache", ignore_errors=True)
        rows.append((*run([sys.executable, *prepare]), *run([sys.executable, *other])))
        names = ("our_seconds", "our_megabytes", "their_seconds", "their_megabytes")
        results.add({"source": source.name, "way": way, **dict(zip(names, rows[-1], strict=True))})
    tokens = theirs.stat().st_size / 2 / 1e6
    mine, my_memory, their, their_memory = map(statistics.median, zip(*rows, strict=True))
    print(
        f"{source.name}, {tokens:.1f} million tokens: gptsmith {tokens / mine:.2f} million/s in "
        f"{my_memory:.0f} MB, {way} {tokens / their:.2f} in {their_memory:.0f} MB: "
        f"{over(row[2] / row[0] for row in rows)} times",
        flush=True,
    )


def main() -> None:
    """Make the files and compare."""
    known = parser(__doc__)
    known.add_argument("text", type=Path, nargs="?", help="a long plain text")
    known.add_argument("--megabytes", type=float, default=100.0, help="of each file")
    known.add_argument("--pairs", type=int, default=3, help="of runs, in turn (default: 3)")
    known.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    options = known.parse_args()
    if options.way:
        way, source, out = options.way
        WAYS[way](Path(source), Path(out))
        return
    if options.text is None:
        known.error("a text is needed")
    results, ways = Results(options.out), ["dataset_map", "lean_pool"]
    if find_spec("datasets") is None:
        ways.remove("dataset_map")
        print("dataset_map: not installed: datasets")
    with tempfile.TemporaryDirectory() as name:
        lines, whole = make_files(options.text, options.megabytes, Path(name))
        for source, way in [*((lines, way) for way in ways), (whole, "one_call")]:
            compare(source, way, Path(name), options.pairs, results)


if __name__ == "__main__":
    carry_out(main)
