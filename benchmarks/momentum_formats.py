"""How far momentum in fewer bits is from float32 momentum after many steps, rounded to the nearest and as we do.

`python -m benchmarks.momentum_formats` prints the table of docs/options.md, in a minute on one core; `--time` how long
the rounding of 2^22 elements takes. Numbers of `distmuon.formats` alone: no model, no optimizer, no ranks.

The gradient of a 256 x 512 matrix is first one Gaussian matrix, then for good another ("signal"), so that momentum has
to travel and then to stay; noise is Gaussian, independent from step to step, of the given size relative to the signal.
In the last eighth of the columns the gradient is zero from the turn on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distmuon.math import codecs as formats

SHAPE, TURN, MU = (256, 512), 40, 0.95
Rounding = Callable[[Tensor, Tensor], Tensor]  # (new momentum, how many steps before) -> what is left of it
ROUNDINGS: dict[str, Rounding] = {
    "int8, nearest": lambda new, step: formats.dequantize(*formats.quantize(new)),
    "int8": lambda new, step: formats.dequantize(*formats.quantize_dithered(new, 0, step)),
    "bfloat16, nearest": lambda new, step: new.bfloat16().float(),
    "bfloat16": lambda new, step: formats.bfloat16_dithered(new, 0, step).float(),
}


@dataclass(frozen=True)
class Errors:
    """Relative to float32: momentum and its polar factor where the gradient goes on; and what is left in columns whose
    gradient has stopped, relative to the momentum of the others, column by column."""

    momentum: float
    polar_factor: float
    stopped: float


def errors(rounding: Rounding, noise: float, steps: int) -> Errors:
    """After `steps` steps from the turn on."""
    generator = torch.Generator().manual_seed(0)
    before, signal = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    lives = torch.ones(SHAPE[1], dtype=torch.bool)
    lives[-SHAPE[1] // 8 :] = False
    exact, kept = torch.zeros(SHAPE), torch.zeros(SHAPE)
    for step in range(TURN + steps):
        grad = (signal if step >= TURN else before) + noise * torch.randn(SHAPE, generator=generator)
        if step >= TURN:
            grad[:, ~lives] = 0.0
        exact = torch.lerp(exact, grad, 1.0 - MU)
        kept = rounding(torch.lerp(kept, grad, 1.0 - MU).view(-1), torch.tensor(float(step))).view(SHAPE)
    stopped = kept[:, ~lives].norm() / (~lives).sum().sqrt() * lives.sum().sqrt() / kept[:, lives].norm()
    wanted, found = (_polar_factor(momentum[:, lives]) for momentum in (exact, kept))
    return Errors(_off(kept[:, lives], exact[:, lives]), _off(found, wanted), float(stopped))


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _polar_factor(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    factor: Tensor = u @ vh
    return factor


def _table() -> None:
    print("| momentum | noise | " + " | ".join(f"after {n} steps" for n in (200, 2000)) + " | stopped columns |")
    print("|---|---|---|---|---|")
    for name, rounding in ROUNDINGS.items():
        for noise in (0.0, 0.01, 0.1, 1.0):
            early, late = (errors(rounding, noise, steps) for steps in (200, 2000))
            cells = [f"{100 * e.momentum:.2f} / {100 * e.polar_factor:.2f} %" for e in (early, late)]
            stopped = "0" if late.stopped == 0.0 else f"{100 * late.stopped:.1g} %"
            print(f"| {name} | {noise:.0%} | {cells[0]} | {cells[1]} | {stopped} |", flush=True)


def _times(rounds: int = 9) -> None:
    """Medians of `rounds`, on one thread."""
    torch.set_num_threads(1)
    values, step = torch.randn(2**22), torch.tensor(12345.0)
    ways: dict[str, Callable[[], object]] = {
        "int8, nearest": lambda: formats.quantize(values),
        "int8": lambda: formats.quantize_dithered(values, 0, step),
        "bfloat16, nearest": lambda: values.bfloat16(),
        "bfloat16": lambda: formats.bfloat16_dithered(values, 0, step),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - begin)
    for name, each in taken.items():
        print(f"{name}: {1e3 * statistics.median(each):.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true", help="time the rounding of 2^22 elements instead")
    _times() if parser.parse_args().time else _table()
