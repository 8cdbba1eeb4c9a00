"""Tokens that were added to a vocabulary, and settings that vary a text's ids: as transformers
writes them, against the ids that transformers gives."""

import json
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gptsmith.data import encode
from gptsmith.data.split import Passage
from gptsmith.tokenizers import (
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    learn_bpe,
    load_tokenizer,
)
from tests.versions import Ask

BASES = {
    "gpt2": gpt2_tokenizer(),
    "learned": learn_bpe(["the cat and the new york word " * 20], 270),
    "byte": byte_tokenizer(),
}
WORDS = st.one_of(
    st.sampled_from(
        ["newword", "new york", "ilÖveyou", "the", "<user>", "日本", "a", " b", "\n\n"]
    ),
    st.text(st.sampled_from("abn ewя\n<>日"), min_size=1, max_size=6),
)
ADDED = st.builds(
    tokenizers.AddedToken,
    WORDS,
    single_word=st.booleans(),
    lstrip=st.booleans(),
    rstrip=st.booleans(),
    normalized=st.booleans(),
    special=st.just(False),
)


def theirs(base: Tokenizer, added: list[tokenizers.AddedToken]) -> PreTrainedTokenizerFast:
    """A tokenizer as somebody makes it with transformers."""
    copy = tokenizers.Tokenizer.from_str(base.backend.to_str())
    judge = PreTrainedTokenizerFast(tokenizer_object=copy)
    judge.add_tokens(added)
    return judge


def in_bulk(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """The ids of documents as `prepare` encodes them, without the end of a document."""
    passages = [Passage(text, False, True, "here") for text in texts]
    ids = encode.encode_all(iter(passages), tokenizer, unknown="error", workers=2)
    return [id for train, *_ in ids for id in train.tolist() if id != tokenizer.end_of_text]


@pytest.mark.parametrize("kind", ["learned", "byte"])
@settings(max_examples=60, deadline=None)
@given(added=st.lists(ADDED, min_size=1, max_size=4), data=st.data())
def test_every_path_gives_transformers_ids(
    kind: str, added: list[tokenizers.AddedToken], data: st.DataObject
) -> None:
    judge = theirs(BASES[kind], added)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(judge.backend_tokenizer.to_str()))
    contents = st.sampled_from([token.content for token in added])
    parts = st.one_of(contents, WORDS, st.sampled_from([" ", "x", "  ", "the cat", "\n"]))
    text = "".join(data.draw(st.lists(parts, max_size=12)))
    try:
        expected = judge(text)["input_ids"]
    except BaseException as error:  # the judge's library panics on some spaces, and has no ids
        assume("AddedVocabulary bad split" not in str(error))
        raise
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode_array(text).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "STRETCH", 3)
        assert in_bulk(tokenizer, [text, text]) == expected * 2
    if not any(token.lstrip or token.rstrip for token in added):
        assert tokenizer.decode(expected) == text
        lengths = tokenizer.byte_lengths()
        assert lengths[np.array(expected, int)].sum() == len(text.encode())


def test_where_the_library_panics_there_is_one_line() -> None:
    added = [tokenizers.AddedToken("a", lstrip=True, rstrip=True, normalized=False)]
    added += [tokenizers.AddedToken(" ", lstrip=True, normalized=False)]
    tokenizer = Tokenizer(theirs(BASES["byte"], added).backend_tokenizer)
    assert tokenizer.encode("bab") == [98, 97, 98]
    for encode_text in (tokenizer.encode, tokenizer.encode_array):
        with pytest.raises(ValueError, match=r"cannot find the added tokens \('a', ' '\) in this"):
            encode_text(" a  ")


@pytest.mark.slow
def test_a_saved_folder_keeps_them_and_tells_them_apart(tmp_path: Path) -> None:
    judge = theirs(BASES["gpt2"], ["newword", "new york", "ilÖveyou"])
    judge.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a newword b") == [64, 220, 50257, 275]
    assert tokenizer.decode([50258, 50259]) == "new yorkilÖveyou"
    assert tokenizer.fingerprint != BASES["gpt2"].fingerprint
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    other = theirs(BASES["gpt2"], [tokenizers.AddedToken("newword", lstrip=True)])
    same = theirs(BASES["gpt2"], ["newword"])
    prints = {Tokenizer(each.backend_tokenizer).fingerprint for each in (other, same)}
    assert len(prints) == 2


def test_what_cannot_be_both_is_refused() -> None:
    with pytest.raises(ValueError, match="added token 'Ġthe' is a token of its BPE too"):
        Tokenizer(theirs(BASES["gpt2"], ["Ġthe"]).backend_tokenizer)
    with pytest.raises(ValueError, match="char tokenizer has an added token, 'newword'"):
        Tokenizer(theirs(char_tokenizer(["a new word"]), ["newword"]).backend_tokenizer)


@pytest.mark.slow
def test_truncation_and_padding_of_an_earlier_call_are_switched_off(tmp_path: Path) -> None:
    judge = theirs(BASES["gpt2"], [])
    judge.pad_token = judge.eos_token = "<|endoftext|>"
    text = "The quick brown fox jumps over the lazy dog. " * 50
    judge(text, truncation=True, max_length=16, padding="max_length")
    judge.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    expected = BASES["gpt2"].encode(text)
    assert tokenizer.encode(text) == tokenizer.encode_array(text).tolist() == expected
    assert tokenizer.encode("The quick") == [464, 2068]
    assert tokenizer.fingerprint == BASES["gpt2"].fingerprint


def test_dropout_is_switched_off_with_a_line() -> None:
    backend = tokenizers.Tokenizer.from_str(BASES["gpt2"].backend.to_str())
    backend.model.dropout = 0.5
    with pytest.warns(UserWarning, match=r"dropout of 0\.5, .* it is switched off"):
        tokenizer = Tokenizer(backend)
    text = "something worth some merges " * 9
    assert tokenizer.encode(text) == BASES["gpt2"].encode(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.backend.to_str()))


# -- a space before the text

IDS = """
import json, sys
from transformers import AutoTokenizer
text, *folders = sys.argv[1:]
for folder in folders:
    print(json.dumps(AutoTokenizer.from_pretrained(folder)(text)["input_ids"]))
"""
# Settings in tokenizer_config.json, whether the folder has a tokenizer.json that adds a space, and
# whether one is added. With another class, the settings say the same: then the two versions agree.
SPACES: list[tuple[dict[str, object], bool | None, bool]] = [
    ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, None, True),
    ({"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, None, True),
    ({"add_prefix_space": True}, None, True),
    ({"tokenizer_class": "GPT2Tokenizer"}, None, False),
    ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, False, True),
    ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}, True, False),
    ({"tokenizer_class": "GPT2Tokenizer"}, True, False),
    ({}, True, False),
    ({"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}, True, True),
]


@pytest.mark.slow
def test_a_space_is_put_before_a_text_where_transformers_does(tmp_path: Path, ask: Ask) -> None:
    """And what we save says so to both of its versions."""
    base, text, folders = BASES["learned"], "the cat and\nthe word", []
    for number, (usage, spaced, adds) in enumerate(SPACES):
        folders.append(folder := tmp_path / str(number))
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        (folder / "tokenizer_config.json").write_text(json.dumps(usage))
        spec = json.loads(base.backend.to_str())
        if spaced is None:
            merges = [" ".join(pair) for pair in spec["model"]["merges"]]
            (folder / "vocab.json").write_text(json.dumps(base.vocab))
            (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        else:
            spec["pre_tokenizer"]["add_prefix_space"] = spaced
            (folder / "tokenizer.json").write_text(json.dumps(spec))
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode(text) == base.encode(" " * adds + text), usage
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)
        assert in_bulk(tokenizer, [text, text]) == tokenizer.encode(text) * 2
        folders.append(saved := tmp_path / f"{number} saved")
        saved.mkdir()
        (saved / "config.json").write_text('{"model_type": "gpt2"}')
        tokenizer.save(saved)
        assert load_tokenizer(saved).fingerprint == tokenizer.fingerprint
    ours = [load_tokenizer(folder).encode(text) for folder in folders]
    assert [AutoTokenizer.from_pretrained(each)(text)["input_ids"] for each in folders] == ours
    lines = ask("4.57", tmp_path, IDS, text, *map(str, folders))
    assert list(map(json.loads, lines)) == ours


# -- learning


def test_long_words_are_cut_for_learning_alone() -> None:
    def texts() -> Iterator[str]:
        yield "".join(random.Random(1).choices("ACGT", k=300_000))
        yield " " * 100_000

    started = time.process_time()
    tokenizer = learn_bpe(texts(), 400)
    assert time.process_time() - started < 10  # seconds; a hundred times as long uncut
    assert tokenizer.vocab_size == 400
    word = "GATTACA" * 1000
    assert tokenizer.decode(tokenizer.encode(word)) == word


def test_what_fails_while_learning_is_said() -> None:
    def texts() -> Iterator[str]:
        yield "some text"
        raise ValueError("the disk is on fire")

    with pytest.raises(ValueError, match="the disk is on fire"):
        learn_bpe(texts(), 400)
