"""Runs inside torchrun: scripts as users write them, for test_users.py; rank 0 writes what they found.

torchrun --standalone --nproc_per_node 2 -m tests.integrations.user_worker FOLDER
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

import distmuon
from distmuon.integrations.transformers import attach
from tests.training import digest

STEPS, MICRO, ROWS, LENGTH, VOCABULARY = 6, 2, 2, 16, 61
LR, WEIGHT_DECAY, CLIP = 0.02, 0.1, 0.5
EXACT = distmuon.Precision(newton_schulz=torch.float32)


class Texts(Dataset[dict[str, Tensor]]):
    """Rows of uneven length: what is not to be learnt is -100, so ranks and micro-batches differ in tokens."""

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        labels = tokens.clone()
        labels[3 + int(torch.randint(LENGTH - 3, (1,), generator=generator)) :] = -100
        return {"input_ids": tokens, "labels": labels}


def tiny() -> Any:
    """A GPT-2 with tied embeddings and no dropout; the same on all ranks."""
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=24,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def train_texts() -> Texts:
    return Texts(STEPS * MICRO * ROWS * dist.get_world_size())


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class StopAt(transformers.TrainerCallback):
    """A callback of the user's, added last, that decides on a save of its own: where the run is cut."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def under_the_trainer(folder: Path, stop: int = 0) -> dict[str, Any]:
    """Evaluations and saves in between, two checkpoints kept, the best one loaded at the end."""
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=MICRO,
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        adam_beta2=0.95,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        seed=0,
    )
    trainer = InOrder(model=tiny(), args=args, train_dataset=train_texts(), eval_dataset=Texts(8, seed=1))
    trainer.remove_callback(transformers.PrinterCallback)
    attach(trainer, precision=EXACT)
    if stop:
        trainer.add_callback(StopAt(stop))
    trainer.train(resume_from_checkpoint=True if not stop and any(folder.glob("checkpoint-*")) else None)
    history = trainer.state.log_history
    return {
        "norms": {h["step"]: h["grad_norm"] for h in history if "grad_norm" in h},
        "losses": {h["step"]: h["loss"] for h in history if "loss" in h},
        "evaluations": {h["step"]: h["eval_loss"] for h in history if "eval_loss" in h},
        "again": trainer.evaluate()["eval_loss"],
        "best": Path(trainer.state.best_model_checkpoint).name,
        "kept": sorted(path.name for path in folder.glob("checkpoint-*")),
        "weights": digest(dict(trainer.model.named_parameters())),
    }


def plain() -> dict[str, Any]:
    """The loop of the README over the same rows, each token of a step weighing the same."""
    model, world, rank, texts = tiny(), dist.get_world_size(), dist.get_rank(), train_texts()
    optimizer = distmuon.DistMuon(model, lr=LR, weight_decay=WEIGHT_DECAY, adamw_betas=(0.9, 0.95), precision=EXACT)
    norms = {}
    for step in range(STEPS):
        rows = [
            [texts[((step * MICRO + m) * world + r) * ROWS + k] for k in range(ROWS)]
            for m in range(MICRO)
            for r in range(world)
        ]
        items = sum(int((row["labels"] != -100).sum()) for batch in rows for row in batch)
        for micro in range(MICRO):
            batch = rows[micro * world + rank]
            inputs = {key: torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels")}
            optimizer.set_requires_gradient_sync(micro == MICRO - 1)
            (model(**inputs, num_items_in_batch=torch.tensor(items)).loss * world).backward()
        norms[step + 1] = float(optimizer.clip_grad_norm_(CLIP))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms}


def accelerates_own_prepare() -> str:
    """The line that a user forgets to change: accelerate wraps the model in DDP, which averages a second time."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = tiny()
    model, optimizer = accelerator.prepare(model, distmuon.DistMuon(model, lr=LR))
    row = {key: value.unsqueeze(0) for key, value in Texts(1)[0].items()}
    try:
        accelerator.backward(model(**row).loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    faulthandler.dump_traceback_later(500, exit=True)  # a hang names its place
    warnings.simplefilter("ignore")  # the trainers' own
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"whole": under_the_trainer(folder / "whole")}
    found["cut"] = under_the_trainer(folder / "cut", stop=3)
    found["resumed"] = under_the_trainer(folder / "cut")
    found["plain"] = plain()
    found["own prepare"] = accelerates_own_prepare()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(everyone))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DDP, which the last of them has left behind, keeps the group


if __name__ == "__main__":
    main()
