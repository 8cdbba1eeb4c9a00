"""What computes: device, precision, threads, and the processes that share the work.

Every automatic choice is made here, once, and comes back as settings that can be recorded.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import runtime, weights
from .model import GPT
from .settings import Dtype, MachineSettings

# fp8: of all but the products that `multiply_in_float8` replaces.
DTYPES = weights.DTYPES | {"fp8": torch.bfloat16}
BITS = {"int8": 8, "int4": 4}  # of packed weights
HOPPER = (9, 0)  # CUDA compute capability, the first that multiplies 8-bit floats fast

Item = TypeVar("Item")

# Dense bf16 matrix products per second, from the makers' data sheets, for MFU; by the name that
# torch.cuda.get_device_name gives. A device that is not listed has no MFU rather than a wrong one.
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
    """The device of a name; "auto" is CUDA, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", runtime.local_rank() % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device is '{name}': auto, cpu, cuda, cuda:N or mps is needed")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device is 'cuda', but PyTorch finds no CUDA GPU here: try cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device is '{name}', but there are {torch.cuda.device_count()} GPUs")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps', but this PyTorch has none: try cpu")
    return device


def find_dtype(name: Dtype, device: torch.device) -> Dtype:
    """The precision of a name; "auto" is bf16 where the processor multiplies it fast.

    On CPUs that means AVX512-BF16 or AMX; GPUs before Ampere get fp16 with a scaler.
    """
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"dtype is fp16, which needs CUDA: on {device.type} take bf16 or float32")
    if name == "fp8" and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER
    ):
        raise ValueError("dtype is fp8, which needs a Hopper GPU or newer: take bf16")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return "bf16"
    return "float32"


def choose(settings: MachineSettings) -> MachineSettings:
    """The settings with the automatic choices made that need no model.

    What needs one is left: the micro-batch, and whether to compile.
    """
    device = find_device(settings.device)
    if settings.compile == "max-autotune" and device.type != "cuda":
        raise ValueError(f"compile is max-autotune, which is for CUDA: on {device.type} take yes")
    dtype = find_dtype(settings.dtype, device)
    attention = settings.attention
    if attention == "auto":
        multiplied = find_dtype("auto", device) if dtype in BITS else dtype
        attention = "blocks" if (device.type, multiplied) == ("cpu", "bf16") else "kernel"
    return replace(
        settings,
        # Without the number: another rank, or a resumed run, may sit on another GPU.
        device=device.type if settings.device == "auto" else settings.device,
        dtype=dtype,
        attention=attention,
        threads=runtime.checked_threads("threads", settings.threads),
    )


def choose_to_learn(settings: MachineSettings) -> MachineSettings:
    """As `choose`, for training, which packed weights are not for."""
    if settings.dtype in BITS:
        raise ValueError(
            f"dtype is {settings.dtype}, which is for using a model: train in another, then "
            "`gptsmith quantize` the result"
        )
    return choose(settings)


def prepare_machine(settings: MachineSettings) -> torch.device:
    """Put the process-wide switches of PyTorch as the (chosen) settings say; return the device."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = find_device("auto" if settings.device == "cuda" else settings.device)
    if device.type == "cpu":
        runtime.keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if settings.deterministic:
        runtime.allow_deterministic_cuda()
    if settings.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(settings.deterministic)  # imports a second's worth
    return device


def seed_device(device: torch.device, seed: int) -> None:
    """Seed what draws the device's random numbers; torch.manual_seed is slow, as it seeds all."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """The context in which matrix products run in `dtype` ("float32": as they are)."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


def weight_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The type of a model's weights where nothing is learned, for this (chosen) precision.

    Where they are packed, that of the activations: what is fast.
    """
    if dtype == "fp8":
        raise ValueError("dtype is fp8, which is for training: take bf16")
    if dtype in BITS:
        return DTYPES[find_dtype("auto", device)]
    return DTYPES[dtype]


def loading(dtype: Dtype, device: torch.device) -> dict[str, Any]:
    """How `checkpoint.load` gives a model in this (chosen) precision, on this device."""
    bits = BITS.get(dtype)
    how = {"dtype": weight_dtype(dtype, device), "bits": bits, "unpacked": bits is None}
    return {"device": device, **how}


def dtype_of_bits(bits: int) -> Dtype:
    """The word for packed weights of so many bits."""
    return "int4" if bits == 4 else "int8"


def multiply_in_float8(model: nn.Module, *, emulate: bool = False) -> None:
    """Let the linear layers of the blocks multiply in 8-bit floats, by torchao; the weights stay.

    Each product finds the scale of its whole tensors as it runs. The head, whose loss is computed
    in parts, stays in bf16. `emulate` computes what an older device would, slowly.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError("dtype fp8 needs an extra: pip install 'gptsmith[fp8]'") from error
    blocks = [module for name, module in model.named_children() if name == "h"]
    for block in blocks:
        convert_to_float8_training(block, config=Float8LinearConfig(emulate=emulate))


def prepare_model(model: GPT, settings: MachineSettings) -> None:
    """Let a model compute as the (chosen) settings say; its weights stay."""
    model.attend_in_blocks(settings.attention == "blocks")
    if settings.dtype == "fp8":
        multiply_in_float8(model)


def number_bytes(dtype: Dtype) -> int:
    """Bytes of a number in the matrix products of this (chosen) precision."""
    return DTYPES[dtype].itemsize


def peak_flops(device: torch.device) -> float | None:
    """Bf16 FLOP/s of the device by its data sheet, or None where it is not listed."""
    if device.type != "cuda":
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return runtime.available_memory()


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return runtime.peak_memory()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# -- many processes


def join_processes(device: torch.device) -> None:
    """Meet the other processes that `torchrun` started, if any."""
    if runtime.world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave_processes() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def my_share(items: Iterable[Item]) -> Iterator[Item]:
    """Of work that every process lists in the same order, the items that this one does."""
    if not dist.is_initialized():
        return iter(items)
    return islice(items, dist.get_rank(), None, dist.get_world_size())


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, in place; the same shape."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_of_numbers(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The sums over all processes of a few numbers, in float64."""
    if not dist.is_initialized():
        return list(numbers)
    return sum_over_processes(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process: the same answer in all."""
    if not dist.is_initialized():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(sum_over_processes(torch.tensor(int(flag), device=device)))


def wait_for_processes() -> None:
    """Return once every process is here."""
    if dist.is_initialized():
        dist.barrier()
