"""A GPT-2 that scores labels: the head reads the last token of each text.

The same as GPT2ForSequenceClassification in Hugging Face's transformers, with PyTorch's attention,
whichever side of a batch is padded. Knows nothing of text or files.

Shapes:  B batch    T tokens of the longest text    C channels    K labels
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config.classifier import ClassifierConfig
from ..config.model import GPTConfig
from .gpt import GPT, Block


class Classifier(GPT):
    """A GPT-2 whose `lm_head` gives a score per label: `scores = model.scores(tokens)`.

    `model(tokens, targets)` and `loss` are GPT's: logits (B, T, K) of all tokens, and the loss of
    those that have a label as their target, as the last of each text has in training.
    """

    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, config.head_rows, bias=False)
        if config.init == "gpt2":
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, by their number."""
        return self.config.labels

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills rows up to the longest of a batch; None if no token does."""
        return self.config.pad_token_id

    @classmethod
    def of(cls, model: GPT, labels: Sequence[str], pad_token_id: int | None) -> "Classifier":
        """Return a classifier with a fresh head that shares all other weights with a model."""
        classifier = cls(ClassifierConfig.of(model.config, tuple(labels), pad_token_id))
        classifier.to(device=model.device, dtype=model.dtype)
        for name, module in model.named_children():
            if name != "lm_head":
                setattr(classifier, name, module)
        classifier.cross_entropy, classifier.lora = model.cross_entropy, model.lora
        return classifier.train(model.training)

    def scores(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Score the labels of each text, by its last token that is no padding.

        (B, T), (B, T) -> (B, K)

        The mask is 1 (or true) for a text's tokens and 0 for padding on its left or right; without
        one, all tokens are read. A text of padding tokens only is scored by its first token, and a
        text that the mask leaves nothing of by a token that attends to nothing. ValueError where
        the padding is unclear.
        """
        B, T = tokens.shape
        pad, columns = self.pad_token_id, torch.arange(T, device=tokens.device)
        if pad is None and B > 1:
            raise ValueError(f"{B} texts at once need a padding token, which this model lacks")
        first = tokens.new_zeros(B)  # column where each text begins
        if mask is not None:
            first = self.first_columns(tokens, mask.bool())
        no_padding = torch.ones_like(tokens) if pad is None else (tokens != pad).long()
        last = (columns * no_padding).argmax(1)  # (B,), 0 where all are padding
        # Texts move to the left edge, where causal attention cannot see the padding behind them;
        # their tokens keep the positions that they had.
        positions = (first[:, None] + columns).clamp(max=T - 1)  # (B, T)
        moved = bool(first.any())
        x = self.features(
            tokens.gather(1, positions) if moved else tokens, positions=positions if moved else None
        )
        x = x[torch.arange(B, device=x.device), (last - first).clamp(min=0)]  # (B, C)
        if (unread := last < first).any():
            x = torch.where(unread[:, None], self.features_of_nothing(), x)
        return self.lm_head(x)

    def first_columns(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return where each text begins, T for one that is all masked.  (B, T), (B, T) -> (B,)"""
        T = tokens.shape[1]
        first = torch.where(mask.any(1), mask.long().argmax(1), T)
        end = torch.where(mask.any(1), T - mask.flip(1).long().argmax(1), T)
        if (mask.sum(1) != end - first).any():
            raise ValueError("the mask has holes: padding can be left and right of a text only")
        if (pad := self.pad_token_id) is not None and (tokens[~mask] != pad).any():
            raise ValueError(f"the mask leaves out tokens other than the padding token, {pad}")
        return first

    def features_of_nothing(self) -> Tensor:
        """Return the features of an empty text, whose padding attends to nothing.  -> (1, C)

        transformers masks the padding token that stands for it, so that no value is gathered, and
        only the bias of attention's projection is added.
        """
        pad = self.pad_token_id
        if pad is None:
            raise ValueError("an empty text needs a padding token, which this model lacks")
        x = self.wte.weight[pad][None] + self.wpe.weight[:1]  # (1, C)
        for block in self.h:
            assert isinstance(block, Block)
            x = x + block.attn.c_proj(torch.zeros_like(x))
            x = x + block.mlp(block.ln_2(x))
        return self.ln_f(x)


def new_model(config: GPTConfig) -> GPT:
    """Return a fresh model: a classifier if the configuration is one's."""
    return Classifier(config) if isinstance(config, ClassifierConfig) else GPT(config)
