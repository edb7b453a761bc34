"""A flat range of a tensor as boxes of it: the seam between segments and n-dimensional chunks. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes

MAX_DIMS = 64  # torch makes no tensor of more


def boxes(shape: Sequence[int], start: int, length: int) -> list[Box]:
    """Elements [start, start + length) of a tensor of `shape`, flattened, as boxes in that order; 2*ndim - 1 at most.

    Each box is a contiguous range by itself::

        . . . s s      partial first row    (recursively, in the shape of a row)
        s s s s s      whole rows           one box
        s s . . .      partial last row
    """
    if length == 0:
        return []
    if not shape:
        return [((), ())]
    row, inner = prod(shape[1:]), shape[1:]
    first, stop = start // row, start + length
    if length < row and (stop - 1) // row == first:
        return [((first, *offsets), (1, *sizes)) for offsets, sizes in boxes(inner, start - first * row, length)]
    found: list[Box] = []
    if start % row:
        head = boxes(inner, start % row, row - start % row)
        found += [((first, *offsets), (1, *sizes)) for offsets, sizes in head]
        first += 1
    last = stop // row
    if last > first:
        found.append(((first, *[0] * len(inner)), (last - first, *inner)))
    found += [((last, *offsets), (1, *sizes)) for offsets, sizes in boxes(inner, 0, stop % row)]
    return found


def ranges_of(shape: Sequence[int], found: Sequence[Box]) -> list[tuple[int, int]] | None:
    """Of each box its flat range [start, end), or None where one is not a contiguous range of `shape`."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    ranges = []
    for offsets, sizes in found:
        start = sum(offset * stride for offset, stride in zip(offsets, strides))
        if boxes(shape, start, prod(sizes)) != [(tuple(offsets), tuple(sizes))]:
            return None
        ranges.append((start, start + prod(sizes)))
    return ranges


def tiles_exactly(shape: Sequence[int], found: Sequence[Box]) -> bool:
    """Whether boxes like those of `boxes` hold every element of a tensor of `shape` exactly once."""
    ranges = ranges_of(shape, found)
    if ranges is None:
        return False
    starts, ends = zip(*sorted(ranges)) if ranges else ((), ())
    return (*starts, prod(shape)) == (0, *ends)
