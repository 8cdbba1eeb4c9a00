"""Gradients summed over the processes of a run while the backward pass still goes on.

The backward pass finishes the gradients of the last layers first. As soon as some megabytes of them
are there, a bucket, their sum begins in the background. Knows nothing of models or optimizers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..machine.processes import Pending, begin_sum

# A bucket ends with the gradient that fills it. Smaller ones take longer to send one by one; larger
# ones leave more for the last one, which nothing hides. PyTorch's DDP has 25 MiB as well, and 4 MiB
# were no faster (benchmarks/notes.md).
BUCKET_BYTES = 25 << 20


class GradientSums:
    """The sums of the gradients of parameters, of any shapes, over all processes.

    Every process sums the same buckets in the same order, whatever order its gradients are ready
    in, so that the result is always the same to the bit.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.buckets = in_buckets(parameters, BUCKET_BYTES)
        self.bucket_of = {p: n for n, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = list[int]()  # gradients of each bucket; empty unless in a last pass
        self.begun = list[Pending]()  # of the first buckets
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.note)

    def last_pass(self) -> None:
        """Say that the next backward pass is the last one that adds to the gradients."""
        self.missing = [len(bucket) for bucket in self.buckets]

    def note(self, parameter: Tensor) -> None:
        """Note that the gradient of a parameter is complete in this process, if it is."""
        if not self.missing:
            return
        self.missing[self.bucket_of[parameter]] -= 1
        while len(self.begun) < len(self.buckets) and not self.missing[len(self.begun)]:
            self.begin()

    def begin(self) -> None:
        """Begin to sum the next bucket; its gradients become parts of one tensor."""
        bucket = self.buckets[len(self.begun)]
        if len(bucket) == 1 and bucket[0].grad is not None:
            self.begun.append(begin_sum(bucket[0].grad))
            return
        # Without a gradient, a parameter is not updated; all processes agree about that, unless one
        # has run out of memory, and its numbers are not used.
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        together = torch.cat([part.flatten() for part in parts])  # (N,)
        for p, part in zip(bucket, together.split([p.numel() for p in bucket]), strict=True):
            p.grad = None if p.grad is None else part.view_as(p)
        self.begun.append(begin_sum(together))

    def finish(self) -> None:
        """Sum the buckets that have not begun, as those of a pass that failed; wait for all."""
        self.missing = []
        while len(self.begun) < len(self.buckets):
            self.begin()
        begun, self.begun = self.begun, []
        for pending in begun:
            pending.wait()


def in_buckets(parameters: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    """Divide parameters, of any shapes, into buckets of about `most` bytes, the last ones first."""
    buckets, held = list[list[Tensor]](), most
    for parameter in reversed(parameters):
        if held >= most:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += parameter.nbytes
    return buckets
