"""What a model remembers, as text and as JSON.

Knows nothing of how it was measured; memorization_page.py makes a page of the same.
"""

import statistics
from collections.abc import Iterator
from typing import Any

from ..machine.terminal import count
from ..tokenizers import Tokenizer
from .contamination import GRAM, STRETCH, Contamination
from .extraction import CONTINUED, NEAR, Passage
from .memorization import Memorization, Sample

OCCURRENCES = (1, 1), (2, 9), (10, 99), (100, None)  # groups of passages
MOST_SAMPLES, MOST_DOCUMENTS = 5, 5
LONGEST_LINE = 120  # characters of a match


def share(part: int, whole: int) -> str:
    """Format a share: "12.5%"."""
    return f"{part / max(whole, 1):.1%}"


def summary(found: Memorization) -> str:
    """Say in a sentence or two how much the model remembers."""
    best = found.train[-1]
    text = (
        f"Given {best.prompt_tokens} tokens of its training text, the model continues "
        f"{share(best.exact, best.places)} of {count(best.places, 'place')} word for word for "
        f"{CONTINUED} tokens"
    )
    if found.held_out:
        other = found.held_out[-1]
        places = count(other.places, "place")
        text += f", and {share(other.exact, other.places)} of {places} of held-out text"
    longest = found.samples[0].match.length
    return f"{text}. The longest match of a sample with the training text has {longest} tokens."


def by_occurrences(found: Memorization) -> Iterator[tuple[str, list[Passage]]]:
    """Yield the passages of the training text in groups by how often they occur there."""
    for low, high in OCCURRENCES:
        group = [p for p in found.passages if low <= p.occurrences <= (high or p.occurrences)]
        if group:
            name = "once" if high == 1 else f"{low} or more" if high is None else f"{low} to {high}"
            yield f"{name} times" if high != 1 else name, group


def place_of(sample: Sample) -> str:
    """Say where the match of a sample is in the training text."""
    document = "" if sample.document is None else f", document {sample.document + 1:,}"
    often = ""
    if sample.occurrences is not None:
        often = f"; its first {CONTINUED} tokens occur {times(sample.occurrences)}"
    return f"{sample.shard}, token {sample.shard_token:,}{document}{often}"


def times(number: int) -> str:
    """Format how often something occurs."""
    return "once" if number == 1 else f"{number:,} times"


def matches_line(found: Memorization) -> str:
    """Compare the longest matches of samples with those of held-out texts."""
    own = [sample.match.length for sample in found.samples]
    length = len(found.samples[0].tokens)
    line = (
        f"{count(len(own), 'sample')} of {count(length, 'token')}: the longest match with the "
        f"training text has {statistics.median(own):.0f} tokens in the median, {max(own)} at most"
    )
    if found.reference:
        median, most = statistics.median(found.reference), max(found.reference)
        line += f"; that of held-out texts of this length {median:.0f}, {most} at most"
    return line


def overlap_line(found: Contamination) -> str:
    """Say how much of the validation text is in the training text."""
    line = (
        f"of {count(found.tokens, 'validation token')}, "
        f"{share(found.in_stretches, found.tokens)} are in stretches of {STRETCH} tokens that the "
        f"training text has too, and {share(found.in_grams, found.tokens)} in {GRAM}-grams"
    )
    if found.documents > 1:
        documents = count(found.documents, "document")
        line += f"; of {documents}, {found.touched:,} have such a stretch"
        line += f" and {found.whole:,} consist of them"
    return line


# -- text


def report_text(found: Memorization, tokenizer: Tokenizer) -> str:
    """Return the report as lines of text."""
    return "\n".join(
        [
            summary(found),
            "",
            *extraction_lines(found),
            "",
            matches_line(found),
            *sample_lines(found, tokenizer),
            "",
            *overlap_lines(found),
        ]
    )


def extraction_lines(found: Memorization) -> Iterator[str]:
    """Yield the tables of continued places."""
    yield f"{'':<16}{'training text':^22}" + (f"{'held-out text':^22}" if found.held_out else "")
    heads = f"{'exact':>10}{'near':>11} "
    yield f"{'prompt':<16}{heads}{heads if found.held_out else ''}".rstrip()
    for i, own in enumerate(found.train):
        cells = [own, *found.held_out[i : i + 1]]
        shares = (
            f"{share(each.exact, each.places):>10}{share(each.near, each.places):>11} "
            for each in cells
        )
        yield f"{f'{own.prompt_tokens} tokens':<16}{''.join(shares)}".rstrip()
    for k in found.too_long:
        yield f"{f'{k} tokens':<16}  not measured: the model's context does not hold them"
    yield f"near: at most {NEAR} tokens are inserted, deleted or replaced"
    yield ""
    yield f"by how often the {CONTINUED} tokens occur in the training text:"
    for name, group in by_occurrences(found):
        exact, near = (sum(p.distance <= bound for p in group) for bound in (0, NEAR))
        row = f"{name:<16}{share(exact, len(group)):>10}{share(near, len(group)):>11}"
        yield f"{row}  of {count(len(group), 'place')}"


def sample_lines(found: Memorization, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the longest matches of samples."""
    for sample in found.samples[:MOST_SAMPLES]:
        match = sample.match
        if match.length:
            text = tokenizer.decode(sample.tokens[match.start :][: match.length])
            cut = text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}..."
            yield f"  {match.length} tokens, {place_of(sample)}: {cut!r}"


def overlap_lines(found: Memorization) -> Iterator[str]:
    """Yield how much of the validation text is in the training text, and where."""
    overlap = found.contamination
    if overlap is None:
        yield "nothing is held out"
        return
    yield overlap_line(overlap)
    if overlap.documents > 1:
        for each in overlap.worst[:MOST_DOCUMENTS]:
            if each.in_stretches:
                in_stretches = share(each.in_stretches, each.tokens)
                yield (
                    f"  document {each.document + 1:,}: {in_stretches} of "
                    f"{count(each.tokens, 'token')} in stretches, "
                    f"{share(each.in_grams, each.tokens)} in {GRAM}-grams"
                )


# -- JSON


def report_json(found: Memorization, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the report as an object for scripts."""
    decode = tokenizer.decode
    return {
        "train_tokens": found.train_tokens,
        "continuation_tokens": CONTINUED,
        "near_edits": NEAR,
        "extraction": {
            "train": [vars(each) for each in found.train],
            "held_out": [vars(each) for each in found.held_out],
            "too_long": found.too_long,
        },
        "passages": [
            {
                **vars(each),
                "prompt": decode(each.prompt),
                "wanted": decode(each.wanted),
                "written": decode(each.written),
            }
            for each in found.passages
        ],
        "samples": [sample_json(each, tokenizer) for each in found.samples],
        "held_out_matches": found.reference,
        "overlap": found.contamination and found.contamination.to_json(),
    }


def sample_json(sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a sample and its match as an object."""
    match, decode = sample.match, tokenizer.decode
    return {
        "text": decode(sample.tokens),
        "match": {
            "tokens": match.length,
            "text": decode(sample.tokens[match.start :][: match.length]),
            "place": match.place if match.length else None,
            "shard": sample.shard,
            "shard_token": sample.shard_token,
            "document": sample.document,
            "occurrences": sample.occurrences,
            "before": decode(sample.before),
            "after": decode(sample.after),
        },
    }
