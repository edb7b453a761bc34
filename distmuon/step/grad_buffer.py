"""The flat buffer in which one bucket's gradients add up until they are reduced.

Decides where a gradient is written, in which dtype it adds up, and which CUDA stream waits for which. It knows no
collective and no parameter, only spans of elements.

[Note: sums] A sum of thousands of micro-batches in 16 bits stops growing: each addend is below half of its last place.
So where the buffer has 16 bits, and only while several backwards add up, a float32 `sum` stands in place of `flat`,
from the first gradient that is not the last of its parameter until the reduction starts. A step of one micro-batch
never has any.

[Note: streams of a backward] Autograd runs the backward of an operation on the stream of its forward, so gradients of
one bucket may come from several streams. The stream that makes a buffer may do so in memory that another stream still
uses, and a reduction must see what all of them have written. So the streams that wrote are noted: a new one waits for
them, and the stream that reduces waits for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """`length` elements from `param_offset` of a parameter on, which stand at `start` of the flat buffer."""

    start: int
    param_offset: int
    length: int


class GradBuffer:
    """`numel` elements on `device` in `dtype`; with `released` the memory lives from the first gradient to the
    reduction only."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, *, released: bool) -> None:
        self._numel, self._dtype, self._device, self._released = numel, dtype, device, released
        self._streams: set[torch.cuda.Stream] = set()  # those that have written since the last reduction
        self.sum: Tensor | None = None  # float32; see [Note: sums]
        self.flat = None if released else self._zeros(dtype)

    def add(self, spans: Sequence[Span], grad: Tensor, *, first: bool, several: bool) -> None:
        """Write `grad` (row-major elements of one parameter), or add it where it is not the `first` of this step.

        `several`: this is one of several addends of some parameter, see [Note: sums].
        """
        flat = self._open(several=several)
        for start, offset, length in spans:
            place, piece = flat[start : start + length], grad[offset : offset + length]
            if first:
                place.copy_(piece)
            else:
                place.add_(piece)

    def zero(self, spans: Sequence[Span]) -> None:
        """The gradient of one parameter is zero."""
        for start, _, length in spans:
            self._open()[start : start + length].zero_()

    def close(self) -> Tensor:
        """The whole buffer in its dtype, for the current stream to reduce: all that was written has arrived."""
        written = self._open()
        for stream in self._streams:
            torch.cuda.current_stream(written.device).wait_stream(stream)
        total, self.sum = self.sum, None
        if total is None:
            return written
        flat = self._open_flat().copy_(total)
        self._free_from_streams()
        return flat

    def reduced(self) -> None:
        """The current stream has waited for the reduction: the memory may be used again."""
        if self._released:
            self._free_from_streams()
            self.flat = None
        self.sum = None
        self._streams.clear()

    def drop(self) -> None:
        """Forget what was written, reduced or not."""
        for stream in self._streams:  # of gradients that were never reduced
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        self._free_from_streams()
        self._streams.clear()
        self.sum = None
        if self._released:
            self.flat = None

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._numel, dtype=dtype, device=self._device)

    def _open(self, *, several: bool = False) -> Tensor:
        """The memory to write into, for the current stream; see [Note: streams of a backward]."""
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
        return self._open_flat()

    def _open_flat(self) -> Tensor:
        if self.sum is not None:
            return self.sum
        if self.flat is None:
            self.flat = self._zeros(self._dtype)
        return self.flat

    def _free_from_streams(self) -> None:
        """Make streams that wrote here, and may get the memory next, wait for the current one to be done with it."""
        for stream in self._streams:
            current = torch.cuda.current_stream(stream.device)
            if stream != current:
                stream.wait_stream(current)
