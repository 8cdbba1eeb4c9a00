"""What a person can choose about a run: dataclasses that are the flags, the recipes and the record.

Knows nothing of how a choice is carried out, or of files; standard library only.
"""

from dataclasses import dataclass, field
from typing import Literal

from .fields import at_least, setting, within
from .model import GPTConfig

Dtype = Literal["auto", "float32", "bf16", "fp16", "fp8", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is learned from."""

    data: str | None = setting(None, "text to learn from: a source, or a folder made by prepare")
    tokenizer: str | None = setting(
        None,
        "gpt2, char, byte or a folder with a tokenizer.json (default: the data's own, or byte)",
    )


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """How text becomes tokens."""

    field: str = setting("text", "the key of a .jsonl or column of a .parquet that holds the text")
    encoding: str = setting("utf-8", "character encoding of text files")
    unknown: Literal["error", "skip"] = setting(
        "error", "what a char tokenizer does with a character it does not know"
    )
    validation_fraction: float = setting(0.1, "share of the documents, or of the text, held out")
    workers: int | None = setting(None, "threads that encode (default: one per core)")
    shard_tokens: int = setting(100_000_000, "tokens per shard file")

    def __post_init__(self) -> None:
        within(self, "validation_fraction", 0, 1)
        at_least(self, 1, "workers", "shard_tokens")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How it is learned."""

    start_from: str | None = field(
        default=None,
        metadata={"help": "MODEL whose weights to start from (fine-tuning)", "flag": "from"},
    )
    steps: int = setting(2000, "optimizer steps in all")
    batch_tokens: int = setting(8192, "tokens that one step learns from, over all processes")
    learning_rate: float = setting(1e-3, "highest learning rate")
    min_learning_rate: float | None = setting(
        None, "learning rate at the end (default: a tenth of the highest; 0 with wsd)"
    )
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "after warm-up: cosine, warmup-stable-decay (a plateau, then linear), or constant"
    )
    warmup_steps: int = setting(100, "steps over which the learning rate rises from 0")
    decay_fraction: float = setting(0.2, "last share of the steps in which wsd decays")
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices and embeddings")
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        "muon: the blocks' matrices by Muon, which learns more per token; the rest by AdamW",
    )
    muon_learning_rate: float = setting(0.02, "highest learning rate of Muon")
    muon_momentum: float = setting(0.95, "Muon's memory of the gradient, per step")
    beta1: float = setting(0.9, "AdamW's memory of the gradient, per step")
    beta2: float = setting(0.95, "AdamW's memory of the squared gradient, per step")
    epsilon: float = setting(1e-8, "added to AdamW's denominator")
    grad_clip: float | None = setting(1.0, "largest gradient norm; larger ones are scaled down")
    seed: int = setting(1337, "of the fresh weights, the order of the data, and dropout")

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_tokens")
        at_least(self, 0, "warmup_steps", "learning_rate", "min_learning_rate", "weight_decay")
        at_least(self, 0, "seed", "grad_clip", "epsilon")
        at_least(self, 0, "muon_learning_rate")
        if self.optimizer == "muon" and not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: with Muon, above 0 is needed")
        within(self, "muon_momentum", 0, 1)
        within(self, "beta1", 0, 1)
        within(self, "beta2", 0, 1)
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction is {self.decay_fraction}: above 0, up to 1 is needed")


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """How this machine computes it; "auto" and absent choices are made once and recorded."""

    device: str = setting("auto", "cpu, cuda, cuda:N or mps; auto takes the fastest there is")
    dtype: Dtype = setting(
        "auto",
        "precision of matrix products; auto takes bf16 where the processor is good at it; fp8, for "
        "training on Hopper GPUs, is bf16 with the blocks' products in 8 bits; int8 and int4 are "
        "for using a model, and auto takes them there where its loss stays the same",
    )
    compile: Literal["auto", "yes", "no", "max-autotune"] = setting(
        "auto",
        "torch.compile; auto tries it where the run is long enough to repay it, and keeps it if "
        "faster; max-autotune, for CUDA, searches longer and records CUDA graphs",
    )
    attention: Literal["auto", "kernel", "blocks"] = setting(
        "auto", "PyTorch's kernel, or blocks of plain products; auto takes blocks for bf16 on a CPU"
    )
    threads: int | None = setting(None, "CPU threads (default: one per core)")
    micro_batch: int | None = setting(
        None, "rows computed at once; the batch is split into these (default: what fits in memory)"
    )
    deterministic: bool = setting(False, "same bits on CUDA too, where that is slower")

    def __post_init__(self) -> None:
        at_least(self, 1, "threads", "micro_batch")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What is shown and kept on the way; none of it changes what is learned."""

    log_every: int = setting(10, "steps between lines where there is no terminal")
    evaluate_every: int = setting(250, "steps between passes over the validation split")
    evaluate_tokens: int | None = setting(None, "use only the first N validation tokens")
    save_every: int | None = setting(None, "steps between checkpoints (default: evaluate_every)")
    keep: int = setting(2, "newest checkpoints kept, besides the best")
    sample_every: int | None = setting(None, "steps between samples (default: evaluate_every)")
    sample_tokens: int = setting(200, "tokens in a sample; 0 writes none")
    sample_prompt: str | None = setting(None, "what samples begin with")
    tensorboard: bool = setting(False, "also write TensorBoard events into the run")
    wandb: str | None = setting(None, "also send the metrics to this Weights & Biases project")

    def __post_init__(self) -> None:
        at_least(self, 1, "log_every", "evaluate_every", "save_every", "keep", "sample_every")
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


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is chosen from the logits."""

    temperature: float = setting(0.8, "randomness: 0 takes the likeliest token, 1 the model's own")
    top_k: int | None = setting(None, "choose among the K likeliest tokens only")
    top_p: float | None = setting(None, "choose among the likeliest that make up this probability")
    min_p: float | None = setting(None, "leave out what is less likely than this share of the top")
    repetition_penalty: float = setting(1.0, "above 1 makes tokens already seen less likely")

    def __post_init__(self) -> None:
        at_least(self, 0, "temperature")
        at_least(self, 1, "top_k")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}: above 0, up to 1 is needed")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: above 0 is needed")


GREEDY = SamplingSettings(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """Who is served, and how many at once."""

    host: str = setting("127.0.0.1", "address to listen at; 0.0.0.0 is all of this machine's")
    port: int = setting(8000, "port to listen at; 0 takes a free one")
    name: str | None = setting(None, "what requests call the model (default: its folder's name)")
    api_key: str | None = setting(
        None, "what callers have to send (default: the variable GPTSMITH_API_KEY, or nothing)"
    )
    slots: int | None = setting(None, "texts written at once (default: what suits the machine)")
    waiting: int = setting(512, "texts that may wait for a slot; more are refused for the moment")
    timeout: float = setting(600.0, "seconds that a request may take, waiting included")
    max_request_bytes: int = setting(1 << 20, "bytes of the largest request")
    drain: int = setting(30, "seconds in which texts may be finished once the server is to end")
    log_requests: bool = setting(True, "a line for each request")

    def __post_init__(self) -> None:
        within(self, "port", 0, 1 << 16)
        at_least(self, 1, "slots", "max_request_bytes")
        at_least(self, 0, "waiting", "drain")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}: seconds above 0 are needed")
        if self.name == "":
            raise ValueError("name is empty: requests need something to call the model")
