"""State in fewer bits: int8 momentum by blocks, and float32 masters as a 16-bit remainder beside a bfloat16 parameter.

Pairs of functions on plain tensors, no rank, no bucket; nothing here waits for a device.

[Note: remainder] A float32 number is 32 bits, of which a bfloat16 is the upper 16. The parameter is the master rounded
to the nearest bfloat16, halves away from zero; the remainder is what is missing, as a difference of bit patterns in
[-2^15, 2^15). So `join` gives the master back bit for bit. Rounding halves to even, as `Tensor.to` does, would leave
one remainder too many for 16 bits; the two roundings differ for one master in 2^17, by one bfloat16 step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256  # elements that share one scale


def num_blocks(length: int) -> int:
    """Scales that `quantize` makes for `length` elements."""
    return -(-length // BLOCK)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) float32 -> (n,) int8 codes, (num_blocks(n),) float32 scales: the largest magnitude of each block.

    value = scale * sign(code) * (code / 127)^2: the step is finest near zero, so that an outlier in a block does not
    erase the rest of it. `dequantize` then `quantize` gives the same codes.
    """
    blocks = pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    shares = blocks.div(scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1))
    codes = shares.abs().sqrt_().mul_(127.0).round_().copysign_(shares)
    return codes.to(torch.int8).view(-1)[: values.numel()], scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `quantize`: (n,) int8, (num_blocks(n),) float32 -> (n,) float32."""
    roots = pad(codes, (0, -codes.numel() % BLOCK)).view(-1, BLOCK).float().div_(127.0)
    return roots.mul_(roots.abs()).mul_(scales.unsqueeze(1)).view(-1)[: codes.numel()]


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
