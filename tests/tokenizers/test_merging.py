"""The merges that made a token, held to tiktoken's own slow BPE."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiktoken._educational import bpe_encode

from gptsmith.tokenizers import char_tokenizer, gpt2_tokenizer, learn_bpe
from gptsmith.tokenizers.merging import merge_ranks, merge_steps

GPT2 = gpt2_tokenizer()
RANKS = merge_ranks(GPT2)
LEARNED = learn_bpe(["the cat sat on the mat, and that was that; aaaa baaa aaab"] * 3, 280)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_each_token_is_made_of_its_bytes_merge_after_merge(text: str) -> None:
    for tokenizer in (GPT2, LEARNED):
        ranks = RANKS if tokenizer is GPT2 else merge_ranks(tokenizer)
        for id in tokenizer.encode(text):
            piece = tokenizer.token_bytes(id)
            steps = merge_steps(piece, ranks)
            assert steps[0] == [bytes([byte]) for byte in piece]
            assert steps[-1] == [piece]
            for before, after in pairwise(steps):
                assert b"".join(after) == piece
                assert len(after) < len(before)


@pytest.mark.parametrize("word", [" antidisestablishmentarianism", "ababababab", "naïve", " 🙂🙂"])
def test_the_merges_of_a_word_are_those_of_tiktoken(word: str) -> None:
    """A whole word, of which BPE makes several tokens: they are what is left at the end."""
    mergeable = {piece: id for id, piece in GPT2.pieces.items() if id not in GPT2.specials}
    # tiktoken goes by the ranks of the tokens; of GPT-2's, those are in the order of the merges.
    wanted = bpe_encode(mergeable, word.encode(), visualise=None)
    last = merge_steps(word.encode(), RANKS)[-1]
    assert [mergeable[piece] for piece in last] == wanted == GPT2.encode(word)


def test_a_tokenizer_without_merges_has_none() -> None:
    assert merge_ranks(char_tokenizer("abc")) == {}
    assert merge_steps(b"abc", {}) == [[b"a", b"b", b"c"]]
