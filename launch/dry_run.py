"""Everything of a run that can be checked without taking a step, in one process: for `launch.pretrain --dry-run RANKS`.

Reads the config, the data and the first batch, builds the model on the meta device, routes its parameters and plans
memory and traffic for that many ranks. Raises what the run would raise.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

import distmuon
from distmuon.errors import problem
from launch.config import Config
from launch.data import open_corpus
from launch.models import build_model, num_parameters
from launch.parallel import check_model
from launch.resume import FOLDER
from launch.run import optimizer_options
from launch.sinks import sink_class

GIB = 1 << 30


def dry_run(config: Config, world_size: int) -> str:
    """What the run would be on `world_size` ranks, as a text."""
    train, parallel = config.train, config.parallel
    for name in config.log.sinks:
        sink_class(name)
    replicas, shards, tp = parallel.mesh_shape(world_size)
    data_size = replicas * shards
    accumulation = train.accumulation(data_size)
    corpus = open_corpus(config)
    with torch.device("meta"):
        model = build_model(config.model, corpus.vocab_size)
    check_model(model, parallel)
    corpus.check_ids_below(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    corpus.train.next_batch(train.global_batch, 0, 1)
    num_val = len(corpus.val.gather(corpus.val.spread(train.eval_batches * train.global_batch)))
    tokens = train.global_batch * config.model.seq_len
    lines = [
        f"{config.model.arch}: {num_parameters(model):,} parameters",
        f"ranks: {world_size} ({replicas} replicas x {shards} shards x tp {tp}), sharding {parallel.shard}",
        f"step: {tokens:,} tokens, {accumulation} micro-batches of {train.micro_batch} sequences a rank",
        f"run: {train.steps:,} steps, {train.steps * tokens:,} tokens" + _epochs(config, corpus.about),
        f"validation: {num_val} windows of {config.model.seq_len} tokens",
        _memory(config, model, data_size),
        _folder(Path(config.log.dir), config.checkpoint.every),
        *(f"warning: {text}" for text in [*config.warnings(), *corpus.warnings]),
    ]
    return "\n".join(lines)


def _epochs(config: Config, about: dict[str, object]) -> str:
    windows = about.get("train_windows")
    if not isinstance(windows, int):
        return ""
    return f", {config.train.steps * config.train.global_batch / windows:.2f} epochs of {windows:,} windows"


def _memory(config: Config, model: nn.Module, data_size: int) -> str:
    options, parallel = optimizer_options(config), config.parallel
    plan = distmuon.plan(
        model,
        dp_size=data_size,
        shard=parallel.shard,
        replicas=parallel.replicas,
        tp=parallel.tp,
        routes=options.get("routes"),
        sharding=options["sharding"],
        precision=options["precision"],
        hardware=None,
        compare=False,
    )
    held = plan.fullest
    parts = f"parameters {held.parameters + held.staged:,}, gradients {held.gradients:,}, state {held.state:,}"
    return (
        f"memory of the fullest rank: {held.total / GIB:.3f} GiB without activations (bytes: {parts}, in a step "
        f"{held.transient:,} more); the optimizer sends {plan.sent:,} bytes a step from the busiest rank"
    )


def _folder(folder: Path, every: int) -> str:
    newest = distmuon.latest_checkpoint(folder / FOLDER)
    if newest is not None:
        return f"log.dir {folder}: goes on from {newest}" if every else f"log.dir {folder}: refused, it holds {newest}"
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not os.access(existing, os.W_OK):
        raise problem(
            "log.dir", found=f"found {folder}", needed="a folder that can be written is needed", cure="set log.dir"
        )
    return f"log.dir {folder}: a new run"
