"""What a GPT can be: the sizes and switches of one model, their checks, and the named presets.

Knows nothing of tensors, files or training, and imports only the standard library, so that a
question about a model (`gptsmith describe`) never waits for PyTorch.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from .fields import setting, suggestion

Activation = Literal["gelu_tanh", "gelu_erf", "relu2"]
Position = Literal["learned", "rotary"]
Norm = Literal["layer", "rms"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The whole description of one model; the defaults are OpenAI's GPT-2 of 124M parameters."""

    vocab_size: int = setting(50257, "number of different tokens")
    context_length: int = setting(1024, "most tokens that the model can look at, at once")
    n_layer: int = setting(12, "number of Transformer blocks")
    n_head: int = setting(12, "attention heads in each block; must divide n_embd")
    n_embd: int = setting(768, "channels of the residual stream")
    n_inner: int | None = setting(None, "channels inside the MLP (default: 4 * n_embd)")
    activation: Activation = setting(
        "gelu_tanh", "of the MLP: GPT-2's, nanoGPT's or the modern one"
    )
    position: Position = setting(
        "learned", "how tokens know their place: a table, or rotated heads"
    )
    norm: Norm = setting("layer", "LayerNorm, or RMS norm without weights")
    qk_norm: bool = setting(False, "norm of queries and keys, once rotated")
    n_kv_head: int | None = setting(
        None, "heads of keys and values; must divide n_head (default: n_head)"
    )
    bias: bool = setting(True, "biases in linear layers and norms (nanoGPT trains without)")
    qkv_bias: bool | None = setting(None, "bias of query, key and value (default: as bias)")
    tie_weights: bool = setting(True, "use the token embedding as the output head too")
    dropout: float = setting(
        0.0, "probability of dropping, 0 to 1: embeddings, attention, residuals"
    )
    norm_eps: float = setting(1e-5, "added to the variance inside norms")

    def __post_init__(self) -> None:
        may_be_none = ("n_inner", "n_kv_head")
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd", *may_be_none):
            value = getattr(self, name)
            if value is None and name in may_be_none:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}: a whole number of at least 1 is needed")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: "
                f"try n_embd {-(-self.n_embd // self.n_head) * self.n_head}"
            )
        choices = {"activation": Activation, "position": Position, "norm": Norm}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                known, got = ", ".join(get_args(choice)), getattr(self, name)
                raise ValueError(f"{name} is {got!r}: one of {known} is needed")
        for name in ("dropout", "norm_eps"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} is {getattr(self, name)!r}: a number is needed")
        for name in ("bias", "qkv_bias", "tie_weights", "qk_norm"):
            if not isinstance(getattr(self, name), bool) and getattr(self, name, None) is not None:
                raise ValueError(f"{name} is {getattr(self, name)!r}: true or false is needed")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: 0 <= dropout < 1 is needed")
        if not 0 < self.norm_eps < float("inf"):
            raise ValueError(f"norm_eps is {self.norm_eps}: a positive number is needed")
        self._check_block()

    def _check_block(self) -> None:
        """Raise ValueError for a block that is neither GPT-2's nor, in full, the modern one."""
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head is {self.n_kv_head}: a divisor of n_head {self.n_head}")
        has = {name: getattr(self, name) == value for name, value in MODERN.items()}
        # Either block may do without biases; fewer keys and values are the modern one's alone.
        chosen = [name for name, yes in has.items() if yes and name != "bias"]
        chosen += ["n_kv_head"] if self.kv_heads < self.n_head else []
        has["qkv_bias"] = not self.qkv_bias
        if chosen and not all(has.values()):
            wanted = MODERN | {"qkv_bias": False}
            missing = [f"{name} {wanted[name]}".lower() for name, yes in has.items() if not yes]
            raise ValueError(
                f"{', '.join(chosen)} as in NanoChat, but not all of it: "
                f"add {', '.join(missing)}, or leave it GPT-2's"
            )
        if self.modern and self.head_size % 2:
            raise ValueError(
                f"n_embd {self.n_embd} over n_head {self.n_head} is {self.head_size} channels per "
                "head: rotary positions turn them in pairs, so an even number is needed"
            )

    @property
    def modern(self) -> bool:
        """Whether the block is NanoChat's rather than GPT-2's."""
        return self.position == "rotary"

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
        return cls(**ours, activation="gelu_tanh", bias=True, tie_weights=False)

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

# What makes the modern block, all of it: NanoChat's, which transformers 5 reads.
MODERN: dict[str, Any] = {
    "position": "rotary",
    "norm": "rms",
    "activation": "relu2",
    "qk_norm": True,
    "bias": False,
}

PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "nanogpt": GPTConfig(bias=False, activation="gelu_erf"),
    "book": GPTConfig(qkv_bias=False, tie_weights=False, dropout=0.1),
    "modern": GPTConfig(**MODERN),
}


def preset(name: str) -> GPTConfig:
    """The preset of that name; ValueError with a suggestion where there is none."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"no preset '{name}'{suggestion(name, PRESETS)} (known: {known})")
    return PRESETS[name]
