"""Write rows of tokens and targets one after another, and divide the examples into splits.

Knows nothing of what examples are, or of the file that describes the folder.

Shapes:  N examples
"""

from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ..config.finetune import ExampleKind
from ..machine.files import sha256
from .examples import SPLITS, Example, ExampleReader
from .targets import Encoder, Row

TOKENS, TARGETS = "tokens.bin", "targets.bin"  # int32
ENDS, SPLIT = "ends.npy", "split.npy"  # int64
CHUNK = 1 << 16  # labels numbered at once


class RowWriter:
    """Writes rows one after another, and keeps a few numbers for each."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.key = folder, seed.to_bytes(16, "little")
        self.ends, self.learned = array("q"), array("q")  # of each row: its end, what is learned
        self.prompts = array("Q")  # a hash of each example's prompt, which the seed changes
        self.said = array("b")  # the split that each example says, or -1

    def __enter__(self) -> "RowWriter":
        self.stack = ExitStack()
        self.files = [
            self.stack.enter_context((self.folder / name).open("wb")) for name in (TOKENS, TARGETS)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def add(self, example: Example, rows: Sequence[Row]) -> None:
        """Write an example's rows."""
        for row in rows:
            for file, numbers in zip(self.files, row, strict=True):
                file.write(numbers.tobytes())
            tokens, targets = row
            self.ends.append(self.tokens + len(tokens))
            self.learned.append(int((targets >= 0).sum()))
        digest = blake2b(example.prompt.encode(), digest_size=8, key=self.key).digest()
        self.prompts.append(int.from_bytes(digest, "little"))
        self.said.append(SPLITS.index(example.split) if example.split else -1)

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return self.ends[-1] if self.ends else 0


def finished(
    folder: Path,
    reader: ExampleReader,
    encoder: Encoder,
    writer: RowWriter,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Number the labels, divide the examples, and return the rest of examples.json."""
    labels = number_labels(folder, writer.ends, [*encoder.labels]) if encoder.labels else []
    splits, repeats = divided(writer, reader.task, settings)
    np.save(folder / ENDS, np.frombuffer(writer.ends, np.int64))
    np.save(folder / SPLIT, np.argsort(splits, kind="stable"))
    tokenizer = encoder.tokenizer
    return {
        "task": reader.task,
        "form": encoder.form,
        "template": encoder.source,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "labels": labels,
        "counts": {
            "examples": len(writer.said),
            "bad_rows": reader.bad_rows.count,
            "repeats": repeats,
            "cut_prompts": encoder.cut_prompts,
            "cut_answers": encoder.cut_answers,
            "same_answers": encoder.same_answers,
        },
        "splits": {name: counted(writer, splits == n) for n, name in enumerate(SPLITS)},
        "files": {n: sha256(folder / n) for n in (TOKENS, TARGETS, ENDS, SPLIT)},
    }


def number_labels(folder: Path, ends: "array[int]", found: list[str]) -> list[str]:
    """Number the labels in sorted order, and return them so; they were numbered as `found`."""
    if len(found) < 2:
        raise ValueError(f"all labels are {found[0]!r}: at least two different ones are needed")
    labels = sorted(found)
    numbers = np.array([labels.index(name) for name in found], np.int32)
    last = np.frombuffer(ends, np.int64) - 1
    for start in range(0, len(last), CHUNK):
        targets = np.memmap(folder / TARGETS, np.int32, "r+")  # anew, or its pages would add up
        places = last[start : start + CHUNK]
        targets[places] = numbers[targets[places]]
    return labels


def divided(
    writer: RowWriter, task: ExampleKind | None, settings: Mapping[str, Any]
) -> tuple[np.ndarray, int]:
    """Return the number in SPLITS of each example, (N,), and how many repeat another's prompt.

    An example is in the split that it says; the others are divided by the fractions.
    """
    hashes, splits = np.frombuffer(writer.prompts, np.uint64), np.array(writer.said)
    free = splits < 0
    test = settings["test_fraction"]
    test = (0.2 if task == "classify" else 0.1) if test is None else test
    fractions = {"test": test, "validation": settings["validation_fraction"]}
    if free.any():
        splits[free] = held_out(hashes[free], fractions)
    if not (splits == 0).any():
        cure = "--test-fraction 0 and --validation-fraction 0" if free.any() else "change 'split'"
        raise ValueError(
            f"none of the examples ({len(splits)}) is left to learn from: use more, or {cure}"
        )
    return splits, len(hashes) - len(np.unique(hashes))


def held_out(hashes: np.ndarray, fractions: Mapping[str, float]) -> np.ndarray:
    """Return the number in SPLITS of each example, (N,), from the hashes of their prompts.

    Prompts are taken in the order of their hashes, which is a random one, and each with all of its
    examples, as long as these fit into the fraction of a split: so equal prompts stay together.
    """
    _, prompt, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    assigned = np.zeros(len(counts), np.int8)  # of each prompt
    for split, fraction in fractions.items():
        wanted = max(1, int(fraction * len(hashes) + 0.5)) if fraction else 0  # examples
        for place in np.flatnonzero(assigned == 0):
            if not wanted:
                break
            if counts[place] <= wanted:
                assigned[place] = SPLITS.index(split)
                wanted -= int(counts[place])
        if fraction and not (assigned == SPLITS.index(split)).any():
            raise ValueError(
                f"{len(hashes)} examples with {len(counts)} different prompts are too few to hold "
                f"out some for {split}: use more, or --{split}-fraction 0"
            )
    return assigned[prompt]


def counted(writer: RowWriter, chosen: np.ndarray) -> dict[str, int]:
    """Return the numbers of examples, tokens and learned targets of the chosen ones, (N,) bool."""
    rows = np.repeat(chosen, len(writer.ends) // len(writer.said))
    lengths = np.diff(np.frombuffer(writer.ends, np.int64), prepend=0)
    learned = np.frombuffer(writer.learned, np.int64)
    return {
        "examples": int(chosen.sum()),
        "tokens": int(lengths[rows].sum()),
        "learned": int(learned[rows].sum()),
    }
