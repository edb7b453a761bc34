"""The recipe of `launch.pretrain` under Lightning's Trainer. Two CPU processes, or one a GPU:

OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 -m launch.lightning_train --config configs/quickstart.yaml
torchrun --standalone --nproc_per_node=8 -m launch.lightning_train --config configs/llama_1b_gpu.yaml

DDP averages here, as the Trainer wants it. All that is DistMuon's is `configure_optimizers`; the Trainer gets this
rank's micro-batches from the recipe's own reader, so the data are those of the other recipes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

import distmuon
from launch.failures import run_program
from launch.models import next_token_loss
from launch.run import Run
from launch.under_trainer import open_run


class Recipe(lightning.LightningModule):
    """`run`'s model, loss and schedule."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.model = run, run.model
        self.total, self.grad_norm = torch.zeros((), device=run.ranks.device), None

    def configure_optimizers(self) -> Any:
        optimizer = self.run.optimizer(grad_reduction="external")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.run.scheduler(optimizer), "interval": "step"},
        }

    def on_train_start(self) -> None:
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LRScheduler)
        self.run.start(self._muon(), scheduler)

    def training_step(self, batch: tuple[int, Tensor], _index: int) -> Tensor:
        loss: Tensor = next_token_loss(self.model, batch[1])
        self.total += loss.detach() / self.run.accumulation
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Lightning's place for a clip of one's own: its own shows nobody the norm."""
        if gradient_clip_val is not None:
            self.grad_norm = optimizer.clip_grad_norm_(gradient_clip_val)

    def on_train_batch_end(self, _outputs: Any, batch: tuple[int, Tensor], index: int) -> None:
        if (index + 1) % self.run.accumulation == 0:
            self.run.record(batch[0], self.total.clone(), self._muon(), self.grad_norm)
            self.total.zero_()

    def on_train_end(self) -> None:
        self.run.finish(self._muon())

    def _muon(self) -> distmuon.DistMuon:
        """The optimizer inside Lightning's wrapper."""
        wrapper = self.optimizers()
        assert isinstance(wrapper, LightningOptimizer) and isinstance(wrapper.optimizer, distmuon.DistMuon)
        return wrapper.optimizer


class MicroBatches:
    """(step, tokens), sized, so that the Trainer reads none in advance."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __len__(self) -> int:
        return self.run.config.train.steps * self.run.accumulation

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for step, batches in self.run.batches():
            yield from ((step, tokens) for tokens in batches)


def train(run: Run) -> None:
    """One run."""
    ranks = run.ranks
    trainer = lightning.Trainer(
        accelerator="cpu" if ranks.device.type == "cpu" else "cuda",
        devices=ranks.world_size,
        strategy="ddp" if ranks.world_size > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=run.accumulation,
        gradient_clip_val=run.config.train.max_grad_norm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Recipe(run), MicroBatches(run))


def main(argv: list[str] | None = None) -> None:
    """Run what the command line describes."""
    with open_run("lightning", argv) as run:
        train(run)


if __name__ == "__main__":
    run_program(main)
