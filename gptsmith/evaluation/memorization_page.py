"""One HTML page about what a model remembers, with the matches marked.

It needs no other file and no script. Everything that comes from a text is escaped.
"""

from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from string import Template

from ..data.shards import Dataset
from ..machine.pages import read_page
from ..machine.terminal import count
from ..tokenizers import Tokenizer
from .contamination import GRAM, STRETCH, Contamination, Stretch
from .extraction import CONTINUED, NEAR, Passage
from .memorization import Memorization, Sample
from .memorization_text import (
    by_occurrences,
    matches_line,
    overlap_line,
    place_of,
    share,
    summary,
    times,
)

TEMPLATE = Path(__file__).with_name("memorization.html")
MOST_PASSAGES, SAMPLES_OPEN, MOST_DOCUMENTS = 20, 5, 20
AROUND, LONGEST = 30, 300  # tokens of the text around a stretch, and of a stretch
SHORTEST_MARK = 2  # tokens: single ones are equal by chance


def report_page(found: Memorization, tokenizer: Tokenizer, dataset: Dataset, model: str) -> str:
    """Return the page as HTML; the dataset is the one that was searched."""
    sections = [*extraction(found, tokenizer), *samples(found, tokenizer)]
    if found.contamination is not None:
        sections += overlap(found.contamination, tokenizer, dataset)
    return Template(read_page(TEMPLATE)).substitute(
        title=escape(f"What {model} remembers"),
        summary=escape(summary(found)),
        sections="\n".join(sections),
    )


# -- what the page is made of


def marked(tokenizer: Tokenizer, tokens: Sequence[int], marks: Iterable[range]) -> str:
    """Return the text of tokens, in which some ranges of them are marked."""
    known = {i for each in marks for i in each}
    decoder, pieces, before = tokenizer.decoder(), [], False
    for i, token in enumerate(tokens):
        if (i in known) != before:
            pieces.append("</mark>" if before else "<mark>")
            before = not before
        pieces.append(escape(decoder.push(token)))
    pieces += [escape(decoder.flush()), "</mark>" if before else ""]
    return "".join(pieces)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML."""
    heads = "".join(f"<th>{each}</th>" for each in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n{body}</table></div>'


def bar(part: int, whole: int) -> str:
    """Return a share as a bar and a number."""
    width = f"{100 * part / max(whole, 1):.1f}%"
    return f'<span class="bar"><i style="width:{width}"></i></span>{share(part, whole)}'


def article(title: str, *texts: tuple[str, str]) -> str:
    """Return a box with texts, each of which has a label and HTML."""
    body = "".join(
        f'<div><p class="label">{label}</p><div class="text">{text}</div></div>'
        for label, text in texts
    )
    return f'<article><h3>{title}</h3><div class="texts">{body}</div></article>'


def folded(boxes: list[str], open_ones: int) -> Iterator[str]:
    """Yield the first boxes, and the others behind a line to open them."""
    yield from boxes[:open_ones]
    if more := boxes[open_ones:]:
        yield f"<details><summary>{len(more)} more</summary>{''.join(more)}</details>"


# -- the sections


def extraction(found: Memorization, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what the model continues as the text does."""
    yield "<h2>Continued as the text goes on</h2>"
    yield (
        f"<p>The model was given the tokens before a place, chosen at random, and wrote the "
        f"likeliest next {CONTINUED}. Near: at most {NEAR} tokens are inserted, deleted or "
        "replaced.</p>"
    )
    heads = ["exact", "near"]
    both = [f"training text, {each}" for each in heads]
    if found.held_out:
        both += [f"held-out text, {each}" for each in heads]
    yield table(["prompt", *both], extraction_rows(found))
    yield table(
        [f"the {CONTINUED} tokens occur in the training text", "places", *heads],
        (
            [
                name,
                f"{len(group):,}",
                *(bar(sum(p.distance <= n for p in group), len(group)) for n in (0, NEAR)),
            ]
            for name, group in by_occurrences(found)
        ),
    )
    known = [each for each in found.passages if each.distance <= NEAR]
    if not known:
        yield "<p class='none'>No place of the training text was continued exactly or nearly.</p>"
    yield from folded([passage(p, tokenizer) for p in known[:MOST_PASSAGES]], 3)


def extraction_rows(found: Memorization) -> Iterator[list[str]]:
    """Yield a row for each prompt length."""
    for i, own in enumerate(found.train):
        pair = [own, *found.held_out[i : i + 1]]
        shares = [bar(n, each.places) for each in pair for n in (each.exact, each.near)]
        yield [f"{own.prompt_tokens} tokens", *shares]
    for k in found.too_long:
        yield [f"{k} tokens", "not measured: the context does not hold them"]


def passage(each: Passage, tokenizer: Tokenizer) -> str:
    """Return a place of the training text with what the model wrote there."""
    blocks = SequenceMatcher(None, each.written, each.wanted, autojunk=False).get_matching_blocks()
    equal = [block for block in blocks if block.size >= SHORTEST_MARK]
    edits = "exact" if each.distance == 0 else count(each.distance, "edit")
    title = f"<b>{edits}</b>, token {each.place:,} of the training text"
    if each.occurrences > 1:
        title += f", where the {CONTINUED} tokens occur {times(each.occurrences)}"
    own = marked(tokenizer, each.written, (range(b.a, b.a + b.size) for b in equal))
    texts = [
        ("prompt, and what the model wrote", f"<s>{marked(tokenizer, each.prompt, ())}</s>{own}")
    ]
    if each.distance:
        theirs = marked(tokenizer, each.wanted, (range(b.b, b.b + b.size) for b in equal))
        texts.append(("how the text goes on", theirs))
    return article(title, *texts)


def samples(found: Memorization, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the samples with their longest matches."""
    yield "<h2>Samples, and where they are in the training text</h2>"
    yield f"<p>{escape(matches_line(found))}.</p>"
    yield from folded([sample(s, tokenizer) for s in found.samples], SAMPLES_OPEN)


def sample(each: Sample, tokenizer: Tokenizer) -> str:
    """Return a sample, and its match where it comes from."""
    start, length = each.match.start, each.match.length
    own = marked(tokenizer, each.tokens, [range(start, start + length)])
    if not length:
        return article("no token of it is in the training text", ("sample", own))
    around = [*each.before, *each.tokens[start : start + length], *each.after]
    theirs = marked(tokenizer, around, [range(len(each.before), len(each.before) + length)])
    title = f"<b>{count(length, 'token')}</b>, {escape(place_of(each))}"
    return article(title, ("sample", own), ("training text", theirs))


def overlap(found: Contamination, tokenizer: Tokenizer, dataset: Dataset) -> Iterator[str]:
    """Yield how much of the validation text is in the training text, and where."""
    yield "<h2>Validation text that is in the training text</h2>"
    line = overlap_line(found)
    yield f"<p>{escape(line[0].upper() + line[1:])}.</p>"
    if found.documents > 1 and found.worst:
        yield table(
            ["validation document", "tokens", f"in stretches of {STRETCH}", f"in {GRAM}-grams"],
            (
                [
                    f"{each.document + 1:,}",
                    f"{each.tokens:,}",
                    bar(each.in_stretches, each.tokens),
                    bar(each.in_grams, each.tokens),
                ]
                for each in found.worst[:MOST_DOCUMENTS]
            ),
        )
    boxes = [stretch(each, tokenizer, dataset) for each in found.stretches]
    yield from folded(boxes, 3)


def stretch(each: Stretch, tokenizer: Tokenizer, dataset: Dataset) -> str:
    """Return a stretch of validation text with the text around it."""
    validation = dataset.validation
    assert validation is not None
    begin, length = max(0, each.start - AROUND), min(each.tokens, LONGEST)
    stop = min(each.start + length + AROUND, len(validation))
    tokens = validation.read(begin, stop).tolist()
    text = marked(tokenizer, tokens, [range(each.start - begin, each.start - begin + length)])
    shard, token = dataset.train.place_of(each.place)
    title = (
        f"<b>{count(each.tokens, 'token')}</b> from token {each.start:,} of the validation text on"
    )
    place = escape(f"{dataset.train.paths[shard].name}, token {token:,}")
    cut = f"; the first {length} are shown" if length < each.tokens else ""
    return article(f"{title}, first in {place}{cut}", ("validation text", text))
