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
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch._dynamo  # see [Note: clean exit]
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from distmuon.errors import problem

ROLL_CALL_S = 300.0  # how much later than the first a rank may come to a roll call

Count = Callable[[str, int], None]
T = TypeVar("T")

# torch 2.13 renames the flat collectives and warns at the old names; older torch has only those.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(slots=True)
class Pending:
    """A collective under way. `wait` is idempotent and returns the result."""

    result: Tensor
    work: dist.Work | None = None
    holds: tuple[Tensor, ...] = ()
    then: Callable[[], None] | None = field(default=None, repr=False)

    def wait(self) -> Tensor:
        """Make the current stream (on CPU: the thread) wait; run what has to follow; free the inputs."""
        if self.work is not None:
            self.work.wait()
        then, self.work, self.then = self.then, None, None
        if then is not None:
            then()
        self.holds = ()
        return self.result


class DataParallelGroup:
    """The data-parallel group: `dp_rank`, `dp_size` and the collectives, counted through `count(stage, bytes)`.

    `process_group=None` means the default group, or one rank where torch.distributed is not initialised.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, count: Count) -> None:
        # The default group stays None: a reference of ours would keep it alive past `destroy_process_group`.
        self.process_group = process_group
        self.count = count
        distributed = process_group is not None or (dist.is_available() and dist.is_initialized())
        self.dp_size = dist.get_world_size(process_group) if distributed else 1
        self.dp_rank = dist.get_rank(process_group) if distributed else 0
        self._gloo = distributed and dist.get_backend(process_group) == "gloo"

    def check_current(self) -> None:
        """Raise if torch.distributed was initialised after this group was looked up: other ranks would be ignored."""
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

    def start_reduce_scatter(self, output: Tensor, input: Tensor, *, stage: str) -> Pending:
        """Mean over ranks of `input` (dp_size * n,), this rank's slice of it into `output` (n,), float32.

        `output` may be the slice of `input` that it replaces. `input` must not change before `wait`. What travels in
        16 bits is summed in float32, in rank order, on every backend: a ring would round each partial sum to 16 bits.
        """
        if self.dp_size == 1:
            return Pending(output.copy_(input) if output.data_ptr() != input.data_ptr() else output)
        self.count(stage, (self.dp_size - 1) * output.numel() * input.element_size())
        if not self._gloo and input.is_cuda and input.dtype == output.dtype:
            work = _reduce_scatter(output, input, op=dist.ReduceOp.AVG, group=self.process_group, async_op=True)
            return Pending(output, work, (input,))
        received = torch.empty_like(input)
        work = dist.all_to_all_single(received, input, group=self.process_group, async_op=True)

        def sum_in_rank_order() -> None:
            first, *others = received.view(self.dp_size, -1)
            torch.add(first.to(output.dtype), others[0], out=output)
            for other in others[1:]:
                output.add_(other)
            output.div_(self.dp_size)

        return Pending(output, work, (input, received), sum_in_rank_order)

    def start_all_gather(self, output: Tensor, input: Tensor, *, stage: str) -> Pending:
        """`input` (n,) of every rank, in rank order, into `output` (dp_size * n,). `input` may be its own slice."""
        if self.dp_size == 1:
            return Pending(output.copy_(input) if output.data_ptr() != input.data_ptr() else output)
        self.count(stage, (self.dp_size - 1) * input.numel() * input.element_size())
        if self._gloo:
            return self._broadcast_all(output, input)
        work = _all_gather(output, input, group=self.process_group, async_op=True)
        return Pending(output, work, (input,))

    def _broadcast_all(self, output: Tensor, input: Tensor) -> Pending:
        """See [Note: all-gather on gloo]."""
        slices = output.view(self.dp_size, -1)
        if slices[self.dp_rank].data_ptr() != input.data_ptr():
            slices[self.dp_rank].copy_(input)
        works = []
        for rank, part in enumerate(slices):
            works.append(dist.broadcast(part, group=self.process_group, group_src=rank, async_op=True))

        def wait_for_the_rest() -> None:
            for work in works[1:]:
                work.wait()

        return Pending(output, works[0], (input,), wait_for_the_rest)

    def start_all_to_all(
        self, output: Tensor, input: Tensor, receive_counts: list[int], send_counts: list[int], *, stage: str
    ) -> Pending:
        """Uneven exchange of 1-D tensors: `send_counts[r]` elements of `input` go to rank r, in rank order."""
        if self.dp_size == 1:
            return Pending(output)
        sent = sum(n for rank, n in enumerate(send_counts) if rank != self.dp_rank)
        self.count(stage, sent * input.element_size())
        work = dist.all_to_all_single(
            output, input, receive_counts, send_counts, group=self.process_group, async_op=True
        )
        return Pending(output, work, (input,))

    def start_all_reduce(self, tensor: Tensor, *, stage: str) -> Pending:
        """Sum over ranks, in place. For a few numbers: counted as a ring's 2*(dp_size-1)/dp_size."""
        if self.dp_size == 1:
            return Pending(tensor)
        self.count(stage, 2 * (self.dp_size - 1) * tensor.numel() * tensor.element_size() // self.dp_size)
        return Pending(tensor, dist.all_reduce(tensor, group=self.process_group, async_op=True))

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's values to all, in place, blocking, any dtype. Only while buffers are built: not counted."""
        if self.dp_size == 1 or not tensor.numel():
            return
        elements = tensor.contiguous().reshape(-1)
        source = dist.get_global_rank(self.process_group, 0) if self.process_group is not None else 0
        dist.broadcast(elements.view(torch.uint8), source, group=self.process_group)
        if elements.data_ptr() != tensor.data_ptr():
            tensor.copy_(elements.view(tensor.shape))

    def gather_objects(self, value: T) -> list[T]:
        """A small picklable value of every rank, in rank order, blocking. Only at set-up: not counted."""
        values: list[T] = [value] * self.dp_size
        if self.dp_size > 1:
            dist.all_gather_object(values, value, group=self.process_group)
        return values

    def missing_ranks(self, what: str) -> list[int]:
        """The ranks that do not come to `what` within `ROLL_CALL_S` of this one: none, once all have. Blocking.

        The roll is kept in the group's store, so that a rank that came alone leaves no collective half done.
        """
        if self.dp_size == 1:
            return []
        pg = self.process_group if self.process_group is not None else c10d._get_default_group()
        store = c10d.PrefixStore(f"distmuon/{what}", c10d._get_process_group_store(pg))
        turn = store.add(f"rank {self.dp_rank}", 1)
        if store.add(f"turn {turn}", 1) == self.dp_size:
            store.set(f"complete {turn}", "")
        try:
            store.wait([f"complete {turn}"], timedelta(seconds=ROLL_CALL_S))
        except RuntimeError:  # a DistStoreError, or a plain one from a FileStore
            store.add(f"turn {turn}", -1)
            store.add(f"rank {self.dp_rank}", -1)
            others = (rank for rank in range(self.dp_size) if rank != self.dp_rank)
            return [rank for rank in others if store.add(f"rank {rank}", 0) < turn]
        return []
