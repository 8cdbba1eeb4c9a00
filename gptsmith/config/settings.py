"""What a person can choose about a run: dataclasses that are the flags, the recipes and the record.

Knows nothing of how a choice is carried out, or of files; standard library only.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .fields import Bytes, SettingError, above, at_least, fraction, setting, within
from .finetune import FinetuneSettings
from .model import GPTConfig

Dtype = Literal["auto", "float32", "bf16", "fp16", "fp8", "int8", "int4"]  # every precision

Attention = Literal["auto", "kernel", "blocks"]
Split = Literal["train", "validation"]

BASE_HELP = "the model that an adapter belongs to, if it is not where the adapter's folder says"
DEVICE_HELP = "auto, cpu, cuda, cuda:N or mps; auto takes CUDA, else MPS, else the CPU"
ATTENTION_HELP = (
    "kernel: PyTorch's fused attention; blocks: matrix products over blocks of queries; auto takes "
)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is learned from."""

    data: str | None = setting(
        None, "training data: a text, or a folder made by `gptsmith prepare`", metavar="DATA"
    )
    tokenizer: str | None = setting(
        None,
        "tokenizer: gpt2, char, char:ABC (these characters), byte or a folder with a "
        "tokenizer.json (default: the one of the model or of the prepared data, else byte)",
        metavar="gpt2|char|byte|FOLDER",
    )


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """How text becomes tokens."""

    field: str = setting(
        "text", "key in .jsonl rows, or column in .parquet and .csv, that holds the text"
    )
    bad_rows: Literal["error", "skip"] = setting(
        "error", "what happens to a row without text: an error, or it is skipped and counted"
    )
    encoding: str = setting("utf-8", "character encoding of text files")
    unknown: Literal["error", "skip"] = setting(
        "error", "what a char tokenizer does with a character it does not know"
    )
    validation_fraction: float = setting(
        0.1, "fraction of the documents held out for validation; of each text, where there are few"
    )
    deduplicate: bool = setting(False, "drop documents that repeat an earlier one exactly")
    workers: int | None = setting(None, "threads that encode (default: one per core)")
    shard_tokens: int = setting(100_000_000, "tokens per shard file")

    def __post_init__(self) -> None:
        within(self, 0, 1, "validation_fraction")
        at_least(self, 1, "workers", "shard_tokens")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How it is learned."""

    start_from: str | None = setting(
        None, "model whose weights to start from (fine-tuning)", flag="from", metavar="MODEL"
    )
    steps: int = setting(2000, "number of optimizer steps")
    batch_tokens: int = setting(8192, "tokens per optimizer step, over all processes")
    learning_rate: float = setting(1e-3, "peak learning rate")
    min_learning_rate: float | None = setting(
        None, "final learning rate (default: a tenth of the peak; 0 for wsd)"
    )
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine",
        "learning rate after the warmup: cosine decay, wsd (constant, then linear decay) or "
        "constant",
    )
    warmup_steps: int = setting(100, "steps in which the learning rate rises linearly to its peak")
    decay_fraction: float = setting(0.2, "last fraction of the steps, in which wsd decays")
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices and embeddings")
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw, or muon for the matrices of the blocks with adamw for the rest"
    )
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon")
    muon_momentum: float = setting(0.95, "momentum of Muon")
    beta1: float = setting(0.9, "decay rate of AdamW's running mean of the gradient")
    beta2: float = setting(0.95, "decay rate of AdamW's running mean of the squared gradient")
    epsilon: float = setting(1e-8, "added to the denominator of AdamW's update")
    grad_clip: float | None = setting(
        1.0, "largest gradient norm; larger gradients are scaled down; none: no clipping"
    )
    on_spike: Literal["stop", "skip", "rollback"] | None = setting(
        None,
        "what happens when the loss or gradient norm of a step is a spike: more than 10 robust "
        "standard deviations above the median of the last 128 steps, after the first 64; stop: the "
        "run is saved before the step and stops; skip: the weights are not updated; rollback: the "
        "run returns to a checkpoint and leaves out 16 batches (default: it is only reported)",
    )
    rollback_rate: float = setting(
        1.0, "what a rollback multiplies the learning rates of the steps after it by", metavar="X"
    )
    seed: int = setting(1337, "random seed for initialization, data order and dropout")

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_tokens")
        above(self, 0, "rollback_rate")
        at_least(self, 0, "warmup_steps", "learning_rate", "min_learning_rate", "weight_decay")
        at_least(self, 0, "seed", "grad_clip", "epsilon", "muon_learning_rate")
        if self.optimizer == "muon" and not self.learning_rate > 0:
            problem = f"is {self.learning_rate}: with Muon, above 0 is needed"
            raise SettingError("learning_rate", problem)
        within(self, 0, 1, "muon_momentum", "beta1", "beta2")
        fraction(self, "decay_fraction")


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """How this machine trains; "auto" and absent choices are made once and recorded."""

    device: str = setting("auto", DEVICE_HELP, metavar="DEVICE")
    dtype: Literal["auto", "float32", "bf16", "fp16", "fp8"] = setting(
        "auto",
        "precision of matrix products; auto takes float32 or bf16 (fp16 on GPUs without it), "
        "whichever is measured to be faster for the model; fp8 is bf16 with the products of the "
        "blocks in 8 bits, on Hopper GPUs and newer",
    )
    compile: Literal["auto", "yes", "no", "max-autotune"] = setting(
        "auto",
        "torch.compile; auto measures it in long runs and keeps it if it is faster; max-autotune, "
        "on CUDA, searches longer and uses CUDA graphs",
    )
    fused: Literal["auto", "yes", "no"] = setting(
        "auto",
        "what lies between the matrix products of GPT-2's block, and the update of the weights, in "
        "C++, on a CPU; built once per machine in some seconds; auto takes it where it can be "
        "built and is measured to be faster",
    )
    attention: Attention = setting("auto", f"{ATTENTION_HELP}the faster, as measured")
    threads: int | None = setting(None, "CPU threads (default: one per core)")
    micro_batch: int | None = setting(
        None,
        "rows of a batch that are computed at once (default: the most that fit the memory or, on a "
        "CPU, the fastest of a few sizes, as measured)",
    )
    recompute: Literal["auto", "yes", "no"] = setting(
        "auto",
        "compute each block's activations again in the backward pass instead of keeping them: less "
        "memory, up to a third more time, the same result; auto takes it only where not even one "
        "row would fit without",
    )
    shard: Literal["auto", "yes", "no"] = setting(
        "auto",
        "divide weights, gradients and optimizer state over the processes of `torchrun` (FSDP): "
        "less memory, more to send; auto does it where they would not fit each device whole",
    )
    deterministic: bool = setting(
        False,
        "on CUDA too, bit-identical results, and dropout that does not depend on the number of "
        "processes; slower (always so on a CPU)",
    )
    process_timeout: int = setting(
        600,
        "seconds for which a process waits for the others of `torchrun` before the run ends; more "
        "than a checkpoint takes to be saved",
        metavar="SECONDS",
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "threads", "micro_batch", "process_timeout")


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """How this machine uses a model that is trained."""

    device: str = setting("auto", DEVICE_HELP, metavar="DEVICE")
    dtype: Literal["auto", "float32", "bf16", "fp16", "int8", "int4"] | None = setting(
        None,
        "precision of weights and matrix products; int8 and int4 quantize the weights; auto takes "
        "the fastest that keeps the model's loss, both as measured (default: float32, or as a "
        "quantized model is)",
    )
    compile: Literal["auto", "yes", "no"] = setting(
        "auto",
        "compiled decoding step: C++ on a CPU, built once per machine in some seconds, or a CUDA "
        "graph on a GPU; auto does without where there is none",
    )
    attention: Attention = setting("auto", f"{ATTENTION_HELP}blocks for bf16 on a CPU")
    threads: int | None = setting(None, "CPU threads (default: one per core)")
    base: str | None = setting(None, BASE_HELP, metavar="MODEL")

    def __post_init__(self) -> None:
        at_least(self, 1, "threads")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What is shown and kept on the way; none of it changes what is learned."""

    log_every: int = setting(10, "steps between progress lines where there is no terminal")
    evaluate_every: int = setting(250, "steps between evaluations on the validation split")
    evaluate_tokens: int | None = setting(
        None, "evaluate on the first N tokens of the validation split only"
    )
    evaluate_tasks: tuple[str, ...] = setting(
        (),
        "file of questions whose accuracy each evaluation measures as well; its fields tell the "
        "task, as in `gptsmith evaluate --task`; repeatable",
        metavar="FILE",
    )
    save_every: int | None = setting(
        None, "steps between checkpoints (default: as --evaluate-every)"
    )
    keep: int | Literal["all"] = setting(
        2, "number of newest checkpoints to keep, besides the best; all keeps every one"
    )
    sample_every: int | None = setting(
        None, "steps between samples of text (default: as --evaluate-every)"
    )
    sample_tokens: int = setting(200, "tokens per sample; 0 writes no samples")
    sample_prompt: str | None = setting(None, "prompt of the samples")
    tensorboard: bool = setting(False, "also write TensorBoard events into the run's folder")
    wandb: str | None = setting(None, "Weights & Biases project to log to as well")

    def __post_init__(self) -> None:
        at_least(self, 1, "log_every", "evaluate_every", "save_every", "sample_every")
        if self.keep != "all":
            at_least(self, 1, "keep")
        at_least(self, 0, "sample_tokens")
        at_least(self, 2, "evaluate_tokens")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything needed to repeat a run: one section per question."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataSettings = field(default_factory=DataSettings)
    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is chosen from the logits."""

    temperature: float = setting(
        0.8, "divides the logits: 0 is greedy decoding, 1 the model's own distribution"
    )
    top_k: int | None = setting(None, "sample from the N most likely tokens only")
    top_p: float | None = setting(
        None, "sample from the most likely tokens that together have probability X (nucleus)"
    )
    min_p: float | None = setting(
        None, "leave out tokens with less than X times the probability of the most likely one"
    )
    repetition_penalty: float = setting(
        1.0, "above 1: makes tokens that are in the text already less likely"
    )

    def __post_init__(self) -> None:
        at_least(self, 0, "temperature")
        at_least(self, 1, "top_k")
        fraction(self, "top_p", "min_p")
        above(self, 0, "repetition_penalty")


GREEDY = SamplingSettings(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class MemorizationSettings:
    """What is tried to find out what a model remembers of its training text."""

    places: int = setting(
        200, "places of the training and of the held-out text that the model continues"
    )
    samples: int = setting(20, "texts that the model generates, to look for in the training text")
    sample_tokens: int | None = setting(
        None, "tokens of each sample (default: 200, or the context if that is less)"
    )
    seed: int = setting(0, "random seed of the places and samples")

    def __post_init__(self) -> None:
        at_least(self, 1, "places", "samples", "sample_tokens")
        at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """Who is served, and how many at once."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all network interfaces")
    port: int = setting(8000, "port to listen on; 0 takes a free one")
    unix_socket: Path | None = setting(
        None, "listen on a Unix domain socket at PATH, for this user only, instead of a port"
    )
    allow_origin: tuple[str, ...] = setting(
        (),
        "origin of web pages that may use the API from a browser, as in https://example.org; can "
        "be repeated; *: any",
        metavar="ORIGIN",
    )
    name: str | None = setting(None, "model name for requests (default: the folder's name)")
    api_key: str | None = setting(
        None,
        "key that requests must send (default: the variable GPTSMITH_API_KEY; without it, none)",
        metavar="KEY",
    )
    adapter: tuple[str, ...] = setting(
        (), "serve an adapter of the model too, under its own name; repeatable", metavar="NAME=PATH"
    )
    slots: int | None = setting(
        None, "texts generated at once (default: as many as suit the model and the machine)"
    )
    waiting: int = setting(512, "texts that may wait for a slot; requests beyond that are refused")
    timeout: float = setting(600.0, "seconds that a request may take, including waiting")
    max_request_bytes: Bytes = setting(1 << 20, "size of the largest request")
    drain: int = setting(30, "seconds to finish running texts after the server is asked to stop")
    log_requests: bool = setting(True, "write a line for each request")

    def __post_init__(self) -> None:
        within(self, 0, 1 << 16, "port")
        at_least(self, 1, "slots", "max_request_bytes")
        at_least(self, 0, "waiting", "drain")
        above(self, 0, "timeout")
        if self.name == "":
            raise SettingError("name", "is empty: requests need a name for the model")
        taken = [self.name]
        for word in self.adapter:
            name, _, path = word.partition("=")
            if not name or not path:
                raise SettingError("adapter", f"is '{word}': NAME=PATH is needed")
            if name in taken:
                raise SettingError("adapter", f"has the name '{name}' twice: choose another")
            taken.append(name)
        for origin in self.allow_origin:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise SettingError(
                    "allow_origin",
                    f"is '{origin}': a scheme and a host are needed, as https://example.org, or *",
                )
