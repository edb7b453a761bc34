"""State in fewer bits: int8 and bfloat16 momentum, and float32 masters as 16 bits beside a bfloat16 parameter.

Functions on plain tensors, no rank, no bucket; nothing here waits for a device or draws from a global generator.

[Note: dither] A moving average takes steps of 1 - mu = 0.05 of what it lacks. Rounded to the nearest number such steps
are lost once they are below half the distance of two neighbours: the average stalls, 10 distances from where it should
be. So what a step keeps is rounded up with the probability that makes it right on average. The dice are a function of
the element's position in its parameter and of the number of times that it has been rounded before (`dither`), so the
bits are the same whatever the cut, the number of ranks, and the process that resumes. In time the dice of an element
go round the circle by the golden section: each value comes up as often as it should within a few steps, and errors of
one step are taken back by the next ones. Independent dice would leave errors 1.4 times as large (docs/options.md).
What can be kept exactly, zeros above all, is never altered. What is loaded is rounded to the nearest.

[Note: remainder] A float32 number is 32 bits, of which a bfloat16 is the upper 16. The parameter is the master rounded
to the nearest bfloat16, halves away from zero; the remainder is what is missing, as a difference of bit patterns in
[-2^15, 2^15). So `join` gives the master back bit for bit. Rounding halves to even, as `Tensor.to` does, would leave
one remainder too many for 16 bits; the two roundings differ for one master in 2^17, by one bfloat16 step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256  # elements that share one scale
_GOLDEN = 0x9E3779B9  # 2^32 times the golden section, to the nearest odd number
_SPREAD = (0x9E3779B1 - 2**32, 0x85EBCA77 - 2**32)  # large odd numbers, as int32: xxHash's first two


def num_blocks(length: int) -> int:
    """Scales that `quantize` makes for `length` elements."""
    return -(-length // BLOCK)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) float32 -> (n,) int8 codes, (num_blocks(n),) float32 scales: the largest magnitude of each block.

    value = scale * sign(code) * (code / 127)^2: the step is finest near zero, so that an outlier in a block does not
    erase the rest of it. `dequantize` then `quantize` gives the same codes.
    """
    blocks = _blocks(values)
    scales = blocks.abs().amax(dim=1)
    shares = blocks.div(scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1))
    codes = shares.abs().sqrt_().mul_(127.0).round_().copysign_(shares)
    return codes.to(torch.int8).view(-1)[: values.numel()], scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `quantize`: (n,) int8, (num_blocks(n),) float32 -> (n,) float32."""
    roots = _blocks(codes).float().div_(127.0)
    return roots.mul_(roots.abs()).mul_(scales.unsqueeze(1)).view(-1)[: codes.numel()]


def _blocks(values: Tensor) -> Tensor:
    """(n,) -> (num_blocks(n), BLOCK), zeros at the end; a view where n is a multiple of BLOCK."""
    missing = -values.numel() % BLOCK
    return (pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


def dither(start: int, length: int, step: Tensor) -> Tensor:
    """(length,) int32, spread evenly over all int32: one for each element from `start` of its parameter on.

    `step`: 0-dim, a whole number below 2^24, how often these elements were rounded before; it is read on its device.
    """
    first, second = _SPREAD
    offset = (start * first + 2**31) % 2**32 - 2**31
    places = torch.arange(length, dtype=torch.int32, device=step.device)
    spread = torch.add(torch.tensor(offset, dtype=torch.int32), places, alpha=first)  # wraps, as all of this does
    spread.bitwise_xor_(spread >> 15).mul_(second)
    return spread.add_((step.to(torch.int64) * _GOLDEN).to(torch.int32))


def quantize_dithered(values: Tensor, start: int, step: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize`, but right on average; see [Note: dither] and `dither`.

    With r = 127 sqrt(|value| / scale) between the codes c and c+1 and y evenly in (-1/2, 1/2), the code is
    round(sqrt(r^2 - 1/4 + y^2) - y): c+1 with probability (r^2 - c^2) / (2c + 1), which is right in value, not in root.
    """
    codes = torch.empty_like(values, dtype=torch.int8)
    scales = values.new_empty(num_blocks(values.numel()))
    for low, part in _parts(values):
        blocks = _blocks(part)
        squares = blocks.abs()
        part_scales = squares.amax(dim=1)
        # A little within (-1/2, 1/2), so that the largest of a block has code 127 and loading finds its scale again.
        y = dither(start + low, part.numel(), step).float().mul_(2.0**-32 * (1 - 2.0**-14))
        squares.div_(part_scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).mul_(127.0**2)
        y = _blocks(y)
        roots = squares.addcmul_(y, y).sub_(0.25).clamp_(min=0.0).sqrt_().sub_(y).round_().copysign_(blocks)
        codes[low : low + part.numel()] = roots.view(-1)[: part.numel()]
        scales[low // BLOCK : low // BLOCK + part_scales.numel()] = part_scales
    return codes, scales


def bfloat16_dithered(values: Tensor, start: int, step: Tensor) -> Tensor:
    """(n,) float32 -> (n,) bfloat16, one of the two neighbours, right on average; see [Note: dither] and `dither`."""
    rounded = torch.empty_like(values, dtype=torch.bfloat16)
    for low, part in _parts(values):
        bits = (dither(start + low, part.numel(), step) >> 16).bitwise_and_(0xFFFF)
        bits.add_(part.view(torch.int32))
        rounded[low : low + part.numel()] = bits.bitwise_and_(-0x10000).view(torch.float32)  # which is a bfloat16 now
    return rounded


def _parts(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(offset, view) of parts of `values`: on a CPU small enough to stay in cache, elsewhere to be counted in int32."""
    size = BLOCK * 2 ** (8 if values.device.type == "cpu" else 20)
    for low in range(0, values.numel(), size):
        yield low, values[low : low + size]


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (bfloat16 parameter, int16 remainder), any shape; see [Note: remainder]."""
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32))  # some NaNs would round to -0.0
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(parameter: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of `split`, bit for bit. With a parameter written by somebody else: a master that rounds to it."""
    remainder = torch.where(
        parameter == 0, remainder.clamp(min=0), remainder
    )  # below the bits of 0 there are only NaNs
    return ((parameter.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)
