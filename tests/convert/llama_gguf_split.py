"""llama.cpp's llama-gguf-split, by llama.cpp's own functions, which xllamacpp brings.

    python llama_gguf_split.py --split --split-max-tensors N WHOLE PREFIX
    python llama_gguf_split.py --merge FIRST_PART WHOLE

As that program does, it writes the model's values into the first part only, and leaves a count of
0 parts in a file that it has joined.
"""

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

COUNT = b"split.count"


class Params(ctypes.Structure):
    """How a file is opened: with its numbers, into a context that is returned."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("tensors", ctypes.POINTER(ctypes.c_void_p))]


package = find_spec("xllamacpp")
assert package is not None
assert package.origin is not None
(library,) = Path(package.origin).parent.glob("xllamacpp*.so")
llama = ctypes.CDLL(str(library))
TEXT, POINTER, NUMBER = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "gguf_init_from_file": (POINTER, TEXT, Params),
    "gguf_init_empty": (POINTER,),
    "gguf_set_kv": (None, POINTER, POINTER),
    "gguf_set_val_u16": (None, POINTER, TEXT, ctypes.c_uint16),
    "gguf_set_val_i32": (None, POINTER, TEXT, ctypes.c_int32),
    "gguf_find_key": (NUMBER, POINTER, TEXT),
    "gguf_get_val_u16": (ctypes.c_uint16, POINTER, NUMBER),
    "gguf_get_n_tensors": (NUMBER, POINTER),
    "gguf_get_tensor_name": (TEXT, POINTER, NUMBER),
    "gguf_add_tensor": (None, POINTER, POINTER),
    "ggml_get_tensor": (POINTER, POINTER, TEXT),
    "gguf_write_to_file": (ctypes.c_bool, POINTER, TEXT, ctypes.c_bool),
    "llama_split_path": (ctypes.c_int32, TEXT, ctypes.c_size_t, TEXT, NUMBER, NUMBER),
    "llama_split_prefix": (ctypes.c_int32, TEXT, ctypes.c_size_t, TEXT, NUMBER, NUMBER),
}
for name, (returned, *taken) in SIGNATURES.items():
    function = getattr(llama, name)
    function.restype, function.argtypes = returned, taken


def opened(path: bytes) -> tuple[int, list[int]]:
    """A file's values and its tensors."""
    tensors = ctypes.c_void_p()
    values = llama.gguf_init_from_file(path, Params(False, ctypes.pointer(tensors)))
    assert values, path
    numbers = range(llama.gguf_get_n_tensors(values))
    names = [llama.gguf_get_tensor_name(values, number) for number in numbers]
    return values, [llama.ggml_get_tensor(tensors, name) for name in names]


def part_path(prefix: bytes, number: int, count: int) -> bytes:
    path = ctypes.create_string_buffer(4096)
    llama.llama_split_path(path, len(path), prefix, number, count)
    return path.value


def write(out: int, tensors: list[int], path: bytes) -> None:
    for tensor in tensors:
        llama.gguf_add_tensor(out, tensor)
    assert llama.gguf_write_to_file(out, path, False)


def split(whole: bytes, prefix: bytes, most: int) -> None:
    values, tensors = opened(whole)
    parts = [tensors[start : start + most] for start in range(0, len(tensors), most)]
    for number, part in enumerate(parts):
        out = llama.gguf_init_empty()
        if number == 0:
            llama.gguf_set_kv(out, values)
        llama.gguf_set_val_u16(out, b"split.no", number)
        llama.gguf_set_val_u16(out, COUNT, len(parts))
        llama.gguf_set_val_i32(out, b"split.tensors.count", len(tensors))
        write(out, part, part_path(prefix, number, len(parts)))


def merge(first: bytes, whole: bytes) -> None:
    values, tensors = opened(first)
    count = llama.gguf_get_val_u16(values, llama.gguf_find_key(values, COUNT))
    prefix = ctypes.create_string_buffer(4096)
    assert llama.llama_split_prefix(prefix, len(prefix), first, 0, count), "not a first part's name"
    for number in range(1, count):
        tensors += opened(part_path(prefix.value, number, count))[1]
    llama.gguf_set_val_u16(values, COUNT, 0)
    out = llama.gguf_init_empty()
    llama.gguf_set_kv(out, values)
    write(out, tensors, whole)


if __name__ == "__main__":
    match [word.encode() for word in sys.argv[1:]]:
        case [b"--split", b"--split-max-tensors", most, whole, prefix]:
            split(whole, prefix, int(most))
        case [b"--merge", first, whole]:
            assert not Path(whole.decode()).exists()
            merge(first, whole)
        case words:
            sys.exit(f"unknown: {words}")
