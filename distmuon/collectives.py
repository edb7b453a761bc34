"""The only caller of torch.distributed collectives: the data-parallel group and six verbs on flat tensors.

Decides how each verb is spelled on each backend and counts the bytes this rank sends. Knows no parameter, no
bucket, no rule. Every asynchronous verb returns a `Pending`, which owns its tensors until it was waited for.

[Note: buffer lifetime across streams] NCCL runs on its own stream. A buffer handed to it must neither be freed nor
overwritten by the compute stream before the collective has read it. A `Pending` therefore holds every tensor of the
collective, and `wait` makes the current stream wait for the communication stream before it lets go of them. Whoever
starts a collective keeps the `Pending`; nothing else is needed, no `record_stream`.

[Note: reduce-scatter on gloo] gloo builds its reduce-scatter on an all-reduce, twice the bytes. Here each rank sends
every other rank its slice (`all_to_all_single`) and sums what arrives in rank order in float32: the floor's bytes
exactly, and the same bits whatever the timing.

[Note: all-gather on gloo] torch's own goes through a flat copy of the whole output in new memory. A broadcast of each
rank's slice writes where it belongs: the same bytes in all.

[Note: clean exit] Making any torch optimizer imports torch._dynamo, and what that imports keeps the default group as
a default argument if it exists by then. The group would outlive `destroy_process_group`, and a gloo thread that drops
its last tensor while Python shuts down aborts the process (1 exit in 6, seen with torch 2.13). So it is imported
here: `import distmuon` before `init_process_group`, as scripts do, and the group ends where it is destroyed.
A work that nobody has waited for (the last step's all-gathers) keeps gloo's event thread past that, until the optimizer
goes: `synchronize` before the group is destroyed; a forward without gradients or a save does it, too.

[Note: who waits where] On gloo `Pending.wait` blocks, and raises when a rank is late by the group's timeout or its
connection is gone; `roll_call.py` then says which rank, and where. On NCCL `wait` only queues: the host runs on, and
NCCL's own watchdog ends the process at the timeout. With TORCH_NCCL_BLOCKING_WAIT=1 `wait` blocks and raises there,
too; that costs the host its lead, so it is for finding out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch._dynamo  # see [Note: clean exit]
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from distmuon.errors import problem
from distmuon.roll_call import LostRanks, Place, RollCall

ROLL_CALL_S = 300.0  # how much later than the first a rank may come to a roll call

_NOBODYS_TAG = 0x6D756F6E

Count = Callable[[str, int], None]
T = TypeVar("T")

# torch 2.13 renames the flat collectives and warns at the old names; older torch has only those.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(slots=True)
class Pending:
    """A collective under way. `wait` is idempotent and returns the result."""

    result: Tensor
    works: tuple[dist.Work, ...] = ()
    holds: tuple[Tensor, ...] = ()
    then: Callable[[], None] | None = field(default=None, repr=False)
    lost: Callable[[RuntimeError], LostRanks] | None = field(default=None, repr=False)

    def wait(self) -> Tensor:
        """Make the current stream (on CPU: the thread) wait; run what has to follow; free the inputs.

        Raises `LostRanks`, see [Note: who waits where].
        """
        try:
            for work in self.works:
                work.wait()
        except (torch.AcceleratorError, torch.OutOfMemoryError):  # a kernel's error, which no rank is missing for
            raise
        except RuntimeError as error:
            assert self.lost is not None
            raise self.lost(error) from error
        then, self.works, self.then = self.then, (), None
        if then is not None:
            then()
        self.holds = ()
        return self.result


class DataParallelGroup:
    """The data-parallel group: `dp_rank`, `dp_size` and the collectives, counted through `count(stage, bytes)`.

    `process_group=None` means the default group, or one rank where torch.distributed is not initialised. Every verb
    takes its `stage`, and what moves buckets also which (`about`): for the counters, and for the error when it fails.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, count: Count) -> None:
        # The default group stays None: a reference of ours would keep it alive past `destroy_process_group`.
        self.process_group = process_group
        self.count = count
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise problem(
                "process_group", f"found {process_group!r}", "a group that this rank is in, or None, is needed",
                "pass what torch.distributed.new_group(ranks) returned on these ranks",
            )  # fmt: skip
        distributed = process_group is not None or (dist.is_available() and dist.is_initialized())
        self.dp_size = dist.get_world_size(process_group) if distributed else 1
        self.dp_rank = dist.get_rank(process_group) if distributed else 0
        self._gloo = distributed and dist.get_backend(process_group) == "gloo"
        self._device: torch.device | None = None
        self.roll = RollCall(process_group, self.dp_rank, self.dp_size)
        self.step = 1  # the one in progress, since the optimizer was made; for messages

    def check_current(self, device: torch.device) -> None:
        """Raise if torch.distributed was initialised after this group was looked up: other ranks would be ignored.

        `device`: of the parameters; objects are gathered there, whatever the current device is.
        """
        self._device = device
        if self.process_group is None and self.dp_size == 1 and dist.is_initialized() and dist.get_world_size() > 1:
            raise problem(
                "process_group", f"DistMuon was made before the group of {dist.get_world_size()} ranks",
                "the group must exist by then", "call init_process_group first",
            )  # fmt: skip

    def check_same_ranks(self, group: DataParallelGroup) -> None:
        """Raise unless this group has the ranks of `group`, in the same order."""
        ours, theirs = (dist.get_process_group_ranks(g.process_group) if g.dp_size > 1 else [] for g in (self, group))
        if ours != theirs:
            raise problem(
                "exchange_group", f"ranks {ours}", f"the ranks of process_group, {theirs}, are needed",
                "make both with torch.distributed.new_group(ranks)",
            )  # fmt: skip

    def _lost(self, stage: str, about: str) -> Callable[[RuntimeError], LostRanks]:
        """What to raise if the collective that starts now fails; see roll_call.py, [Note: roll call]."""
        return partial(self.lost, Place(stage, about, self.step))

    def lost(self, place: Place, error: RuntimeError) -> LostRanks:
        """The error to raise for `error` of a collective at `place`."""
        return self.roll.lost(place, error, partial(hang_up, self.process_group))

    @contextmanager
    def _blocking(self, stage: str) -> Iterator[None]:
        try:
            yield
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise self._lost(stage, "")(error) from error

    def start_reduce_scatter(self, output: Tensor, input: Tensor, *, stage: str, about: str = "") -> Pending:
        """Mean over ranks of `input` (dp_size * n,), this rank's slice of it into `output` (n,), float32.

        `output` may be the slice of `input` that it replaces. `input` must not change before `wait`. What travels in
        16 bits is summed in float32, in rank order, on every backend: a ring would round each partial sum to 16 bits.
        """
        if self.dp_size == 1:
            return Pending(output.copy_(input) if output.data_ptr() != input.data_ptr() else output)
        self.count(stage, (self.dp_size - 1) * output.numel() * input.element_size())
        if not self._gloo and input.is_cuda and input.dtype == output.dtype:
            work = _reduce_scatter(output, input, op=dist.ReduceOp.AVG, group=self.process_group, async_op=True)
            return Pending(output, (work,), (input,), lost=self._lost(stage, about))
        received = torch.empty_like(input)
        work = dist.all_to_all_single(received, input, group=self.process_group, async_op=True)

        def sum_in_rank_order() -> None:
            if received.is_cuda:  # made on backward's stream, read here on whichever waits
                received.record_stream(torch.cuda.current_stream(received.device))
            first, *others = received.view(self.dp_size, -1)
            torch.add(first.to(output.dtype), others[0], out=output)
            for other in others[1:]:
                output.add_(other)
            output.div_(self.dp_size)

        return Pending(output, (work,), (input, received), sum_in_rank_order, self._lost(stage, about))

    def start_all_gather(self, output: Tensor, input: Tensor, *, stage: str, about: str = "") -> Pending:
        """`input` (n,) of every rank, in rank order, into `output` (dp_size * n,). `input` may be its own slice."""
        if self.dp_size == 1:
            return Pending(output.copy_(input) if output.data_ptr() != input.data_ptr() else output)
        self.count(stage, (self.dp_size - 1) * input.numel() * input.element_size())
        if self._gloo:
            works = self._broadcast_all(output, input)
        else:
            works = (_all_gather(output, input, group=self.process_group, async_op=True),)
        return Pending(output, works, (input,), lost=self._lost(stage, about))

    def _broadcast_all(self, output: Tensor, input: Tensor) -> tuple[dist.Work, ...]:
        """See [Note: all-gather on gloo]."""
        slices = output.view(self.dp_size, -1)
        if slices[self.dp_rank].data_ptr() != input.data_ptr():
            slices[self.dp_rank].copy_(input)
        broadcast = partial(dist.broadcast, group=self.process_group, async_op=True)
        return tuple(broadcast(part, group_src=rank) for rank, part in enumerate(slices))

    def start_all_to_all(
        self, output: Tensor, input: Tensor, receive_counts: list[int], send_counts: list[int], *,
        stage: str, about: str = "",
    ) -> Pending:  # fmt: skip
        """Uneven exchange of 1-D tensors: `send_counts[r]` elements of `input` go to rank r, in rank order."""
        if self.dp_size == 1:
            return Pending(output)
        sent = sum(n for rank, n in enumerate(send_counts) if rank != self.dp_rank)
        self.count(stage, sent * input.element_size())
        work = dist.all_to_all_single(
            output, input, receive_counts, send_counts, group=self.process_group, async_op=True
        )
        return Pending(output, (work,), (input,), lost=self._lost(stage, about))

    def start_all_reduce(self, tensor: Tensor, *, stage: str) -> Pending:
        """Sum over ranks, in place. For a few numbers: counted as a ring's 2*(dp_size-1)/dp_size."""
        if self.dp_size == 1:
            return Pending(tensor)
        self.count(stage, 2 * (self.dp_size - 1) * tensor.numel() * tensor.element_size() // self.dp_size)
        work = dist.all_reduce(tensor, group=self.process_group, async_op=True)
        return Pending(tensor, (work,), lost=self._lost(stage, ""))

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's values to all, in place, blocking, any dtype. Only while buffers are built: not counted."""
        if self.dp_size == 1 or not tensor.numel():
            return
        elements = tensor.contiguous().reshape(-1)
        source = dist.get_global_rank(self.process_group, 0) if self.process_group is not None else 0
        with self._blocking("broadcast of rank 0's values"):
            dist.broadcast(elements.view(torch.uint8), source, group=self.process_group)
        if elements.data_ptr() != tensor.data_ptr():
            tensor.copy_(elements.view(tensor.shape))

    def gather_objects(self, value: T, *, stage: str) -> list[T]:
        """A small picklable value of every rank, in rank order, blocking. Outside of steps: not counted."""
        values: list[T] = [value] * self.dp_size
        if self.dp_size > 1:
            on_cuda = self._device is not None and self._device.type == "cuda"
            with self._blocking(stage), torch.cuda.device(self._device) if on_cuda else nullcontext():
                dist.all_gather_object(values, value, group=self.process_group)
        return values

    def missing_ranks(self, what: str) -> list[int]:
        """The ranks that do not come to `what` within `ROLL_CALL_S` of this one: none, once all have. Blocking.

        The roll is kept in the group's store, so that a rank that came alone leaves no collective half done.
        """
        if self.dp_size == 1:
            return []
        store, deadline = self.roll.store(what), time.monotonic() + ROLL_CALL_S
        turn = store.add(f"rank {self.dp_rank}", 1)
        if store.add(f"turn {turn}", 1) == self.dp_size:
            store.set(f"complete {turn}", "")
        self.roll.stand(str(Place(what, "", self.step)))
        while True:
            try:
                store.wait([f"complete {turn}"], timedelta(seconds=min(1.0, ROLL_CALL_S)))
                self.roll.stand("")
                return []
            except RuntimeError as error:  # a DistStoreError, or a plain one from a FileStore
                if self.roll.someone_spoke():
                    raise self._lost(what, "")(error) from error
                if time.monotonic() > deadline:
                    break
        self.roll.stand("")
        store.add(f"turn {turn}", -1)
        store.add(f"rank {self.dp_rank}", -1)
        others = (rank for rank in range(self.dp_size) if rank != self.dp_rank)
        return [rank for rank in others if store.add(f"rank {rank}", 0) < turn]


def hang_up(process_group: dist.ProcessGroup | None) -> None:
    """End this rank's part in a gloo group, so that whoever waits for it fails now. Idempotent.

    gloo closes all connections of a group when a receive runs out of time, so one is asked for that nobody sends.
    """
    with suppress(RuntimeError, ValueError):  # the error that closes them; they are closed, or destroyed, already
        pg = process_group if process_group is not None else c10d._get_default_group()
        if dist.get_backend(pg) == "gloo":
            peer = (pg.rank() + 1) % pg.size()
            pg.recv([torch.empty(1, device="cpu")], peer, _NOBODYS_TAG).wait(timedelta(milliseconds=1))
