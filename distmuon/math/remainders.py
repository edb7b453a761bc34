"""A float32 number as a bfloat16 number and 16 bits more.

This module decides how the two are made. It knows plain tensors alone.

A bfloat16 number is the upper 16 bits of a float32 number. The parameter is the master rounded to the nearest bfloat16,
halves away from zero; the remainder is the difference of the bit patterns, in [-2^15, 2^15). So `join` returns the
master bit for bit. Rounding halves to even, as `Tensor.to` does, would need one remainder too many for 16 bits; the two
roundings differ for one master in 2^17, by one bfloat16 step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split a float32 master of any shape into (bfloat16 parameter, int16 remainder); see the module."""
    master = torch.where(master.isnan(), torch.nan, master)  # some NaNs would round to -0.0
    lower, upper = _halves(master)
    return torch.sub(upper, lower >> 15).view(torch.bfloat16), lower


def join(parameter: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of `split`, bit for bit. A parameter that was written externally gives a master that rounds to it."""
    # The bit patterns below those of 0 are NaNs.
    remainder = torch.where(parameter == 0, remainder.clamp(min=0), remainder)
    master = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    lower, upper = _halves(master)
    lower.copy_(remainder)
    torch.add(parameter.view(torch.int16), remainder >> 15, out=upper)
    return master


def _halves(master: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper 16 bits of float32 numbers as int16, views.

    The lower half, read as a signed number, is the remainder, and it is negative where the upper half is rounded up.
    """
    lower, upper = master.unsqueeze(-1).view(torch.int16).unbind(-1)  # of a little-endian machine
    return lower, upper
