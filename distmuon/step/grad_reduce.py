"""Gradients -> the averaged gradient of this rank's shard.

Two sources with one face (`GradSource`): `BackwardReducer` reduces by itself, under backward; `GivenGrads` reads what
stands in `param.grad`, averaged by somebody else (DDP, a trainer) or, in one process, by nobody. Neither knows what
the gradient is for.

[Note: bucket readiness] A bucket is ready when all its parameters have reported in this backward. Buckets start
strictly in index order, on every rank: a ready bucket waits for those before it, and what never became ready starts
when that backward ends. So all ranks issue the same collectives, whatever had no gradient where, and what the user's
own collectives meet between backward and `step` is the same on all of them, too.

    collecting --all reported, predecessors started--> reducing --finish--> reduced --reset--> collecting

[Note: the end of a backward] Autograd runs a callback when the backward that queued it ends. With reentrant
checkpointing a backward runs inside a node of another one, whose gradients are still to come. So a callback that finds
itself inside a node hands itself on, by a hook that this node calls when it is done, to the backward outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distmuon.comm.group import DataParallelGroup, Pending
from distmuon.errors import problem
from distmuon.options import Options
from distmuon.step.placeholder import InReduction
from distmuon.step.storage import Buffers


class GradSource(Protocol):
    """What the conductor asks of either source."""

    def accept(self, index: int, param: nn.Parameter, sync: bool) -> None:
        """Backward has finished the gradient of parameter `index`; `sync`: this is the step's last micro-batch."""

    def finish(self) -> Sequence[bool]:
        """All shards reduced (idempotent until `reset`). Returns, per parameter, whether this rank had a gradient."""

    def scale(self, coefficient: Tensor) -> None:
        """Multiply the reduced gradients by a 0-dim tensor on their device, also where the user sees them."""

    def reset(self) -> None:
        """Forget this step's gradients."""

    @property
    def begun(self) -> bool:
        """This rank has started reductions that other ranks must start, too."""

    @property
    def finished(self) -> bool:
        """The shards hold this step's gradients: nothing has arrived since `finish`."""

    @property
    def changed(self) -> bool:
        """Somebody has written the gradients since `finish` read them."""

    @property
    def holds_grads(self) -> bool:
        """Gradients of this step have left `param.grad`."""


def make_source(buffers: Buffers, group: DataParallelGroup, options: Options) -> GradSource:
    """The source that `grad_reduction` names; in one process gradients stay where autograd puts them."""
    if options.grads_stay(group.dp_size):
        return GivenGrads(buffers)
    return BackwardReducer(buffers, group, bool(options.sharding.overlap))


class BackwardReducer:
    """Overlapped reduce-scatter, see [Note: bucket readiness].

    A reported gradient is moved into the flat buffer in the reduce dtype, and an `InReduction` takes its place in
    `param.grad`: the next micro-batch adds to it, in float32 whatever the reduce dtype ([Note: sums] in storage.py).
    """

    def __init__(self, buffers: Buffers, group: DataParallelGroup, overlap: bool) -> None:
        self._buffers = buffers
        self._group = group
        self._overlap = overlap
        self._places = [buffers.grad_places(index) for index in range(len(buffers.params))]
        self._placeholders = [
            InReduction(param, spec.fqn) for param, spec in zip(buffers.params, buffers.layout.specs, strict=True)
        ]
        self._bucket_of = buffers.layout.bucket_of
        self._streams: list[set[torch.cuda.Stream]] = [set() for _ in buffers.buckets]
        self._backward = -1  # autograd's number of the last one whose end calls us
        self._clear()

    def _clear(self) -> None:
        self._has_grad = [False] * len(self._places)
        self._waiting_for = [len(b.bucket.params) for b in self._buffers.buckets]
        self._reported: set[int] = set()
        self._pending: list[Pending] = []
        self._finished = False

    def accept(self, index: int, param: nn.Parameter, sync: bool) -> None:
        grad = self._take(index, param)
        if grad is None:
            return
        bucket = self._bucket_of[index]
        if bucket < len(self._pending):
            if not self._all_dropped():
                raise self._second_reduction(index)
            self.reset()  # `model.zero_grad()`: the gradients that were reduced are not wanted
        self._buffers.check_in_place(index)
        self._move_in(index, grad, several=not sync)
        param.grad = self._placeholders[index]
        if not sync:
            return
        if index not in self._reported:
            self._reported.add(index)
            self._waiting_for[bucket] -= 1
        if self._overlap:
            self._call_at_the_end_of_backward()
            while len(self._pending) < len(self._waiting_for) and not self._waiting_for[len(self._pending)]:
                self._start_next()

    def _take(self, index: int, param: nn.Parameter) -> Tensor | None:
        """The gradient that backward has just left in `param.grad`."""
        added = self._placeholders[index].taken()
        if added is not None or param.grad is self._placeholders[index]:
            return added
        if self._has_grad[index] and self._bucket_of[index] >= len(self._pending):
            self._has_grad[index] = False  # the user dropped those of earlier micro-batches
        return param.grad

    def _all_dropped(self) -> bool:
        """Nothing of this step's gradients is left in sight, but for what the running backward has made."""
        pairs = zip(self._buffers.params, self._placeholders, self._has_grad)
        return not any(had and param.grad is placeholder for param, placeholder, had in pairs)

    def _second_reduction(self, index: int) -> ValueError:
        return problem(
            self._buffers.layout.specs[index].fqn,
            "a gradient arrived after its bucket was reduced in this step",
            "only the last backward of a step may reduce",
            "wrap the earlier ones in `with optimizer.no_sync():`, or pass overlap=False, which reduces in step(); "
            "call zero_grad() before a backward that starts anew; checkpoint activations with use_reentrant=False",
        )

    def _call_at_the_end_of_backward(self) -> None:
        """See [Note: the end of a backward]."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward and backward >= 0:
            self._backward = backward
            _at_the_end_of_backward(self._start_all)

    def _start_all(self) -> None:
        """Start the buckets that never became ready: a parameter without a gradient counts as zeros."""
        while len(self._pending) < len(self._waiting_for):
            self._start_next()

    @torch.no_grad()
    def _move_in(self, index: int, grad: Tensor, *, several: bool = False) -> None:
        _check_dense(self._buffers.layout.specs[index].fqn, grad)
        elements, bucket = grad.reshape(-1), self._bucket_of[index]
        flat = self._open(bucket, several=several or self._has_grad[index])
        for start, offset, length in self._places[index]:
            place, piece = flat[start : start + length], elements[offset : offset + length]
            if self._has_grad[index]:
                place.add_(piece)
            else:
                place.copy_(piece)
        self._has_grad[index] = True

    def _open(self, bucket: int, *, several: bool = False) -> Tensor:
        """`Buffers.open_grads`, for the current stream to write. Backward may run on several streams."""
        if self._buffers.device.type != "cuda":
            return self._buffers.open_grads(bucket, several=several)
        stream = torch.cuda.current_stream(self._buffers.device)
        begins_sum = several and self._buffers.lacks_sum(bucket)
        others = self._streams[bucket] - {stream}
        if begins_sum or stream not in self._streams[bucket]:
            for other in others:  # one of them made the buffer, in memory that it may still use, and all wrote into it
                stream.wait_stream(other)
            self._streams[bucket].add(stream)
        flat = self._buffers.open_grads(bucket, several=several)
        if begins_sum:
            for other in others:
                other.wait_stream(stream)
        return flat

    def _let_go(self, bucket: int) -> None:
        """Make streams that wrote into gradient memory, and may get it next, wait for the current one to be done."""
        for stream in self._streams[bucket]:
            current = torch.cuda.current_stream(stream.device)
            if stream != current:
                stream.wait_stream(current)

    @torch.no_grad()
    def _start_next(self) -> None:
        """Start the reduce-scatter of the next bucket in order, zeros for parameters without a gradient."""
        index = len(self._pending)
        buffers, bucket = self._buffers, self._buffers.buckets[index]
        for number in bucket.bucket.params:
            param, grad = buffers.params[number], buffers.params[number].grad
            if not self._has_grad[number] and grad is not None and grad is not self._placeholders[number]:
                self._move_in(number, grad)  # set by hand, not by backward
                param.grad = self._placeholders[number]
            elif self._has_grad[number] and grad is None:
                self._has_grad[number] = False  # the user dropped it
            if not self._has_grad[number]:
                for start, _, length in self._places[number]:
                    self._open(index)[start : start + length].zero_()
        gathered = self._open(index)
        for stream in self._streams[index]:
            torch.cuda.current_stream(gathered.device).wait_stream(stream)
        flat = buffers.close_sum(index)
        if flat is not gathered:
            self._let_go(index)
        del gathered
        with torch.profiler.record_function(f"distmuon::reduce_scatter/{index}"):
            shard, about = bucket.grad_shard, bucket.about
            pending = self._group.start_reduce_scatter(shard, flat, stage="reduce_scatter", about=about)
            self._pending.append(pending)
        if buffers.options.sharding.release_grads and index:  # the bucket before makes room for the next
            self._wait(index - 1)

    def _wait(self, bucket: int) -> None:
        """Wait for bucket `bucket`, whose reduction has started."""
        self._pending[bucket].wait()
        if self._buffers.options.sharding.release_grads:
            self._let_go(bucket)
            self._buffers.release_grads(bucket)
        self._streams[bucket].clear()

    def finish(self) -> Sequence[bool]:
        if self._finished:
            return self._has_grad
        self._check_unwritten()
        self._start_all()
        for bucket in range(len(self._pending)):
            self._wait(bucket)
        self._drop_what_the_user_dropped()
        self._finished = True
        return self._has_grad

    def _check_unwritten(self) -> None:
        """Raise for gradients that somebody put where distmuon has taken its own away: clipping would see those."""
        for index, param in enumerate(self._buffers.params):
            late = self._has_grad[index] or self._bucket_of[index] < len(self._pending)
            if late and param.grad is not None and param.grad is not self._placeholders[index]:
                raise problem(
                    self._buffers.layout.specs[index].fqn,
                    "param.grad was written after backward had handed its gradient to the reduction",
                    "a second reduction (DDP, DeepSpeed) averages and clips what distmuon does not read",
                    "do not wrap the model, or take the trainer's own line from distmuon.integrations, "
                    'or pass grad_reduction="external"',
                )

    @torch.no_grad()
    def _drop_what_the_user_dropped(self) -> None:
        """A gradient set to None after backward counts as none, as in torch.optim; its reduction had started."""
        dropped = {i for i, param in enumerate(self._buffers.params) if self._has_grad[i] and param.grad is None}
        if not dropped:
            return
        for bucket in self._buffers.buckets:
            for piece in bucket.muon + bucket.adamw:
                if piece.segment.param in dropped:
                    piece.grad.zero_()
        self._has_grad = [had and index not in dropped for index, had in enumerate(self._has_grad)]

    def scale(self, coefficient: Tensor) -> None:
        for bucket in self._buffers.buckets:
            bucket.grad_shard.mul_(coefficient)

    def reset(self) -> None:
        if self._pending:
            self._start_all()  # a backward that raised half-way; other ranks have started all
        for pending in self._pending:  # what travels must arrive before its buffer is written again
            pending.wait()
        for bucket, streams in enumerate(self._streams):
            for stream in streams:  # of gradients that nobody reduced
                torch.cuda.current_stream(stream.device).wait_stream(stream)
            self._let_go(bucket)
            streams.clear()
            self._buffers.release_grads(bucket)
        for param, placeholder in zip(self._buffers.params, self._placeholders):
            if param.grad is placeholder:
                param.grad = None
        self._clear()

    @property
    def begun(self) -> bool:
        return bool(self._pending) and not self._finished

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def changed(self) -> bool:
        return False

    @property
    def holds_grads(self) -> bool:
        return any(self._has_grad)


def _at_the_end_of_backward(call: Callable[[], None]) -> None:
    """Call `call` when the outermost backward that is running ends; see [Note: the end of a backward]."""

    def ended() -> None:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            call()
            return

        def outside(*_: object) -> None:
            handle.remove()
            _at_the_end_of_backward(call)

        handle = node.register_hook(outside)

    torch.autograd.Variable._execution_engine.queue_callback(ended)


def _check_dense(fqn: str, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise problem(
            fqn, f"its gradient is {grad.layout}", "dense gradients are needed", "build the embedding with sparse=False"
        )


class GivenGrads:
    """Reads this rank's shard out of `param.grad`, and leaves `param.grad` to the user."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._has_grad: list[bool] | None = None
        self._seen: list[tuple[Tensor, int]] = []  # the gradients that were read, at their versions

    def accept(self, index: int, param: nn.Parameter, sync: bool) -> None:
        """Gradients are read when the step begins, after the reduction of whoever averages them."""
        self.reset()

    @torch.no_grad()
    def finish(self) -> Sequence[bool]:
        if self._has_grad is None:
            self._has_grad = [param.grad is not None for param in self._buffers.params]
            for spec, param in zip(self._buffers.layout.specs, self._buffers.params):
                if param.grad is not None:
                    _check_dense(spec.fqn, param.grad)
            for bucket in self._buffers.buckets:
                for piece in bucket.muon + bucket.adamw:
                    self._read(piece.grad, piece.segment.param, piece.segment.param_offset)
            self._seen = self._now()
        return self._has_grad

    def _read(self, place: Tensor, index: int, offset: int) -> None:
        grad = self._buffers.params[index].grad
        if grad is None:
            place.zero_()
        else:
            place.copy_(grad.reshape(-1)[offset : offset + place.numel()])

    def _now(self) -> list[tuple[Tensor, int]]:
        return [(p.grad, p.grad._version) for p in self._buffers.params if p.grad is not None]

    @torch.no_grad()
    def scale(self, coefficient: Tensor) -> None:
        for bucket in self._buffers.buckets:
            bucket.grad_shard.mul_(coefficient)
        for grad, _ in self._seen:
            grad.mul_(coefficient)
        self._seen = self._now()

    def reset(self) -> None:
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
