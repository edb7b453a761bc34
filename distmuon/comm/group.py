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

[Note: two channels] Tensors travel on the group that the user gave. What ranks agree on, small objects, travels on a
gloo group of its own, the control group: it is made from the same ranks when it is first needed, and all optimizers of
these ranks share it. So an agreement cannot be taken for a reduction that another rank has started, nor for the user's
own collective. Each object carries who asks: the optimizer's number and the call. Ranks that meet at different ones
all raise, and say which.

[Note: who waits where] On gloo `Pending.wait` blocks, and raises when a rank is late by the group's timeout or its
connection is gone; `lost_ranks.py` then says which rank, and where. On NCCL `wait` only queues: the host runs on, and
NCCL's own watchdog ends the process at the timeout. With TORCH_NCCL_BLOCKING_WAIT=1 `wait` blocks and raises there,
too; that costs the host its lead, so it is for finding out.
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
from distmuon.errors import problem

MEETING_S = 25.0  # how much later than the first a rank may come to what all must call

_NOBODYS_TAG = 0x6D756F6E

Count = Callable[[str, int], None]
T = TypeVar("T")
_control_of: WeakKeyDictionary[dist.ProcessGroup, Any] = WeakKeyDictionary()
_optimizers_of: WeakKeyDictionary[dist.ProcessGroup, _Optimizers] = WeakKeyDictionary()


@dataclass(slots=True)
class _Optimizers:
    """Those of one group: how many were made here and how many of them are built; see `take_number`.

    `started`: the collectives that they have started, on either channel. All ranks start the same, in the same order.
    """

    started: int = 0
    made: int = 0
    built: int = 0
    more: list[int] = field(default_factory=list)  # by rank, how many more than rank 0 it had made by then


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
        """Make the current stream (on CPU: the thread) wait; run what has to follow; free the inputs.

        Raises `LostRanks`, see [Note: who waits where].
        """
        try:
            for work in self.works:
                self.await_work(work)
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
    takes its `stage`, and what moves buckets also which (`label`): for the counters, and for the error when it fails.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, count: Count) -> None:
        # The default group stays None: a reference of ours would keep it alive past `destroy_process_group`.
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
        self.step = 1  # the one in progress, since the optimizer was made; for messages
        self._made = 0  # this one's number among those made here
        self._optimizers = _Optimizers()
        if self.dp_size > 1:
            self._optimizers = _optimizers_of.setdefault(self._group(), self._optimizers)
            self._made = self._optimizers.made = self._optimizers.made + 1
        self.number = 0  # of the optimizer among those built on this group; 0: not built yet
        self._call, self._calls = "", 0  # the collective call that is running, and how many there were
        self.leaves_word = True  # where this rank stands in them, for ranks that meet; see lost_ranks.py

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
        ours, theirs = (dist.get_process_group_ranks(g.process_group) if g.dp_size > 1 else [] for g in (self, group))
        if ours != theirs:
            raise problem(
                "exchange_group",
                found=f"ranks {ours}",
                needed=f"the ranks of process_group, {theirs}, are needed",
                cure="make both with torch.distributed.new_group(ranks)",
            )

    def _lost(self, stage: str, label: str) -> Callable[[RuntimeError], LostRanks]:
        """What to raise if the collective that starts now fails; see lost_ranks.py, [Note: roll call]."""
        return partial(self.lost, Place(stage, label, self.step))

    def take_number(self) -> None:
        """Number the optimizer among those built on this group, and raise unless all ranks build the same one.

        One rank may have made an optimizer more than another that it never used. But how many more may not change.
        """
        if self.dp_size == 1:
            return
        optimizers = self._optimizers
        made = self.gather_objects(self._made, stage="comparison of the plans")
        more = [number - made[0] for number in made]
        if optimizers.more not in ([], more):
            raise problem(
                "DistMuon",
                found=f"ranks use their optimizers numbers {made} for the same first forward",
                needed="several optimizers must be built in one order on all ranks",
                cure="make them, and call their models for the first time, in the same order everywhere",
            )
        optimizers.more = more
        self.number = optimizers.built = optimizers.built + 1

    def begin(self, call: str) -> None:
        """A collective call of the user's begins, also where its arguments will be refused on this rank."""
        self._call, self._calls = call, self._calls + 1

    def _group(self) -> dist.ProcessGroup:
        return self.process_group if self.process_group is not None else c10d._get_default_group()

    def _control(self) -> Any:
        """See [Note: two channels]. Collective when it is first asked for.

        Not by `new_group`: that names a group by how many this process is in, which may differ by rank.
        """
        process_group = self._group()
        if process_group not in _control_of:
            store = c10d.PrefixStore("distmuon/control", c10d._get_process_group_store(process_group))
            made = dist.ProcessGroupGloo(store, self.dp_rank, self.dp_size, timeout=_timeout_of(process_group))
            _control_of[process_group] = made
        return _control_of[process_group]

    def _gather_bytes(self, text: bytes) -> list[bytes]:
        control = self._control()

        def gather(mine: Tensor) -> list[Tensor]:
            everyone = [torch.empty_like(mine) for _ in range(self.dp_size)]
            control.allgather([everyone], [mine]).wait()
            return everyone

        lengths = [int(length) for length in gather(torch.tensor([len(text)], device="cpu"))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return [bytes(t[:length].tolist()) for t, length in zip(gather(padded), lengths)]

    def lost(self, place: Place, error: RuntimeError) -> LostRanks:
        """The error to raise for `error` of a collective at `place`."""
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
        """The collective that starts now. On NCCL the host does not stand in `wait`, so it leaves no word there."""
        self._optimizers.started += 1
        if not self._gloo or not self.leaves_word:
            return Pending(result, works, holds, then, self._lost(stage, label))
        place = Place(stage, label, self.step)
        await_work = partial(self._wait, place, self._optimizers.started)
        return Pending(result, works, holds, then, self._lost(stage, label), await_work)

    def _wait(self, place: Place, number: int, work: dist.Work) -> None:
        """Wait for `work`; where that takes long, with word to those who wait elsewhere for this rank."""
        try:
            work.wait(timedelta(seconds=LOOK_S))
        except RuntimeError:  # it failed, or the time is over
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

    def start_reduce_scatter(self, output: Tensor, input: Tensor, *, stage: str, label: str = "") -> Pending:
        """Mean over ranks of `input` (dp_size * n,), this rank's slice of it into `output` (n,), float32.

        `output` may be the slice of `input` that it replaces. `input` must not change before `wait`. What travels in
        16 bits is summed in float32, in rank order, on every backend: a ring would round each partial sum to 16 bits.
        """
        if self.dp_size == 1:
            return Pending(output.copy_(input) if output.data_ptr() != input.data_ptr() else output)
        self.count(stage, (self.dp_size - 1) * output.numel() * input.element_size())
        if not self._gloo and input.is_cuda and input.dtype == output.dtype:
            work = dist.reduce_scatter_single(
                output, input, op=dist.ReduceOp.AVG, group=self.process_group, async_op=True
            )
            return self._pending(output, (work,), (input,), stage, label)
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

        return self._pending(output, (work,), (input, received), stage, label, sum_in_rank_order)

    def start_all_gather(self, output: Tensor, input: Tensor, *, stage: str, label: str = "") -> Pending:
        """`input` (n,) of every rank, in rank order, into `output` (dp_size * n,). `input` may be its own slice."""
        if self.dp_size == 1:
            return Pending(output.copy_(input) if output.data_ptr() != input.data_ptr() else output)
        self.count(stage, (self.dp_size - 1) * input.numel() * input.element_size())
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
        """Uneven exchange of 1-D tensors: `send_counts[r]` elements of `input` go to rank r, in rank order."""
        if self.dp_size == 1:
            return Pending(output)
        sent = sum(n for rank, n in enumerate(send_counts) if rank != self.dp_rank)
        self.count(stage, sent * input.element_size())
        work = dist.all_to_all_single(
            output, input, receive_counts, send_counts, group=self.process_group, async_op=True
        )
        return self._pending(output, (work,), (input,), stage, label)

    def start_all_reduce(self, tensor: Tensor, *, stage: str) -> Pending:
        """Sum over ranks, in place. For a few numbers: counted as a ring's 2*(dp_size-1)/dp_size."""
        if self.dp_size == 1:
            return Pending(tensor)
        self.count(stage, 2 * (self.dp_size - 1) * tensor.numel() * tensor.element_size() // self.dp_size)
        work = dist.all_reduce(tensor, group=self.process_group, async_op=True)
        return self._pending(tensor, (work,), (), stage, "")

    def broadcast(self, tensor: Tensor, via: torch.device) -> None:
        """Rank 0's values to all, in place, blocking, any dtype and strides. Only while buffers are built: not counted.

        All ranks give the same shape and dtype, each element in a place of its own. `via`: a device that the group
        serves, for what lies on one that it does not.
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
        """A small picklable value of every rank, in rank order, blocking. Outside of steps: not counted.

        Raises `ValueError` on all ranks where they do not ask for the same, see [Note: two channels].
        """
        if self.dp_size == 1:
            return [value]
        asks = (self.number, self._call, self._calls, stage)
        self._optimizers.started += 1
        waits = self.roll.blocked(Place(stage, "", self.step), self._optimizers.started)
        with self._blocking(stage), waits:
            gathered = self._gather_bytes(pickle.dumps((asks, value)))
        values: list[tuple[tuple[int, str, int, str], T]] = [pickle.loads(each) for each in gathered]
        if len({theirs for theirs, _ in values}) > 1:
            self._calls = max(theirs[2] for theirs, _ in values)  # from here on in step again
            raise _asked_apart([theirs for theirs, _ in values])
        return [theirs for _, theirs in values]

    def missing_ranks(self, what: str, warning: Callable[[Sequence[int]], str], limit_s: float) -> dict[int, str]:
        """The ranks that do not come to `what` within `limit_s` of the first one, or that cannot, with the place where
        each is known to stand, or "": none, once all have come. The same on all that came.

        Blocking, in the group's store, so that a rank that came alone leaves no collective half done; see
        lost_ranks.py, [Note: meeting]. `warning`: what to say on stderr while these ranks are waited for.
        """
        if self.dp_size == 1:
            return {}
        place = Place(what, "", self.step)
        self.roll.announce_waiting(str(place))
        try:
            return self.roll.meet(what, self._optimizers.started, limit_s, warning)
        except RuntimeError as error:
            raise self.lost(place, error) from error
        finally:
            with suppress(RuntimeError):
                self.roll.announce_waiting("")


def _asked_apart(asks: list[tuple[int, str, int, str]]) -> ValueError:
    """The refusal of an agreement at which ranks meet with different questions."""
    texts = []
    for number, call, calls, stage in asks:
        of_call = f"{call} (call {calls}), " if call else ""
        texts.append(f"optimizer {number}, {of_call}{stage}")
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks_of.setdefault(text, []).append(rank)
    return problem(
        "ranks",
        found="; ".join(f"{ranks} asked for {text}" for text, ranks in ranks_of.items()),
        needed="all ranks must make the same collective calls, of the same optimizer, in the same order",
        cure="use several optimizers in one order on all ranks, and look for a call that was refused, or left "
        "out, on some",
    )


def _timeout_of(process_group: dist.ProcessGroup) -> timedelta:
    """How long collectives of this group wait."""
    backends = [process_group._get_backend(device) for device in process_group._device_types]
    options: list[Any] = [backend.options for backend in backends if hasattr(backend, "options")]
    timeout: timedelta = max((each._timeout for each in options), default=c10d.default_pg_timeout)
    return timeout


def hang_up(process_group: dist.ProcessGroup | None) -> None:
    """End this rank's part in a gloo group and in its control group, so that whoever waits for it fails now.

    Idempotent. gloo closes all connections of a group when a receive runs out of time, so one is asked for that nobody
    sends.
    """
    with suppress(RuntimeError, ValueError):  # destroyed already
        group = process_group if process_group is not None else c10d._get_default_group()
        of_gloo = [group] if dist.get_backend(group) == "gloo" else []
        control: list[Any] = [_control_of[group]] if group in _control_of else []
        for each in [*of_gloo, *control]:
            with suppress(RuntimeError):  # the error that closes them; they may be closed already
                peer = (each.rank() + 1) % each.size()
                each.recv([torch.empty(1, device="cpu")], peer, _NOBODYS_TAG).wait(timedelta(milliseconds=1))
