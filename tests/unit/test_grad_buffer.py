"""The way of gradients into their buffer: each is divided by the number of ranks, and loses nothing by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmuon.step.grad_buffer import GradBuffer, Span

CPU = torch.device("cpu")


def _mean(grads: list[Tensor], dp_size: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a shard, if every rank has `grads`, one by one in its micro-batches."""
    numel = grads[0].numel()
    buffer = GradBuffer(numel, dp_size, dtype, CPU, released=False)
    for number, grad in enumerate(grads):
        buffer.add([Span(0, 0, numel)], grad, first=number == 0, several=len(grads) > 1)
    shard = buffer.close().float() * dp_size
    buffer.reduced(shard)
    return shard


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_shares_are_rounded_in_float32(dp_size: int, grad_dtype: torch.dtype, micro_batches: int) -> None:
    grads = [torch.randn(64).to(grad_dtype) for _ in range(micro_batches)]
    exact = torch.stack(grads).double().sum(0)
    assert torch.allclose(_mean(grads, dp_size, torch.float32).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dp_size", [3, 1024])
def test_small_float16_gradients_do_not_become_zeros(dp_size: int) -> None:
    smallest = torch.full((4,), 2.0**-24, dtype=torch.float16)
    assert torch.allclose(_mean([smallest], dp_size, torch.float16), smallest.float())
