"""A conversation with a model: whose turn it is, what is remembered, and where an answer ends.

Knows nothing of terminals, files or HTTP.
"""

from collections.abc import Iterator

from ..config.settings import SamplingSettings
from ..model.gpt import GPT
from ..tokenizers import Tokenizer
from ..tokenizers.chat import ChatTemplate
from .compiled import Decoder
from .engine import Engine
from .job import Finish, Job
from .slots import Slots
from .text import Text, joined
from .writing import news_of

Message = dict[str, str]  # "role" and "content"


class Conversation:
    """Messages, and an engine that answers the last of them.

    With a compiled step, the keys and values of what was read before stay cached from turn to turn;
    elsewhere each turn reads the whole conversation again, see `Slots.begin`.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        system: str | None = None,
        max_tokens: int = 256,
        seed: int = 0,
        sampling: SamplingSettings = SamplingSettings(),  # noqa: B008 (frozen)
        decoder: Decoder | None = None,
    ) -> None:
        """`max_tokens` is for one answer. Answer i is sampled with `seed + i`."""
        self.tokenizer, self.template = tokenizer, template
        self.max_tokens, self.seed, self.sampling = max_tokens, seed, sampling
        self.engine = Engine(Slots(model, 1, decoder, in_chunks=True))
        self.limit = model.config.context_length
        self.ends = tokenizer.ends | ends_of_answers(template)
        self.system: str | None = None
        self.turns: list[Message] = []  # by the user and the assistant in turn
        self.answers = 0
        self.forgotten = 0  # messages that had to leave for the last answer
        self.finish: Finish | None = None  # how that ended; None: it was stopped
        if system is not None:
            self.instruct(system)

    @property
    def messages(self) -> list[Message]:
        """The conversation, the system's message first if there is one."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.turns

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.turns = []

    def instruct(self, system: str | None) -> None:
        """Replace the system's message, or drop it; ValueError if the template has no place."""
        before, self.system = self.system, system
        try:
            self.template.ids([*self.messages, *([] if self.turns else [said("user", "")])])
        except ValueError:
            self.system = before
            raise

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to a message, a piece for each step of the engine, which may be empty.

        An iteration that is ended early keeps the answer so far, and forgets the message if there
        is none. ValueError, and the message is forgotten, if it does not fit or is refused.
        """
        before, written, decoded = self.turns, "", Text(self.tokenizer)
        self.turns, self.finish, job = [*before, said("user", text)], None, None
        try:
            job = self.next_job()
            self.engine.submit(job)
            self.answers += 1
            for news in news_of(self.engine):
                piece = joined(decoded.push(item) for item in news)
                self.finish = piece.finish
                written += piece.text
                yield piece.text
        finally:
            if job is not None:
                self.engine.cancel(job)
            if written or self.finish:
                self.turns = [*self.turns, said("assistant", written)]
            else:
                self.turns = before

    def next_job(self) -> Job:
        """Return the job of answering, with the oldest turns dropped that do not fit beside it."""
        ids = self.template.ids(self.messages)
        room = self.limit - min(self.max_tokens, self.limit // 4)
        whole = len(self.turns)
        if len(ids) > room:
            # Half of the context is freed, so that the next turns can go on from what is cached.
            while len(ids) > self.limit // 2 and len(self.turns) > 1:
                self.turns = self.turns[2:]
                ids = self.template.ids(self.messages)
        self.forgotten = whole - len(self.turns)
        if len(ids) > self.limit:
            raise ValueError(
                f"the message makes a prompt of {len(ids):,} tokens, but the model's "
                f"context_length is {self.limit:,}: shorten it"
            )
        return Job(
            prompt=ids,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            seed=self.seed + self.answers,
            ends=self.ends,
        )


def said(role: str, content: str) -> Message:
    """Return a message."""
    return {"role": role, "content": content}


def ends_of_answers(template: ChatTemplate) -> frozenset[int]:
    """Return the first special token that the template writes after an answer, if it does."""
    try:
        segments = template.segments([said("user", ""), said("assistant", "")])
    except ValueError:
        return frozenset()
    ids = [id for segment in segments if segment.learned for id in segment.ids]
    return frozenset([id for id in ids if id in template.specials.values()][:1])
