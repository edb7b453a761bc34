"""Triton's kernels of the passes of a step on a GPU, and their launches: see fused.py, which alone imports this module.

This module decides where elements lie: a program takes `BLOCK` of them, and an offset has 64 bits, since a shard may
have more than 2^31 elements.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
OPTIONS = {"enable_fp_fusion": False}  # each operation rounds once: products and sums are not contracted


@triton.jit
def absorb_kernel(param, master, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    value = tl.load(param + i, mask=inside)
    expected = tl.load(master + i, mask=inside).to(param.dtype.element_ty)  # the nearest, as in torch
    written = value.to(tl.float32) != expected.to(tl.float32)  # also a NaN
    tl.store(master + i, value.to(tl.float32), mask=inside & written)


@triton.jit
def momentum_kernel(grad, buffer, update, skip, rate, blend, rest, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    g = tl.load(grad + i, mask=inside)
    old = tl.load(buffer + i, mask=inside)
    new = old + rate * (g - old)
    tl.store(update + i, (blend * new + rest * g).to(update.dtype.element_ty), mask=inside)
    if tl.load(skip) == 0:
        tl.store(buffer + i, new, mask=inside)


@triton.jit
def weight_kernel(master, polar, skip, decay, rate, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.load(skip) == 0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < numel
        w = tl.load(master + i, mask=inside)
        o = tl.load(polar + i, mask=inside).to(tl.float32)
        tl.store(master + i, w * decay + o * rate, mask=inside)


def absorb(param: Tensor, master: Tensor) -> None:
    _launch(absorb_kernel, master.numel(), param, master)


def momentum(grad: Tensor, buffer: Tensor, update: Tensor, skip: Tensor, rate: float, blend: float) -> None:
    _launch(momentum_kernel, grad.numel(), grad, buffer, update, skip, rate, blend, 1.0 - blend)


def weight(master: Tensor, polar: Tensor, skip: Tensor, decay: float, rate: float) -> None:
    _launch(weight_kernel, master.numel(), master, polar, skip, decay, rate)


def _launch(kernel: Any, numel: int, *args: Tensor | float) -> None:
    """Launch `kernel` on `numel` elements of contiguous tensors."""
    if numel:
        kernel[(triton.cdiv(numel, BLOCK),)](*args, numel, BLOCK=BLOCK, **OPTIONS)
