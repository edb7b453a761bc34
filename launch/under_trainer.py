"""What the recipes under other trainers share: one run's model, data, schedule, records and checkpoints.

All as in `launch.pretrain`: with `--checkpoint.every N` a run that one of them began goes on under any other, by the
same config. (Only pretrain saves on SIGTERM.) Decides nothing about training; each `*_train.py` shows its trainer's own
loop and nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import distmuon
from launch.config import Config, as_dict, parse
from launch.data import Corpus, open_corpus
from launch.logs import RunLog, StepMeter, open_log
from launch.models import build_model, num_parameters
from launch.pretrain import optimizer_options, validate
from launch.ranks import Ranks, launched_ranks
from launch.resume import Checkpoints, Progress
from launch.schedules import lr_lambda


@dataclass
class Run:
    """A run between its first and its last record."""

    config: Config
    ranks: Ranks
    log: RunLog
    corpus: Corpus
    model: nn.Module
    trainer: str
    meter: StepMeter
    progress: Progress = field(default_factory=Progress)
    checkpoints: Checkpoints | None = None

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank and step."""
        return self.config.train.accumulation(self.ranks.world_size)

    def optimizer(self, **options: Any) -> distmuon.DistMuon:
        """The configured one, on the run's model; `options` as `DistMuon` takes them."""
        return distmuon.DistMuon(self.model, **optimizer_options(self.config), **options)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lr_lambda(self.config.train))

    def start(self, optimizer: distmuon.DistMuon, scheduler: LRScheduler) -> None:
        """Go on from the newest checkpoint in `log.dir`, if any. Once the trainer has prepared what it wraps."""
        self.checkpoints = Checkpoints(self.config, self.model, optimizer, scheduler, self.corpus.train)
        self.progress = self.checkpoints.resume(self.ranks)
        self.log.rewind(self.progress.step)
        about = {"trainer": self.trainer, "world_size": self.ranks.world_size, "accumulation": self.accumulation}
        about |= {"num_parameters": num_parameters(self.model), "resumed_from": self.progress.step}
        self.log.write("run", config=as_dict(self.config), **about)
        if self.progress.step == 0:
            self._validate(0)

    def batches(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """(step, this rank's micro-batches) to the end of the run: the order of `launch.pretrain`."""
        train = self.config.train
        self.meter.restart()
        for step in range(self.progress.step + 1, train.steps + 1):
            rows = self.corpus.train.next_batch(train.global_batch, self.ranks.rank, self.ranks.world_size)
            yield step, rows.to(self.ranks.device).split(train.micro_batch)

    def record(self, step: int, loss: Tensor, optimizer: distmuon.DistMuon, grad_norm: Tensor | None) -> None:
        """After a step: records, validations and checkpoints that are due. `loss`: this rank's mean over the step."""
        train, last = self.config.train, step == self.config.train.steps
        ratio = lr_lambda(train)(step - 1)  # some trainers have moved the schedule on by now
        lr = {group["rule"]: group["initial_lr"] * ratio for group in reversed(optimizer.param_groups)}
        self.meter.add(step, loss=loss, lr=lr, grad_norm=grad_norm)
        validating = step % train.eval_every == 0 or last
        if validating or step % self.config.log.every == 0:
            stage_bytes = optimizer.metrics()["bytes"]
            for record in self.meter.flush():
                self.progress = replace(self.progress, train_loss=record["loss"])
                self.log.write("train", **record, bytes=stage_bytes)
        if validating:
            self._validate(step)
        self.progress = replace(self.progress, step=step)
        assert self.checkpoints is not None
        if self.checkpoints.due(step, stop=False):
            self.checkpoints.save(self.progress)
            self.meter.restart()
        if last:
            self.checkpoints.finish()

    def _validate(self, step: int) -> None:
        train = self.config.train
        indices = self.corpus.val.spread(train.eval_batches * train.global_batch)
        loss = validate(self.model, self.corpus.val, indices, train.micro_batch, self.ranks)
        self.progress = replace(self.progress, val_loss=loss)
        self.log.write("val", step=step, loss=loss)
        self.meter.restart()


@contextmanager
def open_run(trainer: str, argv: list[str] | None = None) -> Iterator[Run]:
    """Processes, data, model and records of the run that the command line describes."""
    config = parse(argv)
    with launched_ranks() as ranks, open_log(config.log, rank=ranks.rank, steps=config.train.steps) as log:
        torch.manual_seed(config.train.seed)
        corpus = open_corpus(config)
        model = build_model(config.model, corpus.vocab_size).to(ranks.device)
        meter = StepMeter(
            tokens_per_step=config.train.global_batch * config.model.seq_len,
            average=lambda losses: ranks.sum(losses) / ranks.world_size,
        )
        torch.manual_seed(config.train.seed + 1 + ranks.rank)  # dropout, if the model has any, differs by rank
        yield Run(config, ranks, log, corpus, model, trainer, meter)
        gc.collect()  # trainers keep the optimizer in reference cycles; it must go before the process group does
