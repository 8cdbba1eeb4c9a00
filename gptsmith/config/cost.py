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

# Logits that are computed at once: 128 MiB in float32. Smaller chunks of tokens spend more time on
# summing the head's gradient.
LOGITS_AT_ONCE = 1 << 25
# In a block of attention: the fastest of 64 to 1,024, at contexts of 256 and 1,024.
BLOCK_QUERIES = 128

# Fragmentation of glibc's heap by tensors of under 32 MiB, as a share of the activations: measured
# between 0.3 and 0.6, and with the fused pieces, which make fewer tensors, between 0.08 and 0.13.
HEAP_FRAGMENTATION, FUSED_FRAGMENTATION = 1 / 2, 1 / 8


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


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How a forward and backward pass is computed, as far as its memory depends on it."""

    dtype_bytes: int = FLOAT32  # of matrix products; 2 under bfloat16 autocast
    recompute: bool = False  # the activations of each block again in the backward pass
    fused: bool = False  # in C++ on a CPU (model/fused.py)
    # Attention's weights are kept (model/attention.py), as where dropout by seeds falls on them.
    blocks: bool = False


def plain_pass(config: GPTConfig) -> Pass:
    """Return how a pass is computed in float32 by PyTorch on a CPU."""
    return Pass(blocks=config.dropout > 0)


def loss_bytes(config: GPTConfig, micro_batch: int, how: Pass = Pass()) -> int:
    """Bytes of computing the loss of full contexts, a chunk of tokens at a time.

    A chunk has logits, their log-softmax and its gradient, both in float32; C++ computes in the
    place of the logits. The head's gradient is there too, and what a chunk adds to it. A
    classifier's have K rows in place of V.
    """
    tokens, V = micro_batch * config.context_length, config.head_rows
    chunk = min(tokens, max(1, LOGITS_AT_ONCE // V))
    logits = chunk * V * (how.dtype_bytes + (0 if how.fused else 2 * FLOAT32))
    return logits + V * config.n_embd * (FLOAT32 + how.dtype_bytes)


def activation_bytes(config: GPTConfig, micro_batch: int, how: Pass = Pass()) -> int:
    """Bytes of the activations of one micro-batch of full contexts, at the peak of a pass.

    Under autocast, the residual stream and the loss stay in float32, and each weight is copied.
    Kept for the backward pass are, in each block, the residual stream twice, the outputs of two
    norms, query, key, value and attention's output, the MLP before and after GELU; then
    `loss_bytes`. With `blocks`, attention's weights too, of each block of queries and the keys up
    to its end. Otherwise dropout adds a byte for each number that it falls on: seeds need nothing,
    but PyTorch's generator does. The modern block adds `_rotated_bytes`. With `recompute`, all
    blocks but one keep their input alone. A test holds the result within 10% of what PyTorch
    allocates in a pass as training makes it.
    """
    H, C, M, T = (sizes(config)[letter] for letter in "HCMP")
    width, tokens = how.dtype_bytes, micro_batch * config.context_length
    block = FLOAT32 * (2 * C + H + 4) + width * (6 * C + 2 * M)
    head, at_block = (FLOAT32 + width) * C, 0
    in_block = FLOAT32 * M  # for the backward pass of the last activation function
    if how.fused:  # all gradients of a block, those of its weights included
        in_block = FLOAT32 * 3 * C + width * (7 * C + M)
        at_block = FLOAT32 * block_count(config)
    if config.modern:
        block += _rotated_bytes(config, how)
        head += FLOAT32 * C  # before the norm that follows the embedding
        in_block = 3 * width * M
    if how.blocks and not how.fused:  # what is fused computes them again
        block += width * H * (T + min(T, BLOCK_QUERIES)) // 2
    elif config.dropout and not how.fused:
        block += 2 * C
        head += C
    copies = 0 if width == FLOAT32 else weight_bytes(config, width)
    kept, at_end = config.n_layer * block, copies
    if how.recompute:  # one block has its activations, and copies of its weights
        kept, in_block = config.n_layer * FLOAT32 * C, block + in_block
        at_end = copies and block_count(config) * width
    # A pass peaks at the loss or, where the vocabulary is small, in the last block's backward pass.
    head_gradient = FLOAT32 * config.head_rows * C
    backward = tokens * in_block + at_block + at_end + head_gradient
    last = max(loss_bytes(config, micro_batch, how) + copies, backward)
    return tokens * (kept + head) + last


def _rotated_bytes(config: GPTConfig, how: Pass) -> int:
    """Bytes per token and block that the modern attention keeps beyond GPT-2's.

    Queries and keys after rotation (in float32) and again after their norm, which adds a number per
    head. Grouped keys and values are repeated for attention, and c_attn's output is then freed.
    """
    heads, width = config.n_head + config.kv_heads, how.dtype_bytes
    rotated = heads * config.head_size
    repeated = -config.n_embd if config.kv_heads < config.n_head else 0
    normed = 0 if how.blocks else width * rotated  # blocks keep a scaled copy instead
    return FLOAT32 * (rotated + heads) + normed + width * repeated


def training_memory(
    config: GPTConfig, micro_batch: int, how: Pass = Pass(), *, learned: int | None = None
) -> int:
    """Bytes that a training step needs: weights, gradients, AdamW's state and activations.

    `micro_batch` is in full contexts; `learned` parameters (default: all) have gradients and state.
    This estimate serves to choose a micro-batch on a CPU: it adds a share of the activations for
    heap fragmentation, and leaves out PyTorch itself (about 0.3 GB). Without recomputation, it was
    between 0.90 and 1.16 times the peak of a process (benchmarks/notes.md).
    """
    activations = activation_bytes(config, micro_batch, how)
    share = FUSED_FRAGMENTATION if how.fused else HEAP_FRAGMENTATION
    fragmentation = int(share * (activations - loss_bytes(config, micro_batch, how)))
    learning = (parameter_count(config) if learned is None else learned) * FLOAT32
    # The gradients take as much as what learns, and AdamW's state twice that.
    return weight_bytes(config) + 3 * learning + activations + fragmentation


def memory(config: GPTConfig) -> dict[str, int]:
    """Return the float32 memory of training on a CPU, and of generation, in bytes."""
    weights, how = weight_bytes(config), plain_pass(config)
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,  # AdamW's running means of each gradient and of its square
        "activations_per_context": activation_bytes(config, 1, how),
        "training": training_memory(config, 1, how),
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
