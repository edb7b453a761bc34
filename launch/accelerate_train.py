"""The recipe of `launch.pretrain` under Hugging Face accelerate. Two CPU processes, or one a GPU:

OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 -m launch.accelerate_train --config configs/quickstart.yaml
torchrun --standalone --nproc_per_node=8 -m launch.accelerate_train --config configs/llama_1b_gpu.yaml
"""

from __future__ import annotations

import torch
from accelerate import Accelerator

from distmuon.integrations.accelerate import prepare
from launch.failures import run_program
from launch.models import next_token_loss
from launch.run import Run
from launch.under_trainer import open_run


def train(run: Run) -> None:
    """One run; the accelerator divides the loss by the accumulation."""
    accelerator = Accelerator(cpu=run.ranks.device.type == "cpu", gradient_accumulation_steps=run.accumulation)
    optimizer = run.optimizer()
    scheduler = run.scheduler(optimizer)  # stepped here: accelerate would step it once for every process
    model, prepared = prepare(accelerator, run.model, optimizer)
    run.start(optimizer, scheduler)
    max_norm = run.config.train.max_grad_norm
    for step, batches in run.batches():
        total, grad_norm = torch.zeros((), device=run.ranks.device), None
        for tokens in batches:
            with accelerator.accumulate(model):
                loss = next_token_loss(model, tokens)
                accelerator.backward(loss)
                if accelerator.sync_gradients and max_norm is not None:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
                prepared.step()
                prepared.zero_grad()
            total += loss.detach() / len(batches)
        scheduler.step()
        run.record(step, total, optimizer, grad_norm)
    run.finish(optimizer)


def main(argv: list[str] | None = None) -> None:
    """Run what the command line describes."""
    with open_run("accelerate", argv) as run:
        train(run)


if __name__ == "__main__":
    run_program(main)
