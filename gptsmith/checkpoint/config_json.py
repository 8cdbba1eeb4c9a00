"""Convert a model's configuration to Hugging Face's `config.json` and back, for GPT-2 and NanoChat.

A quantized model has the original's config.json with a section about the quantization. Knows
nothing of files or tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config.classifier import ClassifierConfig
from ..config.model import GPTConfig
from ..config.quantization import VOCABULARY_BITS, check_bits
from . import classifier

# Our name of an activation, and the names that config.json may use for it.
HUGGING_FACE_ACTIVATIONS = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "gelu_erf": ("gelu",),
}

# Our fields, theirs, and the defaults of theirs.
_GPT2 = {
    "vocab_size": ("vocab_size", 50257),
    "context_length": ("n_positions", 1024),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "n_inner": ("n_inner", None),
    "tie_weights": ("tie_word_embeddings", True),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
}
_NANOCHAT = {
    "vocab_size": ("vocab_size", 50304),
    "context_length": ("max_position_embeddings", 2048),
    "n_layer": ("num_hidden_layers", 12),
    "n_head": ("num_attention_heads", 6),
    "n_embd": ("hidden_size", 768),
    "tie_weights": ("tie_word_embeddings", False),
    "dropout": ("attention_dropout", 0.0),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")

# Fields of GPT2Config that change the mathematics, with the only values that we support.
_ORDINARY = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

# The same for NanoChatConfig. Its default caps the logits, which our model does not do.
_NANOCHAT_ORDINARY = {
    "hidden_act": "relu2",
    "attention_bias": False,
    "final_logit_softcapping": None,
}
_NANOCHAT_ROTATION = {"rope_type": "default", "rope_theta": 10000.0}
_NANOCHAT_DEFAULTS = {"final_logit_softcapping": 15.0}


def from_hugging_face(theirs: dict[str, Any]) -> GPTConfig:
    """Return the configuration in a Hugging Face `config.json`.

    ValueError unless it is a GPT-2, or a NanoChat with the options that we support.
    """
    if theirs.get("model_type") == "nanochat":
        return _from_nanochat(theirs)
    if theirs.get("model_type") != "gpt2":
        got = theirs.get("model_type", "nothing")
        raise ValueError(
            f"config.json says model_type {got!r}: only 'gpt2' and 'nanochat' are understood"
        )
    for key, ordinary in _ORDINARY.items():
        if theirs.get(key, ordinary) != ordinary:
            raise ValueError(f"config.json has {key} {theirs[key]!r}: only {ordinary!r} is GPT-2")
    name = theirs.get("activation_function", "gelu_new")
    activations = [a for a, known in HUGGING_FACE_ACTIVATIONS.items() if name in known]
    if not activations:
        known = [word for words in HUGGING_FACE_ACTIVATIONS.values() for word in words]
        raise ValueError(f"activation_function {name!r} is unknown: one of {known} is needed")
    rates = {key: theirs.get(key, 0.1) for key in _DROPOUTS}
    for key, rate in rates.items():
        if not isinstance(rate, int | float):
            raise ValueError(f"config.json has {key} {rate!r}: a number is needed")
    own = theirs.get("gptsmith", {})
    if not isinstance(own, dict):
        raise ValueError(f"config.json has gptsmith {own!r}: an object is needed")
    config = GPTConfig(
        **_ours(_GPT2, theirs),
        activation=activations[0],  # type: ignore[arg-type]
        bias=own.get("bias", True),
        qkv_bias=own.get("qkv_bias"),
        # We have one dropout rate for all three places, so take the largest.
        dropout=max(rates.values()),
    )
    return classifier.from_hugging_face(config, theirs)


def _ours(table: Mapping[str, tuple[str, Any]], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: theirs.get(name, default) for ours, (name, default) in table.items()}


def _theirs(table: Mapping[str, tuple[str, Any]], config: GPTConfig) -> dict[str, Any]:
    return {name: getattr(config, ours) for ours, (name, _) in table.items()}


def _from_nanochat(theirs: dict[str, Any]) -> GPTConfig:
    """Return the configuration in a NanoChat's `config.json`; defaults are NanoChatConfig's."""
    rotation = theirs.get("rope_parameters") or {}
    if not isinstance(rotation, dict):
        raise ValueError(f"config.json has rope_parameters {rotation!r}: an object is needed")
    found = _NANOCHAT_DEFAULTS | rotation | theirs
    for key, ordinary in (_NANOCHAT_ORDINARY | _NANOCHAT_ROTATION | {"rope_scaling": None}).items():
        if found.get(key, ordinary) != ordinary:
            raise ValueError(
                f"config.json has {key} {found[key]!r}: only {ordinary!r} is understood"
            )
    fields = _ours(_NANOCHAT, theirs)
    inner, keys = theirs.get("intermediate_size", 8192), theirs.get("num_key_value_heads")
    own_keys = None if keys == fields["n_head"] else keys
    config = GPTConfig(**fields, n_kv_head=own_keys, n_inner=inner, block="modern")
    if theirs.get("head_dim", config.head_size) != config.head_size:
        raise ValueError(
            f"config.json has head_dim {theirs['head_dim']!r}: only hidden_size over "
            f"num_attention_heads, {config.head_size}, is understood"
        )
    return replace(config, n_inner=None) if inner == 4 * config.n_embd else config


def to_hugging_face(config: GPTConfig) -> dict[str, Any]:
    """Return the `config.json` of GPT2LMHeadModel, with our own fields under "gptsmith".

    For a classifier it is that of GPT2ForSequenceClassification; for the modern block that of
    NanoChatForCausalLM, which needs no further fields.
    """
    if config.modern:
        return _to_nanochat(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **_theirs(_GPT2, config),
        "n_ctx": config.context_length,
        "activation_function": HUGGING_FACE_ACTIVATIONS[config.activation][0],
        **dict.fromkeys(_DROPOUTS, config.dropout),
        "initializer_range": 0.02,
        "use_cache": True,
        "gptsmith": {"bias": config.bias, "qkv_bias": config.has_qkv_bias},
        **(classifier.to_hugging_face(config) if isinstance(config, ClassifierConfig) else {}),
    }


def _to_nanochat(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        **_theirs(_NANOCHAT, config),
        "intermediate_size": config.mlp_size,
        "num_key_value_heads": config.kv_heads,
        **_NANOCHAT_ORDINARY,
        "rope_parameters": _NANOCHAT_ROTATION,
        "initializer_range": 0.02,
        "pad_token_id": None,  # NanoChatConfig's default is 1, which may be an ordinary token
        "use_cache": True,
    }


# -- quantized models

MODEL_TYPE = "gptsmith-quantized"  # unknown to other tools, so that none loads it as GPT-2
FORMAT = 1


def quantized_json(config: GPTConfig, bits: int) -> dict[str, Any]:
    """Return the config.json of a quantized model: the original's with another model type."""
    theirs = to_hugging_face(config)
    return {
        **theirs,
        "architectures": ["GptsmithQuantized"],
        "model_type": MODEL_TYPE,
        "quantization": {
            "format": FORMAT,
            "bits": bits,
            "vocabulary_bits": VOCABULARY_BITS,
            "model_type": theirs["model_type"],
        },
    }


def bits_in(theirs: Mapping[str, Any]) -> int | None:
    """Return the bits of a model, given its config.json; None if it is not quantized."""
    return None if theirs.get("model_type") != MODEL_TYPE else check_bits(_section(theirs)["bits"])


def original_json(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a quantized model's config.json with the original model type; any other unchanged."""
    if theirs.get("model_type") != MODEL_TYPE:
        return dict(theirs)
    return {**theirs, "model_type": _section(theirs)["model_type"]}


def _section(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json's section about the quantization; ValueError for an unknown format."""
    section = theirs.get("quantization")
    if not isinstance(section, dict) or not {"format", "bits", "model_type"} <= section.keys():
        raise ValueError(
            'config.json has no "quantization" with format, bits and model_type: it was edited'
        )
    if section["format"] != FORMAT:
        raise ValueError(
            f"the folder has quantization format {section['format']!r}, but this version of "
            f"gptsmith reads format {FORMAT}: quantize the original again, or update gptsmith"
        )
    if section.get("vocabulary_bits") != VOCABULARY_BITS:
        got = section.get("vocabulary_bits")
        raise ValueError(f"config.json has vocabulary_bits {got!r}: {VOCABULARY_BITS} is needed")
    return section
