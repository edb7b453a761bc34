"""How the recipes under other trainers open the run of `launch.run`.

Each `*_train.py` shows its trainer's own loop and nothing else. Only `launch.pretrain` saves on SIGTERM.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from distmuon.errors import problem
from launch.config import parse
from launch.logs import open_log
from launch.ranks import launched_ranks
from launch.resume import StopRequest
from launch.run import Run, make_run


@contextmanager
def open_run(trainer: str, argv: list[str] | None = None) -> Iterator[Run]:
    """Processes, data, model and records of the run that the command line describes."""
    config = parse(argv)
    if config.parallel.shard != "zero1":
        raise problem(
            "parallel.shard",
            found=f"found {config.parallel.shard} under {trainer}",
            needed="a trainer shards by its own settings, if at all",
            cure="leave parallel.shard out, or run launch.pretrain",
        )
    with launched_ranks() as ranks, open_log(config.log, rank=ranks.rank, steps=config.train.steps) as log:
        yield make_run(config, ranks, log, StopRequest(), trainer)
        gc.collect()  # trainers keep the optimizer in reference cycles; it must go before the process group does
