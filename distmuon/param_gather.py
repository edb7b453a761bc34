"""Updated shards -> whole parameters on all ranks, bucket by bucket, under whatever comes next.

Decides when a bucket's bytes have arrived and staged parameters are copied out. Who waits, and when, is decided by
the hooks of the modules (`hooks.py`): the all-gathers of later layers run under the forward of earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from distmuon.buffers import Buffers
from distmuon.collectives import DataParallelGroup, Pending
from distmuon.errors import problem


class ParamGather:
    """The all-gathers under way, by bucket."""

    def __init__(self, buffers: Buffers, group: DataParallelGroup) -> None:
        self.buffers = buffers
        self._group = group
        self._pending: dict[int, Pending] = {}

    def start(self, index: int, stage: str = "all_gather") -> None:
        """All-gather bucket `index`, in place in its flat buffer; counted under `stage`."""
        bucket = self.buffers.buckets[index]
        bucket.publish_master()
        self.buffers.sent(index)
        with torch.profiler.record_function(f"distmuon::all_gather/{index}"):
            self._pending[index] = self._group.start_all_gather(bucket.param_flat, bucket.param_shard, stage=stage)

    def settled(self) -> ParamGather:
        """Itself, once nothing is in flight and foreign writes to parameters are in the masters."""
        self.wait()
        self.buffers.adopt()
        return self

    def publish(self) -> None:
        """The masters were written: they become the parameters of all ranks. Blocking."""
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

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Wait for the buckets `indices` (None: all); cheap where nothing is in flight."""
        if not self._pending:
            return
        for index in sorted(self._pending if indices is None else indices):
            pending = self._pending.pop(index, None)
            if pending is not None:
                pending.wait()
                self.buffers.buckets[index].stage_out()
                self.buffers.arrived(index)
