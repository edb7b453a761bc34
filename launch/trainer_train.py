"""The recipe of `launch.pretrain` under transformers.Trainer. Two CPU processes, or one a GPU:

    torchrun --standalone --nproc_per_node=2 -m launch.trainer_train --config configs/quickstart.yaml
    torchrun --standalone --nproc_per_node=8 -m launch.trainer_train --config configs/llama_1b_gpu.yaml

The Trainer gets this rank's micro-batches from the recipe's own reader, so the data are those of the other recipes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from distmuon.integrations.transformers import attach
from launch.failures import run_program
from launch.models import next_token_loss
from launch.run import Run, optimizer_options
from launch.under_trainer import open_run


class RecipeTrainer(transformers.Trainer):
    """`run`'s batches and loss."""

    run: Run

    def get_train_dataloader(self) -> Any:
        return _MicroBatches(self.run)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        return next_token_loss(model, inputs["tokens"])

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        assert self.optimizer is not None
        self.lr_scheduler = self.run.scheduler(self.optimizer)
        return self.lr_scheduler


class _MicroBatches:
    """Sized and iterable, as the Trainer asks of a loader."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __len__(self) -> int:
        return self.run.config.train.steps * self.run.accumulation

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _, batches in self.run.batches():
            yield from ({"tokens": tokens} for tokens in batches)


class _Record(transformers.TrainerCallback):
    """The Trainer's own log, in the recipe's records. Its loss is the mean over the ranks already.

    The Trainer counts the steps of this start, the recipe those of the run.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.begin = run, 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        self.run.start(getattr(optimizer, "optimizer", optimizer), lr_scheduler)
        self.begin = self.run.progress.step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self.begin + state.global_step >= args.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **_: Any) -> None:
        if "grad_norm" in logs:
            norm = torch.as_tensor(logs["grad_norm"], device=self.run.ranks.device)
            loss = torch.as_tensor(logs["loss"], device=self.run.ranks.device)
            step = self.begin + state.global_step
            self.run.record(step, loss, getattr(optimizer, "optimizer", optimizer), norm)


def train(run: Run) -> None:
    """One run."""
    train = run.config.train
    args = transformers.TrainingArguments(
        output_dir=run.config.log.dir,
        max_steps=train.steps,
        gradient_accumulation_steps=run.accumulation,
        max_grad_norm=train.max_grad_norm or 0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=run.ranks.device.type == "cpu",
        disable_tqdm=True,
        seed=train.seed,
    )
    trainer = RecipeTrainer(model=run.model, args=args, callbacks=[_Record(run)])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.run = run
    attach(trainer, **optimizer_options(run.config))  # they go before the lr, decay and betas of `args`
    trainer.train()
    optimizer: Any = trainer.optimizer
    run.finish(getattr(optimizer, "optimizer", optimizer))


def main(argv: list[str] | None = None) -> None:
    """Run what the command line describes."""
    with open_run("transformers", argv) as run:
        train(run)


if __name__ == "__main__":
    run_program(main)
