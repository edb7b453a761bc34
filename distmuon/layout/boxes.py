"""Conversion between flat ranges and n-dimensional boxes of a tensor.

This module decides how a segment is cut into boxes. It works on integers only, and knows no tensor, rank or file.

[Note: runs] Columns of a matrix are no contiguous range. They are runs of `run` elements, `stride` apart; a contiguous
range has run and stride 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
Runs = tuple[int, int]  # run, stride; (0, 0): a contiguous range

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


def boxes_of_runs(shape: Sequence[int], start: int, length: int, run: int, stride: int) -> list[Box]:
    """The boxes of `length` elements from `start` on, in order; see [Note: runs]."""
    if not stride:
        return boxes(shape, start, length)
    cut = next(dim for dim in range(1, len(shape)) if prod(shape[dim:]) == stride)
    ((offsets, sizes),) = boxes(shape[cut:], start % stride, run)
    return [(o + offsets, s + sizes) for o, s in boxes(shape[:cut], start // stride, length // run)]


def runs_of(shape: Sequence[int], box: Box) -> list[tuple[int, int, int, int]]:
    """The (start, length, run, stride) whose elements follow one another in the memory of a tensor with this `box`."""
    offsets, sizes = box
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    is_cut = [dim for dim in range(len(shape)) if sizes[dim] < shape[dim]]
    inner = is_cut[-1] if is_cut else 0
    outer = is_cut[-2] if len(is_cut) > 1 else 0  # between them all dimensions are whole
    run, stride = prod(sizes[inner:]), prod(shape[inner:])
    length = prod(sizes[outer:])
    first = sum(offset * step for offset, step in zip(offsets, strides))
    found = []
    for places in product(*(range(size) for size in sizes[:outer])):
        start = first + sum(place * step for place, step in zip(places, strides))
        found.append((start, length, 0, 0) if length == run else (start, length, run, stride))
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
    """Whether the boxes hold every element of a tensor of `shape` exactly once."""
    ranges = ranges_of(shape, found)
    if ranges is not None:
        starts, ends = zip(*sorted(ranges)) if ranges else ((), ())
        return (*starts, prod(shape)) == (0, *ends)
    edges = sorted({0, shape[0], *(o[0] for o, _ in found), *(o[0] + s[0] for o, s in found)})
    for low, high in pairwise(edges):
        across = [(o[1:], s[1:]) for o, s in found if o[0] < high and o[0] + s[0] > low]
        if not tiles_exactly(shape[1:], across):
            return False
    return edges[0] == 0 and edges[-1] == shape[0]
