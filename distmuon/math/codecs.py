"""Formats of state and of updates on the wire: momentum in float32, bfloat16 or int8, the float32 master of a 16-bit
parameter, and polar factors that travel.

This module decides how values are rounded: momentum by dither, all others to the nearest. It has functions on plain
tensors and knows no rank and no bucket; nothing in it waits for a device or draws from a global generator.

[Note: dither] A moving average moves by 1 - mu = 0.05 of its distance to the target. Rounded to the nearest number,
such steps are lost once they are below half the distance of two neighbours: the average stalls 10 distances away from
the target. So the result of a step is rounded up with the probability that makes it right on average. The dice are a
function of the element's position in its parameter and of the number of its earlier roundings (`dither`), so the bits
do not depend on the cut, the number of ranks, or a restart. Over time an element's dice go round the circle by the
golden section: every value comes up with its frequency within a few steps, and later steps undo the error of a step.
Independent dice would leave errors 1.4 times as large (docs/options.md). A value that the format holds exactly, such as
zero, is never changed. Loaded values are rounded to the nearest.

[Note: updates in int8] A matrix may be cut anywhere, and what all ranks apply must not depend on the cut. So its owner
rounds the whole polar factor (`UpdateCodec.rounded`), by blocks of 256 elements from its first one on, to

      4^k * sign(code) * (code / 64)^2,  where 4^k <= the largest magnitude of the block < 4^(k+1),

and that to the dtype of the exchange. A rank that encodes a part of a block finds the same values, whatever it knows of
the rest: if no code of the part reaches 64, it takes k-1 and codes twice as large. It finds them also behind bfloat16,
which moves the root of a value by 2^-10 of it at the most, an eighth of the distance of two codes. So no scale has to
travel with pieces of matrices. The price: scales are powers of four instead of the largest magnitudes, and the error of
Gaussian values is 0.8 to 1.2 % instead of 0.7 %. A block with a value that is not finite arrives as NaNs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from distmuon.math import fused

BLOCK = 256  # elements that share one scale
_GOLDEN = 0x9E3779B9  # 2^32 times the golden section, to the nearest odd number
_SPREAD = (0x9E3779B1 - 2**32, 0x85EBCA77 - 2**32)  # the first two primes of xxHash, as int32


def num_blocks(length: int) -> int:
    """The number of scales that `quantize` makes for `length` elements."""
    return -(-length // BLOCK)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (n,) float32 to (n,) int8 codes and (num_blocks(n),) float32 scales, the blocks' largest magnitudes.

    value = scale * sign(code) * (code / 127)^2: the step is finest near zero, so that an outlier in a block does not
    erase the other values. `dequantize` followed by `quantize` gives the same codes.
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
    """View (n,) as (num_blocks(n), BLOCK), with zeros at the end; a copy unless n is a multiple of BLOCK."""
    missing = -values.numel() % BLOCK
    return (pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


Runs = tuple[int, int]  # (run, stride): elements that do not follow one another, see layout/boxes.py; (0, 0): they do


def dither(start: int, length: int, step: Tensor, runs: Runs = (0, 0), skipped: int = 0) -> Tensor:
    """Dice for `length` elements of a parameter from `start` on: (length,) int32, spread evenly over all int32.

    `step`: 0-dim, the number of earlier roundings of these elements, below 2^24; it is read on its device. `skipped`:
    the number of elements between `start` and the first.
    """
    first, second = _SPREAD
    run, stride = runs
    offset = ((start if run else start + skipped) * first + 2**31) % 2**32 - 2**31
    places = torch.arange(length, dtype=torch.int32, device=step.device)
    if run:
        numbers = places.to(torch.int64).add_(skipped)
        places = (numbers // run).mul_(stride).add_(numbers % run).to(torch.int32)
    spread = torch.add(
        torch.tensor(offset, dtype=torch.int32), places, alpha=first
    )  # wraps on overflow, as do the lines below
    spread.bitwise_xor_(spread >> 15).mul_(second)
    return spread.add_((step.to(torch.int64) * _GOLDEN).to(torch.int32))


def quantize_dithered(values: Tensor, start: int, step: Tensor, runs: Runs = (0, 0)) -> tuple[Tensor, Tensor]:
    """Quantize like `quantize`, but so that values are right on average; see [Note: dither] and `dither`.

    With r = 127 sqrt(|value| / scale) between the codes c and c+1, and y uniform in (-1/2, 1/2), the code is
    round(sqrt(r^2 - 1/4 + y^2) - y). It is c+1 with probability (r^2 - c^2) / (2c + 1), so the value, not its root, is
    right on average.
    """
    codes = torch.empty_like(values, dtype=torch.int8)
    scales = values.new_empty(num_blocks(values.numel()))
    for low, part in _parts(values):
        blocks = _blocks(part)
        squares = blocks.abs()
        part_scales = squares.amax(dim=1)
        # y stays a little inside (-1/2, 1/2), so that a block's largest value has code 127 and a load finds its scale.
        y = dither(start, part.numel(), step, runs, low).float().mul_(2.0**-32 * (1 - 2.0**-14))
        squares.div_(part_scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).mul_(127.0**2)
        y = _blocks(y)
        roots = squares.addcmul_(y, y).sub_(0.25).clamp_(min=0.0).sqrt_().sub_(y).round_().copysign_(blocks)
        codes[low : low + part.numel()] = roots.view(-1)[: part.numel()]
        scales[low // BLOCK : low // BLOCK + part_scales.numel()] = part_scales
    return codes, scales


def bfloat16_dithered(values: Tensor, start: int, step: Tensor, runs: Runs = (0, 0)) -> Tensor:
    """Round (n,) float32 to one of the two bfloat16 neighbours, right on average; see [Note: dither] and `dither`."""
    rounded = torch.empty_like(values, dtype=torch.bfloat16)
    for low, part in _parts(values):
        bits = (dither(start, part.numel(), step, runs, low) >> 16).bitwise_and_(0xFFFF)
        bits.add_(part.view(torch.int32))
        rounded[low : low + part.numel()] = bits.bitwise_and_(-0x10000).view(torch.float32)  # exact as bfloat16
    return rounded


def _parts(values: Tensor, most: int = 2**20) -> Iterator[tuple[int, Tensor]]:
    """Yield (offset, view) of parts of `values`: on a CPU they fit into cache, elsewhere they have `most` blocks, which
    int32 can count."""
    size = BLOCK * (2**8 if values.device.type == "cpu" else most)
    for low in range(0, values.numel(), size):
        yield low, values[low : low + size]


class MomentumCodec(Protocol):
    """The format of Muon's momentum in the entries of a piece's state."""

    keys: tuple[str, ...]
    """The keys in state dicts; they do not include the scales of blocks."""
    decoded: torch.dtype
    """The dtype of the result of `decode`."""
    in_place: bool
    """Whether the buffer itself is float32, so that a step may compute the new momentum in it."""
    block: int
    """The number of elements that share a scale; pieces of a multiple of it may be encoded as one."""

    def entries(self, length: int) -> dict[str, tuple[int, torch.dtype]]:
        """(elements, dtype) by key for `length` elements of momentum, without ``step``."""

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        """Decode momentum, (n,) in a floating-point dtype; the buffer itself if that is floating-point."""

    def encode(self, momentum: Tensor) -> dict[str, Tensor]:
        """Encode momentum that was loaded or written by a user, (n,) float32, by rounding to the nearest."""

    def encode_step(
        self, momentum: Tensor, start: int, state: Mapping[str, Tensor], runs: Runs = (0, 0)
    ) -> dict[str, Tensor]:
        """Encode momentum that a step has computed, (n,) float32, right on average; see [Note: dither].

        `start`: the position of the first element in its parameter; `runs`: where the next ones lie.
        """

    def bytes(self, length: int) -> int:
        """The bytes of `length` elements, without ``step``."""


class Float32Momentum:
    keys: tuple[str, ...] = ("momentum_buffer",)
    decoded = torch.float32
    in_place = True
    block = 1

    def entries(self, length: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"momentum_buffer": (length, torch.float32)}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["momentum_buffer"]

    def encode(self, momentum: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": momentum}

    def encode_step(
        self, momentum: Tensor, start: int, state: Mapping[str, Tensor], runs: Runs = (0, 0)
    ) -> dict[str, Tensor]:
        return {"momentum_buffer": momentum}

    def bytes(self, length: int) -> int:
        return 4 * length


class Bfloat16Momentum:
    keys: tuple[str, ...] = ("momentum_buffer", "step")
    decoded = torch.bfloat16
    in_place = False
    block = 1

    def entries(self, length: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"momentum_buffer": (length, torch.bfloat16)}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["momentum_buffer"]

    def encode(self, momentum: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": momentum}

    def encode_step(
        self, momentum: Tensor, start: int, state: Mapping[str, Tensor], runs: Runs = (0, 0)
    ) -> dict[str, Tensor]:
        step = state["step"]
        return {"momentum_buffer": bfloat16_dithered(momentum, start, step, runs), "step": step + 1}

    def bytes(self, length: int) -> int:
        return 2 * length


class Int8Momentum:
    keys: tuple[str, ...] = ("momentum_buffer", "step")
    decoded = torch.float32
    in_place = False
    block = BLOCK

    def entries(self, length: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"momentum_buffer": (length, torch.int8), "momentum_scale": (num_blocks(length), torch.float32)}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        return dequantize(state["momentum_buffer"], state["momentum_scale"])

    def encode(self, momentum: Tensor) -> dict[str, Tensor]:
        codes, scales = quantize(momentum)
        return {"momentum_buffer": codes, "momentum_scale": scales}

    def encode_step(
        self, momentum: Tensor, start: int, state: Mapping[str, Tensor], runs: Runs = (0, 0)
    ) -> dict[str, Tensor]:
        step = state["step"]
        codes, scales = quantize_dithered(momentum, start, step, runs)
        return {"momentum_buffer": codes, "momentum_scale": scales, "step": step + 1}

    def bytes(self, length: int) -> int:
        return length + 4 * num_blocks(length)


def momentum_codec(dtype: torch.dtype) -> MomentumCodec:
    """The codec for a dtype of `Precision.momentum`."""
    codecs: dict[torch.dtype, MomentumCodec] = {
        torch.float32: Float32Momentum(),
        torch.bfloat16: Bfloat16Momentum(),
        torch.int8: Int8Momentum(),
    }
    return codecs[dtype]


_LEAST_EXPONENT = 27  # of a scale: 4^-50, so that all values are normal numbers of bfloat16


def quantize_update(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (blocks, BLOCK) of any floating-point dtype to int8 codes and (blocks,) uint8 exponents of the scales.

    See [Note: updates in int8]. An exponent is a scale's in float32, which is odd for a power of four; 255: not finite.
    """
    shares = values.float()
    exponents = (shares.abs().amax(dim=1).view(torch.int32) >> 23).bitwise_and_(0xFF)  # a NaN may have a sign
    exponents.clamp_(min=_LEAST_EXPONENT).sub_(1).bitwise_or_(1)
    roots = shares.div(_power(exponents)).abs().sqrt_().mul_(64.0).round_().clamp_(max=127.0).nan_to_num_(nan=0.0)
    return roots.copysign_(shares).to(torch.int8), exponents.to(torch.uint8)


def dequantize_update(codes: Tensor, exponents: Tensor, out: Tensor) -> None:
    """The inverse of `quantize_update`: write the values to `out`, (blocks, BLOCK) in the dtype of the exchange."""
    scales = _power(exponents.to(torch.int32)).mul_(64.0**-2)
    out.copy_(codes).mul_(codes.abs()).mul_(scales.to(out.dtype))


def _power(exponents: Tensor) -> Tensor:
    """(n,) int32 exponents of float32 numbers -> (n, 1) float32 powers of two; 255: infinity."""
    return (exponents << 23).view(torch.float32).unsqueeze(1)


class UpdateCodec(Protocol):
    """The format of the polar factors that a rank sends to all others, if updates travel."""

    block: int
    """The number of elements that share a scale, from the first element of a matrix on."""
    opened_bytes: int
    """The bytes an element that `room` and `decode` allocate."""

    def rounded(self, polar: Tensor) -> Tensor:
        """Round whole polar factors (B, m, n), so that no part of them changes when it travels; contiguous."""

    def bytes(self, elements: int) -> int:
        """The bytes of whole blocks."""

    def room(self, sent: Tensor) -> Tensor:
        """(elements,) memory for the values that `encode` writes to `sent`, bytes of a message; zeros."""

    def encode(self, values: Tensor, sent: Tensor) -> None:
        """Write whole blocks of `values`, which `room` made, to `sent`."""

    def decode(self, sent: Tensor) -> Tensor:
        """The values in `sent`, (elements,)."""


class PlainUpdates:
    """Polar factors in the dtype of the exchange."""

    block = 1
    opened_bytes = 0

    def __init__(self, wire: torch.dtype, computed: torch.dtype) -> None:
        """`wire`: the dtype of the exchange; `computed`: that of Newton-Schulz."""
        self.wire = wire
        self.computed = computed

    def rounded(self, polar: Tensor) -> Tensor:
        loses_nothing = torch.promote_types(self.wire, self.computed) == self.wire
        return polar.to(self.computed if loses_nothing else self.wire).contiguous()

    def bytes(self, elements: int) -> int:
        return elements * self.wire.itemsize

    def room(self, sent: Tensor) -> Tensor:
        return sent.view(self.wire)

    def encode(self, values: Tensor, sent: Tensor) -> None:
        """Do nothing: `room` is `sent` itself."""

    def decode(self, sent: Tensor) -> Tensor:
        return sent.view(self.wire)


class Int8Updates:
    """Polar factors in int8, then a byte for the scale of each block; see [Note: updates in int8]."""

    block = BLOCK

    def __init__(self, wire: torch.dtype) -> None:
        """`wire`: the dtype of the exchange, in which the values are when they are not in a message."""
        self.wire = wire
        self.opened_bytes = wire.itemsize

    def rounded(self, polar: Tensor) -> Tensor:
        size = polar[0].numel()
        missing = -size % BLOCK
        flat = polar.reshape(-1, size)
        flat = (pad(flat, (0, missing)) if missing else flat).view(-1)
        found = torch.empty_like(flat, dtype=self.wire)
        for low, part in _parts(flat, 2**14):
            codes, exponents = quantize_update(part.view(-1, BLOCK))
            dequantize_update(codes, exponents, found[low : low + part.numel()].view(-1, BLOCK))
        return found.view(-1, size + missing)[:, :size].reshape(polar.shape).contiguous()

    def bytes(self, elements: int) -> int:
        return elements + elements // BLOCK

    def room(self, sent: Tensor) -> Tensor:
        return torch.zeros(self._elements(sent), dtype=self.wire, device=sent.device)

    def encode(self, values: Tensor, sent: Tensor) -> None:
        codes, exponents = self._parts_of(sent)
        for low, part in _parts(values, 2**14):
            blocks = slice(low // BLOCK, (low + part.numel()) // BLOCK)
            codes[blocks], exponents[blocks] = quantize_update(part.view(-1, BLOCK))

    def decode(self, sent: Tensor) -> Tensor:
        codes, exponents = self._parts_of(sent)
        values = torch.empty(self._elements(sent), dtype=self.wire, device=sent.device)
        for low, part in _parts(values, 2**14):
            blocks = slice(low // BLOCK, (low + part.numel()) // BLOCK)
            dequantize_update(codes[blocks], exponents[blocks], part.view(-1, BLOCK))
        return values

    def _elements(self, sent: Tensor) -> int:
        return sent.numel() // (BLOCK + 1) * BLOCK

    def _parts_of(self, sent: Tensor) -> tuple[Tensor, Tensor]:
        elements = self._elements(sent)
        return sent[:elements].view(torch.int8).view(elements // BLOCK, BLOCK), sent[elements:]


def update_codec(updates: torch.dtype | None, wire: torch.dtype, computed: torch.dtype) -> UpdateCodec:
    """The codec for `Precision.updates`, with the dtypes of the exchange and of Newton-Schulz."""
    return PlainUpdates(wire, computed) if updates is None else Int8Updates(wire)


class MasterCodec(Protocol):
    """The format of a float32 master: a tensor `kept` beside the parameter. All tensors of a call have one shape.

    `BucketStorage.masters` decodes the masters of a rank's shard for line 6 of a step (`Bucket.update`), and at its end
    encodes them, which gives the parameters their bits. Other ranks receive these bits by the all-gather.
    """

    bytes_per_element: int

    def make(self, param: Tensor) -> Tensor | None:
        """Make `kept` for a new parameter; None if nothing is kept."""

    def decode(self, param: Tensor, kept: Tensor | None) -> Tensor:
        """The float32 master; new memory unless it is stored as float32."""

    def encode(self, master: Tensor, param: Tensor, kept: Tensor | None) -> None:
        """Write `master` (of any dtype and device) to `kept`, and to the parameter, rounded."""

    def absorb(self, param: Tensor, kept: Tensor | None) -> None:
        """Write elements of `param` that have been written externally into the master."""


class OwnMaster:
    """Codec of a float32 parameter, which is itself the master."""

    bytes_per_element = 0

    def make(self, param: Tensor) -> Tensor | None:
        return None

    def decode(self, param: Tensor, kept: Tensor | None) -> Tensor:
        return param

    def encode(self, master: Tensor, param: Tensor, kept: Tensor | None) -> None:
        if master is not param:
            param.copy_(master)

    def absorb(self, param: Tensor, kept: Tensor | None) -> None:
        """Do nothing, since the parameter is the master."""


class Float32Master:
    """Codec of a float32 master beside a 16-bit parameter."""

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
        """Overwrite masters that do not round to their parameter; the others keep their full precision."""
        assert kept is not None
        fused.absorb(param, kept)


class RemainderMaster:
    """Codec of the 16 bits that a bfloat16 parameter lacks; see remainders.py."""

    bytes_per_element = 2

    def make(self, param: Tensor) -> Tensor | None:
        return torch.zeros_like(param, dtype=torch.int16)

    def decode(self, param: Tensor, kept: Tensor | None) -> Tensor:
        assert kept is not None
        return fused.join(param, kept)

    def encode(self, master: Tensor, param: Tensor, kept: Tensor | None) -> None:
        assert kept is not None
        fused.split(master.to(kept.device, torch.float32), param, kept)

    def absorb(self, param: Tensor, kept: Tensor | None) -> None:
        """Do nothing: a written parameter and its remainder give a master that rounds to the parameter."""


def master_codec(param_dtype: torch.dtype, master: str) -> MasterCodec:
    """The codec for the format `master` (`Precision.master`) of a parameter of `param_dtype`."""
    if param_dtype == torch.float32:
        return OwnMaster()
    return RemainderMaster() if master == "remainder" and param_dtype == torch.bfloat16 else Float32Master()
