"""State in fewer bits: masters come back bit for bit, momentum within its steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distmuon.formats import BLOCK, dequantize, join, num_blocks, quantize, split


def _floats() -> Tensor:
    """Every upper half of a float32 with lower halves around what rounding decides: 65,536 x 9 patterns."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x1234], dtype=torch.int32)
    values = (upper.unsqueeze(1) | lower).view(torch.float32).view(-1)
    return values[values.isfinite()]


def test_masters_come_back_bit_for_bit() -> None:
    masters = _floats()
    parameter, remainder = split(masters)
    assert parameter.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert torch.equal(join(parameter, remainder).view(torch.int32), masters.view(torch.int32))


def test_the_parameter_is_the_nearest_bfloat16() -> None:
    """As `Tensor.to` rounds, but for exact halves, which go away from zero."""
    masters = _floats()
    parameter, torchs = split(masters)[0], masters.bfloat16()
    halves = (masters.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(parameter[~halves], torchs[~halves])
    assert bool((parameter[halves].abs() >= torchs[halves].abs()).all()) and bool((parameter != torchs).any())


def test_a_written_parameter_makes_a_master_that_rounds_to_it() -> None:
    remainder = torch.tensor([-(2**15), -1, 0, 1, 2**15 - 1], dtype=torch.int16)
    written = torch.tensor([1.0, -0.3, 0.0, -0.0]).bfloat16().unsqueeze(1).expand(4, 5).contiguous()
    master = join(written, remainder.expand(4, 5))
    assert master.isfinite().all() and torch.equal(split(master)[0], written), "zeros too: below them lie NaNs"


def test_a_nan_stays_one() -> None:
    """CUDA's, 0x7FFFFFFF, would round to -0.0."""
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    assert split(nans)[0].isnan().all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3 * BLOCK + 1), st.integers(0, 10_000), st.sampled_from([1e-30, 1e-8, 1.0, 1e20]))
def test_int8_stays_within_half_a_step(length: int, seed: int, size: float) -> None:
    """|error| <= scale * (|root| + 1/254) / 127, half the distance to the next code; codes come back as they were."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, generator=generator).pow(3) * size  # heavy tails
    codes, scales = quantize(values)
    assert codes.shape == (length,) and scales.shape == (num_blocks(length),)
    back = dequantize(codes, scales)
    scale = scales.repeat_interleave(BLOCK)[:length]
    root = (values.abs() / scale).sqrt()
    assert bool(((back - values).abs() <= scale * (root + 1 / 254) / 127 * 1.001).all())
    assert torch.equal(quantize(back)[0], codes)


def test_zeros_stay_zero_and_one_outlier_does_not_erase_its_block() -> None:
    assert torch.equal(dequantize(*quantize(torch.zeros(300))), torch.zeros(300))
    values = torch.full((BLOCK,), 1e-3)
    values[7] = 1.0
    assert dequantize(*quantize(values))[0] == pytest.approx(1e-3, rel=0.05)
    linear = (values * 127).round() / 127
    assert linear[0] == 0.0
