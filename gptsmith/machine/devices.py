"""Device, precision and threads: what this machine has, and what can run on it.

What is fastest among it is measured elsewhere, with `chooser.py`.
"""

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..config.fields import SettingError
from ..config.settings import Dtype, MachineSettings
from . import environment
from .dtypes import NUMBER_FORMATS, bits_of

HOPPER = (9, 0)  # the first CUDA compute capability with fast float8 matrix products

# Peak dense bf16 FLOP/s by torch.cuda.get_device_name, from the vendor's data sheets, for MFU. A
# device that is not listed has no MFU rather than a wrong one.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" takes CUDA, else MPS, else the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", environment.local_rank() % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise SettingError("device", f"is '{name}': auto, cpu, cuda, cuda:N or mps is needed")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SettingError("device", "is 'cuda', but PyTorch finds no CUDA GPU: try cpu")
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise SettingError(
                "device", f"is '{name}', but there are {count} GPUs, numbered from 0"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingError("device", "is 'mps', but PyTorch finds no MPS device: try cpu")
    return device


def find_dtype(name: Dtype, device: torch.device) -> Dtype:
    """Return the precision of a name, which must be possible on the device.

    "auto" is the last of `precisions`: that of the activations beside packed weights.
    """
    if name == "fp16" and device.type != "cuda":
        raise SettingError(
            "dtype", f"is fp16, which needs CUDA: on {device.type} take bf16 or float32"
        )
    if name == "fp8" and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER
    ):
        raise SettingError("dtype", "is fp8, which needs a Hopper GPU or newer: take bf16")
    return precisions(device)[-1] if name == "auto" else name


def precisions(device: torch.device) -> list[Dtype]:
    """Return the precisions that can run on a device, the most exact first.

    This does not say which is faster. On a CPU, oneDNN must know how to multiply bf16; GPUs before
    Ampere have fp16 instead.
    """
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["float32", "bf16" if bf16 else "fp16"]
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ["float32", "bf16"]
    return ["float32"]


def choose(settings: MachineSettings) -> MachineSettings:
    """Return the settings for using a model, checked, with every automatic choice made.

    Nothing is measured here.
    """
    settings = checked(settings)
    device = find_device(settings.device)
    dtype: Any = find_dtype(settings.dtype, device)  # also int8 or int4
    attention = settings.attention
    if attention == "auto":  # on CPUs, PyTorch's kernel is slow in bf16
        activations = find_dtype("auto", device) if bits_of(dtype) else dtype
        attention = "blocks" if (device.type, activations) == ("cpu", "bf16") else "kernel"
    return replace(settings, dtype=dtype, attention=attention)


def choose_to_learn(settings: MachineSettings) -> MachineSettings:
    """Return the settings for training, checked, with the device and the threads chosen.

    What else is automatic depends on the model, and is measured (`training/choices.py`).
    """
    if bits_of(settings.dtype):
        raise SettingError(
            "dtype",
            f"is {settings.dtype}, which is for inference: train in another precision, then "
            "`gptsmith quantize` the result",
        )
    return checked(settings)


def checked(settings: MachineSettings) -> MachineSettings:
    """Return the settings with the device and the threads chosen; SettingError if impossible."""
    device = find_device(settings.device)
    if settings.compile == "max-autotune" and device.type != "cuda":
        raise SettingError(
            "compile", f"is max-autotune, which is for CUDA: on {device.type} take yes"
        )
    find_dtype(settings.dtype, device)
    return replace(
        settings,
        # Without a GPU number, since other ranks and resumed runs may use another GPU.
        device=device.type if settings.device == "auto" else settings.device,
        threads=environment.checked_threads("threads", settings.threads),
    )


def prepare_machine(settings: MachineSettings) -> torch.device:
    """Set PyTorch's process-wide options as the settings say; return the device."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = find_device("auto" if settings.device == "cuda" else settings.device)
    if device.type == "cpu":
        environment.keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if settings.deterministic:
        environment.allow_deterministic_cuda()
    if settings.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(settings.deterministic)  # takes a second of imports
    return device


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the device's random numbers; torch.manual_seed seeds all devices, which is slow."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """Return the autocast context for matrix products in `dtype`; none for "float32"."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch_dtype(dtype))


def torch_dtype(dtype: str) -> torch.dtype:
    """PyTorch's type of the elements of a tensor in this (chosen) number format."""
    return getattr(torch, NUMBER_FORMATS[dtype].torch)


def weight_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a model's weights for inference in a precision other than auto.

    For packed weights, it is the dtype of the activations: the fast one of the device.
    """
    if dtype == "fp8":
        raise SettingError("dtype", "is fp8, which is only for training: take bf16")
    return torch_dtype(find_dtype("auto", device) if bits_of(dtype) else dtype)


def loading(dtype: Dtype, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `checkpoint.load` for a model in this precision, on this device."""
    bits = bits_of(dtype)
    how = {"dtype": weight_dtype(dtype, device), "bits": bits, "unpacked": bits is None}
    return {"device": device, **how}


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak bf16 FLOP/s by its data sheet; None if it is not listed."""
    if device.type != "cuda":
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the GPU, or else without swapping in this container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2; "max" where there is no limit
    used = Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, int(limit.read_text("ascii")) - int(used.read_text("ascii")))
    except (OSError, ValueError):
        return free


def peak_memory(device: torch.device) -> int:
    """Peak bytes allocated on the GPU, or else used by this process, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return environment.peak_memory()


def with_float64(tensor: Tensor) -> Tensor:
    """Return a tensor of any shape where float64 is known: on the CPU in place of MPS."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, as before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
