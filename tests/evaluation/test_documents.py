"""Documents and blocks: where they begin, that their losses add up, and that tokenizers agree."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import gptsmith
from gptsmith import GPT, GPTConfig
from gptsmith.data.same_text import opened_for_each
from gptsmith.evaluation.documents import TokenText, documents_of, opened_documents
from gptsmith.evaluation.heldout import evaluate_documents
from gptsmith.tokenizers import Tokenizer, byte_tokenizer, char_tokenizer, learn_bpe

from ..conftest import TINY, scrambled

POEM = "Über allen Gipfeln\nist Ruh, in allen Wipfeln\nspürest du kaum einen Hauch.\n"


class Stream:
    """Tokens in memory."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = np.array(ids, np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> bytes:
    """The bytes of tokens; the token that ends a document has none."""
    return b"".join(tokenizer.token_bytes(id) for id in ids if id != tokenizer.document_end)


def byte_model(tokenizer: Tokenizer, seed: int = 0) -> GPT:
    return scrambled(GPTConfig(**TINY | {"vocab_size": tokenizer.vocab_size}), seed)


def losses_by_transformers(model: GPT, ids: list[int], folder: Path, T: int) -> list[float]:
    """The nats of each token but the first, by a model of transformers, in windows of T."""
    from transformers import GPT2LMHeadModel

    gptsmith.save(model, None, folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    found: list[float] = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, T):
            row = torch.tensor(ids[start : start + T + 1])
            logits = theirs(row[None, :-1]).logits[0]
            found += cross_entropy(logits, row[1:], reduction="none").tolist()
    return found


@pytest.mark.slow
def test_marked_documents_have_the_losses_of_their_tokens(tmp_path: Path) -> None:
    """Each with the token that ends it; empty ones, as at the start, are none."""
    tokenizer = byte_tokenizer()
    texts = [f"{i} {POEM[: 3 + i]}" for i in range(31)]
    end = tokenizer.document_end
    assert end is not None
    ids = [end, *(id for text in texts for id in (*tokenizer.encode(text), end)), end]
    stream, model = Stream(ids), byte_model(tokenizer)
    [documents] = documents_of([TokenText(stream, tokenizer, tokenizer.vocab_size)])
    assert documents.block_bytes is None
    assert documents.marked == len(documents) == 31
    assert documents.bytes.tolist() == [len(text.encode()) for text in texts]
    found = evaluate_documents(model, stream, documents)
    nats = losses_by_transformers(model, ids, tmp_path / "model", 11)
    assert found.loss == pytest.approx(np.mean(nats), abs=1e-6)
    start = 0
    for text, sum_of_nats in zip(texts, found.nats, strict=True):
        stop = start + len(text.encode()) + 1 + (text is texts[-1])  # the last with the empty one
        assert sum_of_nats == pytest.approx(sum(nats[start:stop]), abs=1e-5)
        start = stop
    assert start == len(nats)


def test_blocks_stand_for_few_documents() -> None:
    """All of a text's bytes but the first, in equal blocks; the last is shorter."""
    tokenizer, text = byte_tokenizer(), POEM * 20
    ids = tokenizer.encode(text)
    [documents] = documents_of([TokenText(Stream(ids), tokenizer, 300)])
    size = len(text.encode())
    assert documents.block_bytes == 256
    assert documents.marked == 1
    assert documents.bytes.tolist() == [256] * ((size - 1) // 256) + [(size - 1) % 256]
    assert documents.tokens.tolist() == documents.bytes.tolist()
    assert str(documents) == "1, too few; 6 blocks of 256 bytes stand for them"
    [large] = documents_of([TokenText(Stream(ids * 20), tokenizer, 300)])
    assert (large.block_bytes, len(large)) == (512, 60)
    [unmarked] = documents_of([TokenText(Stream([0, 1] * 200), char_tokenizer("ab"), 2)])
    assert str(unmarked) == "not marked; 2 blocks of 256 bytes stand for them"


def test_a_token_across_an_edge_counts_in_the_later_block() -> None:
    tokenizer = learn_bpe([POEM * 9], 290)
    text = POEM * 9
    ids = tokenizer.encode(text)
    [documents] = documents_of([TokenText(Stream(ids), tokenizer, 290)])
    ends = np.cumsum([len(tokenizer.token_bytes(id)) for id in ids])
    for number in range(len(documents)):
        first, stop = documents.bounds[number : number + 2]
        low, high = documents.offsets[number : number + 2]
        assert all(low < end <= high for end in ends[first:stop])
    assert documents.tokens.sum() == len(ids) - 1


@pytest.mark.parametrize("documents", [1, 40])
@pytest.mark.parametrize("data", ["text", "prepared"])
def test_models_of_different_tokenizers_score_the_same_bytes(
    documents: int, data: str, tmp_path: Path
) -> None:
    """Of bytes, of BPE, and of characters, which have no token for the end of a document."""
    texts = [f"{i}: {POEM}" for i in range(documents)] if documents > 1 else [POEM * 30]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    bytewise, merged = byte_tokenizer(), learn_bpe(texts, 300)
    characters = char_tokenizer("".join(texts))
    place = folder
    if data == "prepared":
        place = tmp_path / "prepared"
        options = gptsmith.PrepareSettings(validation_fraction=0.0)
        from gptsmith.data.prepare import prepare

        for _ in prepare([str(folder)], merged, place, options=options):
            pass
    for tokenizers in ([bytewise, merged], [merged, bytewise, characters]):
        vocabularies = [(each, each.vocab_size) for each in tokenizers]
        with opened_documents(place, vocabularies) as found:
            read = []
            for (stream, divided), tokenizer in zip(found, tokenizers, strict=True):
                marked = documents > 1 and characters not in tokenizers
                assert (divided.block_bytes is None) == marked
                assert divided.offsets.tolist() == found[0][1].offsets.tolist()
                ids = stream.read(0, len(stream))
                read.append(text_of(tokenizer, ids))
                for first, stop, size in zip(
                    divided.bounds, divided.bounds[1:], divided.bytes, strict=False
                ):
                    covered = text_of(tokenizer, ids[first:stop])
                    assert abs(len(covered) - size) <= (0 if marked else 16)
            assert read[0].decode() == "".join(texts)
            assert all(each == read[0] for each in read)


def test_the_first_tokens_of_prepared_text_are_compared_as_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(POEM * 30)
    tokenizers = [byte_tokenizer(), learn_bpe([POEM], 300)]
    vocabularies = [(each, each.vocab_size) for each in tokenizers]
    with opened_for_each(tmp_path / "text.txt", vocabularies, first_tokens=101) as streams:
        for stream, tokenizer in zip(streams, tokenizers, strict=True):
            assert text_of(tokenizer, stream.read(0, len(stream))) == (POEM * 30).encode()[:101]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(POEM)
    tokenizers = [byte_tokenizer(), learn_bpe([POEM], 300)]
    vocabularies = [*((each, each.vocab_size) for each in tokenizers), (None, 300)]
    with (
        pytest.raises(ValueError, match=r"a model without a tokenizer\.json cannot be compared"),
        opened_for_each(tmp_path / "text.txt", vocabularies),
    ):
        pass
    ids = tokenizers[0].encode(POEM)
    texts = [TokenText(Stream(each), tokenizers[0], 300) for each in (ids, ids[:-3])]
    with pytest.raises(ValueError, match="read 76 and 73 bytes of the data"):
        documents_of(texts)
    with pytest.raises(ValueError, match="a text of 1 tokens cannot be evaluated"):
        TokenText(Stream([3]), None, 9)


@pytest.mark.slow
def test_a_stride_is_the_sliding_window_of_transformers(tmp_path: Path) -> None:
    """Their page on the perplexity of fixed-length models, whose window of L tokens has L - 1
    targets, where ours of T has T: windows of 12 and 11 are the same."""
    from transformers import GPT2LMHeadModel

    model = scrambled(GPTConfig(**TINY | {"context_length": 12}))
    gptsmith.save(model, None, tmp_path / "model")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    for length, stride in itertools.product((5, 12, 13, 41, 44), (1, 3, 4, 11)):
        ids = torch.randint(37, (1, length), generator=torch.Generator().manual_seed(length))
        L, nats, counted, previous_end = 12, 0.0, 0, 0
        for begin in range(0, length, stride):
            end = min(begin + L, length)
            targets = ids[:, begin:end].clone()
            targets[:, : -(end - previous_end)] = -100
            scored = int((targets[:, 1:] != -100).sum())
            with torch.no_grad():
                nats += scored * float(theirs(ids[:, begin:end], labels=targets).loss)
            counted, previous_end = counted + scored, end
            if end == length:
                break
        stream = Stream(ids[0].tolist())
        [documents] = documents_of([TokenText(stream, None, 37)])
        found = evaluate_documents(model, stream, documents, context_length=11, stride=stride)
        assert found.tokens == counted == length - 1
        assert found.loss == pytest.approx(nats / counted, abs=1e-6)
        assert found.by_position is not None
        assert found.by_position[0].sum() == pytest.approx(nats, rel=1e-6)
        assert found.by_position[1].sum() == counted


def test_bits_and_intervals_are_of_the_whole_text() -> None:
    tokenizer = byte_tokenizer()
    stream = Stream(tokenizer.encode(POEM * 20))
    [documents] = documents_of([TokenText(stream, tokenizer, 300)])
    found = evaluate_documents(byte_model(tokenizer), stream, documents)
    assert found.nats is not None
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))
    weighted = np.average(found.bits_by_document, weights=documents.bytes)
    assert weighted == pytest.approx(found.bits_per_byte)
    assert found.interval is not None
    assert found.interval[0] < found.bits_per_byte < found.interval[1]
