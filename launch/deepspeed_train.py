"""The recipe of `launch.pretrain` under DeepSpeed. Two CPU processes (needs g++ and ninja), or one a GPU:

    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 --module launch.deepspeed_train --config configs/quickstart.yaml
    deepspeed --num_gpus 8 --module launch.deepspeed_train --config configs/llama_1b_gpu.yaml
    torchrun --standalone --nproc_per_node=2 -m launch.deepspeed_train --config configs/quickstart.yaml

The engine's settings come from configs/deepspeed/engine.json, batch sizes and clipping from the recipe's own config. A
launch of your own names the optimizer in its JSON instead: configs/deepspeed/distmuon.json and `register()`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from distmuon.integrations.deepspeed import initialize
from launch.failures import run_program
from launch.models import next_token_loss
from launch.run import Run
from launch.under_trainer import open_run

ENGINE = Path(__file__).parents[1] / "configs" / "deepspeed" / "engine.json"


def train(run: Run) -> None:
    """One run; the engine divides the loss by the accumulation, clips, steps optimizer and scheduler."""
    settings = {
        **json.loads(ENGINE.read_text()),
        "train_micro_batch_size_per_gpu": run.config.train.micro_batch,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": run.config.train.max_grad_norm or 0.0,
        "bf16": {"enabled": run.config.model.dtype == "bfloat16"},
    }
    optimizer = run.optimizer()
    scheduler = run.scheduler(optimizer)
    engine, *_ = initialize(model=run.model, config=settings, optimizer=optimizer, lr_scheduler=scheduler)
    run.start(optimizer, scheduler)
    for step, batches in run.batches():
        total = torch.zeros((), device=run.ranks.device)
        for tokens in batches:
            loss = next_token_loss(engine, tokens)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(batches)
        run.record(step, total, optimizer, engine.get_global_grad_norm())
    run.finish(optimizer)


def main(argv: list[str] | None = None) -> None:
    """Run what the command line describes. DeepSpeed's launcher adds --local_rank to it, which LOCAL_RANK says too."""
    given = sys.argv[1:] if argv is None else argv
    with open_run("deepspeed", [word for word in given if not word.startswith("--local_rank=")]) as run:
        train(run)


if __name__ == "__main__":
    run_program(main)
