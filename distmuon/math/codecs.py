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

from collections.abc import Iterator, Mapping
from typing import Protocol

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


class MomentumCodec(Protocol):
    """The format in which Muon's momentum is kept, in the entries of one piece's state."""

    keys: tuple[str, ...]
    """What state dicts hold; scales of blocks are not among them."""
    decoded: torch.dtype
    """Of what `decode` returns."""
    in_place: bool
    """The buffer is float32 itself, so that a step may compute the new momentum in it."""

    def entries(self, length: int) -> dict[str, tuple[int, torch.dtype]]:
        """By key, (elements, dtype) of what `length` elements of momentum take; ``step`` is beside them."""

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        """(n,) in a floating-point dtype, as it is kept where it has one."""

    def encode(self, momentum: Tensor) -> dict[str, Tensor]:
        """(n,) float32, loaded or written by a user, as entries of a state: the nearest numbers."""

    def encode_step(self, momentum: Tensor, start: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(n,) float32, computed by a step, as entries of a state: right on average, see [Note: dither].

        `start`: the position of the first element in its parameter.
        """

    def bytes(self, length: int) -> int:
        """Bytes that `length` elements take, ``step`` left out."""


class Float32Momentum:
    keys: tuple[str, ...] = ("momentum_buffer",)
    decoded = torch.float32
    in_place = True

    def entries(self, length: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"momentum_buffer": (length, torch.float32)}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["momentum_buffer"]

    def encode(self, momentum: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": momentum}

    def encode_step(self, momentum: Tensor, start: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"momentum_buffer": momentum}

    def bytes(self, length: int) -> int:
        return 4 * length


class Bfloat16Momentum:
    keys: tuple[str, ...] = ("momentum_buffer", "step")
    decoded = torch.bfloat16
    in_place = False

    def entries(self, length: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"momentum_buffer": (length, torch.bfloat16)}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["momentum_buffer"]

    def encode(self, momentum: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": momentum}

    def encode_step(self, momentum: Tensor, start: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = state["step"]
        return {"momentum_buffer": bfloat16_dithered(momentum, start, step), "step": step + 1}

    def bytes(self, length: int) -> int:
        return 2 * length


class Int8Momentum:
    keys: tuple[str, ...] = ("momentum_buffer", "step")
    decoded = torch.float32
    in_place = False

    def entries(self, length: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"momentum_buffer": (length, torch.int8), "momentum_scale": (num_blocks(length), torch.float32)}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        return dequantize(state["momentum_buffer"], state["momentum_scale"])

    def encode(self, momentum: Tensor) -> dict[str, Tensor]:
        codes, scales = quantize(momentum)
        return {"momentum_buffer": codes, "momentum_scale": scales}

    def encode_step(self, momentum: Tensor, start: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = state["step"]
        codes, scales = quantize_dithered(momentum, start, step)
        return {"momentum_buffer": codes, "momentum_scale": scales, "step": step + 1}

    def bytes(self, length: int) -> int:
        return length + 4 * num_blocks(length)


def momentum_codec(dtype: torch.dtype) -> MomentumCodec:
    """The codec of `Precision.momentum`."""
    codecs: dict[torch.dtype, MomentumCodec] = {
        torch.float32: Float32Momentum(),
        torch.bfloat16: Bfloat16Momentum(),
        torch.int8: Int8Momentum(),
    }
    return codecs[dtype]


class MasterCodec(Protocol):
    """What is kept beside a parameter to make its float32 master. All tensors of a call have one shape."""

    bytes_per_element: int

    def make(self, param: Tensor) -> Tensor | None:
        """What to keep for a fresh parameter; None: nothing."""

    def decode(self, param: Tensor, kept: Tensor | None) -> Tensor:
        """The master, float32: the memory where it is kept as such, else new memory."""

    def encode(self, master: Tensor, param: Tensor, kept: Tensor | None) -> None:
        """Write `master` (any dtype and device): the parameter rounded from it, and what is kept."""

    def absorb(self, param: Tensor, kept: Tensor | None) -> None:
        """Take over into the master the elements of `param` that somebody else has written."""


class OwnMaster:
    """A float32 parameter is its own master."""

    bytes_per_element = 0

    def make(self, param: Tensor) -> Tensor | None:
        return None

    def decode(self, param: Tensor, kept: Tensor | None) -> Tensor:
        return param

    def encode(self, master: Tensor, param: Tensor, kept: Tensor | None) -> None:
        if master is not param:
            param.copy_(master)

    def absorb(self, param: Tensor, kept: Tensor | None) -> None:
        """The parameter is the master."""


class Float32Master:
    """A float32 master beside a 16-bit parameter."""

    bytes_per_element = 4

    def make(self, param: Tensor) -> Tensor | None:
        return param.float()

    def decode(self, param: Tensor, kept: Tensor | None) -> Tensor:
        assert kept is not None
        return kept

    def encode(self, master: Tensor, param: Tensor, kept: Tensor | None) -> None:
        assert kept is not None
        if master is not kept:
            kept.copy_(master)
        param.copy_(kept)

    def absorb(self, param: Tensor, kept: Tensor | None) -> None:
        """An element that differs from what the master rounds to was written; any other keeps its full precision."""
        assert kept is not None
        torch.where(param == kept.to(param.dtype), kept, param.to(kept.dtype), out=kept)


class RemainderMaster:
    """The 16 bits that a bfloat16 parameter lacks; see [Note: remainder]."""

    bytes_per_element = 2

    def make(self, param: Tensor) -> Tensor | None:
        return torch.zeros_like(param, dtype=torch.int16)

    def decode(self, param: Tensor, kept: Tensor | None) -> Tensor:
        assert kept is not None
        return join(param, kept)

    def encode(self, master: Tensor, param: Tensor, kept: Tensor | None) -> None:
        assert kept is not None
        parameters, remainder = split(master.to(kept.device, torch.float32))
        kept.copy_(remainder)
        param.copy_(parameters)

    def absorb(self, param: Tensor, kept: Tensor | None) -> None:
        """What was written and the remainder make a master that rounds to it."""


def master_codec(param_dtype: torch.dtype, master: str) -> MasterCodec:
    """The codec of `Precision.master` for a parameter of `param_dtype`."""
    if param_dtype == torch.float32:
        return OwnMaster()
    return RemainderMaster() if master == "remainder" and param_dtype == torch.bfloat16 else Float32Master()
