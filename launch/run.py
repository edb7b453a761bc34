"""One run between its first and its last record, whatever loop takes its steps.

`launch.pretrain` and the recipes under trainers differ in how they take a step; all the rest is here: model, data,
schedule, records, validations, checkpoints, and the end. So with `--checkpoint.every N` a run that one of them began
goes on under any other, by the same config. Decides nothing about training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import distmuon
from distmuon.errors import problem
from launch.config import Config, TrainConfig, as_dict
from launch.data import Corpus, TokenWindows, open_corpus
from launch.diagnosis import first_not_finite
from launch.flops import mfu_of_a_token_per_s
from launch.logs import RunLog, StepMeter, duration
from launch.models import build_model, next_token_loss, num_parameters
from launch.provenance import provenance
from launch.ranks import Ranks
from launch.resume import Checkpoints, Progress, StopRequest
from launch.samples import sample
from launch.schedules import lr_lambda
from launch.watch import Watch

CONFIG_FILE = "config.yaml"
ROUTING_FILE = "routing.txt"
SKIPPED = "No weight has changed; if it goes on, lower optimizer.lr or lengthen train.warmup_steps"


@dataclass
class Run:
    """A run between its first and its last record."""

    config: Config
    ranks: Ranks
    log: RunLog
    stop: StopRequest
    corpus: Corpus
    model: nn.Module
    trainer: str
    """Who takes the steps."""
    meter: StepMeter
    progress: Progress = field(default_factory=Progress)
    stopped: bool = False
    """Somebody asked this run to stop, and it has saved."""
    _began: float = 0.0
    _checkpoints: Checkpoints | None = None
    _watch: Watch | None = None
    _steps_here: int = 0
    """Steps of this start, which the optimizer counts."""
    _batches: Sequence[Tensor] = ()
    """Those of the step in progress."""
    _skipped_here: int = 0
    """Steps skipped since this start."""
    _skipped_in_a_row: int = 0

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank and step."""
        return self.config.train.accumulation(self.ranks.data_size)

    def optimizer(self, **options: Any) -> distmuon.DistMuon:
        """The configured one, on the run's model; `options` as `DistMuon` takes them."""
        return distmuon.DistMuon(self.model, **optimizer_options(self.config), **options)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lr_lambda(self.config.train))

    def start(self, optimizer: distmuon.DistMuon, scheduler: LRScheduler) -> None:
        """Go on from the newest checkpoint in `log.dir`, if any. Once the trainer has prepared what it wraps."""
        self._checkpoints = Checkpoints(self.config, self.model, optimizer, scheduler, self.corpus.train)
        self.progress = self._checkpoints.resume(self.ranks)
        self.log.begin(self.progress.step)
        self._watch = Watch(self.model, self.config.log.telemetry_every, compiled=self.config.model.compile)
        self._began = time.perf_counter()
        count, report = num_parameters(self.model), optimizer.report()
        self.log.write(
            "run",
            config=as_dict(self.config),
            trainer=self.trainer,
            world_size=self.ranks.world_size,
            device=self.ranks.device.type,
            **provenance(),
            accumulation=self.accumulation,
            num_parameters=count,
            data=self.corpus.about,
            report=report,
            resumed_from=self.progress.step,
        )
        if self.log.folder is not None:
            _describe(self.log.folder, self.config, self.model, optimizer)
        self.tell(f"{self.config.model.arch}: {count:,} parameters on {self.ranks.world_size} ranks\n{report}")
        for text in [*self.config.warnings(), *self.corpus.warnings]:
            self.log.write("warning", step=self.progress.step, text=text)
        if self.progress.step == 0:
            self._validate(0)
            return
        self._go_on_with_the_schedule(optimizer, self._checkpoints.saved_train)
        # A validation that fails must not do so hours from now.
        self._mean_loss(self.corpus.val.spread(self.ranks.data_size))
        if self.progress.step >= self.config.train.steps:
            self.tell(f"already at step {self.progress.step} of {self.config.train.steps}; raise train.steps to go on")

    def _go_on_with_the_schedule(self, optimizer: distmuon.DistMuon, saved: dict[str, Any]) -> None:
        """Let the next step have the learning rate of this start's schedule, and say so if that is a jump."""
        step = self.progress.step
        known = {key.name: saved[key.name] for key in fields(TrainConfig) if key.name in saved}
        ratio, before = lr_lambda(self.config.train)(step), lr_lambda(TrainConfig(**known))(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * ratio
        if abs(ratio - before) > 0.01 * max(ratio, before):
            lr = optimizer.param_groups[0]["initial_lr"]
            text = f"the learning rate of step {step + 1} is {lr * ratio:.2e}; it was to be {lr * before:.2e} when the "
            text += f"checkpoint was saved, with train.steps {saved['steps']} instead of {self.config.train.steps}"
            self.log.write("warning", step=step, text=text)

    def batches(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """(step, this rank's micro-batches) to the end of the run, or until it is asked to stop."""
        train, ranks = self.config.train, self.ranks
        self.meter.restart()
        for step in range(self.progress.step + 1, train.steps + 1):
            rows = self.corpus.train.next_batch(train.global_batch, ranks.data_rank, ranks.data_size)
            self._batches = ranks.put(rows).split(train.micro_batch)
            assert self._watch is not None
            self._steps_here += 1
            self._watch.begin(self._steps_here)
            yield step, self._batches
            if self.stopped:
                return

    def record(self, step: int, loss: Tensor, optimizer: distmuon.DistMuon, grad_norm: Tensor | None) -> None:
        """After a step: records, validations and checkpoints that are due. `loss`: this rank's mean over the step.

        `grad_norm`: None where a trainer has not computed it. Raises when too many steps were skipped.
        """
        train, last = self.config.train, step == self.config.train.steps
        if grad_norm is None:
            grad_norm = torch.tensor(optimizer.metrics()["grad_norm"], device=self.ranks.device)
        ratio = lr_lambda(train)(step - 1)  # the schedule has moved on by now
        lr = {group["rule"]: group["initial_lr"] * ratio for group in reversed(optimizer.param_groups)}
        self.meter.add(step, loss=loss, lr=lr, grad_norm=grad_norm)
        assert self._watch is not None and self._checkpoints is not None
        if (measured := self._watch.record(optimizer, self.ranks)) is not None:
            self.log.write("telemetry", step=step, **measured)
        validating, stopping = step % train.eval_every == 0 or last, False
        if validating or step % self.config.log.every == 0:
            stopping = self.config.checkpoint.every > 0 and self.stop.agreed(self.ranks)
            self._close_interval(step, optimizer)
        if validating:
            self._validate(step)
        self.progress = replace(self.progress, step=step)
        if self._checkpoints.due(step, stopping):
            self._checkpoints.save(self.progress)
            self.meter.restart()
        self.stopped = stopping and not last
        if last or self.stopped:
            self._checkpoints.finish()

    def _close_interval(self, step: int, optimizer: distmuon.DistMuon) -> None:
        """Read the device; write the records of the steps since the last time, and look for skipped ones."""
        metrics, records = optimizer.metrics(), self.meter.flush()
        new = metrics["skipped_steps"] - self._skipped_here
        first = new > 0 and self._skipped_here == 0
        self._skipped_here += new
        skipped = self.progress.skipped_steps + new
        self.progress = replace(self.progress, train_loss=records[-1]["loss"], skipped_steps=skipped)
        peak = _peak_bytes(self.ranks.device)
        for record in records:
            # the times of the stages are those of the last step
            times = {"stage_ms": metrics["stage_ms"]} if record["step"] == step else {}
            self.log.write("train", **record, skipped_steps=skipped, peak_bytes=peak, bytes=metrics["bytes"], **times)
        if new == len(records):
            self._skipped_in_a_row += new
        else:
            healthy = [isfinite(record["grad_norm"]) for record in reversed(records)]
            self._skipped_in_a_row = min(new, healthy.index(True)) if True in healthy else new
        why = self._why_skipped(step, optimizer) if first else ""
        if first:
            self.log.write("warning", step=step, text=f"{why}. {SKIPPED}")
        most = self.config.train.max_skipped
        if most and self._skipped_in_a_row >= most:
            raise problem(
                "train.max_skipped",
                found=f"the last {self._skipped_in_a_row} steps up to step {step} were skipped",
                needed="a run learns only from finite gradients",
                cure="lower optimizer.lr, lengthen train.warmup_steps, or go back to an earlier checkpoint; 0 never "
                "ends the run",
            )

    def _why_skipped(self, step: int, optimizer: distmuon.DistMuon) -> str:
        """Say which of the last interval's steps were skipped, and what was first not finite. Collective."""
        if not optimizer.overflow:
            return (
                f"some of the last {self.config.log.every} steps up to step {step} were skipped: their gradients were "
                "not finite; log.every 1 names the parameter"
            )
        if self.trainer != "pretrain":
            return f"step {step} was skipped: its gradients were not finite; launch.pretrain names the parameter"
        found = first_not_finite(self.model, optimizer, self._batches, self.ranks)
        self.meter.restart()
        return f"step {step} was skipped: its gradients were not finite, {found}"

    def finish(self, optimizer: distmuon.DistMuon) -> None:
        """The last record; or, of a run that was asked to stop, a word on how it goes on."""
        if self.stopped:
            step, asked = self.progress.step, self.stop.agreed_signal
            self.tell(f"stopped after step {step}, as {asked} asked; the same command goes on from there")
            self.stop.leave()
            return
        metrics, seconds = optimizer.metrics(), time.perf_counter() - self._began
        self.log.write(
            "summary",
            steps=self.config.train.steps,
            train_loss=self.progress.train_loss,
            val_loss=self.progress.val_loss,
            seconds=seconds,
            skipped_steps=self.progress.skipped_steps,
            peak_bytes=self.ranks.gather(_peak_bytes(self.ranks.device)),
            per_rank=self.ranks.gather({key: metrics[key] for key in ("state_bytes", "bytes", "calls", "ns_matrices")}),
        )
        skipped = f", {self.progress.skipped_steps} steps skipped" if self.progress.skipped_steps else ""
        folder, sinks = self.config.log.dir, self.config.log.sinks
        look = f"look at {folder}/report.html" if "report" in sinks else f"see it: python -m distmuon report {folder}"
        self.tell(f"finished after {duration(seconds)}{skipped}; records in {folder}\n{look}")

    def tell(self, text: str) -> None:
        """Print on rank 0."""
        _tell(self.ranks, text)

    def _validate(self, step: int) -> None:
        train = self.config.train
        loss = self._mean_loss(self.corpus.val.spread(train.eval_batches * train.global_batch))
        self.progress = replace(self.progress, val_loss=loss)
        self.log.write("val", step=step, loss=loss)
        if self.config.log.sample_tokens and self.corpus.tokenizer is not None:
            text = sample(self.model, self.corpus.tokenizer, self.config, self.ranks)
            self.log.write("sample", step=step, prompt=self.config.log.sample_prompt, text=text)
        self.meter.restart()

    def _mean_loss(self, indices: Sequence[int]) -> float:
        return validate(self.model, self.corpus.val, indices, self.config.train.micro_batch, self.ranks)


def _tell(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(text, flush=True)


def _peak_bytes(device: torch.device) -> int | None:
    """The most memory that tensors took on this rank's GPU; None without one."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _describe(folder: Path, config: Config, model: Any, optimizer: distmuon.DistMuon) -> None:
    """What a later reader needs: a config that runs again, the model's own, and the rule of each parameter."""
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(as_dict(config), sort_keys=False), encoding="utf-8")
    (folder / ROUTING_FILE).write_text(optimizer.report(full=True) + "\n", encoding="utf-8")
    model.config.save_pretrained(folder)


def make_run(config: Config, ranks: Ranks, log: RunLog, stop: StopRequest, trainer: str) -> Run:
    """Model and data of a run, by the seed alone."""
    config.train.accumulation(ranks.data_size)  # raises before anything is read
    torch.manual_seed(config.train.seed)
    _tell(ranks, f"reading data ({config.data.source}) ...")
    corpus = open_corpus(config)
    _tell(ranks, f"building the model ({config.model.arch}) ...")
    model: Any = build_model(config.model, corpus.vocab_size).to(ranks.device)
    corpus.check_ids_below(model.config.vocab_size)
    meter = StepMeter(
        tokens_per_step=config.train.global_batch * config.model.seq_len,
        average=lambda losses: ranks.sum(losses) / ranks.world_size,
        mfu_of_a_token_per_s=mfu_of_a_token_per_s(config.model, corpus.vocab_size, ranks),
    )
    torch.manual_seed(config.train.seed + 1 + ranks.data_rank)  # dropout, if the model has any, differs by batch
    return Run(config, ranks, log, stop, corpus, model, trainer, meter)


@torch.no_grad()
def validate(model: nn.Module, windows: TokenWindows, indices: Sequence[int], micro_batch: int, ranks: Ranks) -> float:
    """Mean loss over the given windows; every rank computes its share and gets the mean over all."""
    if len(indices) < ranks.data_size:
        raise ValueError(
            f"validation: found {len(indices)} windows for {ranks.data_size} ranks; each needs one; add data"
        )
    model.eval()
    mine, most = indices[ranks.data_rank :: ranks.data_size], len(indices[:: ranks.data_size])
    loss_and_rows = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for begin in range(0, most, micro_batch):
        # A forward of FSDP2 is collective: a rank without a window left computes one again and does not count it.
        counted = mine[begin : begin + micro_batch]
        tokens = ranks.put(windows.gather(counted or mine[:1]))
        loss_and_rows[0] += next_token_loss(model, tokens) * len(counted)
        loss_and_rows[1] += len(counted)
    model.train()
    loss, rows = ranks.sum(loss_and_rows).tolist()
    return float(loss / rows)


def optimizer_options(config: Config) -> dict[str, Any]:
    """The keywords of `DistMuon` as configured. The baseline is the same class with every parameter sent to AdamW."""
    given = config.optimizer
    names = [field.name for field in fields(given) if field.name not in ("name", "routes")]
    options: dict[str, Any] = {name: getattr(given, name) for name in names}
    if given.name == "adamw":
        options["routes"] = "adamw"
    elif given.routes:
        options["routes"] = [distmuon.Route(**asdict(route)) for route in given.routes]
    sharded = config.parallel.shard != "zero1"
    if given.sharding.overlap == "forward" and (sharded or config.model.compile):
        # FSDP2 gathers in its own forward; and waits in every module would break torch.compile's graphs at each
        options["sharding"] = replace(given.sharding, overlap=True)
    if sharded:  # FSDP2 reduces as `shard_model` told it to
        options["precision"] = replace(given.precision, reduce=torch.float32)
    return {**options, "verify_every": config.train.verify_every, "telemetry_every": config.log.telemetry_every}
