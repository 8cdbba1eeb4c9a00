"""Continuous batching: jobs wait for a slot, read their prompt, and generate in one batch.

Each call of `step` is one step for all jobs, and jobs join and leave between steps. Knows nothing
of threads, characters or HTTP.

Shapes:  W logits wanted    V vocabulary    T tokens of a prompt
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .job import Finish, Job, News, Scored, Writer
from .sampling import NOT_FINITE, choose_tokens, scored
from .slots import Slots, Span

MOST_GUESSED = 8  # tokens of a draft per step


@dataclass(eq=False)
class Turn:
    """A job that has a slot."""

    job: Job
    slot: int
    writer: Writer
    begun: bool = False


class Reading(NamedTuple):
    """What a step reads of a job's text: a span, whose last tokens may be guesses."""

    turn: Turn
    span: Span
    whole: bool  # the text is read to its end, so a token is chosen
    guesses: Sequence[int] = ()


class Engine:
    """Runs jobs in the slots of a model; other jobs wait for a free slot."""

    def __init__(self, slots: Slots) -> None:
        self.slots, self.config = slots, slots.model.config
        self.free = deque(range(len(slots)))  # least recently used first, for `Slots.begin`
        self.waiting: deque[Job] = deque()
        self.turns: list[Turn] = []  # in order of arrival

    @property
    def idle(self) -> bool:
        """Whether there are no jobs."""
        return not self.turns and not self.waiting

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self.waiting.append(job)

    def cancel(self, job: Job) -> None:
        """Drop a waiting or running job; it gets no more news."""
        self.waiting = deque(other for other in self.waiting if other is not job)
        for turn in self.turns:
            if turn.job is job:
                self.leave(turn)

    @torch.inference_mode()
    def step(self, now: float) -> list[News]:
        """Run one step, and return its news; `now` is by time.monotonic.

        Where a draft guessed right, a job gets several tokens in one step.
        """
        news = self.expire(now)
        self.admit()
        planned = self.plan()
        if not planned:
            return news
        logits = self.slots.read([reading.span for reading in planned])  # (W, V)
        writing, first = [], 0
        for reading in planned:
            turn, span = reading.turn, reading.span
            # A span's wanted logits are those of all tokens or of the last, then of the guesses.
            last = first + span.wanted - 1 - len(reading.guesses)
            if turn.job.score_prompt and not turn.writer.written:
                news.append(self.score(reading, logits[first : last + 1]))
            if reading.whole and turn.job.max_tokens > 0:
                writing.append((reading, last))
            elif reading.whole:
                self.leave(turn)
                news.append(News(turn.job, finish="length"))
            first += span.wanted
        return news + self.write(writing, logits)

    def abandon(self, reason: str) -> list[News]:
        """Drop every job; the news say that each failed, and why."""
        jobs = [*(turn.job for turn in self.turns), *self.waiting]
        for turn in [*self.turns]:
            self.slots.clear(turn.slot)
            self.leave(turn)
        self.waiting.clear()
        return [News(job, finish="failed", reason=reason) for job in jobs]

    # -- jobs and slots

    def expire(self, now: float) -> list[News]:
        """End the jobs whose deadline has passed."""
        jobs = [*(turn.job for turn in self.turns), *self.waiting]
        late = [job for job in jobs if job.deadline < now]
        for job in late:
            self.cancel(job)
        return [News(job, finish="timeout") for job in late]

    def admit(self) -> None:
        """Give the free slots to the jobs that have waited longest."""
        while self.free and self.waiting:
            writer = Writer.of(self.waiting[0], self.config.vocab_size)
            self.turns.append(Turn(self.waiting.popleft(), self.free.popleft(), writer))

    def leave(self, turn: Turn) -> None:
        """Free a job's slot."""
        self.turns = [other for other in self.turns if other is not turn]
        self.slots.end(turn.slot)
        self.free.append(turn.slot)

    # -- planning a step

    def plan(self) -> list[Reading]:
        """Plan what to read in this step.

        Each generating job reads its last token, and guesses if it has a draft. Prompts share
        `slots.chunk` tokens in order of arrival, so that a long one does not delay the others.
        """
        planned = []
        room = self.slots.chunk
        for turn in self.turns:
            text, slot = turn.writer.text, turn.slot
            if len(text) > self.slots.capacity:
                seen = text[-self.config.context_length :]
                planned.append(Reading(turn, Span(slot, seen, 1, past=True), True))
            elif not turn.writer.written:
                if room > 0 and (reading := self.next_part(turn, room)):
                    planned.append(reading)
                    room -= len(reading.span.tokens)
            elif turn.job.draft is None:
                planned.append(Reading(turn, Span(slot, text[-1:], 1), True))
            else:
                guesses = self.guesses(turn)
                span = Span(slot, [*text[-1:], *guesses], 1 + len(guesses))
                planned.append(Reading(turn, span, True, guesses))
        return planned

    def next_part(self, turn: Turn, room: int) -> Reading | None:
        """Plan the next tokens of a prompt, at most `room`; None if they have to wait, as they
        may only be cut at multiples of the chunk."""
        job, slots, prompt = turn.job, self.slots, turn.writer.text
        if not turn.begun:
            slots.begin(turn.slot, [] if job.score_prompt else prompt)
            turn.begun = True
        start = len(slots.texts[turn.slot])
        part = prompt[start : start + slots.chunk]
        if len(part) > room:
            if not slots.exact:
                return None
            part = part[:room]
        whole = start + len(part) == len(prompt)
        guesses = self.guesses(turn) if whole else []
        wanted = (len(part) if job.score_prompt else int(whole)) + len(guesses)
        return Reading(turn, Span(turn.slot, part + guesses, wanted), whole, guesses)

    def guesses(self, turn: Turn) -> list[int]:
        """Return the draft's guesses of a job's next tokens, as far as there is room for them."""
        text, draft = turn.writer.text, turn.job.draft
        left = self.most(turn.job) - turn.writer.written
        most = min(MOST_GUESSED, left - 1, self.slots.capacity - len(text))
        if draft is None or most <= 0:
            return []
        return draft.guess(torch.tensor(text, device=self.slots.model.device), most).tolist()

    # -- results of a step

    def score(self, reading: Reading, logits: Tensor) -> News:
        """Score the prompt tokens that follow those just read, from logits (T, V).

        The prompt's first token has no log-probability, and comes with the first of them.
        """
        job = reading.turn.job
        end = len(self.slots.texts[reading.turn.slot]) - len(reading.guesses)
        start = end - len(logits)
        following = job.prompt[start + 1 : end + 1]
        asked = [job.alternatives] * len(following)
        found = scored(following, logits[: len(following)], asked)
        if start == 0:
            found = [Scored(job.prompt[0]), *found]
        return News(job, prompt=tuple(found))

    def write(self, writing: Sequence[tuple[Reading, int]], logits: Tensor) -> list[News]:
        """Choose the next token of each job, from its row of the logits (W, V).

        Where that is what the draft guessed, the next row gives one more token, and so on. Jobs
        that finish free their slots.
        """
        news, place = [], 0
        while writing:
            rows = [row + place for _, row in writing]
            here = logits if rows == [*range(len(logits))] else logits[rows]
            tokens = choose_tokens([reading.turn.writer for reading, _ in writing], here)
            known = [0 if token is None else token for token in tokens]
            told = scored(known, here, [reading.turn.job.alternatives for reading, _ in writing])
            going_on = []
            for (reading, row), token, score in zip(writing, tokens, told, strict=True):
                item = self.take(reading.turn, token, score)
                news.append(item)
                right = place < len(reading.guesses) and reading.guesses[place] == token
                if right and not item.finish:
                    going_on.append((reading, row))
                elif reading.guesses or item.finish:
                    self.settle(reading.turn, item)
            writing, place = going_on, place + 1
        return news

    def take(self, turn: Turn, token: int | None, score: Scored) -> News:
        """Append a token to a text; None means that its logits were not finite."""
        if token is None:
            return News(turn.job, finish="failed", reason=NOT_FINITE)
        turn.writer.take(token)
        finish: Finish | None = None
        if token in turn.job.ends and turn.writer.written > turn.job.min_tokens:
            finish = "stop"
        elif turn.writer.written == self.most(turn.job):
            finish = "length"
        return News(turn.job, token=score, finish=finish)

    def settle(self, turn: Turn, last: News) -> None:
        """Drop wrong guesses, keep all but the last token as read, and end a finished job."""
        self.slots.keep(turn.slot, len(turn.writer.text) - 1)
        if last.finish == "failed":
            self.slots.clear(turn.slot)
        if last.finish:
            self.leave(turn)

    def most(self, job: Job) -> int:
        """Return how many tokens a job may get.

        The last token is generated but not read, so one more than the context holds is possible.
        """
        if job.beyond_context:
            return job.max_tokens
        return min(job.max_tokens, self.config.context_length + 1 - len(job.prompt))
