"""One run between its first and its last record, whatever loop takes its steps.

`launch.pretrain` and the recipes under trainers differ in how they take a step; all the rest is here: model, data,
schedule, records, validations, checkpoints, and the end. So with `--checkpoint.every N` a run that one of them began
goes on under any other, by the same config. Decides nothing about training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import distmuon
from launch.config import Config, as_dict
from launch.data import Corpus, TokenWindows, open_corpus
from launch.logs import RunLog, StepMeter
from launch.models import build_model, next_token_loss, num_parameters
from launch.ranks import Ranks
from launch.resume import Checkpoints, Progress, StopRequest
from launch.schedules import lr_lambda


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
        self.log.rewind(self.progress.step)
        self._began = time.perf_counter()
        count, report = num_parameters(self.model), optimizer.report()
        self.log.write(
            "run",
            config=as_dict(self.config),
            trainer=self.trainer,
            world_size=self.ranks.world_size,
            device=self.ranks.device.type,
            torch=torch.__version__,
            accumulation=self.accumulation,
            num_parameters=count,
            data=self.corpus.about,
            report=report,
            resumed_from=self.progress.step,
        )
        self.tell(f"{self.config.model.arch}: {count:,} parameters on {self.ranks.world_size} ranks\n{report}")
        if self.progress.step == 0:
            self._validate(0)

    def batches(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """(step, this rank's micro-batches) to the end of the run, or until it is asked to stop."""
        train, ranks = self.config.train, self.ranks
        self.meter.restart()
        for step in range(self.progress.step + 1, train.steps + 1):
            rows = self.corpus.train.next_batch(train.global_batch, ranks.data_rank, ranks.data_size)
            yield step, rows.to(ranks.device).split(train.micro_batch)
            if self.stopped:
                return

    def record(self, step: int, loss: Tensor, optimizer: distmuon.DistMuon, grad_norm: Tensor | None) -> None:
        """After a step: records, validations and checkpoints that are due. `loss`: this rank's mean over the step."""
        train, last = self.config.train, step == self.config.train.steps
        ratio = lr_lambda(train)(step - 1)  # the schedule has moved on by now
        lr = {group["rule"]: group["initial_lr"] * ratio for group in reversed(optimizer.param_groups)}
        self.meter.add(step, loss=loss, lr=lr, grad_norm=grad_norm)
        validating, stopping = step % train.eval_every == 0 or last, False
        if validating or step % self.config.log.every == 0:
            stopping = self.config.checkpoint.every > 0 and self.stop.agreed(self.ranks)
            stage_bytes = optimizer.metrics()["bytes"]
            for record in self.meter.flush():
                self.progress = replace(self.progress, train_loss=record["loss"])
                self.log.write("train", **record, bytes=stage_bytes)
        if validating:
            self._validate(step)
        self.progress = replace(self.progress, step=step)
        assert self._checkpoints is not None
        if self._checkpoints.due(step, stopping):
            self._checkpoints.save(self.progress)
            self.meter.restart()
        self.stopped = stopping and not last
        if last or self.stopped:
            self._checkpoints.finish()

    def finish(self, optimizer: distmuon.DistMuon) -> None:
        """The last record; or, of a run that was asked to stop, a word on how it goes on."""
        if self.stopped:
            self.tell(f"stopped after step {self.progress.step}, as SIGTERM asked; the same command goes on from there")
            self.stop.leave()
            return
        metrics = optimizer.metrics()
        self.log.write(
            "summary",
            steps=self.config.train.steps,
            train_loss=self.progress.train_loss,
            val_loss=self.progress.val_loss,
            seconds=time.perf_counter() - self._began,
            skipped_steps=metrics["skipped_steps"],
            per_rank=self.ranks.gather({key: metrics[key] for key in ("state_bytes", "bytes", "calls", "ns_matrices")}),
        )

    def tell(self, text: str) -> None:
        """Print on rank 0."""
        if self.ranks.rank == 0:
            print(text, flush=True)

    def _validate(self, step: int) -> None:
        train = self.config.train
        indices = self.corpus.val.spread(train.eval_batches * train.global_batch)
        loss = validate(self.model, self.corpus.val, indices, train.micro_batch, self.ranks)
        self.progress = replace(self.progress, val_loss=loss)
        self.log.write("val", step=step, loss=loss)
        self.meter.restart()


def make_run(config: Config, ranks: Ranks, log: RunLog, stop: StopRequest, trainer: str) -> Run:
    """Model and data of a run, by the seed alone."""
    config.train.accumulation(ranks.data_size)  # raises before anything is read
    torch.manual_seed(config.train.seed)
    corpus = open_corpus(config)
    model = build_model(config.model, corpus.vocab_size).to(ranks.device)
    meter = StepMeter(
        tokens_per_step=config.train.global_batch * config.model.seq_len,
        average=lambda losses: ranks.sum(losses) / ranks.world_size,
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
        tokens = windows.gather(counted or mine[:1]).to(ranks.device)
        loss_and_rows[0] += next_token_loss(model, tokens) * len(counted)
        loss_and_rows[1] += len(counted)
    model.train()
    if isinstance(model, FSDPModule):  # no backward follows, after which it would put its shards back into the model
        model.reshard()
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
    if config.parallel.shard != "zero1":  # FSDP2 gathers in its own forward, and reduces as `shard_model` told it to
        if given.sharding.overlap == "forward":
            options["sharding"] = replace(given.sharding, overlap=True)
        options["precision"] = replace(given.precision, reduce=torch.float32)
    return {**options, "verify_every": config.train.verify_every}
