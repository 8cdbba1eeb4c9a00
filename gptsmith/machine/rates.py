"""How fast this machine computes whatever the model: matrix products, and copying memory.

What is fastest for a model is measured with that model (`chooser.py`).
"""

from collections.abc import Callable

import torch

from . import devices, environment
from .chooser import timed

SECONDS = 0.3  # of measuring one rate, at least
ROUNDS = 3  # at least
SIZE = {"cpu": 1024, "mps": 2048, "cuda": 8192}  # rows and columns of the matrices
COPIED = {"cpu": 2**26, "mps": 2**27, "cuda": 2**30}  # bytes, which no cache holds


def accelerators() -> list[str]:
    """Return a line for each GPU that PyTorch can use."""
    found = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        capability = f"compute capability {about.major}.{about.minor}"
        found.append(f"cuda:{number} {about.name}, {about.total_memory / 1e9:.0f} GB, {capability}")
    return found + ["mps"] * torch.backends.mps.is_available()


def product_rates(device: torch.device) -> dict[str, float]:
    """Return the FLOP/s of matrix products in each precision that can run on a device."""
    torch.set_num_threads(environment.cores())
    size, found = SIZE[device.type], dict[str, float]()
    for name in devices.precisions(device):
        matrix = torch.ones(size, size, device=device, dtype=devices.torch_dtype(name))
        found[name] = 2 * size**3 / fastest(matrix.matmul, matrix, device)
    return found


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second that are read and written when memory is copied."""
    numbers = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    return 2 * len(numbers) / fastest(torch.empty_like(numbers).copy_, numbers, device)


def fastest(
    work: Callable[[torch.Tensor], object], tensor: torch.Tensor, device: torch.device
) -> float:
    """Return the least seconds that work on a tensor (of any shape) took, after a warm-up."""

    def done() -> None:
        work(tensor)
        devices.synchronize(device)

    done()
    times = [timed(done)]
    while len(times) < ROUNDS or sum(times) < SECONDS:
        times.append(timed(done))
    return min(times)
