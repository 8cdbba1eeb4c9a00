"""What a GPT can be: the sizes and switches of one model, their checks, and the named presets.

Knows nothing of tensors, files or training, and imports only the standard library, so that a
question about a model (`gptsmith describe`) never waits for PyTorch.
"""

from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

Activation = Literal["gelu_tanh", "gelu_erf", "relu2"]
Position = Literal["learned", "rotary"]
Norm = Literal["layer", "rms"]

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

    @classmethod
    def from_hugging_face(cls, theirs: dict[str, Any]) -> "GPTConfig":
        """The model that a Hugging Face `config.json` describes.

        ValueError unless it is a GPT-2, or a NanoChat as we build it.
        """
        if theirs.get("model_type") == "nanochat":
            return cls._from_nanochat(theirs)
        if theirs.get("model_type") != "gpt2":
            got = theirs.get("model_type", "nothing")
            raise ValueError(
                f"config.json says model_type {got!r}: only 'gpt2' and 'nanochat' are understood"
            )
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

    @classmethod
    def _from_nanochat(cls, theirs: dict[str, Any]) -> "GPTConfig":
        """The modern block of a NanoChat's `config.json`; absent keys are NanoChatConfig's own."""
        rotation = theirs.get("rope_parameters") or {}
        if not isinstance(rotation, dict):
            raise ValueError(f"config.json has rope_parameters {rotation!r}: an object is needed")
        n_embd, n_head = theirs.get("hidden_size", 768), theirs.get("num_attention_heads", 6)
        found = _NANOCHAT_DEFAULTS | rotation | theirs
        for key, ours in _NANOCHAT_ORDINARY.items():
            if found.get(key, ours) != ours:
                raise ValueError(
                    f"config.json has {key} {found[key]!r}: only {ours!r} is understood"
                )
        inner, keys = theirs.get("intermediate_size", 8192), theirs.get("num_key_value_heads")
        config = cls(
            vocab_size=theirs.get("vocab_size", 50304),
            context_length=theirs.get("max_position_embeddings", 2048),
            n_layer=theirs.get("num_hidden_layers", 12),
            n_head=n_head,
            n_kv_head=None if keys == n_head else keys,
            n_embd=n_embd,
            n_inner=inner,
            tie_weights=theirs.get("tie_word_embeddings", False),
            dropout=theirs.get("attention_dropout", 0.0),
            norm_eps=theirs.get("rms_norm_eps", 1e-6),
            **MODERN,
        )
        if theirs.get("head_dim", config.head_size) != config.head_size:
            raise ValueError(
                f"config.json has head_dim {theirs['head_dim']!r}: only hidden_size over "
                f"num_attention_heads, {config.head_size}, is understood"
            )
        return replace(config, n_inner=None) if inner == 4 * n_embd else config

    def to_hugging_face(self) -> dict[str, Any]:
        """The `config.json` of GPT2LMHeadModel, with what it cannot say under "gptsmith".

        Of the modern block, that of NanoChatForCausalLM, which can say all of it.
        """
        if self.modern:
            return self._to_nanochat()
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

    def _to_nanochat(self) -> dict[str, Any]:
        return {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": "nanochat",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "hidden_size": self.n_embd,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "relu2",
            "attention_dropout": self.dropout,
            "attention_bias": False,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "final_logit_softcapping": None,
            "initializer_range": 0.02,
            "tie_word_embeddings": self.tie_weights,
            "pad_token_id": None,  # NanoChatConfig's own is 1, which need not be padding
            "use_cache": True,
        }


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

# Switches of GPT2Config that change the mathematics, with the value that is GPT-2.
_ORDINARY = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

# The same of NanoChatConfig; what it leaves unsaid caps the logits, which this model does not.
_NANOCHAT_ORDINARY = {
    "hidden_act": "relu2",
    "attention_bias": False,
    "final_logit_softcapping": None,
    "rope_type": "default",
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
_NANOCHAT_DEFAULTS = {"final_logit_softcapping": 15.0}

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
