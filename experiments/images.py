"""A trial of a model of images, whose loop is its own, since the recipe trains language models.

Keys and schedule are the recipe's, and so are the records, of which experiments.trial makes the same row. A record's
"tokens" are images here. One process.

The data are the 1,797 digits of 8x8 pixels that scikit-learn ships too: the test set of "Optical Recognition of
Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998; UCI Machine Learning Repository, CC BY 4.0). A line has the 64
pixels of an image, 0 to 16, and its digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForImageClassification

import distmuon
from distmuon.errors import names, problem
from launch.config import TrainConfig
from launch.provenance import provenance
from launch.schedules import lr_lambda

SOURCE = "digits"
"""The `data.source` of a trial that runs here."""
DIGITS = Path(__file__).parent / "data" / "digits.csv.gz"
HELD_OUT = 450
"""The last images of the file, which are never trained on."""
SIDE, SHIFT = 32, 4
"""Pixels of an image's side after enlarging, and those by which it is shifted at most; four are one of the file's."""
TRAIN = ("steps", "global_batch", "schedule", "warmup_steps", "min_lr_ratio", "max_grad_norm", "eval_every", "seed")
KEYS = {"model.arch", "data.source", "optimizer.name", "optimizer.lr", "optimizer.weight_decay"}
OF_MODEL = "model.config."
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ImageTrial:
    """A trial, with the keys that it is run with."""

    folder: Path
    """Where nothing is written: its records are returned."""
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        known = KEYS | {f"train.{key}" for key in TRAIN}
        if unknown := [key for key in self.settings if key not in known and not key.startswith(OF_MODEL)]:
            raise problem(
                "a trial with images",
                found=f"found {names(unknown)}",
                needed=f"{names(sorted(known))} and {OF_MODEL}* are read",
                cure="leave the others out",
            )
        name = self.settings["optimizer.name"]
        if name not in ("distmuon", "adamw"):
            raise problem(
                "optimizer.name", found=f"found {name!r}", needed="distmuon or adamw", cure="take one of them"
            )

    def train(self) -> list[Record]:
        """Train it; the records of the run."""
        given = TrainConfig(**{key: self.settings[f"train.{key}"] for key in TRAIN})
        model = self.model(given.seed)
        optimizer = self.optimizer(model)
        scheduler = LambdaLR(optimizer, lr_lambda(given))
        images, digits = read()
        held_out = images[-HELD_OUT:], digits[-HELD_OUT:]
        count = sum(parameter.numel() for parameter in model.parameters())
        records: list[Record] = [
            {"kind": "run", **provenance(), "num_parameters": count, "data": {"source": SOURCE}},
            {"kind": "val", "step": 0, "loss": validate(model, *held_out)},
        ]
        every_batch = batches(images[:-HELD_OUT], digits[:-HELD_OUT], given)
        for step, (inputs, targets) in enumerate(every_batch, start=1):
            loss = cross_entropy(model(pixel_values=inputs).logits, targets)
            loss.backward()
            if given.max_grad_norm is not None:
                optimizer.clip_grad_norm_(given.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            seen = step * given.global_batch
            records.append({"kind": "train", "step": step, "loss": finite(loss), "tokens": seen})
            if step % given.eval_every == 0 or step == given.steps:
                records.append({"kind": "val", "step": step, "loss": validate(model, *held_out)})
        skipped = optimizer.metrics()["skipped_steps"]
        return [*records, {"kind": "summary", "val_loss": records[-1]["loss"], "skipped_steps": skipped}]

    def model(self, seed: int) -> nn.Module:
        """The model with random weights, by the seed alone."""
        torch.manual_seed(seed)
        options = {key.removeprefix(OF_MODEL): value for key, value in self.settings.items() if OF_MODEL in key}
        config = AutoConfig.for_model(self.settings["model.arch"], num_channels=1, num_labels=10, **options)
        model: nn.Module = AutoModelForImageClassification.from_config(config)
        return model.train()

    def optimizer(self, model: nn.Module) -> distmuon.DistMuon:
        """Muon by the default routes, or the same class with every parameter sent to AdamW."""
        routes: dict[str, Any] = {"routes": "adamw"} if self.settings["optimizer.name"] == "adamw" else {}
        lr, weight_decay = self.settings["optimizer.lr"], self.settings["optimizer.weight_decay"]
        return distmuon.DistMuon(model, lr=lr, weight_decay=weight_decay, **routes)


def read() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) between -1 and 1, and their digits (N,)."""
    rows = torch.from_numpy(numpy.loadtxt(DIGITS, delimiter=",", dtype=numpy.int64))
    pixels = rows[:, :-1].reshape(-1, 1, 8, 8) / 8 - 1
    return interpolate(pixels, size=(SIDE, SIDE), mode="bilinear"), rows[:, -1]


def batches(images: Tensor, digits: Tensor, train: TrainConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of all steps, in an order and with shifts that the seed alone decides; each epoch drops its rest."""
    generator = torch.Generator().manual_seed(train.seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(train.steps):
        if len(order) < train.global_batch:
            order = torch.randperm(len(images), generator=generator)
        chosen, order = order[: train.global_batch], order[train.global_batch :]
        yield shifted(images[chosen], generator), digits[chosen]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `SHIFT` pixels in both directions, over an empty background."""
    wide = pad(images, (SHIFT,) * 4, value=-1.0)
    corners = torch.randint(2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + SIDE, x : x + SIDE] for image, (y, x) in zip(wide, corners)])


@torch.no_grad()
def validate(model: nn.Module, images: Tensor, digits: Tensor) -> float | None:
    """Mean loss, with the running statistics of the normalizations."""
    model.eval()
    loss = cross_entropy(model(pixel_values=images).logits, digits)
    model.train()
    return finite(loss)


def finite(loss: Tensor) -> float | None:
    """A loss as records have it: none if it is not finite."""
    value = loss.item()
    return value if math.isfinite(value) else None
