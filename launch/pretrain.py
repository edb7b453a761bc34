"""Pretrain a causal language model with `distmuon`, or with its AdamW baseline over the same shards.

    torchrun --standalone --nproc_per_node=2 -m launch.pretrain --config configs/quickstart.yaml
    torchrun --standalone --nproc_per_node=2 -m launch.pretrain --config configs/quickstart.yaml \
        --optimizer.name adamw --optimizer.lr 2e-3 --log.dir runs/adamw
    python -m launch.pretrain --config configs/quickstart.yaml        # one process, no process group

With `--checkpoint.every N` the run resumes by itself, at any number of ranks, from the newest complete checkpoint in
its folder; so `torchrun --max-restarts 3` needs nothing else, and `--nnodes 2:4` what docs/reliability.md says.

This file conducts: `train` is the whole run, `train_step` one optimizer step. What a key means stands in
`launch.config`, the data order in `launch.data`, the schedules in `launch.schedules`, the records in `launch.logs`,
resuming and stopping in `launch.resume`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import distmuon
from launch.config import Config, as_dict, parse
from launch.data import TokenWindows, open_corpus
from launch.logs import RunLog, StepMeter, open_log
from launch.models import build_model, next_token_loss, num_parameters
from launch.ranks import Ranks, launched_ranks
from launch.resume import Checkpoints, Progress, StopRequest
from launch.schedules import lr_lambda


def train(config: Config, ranks: Ranks, log: RunLog, stop: StopRequest) -> None:
    """One run, from random weights or its newest checkpoint to the summary record, or to a checkpoint at `stop`."""
    cfg = config.train
    accumulation = cfg.accumulation(ranks.world_size)
    torch.manual_seed(cfg.seed)
    corpus = open_corpus(config)
    model = build_model(config.model, corpus.vocab_size).to(ranks.device)
    optimizer = distmuon.DistMuon(model, **optimizer_options(config))
    scheduler = LambdaLR(optimizer, lr_lambda(cfg))
    torch.manual_seed(cfg.seed + 1 + ranks.rank)  # dropout, if the model has any, differs by rank
    checkpoints = Checkpoints(config, model, optimizer, scheduler, corpus.train)
    begin = checkpoints.resume(ranks)
    log.rewind(begin.step)

    meter = StepMeter(
        tokens_per_step=cfg.global_batch * config.model.seq_len,
        average=lambda losses: ranks.sum(losses) / ranks.world_size,
    )
    val_indices = corpus.val.spread(cfg.eval_batches * cfg.global_batch)
    start = time.perf_counter()
    train_loss, val_loss = begin.train_loss, begin.val_loss
    sizes = {"accumulation": accumulation, "num_parameters": num_parameters(model)}
    _write_header(config, ranks, log, **sizes, data=corpus.about, report=optimizer.report(), resumed_from=begin.step)
    if begin.step == 0:
        val_loss = validate(model, corpus.val, val_indices, cfg.micro_batch, ranks)
        log.write("val", step=0, loss=val_loss)

    meter.restart()
    for step in range(begin.step + 1, cfg.steps + 1):
        rows = corpus.train.next_batch(cfg.global_batch, ranks.rank, ranks.world_size)
        batches = rows.to(ranks.device).split(cfg.micro_batch)
        lr = learning_rates(optimizer)
        loss, grad_norm = train_step(model, optimizer, batches, cfg.max_grad_norm)
        scheduler.step()
        meter.add(step, loss=loss, lr=lr, grad_norm=grad_norm)

        validating = step % cfg.eval_every == 0 or step == cfg.steps
        stopping = False
        if validating or step % config.log.every == 0:
            stopping = config.checkpoint.every > 0 and stop.agreed(ranks)
            stage_bytes = optimizer.metrics()["bytes"]
            for record in meter.flush():
                train_loss = record["loss"]
                log.write("train", **record, bytes=stage_bytes)
        if validating:
            val_loss = validate(model, corpus.val, val_indices, cfg.micro_batch, ranks)
            log.write("val", step=step, loss=val_loss)
            meter.restart()
        if checkpoints.due(step, stopping):
            checkpoints.save(Progress(step=step, train_loss=train_loss, val_loss=val_loss))
            meter.restart()
        if stopping and step < cfg.steps:
            checkpoints.finish()
            if ranks.rank == 0:
                print(f"stopped after step {step}, as SIGTERM asked; the same command goes on from there", flush=True)
            stop.leave()
            return
    checkpoints.finish()

    metrics = optimizer.metrics()
    log.write(
        "summary",
        steps=cfg.steps,
        train_loss=train_loss,
        val_loss=val_loss,
        seconds=time.perf_counter() - start,
        skipped_steps=metrics["skipped_steps"],
        per_rank=ranks.gather({key: metrics[key] for key in ("state_bytes", "bytes", "calls", "ns_matrices")}),
    )


def _write_header(config: Config, ranks: Ranks, log: RunLog, **about: Any) -> None:
    """The first record of a run, and its layout on the console."""
    log.write(
        "run",
        config=as_dict(config),
        world_size=ranks.world_size,
        device=ranks.device.type,
        torch=torch.__version__,
        **about,
    )
    if ranks.rank == 0:
        sizes = f"{about['num_parameters']:,} parameters on {ranks.world_size} ranks"
        print(f"{config.model.arch}: {sizes}\n{about['report']}", flush=True)


def train_step(
    model: nn.Module, optimizer: distmuon.DistMuon, batches: Sequence[Tensor], max_grad_norm: float | None
) -> tuple[Tensor, Tensor | None]:
    """One optimizer step over this rank's micro-batches.

    Returns this rank's mean loss and the global gradient norm (None if clipping is off), both 0-dim and on the device.
    """
    total_loss = torch.zeros((), device=batches[0].device)
    for number, tokens in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else optimizer.no_sync():
            loss = next_token_loss(model, tokens) / len(batches)
            loss.backward()  # the last one sets the reduce-scatters off
        total_loss += loss.detach()
    grad_norm = optimizer.clip_grad_norm_(max_grad_norm) if max_grad_norm is not None else None
    optimizer.step()
    optimizer.zero_grad()
    return total_loss, grad_norm


@torch.no_grad()
def validate(model: nn.Module, windows: TokenWindows, indices: Sequence[int], micro_batch: int, ranks: Ranks) -> float:
    """Mean loss over the given windows; every rank computes its share and gets the mean over all."""
    if len(indices) < ranks.world_size:
        raise ValueError(
            f"validation: found {len(indices)} windows for {ranks.world_size} ranks; each needs one; add data"
        )
    model.eval()
    mine = indices[ranks.rank :: ranks.world_size]
    loss_and_rows = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for begin in range(0, len(mine), micro_batch):
        tokens = windows.gather(mine[begin : begin + micro_batch]).to(ranks.device)
        loss_and_rows[0] += next_token_loss(model, tokens) * len(tokens)
        loss_and_rows[1] += len(tokens)
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
    return {**options, "verify_every": config.train.verify_every}


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The lr of each rule's first group."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        rates.setdefault(group["rule"], float(group["lr"]))
    return rates


def main(argv: list[str] | None = None) -> None:
    """Run what the command line describes."""
    config = parse(argv)
    with (
        launched_ranks() as ranks,
        open_log(config.log, rank=ranks.rank, steps=config.train.steps) as log,
        StopRequest().listening(config.checkpoint.every > 0) as stop,
    ):
        train(config, ranks, log, stop)


if __name__ == "__main__":
    main()
