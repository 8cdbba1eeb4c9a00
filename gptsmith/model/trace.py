"""Trace a forward pass: run it, and record the shapes at every step from tokens to logits.

Knows nothing of files or of trained weights: the weights are freshly initialized, and the tokens
random.

Shapes:  B batch        T tokens given         V vocabulary    M channels inside the MLP
         C channels     H heads                D channels per head
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.cost import Shape, parameter_count
from ..config.model import GPTConfig
from ..config.tables import columns, shape_text
from .classifier import new_model
from .gpt import GPT, attention

# The weights of a larger model would take gigabytes, so it runs on PyTorch's "meta" device, which
# executes the same code on shapes alone.
MOST_PARAMETERS = 500_000_000


@dataclass(frozen=True)
class TraceLine:
    """One step of the forward pass: a module or an operation, and its input and output shapes."""

    name: str  # of the module; that of an operation inside a module is indented
    does: str
    inputs: tuple[Shape, ...]
    output: Shape
    spread: float | None = None  # the output's standard deviation; None where it has no numbers

    def to_json(self) -> dict[str, Any]:
        """Return the line as plain values."""
        return {**asdict(self), "name": self.name.strip()}


def trace(config: GPTConfig, batch: int, tokens: int, *, seed: int = 0) -> Iterator[TraceLine]:
    """Run (batch, tokens) random tokens through a new model, and yield a line for each step.

    The first block is traced in full, and each other block as one line. PyTorch's random state is
    restored at the end.
    """
    device = "meta" if parameter_count(config) > MOST_PARAMETERS else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
        torch.manual_seed(seed)
        model = new_model(config).eval()
        ids = torch.randint(config.vocab_size, (batch, tokens))  # (B, T)
        recorder = _Recorder(model)
        model(ids)
    yield from recorder.lines


class _Recorder:
    """Adds a line for each module as it returns, and for each operation that is not a module."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.lines: list[TraceLine] = []
        block: Any = model.h[0]
        norm = "to mean square 1" if model.config.modern else "to mean 0, variance 1"
        self.after("wte", "a vector per token")
        if model.config.modern:
            self.after("ln_0", norm)
            self.after("h.0.attn.qk_norm", "q, k rotated, normalized")
        else:
            self.after("wpe", "a vector per position")
            model.drop.register_forward_hook(self.embedded)
        self.after("h.0.ln_1", norm)
        self.after("h.0.attn.c_attn", "query, key and value")
        block.attn.attend = self.attend
        block.attn.c_proj.register_forward_pre_hook(self.joined)
        self.after("h.0.attn.c_proj", "output projection")
        block.ln_2.register_forward_pre_hook(lambda module, inputs: self.added(inputs[0]))
        self.after("h.0.ln_2", norm)
        self.after("h.0.mlp.c_fc", "up-projection, C to M")
        self.after("h.0.mlp.activation", "activation function")
        self.after("h.0.mlp.c_proj", "down-projection, M to C")
        block.register_forward_hook(lambda module, inputs, output: self.added(output))
        for layer in range(1, model.config.n_layer):
            self.after(f"h.{layer}", "the same, other weights")
        self.after("ln_f", norm)
        scored = "next token" if model.config.head_rows == model.config.vocab_size else "label"
        self.after("lm_head", f"{scored}'s logits")

    def after(self, name: str, does: str) -> None:
        """Add a line whenever the module of this name returns."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.write(name, does, (inputs[0].shape,), output)

        self.model.get_submodule(name).register_forward_hook(hook)

    def write(self, name: str, does: str, inputs: Sequence[Sequence[int]], output: Tensor) -> None:
        """Add a line; `output` is a tensor of any shape."""
        spread = None if output.is_meta else output.std(correction=0).item()
        shapes = tuple(tuple(shape) for shape in inputs)
        self.lines.append(TraceLine(name, does, shapes, tuple(output.shape), spread))

    def embedded(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Add a line for the sum of the embeddings: (B, T, C) + (T, C) -> (B, T, C)."""
        token, position = self.lines[-2:]
        self.write("  wte + wpe", "add, then dropout", (token.output, position.output), output)

    def added(self, stream: Tensor) -> None:
        """Add a line for a branch that was added to the residual stream: both (B, T, C)."""
        branch = self.lines[-1].output
        self.write("  + residual", "added to the stream", (stream.shape, branch), stream)

    def joined(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add a line for the concatenation of the heads: (B, H, T, D) -> (B, T, C)."""
        heads = self.lines[-1].output
        self.write("  heads joined", "concatenate the heads", (heads,), inputs[0])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout: float,
        positions: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor:
        """Compute attention by its definition, and add its three lines.

        (B, H, T, D), (B, H, T, D), (B, H, T, D) -> (B, H, T, D)
        """
        result = attention(q, k, v, dropout, positions, seeds)
        scores = (*q.shape[:-1], k.shape[-2])
        c_attn = self.lines[-1].output
        self.lines += [
            TraceLine("  q, k, v", "split each into heads", (c_attn,), (*q.shape,)),
            TraceLine("  softmax", "of q k' / sqrt(D)", ((*q.shape,), (*k.shape,)), scores),
        ]
        self.write("  weights v", "weighted sum of values", (scores, v.shape), result)
        return result


def render(lines: Sequence[TraceLine]) -> str:
    """Return the lines as a table; its last column is the output's standard deviation, if known."""
    rows = [
        (
            f"  {line.name}",
            line.does,
            _inputs_text(line.inputs),
            shape_text(line.output),
            "" if line.spread is None else f"{line.spread:.2g}",
        )
        for line in lines
    ]
    (B, T), measured = lines[0].inputs[0], any(line.spread is not None for line in lines)
    note = "std is the output's standard deviation" if measured else "shapes only: a large model"
    heading = ("  ", "", "in", "out", "std" if measured else "")
    title = f"TRACE  {B} x {T} random tokens through new weights; {note}"
    return "\n".join([title, *columns([heading, *rows], "<<<<<")])


def _inputs_text(inputs: tuple[Shape, ...]) -> str:
    if len(inputs) > 1 and len(set(inputs)) == 1:
        return f"{len(inputs)} x {shape_text(inputs[0])}"
    return ", ".join(map(shape_text, inputs))
