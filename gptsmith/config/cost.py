"""The cost of a GPTConfig: parameters, memory and FLOPs, component by component.

Knows nothing of PyTorch, machines or runs; tests compare it with the real model.

Letters:  V vocabulary    P positions (context_length)    C channels    M channels inside the MLP
          L blocks        H heads                         T tokens given, at most P
          D channels per head                             G heads of keys and values
          K labels of a classifier
"""

from dataclasses import dataclass, replace
from math import prod

from .classifier import ClassifierConfig
from .model import GPTConfig

Shape = tuple[int, ...]

FLOAT32 = 4  # bytes; weights, gradients and AdamW's state are always in float32

# Fragmentation of glibc's heap by tensors of under 32 MiB, as a share of the activations: measured
# between 0.3 and 0.6.
HEAP_FRAGMENTATION = 1 / 2


@dataclass(frozen=True)
class Component:
    """One weight or bias, named as in the model's state dict; matrices are (out, in)."""

    name: str
    shape: Shape
    formula: str  # the size, in the letters above: "3 * C * C"
    tied: bool = False  # the same tensor as wte.weight, so nothing more to store
    absent: bool = False  # what this configuration does without: biases, or norms' weights

    @property
    def count(self) -> int:
        """Parameters that it adds to the model: none where it is tied or absent."""
        return 0 if self.tied or self.absent else prod(self.shape)


def sizes(config: GPTConfig) -> dict[str, int]:
    """The letters of the formulas and their values: {"V": 50257, "P": 1024, ...}."""
    labels = {"K": config.head_rows} if isinstance(config, ClassifierConfig) else {}
    return {
        "V": config.vocab_size,
        "P": config.context_length,
        "L": config.n_layer,
        "H": config.n_head,
        "G": config.kv_heads,
        "D": config.head_size,
        "C": config.n_embd,
        "M": config.mlp_size,
        **labels,
    }


def head_letter(config: GPTConfig) -> str:
    """Return the letter for the rows of the head: V, or K for a classifier's."""
    return "K" if isinstance(config, ClassifierConfig) else "V"


# ---- Parameters ----------------------------------------------------------------------------------


def block_components(config: GPTConfig) -> list[Component]:
    """The weights and biases of one block, absent ones included; names as in `h.0`."""
    C, M, rows = config.n_embd, config.mlp_size, sum(config.attention_rows)
    no_gain, no_bias, no_qkv_bias = config.modern, not config.bias, not config.has_qkv_bias
    qkv = "3 * C" if rows == 3 * C else "(C + 2 * G * D)"
    return [
        Component("ln_1.weight", (C,), "C", absent=no_gain),
        Component("ln_1.bias", (C,), "C", absent=no_bias),
        Component("attn.c_attn.weight", (rows, C), f"{qkv} * C"),
        Component("attn.c_attn.bias", (rows,), qkv, absent=no_qkv_bias),
        Component("attn.c_proj.weight", (C, C), "C * C"),
        Component("attn.c_proj.bias", (C,), "C", absent=no_bias),
        Component("ln_2.weight", (C,), "C", absent=no_gain),
        Component("ln_2.bias", (C,), "C", absent=no_bias),
        Component("mlp.c_fc.weight", (M, C), "M * C"),
        Component("mlp.c_fc.bias", (M,), "M", absent=no_bias),
        Component("mlp.c_proj.weight", (C, M), "C * M"),
        Component("mlp.c_proj.bias", (C,), "C", absent=no_bias),
    ]


def components(config: GPTConfig) -> list[Component]:
    """Every weight and bias of the model, in its own order, tied and absent ones included."""
    V, P, C = config.vocab_size, config.context_length, config.n_embd
    blocks = [
        replace(part, name=f"h.{layer}.{part.name}")
        for layer in range(config.n_layer)
        for part in block_components(config)
    ]
    return [
        Component("wte.weight", (V, C), "V * C"),
        Component("wpe.weight", (P, C), "P * C", absent=config.modern),
        *blocks,
        Component("ln_f.weight", (C,), "C", absent=config.modern),
        Component("ln_f.bias", (C,), "C", absent=not config.bias),
        Component(
            "lm_head.weight",
            (config.head_rows, C),
            f"{head_letter(config)} * C",
            tied=config.tie_weights,
        ),
    ]


def block_count(config: GPTConfig) -> int:
    """Return the number of parameters of one block."""
    return sum(part.count for part in block_components(config))


def parameter_count(config: GPTConfig) -> int:
    """Return the number of parameters; tied embedding and head count once."""
    return sum(part.count for part in components(config))


# ---- Memory --------------------------------------------------------------------------------------


def weight_bytes(config: GPTConfig, dtype_bytes: int = FLOAT32) -> int:
    """Bytes of the weights; the gradients take as many."""
    return parameter_count(config) * dtype_bytes


def kv_cache_bytes(config: GPTConfig, tokens: int, dtype_bytes: int = FLOAT32) -> int:
    """Bytes of the keys and values of some tokens: 2 * L * G * D numbers for each token."""
    return 2 * config.n_layer * config.kv_heads * config.head_size * tokens * dtype_bytes


def loss_bytes(config: GPTConfig, micro_batch: int) -> int:
    """Bytes of three float32 (B, T, V): the log-softmax, its gradient, and the logits' gradient.

    A classifier's have K in place of V.
    """
    return 3 * FLOAT32 * micro_batch * config.context_length * config.head_rows


def activation_bytes(
    config: GPTConfig, micro_batch: int, *, dtype_bytes: int = FLOAT32, recompute: bool = False
) -> int:
    """Bytes of the activations of one micro-batch of full contexts when the backward pass begins.

    `dtype_bytes` is 2 under bfloat16 autocast: the residual stream and the loss stay in float32,
    and each weight is copied. PyTorch keeps for the backward pass: in each block the residual
    stream twice, the outputs of two norms, query, key, value and attention's output (no T x T), the
    MLP before and after GELU; then `loss_bytes`. Dropout adds its masks and, on a CPU, the T x T
    attention weights three times, since the fused kernel there has no dropout. The modern block
    adds `_rotated_bytes`. With `recompute`, all blocks but one keep their input alone. A test holds
    the result within 10% of what PyTorch allocates.
    """
    H, C, M, T = (sizes(config)[letter] for letter in "HCMP")
    block = FLOAT32 * (2 * C + H + 4) + dtype_bytes * (6 * C + 2 * M)
    head = (FLOAT32 + dtype_bytes) * C
    activation = FLOAT32 * M  # for the backward pass of the last activation function
    if config.modern:
        block += _rotated_bytes(config, dtype_bytes)
        head += FLOAT32 * C  # before the norm that follows the embedding
        activation = 3 * dtype_bytes * M
    if config.dropout:
        block += dtype_bytes * 2 * C + FLOAT32 * 3 * H * T + (FLOAT32 - dtype_bytes) * 3 * C
        head += FLOAT32 * C
    copies = 0 if dtype_bytes == FLOAT32 else weight_bytes(config, dtype_bytes)
    kept, in_block, at_block = config.n_layer * block, activation, copies
    if recompute:  # one block has its activations, and copies of its weights
        kept, in_block = config.n_layer * FLOAT32 * C, block + activation
        at_block = copies and block_count(config) * dtype_bytes
    # The backward pass peaks at the loss or, where the vocabulary is small, in the last MLP.
    last = max(loss_bytes(config, micro_batch) + copies, micro_batch * T * in_block + at_block)
    return micro_batch * T * (kept + head) + last


def _rotated_bytes(config: GPTConfig, dtype_bytes: int) -> int:
    """Bytes per token and block that the modern attention keeps beyond GPT-2's.

    Queries and keys after rotation (in float32) and again after their norm, which adds a number per
    head. Grouped keys and values are repeated for attention, and c_attn's output is then freed.
    """
    heads = config.n_head + config.kv_heads
    rotated = heads * config.head_size
    repeated = -config.n_embd if config.kv_heads < config.n_head else 0
    normed = 0 if config.dropout else dtype_bytes * rotated  # dropout keeps a scaled copy instead
    return FLOAT32 * (rotated + heads) + normed + dtype_bytes * repeated


def training_memory(
    config: GPTConfig,
    micro_batch: int,
    *,
    dtype_bytes: int = FLOAT32,
    learned: int | None = None,
    recompute: bool = False,
) -> int:
    """Bytes that a training step needs: weights, gradients, AdamW's state and activations.

    `micro_batch` is in full contexts; `dtype_bytes` is 2 under bfloat16 autocast; `learned`
    parameters (default: all) have gradients and state; with `recompute`, activations are computed
    again in the backward pass. This estimate serves to choose a micro-batch on a CPU: it adds half
    of the blocks' activations for heap fragmentation, and leaves out PyTorch itself (about 0.3 GB).
    In eleven measurements of 0.05 to 3 GB (Linux, PyTorch 2.13, float32 and bfloat16, with and
    without dropout, all without recomputation) it was 0.91 to 1.05 times the process's peak, so
    leave a fifth free.
    """
    activations = activation_bytes(
        config, micro_batch, dtype_bytes=dtype_bytes, recompute=recompute
    )
    fragmentation = int(HEAP_FRAGMENTATION * (activations - loss_bytes(config, micro_batch)))
    learning = (parameter_count(config) if learned is None else learned) * FLOAT32
    # The gradients take as much as what learns, and AdamW's state twice that.
    return weight_bytes(config) + 3 * learning + activations + fragmentation


def memory(config: GPTConfig) -> dict[str, int]:
    """Return the float32 memory of training and generation, in bytes."""
    weights = weight_bytes(config)
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,  # AdamW's running means of each gradient and of its square
        "activations_per_context": activation_bytes(config, 1),
        "training": training_memory(config, 1),
        "kv_cache_per_token": kv_cache_bytes(config, 1),
        "kv_cache_per_context": kv_cache_bytes(config, config.context_length),
    }


# ---- Arithmetic ----------------------------------------------------------------------------------


def multiplied_parameters(config: GPTConfig) -> int:
    """Return N of the FLOP formula: L * (4 * C * C + 2 * C * M) + V * C.

    These are the parameters that each token is multiplied by: all matrices of the blocks and the
    head, tied or not, which is K * C in a classifier. Embeddings are only looked up, and biases,
    norms and rotations are negligible. With grouped-query attention, 2 * C * G * D replaces 2 of
    the 4 * C * C.
    """
    L, C, M = (sizes(config)[letter] for letter in "LCM")
    attention = C * sum(config.attention_rows) + C * C
    return L * (attention + 2 * C * M) + config.head_rows * C


def flops_per_token(config: GPTConfig, *, training: bool) -> float:
    """Floating-point operations per token at the full context: 2 * N + 4 * L * C * T forward.

    A multiplication and an addition for each of the N parameters; for each block and each of T
    tokens, C of both for the attention score and C for the weighted value. As is usual, the half
    that causality lets a kernel skip is counted. The backward pass costs twice the forward pass, so
    training is 6 * N + 12 * L * C * T.
    """
    attention = 4 * config.n_layer * config.n_embd * config.context_length
    forward = 2 * multiplied_parameters(config) + attention
    return float(3 * forward if training else forward)
