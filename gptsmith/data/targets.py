"""Turn one example into rows of tokens and targets: what of it is learned, and what fits.

A target is the token that is wanted next, or -1 where nothing is learned. A conversation is one
row; a preference is two, chosen and rejected; of a labelled text, the only target is the number of
its label, at the last token. Knows nothing of files.

Shapes:  T tokens of a row
"""

from typing import NamedTuple

import numpy as np

from ..config.finetune import FinetuneSettings
from ..tokenizers import Tokenizer, with_special
from ..tokenizers.chat import FIXED_LENGTH, ChatTemplate, template_source, with_template
from ..tokenizers.tokenizer import END_OF_TEXT, Unknown
from .example_fields import Message
from .examples import Conversation, Example, Labelled, Preference

Row = tuple[np.ndarray, np.ndarray]  # tokens (T,), targets (T,), both int32
Piece = tuple[list[int], list[int]]  # ids, and for each itself if it is learned, else -1


class Parts(NamedTuple):
    """A conversation in three: all before its last answer, the answer, and what follows it."""

    prompt: Piece
    answer: Piece
    rest: Piece


def default_template(first: Conversation | Preference) -> str:
    """Return the name of the template for examples like this one."""
    if first.form != "prompt":
        return "alpaca"
    earlier = any(message["role"] == "assistant" for message in first.messages[:-1])
    return "plain" if earlier else "completion"


class Encoder:
    """Encodes examples of one task, and counts what was cut."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        first: Example,
        finetune: FinetuneSettings,
        *,
        context_length: int,
        unknown: Unknown = "error",
    ) -> None:
        """The first example chooses the template, where the settings leave the choice."""
        self.context_length, self.unknown = context_length, unknown
        self.source: str | None = None  # of the template
        self.template: ChatTemplate | None = None
        if not isinstance(first, Labelled):
            self.source = template_source(
                finetune.template, tokenizer, default=default_template(first)
            )
        # For the end of an answer, or for padding.
        if tokenizer.document_end is None and self.source != FIXED_LENGTH:
            tokenizer = with_special(tokenizer, [END_OF_TEXT])
        if self.source is not None:
            tokenizer = with_template(tokenizer, self.source)
            self.template = ChatTemplate(self.source, tokenizer, tokenizer.usage.tokenizer)
        self.tokenizer, self.form = tokenizer, first.form
        self.labels: dict[str, int] = {}  # numbered in the order in which they appear
        self.cut_prompts, self.cut_answers = 0, 0  # examples that lost some of them
        self.same_answers = 0  # preferences of two equal answers, which teach nothing

    def rows(self, example: Example) -> list[Row]:
        """Return the rows of an example; ValueError if it cannot be encoded or teaches nothing."""
        if isinstance(example, Labelled):
            return [self.labelled(example)]
        if isinstance(example, Conversation):
            return self.fitted([self.parts(example.messages)])
        answers = example.chosen, example.rejected
        self.same_answers += answers[0] == answers[1]
        return self.fitted([self.parts([*example.messages, each], last=True) for each in answers])

    def labelled(self, example: Labelled) -> Row:
        """Return the row of a text, which is cut at its end if it is too long."""
        ids = self.tokenizer.encode_array(example.text, unknown=self.unknown)
        if not len(ids):
            raise ValueError("its text has no token that is known")
        self.cut_prompts += len(ids) > self.context_length
        tokens = ids[: self.context_length].astype(np.int32)
        targets = np.full_like(tokens, -1)
        targets[-1] = self.labels.setdefault(example.label, len(self.labels))
        return tokens, targets

    def parts(self, messages: list[Message], *, last: bool = False) -> Parts:
        """Return a conversation in three parts; with `last`, only its last answer is learned."""
        assert self.template is not None
        segments = self.template.segments(messages, unknown=self.unknown)
        answers = [number for number, segment in enumerate(segments) if segment.learned]
        if not answers or len(segments[answers[-1]].ids) < 1 + self.template.ends:
            raise ValueError("its last answer is empty but for its end: there is nothing to learn")
        end = answers[-1]
        prompt: Piece = ([], [])
        for segment in segments[:end]:
            learned = segment.learned and not last
            prompt[0].extend(segment.ids)
            prompt[1].extend(segment.ids if learned else [-1] * len(segment.ids))
        rest = [id for segment in segments[end + 1 :] for id in segment.ids]
        answer = segments[end].ids
        return Parts(prompt, (answer, answer), (rest, [-1] * len(rest)))

    def fitted(self, all_parts: list[Parts]) -> list[Row]:
        """Return rows with one prompt, which is cut at its left so that the longest answer fits.

        An answer that would leave no token of the prompt is cut at its end instead, and its end is
        not learned.
        """
        room = self.context_length + 1  # the last id is a target only
        length = len(all_parts[0].prompt[0])
        longest = max(len(parts.answer[0]) for parts in all_parts)
        kept = min(length, max(1, room - longest))
        self.cut_prompts += kept < length
        self.cut_answers += kept + longest > room
        rows = []
        for prompt, answer, rest in all_parts:
            ids, wanted = (
                np.array([*prompt[n][length - kept :], *answer[n], *rest[n]][:room], np.int32)
                for n in (0, 1)
            )
            rows.append((ids[:-1], wanted[1:]))
        return rows
