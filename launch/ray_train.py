"""The recipe of `launch.pretrain` on a Ray cluster: one worker a GPU, or a number of CPU processes.

    python -m launch.ray_train --workers 2 --config configs/quickstart.yaml                  # CPUs of this machine
    python -m launch.ray_train --workers 16 --gpu --config configs/llama_1b_gpu.yaml --checkpoint.every 500

Ray Train places the workers, makes the process group and starts all workers again if one of them is lost; with
`--checkpoint.every` the run then goes on from its newest checkpoint. `log.dir` must be on a file system that all nodes
see, and so must this repository. Everything but the arguments of this file goes to the recipe.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from launch.config import parse
from launch.failures import run_program
from launch.logs import open_log
from launch.pretrain import train
from launch.ranks import launched_ranks
from launch.resume import StopRequest
from launch.run import make_run

ROOT = Path(__file__).parents[1]


def work(settings: dict[str, Any]) -> None:
    """One worker, whose process group Ray has made: the run that `settings["argv"]` describes."""
    os.chdir(settings["folder"])
    config = parse(settings["argv"])
    # Ray calls this in a thread, where no signal arrives: Ray's own restart takes the place of a save at SIGTERM.
    with (
        launched_ranks(config.parallel) as ranks,
        open_log(config.log, rank=ranks.rank, steps=config.train.steps) as log,
    ):
        train(make_run(config, ranks, log, StopRequest(), "ray"))


def main(argv: list[str] | None = None) -> None:
    """Start the workers, wait for them; raises what a worker raised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, on whichever nodes have room")
    parser.add_argument("--gpu", action="store_true", help="one GPU a worker, and NCCL; else CPUs and gloo")
    parser.add_argument("--max_failures", type=int, default=3, help="how often all workers are started again")
    given, rest = parser.parse_known_args(argv)
    config = parse(rest)  # a mistake is found here, not on every worker
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it each line that a worker prints arrives twice
    }
    ray.init(ignore_reinit_error=True, runtime_env={"env_vars": variables})
    trainer = TorchTrainer(
        work,
        train_loop_config={"argv": rest, "folder": os.getcwd()},
        torch_config=TorchConfig(backend="nccl" if given.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=ray.train.RunConfig(
            storage_path=str(Path(config.log.dir, "ray").absolute()),
            failure_config=ray.train.FailureConfig(max_failures=given.max_failures),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    run_program(main)
