"""Whose turn it is: jobs wait, get a slot, read their prompt in parts, and write side by side.

One call is one step for everybody, and new jobs join between steps. Knows nothing of threads,
characters or HTTP.

Shapes:  W logits wanted    N texts that go on    V vocabulary    T tokens of a prompt
"""

from collections import deque
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from ..model.gpt import GPT
from .choice import Writer, choose, scored
from .compiled import Decoder
from .job import Finish, Job, News, Scored
from .sampling import NOT_FINITE
from .slots import Slots, Span


@dataclass(eq=False)
class Turn:
    """A job that has a slot."""

    job: Job
    slot: int
    writer: Writer
    begun: bool = False


class Engine:
    """A model and its slots, the jobs that have one and the jobs that wait."""

    def __init__(
        self, model: GPT, *, decoder: Decoder | None = None, slots: int | None = None
    ) -> None:
        self.config = model.config
        self.slots = Slots(model, slots, decoder)
        self.free = deque(range(len(self.slots)))  # the one that was left longest ago first
        self.waiting: deque[Job] = deque()
        self.turns: list[Turn] = []  # in the order of their coming

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.turns and not self.waiting

    def submit(self, job: Job) -> None:
        """Let a job wait for a slot."""
        self.waiting.append(job)

    def cancel(self, job: Job) -> None:
        """Forget a job, wherever it is; no news come of it any more."""
        self.waiting = deque(other for other in self.waiting if other is not job)
        for turn in self.turns:
            if turn.job is job:
                self.leave(turn)

    def step(self, now: float) -> list[News]:
        """What one pass through the model brings, at a time by time.monotonic."""
        news = self.expire(now)
        self.admit()
        planned = self.plan()
        if not planned:
            return news
        logits = self.slots.read([span for _, span in planned])  # (W, V)
        ends = list(accumulate(span.wanted for _, span in planned))
        for (turn, span), end in zip(planned, ends, strict=True):
            if turn.job.score_prompt and not turn.writer.new:
                news.append(self.score(turn, span, logits[end - span.wanted : end]))
        read = [
            (turn, end - 1)
            for (turn, _), end in zip(planned, ends, strict=True)
            if self.unread(turn) == 0
        ]
        for turn, _ in read:
            if turn.job.max_tokens == 0:
                self.leave(turn)
                news.append(News(turn.job, finish="length"))
        writing = [(turn, row) for turn, row in read if turn.job.max_tokens > 0]
        rows = [row for _, row in writing]
        if len(rows) < len(logits):
            logits = logits[rows]
        return news + self.write([turn for turn, _ in writing], logits)

    def abandon(self, reason: str) -> list[News]:
        """Give up every job, and tell each why."""
        jobs = [*(turn.job for turn in self.turns), *self.waiting]
        for turn in [*self.turns]:
            self.slots.clear(turn.slot)
            self.leave(turn)
        self.waiting.clear()
        return [News(job, finish="failed", reason=reason) for job in jobs]

    # -- whose turn

    def expire(self, now: float) -> list[News]:
        """End the jobs whose time is over."""
        jobs = [*(turn.job for turn in self.turns), *self.waiting]
        late = [job for job in jobs if job.deadline < now]
        for job in late:
            self.cancel(job)
        return [News(job, finish="timeout") for job in late]

    def admit(self) -> None:
        """Give every free slot to the job that has waited longest."""
        while self.free and self.waiting:
            writer = Writer.of(self.waiting[0], self.config.vocab_size)
            self.turns.append(Turn(self.waiting.popleft(), self.free.popleft(), writer))

    def leave(self, turn: Turn) -> None:
        """Give a slot back."""
        self.turns = [other for other in self.turns if other is not turn]
        self.slots.end(turn.slot)
        self.free.append(turn.slot)

    # -- what is read

    def plan(self) -> list[tuple[Turn, Span]]:
        """What to read in this step: a token of everyone who writes, and of prompts, in the order
        of their coming, one chunk in all, so that nobody who writes has to wait for long."""
        planned = []
        room = self.slots.chunk
        for turn in self.turns:
            if turn.writer.new:
                planned.append((turn, Span(turn.slot, turn.writer.new[-1:], 1)))
            elif room > 0 and (span := self.next_part(turn, room)):
                planned.append((turn, span))
                room -= len(span.tokens)
        return planned

    def next_part(self, turn: Turn, room: int) -> Span | None:
        """The next tokens of a prompt, no more than there is room for; None where they cannot be
        cut, and have to wait."""
        job, slots = turn.job, self.slots
        if not turn.begun:
            slots.begin(turn.slot, [] if job.score_prompt else job.prompt)
            turn.begun = True
        start = len(slots.texts[turn.slot])
        part = job.prompt[start : start + slots.chunk]
        if len(part) > room:
            if not slots.exact:
                return None
            part = part[:room]
        last = start + len(part) == len(job.prompt)
        return Span(turn.slot, part, len(part) if job.score_prompt else int(last))

    def unread(self, turn: Turn) -> int:
        """How many tokens of a job are not in its slot."""
        text = self.slots.texts[turn.slot]
        return len(turn.job.prompt) + len(turn.writer.new) - len(text)

    # -- what is made of it

    def score(self, turn: Turn, span: Span, logits: Tensor) -> News:
        """What the model thinks of each token of the prompt that follows those just read, and of
        the first, which nothing comes before.  (T, V)"""
        job, end = turn.job, len(self.slots.texts[turn.slot])
        start = end - len(span.tokens)
        following = job.prompt[start + 1 : end + 1]
        asked = [job.alternatives] * len(following)
        found = scored(following, logits[: len(following)], asked)
        if start == 0:
            found = [Scored(job.prompt[0]), *found]
        return News(job, prompt=tuple(found))

    def write(self, turns: list[Turn], logits: Tensor) -> list[News]:
        """The next token of each, from logits (N, V); who is done leaves."""
        tokens = choose([turn.writer for turn in turns], logits)
        known = [0 if token is None else token for token in tokens]
        told = scored(known, logits, [turn.job.alternatives for turn in turns])
        news = []
        for turn, token, score in zip(turns, tokens, told, strict=True):
            if token is None:
                self.slots.clear(turn.slot)
                self.leave(turn)
                news.append(News(turn.job, finish="failed", reason=NOT_FINITE))
                continue
            turn.writer.take(token)
            finish = self.finish(turn)
            if finish:
                self.leave(turn)
            news.append(News(turn.job, token=score, finish=finish))
        return news

    def finish(self, turn: Turn) -> Finish | None:
        """Whether its last token ends a job, and why; the last that fits the context is not read,
        so there is room for one more than the context has places."""
        job, new = turn.job, turn.writer.new
        if new[-1] in job.ends:
            return "stop"
        room = self.config.context_length + 1 - len(job.prompt)
        return "length" if len(new) == min(job.max_tokens, room) else None
