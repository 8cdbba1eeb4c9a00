"""The names that NanoChat, the published form of the modern block, has for our tensors.

Orientation is the same; query, key and value lie apart there and below one another here. Knows
nothing of tensors themselves or of files.
"""

from .config import GPTConfig

# ours                    theirs, from the first row down
WHOLE = {
    "wte.weight": ("model.embed_tokens.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
BLOCK = {
    "attn.c_attn.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.c_fc.weight": ("mlp.fc1.weight",),
    "mlp.c_proj.weight": ("mlp.fc2.weight",),
}
LAYERS = "model.layers."


def names(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    """Our name of every tensor, a tied head included, and theirs."""
    blocks = {
        f"h.{layer}.{ours}": tuple(f"{LAYERS}{layer}.{name}" for name in theirs)
        for layer in range(config.n_layer)
        for ours, theirs in BLOCK.items()
    }
    return {**WHOLE, **blocks}
