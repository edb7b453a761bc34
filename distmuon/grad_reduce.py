"""Gradients -> the averaged gradient of this rank's shard.

Two sources with one face (`GradSource`): `BackwardReducer` reduces by itself, under backward; `ReducedGrads` takes
what somebody else (DDP, a trainer) has averaged. Neither knows what the gradient is for.

[Note: bucket readiness] A bucket is ready when all its parameters have reported in this backward. Buckets start
strictly in index order, on every rank: a ready bucket waits for those before it, and what never became ready starts
in `finish`. So all ranks issue the same collectives, whatever had no gradient where.

    collecting --all reported, predecessors started--> reducing --finish--> reduced --reset--> collecting
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from distmuon.buffers import Buffers
from distmuon.collectives import DataParallelGroup, Pending
from distmuon.config import Options
from distmuon.errors import problem


class GradSource(Protocol):
    """What the optimizer asks of either source."""

    def accept(self, index: int, param: nn.Parameter, sync: bool) -> None:
        """Backward has finished the gradient of parameter `index`; `sync`: this is the step's last micro-batch."""

    def finish(self) -> Sequence[bool]:
        """All shards reduced (idempotent until `reset`). Returns, per parameter, whether this rank had a gradient."""

    def reset(self) -> None:
        """Forget this step's gradients."""


def make_source(buffers: Buffers, group: DataParallelGroup, options: Options) -> GradSource:
    """The source that `grad_reduction` names."""
    if options.grad_reduction == "external":
        return ReducedGrads(buffers)
    return BackwardReducer(buffers, group, options.overlap)


class BackwardReducer:
    """Overlapped reduce-scatter, see [Note: bucket readiness].

    A reported gradient is moved into the flat buffer in the reduce dtype and `param.grad` is set to None: the next
    micro-batch adds to the flat buffer.
    """

    def __init__(self, buffers: Buffers, group: DataParallelGroup, overlap: bool) -> None:
        self._buffers = buffers
        self._group = group
        self._overlap = overlap
        self._places = [buffers.grad_places(index) for index in range(len(buffers.params))]
        self._bucket_of = buffers.layout.bucket_of
        self._streams: list[set[torch.cuda.Stream]] = [set() for _ in buffers.buckets]
        self._clear()

    def _clear(self) -> None:
        self._has_grad = [False] * len(self._places)
        self._waiting_for = [len(b.bucket.params) for b in self._buffers.buckets]
        self._reported: set[int] = set()
        self._pending: list[Pending] = []
        self._synced = False
        self._finished = False

    def accept(self, index: int, param: nn.Parameter, sync: bool) -> None:
        if param.grad is None:
            return
        bucket = self._bucket_of[index]
        if bucket < len(self._pending):
            raise problem(
                self._buffers.layout.specs[index].fqn,
                "a gradient arrived after its bucket was reduced in this step",
                "only the last backward of a step may reduce",
                "wrap the earlier ones in `with optimizer.no_sync():`, or pass overlap=False",
            )
        self._move_in(index, param)
        if not sync:
            return
        self._synced = True
        if index not in self._reported:
            self._reported.add(index)
            self._waiting_for[bucket] -= 1
        while self._overlap and len(self._pending) < len(self._waiting_for):
            if self._waiting_for[len(self._pending)]:
                break
            self._start_next()

    @torch.no_grad()
    def _move_in(self, index: int, param: nn.Parameter) -> None:
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise problem(
                self._buffers.layout.specs[index].fqn, f"its gradient is {grad.layout}", "dense gradients are needed",
                "build the embedding with sparse=False",
            )  # fmt: skip
        elements = grad.reshape(-1)
        for flat, offset in self._places[index]:
            piece = elements[offset : offset + flat.numel()]
            if self._has_grad[index]:
                flat.add_(piece)
            else:
                flat.copy_(piece)
        self._has_grad[index] = True
        param.grad = None
        if elements.is_cuda:
            self._streams[self._bucket_of[index]].add(torch.cuda.current_stream(elements.device))

    def _start_next(self) -> None:
        """Start the reduce-scatter of the next bucket in order, in place in its own slice."""
        index = len(self._pending)
        bucket = self._buffers.buckets[index]
        for stream in self._streams[index]:  # gradients may have been copied on several streams
            torch.cuda.current_stream(bucket.grad_flat.device).wait_stream(stream)
        self._streams[index].clear()
        with torch.profiler.record_function(f"distmuon::reduce_scatter/{index}"):
            self._pending.append(
                self._group.start_reduce_scatter(bucket.grad_shard, bucket.grad_flat, stage="reduce_scatter")
            )

    def finish(self) -> Sequence[bool]:
        if self._finished:
            return self._has_grad
        for index, param in enumerate(self._buffers.params):
            if param.grad is not None and self._has_grad[index]:
                raise _written_after(self._buffers.layout.specs[index].fqn)
            if param.grad is not None:  # set by hand, not by backward
                self.accept(index, param, sync=False)
            if not self._has_grad[index]:
                for flat, _ in self._places[index]:
                    flat.zero_()
        while len(self._pending) < len(self._waiting_for):
            self._start_next()
        for pending in self._pending:
            pending.wait()
        self._finished = True
        return self._has_grad

    def reset(self) -> None:
        if self._synced and not self._finished:
            self.finish()  # a discarded backward: ranks may have started different buckets, so start them all
        self._clear()


def _written_after(fqn: str) -> ValueError:
    """The refusal of gradients that somebody put where distmuon has taken its own away: clipping would see those."""
    return problem(
        fqn, "param.grad was written after backward had handed its gradient to the reduction",
        "a second reduction (DDP, DeepSpeed) averages and clips what distmuon does not read",
        "do not wrap the model, or take the trainer's own line from distmuon.integrations, "
        'or pass grad_reduction="external"',
    )  # fmt: skip


class ReducedGrads:
    """Takes this rank's shard out of `param.grad`, which somebody else has averaged over the ranks."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._has_grad: list[bool] | None = None

    def accept(self, index: int, param: nn.Parameter, sync: bool) -> None:
        """Nothing: gradients are read when the step begins, after the reduction of whoever averages them."""

    @torch.no_grad()
    def finish(self) -> Sequence[bool]:
        if self._has_grad is None:
            self._has_grad = [param.grad is not None for param in self._buffers.params]
            for bucket in self._buffers.buckets:
                for piece in bucket.muon + bucket.adamw:
                    self._read(piece.grad, piece.segment.param, piece.segment.param_offset)
        return self._has_grad

    def _read(self, place: Tensor, index: int, offset: int) -> None:
        grad = self._buffers.params[index].grad
        if grad is None:
            place.zero_()
        else:
            place.copy_(grad.reshape(-1)[offset : offset + place.numel()])

    def reset(self) -> None:
        self._has_grad = None
