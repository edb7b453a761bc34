"""Conversion between flat ranges and n-dimensional boxes of a tensor.

This module decides how a segment is cut into boxes. It works on integers only, and knows no tensor, rank or file.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes

MAX_DIMS = 64  # torch's limit


def boxes(shape: Sequence[int], start: int, length: int) -> list[Box]:
    """Cut elements [start, start + length) of a flattened tensor of `shape` into at most 2*ndim - 1 boxes, in order.

    Each box is itself a contiguous range::

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
    """The flat range [start, end) of each box, or None if a box is not a contiguous range of `shape`."""
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
    """Whether contiguous boxes hold every element of a tensor of `shape` exactly once."""
    ranges = ranges_of(shape, found)
    if ranges is None:
        return False
    starts, ends = zip(*sorted(ranges)) if ranges else ((), ())
    return (*starts, prod(shape)) == (0, *ends)
