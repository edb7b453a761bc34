"""The one vocabulary of a run: frozen dataclasses, filled from a YAML file and from the command line.

`parse` reads `--config file.yaml` and then overrides such as `--optimizer.lr 2e-3`; whatever stands later wins, and a
key that no dataclass knows is an error that names it. Decides which values make sense together, in one process, so that
a typo is found before any process group exists. Knows nothing of how a value is used. The options of the library are
its own classes, `distmuon.Sharding` and `distmuon.Precision`: no field of theirs is said again here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch

from distmuon import Precision, Sharding
from distmuon.cli.arguments import dtype_name, import_jsonargparse
from distmuon.errors import problem
from distmuon.options import AdjustLrFn
from launch.failures import fail


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Hugging Face causal language model with random weights; nothing is ever downloaded."""

    arch: str = "llama"
    """`model_type` as transformers names it: llama, gpt2, deepseek_v3, qwen3, ..."""
    config: dict[str, Any] = field(default_factory=dict)
    """Overrides for that architecture's config class, under transformers' own names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations; the optimizer keeps float32 masters of bfloat16 parameters."""
    seq_len: int = 256
    """Tokens a window predicts; a window holds one more."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in backward."""
    compile: bool = False
    """Run the model through `torch.compile`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from. See `launch.data` for the order in which they are read."""

    source: Literal["stdlib", "bin", "hf"] = "stdlib"
    """stdlib: source text of this interpreter's library; bin: token shards; hf: a streamed Hugging Face dataset."""
    train: str = ""
    """bin: glob of the training shards. hf: name of the split to stream ("" = train)."""
    val: str = ""
    """bin: glob of the validation shards."""
    dataset: str = ""
    """hf: dataset name, or a file format ("json", "text", "parquet") together with `files`."""
    subset: str | None = None
    """hf: the dataset's configuration, for instance sample-10BT."""
    files: str | None = None
    """hf: glob of local files, for a `dataset` that is a format."""
    text_field: str = "text"
    """hf: the column that holds the text."""
    tokenizer: str = "bytes"
    """hf: "bytes", or a tokenizer's name or local folder."""
    val_documents: int = 1000
    """hf: this many documents at the head of the stream are kept for validation and never trained on."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once, and which learning rate when."""

    steps: int = 200
    """Optimizer steps."""
    global_batch: int = 16
    """Sequences an optimizer step averages over, all ranks and micro-batches together."""
    micro_batch: int = 8
    """Sequences one rank puts through one forward and backward; accumulation follows from the two."""
    schedule: Literal["cosine", "constant", "three_stage"] = "cosine"
    """See `launch.schedules`."""
    warmup_steps: int = 0
    """Steps of linear rise from 0 to the base lr."""
    min_lr_ratio: float = 0.1
    """Where the cosine ends, as a ratio of the base lr."""
    cooldown_steps: int = 0
    """three_stage: length of the last stage, its rise included."""
    cooldown_rise_steps: int = 100
    """three_stage: steps of the rise from `min_lr_ratio` to `cooldown_lr_ratio`; then the fall to 0."""
    cooldown_lr_ratio: float = 1.0e-4 / 4.2e-4
    """three_stage: height of the last stage, as a ratio of the base lr."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; null leaves gradients alone."""
    eval_every: int = 50
    """Steps between validations; there is one before the first and one after the last step too."""
    eval_batches: int = 8
    """Global batches of validation windows, the same ones every time."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    max_skipped: int = 10
    """End the run with an error after this many skipped steps in a row (their gradients were not finite); 0: never."""
    verify_every: int = 0
    """The optimizer's: steps between two comparisons of all parameters' bits across ranks; 0: never."""

    def accumulation(self, data_size: int) -> int:
        """Micro-batches per rank and optimizer step, where `data_size` ranks read different batches."""
        sequences = self.micro_batch * data_size
        if self.global_batch % sequences:
            raise ValueError(
                f"train.global_batch: found {self.global_batch} for {data_size} ranks of micro_batch "
                f"{self.micro_batch}; a multiple of {sequences} is needed; change one of the two"
            )
        return self.global_batch // sequences


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model lies over the ranks; see `launch.parallel`. A run may change it when it resumes."""

    shard: Literal["zero1", "fsdp2", "hsdp"] = "zero1"
    """zero1: whole parameters on every rank, state sharded by DistMuon. fsdp2: parameters, gradients and state sharded
    by torch's `fully_shard` over all ranks. hsdp: the same inside each of `replicas` copies."""
    replicas: int = 1
    """hsdp: copies of the model; each is sharded over world size / (replicas * tp) ranks."""
    tp: int = 1
    """fsdp2, hsdp: ranks that share each matrix product (tensor parallelism); they read the same batches."""

    def __post_init__(self) -> None:
        for name in ("replicas", "tp"):
            if getattr(self, name) < 1:
                raise problem(
                    f"parallel.{name}",
                    found=f"found {getattr(self, name)}",
                    needed="at least 1 is needed",
                    cure=f"correct parallel.{name}",
                )
        if (self.replicas > 1) != (self.shard == "hsdp"):
            raise problem(
                "parallel.replicas",
                found=f"found {self.replicas} with parallel.shard {self.shard}",
                needed="hsdp needs at least 2, and the other shardings have no replicas",
                cure="set parallel.shard hsdp and parallel.replicas 2, or neither",
            )
        if self.tp > 1 and self.shard == "zero1":
            raise problem(
                "parallel.tp",
                found=f"found {self.tp} with parallel.shard zero1",
                needed="tensor parallelism is combined with fsdp2 or hsdp",
                cure="set parallel.shard fsdp2",
            )

    def mesh_shape(self, world_size: int) -> tuple[int, int, int]:
        """(replicas, ranks that shard a replica, tp); their product is the world size."""
        if world_size % (self.replicas * self.tp):
            raise problem(
                "parallel",
                found=f"found {world_size} ranks for {self.replicas} replicas of tp {self.tp}",
                needed=f"a multiple of {self.replicas * self.tp} ranks is needed",
                cure="change --nproc_per_node, parallel.replicas or parallel.tp",
            )
        return self.replicas, world_size // (self.replicas * self.tp), self.tp


@dataclass(frozen=True, kw_only=True)
class RouteConfig:
    """One `distmuon.Route`: which parameters, which rule, and how a fused weight splits into logical matrices."""

    pattern: str
    rule: Literal["muon", "adamw"]
    split: list[int] | None = None
    split_dim: int = 0
    heads: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Arguments of `distmuon.DistMuon` under its own names. adamw is the baseline: same shards, every rule AdamW."""

    name: Literal["distmuon", "adamw"] = "distmuon"
    lr: float = 2e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_coefficients: str = "jordan"
    adjust_lr_fn: AdjustLrFn = "match_rms_adamw"
    adamw_lr: float | None = None
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    adamw_weight_decay: float | None = None
    cautious_weight_decay: bool = False
    normuon_beta2: float | None = None
    routes: list[RouteConfig] = field(default_factory=list)
    """First match wins, before the library's own rules; distmuon only."""
    broadcast_buffers: bool = True
    sharding: Sharding = field(default_factory=lambda: Sharding(overlap="forward"))
    """All-gathers may run under the next forward, since the recipe's loop leaves parameters alone before it. Under
    fsdp2, hsdp and model.compile `overlap: forward` means true: FSDP2 gathers by itself, and waits in every module
    would break compiled graphs."""
    precision: Precision = field(default_factory=Precision)

    def __post_init__(self) -> None:
        if self.name == "adamw" and self.routes:
            raise ValueError(
                f"optimizer.routes: found {len(self.routes)} routes with optimizer.name adamw; the baseline sends "
                "every parameter to AdamW; drop the routes or use distmuon"
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What rank 0 writes."""

    dir: str = "runs/pretrain"
    """Folder of the run; its records are in `metrics.jsonl` there."""
    every: int = 1
    """Steps between two readings of the device; every step is recorded all the same."""
    sinks: list[str] = field(default_factory=lambda: ["report"])
    """Where records go besides: report (report.html in that folder), tensorboard, wandb, trackio, or
    package.module.Class; see `launch.sinks`."""
    sample_tokens: int = 64
    """Length of the text that is sampled at each validation, if the data are text; 0: none. Each token takes a forward
    of the model, on all ranks."""
    sample_prompt: str = ""
    """What that text goes on with; "" is the beginning of a document."""
    telemetry_every: int = 0
    """Steps between two measurements of updates, weights and attention (docs/telemetry.md); 0: none."""
    progress: bool = True
    """A bar when stdout is a terminal, plain lines otherwise."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A run with checkpoints resumes by itself from the newest complete one in `<log.dir>/checkpoints`."""

    every: int = 0
    """Steps between checkpoints; there is one after the last step and one at SIGTERM, too. 0: none, and no resuming."""
    keep_last: int = 2
    """Older complete ones are deleted."""
    asynchronous: bool = False
    """Copy the state out and write it behind the next steps; costs a copy of each rank's shard in host memory."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        self._check_no_null()
        train = self.train
        positive = {
            "model.seq_len": self.model.seq_len,
            "train.steps": train.steps,
            "train.global_batch": train.global_batch,
            "train.micro_batch": train.micro_batch,
            "train.eval_every": train.eval_every,
            "train.eval_batches": train.eval_batches,
            "log.every": self.log.every,
            "checkpoint.keep_last": self.checkpoint.keep_last,
        }
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"{name}: found {value}; at least 1 is needed; correct {name}")
        for name, value in {
            "train.verify_every": train.verify_every,
            "train.max_skipped": train.max_skipped,
            "train.warmup_steps": train.warmup_steps,
            "checkpoint.every": self.checkpoint.every,
            "data.val_documents": self.data.val_documents,
            "log.sample_tokens": self.log.sample_tokens,
            "log.telemetry_every": self.log.telemetry_every,
        }.items():
            if value < 0:
                raise ValueError(f"{name}: found {value}; a count from 0 on is needed; 0 switches it off")
        for name, ratio in {
            "train.min_lr_ratio": train.min_lr_ratio,
            "train.cooldown_lr_ratio": train.cooldown_lr_ratio,
        }.items():
            if not 0 <= ratio < float("inf"):
                raise ValueError(f"{name}: found {ratio}; a ratio from 0 on is needed; correct {name}")
        if train.max_grad_norm is not None and not train.max_grad_norm > 0:
            raise ValueError(
                f"train.max_grad_norm: found {train.max_grad_norm}; a norm above 0 is needed; null clips none"
            )
        if train.schedule == "three_stage" and not train.cooldown_rise_steps < train.cooldown_steps:
            raise ValueError(
                f"train.cooldown_steps: found {train.cooldown_steps} with a rise of {train.cooldown_rise_steps}; "
                "three_stage needs more steps than the rise takes; set train.cooldown_steps and cooldown_rise_steps"
            )
        if train.schedule == "three_stage" and not train.warmup_steps < train.steps - train.cooldown_steps:
            raise ValueError(
                f"train.steps: found {train.steps} with {train.warmup_steps} steps of warmup and "
                f"{train.cooldown_steps} of cooldown; at least one step must lie between; lengthen the run or shorten "
                "the stages"
            )
        self._check_data()

    def _check_data(self) -> None:
        """Raise where the source of the data lacks something."""
        data = self.data
        if self.log.sample_prompt and data.source == "bin":
            raise problem(
                "log.sample_prompt",
                found=f"found {self.log.sample_prompt!r} with data.source bin",
                needed="text needs a tokenizer, and shards of tokens do not say which",
                cure="leave log.sample_prompt out; launch.generate takes a --tokenizer afterwards",
            )
        for key in {"bin": ("train", "val"), "hf": ("dataset",)}.get(data.source, ()):
            if not getattr(data, key):
                raise ValueError(f"data.{key}: found nothing; source {data.source} needs it; set data.{key}")

    def _check_no_null(self) -> None:
        """Raise for a key that YAML sets to null although it needs a value."""
        for section in fields(self):
            held = getattr(self, section.name)
            hints = get_type_hints(type(held)) if held is not None else {}
            nulls = [key for key, hint in hints.items() if getattr(held, key) is None and not _takes_none(hint)]
            if held is None or nulls:
                raise problem(
                    ".".join([section.name, *nulls[:1]]),
                    found="found null",
                    needed="a value is needed",
                    cure="leave the key out for its default",
                )

    def warnings(self) -> list[str]:
        """What is legal and seldom meant."""
        train, found = self.train, []
        if train.schedule != "three_stage" and train.warmup_steps >= train.steps:
            found.append(
                f"the run ends in its warm-up: train.steps {train.steps}, train.warmup_steps {train.warmup_steps}; the "
                "learning rate never falls"
            )
        return found


def _takes_none(hint: Any) -> bool:
    return type(None) in get_args(hint)


def parse(argv: list[str] | None = None) -> Config:
    """The run that the command line describes; prints the reason and leaves with status 2 if it describes none."""
    return parse_program(argv)[0]


def parse_program(argv: list[str] | None = None) -> tuple[Config, int | None]:
    """`parse`, and the number of ranks of a `--dry-run`: 0 if it names none, None for a real run."""
    jsonargparse = import_jsonargparse()  # here: a Config can be built without it
    parser = jsonargparse.ArgumentParser(description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file of the keys below")
    parser.add_argument(
        "--dry-run",
        type=int,
        nargs="?",
        const=0,
        metavar="RANKS",
        help="check config, data, model, routes and memory for that many ranks, print the plan and leave",
    )
    parser.add_class_arguments(Config)
    try:
        found = parser.parse_args(argv)
        dry_run = found.pop("dry_run")
        found.pop("config")
        return Config(**vars(parser.instantiate(found))), dry_run
    except (ValueError, argparse.ArgumentError) as error:  # from a __post_init__, or from a single key
        fail(_readable(error, sys.argv[1:] if argv is None else argv), status=2)


def _readable(error: Exception, argv: list[str]) -> str:
    """The error in one line, with the key that a misspelt one may have been meant for."""
    text = " ".join(str(error).split())
    if text.startswith("Problems parsing config"):  # by YAML, which does not know the file
        text = f"{' '.join(word for word in argv if Path(word.rpartition('=')[2]).is_file())}: {text}"
    known = [name for name, _ in leaves(as_dict(Config()))]
    unknown = re.findall(r"--([\w.]+)", text) if text.startswith("unrecognized arguments") else []
    unknown += [
        f"{group}.{option}" for group, option in re.findall(r"Group '([\w.]+)' does not accept option '(\w+)'", text)
    ]
    for key in unknown:
        if close := get_close_matches(key, known, n=1):
            text += f"; did you mean {close[0]}?"
    return text if unknown or not text.startswith("unrecognized") else f"{text}; keys begin with --"


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all values that are no dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_dict(config: Config) -> dict[str, Any]:
    """Plain nested values, as JSON writes and reads them and `parse` takes them; dtypes by name."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return dtype_name(value) if isinstance(value, torch.dtype) else value
