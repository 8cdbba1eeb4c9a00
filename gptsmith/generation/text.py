"""From a job's tokens to its text: whole characters, stop strings, and each token's offset.

Knows nothing of HTTP.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..tokenizers import Tokenizer
from .job import Finish, News, Scored


@dataclass(frozen=True)
class Told:
    """A token, and the offset in the text of its first character."""

    token: Scored
    offset: int


@dataclass
class Piece:
    """The next part of a text, the tokens that it completes, and how the text ended, if it did."""

    text: str = ""
    tokens: list[Told] = field(default_factory=list)
    finish: Finish | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish)


def joined(pieces: Iterable[Piece]) -> Piece:
    """Join the pieces of a text."""
    whole = Piece()
    parts = []
    for piece in pieces:
        parts.append(piece.text)
        whole.tokens += piece.tokens
        whole.finish = piece.finish
    whole.text = "".join(parts)
    return whole


def begins_character(piece: bytes) -> bool:
    """Whether UTF-8 bytes begin with a new character rather than a continuation byte."""
    return bool(piece) and not 0x80 <= piece[0] < 0xC0


class Text:
    """Decodes the tokens of one text as they are generated; the piece with `finish` is the last.

    A character is returned when it is complete and cannot belong to a stop string, and a token
    together with the last of its characters. The token or stop string that ends the text is not
    part of it; with `with_end`, the ending token is still returned, after all others.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        echo: str = "",
        with_tokens: bool = False,
        with_end: bool = False,
    ) -> None:
        """`echo` is the prompt, if the text begins with it. Stop strings are looked for in what
        follows the first `min_tokens` new tokens."""
        self.tokenizer = tokenizer
        self.decoder, self.prompt_decoder = tokenizer.decoder(), tokenizer.decoder()
        self.stops = StopStrings(stop)
        self.unstopped = min_tokens  # next tokens in which no stop string is looked for
        self.echo = echo
        self.with_tokens, self.with_end = with_tokens, with_end
        self.waiting: list[tuple[Told, int]] = []  # tokens, and the end of each one's text
        self.prompt_length = 0  # characters of the scored prompt tokens
        self.length = len(echo)  # characters so far, those held back included
        self.sent = 0

    def push(self, news: News) -> Piece:
        """Return what a step's result completes, which may be nothing."""
        for token in news.prompt:
            self.add_prompt(token)
        if news.token is None and news.finish is None:
            return Piece()
        text, self.echo = self.echo, ""
        if news.token is not None and news.finish != "stop":
            piece = self.decoded(news.token)
            text += piece if self.unstopped > 0 else self.stops.push(piece)
            self.unstopped -= 1
        finish = news.finish
        if finish is not None and not self.stops.found:
            rest = self.decoder.flush()
            self.length += len(rest)
            text += self.stops.push(rest)
            text += self.stops.flush()
        if self.stops.found:
            finish = "stop"
        elif news.token is not None and news.finish == "stop" and self.with_end:
            self.wait(news.token, self.length, self.length)
        self.sent += len(text)
        return Piece(text, self.complete(ended=finish is not None), finish)

    def add_prompt(self, token: Scored) -> None:
        """Return a token of the prompt with the echoed text."""
        self.wait(token, self.prompt_length, 0)
        self.prompt_length += len(self.prompt_decoder.push(token.id))

    def decoded(self, token: Scored) -> str:
        """Return the text that a new token completes."""
        half = not self.decoder.whole
        text = self.decoder.push(token.id)
        # If the token does not continue an incomplete character, U+FFFD replaces that one.
        start = self.length + (half and begins_character(self.tokenizer.token_bytes(token.id)))
        self.length += len(text)
        self.wait(token, start, self.length + (not self.decoder.whole))
        return text

    def wait(self, token: Scored, start: int, end: int) -> None:
        """Keep a token until its text, from `start` to `end`, is sent."""
        if self.with_tokens:
            self.waiting.append((Told(token, start), end))

    def complete(self, *, ended: bool) -> list[Told]:
        """Return the tokens whose text is sent; at the end, also one of which only a part is."""
        if not ended:
            count = next(
                (n for n, (_, end) in enumerate(self.waiting) if end > self.sent), len(self.waiting)
            )
        elif not self.stops.found:
            count = len(self.waiting)
        else:
            count = sum(end == 0 or told.offset < self.sent for told, end in self.waiting)
        ready, self.waiting = self.waiting[:count], self.waiting[count:]
        return [told for told, _ in ready]


class StopStrings:
    """Cuts a text that comes in pieces at its first stop string, which may span pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise ValueError("a stop string is empty, which would end every text: leave it out")
        self.stop = stop
        self.held = ""  # the text's end, which may be the beginning of a stop string
        self.found = False

    def push(self, piece: str) -> str:
        """Add a piece; return the text that is certain to come before any stop string."""
        text = self.held + piece
        if places := [at for at in (text.find(word) for word in self.stop) if at >= 0]:
            self.held, self.found = "", True
            return text[: min(places)]
        waits = max((overlap(text, word) for word in self.stop), default=0)
        self.held = text[len(text) - waits :]
        return text[: len(text) - waits]

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        rest, self.held = self.held, ""
        return rest


def overlap(text: str, word: str) -> int:
    """Return how many of the last characters of `text` are the beginning, not all, of `word`."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
