"""Open DATA for evaluating a model: a split of prepared data, or a text that is encoded whole.

Knows nothing of models except the size of the vocabulary.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..config.fields import SettingError
from ..config.settings import PrepareSettings, Split
from ..tokenizers import Tokenizer
from .batches import Tokens
from .prepare import prepare
from .shards import Dataset, is_dataset


@contextmanager
def opened_tokens(
    data: str | Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    *,
    split: Split | None = None,
    options: PrepareSettings | None = None,
) -> Iterator[Tokens]:
    """Yield the tokens of DATA for a model with this tokenizer and vocabulary.

    For prepared data these are one split: by default validation, or train if nothing was held out.
    A text is encoded whole, with the given options. ValueError if the tokens do not suit the model.
    """
    if is_dataset(Path(data)):
        yield chosen_split(Dataset.open(Path(data)), tokenizer, vocab_size, split)
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
        yield Dataset.open(folder).train


def chosen_split(
    dataset: Dataset, tokenizer: Tokenizer | None, vocab_size: int, split: Split | None
) -> Tokens:
    """Return the tokens of a split, after checking that they suit the model."""
    if dataset.fingerprint is None or tokenizer is None:
        dataset.check_ids(vocab_size)
    elif dataset.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{dataset.folder} was made with another tokenizer than the model's: prepare the text "
            "again with the model's tokenizer"
        )
    if split == "validation" and dataset.validation is None:
        raise SettingError("split", f"is validation, but {dataset.folder} has none: use train")
    if split == "train" or dataset.validation is None:
        return dataset.train
    return dataset.validation
