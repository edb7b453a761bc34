"""The layout of another optimizer, for comparison: whole matrices in padded shards.

This module decides only how that optimizer would cut a model; it knows no cost and no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import heapreplace

from distmuon.layout.layout import BucketSpec, Layout, PlacedUnit, Segment
from distmuon.layout.packing import ALIGNMENT, Item, pack_evenly
from distmuon.layout.routing import ParamSpec


def whole_matrix_layout(specs: Sequence[ParamSpec], dp_size: int, bucket_mb: float) -> Layout:
    """Layout of Megatron-core's layer-wise optimizer: every matrix is whole on a rank, with padding but no exchange.

    A bucket of matrices closes at `bucket_mb` or at 0.9*dp_size times its largest matrix. Its matrices, largest first,
    go to the rank with the fewest elements so far, and all shards are padded to the largest. Other parameters are cut
    evenly.
    """
    specs = [part for spec in specs for part in _separate(spec)]
    buckets: list[BucketSpec] = []
    matrices: list[PlacedUnit] = []

    def close(params: list[int]) -> None:
        index, segments = len(buckets), []
        if not specs[params[0]].matrices:
            size, shards = pack_evenly([Item(p, 0, specs[p].numel) for p in params], dp_size)
            for rank, shard in enumerate(shards):
                segments += [
                    Segment(piece.param, piece.offset, piece.length, rank, piece.shard_offset) for piece in shard
                ]
        else:
            heights = [(0, rank) for rank in range(dp_size)]  # a heap
            for param in sorted(params, key=lambda p: -specs[p].numel):
                height, rank = heights[0]
                segments.append(Segment(param, 0, specs[param].numel, rank, height))
                heapreplace(heights, (height + Item(param, 0, specs[param].numel).blocks * ALIGNMENT, rank))
                unit = specs[param].matrices[0]
                pieces = (segments[-1],)
                matrices.append(PlacedUnit(len(matrices), param, unit, index, pieces, (rank,), pieces))
            size = max(heights)[0]
        buckets.append(BucketSpec(index, specs[params[0]].dtype, tuple(params), size, tuple(segments), dp_size))

    for dtype in dict.fromkeys(spec.dtype for spec in specs):
        of_dtype = [p for p in reversed(range(len(specs))) if specs[p].dtype == dtype]
        bucket: list[int] = []
        filled = largest = 0
        for param in (p for p in of_dtype if specs[p].matrices):
            bucket.append(param)
            filled += specs[param].numel
            largest = max(largest, specs[param].numel)
            if filled >= max(bucket_mb * (1 << 20) / 4, 0.9 * dp_size * largest):
                close(bucket)
                bucket = []
                filled = largest = 0
        rest = [p for p in of_dtype if not specs[p].matrices]
        for params in (bucket, rest):
            if params:
                close(params)
    return Layout(dp_size, tuple(specs), tuple(buckets), tuple(matrices))


def _separate(spec: ParamSpec) -> Iterator[ParamSpec]:
    """Yield each matrix as a separate parameter, as in Megatron's models, which neither fuse nor stack matrices."""
    for number, unit in enumerate(spec.matrices):
        alone = replace(unit, offset=0)
        yield replace(spec, fqn=f"{spec.fqn}.{number}", shape=(unit.rows, unit.columns), matrices=(alone,))
    if not spec.matrices:
        yield spec
