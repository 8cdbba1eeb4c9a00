"""Open DATA for an evaluation: prepared data as it is, a text prepared in a temporary folder.

Knows nothing of how text is prepared (`prepare.py`), or of models.
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from ..config.fields import SettingError
from ..config.settings import PrepareSettings, Split
from ..tokenizers import Tokenizer
from .prepare import prepare
from .shards import Dataset, TokenStream, is_dataset


@contextmanager
def opened_tokens(
    data: str | Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    *,
    split: Split | None = None,
    options: PrepareSettings | None = None,
) -> Iterator[TokenStream]:
    """Yield the tokens of DATA for a model with this tokenizer and vocabulary.

    For prepared data these are one split: by default validation, or train if nothing was held out.
    A text is encoded whole, with the given options. ValueError if the tokens do not suit the model.
    """
    if is_dataset(Path(data)):
        yield Dataset.open(Path(data)).tokens_for(tokenizer, vocab_size, split)
        return
    if tokenizer is None:
        raise ValueError(
            f"the model has no tokenizer to encode {data}: use data made by `gptsmith prepare`"
        )
    if split == "validation":
        raise SettingError("split", f"is for prepared data: {data} is text, which is read whole")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        whole = replace(options or PrepareSettings(), validation_fraction=0.0)
        for _ in prepare([str(data)], tokenizer, folder, options=whole):
            pass
        with closing(Dataset.open(folder)) as dataset:
            yield dataset.train


@contextmanager
def opened_splits(
    data: str | Path, tokenizer: Tokenizer, *, options: PrepareSettings | None = None
) -> Iterator[Dataset]:
    """Yield DATA as a run learns it: a prepared folder, or a text that is prepared like a run's.

    The text's dataset is in a temporary folder, which is removed at the end.
    """
    if is_dataset(Path(data)):
        yield Dataset.open(Path(data))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        for _ in prepare([str(data)], tokenizer, folder, options=options):
            pass
        with closing(Dataset.open(folder)) as dataset:
            yield dataset
