"""State in fewer bits: masters come back bit for bit, momentum within its steps, and averages go where they should."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.momentum_formats import ROUNDINGS, errors
from distmuon.math.codecs import (
    BLOCK,
    Int8Updates,
    bfloat16_dithered,
    dequantize,
    dither,
    num_blocks,
    quantize,
    quantize_dithered,
)
from distmuon.math.remainders import join, split


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


# ------------------------------------------------------------------------------------ rounding that is right on average


def _kept(values: Tensor, start: int, step: int, format: str) -> Tensor:
    """`values` as a step leaves them, in float32."""
    if format == "bfloat16":
        return bfloat16_dithered(values, start, torch.tensor(float(step))).float()
    return dequantize(*quantize_dithered(values, start, torch.tensor(float(step))))


@pytest.mark.promise(
    "Faults while training",
    "Momentum in 16 or 8 bits does not stall. A skipped step changes none of its bits, nor does a "
    "restart, nor, for bfloat16, another cut",
)
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize(("format", "band"), [("int8", 0.03), ("bfloat16", 0.008)])
def test_a_moving_average_does_not_stall(format: str, band: float, noise: float) -> None:
    """Rounded to the nearest, int8 stayed 16 % off where gradients were alike, and columns without a gradient kept 5 %
    of the others for ever. The table of docs/options.md goes to 2,000 steps."""
    found = errors(ROUNDINGS[format], noise, 300)
    assert found.momentum < band and found.polar_factor < band and found.stopped < 1e-4, found
    if noise == 0.0:
        assert errors(ROUNDINGS[f"{format}, nearest"], noise, 300).momentum > band, "or else the test sees nothing"


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3 * BLOCK + 1), st.integers(0, 2**33), st.sampled_from([1e-38, 1e-30, 1.0, 1e20, 1e38]))
def test_a_step_keeps_one_of_two_neighbours_and_loading_finds_it_again(length: int, start: int, size: float) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(length)).clamp(-3.0, 3.0) * size
    step = torch.tensor(float(start % 1000))
    below = values.view(torch.int32) & -0x10000
    near = bfloat16_dithered(values, start, step).float().view(torch.int32)
    assert bool(((near == below) | (near == below + 0x10000)).all())
    codes, scales = quantize_dithered(values, start, step)
    roots = 127 * (values.abs() / scales.repeat_interleave(BLOCK)[:length].clamp(min=2**-126)).sqrt()
    assert bool(((codes.float().abs() - roots).abs() < 1.0).all()) and bool((codes * values >= 0).all())
    again = quantize(dequantize(codes, scales))
    if size > 1e-37:  # below, a value is a few units in the last place of the smallest float32
        assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


def test_what_can_be_kept_exactly_is_not_altered() -> None:
    values = torch.randn(5 * BLOCK).bfloat16().float()
    values[::7] = 0.0
    for step in range(64):
        assert torch.equal(_kept(values, 0, step, "bfloat16"), values)
        assert not _kept(values, 0, step, "int8")[::7].any()
    assert not _kept(torch.zeros(300), 0, 3, "int8").any()


@pytest.mark.parametrize("format", ["int8", "bfloat16"])
def test_rounding_is_right_on_average(format: str) -> None:
    """The mean of n steps nears the value as 1/n, not as 1/sqrt(n) as with independent dice; the worst element, too."""
    values, spacing = torch.randn(64 * BLOCK), {"int8": 2 / 127, "bfloat16": 2**-7}[format]
    for steps in (16, 256):
        mean = torch.stack([_kept(values, 0, step, format).double() for step in range(steps)]).mean(0)
        size = values.abs() if format == "bfloat16" else values.abs().amax()
        assert float(((mean - values) / size).abs().max()) < 2.5 * spacing / steps
    far = values * 1e-6 + torch.where(torch.arange(values.numel()) % BLOCK == 0, 1.0, 0.0)  # close to zero, too
    mean = torch.stack([_kept(far, 0, step, format).double() for step in range(4096)]).mean(0)
    assert abs(float((mean - far).mean())) < 1e-3 * float(far[1:BLOCK].abs().mean())


@pytest.mark.parametrize("format", ["int8", "bfloat16"])
def test_rounding_does_not_depend_on_the_cut(format: str) -> None:
    """Nor on what is drawn elsewhere, nor does it draw. int8 up to the blocks that share a scale."""
    values = torch.randn(3 * 2**16 + 4 * BLOCK + 17)  # more than a CPU takes at once
    before = torch.get_rng_state()
    whole = _kept(values, 0, 9, format)
    torch.rand(1)
    cuts = [0, 2 * BLOCK, 2**16 - BLOCK, 2**17 + BLOCK, values.numel()]
    cuts = [cut + 5 * (format == "bfloat16" and 0 < cut < values.numel()) for cut in cuts]
    parts = [_kept(values[low:high], low, 9, format) for low, high in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(_kept(values, 0, 10, format), whole)
    torch.set_rng_state(before)
    assert torch.equal(_kept(values, 0, 9, format), whole) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("columns", [256, 1000, 1024, 4096, 16384])
@pytest.mark.parametrize("start", [0, 2**31 - 3, 2**40 + 1])
def test_the_dice_of_one_step_have_no_structure(columns: int, start: int) -> None:
    """As a matrix they are like independent ones: a pattern of low rank would be loud after Newton-Schulz."""
    rows = 2**18 // columns
    dice = dither(start, rows * columns, torch.tensor(77.0)).double().view(rows, columns) / 2**32
    other = torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    assert abs(float(dice.mean())) < 3e-3 and float(dice.square().mean() * 12) == pytest.approx(1.0, abs=0.01)
    for low in (-0.5, 0.0, 0.3):  # all of it, and where some share is rounded up
        ours, theirs = ((m if low == -0.5 else (m < low).double() - low - 0.5) for m in (dice, other))
        norms = [float(torch.linalg.matrix_norm(m, 2)) for m in (ours, theirs)]
        assert norms[0] < 1.15 * norms[1], norms


# ------------------------------------------------------------------------------------------------ updates that travel

WIRES = (torch.bfloat16, torch.float32, torch.float64)


def _travelled(codec: Int8Updates, values: Tensor, low: int, high: int) -> Tensor:
    """What arrives of `values[low:high]` if a rank that holds no more of a matrix sends it."""
    before = low % codec.block
    elements = -(-(before + high - low) // codec.block) * codec.block
    sent = torch.full((codec.bytes(elements),), 77, dtype=torch.uint8)
    room = codec.room(sent)
    room[before : before + high - low] = values[low:high]
    codec.encode(room, sent)
    return codec.decode(sent)[before : before + high - low]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 1500),
    cuts=st.lists(st.integers(0, 1500), max_size=6),
    seed=st.integers(0, 2**20),
    spread=st.sampled_from((0.0, 3.0, 20.0)),
    wire=st.sampled_from(WIRES),
)
def test_no_cut_of_a_matrix_changes_a_bit_of_its_int8_update(
    length: int, cuts: list[int], seed: int, spread: float, wire: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, generator=generator) * torch.randn(length, generator=generator).mul(spread).exp2()
    codec = Int8Updates(wire)
    whole = codec.rounded(values.view(1, 1, length)).view(-1)
    assert whole.dtype == wire
    borders = [0, *sorted(cut for cut in cuts if cut < length), length]
    parts = [_travelled(codec, whole, low, high) for low, high in pairwise(borders) if low < high]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(codec.rounded(whole.view(1, 1, length)).view(-1), whole)


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 300, 256), (5, 1, 1)])
def test_matrices_of_a_stack_are_rounded_each_by_itself(shape: tuple[int, int, int]) -> None:
    """Also those that have no whole number of blocks, and stacks of more than one part."""
    values = torch.randn(shape) * torch.tensor([1.0, 1e-3, 50.0, 3.0, 1e-9])[: shape[0], None, None]
    codec = Int8Updates(torch.bfloat16)
    found = codec.rounded(values.mT.contiguous().mT)  # not contiguous
    assert found.is_contiguous() and found.shape == shape
    assert all(torch.equal(one, codec.rounded(value[None])[0]) for one, value in zip(found, values))


def test_the_error_of_an_int8_update() -> None:
    """It is half a code, or a whole one for the largest, and bfloat16's half step: within 1.2 % of Gaussian values, and
    1.5 % of those with heavy tails."""
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(1, 1024, 1024, generator=generator)
    heavy = gauss * torch.randn(1, 1024, 1024, generator=generator).mul(2.0).exp()
    spiked = torch.cat([torch.full((1, 64, 1), 0.866), torch.full((1, 64, 255), 0.5 / 255**0.5)], dim=2)
    codec = Int8Updates(torch.bfloat16)
    for values, most in ((gauss, 0.012), (0.5 * gauss, 0.012), (0.3 * gauss, 0.012), (heavy, 0.015), (spiked, 0.03)):
        error = codec.rounded(values).float() - values
        assert float(error.norm() / values.norm()) < most
        largest = values.view(-1, BLOCK).abs().amax(1, keepdim=True)
        size = values.view(-1, BLOCK).abs()
        bound = (size * largest).sqrt() / 32 + largest / 2**14 + size / 2**8
        assert bool((error.view(-1, BLOCK).abs() <= bound).all())


def test_zeros_stay_zeros_and_nothing_hides_what_is_not_finite() -> None:
    values = torch.ones(8, BLOCK)
    values[0] = 0.0
    values[1] = -0.0
    values[2, 7] = torch.nan
    values[3, 0] = torch.inf
    values[4, 255] = -torch.inf
    values[5] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN with a sign
    values[6] = 1e-42
    values[7] = -3.4e38
    for wire in WIRES:
        codec = Int8Updates(wire)
        rounded = codec.rounded(values[None])[0]
        assert bool((rounded[[0, 1, 6]] == 0).all()) and bool(rounded[2:6].isnan().all())
        assert rounded[7].float() == pytest.approx(torch.full((BLOCK,), -3.4e38), rel=0.02)
        for low in (3, 200):
            ends = [_travelled(codec, rounded.view(-1), k * BLOCK + low, (k + 1) * BLOCK) for k in range(8)]
            assert torch.equal(torch.stack(ends).nan_to_num(nan=5.0), rounded[:, low:].nan_to_num(nan=5.0))
