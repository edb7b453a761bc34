"""Pretrain a causal language model with `distmuon`, or with its AdamW baseline over the same shards.

    torchrun --standalone --nproc_per_node=2 -m launch.pretrain --config configs/quickstart.yaml
    torchrun --standalone --nproc_per_node=2 -m launch.pretrain --config configs/quickstart.yaml \
        --optimizer.name adamw --optimizer.lr 2e-3 --log.dir runs/adamw
    torchrun --standalone --nproc_per_node=2 -m launch.pretrain --config configs/quickstart.yaml --parallel.shard fsdp2
    python -m launch.pretrain --config configs/quickstart.yaml        # one process, no process group
    python -m launch.pretrain --config configs/llama_1b_gpu.yaml --dry-run 64    # checks everything, takes no step

With `--checkpoint.every N` the run resumes by itself, at any number of ranks and under any `--parallel.shard`, from the
newest complete checkpoint in its folder; so `torchrun --max-restarts 3` needs nothing else, and `--nnodes 2:4` what
docs/reliability.md says.

This file conducts: `train` is the whole run, `train_step` one optimizer step. What a key means stands in
`launch.config`, where the model lies in `launch.parallel`, the data order in `launch.data`, the schedules in
`launch.schedules`, the records in `launch.logs`, resuming and stopping in `launch.resume`; `launch.run` puts them
together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor, nn

import distmuon
from launch.config import parse_program
from launch.dry_run import dry_run
from launch.failures import run_program
from launch.logs import open_log
from launch.models import next_token_loss
from launch.parallel import reduce_in_backward, shard_model
from launch.ranks import launched_ranks
from launch.resume import StopRequest
from launch.run import Run, make_run


def train(run: Run) -> None:
    """One run, from random weights or its newest checkpoint to the summary record, or to a checkpoint at a signal."""
    shard_model(run.model, run.config, run.ranks)
    optimizer = run.optimizer()
    scheduler = run.scheduler(optimizer)
    run.start(optimizer, scheduler)
    for step, batches in run.batches():
        loss, grad_norm = train_step(run.model, optimizer, batches, run.config.train.max_grad_norm)
        scheduler.step()
        run.record(step, loss, optimizer, grad_norm)
    run.finish(optimizer)


def train_step(
    model: nn.Module, optimizer: distmuon.DistMuon, batches: Sequence[Tensor], max_grad_norm: float | None
) -> tuple[Tensor, Tensor]:
    """One optimizer step over this rank's micro-batches.

    Returns this rank's mean loss and the global gradient norm before clipping, both 0-dim and on the device.
    """
    total_loss = torch.zeros((), device=batches[0].device)
    for number, tokens in enumerate(batches, start=1):
        reduce_in_backward(model, optimizer, number == len(batches))
        loss = next_token_loss(model, tokens) / len(batches)
        loss.backward()
        total_loss += loss.detach()
    grad_norm = optimizer.clip_grad_norm_(inf if max_grad_norm is None else max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total_loss, grad_norm


def main(argv: list[str] | None = None) -> None:
    """Run what the command line describes."""
    config, dry = parse_program(argv)
    if dry is not None:
        if os.environ.get("RANK", "0") == "0":
            print(dry_run(config, dry or int(os.environ.get("WORLD_SIZE", "1"))))
        return
    with (
        launched_ranks(config.parallel) as ranks,
        open_log(config.log, rank=ranks.rank, steps=config.train.steps) as log,
        StopRequest().listening(config.checkpoint.every > 0) as stop,
    ):
        train(make_run(config, ranks, log, stop, "pretrain"))


if __name__ == "__main__":
    run_program(main)
