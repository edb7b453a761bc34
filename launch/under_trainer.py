"""What the recipes under other trainers share: one run's model, data, schedule and records, as in `launch.pretrain`.

Decides nothing about training; each `*_train.py` shows its trainer's own loop and nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import distmuon
from launch.config import Config, as_dict, parse
from launch.data import Corpus, open_corpus
from launch.logs import RunLog, StepMeter, open_log
from launch.models import build_model, num_parameters
from launch.pretrain import build_optimizer, validate
from launch.ranks import Ranks, launched_ranks
from launch.schedules import lr_lambda


@dataclass
class Run:
    """A run between its first and its last record."""

    config: Config
    ranks: Ranks
    log: RunLog
    corpus: Corpus
    model: nn.Module
    accumulation: int
    meter: StepMeter

    def optimizer(self) -> distmuon.DistMuon:
        """The configured one, on the run's model."""
        return build_optimizer(self.config.optimizer, self.model)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lr_lambda(self.config.train))

    def batches(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """(step, this rank's micro-batches) to the end of the run: the order of `launch.pretrain`."""
        train = self.config.train
        self.meter.restart()
        for step in range(1, train.steps + 1):
            rows = self.corpus.train.next_batch(train.global_batch, self.ranks.rank, self.ranks.world_size)
            yield step, rows.to(self.ranks.device).split(train.micro_batch)

    def record(self, step: int, loss: Tensor, optimizer: distmuon.DistMuon, grad_norm: Tensor | None) -> None:
        """`loss`: this rank's mean over its micro-batches."""
        ratio = lr_lambda(self.config.train)(step - 1)  # some trainers have moved the schedule on by now
        lr = {group["rule"]: group["initial_lr"] * ratio for group in reversed(optimizer.param_groups)}
        self.meter.add(step, loss=loss, lr=lr, grad_norm=grad_norm)
        if step % self.config.log.every == 0 or step == self.config.train.steps:
            for record in self.meter.flush():
                self.log.write("train", **record)

    def validate(self, step: int) -> None:
        train = self.config.train
        indices = self.corpus.val.spread(train.eval_batches * train.global_batch)
        loss = validate(self.model, self.corpus.val, indices, train.micro_batch, self.ranks)
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
        accumulation = config.train.accumulation(ranks.world_size)
        about = {"trainer": trainer, "world_size": ranks.world_size, "accumulation": accumulation}
        log.write("run", config=as_dict(config), num_parameters=num_parameters(model), **about)
        yield Run(config, ranks, log, corpus, model, accumulation, meter)
        gc.collect()  # trainers keep the optimizer in reference cycles; it must go before the process group does
