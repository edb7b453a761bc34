"""Updated shards -> whole parameters on all ranks, bucket by bucket, under whatever comes next.

Decides what travels, when it has arrived, and when staged parameters are copied out. Who waits, and when, is decided by
the hooks of the modules (`hooks.py`): the all-gathers of later layers run under the forward of earlier ones.

[Note: updates travel] With `param_gather="updates"` a rank sends the polar factors of its shard (2 bytes an element in
bfloat16) instead of its float32 parameters (4), and every rank makes line 6 of the walk on all of its replica. AdamW's
elements travel as they are. Replicas stay equal bit by bit: the same three roundings of the same numbers, each a kernel
of its own (`rules.muon_weight`), so that no fused multiply-add here and none there can tell ranks apart.

      message of a rank: | AdamW elements, float32 | polar factors, exchange dtype | up to the longest message |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from distmuon.checks import Verdict
from distmuon.comm.group import DataParallelGroup, Pending
from distmuon.errors import problem
from distmuon.layout.layout import Segment
from distmuon.math import rules
from distmuon.step.storage import BucketBuffers, Buffers


@dataclass(frozen=True, slots=True)
class Updates:
    """Line 6 of the walk for one bucket in one step: by Muon segment (lr, weight decay, scale); absent ones have no
    gradient and are left alone."""

    factors: Mapping[Segment, tuple[float, float, float]]
    verdict: Verdict

    def apply(self, segment: Segment, weight: Tensor, polar_factor: Tensor) -> None:
        """On the elements of `segment`, in place; `polar_factor` of the same length."""
        if segment in self.factors:
            lr, decay, scale = self.factors[segment]
            out = weight if self.verdict.known else None
            new = rules.muon_weight(weight, polar_factor, lr=lr, weight_decay=decay, scale=scale, out=out)
            if out is None:
                rules.commit(self.verdict.ok, weight, new)


class ParamGather:
    """The all-gathers under way, by bucket."""

    def __init__(self, buffers: Buffers, group: DataParallelGroup) -> None:
        self.buffers = buffers
        self._group = group
        self._pending: dict[int, Pending] = {}
        self._home: torch.cuda.Stream | None = None  # the stream of the step
        self._updates: dict[int, Updates] = {}
        self._held: list[int] | None = None  # buckets that are ready, while all-gathers are held back
        self._dtype = buffers.options.precision.wire
        self.updates_travel = buffers.options.sharding.param_gather == "updates" and group.dp_size > 1

    def start(self, index: int, stage: str = "all_gather") -> None:
        """All-gather the parameters of bucket `index`, in place in its flat buffer; counted under `stage`."""
        if self._held is not None:
            self._held.append(index)
            return
        bucket = self.buffers.buckets[index]
        self._start(index, bucket.param_flat, bucket.param_shard, stage)

    def hold(self) -> None:
        """Until `let_go`, only note what `start` is asked for; see [Note: all-gathers come last] in engine.py."""
        self._held = []

    def let_go(self) -> None:
        """Start what was held back, in the order in which it was asked for."""
        held, self._held = self._held, None
        for index in held or ():
            self.start(index)

    def start_updates(self, index: int, updates: Updates, polar_pieces: Sequence[Tensor]) -> None:
        """All-gather what all ranks need for `updates`; `polar_pieces`: one 1-D tensor a muon piece of this rank.

        Messages have memory of their own, so two are under way at the most: the one before the last is applied first.
        """
        self.wait(list(self._updates)[:-1])
        self._updates[index] = updates
        message = self._message(self.buffers.buckets[index], polar_pieces)
        self._start(index, message.new_empty(self._group.dp_size * message.numel()), message, "all_gather")

    def _start(self, index: int, output: Tensor, input: Tensor, stage: str) -> None:
        self.buffers.sent(index)
        if output.is_cuda:
            self._home = torch.cuda.current_stream(output.device)
        with torch.profiler.record_function(f"distmuon::all_gather/{index}"):
            about = self.buffers.buckets[index].about
            self._pending[index] = self._group.start_all_gather(output, input, stage=stage, about=about)

    def settled(self) -> ParamGather:
        """Itself, once nothing is in flight and foreign writes to parameters are in the masters."""
        self.wait()
        self.buffers.adopt()
        return self

    def publish(self) -> None:
        """The masters were written: they become the parameters of all ranks. Blocking."""
        self._held = None  # a step that raised may have left it
        for index in range(len(self.buffers.buckets)):
            self.start(index, stage="state_dict")
        self.wait()

    @property
    def any_in_flight(self) -> bool:
        return bool(self._pending)

    def check_arrived(self, index: int, fqn: str) -> None:
        """Raise if bucket `index` is still in flight although the gradient of its parameter `fqn` exists already."""
        if index in self._pending:
            raise problem(
                fqn, "it was used in forward before its all-gather was waited for",
                "parameters are waited for in the forward of the module that holds them",
                "call optimizer.synchronize() before the forward, or pass overlap=False",
            )  # fmt: skip

    @torch.no_grad()
    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Wait for the buckets `indices` (None: all); cheap where nothing is in flight."""
        if not self._pending:
            return
        for index in sorted(self._pending if indices is None else indices):
            pending = self._pending.pop(index, None)
            if pending is not None:
                arrived, updates = pending.wait(), self._updates.pop(index, None)
                if updates is not None:
                    self._apply(self.buffers.buckets[index], arrived, updates)
                self.buffers.buckets[index].stage_out()
                self.buffers.arrived(index)
        if self._home is not None and self._home != (current := torch.cuda.current_stream(self._home.device)):
            self._home.wait_stream(current)  # who waits first may be on another (an evaluation, a copy to the host)

    def wait_quietly(self) -> None:
        """For who cannot raise: where peers are gone, nobody can be told."""
        with suppress(RuntimeError, ValueError):
            self.wait()

    def _message(self, bucket: BucketBuffers, polar_pieces: Sequence[Tensor]) -> Tensor:
        size = self.buffers.layout.message_bytes(bucket.bucket, self._dtype.itemsize)
        message = torch.zeros(size, dtype=torch.uint8, device=bucket.param_flat.device)
        places = self._places(message, [p.segment for p in bucket.adamw], [p.segment for p in bucket.muon])
        for place, elements in zip(places, [*(p.cut(bucket.param_shard) for p in bucket.adamw), *polar_pieces]):
            place.copy_(elements)
        return message

    def _apply(self, bucket: BucketBuffers, messages: Tensor, updates: Updates) -> None:
        """Line 6 of the walk on the shards of all ranks, and AdamW's elements of the others into their places."""
        specs, shard_size, me = self.buffers.layout.specs, bucket.bucket.shard_size, self._group.dp_rank
        of_rank: list[tuple[list[Segment], list[Segment]]] = [([], []) for _ in range(self._group.dp_size)]
        for segment in bucket.bucket.segments:
            of_rank[segment.rank][specs[segment.param].rule == "muon"].append(segment)
        for rank, (message, (adamw, muon)) in enumerate(zip(messages.view(len(of_rank), -1), of_rank)):
            for segment, elements in zip(adamw + muon, self._places(message, adamw, muon)):
                start = rank * shard_size + segment.shard_offset
                weight = bucket.param_flat[start : start + segment.length]
                if specs[segment.param].rule == "muon":
                    updates.apply(segment, weight, elements)
                elif rank != me:
                    weight.copy_(elements)

    def _places(self, message: Tensor, adamw: Sequence[Segment], muon: Sequence[Segment]) -> list[Tensor]:
        """The places of one rank's segments in its message, AdamW's first."""
        lengths = [s.length for s in adamw], [s.length for s in muon]
        end = 4 * sum(lengths[0])
        border = -(-end // 8) * 8
        polar = message[border : border + self._dtype.itemsize * sum(lengths[1])].view(self._dtype)
        elements = message[:end].view(torch.float32), polar
        return [place for whole, each in zip(elements, lengths) for place in torch.split(whole, each)]
