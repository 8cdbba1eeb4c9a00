"""A model's configuration as Hugging Face's `config.json` has it, and back: GPT-2's and NanoChat's.

A quantized model's is the original's with a section about it. Knows nothing of files or tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config.model import GPTConfig
from ..config.quantization import VOCABULARY_BITS, check_bits

# Our word for an activation, and the one a Hugging Face config.json uses for the same function.
HUGGING_FACE_ACTIVATIONS = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "gelu_erf": ("gelu",),
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


def from_hugging_face(theirs: dict[str, Any]) -> GPTConfig:
    """The model that a Hugging Face `config.json` describes.

    ValueError unless it is a GPT-2, or a NanoChat as we build it.
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
    rates = {key: theirs.get(key, 0.1) for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    for key, rate in rates.items():
        if not isinstance(rate, int | float):
            raise ValueError(f"config.json has {key} {rate!r}: a number is needed")
    own = theirs.get("gptsmith", {})
    if not isinstance(own, dict):
        raise ValueError(f"config.json has gptsmith {own!r}: an object is needed")
    return GPTConfig(
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


def _from_nanochat(theirs: dict[str, Any]) -> GPTConfig:
    """The modern block of a NanoChat's `config.json`; absent keys are NanoChatConfig's own."""
    rotation = theirs.get("rope_parameters") or {}
    if not isinstance(rotation, dict):
        raise ValueError(f"config.json has rope_parameters {rotation!r}: an object is needed")
    n_embd, n_head = theirs.get("hidden_size", 768), theirs.get("num_attention_heads", 6)
    found = _NANOCHAT_DEFAULTS | rotation | theirs
    for key, ours in _NANOCHAT_ORDINARY.items():
        if found.get(key, ours) != ours:
            raise ValueError(f"config.json has {key} {found[key]!r}: only {ours!r} is understood")
    inner, keys = theirs.get("intermediate_size", 8192), theirs.get("num_key_value_heads")
    config = GPTConfig(
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
        block="modern",
    )
    if theirs.get("head_dim", config.head_size) != config.head_size:
        raise ValueError(
            f"config.json has head_dim {theirs['head_dim']!r}: only hidden_size over "
            f"num_attention_heads, {config.head_size}, is understood"
        )
    return replace(config, n_inner=None) if inner == 4 * n_embd else config


def to_hugging_face(config: GPTConfig) -> dict[str, Any]:
    """The `config.json` of GPT2LMHeadModel, with what it cannot say under "gptsmith".

    Of the modern block, that of NanoChatForCausalLM, which can say all of it.
    """
    if config.modern:
        return _to_nanochat(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "activation_function": HUGGING_FACE_ACTIVATIONS[config.activation][0],
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_weights,
        "use_cache": True,
        "gptsmith": {"bias": config.bias, "qkv_bias": config.has_qkv_bias},
    }


def _to_nanochat(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "relu2",
        "attention_dropout": config.dropout,
        "attention_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "final_logit_softcapping": None,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_weights,
        "pad_token_id": None,  # NanoChatConfig's own is 1, which need not be padding
        "use_cache": True,
    }


# -- a quantized model's


MODEL_TYPE = "gptsmith-quantized"  # a name that nobody else takes for a model of theirs
FORMAT = 1


def quantized_json(config: GPTConfig, bits: int) -> dict[str, Any]:
    """The config.json of a quantized model: the original's, under a type of its own."""
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
    """The bits of the model that a config.json describes; None where it is not quantized."""
    return None if theirs.get("model_type") != MODEL_TYPE else check_bits(_section(theirs)["bits"])


def original_json(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model that a quantized one was made from; any other as it is."""
    if theirs.get("model_type") != MODEL_TYPE:
        return dict(theirs)
    return {**theirs, "model_type": _section(theirs)["model_type"]}


def _section(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the quantization, once this version is known to understand it."""
    section = theirs.get("quantization")
    if not isinstance(section, dict) or not {"format", "bits", "model_type"} <= section.keys():
        raise ValueError(
            'config.json has no "quantization" with format, bits and model_type: it was edited'
        )
    if section["format"] != FORMAT:
        raise ValueError(
            f"the folder is of quantized format {section['format']!r}, but this version of "
            f"gptsmith reads format {FORMAT}: quantize the original again, or update gptsmith"
        )
    if section.get("vocabulary_bits") != VOCABULARY_BITS:
        got = section.get("vocabulary_bits")
        raise ValueError(f"config.json has vocabulary_bits {got!r}: {VOCABULARY_BITS} is needed")
    return section
