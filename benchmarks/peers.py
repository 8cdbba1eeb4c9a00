"""The peers of benchmarks/generate.py, and the machine itself: each measured in its own process.

    python benchmarks/peers.py QUESTION    in JSON; the answer goes to the file that it names

Also the files that CTranslate2 and llama.cpp read, made from a folder of ours.
"""

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptsmith.checkpoint import saved
from gptsmith.cli import peers, profile
from gptsmith.cli.timing import WARM_UP_TOKENS, generation_figures, random_prompt
from gptsmith.cli.turns import Case, Figures
from gptsmith.convert import gguf
from gptsmith.machine import environment
from gptsmith.machine.files import read_json, write_json

CTRANSLATE2_TYPES = ("float32", "int8")
LLAMA_TYPES = {"float32": "float32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
LLAMA_BATCH = 256  # positions; llama.cpp rounds its context up to these

# -- the files that they read


def write_ctranslate2(model: Path, scratch: Path) -> None:
    """The model as CTranslate2 reads it, in float32 and int8."""
    from ctranslate2.converters import TransformersConverter

    for dtype in CTRANSLATE2_TYPES:
        out = scratch / f"ctranslate2-{dtype}"
        TransformersConverter(str(model)).convert(str(out), quantization=dtype)
        words = read_json(out / "config.json")
        # Our tokenizers have no word for what is unknown, and CTranslate2 wants one.
        write_json(out / "config.json", words | {"unk_token": words["eos_token"]})


def write_ggufs(model: Path, scratch: Path) -> None:
    """The model as llama.cpp reads it."""
    stored = saved.open_folder(model)
    for dtype in ("float32", "bf16", "q8_0"):
        gguf.write(stored, scratch / f"{dtype}.gguf", dtype)
    write_q4_0(scratch / "float32.gguf", scratch / "q4_0.gguf")


def write_q4_0(source: Path, out: Path) -> None:
    """A GGUF file with its matrices in Q4_0, by llama.cpp's own Python package.

    The embedding and the head too, for which llama.cpp's program takes more bits: less to read.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

    reader, writer = GGUFReader(source), GGUFWriter(out, gguf.ARCHITECTURE)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            inside = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inside)
    q4_0 = GGMLQuantizationType.Q4_0
    for tensor in reader.tensors:
        if len(tensor.shape) == 1 or tensor.name == "position_embd.weight":
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, quants.quantize(tensor.data, q4_0), raw_dtype=q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- measured in a process of their own


def transformers_int8(case: Case, threads: int, scratch: Path) -> Figures:
    """transformers with PyTorch's dynamic quantization of every linear layer."""
    from torch.ao.quantization import quantize_dynamic
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(scratch / "model").eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):  # a linear layer that PyTorch does not know as one
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data = child.weight.data.T.contiguous()
                linear.bias.data = child.bias.data
                setattr(module, name, linear)
    model = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    prompt = random_prompt(model.config.vocab_size, case.rows, case.prompt_tokens)
    return peers.time_generate(model, prompt, case.max_tokens, compiled=False)


def ctranslate2(case: Case, threads: int, scratch: Path) -> Figures:
    """CTranslate2; it tells of every token of every row."""
    import ctranslate2

    folder = scratch / f"ctranslate2-{case.dtype}"
    settings = {"compute_type": case.dtype, "inter_threads": 1, "intra_threads": threads}
    generator = ctranslate2.Generator(str(folder), device="cpu", **settings)
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    prompt = random_prompt(len(vocabulary), case.rows, case.prompt_tokens).tolist()
    words = [[vocabulary[id] for id in row] for row in prompt]
    for count in (min(WARM_UP_TOKENS, case.max_tokens), case.max_tokens):
        times = [time.perf_counter()] + [0.0] * count

        def note(step: Any, times: list[float] = times) -> bool:
            times[step.step + 1] = time.perf_counter()
            return False

        length = {"max_length": count, "min_length": count, "include_prompt_in_result": False}
        results = generator.generate_batch(words, sampling_topk=1, callback=note, **length)
    figures = generation_figures(times, case.rows, case.prompt_tokens)
    return {**figures, "tokens": [result.sequences_ids[0] for result in results]}


def llama_cpp(case: Case, threads: int, scratch: Path) -> Figures:
    """llama.cpp's server with all rows in one request; the times are by its own clock."""
    import xllamacpp

    said = xllamacpp.CommonParams()
    said.model.path = str(scratch / f"{LLAMA_TYPES[case.dtype]}.gguf")
    said.n_parallel = case.rows
    length = case.prompt_tokens + case.max_tokens
    said.n_ctx = case.rows * -(-length // LLAMA_BATCH) * LLAMA_BATCH
    said.cpuparams.n_threads = said.cpuparams_batch.n_threads = threads
    said.n_gpu_layers = said.cache_ram_mib = 0
    said.fit_params = False
    server = xllamacpp.Server(said)
    vocabulary = read_json(scratch / "model" / "config.json")["vocab_size"]
    prompt = random_prompt(vocabulary, case.rows, case.prompt_tokens).tolist()
    how = {"temperature": 0, "samplers": ["temperature"], "ignore_eos": True}
    how |= {"cache_prompt": False, "return_tokens": True}
    for count in (min(WARM_UP_TOKENS, case.max_tokens), case.max_tokens):
        data = json.dumps({"prompt": prompt, "n_predict": count, **how}).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/completion", data, head)
        with urllib.request.urlopen(request) as answer:
            found = json.load(answer)
    rows = sorted(found if isinstance(found, list) else [found], key=lambda row: row["index"])
    if any(len(row["tokens"]) != count for row in rows):
        raise ValueError(f"llama.cpp wrote fewer than {count} tokens: its context was too small")
    first = max(row["timings"]["prompt_ms"] for row in rows)
    decode = max(row["timings"]["predicted_ms"] for row in rows)
    return {
        "prefill_tokens_per_second": 1000 * case.rows * case.prompt_tokens / first,
        "decode_tokens_per_second": 1000 * case.rows * (count - 1) / decode if count > 1 else None,
        "first_token_milliseconds": first,
        "tokens": [row["tokens"] for row in rows],
    }


def machine(threads: int, summed: int) -> Figures:
    """What the memory and the cores give: bytes read a second, and matrix products."""
    torch.set_num_threads(threads)
    numbers = torch.ones(summed)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin)
    rates = {
        f"{name}_gigaflops": profile.matrix_rate(torch.device("cpu"), dtype)[0] / 1e9
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))
    }
    return {"gigabytes_per_second": 4 * summed / min(seconds) / 1e9, **rates}


MEASURED: dict[str, Callable[[Case, int, Path], Figures]] = {
    "transformers_int8": transformers_int8,
    "ctranslate2": ctranslate2,
    "llama_cpp": llama_cpp,
}


def answer(question: dict[str, Any]) -> None:
    """Measure what is asked for in this process, and leave it in the file that is named."""
    out, who, threads = (question.pop(name) for name in ("answer", "who", "threads"))
    if who == "machine":
        found = machine(threads, question["summed"])
    else:
        scratch = Path(question.pop("scratch"))
        found = MEASURED[who](Case(**question), threads, scratch)
        found.setdefault("peak_memory_megabytes", environment.peak_memory() / 1e6)
    write_json(Path(out), found)
    os._exit(0)  # llama.cpp's server has threads that do not end


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]))
