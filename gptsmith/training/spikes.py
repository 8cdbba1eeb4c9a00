"""Tell a spike of the loss or of the gradient norm from their usual noise.

A value is a spike if it is above each of the last WINDOW steps, and more than FAR spreads above
their median. The spread is the median absolute deviation, scaled to be the standard deviation of
normal noise; neither it nor the median is moved by a few wild values, as a mean would be. The norm
is judged by its logarithm, since its noise multiplies. Knows nothing of what a run does about a
spike (`loop.py`, `rollback.py`).
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

WINDOW = 128  # steps; as in OLMo 2 (2025), which skips steps by their mean and deviation
LEAST = 64  # steps to know before the first judgment
# Of 96 runs on texts and examples of this project, one left its course; of the others, only one,
# with batches of 32 tokens, had values beyond 10 spreads, and five beyond 8 (benchmarks/notes.md).
FAR = 10.0
NORMAL = 1.4826  # standard deviation over median absolute deviation, of normal noise
# Smaller spreads count as these: once a text is known by heart, any other batch would be a spike.
# So one has at least 0.5 nats, or 7.4 times the gradient norm, more than usual.
LEAST_SPREAD = {"loss": 0.05, "grad_norm": 0.2}  # nats; of the norm's natural logarithm
SHOWN = {"loss": "loss", "grad_norm": "gradient norm"}


class Recent:
    """The losses, in nats, and gradient norms of the last WINDOW steps that changed the weights."""

    def __init__(self, known: Mapping[str, Sequence[float]]) -> None:
        self.known = {name: deque(known.get(name, ()), maxlen=WINDOW) for name in LEAST_SPREAD}

    def add(self, loss: float, grad_norm: float) -> None:
        """Add the values of a step."""
        self.known["loss"].append(loss)
        self.known["grad_norm"].append(grad_norm)

    def spike(self, loss: float, grad_norm: float) -> str | None:
        """Return what is wrong with the values of a step, or None; they must be finite."""
        for name, value in {"loss": loss, "grad_norm": grad_norm}.items():
            known = self.known[name]
            if len(known) < LEAST or value <= max(known):
                continue
            middle, spreads = median(known), self.spreads_above(name, value)
            if spreads > FAR:
                return (
                    f"the {SHOWN[name]} {value:.4g} is {spreads:.0f} times the usual spread above "
                    f"{middle:.4g}, the median of the last {len(known)} steps"
                )
        return None

    def spreads_above(self, name: str, value: float) -> float:
        """Return by how many spreads a value is above the median."""
        known: Sequence[float] = [*self.known[name]]
        if name == "grad_norm":  # a norm of 0, of a batch without targets, has no logarithm
            known, value = [math.log(max(each, 1e-30)) for each in known], math.log(value)
        middle = median(known)
        spread = NORMAL * median(abs(each - middle) for each in known)
        return (value - middle) / max(spread, LEAST_SPREAD[name])

    def state(self) -> dict[str, list[float]]:
        """Return the values, as a checkpoint has them."""
        return {name: [*known] for name, known in self.known.items()}
