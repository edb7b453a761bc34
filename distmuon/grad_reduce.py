"""Gradients -> the averaged gradient of this rank's shard.

Two sources with one face (`GradSource`): `BackwardReducer` reduces by itself, under backward; `ReducedGrads` takes
what somebody else (DDP, a trainer) has averaged. Neither knows what the gradient is for.

[Note: bucket readiness] A bucket is ready when all its parameters have reported in this backward. Buckets start
strictly in index order, on every rank: a ready bucket waits for those before it, and what never became ready starts
in `finish`. So all ranks issue the same collectives, whatever had no gradient where.

    collecting --all reported, predecessors started--> reducing --finish--> reduced --reset--> collecting
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def wait(self, bucket: int) -> None:
        """Wait for the shard of one bucket whose reduction has started."""

    def reset(self) -> None:
        """Forget this step's gradients."""

    @property
    def synced(self) -> bool:
        """A last micro-batch's backward has begun, so that reductions may have started."""


def make_source(
    buffers: Buffers, group: DataParallelGroup, options: Options, on_started: Callable[[int], None]
) -> GradSource:
    """The source that `grad_reduction` names."""
    if options.grad_reduction == "external":
        return ReducedGrads(buffers)
    return BackwardReducer(buffers, group, bool(options.overlap), on_started)


class BackwardReducer:
    """Overlapped reduce-scatter, see [Note: bucket readiness].

    A reported gradient is moved into the flat buffer in the reduce dtype and `param.grad` is set to None: the next
    micro-batch adds to the flat buffer. `on_started(k)` is called, on all ranks in the same order, when bucket k's
    reduction has started.
    """

    def __init__(
        self, buffers: Buffers, group: DataParallelGroup, overlap: bool, on_started: Callable[[int], None]
    ) -> None:
        self._buffers = buffers
        self._group = group
        self._overlap = overlap
        self._on_started = on_started
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
                "wrap the earlier ones in `with optimizer.no_sync():`, or pass overlap=False; drop gradients with "
                "optimizer.zero_grad(), not the model's; checkpoint activations with use_reentrant=False",
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
        _check_dense(self._buffers.layout.specs[index].fqn, grad)
        elements, bucket = grad.reshape(-1), self._bucket_of[index]
        flat = self._open(bucket)
        for start, offset, length in self._places[index]:
            place, piece = flat[start : start + length], elements[offset : offset + length]
            if self._has_grad[index]:
                place.add_(piece)
            else:
                place.copy_(piece)
        self._has_grad[index] = True
        param.grad = None

    def _open(self, bucket: int) -> Tensor:
        """The bucket's flat buffer, for the current stream to write. Backward may run on several streams."""
        flat = self._buffers.open_grads(bucket)
        if flat.is_cuda:
            stream = torch.cuda.current_stream(flat.device)
            if stream not in self._streams[bucket]:
                for other in self._streams[bucket]:  # one of them made the buffer, in memory that it may still use
                    stream.wait_stream(other)
                self._streams[bucket].add(stream)
        return flat

    @torch.no_grad()
    def _start_next(self) -> None:
        """Start the reduce-scatter of the next bucket in order, zeros for parameters without a gradient."""
        index = len(self._pending)
        buffers, bucket = self._buffers, self._buffers.buckets[index]
        for param in bucket.bucket.params:
            if not self._has_grad[param] and buffers.params[param].grad is not None:  # set by hand, not by backward
                self._move_in(param, buffers.params[param])
            elif not self._has_grad[param]:
                for start, _, length in self._places[param]:
                    self._open(index)[start : start + length].zero_()
        flat = self._open(index)
        for stream in self._streams[index]:
            torch.cuda.current_stream(flat.device).wait_stream(stream)
        with torch.profiler.record_function(f"distmuon::reduce_scatter/{index}"):
            shard, about = bucket.grad_shard, bucket.about
            pending = self._group.start_reduce_scatter(shard, flat, stage="reduce_scatter", about=about)
            self._pending.append(pending)
        if buffers.options.release_grads and index:  # the bucket before makes room for the next
            self.wait(index - 1)
        self._on_started(index)

    def wait(self, bucket: int) -> None:
        """Wait for bucket `bucket`, whose reduction has started."""
        self._pending[bucket].wait()
        if self._buffers.options.release_grads:
            for stream in self._streams[bucket]:  # they may get the buffer's memory next
                stream.wait_stream(torch.cuda.current_stream(stream.device))
            self._buffers.release_grads(bucket)
        self._streams[bucket].clear()

    def finish(self) -> Sequence[bool]:
        if self._finished:
            return self._has_grad
        for index, param in enumerate(self._buffers.params):
            if param.grad is not None and self._has_grad[index]:
                raise _written_after(self._buffers.layout.specs[index].fqn)
        while len(self._pending) < len(self._waiting_for):
            self._start_next()
        for bucket in range(len(self._pending)):
            self.wait(bucket)
        self._finished = True
        return self._has_grad

    def reset(self) -> None:
        if self._overlap and self._synced and not self._finished:
            self.finish()  # a discarded backward: ranks may have started different buckets, so start them all
        if self._buffers.options.release_grads:
            for bucket in range(len(self._waiting_for)):
                self._buffers.release_grads(bucket)
        self._clear()

    @property
    def synced(self) -> bool:
        return self._synced


def _written_after(fqn: str) -> ValueError:
    """The refusal of gradients that somebody put where distmuon has taken its own away: clipping would see those."""
    return problem(
        fqn, "param.grad was written after backward had handed its gradient to the reduction",
        "a second reduction (DDP, DeepSpeed) averages and clips what distmuon does not read",
        "do not wrap the model, or take the trainer's own line from distmuon.integrations, "
        'or pass grad_reduction="external"',
    )  # fmt: skip


def _check_dense(fqn: str, grad: Tensor | None) -> None:
    if grad is not None and grad.layout != torch.strided:
        raise problem(
            fqn, f"its gradient is {grad.layout}", "dense gradients are needed", "build the embedding with sparse=False"
        )


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
            for spec, param in zip(self._buffers.layout.specs, self._buffers.params):
                _check_dense(spec.fqn, param.grad)
            for bucket in self._buffers.buckets:
                for piece in bucket.muon + bucket.adamw:
                    self._read(piece.grad, piece.segment.param, piece.segment.param_offset)
        return self._has_grad

    def wait(self, bucket: int) -> None:
        """Nothing: there is nothing under way."""

    def _read(self, place: Tensor, index: int, offset: int) -> None:
        grad = self._buffers.params[index].grad
        if grad is None:
            place.zero_()
        else:
            place.copy_(grad.reshape(-1)[offset : offset + place.numel()])

    def reset(self) -> None:
        self._has_grad = None

    @property
    def synced(self) -> bool:
        return False
