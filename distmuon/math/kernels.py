"""Triton's kernels of the passes of a step on a GPU, and their launches: see fused.py, which alone imports this module.

This module decides where elements lie: a program takes `BLOCK` of them, and an offset has 64 bits, since a shard may
have more than 2^31 elements.
"""

from __future__ import annotations

from typing import Any

import torch
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


@triton.jit
def join_kernel(param, remainder, master, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    upper = tl.load(param + i, mask=inside)  # the bits of a bfloat16 number, as is `lower` of the master's lower half
    lower = tl.load(remainder + i, mask=inside)
    is_zero = (upper & 0x7FFF) == 0
    lower = tl.where(is_zero & (lower < 0), 0, lower)
    bits = ((upper + (lower >> 15)).to(tl.int32) << 16) | (lower.to(tl.int32) & 0xFFFF)
    tl.store(master + i, bits, mask=inside)


@triton.jit
def split_kernel(master, param, remainder, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    bits = tl.load(master + i, mask=inside)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)  # a NaN: some would round to -0.0
    lower = bits.to(tl.int16)
    tl.store(param + i, (bits >> 16).to(tl.int16) - (lower >> 15), mask=inside)
    tl.store(remainder + i, lower, mask=inside)


def absorb(param: Tensor, master: Tensor) -> None:
    _launch(absorb_kernel, master.numel(), param, master)


def momentum(grad: Tensor, buffer: Tensor, update: Tensor, skip: Tensor, rate: float, blend: float) -> None:
    _launch(momentum_kernel, grad.numel(), grad, buffer, update, skip, rate, blend, 1.0 - blend)


def weight(master: Tensor, polar: Tensor, skip: Tensor, decay: float, rate: float) -> None:
    _launch(weight_kernel, master.numel(), master, polar, skip, decay, rate)


def join(param: Tensor, remainder: Tensor, master: Tensor) -> None:
    _launch(join_kernel, master.numel(), param.view(torch.int16), remainder, master.view(torch.int32))


def split(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    _launch(split_kernel, master.numel(), master.view(torch.int32), param.view(torch.int16), remainder)


def _launch(kernel: Any, numel: int, *args: Tensor | float) -> None:
    """Launch `kernel` on tensors of `numel` elements, and a 0-dim one."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    assert all(tensor.is_contiguous() and (tensor.numel() == numel or not tensor.dim()) for tensor in tensors)
    if numel:
        kernel[(triton.cdiv(numel, BLOCK),)](*args, numel, BLOCK=BLOCK, **OPTIONS)
