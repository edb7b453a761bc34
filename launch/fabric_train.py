"""The recipe of `launch.pretrain` under Lightning Fabric. Two CPU processes, or one a GPU:

PYTHONPATH=. fabric run --accelerator cpu --devices 2 launch/fabric_train.py --config configs/quickstart.yaml
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 -m launch.fabric_train --config configs/quickstart.yaml
torchrun --standalone --nproc_per_node=8 -m launch.fabric_train --config configs/llama_1b_gpu.yaml
"""

from __future__ import annotations

import os

import torch
from lightning_fabric import Fabric

from distmuon.integrations.fabric import DistMuonStrategy, setup
from launch.failures import run_program
from launch.models import next_token_loss
from launch.run import Run
from launch.under_trainer import open_run


def train(run: Run) -> None:
    """One run."""
    fabric = Fabric(
        accelerator="cpu" if run.ranks.device.type == "cpu" else "cuda",
        devices=run.ranks.world_size,
        strategy=DistMuonStrategy(),
    )
    if "LT_CLI_USED" not in os.environ:  # `fabric run` has launched already, and Fabric refuses a second time
        fabric.launch()
    optimizer = run.optimizer()
    scheduler = run.scheduler(optimizer)
    model, wrapped = setup(fabric, run.model, optimizer)
    run.start(optimizer, scheduler)
    max_norm = run.config.train.max_grad_norm
    for step, batches in run.batches():
        total, grad_norm = torch.zeros((), device=run.ranks.device), None
        for number, tokens in enumerate(batches, start=1):
            with fabric.no_backward_sync(model, enabled=number < len(batches)):
                loss = next_token_loss(model, tokens) / len(batches)
                fabric.backward(loss)
            total += loss.detach()
        if max_norm is not None:
            grad_norm = fabric.clip_gradients(model, wrapped, max_norm=max_norm)
        wrapped.step()
        wrapped.zero_grad()
        scheduler.step()
        run.record(step, total, optimizer, grad_norm)
    run.finish(optimizer)


def main(argv: list[str] | None = None) -> None:
    """Run what the command line describes."""
    with open_run("fabric", argv) as run:
        train(run)


if __name__ == "__main__":
    run_program(main)
