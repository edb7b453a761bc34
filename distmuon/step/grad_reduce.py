"""The way from gradients to the averaged gradient of this rank's shard.

This module decides the order in which buckets reduce; it knows no rule. Two sources share the interface `GradSource`:
`BackwardReducer` reduces under backward, and `GivenGrads` reads `param.grad`, whose gradients arrive averaged (by DDP,
FSDP2 or a trainer) or belong to a single process.

[Note: bucket readiness] A bucket is ready when all its parameters have reported in this backward. Buckets start
strictly in index order on every rank: a ready bucket waits for the buckets before it, and buckets that never became
ready start when that backward ends. So all ranks issue the same collectives whichever parameters had no gradient, and
the user's collectives between backward and `step` come at the same place of that order on all ranks.

    COLLECTING --all reported, predecessors started--> REDUCING --finish--> REDUCED --reset--> COLLECTING   (`Grads`)

[Note: the end of a backward] Autograd runs a callback when the backward that queued it ends. With reentrant
checkpointing a backward runs inside a node of another backward, whose gradients are still to come. So a callback that
runs inside a node registers a hook, by which this node passes it on to the outer backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from distmuon.comm.group import DataParallelGroup
from distmuon.errors import problem
from distmuon.step.bucket import Bucket
from distmuon.step.placeholder import InReduction
from distmuon.step.storage import Storage


class GradSource(Protocol):
    """The interface of both sources to the engine."""

    def accept(self, index: int, sync: bool) -> None:
        """Accept the complete gradient of parameter `index`; `sync`: this is the step's last micro-batch."""

    def finish(self) -> Sequence[bool]:
        """Finish all shards; return whether this rank had a gradient for each parameter. Idempotent until `reset`."""

    def scale(self, coefficient: Tensor) -> None:
        """Multiply the reduced gradients, and those in `param.grad`, by a 0-dim tensor on their device."""

    def reset(self) -> None:
        """Drop this step's gradients."""

    @property
    def begun(self) -> bool:
        """Whether this rank has started reductions that other ranks must start, too."""

    @property
    def finished(self) -> bool:
        """Whether the shards hold this step's gradients, and no gradient has arrived since `finish`."""

    @property
    def changed(self) -> bool:
        """Whether gradients in `param.grad` were written since `finish` read them."""

    @property
    def holds_grads(self) -> bool:
        """Whether gradients of this step have left `param.grad`."""


def make_source(buckets: Sequence[Bucket], storage: Storage, group: DataParallelGroup) -> GradSource:
    """Make the source for `grad_reduction`; in a single process gradients stay in `param.grad`."""
    if storage.options.grads_stay(group.dp_size):
        return GivenGrads(storage)
    return BackwardReducer(buckets, storage)


class BackwardReducer:
    """Overlapped reduce-scatter, see [Note: bucket readiness].

    A reported gradient is moved into its bucket's buffer, and an `InReduction` replaces it in `param.grad`. Several
    micro-batches accumulate in float32, whatever the reduce dtype (grad_buffer.py, [Note: sums]).
    """

    def __init__(self, buckets: Sequence[Bucket], storage: Storage) -> None:
        self._buckets = buckets
        self._params, self._specs = storage.params, storage.layout.specs
        self._bucket_of = storage.layout.bucket_of
        self._overlap = bool(storage.options.sharding.overlap)
        self._releases = storage.options.sharding.release_grads
        pairs = zip(self._params, self._specs, strict=True)
        self._placeholders = [InReduction(param, spec.fqn) for param, spec in pairs]
        self._backward = -1  # autograd's id of the last backward with our callback
        self._clear()

    def _clear(self) -> None:
        self._has_grad = [False] * len(self._params)
        self._waiting_for = [len(bucket.params) for bucket in self._buckets]
        self._reported: set[int] = set()
        self._next = 0  # the first bucket whose reduction has not started
        self._finished = False

    def accept(self, index: int, sync: bool) -> None:
        grad = self._take(index)
        if grad is None:
            return
        bucket = self._bucket_of[index]
        if bucket < self._next:
            if not self._all_dropped():
                raise self._second_reduction(index)
            self.reset()  # `model.zero_grad()` has dropped the gradients that were reduced
        self._buckets[bucket].storage.check_in_place(index)
        self._move_in(index, grad, several=not sync)
        if not sync:
            return
        if index not in self._reported:
            self._reported.add(index)
            self._waiting_for[bucket] -= 1
        if self._overlap:
            self._register_end_of_backward()
            while self._next < len(self._buckets) and not self._waiting_for[self._next]:
                self._start_next()

    def _take(self, index: int) -> Tensor | None:
        """Take the gradient that backward has just left in `param.grad`."""
        param, placeholder = self._params[index], self._placeholders[index]
        added = placeholder.taken()
        if added is not None or param.grad is placeholder:
            return added
        if self._has_grad[index] and self._bucket_of[index] >= self._next:
            self._has_grad[index] = False  # the user dropped the gradients of earlier micro-batches
        return param.grad

    def _move_in(self, index: int, grad: Tensor, *, several: bool = False) -> None:
        _check_dense(self._specs[index].fqn, grad)
        self._buckets[self._bucket_of[index]].collect(index, grad, first=not self._has_grad[index], several=several)
        self._has_grad[index] = True
        self._params[index].grad = self._placeholders[index]

    def _all_dropped(self) -> bool:
        """Whether the user has dropped all gradients that were reported in this step."""
        pairs = zip(self._params, self._placeholders, self._has_grad)
        return not any(had and param.grad is placeholder for param, placeholder, had in pairs)

    def _second_reduction(self, index: int) -> ValueError:
        return problem(
            self._specs[index].fqn,
            found="a gradient arrived after its bucket was reduced in this step",
            needed="only the last backward of a step may reduce",
            cure="wrap earlier backwards in `with optimizer.no_sync():`, or pass Sharding(overlap=False), which "
            "reduces in step(); call zero_grad() before a backward that begins a new step; checkpoint activations "
            "with use_reentrant=False",
        )

    def _register_end_of_backward(self) -> None:
        """Register `_start_all` for the end of this backward; see [Note: the end of a backward]."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward and backward >= 0:
            self._backward = backward
            _call_at_end_of_backward(self._start_all)

    def _start_all(self) -> None:
        """Start the buckets that never became ready; a parameter without a gradient counts as zeros."""
        while self._next < len(self._buckets):
            self._start_next()

    def _start_next(self) -> None:
        """Start the reduction of the next bucket in order."""
        bucket = self._buckets[self._next]
        for index in bucket.params:
            grad = self._params[index].grad
            if not self._has_grad[index] and grad is not None and grad is not self._placeholders[index]:
                self._move_in(index, grad)  # set by hand, not by backward
            elif self._has_grad[index] and grad is None:
                self._has_grad[index] = False  # the user dropped it
        bucket.start_reduce(absent=[index for index in bucket.params if not self._has_grad[index]])
        self._next += 1
        if self._releases and bucket.index:  # release the previous bucket's buffer for the next bucket
            self._buckets[bucket.index - 1].finish_reduce()

    def finish(self) -> Sequence[bool]:
        if self._finished:
            return self._has_grad
        self._check_unwritten()
        self._start_all()
        for bucket in self._buckets:
            bucket.finish_reduce()
        self._zero_dropped()
        self._finished = True
        return self._has_grad

    def _check_unwritten(self) -> None:
        """Raise if other code has written `param.grad` after the gradient was reduced: clipping would use it."""
        for index, param in enumerate(self._params):
            late = self._has_grad[index] or self._bucket_of[index] < self._next
            if late and param.grad is not None and param.grad is not self._placeholders[index]:
                raise problem(
                    self._specs[index].fqn,
                    found="param.grad was written after its gradient went to the reduction",
                    needed="a second reduction (DDP, DeepSpeed) must not average or clip gradients, which distmuon "
                    "does not read",
                    cure="do not wrap the model, or use the trainer's module in distmuon.integrations, "
                    'or pass grad_reduction="external"',
                )

    @torch.no_grad()
    def _zero_dropped(self) -> None:
        """Zero the reduced gradient of parameters whose gradient was set to None after backward, as in torch.optim."""
        dropped = {i for i, param in enumerate(self._params) if self._has_grad[i] and param.grad is None}
        if not dropped:
            return
        for bucket in self._buckets:
            for piece in bucket.storage.muon + bucket.storage.adamw:
                if piece.segment.param in dropped:
                    piece.grad.zero_()
        self._has_grad = [had and index not in dropped for index, had in enumerate(self._has_grad)]

    def scale(self, coefficient: Tensor) -> None:
        for bucket in self._buckets:
            bucket.storage.scale_grads(coefficient)

    def reset(self) -> None:
        if self._next:
            self._start_all()  # after a backward that raised half-way, since other ranks have started all buckets
        for bucket in self._buckets:
            bucket.drop_grads()
        for param, placeholder in zip(self._params, self._placeholders):
            if param.grad is placeholder:
                param.grad = None
        self._clear()

    @property
    def begun(self) -> bool:
        return self._next > 0 and not self._finished

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def changed(self) -> bool:
        return False

    @property
    def holds_grads(self) -> bool:
        return any(self._has_grad)


def _call_at_end_of_backward(call: Callable[[], None]) -> None:
    """Call `call` when the outermost backward that is running ends; see [Note: the end of a backward]."""

    def ended() -> None:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            call()
            return

        def outside(*_: object) -> None:
            handle.remove()
            _call_at_end_of_backward(call)

        handle = node.register_hook(outside)

    torch.autograd.Variable._execution_engine.queue_callback(ended)


def _check_dense(fqn: str, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise problem(
            fqn,
            found=f"its gradient is {grad.layout}",
            needed="dense gradients are needed",
            cure="build the embedding with sparse=False",
        )


class GivenGrads:
    """Source that copies this rank's shard from `param.grad`, and leaves `param.grad` to the user."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._has_grad: list[bool] | None = None
        self._seen: list[tuple[Tensor, int]] = []  # the gradients that were read, at their versions

    def accept(self, index: int, sync: bool) -> None:
        """Drop older copies; gradients are read when the step begins, after they have been averaged."""
        self.reset()

    @torch.no_grad()
    def finish(self) -> Sequence[bool]:
        if self._has_grad is None:
            self._has_grad = [param.grad is not None for param in self._storage.params]
            for spec, param in zip(self._storage.layout.specs, self._storage.params):
                if param.grad is not None:
                    _check_dense(spec.fqn, param.grad)
            for bucket in self._storage.buckets:
                bucket.read_grads()
            self._seen = self._now()
        return self._has_grad

    def _now(self) -> list[tuple[Tensor, int]]:
        return [(grad, grad._version) for bucket in self._storage.buckets for grad in bucket.given_grads()]

    @torch.no_grad()
    def scale(self, coefficient: Tensor) -> None:
        for bucket in self._storage.buckets:
            bucket.scale_grads(coefficient)
        self._seen = self._now()

    def reset(self) -> None:
        for bucket in self._storage.buckets if self._has_grad is not None else ():
            bucket.let_go_of_grads()
        self._has_grad, self._seen = None, []

    @property
    def begun(self) -> bool:
        return False

    @property
    def finished(self) -> bool:
        return self._has_grad is not None

    @property
    def changed(self) -> bool:
        if self._has_grad is None:
            return False
        now = self._now()
        same = len(now) == len(self._seen)
        return not same or any(a is not b or before != v for (a, v), (b, before) in zip(now, self._seen))

    @property
    def holds_grads(self) -> bool:
        return False
