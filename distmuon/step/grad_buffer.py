"""The flat buffer in which a bucket's gradients accumulate until they are reduced.

This module decides where a gradient is written, in which dtype it accumulates, and which CUDA stream waits for which.
It knows no collective and no parameter, only spans of elements.

[Note: sums] A sum of thousands of micro-batches in 16 bits stops growing: each addend is below half of the last place.
So if the buffer has 16 bits, and only while several backwards accumulate, a float32 `sum` replaces `flat`, from the
first gradient that is not the last of its parameter until the reduction starts. A step of one micro-batch has none.

[Note: shares] The reduction sums, and a mean is wanted. So each gradient is multiplied by 1/dp_size in the pass that
moves it into a float32 buffer, which costs nothing: a division after the sum would be one pass more, and NCCL's average
excludes its faster sums (in the switch of a node). If dp_size is a power of two, that changes no bit but of subnormal
numbers. In 16 bits small gradients would become zeros, so there the reduction divides its float32 sums.

[Note: arrivals] On a CPU the slices of all ranks arrive in a second buffer (comm/group.py, [Note: reduce-scatter on
gloo]), which is twice as large where the reduction has two levels. It is kept from step to step: memory of this size
that is made anew comes from the system page by page, which takes longer than the sum. With `released` nothing is kept.

[Note: streams of a backward] Autograd runs the backward of an operation on the stream of its forward, so gradients of
a bucket may come from several streams. A stream may allocate a buffer in memory that another stream still uses, and a
reduction must see what all streams have written. So the streams that wrote are recorded: a new stream waits for them,
and the stream that reduces waits for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """`length` elements of a parameter from `param_offset` on, at `start` of the flat buffer."""

    start: int
    param_offset: int
    length: int


class GradBuffer:
    """A buffer of `numel` elements for a sum over `dp_size` ranks.

    With `released` its memory exists only from the first gradient to the reduction.
    """

    def __init__(self, numel: int, dp_size: int, dtype: torch.dtype, device: torch.device, *, released: bool) -> None:
        self._numel = numel
        self._share = 1.0 / dp_size if dtype == torch.float32 else 1.0  # see [Note: shares]
        self._share_is_exact = frexp(self._share)[0] == 0.5
        self._dtype = dtype
        self._device = device
        self._released = released
        self._streams: set[torch.cuda.Stream] = set()  # streams that have written since the last reduction
        self.sum: Tensor | None = None  # float32; see [Note: sums]
        self._arrivals: Tensor | None = None
        self.flat = None if released else self._zeros(dtype)

    def add(self, spans: Sequence[Span], grad: Tensor, *, first: bool, several: bool) -> None:
        """Write the share of `grad` (a parameter's elements in row-major order), or add it if it is not the `first` of
        this step.

        `several`: whether the parameter gets several gradients in this step, see [Note: sums].
        """
        flat = self._open(several=several)
        for start, offset, length in spans:
            place, piece = flat[start : start + length], grad[offset : offset + length]
            if not first:
                place.add_(piece, alpha=self._share)
            elif place.dtype == piece.dtype or self._share_is_exact:
                torch.mul(piece, self._share, out=place)
            else:  # the product of 16-bit elements would be rounded to 16 bits before it is written
                place.copy_(piece).mul_(self._share)

    def zero(self, spans: Sequence[Span]) -> None:
        """Write zeros as the gradient of a parameter."""
        for start, _, length in spans:
            self._open()[start : start + length].zero_()

    def close(self) -> Tensor:
        """Return the full buffer in its dtype for reduction on the current stream, which waits for all writers."""
        written = self._open()
        for stream in self._streams:
            torch.cuda.current_stream(written.device).wait_stream(stream)
        total, self.sum = self.sum, None
        if total is None:
            return written
        flat = self._open_flat().copy_(total)
        self._free_from_streams()
        return flat

    def arrivals(self, numel: int) -> Tensor | None:
        """Memory of `numel` elements in which slices may arrive, or None; see [Note: arrivals]."""
        if self._arrivals is None and self._device.type == "cpu" and not self._released:
            self._arrivals = torch.empty(numel, dtype=self._dtype)
        return self._arrivals

    def reduced(self) -> None:
        """Let the memory be used again, after the current stream has waited for the reduction."""
        if self._released:
            self._free_from_streams()
            self.flat = None
        self.sum = None
        self._streams.clear()

    def drop(self) -> None:
        """Drop all gradients, reduced or not."""
        for stream in self._streams:  # streams of gradients that were never reduced
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        self._free_from_streams()
        self._streams.clear()
        self.sum = None
        if self._released:
            self.flat = None

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._numel, dtype=dtype, device=self._device)

    def _open(self, *, several: bool = False) -> Tensor:
        """The memory for the current stream to write into; see [Note: streams of a backward]."""
        if self._device.type != "cuda":
            return self._open_sum() if several else self._open_flat()
        stream = torch.cuda.current_stream(self._device)
        begins_sum = several and self._dtype != torch.float32 and self.sum is None
        others = self._streams - {stream}
        if begins_sum or stream not in self._streams:
            for other in others:
                stream.wait_stream(other)
            self._streams.add(stream)
        flat = self._open_sum() if several else self._open_flat()
        if begins_sum:
            for other in others:
                other.wait_stream(stream)
        return flat

    def _open_sum(self) -> Tensor:
        if self._dtype != torch.float32 and self.sum is None:
            begun, self.flat = self.flat, None
            self.sum = self._zeros(torch.float32) if begun is None else begun.float()
            if begun is not None and begun.is_cuda:  # the stream that allocated it need not be among `_streams`
                begun.record_stream(torch.cuda.current_stream(begun.device))
        return self._open_flat()

    def _open_flat(self) -> Tensor:
        if self.sum is not None:
            return self.sum
        if self.flat is None:
            self.flat = self._zeros(self._dtype)
        return self.flat

    def _free_from_streams(self) -> None:
        """Let the streams that wrote here, which may get the memory next, wait for the current stream."""
        for stream in self._streams:
            current = torch.cuda.current_stream(stream.device)
            if stream != current:
                stream.wait_stream(current)
