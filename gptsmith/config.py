"""What a GPT can be: the sizes and switches of one model, their checks, and the named presets.

Knows nothing of tensors, files or training, and imports only the standard library, so that a
question about a model (`gptsmith describe`) never waits for PyTorch.
"""

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args

Activation = Literal["gelu_tanh", "gelu_erf"]

# Our word for an activation, and the one a Hugging Face config.json uses for the same function.
HUGGING_FACE_ACTIVATIONS = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "gelu_erf": ("gelu",),
}


def setting(default: Any, help: str) -> Any:
    """A dataclass field whose `help` is one sentence, with its unit: also the text of `--help`."""
    return field(default=default, metadata={"help": help})


def suggestion(word: str, known: Any) -> str:
    """`, did you mean 'x'?` where a known word is close, else nothing; for the end of an error."""
    close = get_close_matches(word, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def at_least(settings: Any, least: float, *names: str) -> None:
    """Raise ValueError where one of the named settings is present and below `least`, or NaN."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value}: at least {least} is needed")


def within(settings: Any, name: str, low: float, high: float) -> None:
    """Raise ValueError unless low <= setting < high."""
    value = getattr(settings, name)
    if not low <= value < high:
        raise ValueError(f"{name} is {value}: {low} <= {name} < {high} is needed")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The whole description of one model; the defaults are OpenAI's GPT-2 of 124M parameters."""

    vocab_size: int = setting(50257, "number of different tokens")
    context_length: int = setting(1024, "most tokens that the model can look at, at once")
    n_layer: int = setting(12, "number of Transformer blocks")
    n_head: int = setting(12, "attention heads in each block; must divide n_embd")
    n_embd: int = setting(768, "channels of the residual stream")
    n_inner: int | None = setting(None, "channels inside the MLP (default: 4 * n_embd)")
    activation: Activation = setting("gelu_tanh", "GELU of the MLP: GPT-2's (tanh) or nanoGPT's")
    bias: bool = setting(True, "biases in linear layers and norms (nanoGPT trains without)")
    qkv_bias: bool | None = setting(None, "bias of query, key and value (default: as bias)")
    tie_weights: bool = setting(True, "use the token embedding as the output head too")
    dropout: float = setting(
        0.0, "probability of dropping, 0 to 1: embeddings, attention, residuals"
    )
    norm_eps: float = setting(1e-5, "added to the variance inside LayerNorm")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd", "n_inner"):
            value = getattr(self, name)
            if value is None and name == "n_inner":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}: a whole number of at least 1 is needed")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: "
                f"try n_embd {-(-self.n_embd // self.n_head) * self.n_head}"
            )
        if self.activation not in get_args(Activation):
            known = ", ".join(get_args(Activation))
            raise ValueError(f"activation is {self.activation!r}: one of {known} is needed")
        for name in ("dropout", "norm_eps"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} is {getattr(self, name)!r}: a number is needed")
        for name in ("bias", "qkv_bias", "tie_weights"):
            if not isinstance(getattr(self, name), bool) and getattr(self, name, None) is not None:
                raise ValueError(f"{name} is {getattr(self, name)!r}: true or false is needed")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: 0 <= dropout < 1 is needed")
        if not 0 < self.norm_eps < float("inf"):
            raise ValueError(f"norm_eps is {self.norm_eps}: a positive number is needed")

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
        names = {
            "vocab_size": "vocab_size",
            "context_length": "context_length",
            "emb_dim": "n_embd",
            "n_heads": "n_head",
            "n_layers": "n_layer",
            "drop_rate": "dropout",
            "qkv_bias": "qkv_bias",
        }
        for key in book:
            if key not in names:
                hint = suggestion(key, names)
                raise ValueError(f"'{key}' is not a key of the book's configuration{hint}")
        if missing := [key for key in names if key not in book]:
            raise ValueError(f"the book's configuration lacks {', '.join(missing)}")
        ours = {names[key]: value for key, value in book.items()}
        return cls(**ours, activation="gelu_tanh", bias=True, tie_weights=False)

    @classmethod
    def from_hugging_face(cls, theirs: dict[str, Any]) -> "GPTConfig":
        """The model that a Hugging Face `config.json` describes; ValueError if it is no GPT-2."""
        if theirs.get("model_type") != "gpt2":
            got = theirs.get("model_type", "nothing")
            raise ValueError(f"config.json says model_type {got!r}: only 'gpt2' is understood")
        for key, ordinary in _ORDINARY.items():
            if theirs.get(key, ordinary) != ordinary:
                raise ValueError(
                    f"config.json has {key} {theirs[key]!r}: only {ordinary!r} is GPT-2"
                )
        name = theirs.get("activation_function", "gelu_new")
        activations = [a for a, known in HUGGING_FACE_ACTIVATIONS.items() if name in known]
        if not activations:
            known = [word for words in HUGGING_FACE_ACTIVATIONS.values() for word in words]
            raise ValueError(f"activation_function {name!r} is unknown: one of {known} is needed")
        rates = {key: theirs.get(key, 0.1) for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
        for key, rate in rates.items():
            if not isinstance(rate, int | float):
                raise ValueError(f"config.json has {key} {rate!r}: a number is needed")
        own = theirs.get("gptsmith", {})
        if not isinstance(own, dict):
            raise ValueError(f"config.json has gptsmith {own!r}: an object is needed")
        return cls(
            vocab_size=theirs.get("vocab_size", 50257),
            context_length=theirs.get("n_positions", 1024),
            n_layer=theirs.get("n_layer", 12),
            n_head=theirs.get("n_head", 12),
            n_embd=theirs.get("n_embd", 768),
            n_inner=theirs.get("n_inner"),
            activation=activations[0],  # type: ignore[arg-type]
            bias=own.get("bias", True),
            qkv_bias=own.get("qkv_bias"),
            tie_weights=theirs.get("tie_word_embeddings", True),
            # One rate serves all three places here; of a foreign folder's three, the largest.
            dropout=max(rates.values()),
            norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The `config.json` of GPT2LMHeadModel, with what it cannot say under "gptsmith"."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_positions": self.context_length,
            "n_ctx": self.context_length,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_inner": self.n_inner,
            "activation_function": HUGGING_FACE_ACTIVATIONS[self.activation][0],
            "embd_pdrop": self.dropout,
            "attn_pdrop": self.dropout,
            "resid_pdrop": self.dropout,
            "layer_norm_epsilon": self.norm_eps,
            "initializer_range": 0.02,
            "tie_word_embeddings": self.tie_weights,
            "use_cache": True,
            "gptsmith": {"bias": self.bias, "qkv_bias": self.has_qkv_bias},
        }


# Switches of GPT2Config that change the mathematics, with the value that is GPT-2.
_ORDINARY = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "nanogpt": GPTConfig(bias=False, activation="gelu_erf"),
    "book": GPTConfig(qkv_bias=False, tie_weights=False, dropout=0.1),
}


def preset(name: str) -> GPTConfig:
    """The preset of that name; ValueError with a suggestion where there is none."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"no preset '{name}'{suggestion(name, PRESETS)} (known: {known})")
    return PRESETS[name]
