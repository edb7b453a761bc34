"""Counters of a step: bytes and calls by stage, matrices orthogonalized, host milliseconds by stage.

This module only counts; it neither logs nor interprets. Counting costs a dict update for each stage. Times are those of
the host: on CUDA they show launch cost, not kernel time (use `torch.profiler`; every stage has a label).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Metrics:
    """Counters of the step in progress (`current`) and of the last finished one (`last`)."""

    def __init__(self) -> None:
        self.steps = 0
        self._open()
        self.last_bytes: dict[str, int] = {}
        self.last_far_bytes: dict[str, int] = {}
        self.last_calls: dict[str, int] = {}
        self.last_stage_ms: dict[str, float] = {}
        self.last_ns_matrices = 0

    def _open(self) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self.far_bytes: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)
        self.stage_ms: dict[str, float] = defaultdict(float)
        self.ns_matrices = 0

    def count(self, stage: str, num_bytes: int, far_bytes: int = 0) -> None:
        """Count a collective of `stage` that sends `num_bytes` from this rank, `far_bytes` of them to other nodes."""
        self.bytes[stage] += num_bytes
        if far_bytes:
            self.far_bytes[stage] += far_bytes
        self.calls[stage] += 1

    @contextmanager
    def stage(self, name: str, bucket: int | None = None) -> Iterator[None]:
        """Label the block for `torch.profiler` as ``distmuon::<stage>[/<bucket>]`` and add its host time."""
        label = f"distmuon::{name}" if bucket is None else f"distmuon::{name}/{bucket}"
        start = time.perf_counter()
        with torch.profiler.record_function(label):
            yield
        self.stage_ms[name] += 1e3 * (time.perf_counter() - start)

    def last(self) -> dict[str, object]:
        """The counts of the last finished step, and the number of steps."""
        return {
            "steps": self.steps,
            "ns_matrices": self.last_ns_matrices,
            "bytes": self.last_bytes,
            "bytes_between_nodes": self.last_far_bytes,
            "calls": self.last_calls,
            "stage_ms": self.last_stage_ms,
        }

    def close_step(self) -> None:
        """End the step: the counts since the last call become `last_*`."""
        self.steps += 1
        self.last_bytes = dict(self.bytes)
        self.last_far_bytes = dict(self.far_bytes)
        self.last_calls = dict(self.calls)
        self.last_stage_ms = dict(self.stage_ms)
        self.last_ns_matrices = self.ns_matrices
        self._open()
