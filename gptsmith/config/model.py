"""What a GPT can be: the sizes and switches of one model, their checks, and the named presets.

Knows nothing of tensors, files or training, and imports only the standard library, so that a
question about a model (`gptsmith describe`) never waits for PyTorch.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from .fields import SettingError, setting, suggestion

Activation = Literal["gelu_tanh", "gelu_erf", "relu2"]
BlockKind = Literal["gpt2", "modern"]
Init = Literal["gpt2", "book"]

SIZES = ("vocab_size", "context_length", "n_layer", "n_head", "n_embd", "n_inner", "n_kv_head")
DEFAULTED = ("n_inner", "n_kv_head", "activation", "bias", "qkv_bias")  # may be None

# What the modern block is, also for `dataclasses.replace` on a GPT-2's configuration.
MODERN: dict[str, Any] = {"block": "modern", "activation": "relu2", "bias": False}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The whole description of one model; the defaults are OpenAI's GPT-2 of 124M parameters.

    Two that differ in `init` alone are equal: it says how fresh weights are drawn, and is no part
    of the architecture.
    """

    vocab_size: int = setting(50257, "number of different tokens")
    context_length: int = setting(1024, "most tokens that the model can attend to at once")
    n_layer: int = setting(12, "number of Transformer blocks")
    n_head: int = setting(12, "attention heads in each block; must divide n_embd")
    n_embd: int = setting(768, "channels of the residual stream; a multiple of n_head")
    n_inner: int | None = setting(None, "channels inside the MLP (default: 4 * n_embd)")
    block: BlockKind = setting(
        "gpt2",
        "GPT-2's Transformer block, or NanoChat's: rotary positions, RMSNorm without weights, "
        "normalized queries and keys, squared ReLU, no biases",
    )
    # None stands for the block's own, and is replaced by it when the configuration is made.
    activation: Activation = setting(
        None, "activation function of the MLP (default: gelu_tanh, or relu2 in the modern block)"
    )
    n_kv_head: int | None = setting(
        None, "key and value heads of the modern block; must divide n_head (default: as n_head)"
    )
    bias: bool = setting(
        None, "biases in linear layers and norms (default: yes, but not in the modern block)"
    )
    qkv_bias: bool | None = setting(None, "bias of query, key and value (default: as bias)")
    tie_weights: bool = setting(True, "use the token embedding as the output head too")
    dropout: float = setting(
        0.0, "dropout probability, 0 to 1, of embeddings, attention weights and residual branches"
    )
    norm_eps: float = setting(1e-5, "added to the variance inside norms")
    init: Init = setting(
        "gpt2",
        "initialization of fresh weights: GPT-2's, or PyTorch's defaults in the order of the "
        "book's code",
        compare=False,
    )

    def __post_init__(self) -> None:
        choices = {"block": BlockKind, "activation": Activation, "init": Init}
        for name in (field.name for field in fields(GPTConfig)):
            value = getattr(self, name)
            if name in SIZES:
                fine, wanted = type(value) is int and value >= 1, "a whole number of at least 1"
            elif name in choices:
                known = get_args(choices[name])
                fine, wanted = value in known, f"one of {', '.join(known)}"
            elif name in ("dropout", "norm_eps"):
                fine, wanted = isinstance(value, int | float), "a number"
            else:
                fine, wanted = isinstance(value, bool), "true or false"
            if not fine and not (value is None and name in DEFAULTED):
                raise SettingError(name, f"is {value!r}: {wanted} is needed")
        if not 0 <= self.dropout < 1:
            raise SettingError("dropout", f"is {self.dropout}: 0 <= dropout < 1 is needed")
        if not 0 < self.norm_eps < float("inf"):
            raise SettingError("norm_eps", f"is {self.norm_eps}: a positive number is needed")
        self._check_heads()
        self._complete_block()

    def _check_heads(self) -> None:
        """Raise ValueError for heads that do not divide the channels, or one another."""
        if self.n_embd % self.n_head:
            step = self.n_head * (2 if self.modern else 1)
            raise SettingError(
                "n_embd",
                f"{self.n_embd} is not a multiple of n_head {self.n_head}: "
                f"try n_embd {-(-self.n_embd // step) * step}",
            )
        if self.n_head % self.kv_heads:
            raise SettingError("n_kv_head", f"{self.n_kv_head} must divide n_head {self.n_head}")
        if self.modern and self.head_size % 2:
            raise SettingError(
                "n_embd",
                f"{self.n_embd} / n_head {self.n_head} gives {self.head_size} channels per "
                "head: rotary positions rotate them in pairs, so an even number is needed",
            )

    def _complete_block(self) -> None:
        """Fill in what the block decides; ValueError for what it cannot have."""
        own = MODERN if self.modern else {"activation": "gelu_tanh", "bias": True}
        for name, value in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.modern:
            if self.activation != "relu2":
                raise SettingError(
                    "activation", f"is {self.activation}: the modern block has relu2"
                )
            if self.bias or self.qkv_bias:
                raise ValueError("the modern block has no biases: bias and qkv_bias must be false")
            if self.init == "book":
                raise SettingError("init", "is book, which is for block gpt2: leave it out")
        elif self.activation == "relu2":
            raise SettingError(
                "activation", "is relu2, which is the modern block's: add block modern"
            )
        elif self.kv_heads < self.n_head:
            raise SettingError(
                "n_kv_head",
                f"{self.n_kv_head} is below n_head {self.n_head}, which only the modern "
                "block can have: add block modern",
            )

    @property
    def modern(self) -> bool:
        """Whether the block is NanoChat's rather than GPT-2's."""
        return self.block == "modern"

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, G: as many as of queries unless `n_kv_head` says otherwise."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def attention_rows(self) -> tuple[int, int, int]:
        """Rows of query, key and value in `attn.c_attn`, where they lie below one another."""
        keys = self.kv_heads * self.head_size
        return self.n_embd, keys, keys

    @property
    def head_rows(self) -> int:
        """Rows of the output head: one for each token."""
        return self.vocab_size

    @property
    def head_size(self) -> int:
        """Channels per head, D."""
        return self.n_embd // self.n_head

    @property
    def mlp_size(self) -> int:
        """Channels inside the MLP: 4 * n_embd unless `n_inner` says otherwise."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def has_qkv_bias(self) -> bool:
        """Whether `attn.c_attn` has a bias: as the other linear layers unless `qkv_bias` says."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @classmethod
    def from_book(cls, book: dict[str, Any]) -> "GPTConfig":
        """The model of the configuration dictionary in "Build a Large Language Model".

        Its GPTModel has biases everywhere but in query, key and value (`qkv_bias` adds those), the
        tanh GELU, and an output head of its own, without bias.
        """
        for key in book:
            if key not in BOOK:
                hint = suggestion(key, BOOK)
                raise ValueError(f"'{key}' is not a key of the book's configuration{hint}")
        if missing := [key for key in BOOK if key not in book]:
            raise ValueError(f"the book's configuration lacks {', '.join(missing)}")
        ours = {BOOK[key]: value for key, value in book.items()}
        return cls(**ours, activation="gelu_tanh", bias=True, tie_weights=False, init="book")

    def to_book(self) -> dict[str, Any]:
        """The configuration dictionary of the GPTModel with these sizes."""
        found = {key: getattr(self, ours) for key, ours in BOOK.items()}
        return found | {"qkv_bias": self.has_qkv_bias}


# The keys of the book's configuration dictionary, and our fields.
BOOK = {
    "vocab_size": "vocab_size",
    "context_length": "context_length",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "drop_rate": "dropout",
    "qkv_bias": "qkv_bias",
}

# Switches that `block` took the place of: the value that GPT-2's block has, and the modern one's.
FORMER_SWITCHES = {
    "position": ("learned", "rotary"),
    "norm": ("layer", "rms"),
    "qk_norm": (False, True),
}

PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "nanogpt": GPTConfig(bias=False, activation="gelu_erf"),
    "book": GPTConfig(qkv_bias=False, tie_weights=False, dropout=0.1, init="book"),
    "modern": GPTConfig(block="modern"),
}


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model by today's names, where some are from before there was `block`.

    A warning names the new setting. ValueError for a block that is neither of the two.
    """
    former = {name: values[name] for name in FORMER_SWITCHES if name in values}
    if not former:
        return dict(values)
    for name, value in former.items():
        if value not in FORMER_SWITCHES[name] or type(value) is not type(FORMER_SWITCHES[name][0]):
            known = ", ".join(map(str, FORMER_SWITCHES[name])).lower()
            raise SettingError(name, f"is {value!r}: one of {known} is needed")
    modern = [name for name, value in former.items() if value == FORMER_SWITCHES[name][1]]
    if modern and len(modern) < len(FORMER_SWITCHES):
        raise ValueError(
            "the modern block needs all of: position rotary, norm rms, qk_norm, activation relu2, "
            "no biases (use block modern, or preset modern)"
        )
    block = "modern" if modern else "gpt2"
    warnings.warn(f"{', '.join(former)}: now one setting, block {block}", stacklevel=2)
    return {"block": block} | {n: v for n, v in values.items() if n not in former}
