"""The only caller of torch.distributed collectives: the data-parallel group and six verbs on flat tensors.

This module decides how each verb is spelled on each backend, and it counts the bytes that this rank sends. It knows no
parameter, no bucket and no rule. Every asynchronous verb returns a `Pending`, which holds its tensors until `wait`.

[Note: buffer lifetime across streams] NCCL runs on its own stream. A buffer handed to it must neither be freed nor
overwritten by the compute stream before the collective has read it. A `Pending` therefore holds every tensor of the
collective, and `wait` makes the current stream wait for the communication stream before it releases them. The caller
that starts a collective keeps the `Pending`; no `record_stream` is needed.

[Note: reduce-scatter on gloo] gloo builds its reduce-scatter on an all-reduce, which sends twice the bytes. Here each
rank sends every other rank its slice (`all_to_all_single`) and sums the slices in rank order in float32. This sends the
minimum number of bytes, and the result does not depend on timing.

[Note: one group for both levels] A 16-bit reduction over several nodes exchanges inside each node, sums, and exchanges
between nodes (two_levels.py, [Note: two levels]). Both are `all_to_all_single` of the whole group with zeros for all
other ranks, to which NCCL sends nothing. So there is no second group to make, to order, to time out and to close.

[Note: beside the current stream] A 16-bit reduction has to sum what arrives, an exchange in two hops has to pass it on.
On a GPU both are queued as a whole when they start, on a stream of their own, which waits so that backward's stream, or
the step's, need not. Their memory comes from that stream and returns to it; the stream waits for the current one before
it uses memory again. On a CPU what follows the first collective comes in `wait`: to wait under backward would stop a
rank for which another rank may wait in a collective of the user.

[Note: all-gather on gloo] torch's all-gather on gloo goes through a flat copy of the whole output in new memory. A
broadcast of each rank's slice writes directly into the output; the number of bytes is the same.

[Note: clean exit] Making any torch optimizer imports torch._dynamo. If the default group exists by then, the modules
that torch._dynamo imports keep it as a default argument. The group would then outlive `destroy_process_group`, and a
gloo thread that frees its last tensor while Python shuts down aborts the process (1 exit in 6, seen with torch 2.13).
So torch._dynamo is imported here: scripts import distmuon before `init_process_group`, and the group ends where it is
destroyed. A collective that has not been waited for (the last step's all-gathers) keeps gloo's event thread alive until
the optimizer is freed: call `synchronize` before the group is destroyed; a forward without gradients and a save do it.

[Note: two channels] Tensors travel on the group that the user gave. The small objects that ranks compare travel on a
separate gloo group, the control group. It is made from the same ranks when it is first needed, and all optimizers of
these ranks share it. So an agreement cannot be confused with a reduction that another rank has started, nor with a
collective of the user. Each object carries the optimizer's number and the call; ranks that meet in different calls all
raise and name the calls.

[Note: when wait blocks] On gloo `Pending.wait` blocks, and raises when a rank is late by the group's timeout or its
connection is gone; `lost_ranks.py` then finds out which rank that is and where it stands. On NCCL `wait` only queues:
the host runs on, and NCCL's watchdog ends the process at the timeout. With TORCH_NCCL_BLOCKING_WAIT=1 `wait` blocks and
raises on NCCL, too; the host then no longer runs ahead of the device, so use it only to debug.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch._dynamo  # see [Note: clean exit]
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from distmuon.comm.lost_ranks import LOOK_S, LostRanks, Place, RollCall
from distmuon.comm.two_levels import TwoLevels, mean_in_order, num_nodes, slices_sent, sum_in_order
from distmuon.errors import problem

MEETING_S = 25.0  # how much later than the first rank the last may come to a meeting

_UNUSED_TAG = 0x6D756F6E

Count = Callable[[str, int, int], None]
T = TypeVar("T")
_control_groups: WeakKeyDictionary[dist.ProcessGroup, Any] = WeakKeyDictionary()
_made_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
_optimizer_counts: WeakKeyDictionary[dist.ProcessGroup, _OptimizerCounts] = WeakKeyDictionary()


@dataclass(slots=True)
class _OptimizerCounts:
    """Counts of the optimizers of a group: how many this rank has made and how many are built; see `take_number`.

    `started` counts the collectives that they have started, on either channel; all ranks start the same, in one order.
    """

    started: int = 0
    made: int = 0
    built: int = 0
    surplus: list[int] = field(default_factory=list)  # by rank: how many more optimizers than rank 0 it had made


def _await_work(work: dist.Work) -> None:
    work.wait()


@dataclass(slots=True)
class Pending:
    """A collective under way. `wait` is idempotent and returns the result."""

    result: Tensor
    works: tuple[dist.Work, ...] = ()
    holds: tuple[Tensor, ...] = ()
    then: Callable[[], None] | None = field(default=None, repr=False)
    lost: Callable[[RuntimeError], LostRanks] | None = field(default=None, repr=False)
    await_work: Callable[[dist.Work], object] = field(default=_await_work, repr=False)

    def wait(self) -> Tensor:
        """Make the current stream (on a CPU: the thread) wait, run `then`, release the inputs.

        Raises `LostRanks`; see [Note: when wait blocks].
        """
        try:
            for work in self.works:
                self.await_work(work)
        except (torch.AcceleratorError, torch.OutOfMemoryError):  # a kernel failed; no rank is missing
            raise
        except RuntimeError as error:
            assert self.lost is not None
            raise self.lost(error) from error
        if self.then is not None:
            self.then()  # may start a collective and wait for it; if that fails, so does the next `wait`
        self.works = ()
        self.then = None
        self.holds = ()
        return self.result


class DataParallelGroup:
    """The data-parallel group: `dp_rank`, `dp_size` and the collectives, counted through `count(stage, bytes)`.

    `process_group=None` means the default group, or a single rank if torch.distributed is not initialised. Every verb
    takes its `stage`, and verbs that move a bucket take its `label`: counters and error messages use them.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, count: Count) -> None:
        # The default group stays None: a reference would keep it alive past `destroy_process_group`.
        self.process_group = process_group
        self.count = count
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise problem(
                "process_group",
                found=f"found {process_group!r}",
                needed="a group that this rank is in, or None, is needed",
                cure="pass what torch.distributed.new_group(ranks) returned on these ranks",
            )
        distributed = process_group is not None or (dist.is_available() and dist.is_initialized())
        self.dp_size = dist.get_world_size(process_group) if distributed else 1
        self.dp_rank = dist.get_rank(process_group) if distributed else 0
        self._gloo = distributed and dist.get_backend(process_group) == "gloo"
        self.roll = RollCall(process_group, self.dp_rank, self.dp_size)
        self.step = 1  # the step in progress, counted since the optimizer was made; for messages
        self._made = 0  # the optimizer's number among those that this rank has made on this group
        self._counts = _OptimizerCounts()
        if self.dp_size > 1:
            self._counts = _optimizer_counts.setdefault(self._group(), self._counts)
            self._made = self._counts.made = self._counts.made + 1
        self.number = 0  # the optimizer's number among those built on this group; 0: not built yet
        self._call, self._calls = "", 0  # the user's collective call in progress, and how many there were
        self.node_size = self.dp_size  # as many consecutive ranks share a node; the optimizer sets it, see nodes.py
        self._aside: torch.cuda.Stream | None = None  # see [Note: beside the current stream]
        self.tells_place = True  # whether ranks in a meeting learn where this rank waits; see lost_ranks.py

    def check_current(self) -> None:
        """Raise if torch.distributed was initialised after this group was looked up: other ranks would be ignored."""
        if self.process_group is None and self.dp_size == 1 and dist.is_initialized() and dist.get_world_size() > 1:
            raise problem(
                "process_group",
                found=f"DistMuon was made before the group of {dist.get_world_size()} ranks",
                needed="the group must exist by then",
                cure="call init_process_group first",
            )

    def check_same_ranks(self, group: DataParallelGroup) -> None:
        """Raise unless this group has the ranks of `group`, in the same order."""
        ranks, required = (
            dist.get_process_group_ranks(g.process_group) if g.dp_size > 1 else [] for g in (self, group)
        )
        if ranks != required:
            raise problem(
                "exchange_group",
                found=f"ranks {ranks}",
                needed=f"the ranks of process_group, {required}, are needed",
                cure="make both with torch.distributed.new_group(ranks)",
            )

    def _ranks(self) -> list[int]:
        return list(dist.get_process_group_ranks(self._group()))

    def check_inside(self, group: DataParallelGroup) -> None:
        """Raise unless all ranks of this group, which is a route's, are ranks of `group`."""
        outside = set(self._ranks()) - set(group._ranks())
        if outside:
            raise problem(
                "Route(process_group=)",
                found=f"its ranks are {self._ranks()}, and {sorted(outside)} are not in process_group",
                needed="the ranks that hold a parameter must be ranks of process_group",
                cure="pass the data-parallel group of the dense parameters as process_group",
            )

    def check_partition(self, group: DataParallelGroup) -> None:
        """Raise on all ranks unless each rank that a rank of `group` names here names the same ranks. Blocking."""
        named = dict(zip(group._ranks(), group.gather_objects(self._ranks(), stage="comparison of the plans")))
        for rank, ranks in named.items():
            for peer in ranks:
                if named[peer] != ranks:
                    raise problem(
                        "Route(process_group=)",
                        found=f"rank {rank} names the ranks {ranks}, and rank {peer} of them names {named[peer]}",
                        needed="the ranks of a group must name the same group",
                        cure="pass the group that this rank is in, on every rank",
                    )

    def _lost(self, stage: str, label: str) -> Callable[[RuntimeError], LostRanks]:
        """Make the error to raise if the collective that starts now fails; see lost_ranks.py, [Note: roll call]."""
        return partial(self.lost, Place(stage, label, self.step))

    def take_number(self) -> None:
        """Number the optimizer among those built on this group; raise unless all ranks build the same optimizer.

        A rank may have made more optimizers than another rank, if it never used them. That surplus must not change.
        """
        if self.dp_size == 1:
            return
        counts = self._counts
        made = self.gather_objects(self._made, stage="comparison of the plans")
        surplus = [number - made[0] for number in made]
        if counts.surplus not in ([], surplus):
            raise problem(
                "DistMuon",
                found=f"ranks use their optimizers numbers {made} for the same first forward",
                needed="all ranks must build their optimizers in the same order",
                cure="make them, and call their models for the first time, in the same order everywhere",
            )
        counts.surplus = surplus
        self.number = counts.built = counts.built + 1

    def global_ranks(self) -> list[int]:
        """The ranks of this group, by their numbers in the default group."""
        return dist.get_process_group_ranks(self._group()) if self.dp_size > 1 else [0]

    def begin(self, call: str) -> None:
        """Note that the user has made a collective call, even if its arguments will be refused on this rank."""
        self._call, self._calls = call, self._calls + 1

    def _group(self) -> dist.ProcessGroup:
        return self.process_group if self.process_group is not None else c10d._get_default_group()

    def _control(self) -> Any:
        """The control group, see [Note: two channels]. The first call is collective.

        `new_group` would not do: it names a group by the number of groups of this process, which may differ by rank.
        """
        process_group = self._group()
        if process_group not in _control_groups:
            store = c10d.PrefixStore("distmuon/control", c10d._get_process_group_store(process_group))
            made = dist.ProcessGroupGloo(store, self.dp_rank, self.dp_size, timeout=_timeout_of(process_group))
            _control_groups[process_group] = made
        return _control_groups[process_group]

    def _gather_bytes(self, text: bytes) -> list[bytes]:
        control = self._control()

        def gather(local: Tensor) -> list[Tensor]:
            gathered = [torch.empty_like(local) for _ in range(self.dp_size)]
            control.allgather([gathered], [local]).wait()
            return gathered

        lengths = [int(length) for length in gather(torch.tensor([len(text)], device="cpu"))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return [bytes(t[:length].tolist()) for t, length in zip(gather(padded), lengths)]

    def lost(self, place: Place, error: RuntimeError) -> LostRanks:
        """Make the error to raise for `error`, which a collective at `place` has raised."""
        return self.roll.describe_failure(place, error, partial(hang_up, self.process_group))

    def _pending(
        self,
        result: Tensor,
        works: tuple[dist.Work, ...],
        holds: tuple[Tensor, ...],
        stage: str,
        label: str,
        then: Callable[[], None] | None = None,
    ) -> Pending:
        """Wrap a collective that has started. On NCCL the host does not block in `wait`, so no place is told there."""
        self._counts.started += 1
        if not self._gloo or not self.tells_place:
            return Pending(result, works, holds, then, self._lost(stage, label))
        place = Place(stage, label, self.step)
        await_work = partial(self._wait, place, self._counts.started)
        return Pending(result, works, holds, then, self._lost(stage, label), await_work)

    def _wait(self, place: Place, number: int, work: dist.Work) -> None:
        """Wait for `work`; if that takes long, tell ranks that wait elsewhere for this rank where it stands."""
        try:
            work.wait(timedelta(seconds=LOOK_S))
        except RuntimeError:  # the collective failed, or `LOOK_S` has passed
            with self.roll.blocked(place, number):
                work.wait()

    @contextmanager
    def _blocking(self, stage: str) -> Iterator[None]:
        try:
            yield
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise self._lost(stage, "")(error) from error

    def start_reduce_scatter(
        self, output: Tensor, input: Tensor, *, stage: str, label: str = "", kept: Tensor | None = None
    ) -> Pending:
        """Write this rank's slice of the sum over ranks of `input` (dp_size * n,) into `output` (n,), float32.

        `output` may be that slice of `input`. `input` must not change before `wait`. `kept`: memory in which the slices
        may arrive, as large as `room_for` says; None: new memory. Of 16-bit inputs it is the mean, since a sum might
        leave their range. They are summed in float32, in a fixed order, on every backend: a ring would round each
        partial sum to 16 bits. Over several nodes they are summed in two levels, see two_levels.py.
        """
        if self.dp_size == 1:
            return Pending(output.copy_(input) if output.data_ptr() != input.data_ptr() else output)
        if input.dtype != output.dtype:
            start = self._start_in_two_levels if self._in_two_levels else self._start_in_one_level
            if input.is_cuda:
                begin = partial(start, output, input, None, stage, label)
                return self.start_aside(begin, input.device, holds=(input,))
            return start(output, input, kept, stage, label)
        if self._gloo or not input.is_cuda:
            return self._start_in_one_level(output, input, kept, stage, label)
        self.count(stage, (self.dp_size - 1) * output.nbytes, 0)
        work = dist.reduce_scatter_single(output, input, group=self.process_group, async_op=True)
        return self._pending(output, (work,), (input,), stage, label)

    @property
    def _in_two_levels(self) -> bool:
        return num_nodes(self.dp_size, self.node_size) > 1

    def room_for(self, numel: int, dtype: torch.dtype) -> int:
        """The elements of `dtype` that the reduction of `numel` of them needs for what arrives."""
        return 2 * numel if dtype != torch.float32 and self._in_two_levels else numel

    def start_aside(self, start: Callable[[], Pending], device: torch.device, holds: tuple[Tensor, ...]) -> Pending:
        """Queue on a stream of its own what `start` starts and what follows it; see [Note: beside the current stream].

        `holds`: the tensors of the current stream that this reads.
        """
        if self._aside is None:
            self._aside = torch.cuda.Stream(device)
        self._aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._aside):
            pending = start()
            result = pending.wait()
            done = torch.cuda.Event()
            done.record()
        return Pending(result, holds=holds, then=done.wait)

    def _start_in_one_level(
        self, output: Tensor, input: Tensor, kept: Tensor | None, stage: str, label: str
    ) -> Pending:
        num_bytes = output.numel() * input.element_size()
        _, far = slices_sent(self.dp_rank, self.dp_size, self.node_size)
        is_short = input.dtype != output.dtype  # where float32 gradients travel on NCCL, around a ring, is not known
        self.count(stage, (self.dp_size - 1) * num_bytes, far * num_bytes if is_short else 0)
        sent, counts = self._without_own_slice(input) if self._gloo else (input, None)
        received = torch.empty_like(sent) if kept is None else kept[: sent.numel()]
        work = dist.all_to_all_single(received, sent, counts, counts, group=self.process_group, async_op=True)

        def reduce_in_rank_order() -> None:
            arrived = received.view(-1, output.numel())
            slices = [*arrived]
            if len(slices) < self.dp_size:
                slices.insert(self.dp_rank, input.view(self.dp_size, -1)[self.dp_rank])
            if is_short:
                mean_in_order(slices if self._gloo else arrived, output)
            else:
                sum_in_order(slices, output)

        return self._pending(output, (work,), (input, received), stage, label, reduce_in_rank_order)

    def _without_own_slice(self, input: Tensor) -> tuple[Tensor, list[int]]:
        """What this rank sends of `input` (dp_size * n,), and the elements for each rank.

        gloo copies what a rank sends to itself. The first and the last rank can leave their slices out, since the rest
        is contiguous: with two ranks that is a third of the time.
        """
        size = input.numel() // self.dp_size
        counts = [size] * self.dp_size
        if 0 < self.dp_rank < self.dp_size - 1:
            return input, counts
        counts[self.dp_rank] = 0
        return input[size:] if self.dp_rank == 0 else input[:-size], counts

    def _start_in_two_levels(
        self, output: Tensor, input: Tensor, kept: Tensor | None, stage: str, label: str
    ) -> Pending:
        """Start the exchange inside the node; the `Pending` goes on with the one between nodes."""
        ranks, size = self.node_size, output.numel()
        nodes = self.dp_size // ranks
        room = input.new_empty(self.room_for(input.numel(), input.dtype)) if kept is None else kept
        levels = TwoLevels(input, nodes, ranks, room)
        node, number = divmod(self.dp_rank, ranks)
        inside = [nodes * size if rank // ranks == node else 0 for rank in range(self.dp_size)]
        between = [size if rank % ranks == number else 0 for rank in range(self.dp_size)]
        exchange = partial(self.start_all_to_all, stage=stage, label=label)
        pending = exchange(levels.from_neighbours, levels.to_neighbours, inside, inside)

        def go_between_nodes() -> None:
            levels.sum_in_node()
            exchange(levels.from_nodes, levels.to_nodes, between, between).wait()
            levels.sum_over_nodes(output)

        pending.result = output
        pending.then = go_between_nodes
        return pending

    def start_all_gather(self, output: Tensor, input: Tensor, *, stage: str, label: str = "") -> Pending:
        """Gather `input` (n,) of every rank, in rank order, into `output` (dp_size * n,); it may be a slice of it."""
        if self.dp_size == 1:
            return Pending(output.copy_(input) if output.data_ptr() != input.data_ptr() else output)
        self.count(stage, (self.dp_size - 1) * input.numel() * input.element_size(), 0)
        if self._gloo:
            works = self._broadcast_all(output, input)
        else:
            works = (dist.all_gather_single(output, input, group=self.process_group, async_op=True),)
        return self._pending(output, works, (input,), stage, label)

    def _broadcast_all(self, output: Tensor, input: Tensor) -> tuple[dist.Work, ...]:
        """See [Note: all-gather on gloo]."""
        slices = output.view(self.dp_size, -1)
        if slices[self.dp_rank].data_ptr() != input.data_ptr():
            slices[self.dp_rank].copy_(input)
        broadcast = partial(dist.broadcast, group=self.process_group, async_op=True)
        return tuple(broadcast(part, group_src=rank) for rank, part in enumerate(slices))

    def start_all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        receive_counts: list[int],
        send_counts: list[int],
        *,
        stage: str,
        label: str = "",
    ) -> Pending:
        """Exchange 1-D tensors unevenly: `send_counts[r]` elements of `input` go to rank r, in rank order."""
        if self.dp_size == 1:
            return Pending(output)
        sent = sum(n for rank, n in enumerate(send_counts) if rank != self.dp_rank)
        node = self.dp_rank // self.node_size
        far = sum(n for rank, n in enumerate(send_counts) if rank // self.node_size != node)
        self.count(stage, sent * input.element_size(), far * input.element_size())
        work = dist.all_to_all_single(
            output, input, receive_counts, send_counts, group=self.process_group, async_op=True
        )
        return self._pending(output, (work,), (input,), stage, label)

    def start_all_reduce(self, tensor: Tensor, *, stage: str, largest: bool = False) -> Pending:
        """Sum a small `tensor` over ranks, in place; or take the `largest` of each element.

        The bytes are counted as a ring's 2*(dp_size-1)/dp_size.
        """
        if self.dp_size == 1:
            return Pending(tensor)
        self.count(stage, 2 * (self.dp_size - 1) * tensor.numel() * tensor.element_size() // self.dp_size, 0)
        operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        work = dist.all_reduce(tensor, operation, group=self.process_group, async_op=True)
        return self._pending(tensor, (work,), (), stage, "")

    def broadcast(self, tensor: Tensor, via: torch.device) -> None:
        """Send rank 0's values to all ranks, in place, for any dtype and strides. Blocking.

        The bytes are not counted, since this runs only while buffers are built. All ranks give the same shape and
        dtype, and no two elements may share memory. A tensor on a device that the group does not serve goes by `via`.
        """
        if self.dp_size == 1 or not tensor.numel():
            return
        elements = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
        if not self._gloo and elements.device.type != via.type:
            elements = elements.to(via)
        source = dist.get_global_rank(self.process_group, 0) if self.process_group is not None else 0
        with self._blocking("broadcast of rank 0's values"):
            dist.broadcast(elements.view(torch.uint8), source, group=self.process_group)
        if elements.data_ptr() != tensor.data_ptr():
            tensor.copy_(elements.view(tensor.shape))

    def gather_objects(self, value: T, *, stage: str) -> list[T]:
        """Gather a small picklable value of every rank, in rank order. Blocking; not counted, since no step calls it.

        Raises `ValueError` on all ranks if they meet here in different calls, see [Note: two channels].
        """
        if self.dp_size == 1:
            return [value]
        caller = (self.number, self._call, self._calls, stage)
        self._counts.started += 1
        waits = self.roll.blocked(Place(stage, "", self.step), self._counts.started)
        with self._blocking(stage), waits:
            gathered = self._gather_bytes(pickle.dumps((caller, value)))
        received: list[tuple[tuple[int, str, int, str], T]] = [pickle.loads(data) for data in gathered]
        callers = [sender for sender, _ in received]
        if len(set(callers)) > 1:
            self._calls = max(calls for _, _, calls, _ in callers)  # so that the next calls match again
            raise _different_calls(callers)
        return [value for _, value in received]

    def missing_ranks(self, what: str, warning: Callable[[Sequence[int]], str], limit_s: float) -> dict[int, str]:
        """Wait until all ranks call `what`; return the missing ranks, each with its place ("": unknown). Blocking.

        A rank is missing if it does not come within `limit_s` of the first rank, or stands where it cannot come from.
        All ranks that came get the same answer. Ranks wait in the group's store, so that a rank that came alone leaves
        no collective half done; see lost_ranks.py, [Note: meeting]. `warning` makes the text that the first rank
        prints on stderr while it waits for these ranks.
        """
        if self.dp_size == 1:
            return {}
        place = Place(what, "", self.step)
        self.roll.announce_waiting(str(place))
        try:
            return self.roll.meet(what, self._counts.started, limit_s, warning)
        except RuntimeError as error:
            raise self.lost(place, error) from error
        finally:
            with suppress(RuntimeError):
                self.roll.announce_waiting("")


def group_of_ranks(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A process group of these global ranks, this one among them, made at the first call: all of them must call it.

    Other ranks need not: a pipeline's stage makes its group without the other stages. torch then names a group by the
    number of groups of this process, so the ranks must have made equally many; else this raises on all of them.
    """
    known = _made_groups.get(tuple(ranks))
    if known is not None and known in c10d._world.pg_map:
        return known
    store, key = c10d._get_default_store(), f"distmuon/group of {list(ranks)}"
    store.set(f"{key}/{dist.get_rank()}", str(len(c10d._world.pg_names)))
    counts = [int(store.get(f"{key}/{rank}")) for rank in ranks]
    if len(set(counts)) > 1:
        raise problem(
            "process_group",
            found=f"ranks {list(ranks)} hold the parameters and have made {counts} process groups",
            needed="a group of these ranks, and torch can make one by these ranks alone if they have made equally many",
            cure="make it by torch.distributed.new_group on all ranks of the run, and pass it as process_group",
        )
    made: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    _made_groups[tuple(ranks)] = made
    return made


def _different_calls(callers: list[tuple[int, str, int, str]]) -> ValueError:
    """Make the error of ranks that meet in different calls."""
    ranks_by_text: dict[str, list[int]] = {}
    for rank, (number, call, calls, stage) in enumerate(callers):
        call_text = f"{call} (call {calls}), " if call else ""
        ranks_by_text.setdefault(f"optimizer {number}, {call_text}{stage}", []).append(rank)
    return problem(
        "ranks",
        found="; ".join(f"{ranks} asked for {text}" for text, ranks in ranks_by_text.items()),
        needed="all ranks must make the same collective calls, of the same optimizer, in the same order",
        cure="use several optimizers in one order on all ranks, and look for a call that some ranks refused or left "
        "out",
    )


def _timeout_of(process_group: dist.ProcessGroup) -> timedelta:
    """The time limit of agreements: this group's, but on NCCL at least gloo's usual half hour.

    Ranks agree after each has written its part of a checkpoint, and NCCL's usual ten minutes are short for that.
    """
    backends = [process_group._get_backend(device) for device in process_group._device_types]
    options: list[Any] = [backend.options for backend in backends if hasattr(backend, "options")]
    timeout: timedelta = max((option._timeout for option in options), default=c10d.default_pg_timeout)
    if any(isinstance(backend, dist.ProcessGroupGloo) for backend in backends):
        return timeout
    return max(timeout, c10d.default_pg_timeout)


def hang_up(process_group: dist.ProcessGroup | None) -> None:
    """Close this rank's connections of a gloo group and of its control group, so that ranks that wait for it fail now.

    Idempotent. gloo closes all connections of a group when a receive times out, so this receives a message that no
    rank sends.
    """
    with suppress(RuntimeError, ValueError):  # the group is destroyed already
        group = process_group if process_group is not None else c10d._get_default_group()
        open_groups: list[Any] = [group] if dist.get_backend(group) == "gloo" else []
        if group in _control_groups:
            open_groups.append(_control_groups[group])
        for gloo in open_groups:
            with suppress(RuntimeError):  # the timeout that closes the connections; they may be closed already
                peer = (gloo.rank() + 1) % gloo.size()
                gloo.recv([torch.empty(1, device="cpu")], peer, _UNUSED_TAG).wait(timedelta(milliseconds=1))
