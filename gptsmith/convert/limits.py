"""What a format cannot say of a model, and what would be lost in saying something near it.

Knows nothing of any format in particular.
"""

from ..config.model import GPTConfig


def only_gpt2_block(config: GPTConfig, whose: str) -> None:
    """ValueError for the modern block, where a format has GPT-2's alone."""
    if config.modern:
        raise ValueError(f"{whose} has GPT-2's block alone: the modern one cannot be written")


def only_usual_mlp(config: GPTConfig, whose: str) -> None:
    """ValueError where the MLP is not four times as wide as the residual stream."""
    if config.mlp_size != 4 * config.n_embd:
        wide = 4 * config.n_embd
        raise ValueError(f"{whose}'s MLP has {wide} channels (4 * n_embd), not {config.mlp_size}")


def losses(config: GPTConfig, nearest: GPTConfig) -> list[str]:
    """In words, where the nearest model of a format computes something else than the given one.

    A bias more costs nothing, since it is written as zeros, nor does a head of its own for a tied
    one; dropout is no part of what a trained model computes.
    """
    found = [
        f"{name} {getattr(config, name)} (it has {getattr(nearest, name)})"
        for name in ("activation", "norm_eps")
        if getattr(config, name) != getattr(nearest, name)
    ]
    if nearest.tie_weights and not config.tie_weights:
        found.append("a head of its own (it has the embedding)")
    for name in ("bias", "has_qkv_bias"):
        if getattr(config, name) and not getattr(nearest, name):
            found.append(f"{name} (it has none)")
    return found
