"""What several commands say: the help of their arguments, a line, a name."""

import sys
from pathlib import Path

SOURCE_HELP = "a built-in text (shakespeare), a file, a folder, or - for standard input"
MODEL_HELP = "a run, a checkpoint, or a Hugging Face GPT-2 folder"
DATA_HELP = "a source, or a folder made by prepare"


def tell(text: str) -> None:
    """A line to the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def short_name(source: str) -> str:
    """A name for a folder, from a source or a tokenizer: "my-notes" for "~/my-notes/"."""
    return (Path(source).stem if Path(source).is_file() else Path(source).name) or "text"
