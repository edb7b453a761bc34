"""The way of gradients into their buffer: each is divided by the number of ranks, and loses nothing by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmuon.step.grad_buffer import GradBuffer, Span

CPU = torch.device("cpu")


def _filled(grads: list[Tensor], dp_size: int, dtype: torch.dtype) -> Tensor:
    """What the buffer holds of `grads`, one by one in a step's micro-batches, when the reduction starts."""
    numel = grads[0].numel()
    buffer = GradBuffer(numel, dp_size, dtype, CPU, released=False)
    for number, grad in enumerate(grads):
        buffer.add([Span(0, 0, numel)], grad, first=number == 0, several=len(grads) > 1)
    return buffer.close()


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_shares_are_rounded_in_float32(dp_size: int, grad_dtype: torch.dtype, micro_batches: int) -> None:
    grads = [torch.randn(64).to(grad_dtype) for _ in range(micro_batches)]
    exact = torch.stack(grads).double().sum(0) / dp_size
    assert torch.allclose(_filled(grads, dp_size, torch.float32).double(), exact, rtol=1e-6, atol=1e-6 / dp_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_divided_after_the_sum(dtype: torch.dtype) -> None:
    """The smallest float16 would become zero, and a third rounded to 16 bits is another number."""
    grad = torch.tensor([2.0**-24, 1.0, 3.0]).to(dtype)
    assert torch.equal(_filled([grad], 3, dtype), grad)
