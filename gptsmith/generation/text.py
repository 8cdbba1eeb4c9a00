"""From a job's tokens to its text: whole characters, stop strings, and which token wrote what.

Knows nothing of HTTP, or of how the text is answered.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..tokenizers import Tokenizer
from .job import Finish, News, Scored


@dataclass(frozen=True)
class Told:
    """A token, and the place in the text of the first character that it writes."""

    token: Scored
    offset: int


@dataclass
class Piece:
    """The next part of a text, the tokens that are complete with it, and how the text ended."""

    text: str = ""
    tokens: list[Told] = field(default_factory=list)
    finish: Finish | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish)


def joined(pieces: Iterable[Piece]) -> Piece:
    """The pieces of a text as one."""
    whole = Piece()
    parts = []
    for piece in pieces:
        parts.append(piece.text)
        whole.tokens += piece.tokens
        whole.finish = piece.finish
    whole.text = "".join(parts)
    return whole


def begins_character(piece: bytes) -> bool:
    """Whether bytes of UTF-8 begin with a character, rather than going on with one."""
    return bool(piece) and not 0x80 <= piece[0] < 0xC0


class Text:
    """One text as it is written; after the piece with `finish` nothing more belongs to it.

    Its characters come out when they are whole and cannot be a part of a stop string, a token with
    the last of its characters. What ends a text, token or stop string, is no part of it; but the
    token is told after those of the text where `with_end`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        echo: str = "",
        with_tokens: bool = False,
        with_end: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.decoder, self.prompt_decoder = tokenizer.decoder(), tokenizer.decoder()
        self.stops = StopStrings(stop)
        self.echo = echo  # of the prompt, which comes first
        self.with_tokens, self.with_end = with_tokens, with_end
        self.waiting: list[tuple[Told, int]] = []  # tokens, and where the text of each ends
        self.prompt_length = 0  # characters of the prompt whose tokens are scored
        self.length = len(echo)  # characters of the whole text, those held back too
        self.sent = 0

    def push(self, news: News) -> Piece:
        """What the next step completes; often nothing."""
        for token in news.prompt:
            self.add_prompt(token)
        if news.token is None and news.finish is None:
            return Piece()
        text, self.echo = self.echo, ""
        if news.token is not None and news.finish != "stop":
            text += self.stops.push(self.decoded(news.token))
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
        """Tell a token of the prompt with the text that is echoed."""
        # An empty prompt has a token to begin with, and no text.
        self.wait(token, min(self.prompt_length, self.length), 0)
        self.prompt_length += len(self.prompt_decoder.push(token.id))

    def decoded(self, token: Scored) -> str:
        """The text that a new token completes."""
        half = not self.decoder.whole
        text = self.decoder.push(token.id)
        # A token that does not go on with half a character leaves U+FFFD in its place.
        start = self.length + (half and begins_character(self.tokenizer.token_bytes(token.id)))
        self.length += len(text)
        self.wait(token, start, self.length + (not self.decoder.whole))
        return text

    def wait(self, token: Scored, start: int, end: int) -> None:
        """Keep a token until its text, from `start` to `end`, is sent."""
        if self.with_tokens:
            self.waiting.append((Told(token, start), end))

    def complete(self, *, ended: bool) -> list[Told]:
        """The tokens whose text is sent; in the end those too of which only a part is the text."""
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
    """Text that comes in pieces, up to the first of some stop strings, which may span pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise ValueError("a stop string is empty: it would stop before the first character")
        self.stop = stop
        self.held = ""  # what may yet grow into a stop string
        self.found = False

    def push(self, piece: str) -> str:
        """What of the text, this piece included, is now certain to come before a stop string."""
        text = self.held + piece
        if places := [at for at in (text.find(word) for word in self.stop) if at >= 0]:
            self.held, self.found = "", True
            return text[: min(places)]
        waits = max((overlap(text, word) for word in self.stop), default=0)
        self.held = text[len(text) - waits :]
        return text[: len(text) - waits]

    def flush(self) -> str:
        """What was held back, when no more comes."""
        rest, self.held = self.held, ""
        return rest


def overlap(text: str, word: str) -> int:
    """How many last characters of `text` are a beginning of `word`, short of the whole."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
