"""Neighbouring matrices of a shard are one piece where one launch serves all of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from distmuon.layout.layout import make_layout
from distmuon.layout.routing import ParamSpec, Unit
from distmuon.math.codecs import BLOCK
from distmuon.step.storage import runs_of


def _stack(name: str, count: int, rows: int, columns: int) -> ParamSpec:
    units = tuple(Unit(i * rows * columns, rows, columns) for i in range(count))
    return ParamSpec(name, (count, rows, columns), torch.float32, "muon", units, "test")


def test_whole_neighbours_of_one_shape_are_joined() -> None:
    fused = (Unit(0, 16, 32), Unit(16 * 32, 16, 32), Unit(32 * 32, 64, 32))
    specs = [_stack("experts", 8, 16, 32), ParamSpec("fused", (96, 32), torch.float32, "muon", fused, "test")]
    layout = make_layout(specs, 2, packing="contiguous", bucket_mb=1.0)
    (bucket,) = layout.buckets
    for rank in range(2):
        segments = [segment for segment in bucket.segments if segment.rank == rank]
        runs = runs_of(segments, layout, 1)
        assert sum(run.length for run in runs) == sum(segment.length for segment in segments)
        for run in runs:
            inside = [s for s in segments if run.shard_offset <= s.shard_offset < run.shard_offset + run.length]
            units = [layout.unit_of(segment) for segment in inside]
            assert {segment.param for segment in inside} == {run.param}
            assert [s.param_offset - run.param_offset for s in inside] == [
                s.shard_offset - run.shard_offset for s in inside
            ]
            assert len({(unit.rows, unit.columns) for unit in units}) == 1
            assert len(inside) == 1 or [s.length for s in inside] == [unit.numel for unit in units]
    runs = runs_of(bucket.segments, layout, 1)
    assert len(runs) < len(bucket.segments)
    first_fused = next(run for run in runs if run.param == 1)
    assert first_fused.length == 2 * 16 * 32, "two of its three matrices have one shape"


def test_what_stays_apart() -> None:
    layout = make_layout([_stack("experts", 4, 16, 24)], 1, bucket_mb=1.0)
    segments = layout.buckets[0].segments
    assert [run.length for run in runs_of(segments, layout, 1)] == [4 * 16 * 24]
    assert len(runs_of(segments, layout, BLOCK)) == 4, "blocks of 256 elements would cross the borders of matrices"
    moved = [*segments[:2], replace(segments[2], shard_offset=9999), segments[3]]
    assert [run.length for run in runs_of(moved, layout, 1)] == [2 * 16 * 24, 16 * 24, 16 * 24]
    columns = [replace(segment, run=8, stride=24) for segment in segments]
    assert len(runs_of(columns, layout, 1)) == 4
