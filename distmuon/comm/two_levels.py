"""The sums of a reduction in 16 bits, on plain tensors: over all ranks at once, or first inside each node.

This module decides what a rank sends at each level, in which order it sums, and where it rounds. It starts no
collective (group.py does), and knows no rank.

[Note: two levels] A ring would round each partial sum to 16 bits. In one node each rank therefore sends every other
rank its slice, and sums in float32. Over several nodes this would send almost everything through the network, where a
ring sends a node's share only once. So a node first sums what its ranks have for the other nodes, and rounds once:

    rank l of node k  ->  rank m of node k    its gradients of the slices of ranks m of all nodes
                          rank m of node k    their mean over the node, float32, in rank order; rounded to 16 bits
    rank m of node k  ->  rank m of node j    the mean of the slice of rank m of node j
                          rank m of node j    the mean over nodes, float32, in node order

The value rounded is a mean, so that float16 does not overflow. The mean of the node itself is rounded as well: the
bits of an element do not depend on the node that it lies on. The rounding adds at most 2**-8 (float16: 2**-11) of the
mean magnitude of the node means to an element's error, as much as the rounding of the gradients themselves.

[Note: memory of two levels] `room` has space for two inputs. What has travelled, or has been summed, makes room for
what comes next; a node has at least two ranks, so everything fits:

    first half    slices in the order in which they leave  ->  the node's means in float32
    second half   slices from the node's ranks             ->  the rounded means, and those of the other nodes
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def num_nodes(dp_size: int, node_size: int) -> int:
    """The nodes of a reduction in two levels; 1: it has one level.

    It has one level inside a single node, with one rank a node, which has nothing to sum, and where the last node has
    fewer ranks, some of whose neighbours would have no partner.
    """
    return dp_size // node_size if 1 < node_size < dp_size and dp_size % node_size == 0 else 1


def slices_sent(rank: int, dp_size: int, node_size: int, known: int | None = None) -> tuple[int, int]:
    """(all slices that `rank` sends in a 16-bit reduction, those of them that leave its node).

    `node_size`: as many consecutive ranks share a node, or fewer the last. `known`: the size by which the reduction
    goes, if that is another one.
    """
    ranks = node_size if known is None else known
    nodes = num_nodes(dp_size, ranks)
    if nodes > 1:
        return dp_size - 1, nodes - 1  # (ranks - 1) * nodes inside, nodes - 1 between
    neighbours = min(node_size, dp_size - rank // node_size * node_size)
    return dp_size - 1, dp_size - neighbours


def sum_in_order(slices: Sequence[Tensor], out: Tensor) -> None:
    """Sum at least two float32 tensors (n,) into `out`, which may be one of them, from the first to the last.

    They serve as memory for the partial sums.
    """
    first, *between, last = slices
    for other in between:
        first.add_(other)
    torch.add(first, last, out=out)


def mean_in_one_kernel(rows: Tensor, out: Tensor) -> None:
    """The same of rows (k, n) on a GPU, where their shape decides the order."""
    torch.sum(rows, dim=0, dtype=out.dtype, out=out).div_(rows.size(0))


def mean_in_order(rows: Sequence[Tensor] | Tensor, out: Tensor) -> None:
    """Write the mean of at least two 16-bit tensors (n,) into `out` (n,), float32. The sum goes from first to last."""
    if isinstance(rows, Tensor) and rows.is_cuda:
        return mean_in_one_kernel(rows, out)
    first, *others = rows
    torch.add(first.to(out.dtype), others[0], out=out)
    for other in others[1:]:
        out.add_(other)
    out.div_(len(rows))


class TwoLevels:
    """The memory of one reduction of `input` (nodes * ranks * n,), and its sums; see [Note: memory of two levels]."""

    def __init__(self, input: Tensor, nodes: int, ranks: int, room: Tensor) -> None:
        self._nodes, self._ranks = nodes, ranks
        part = input.numel() // ranks
        self.to_neighbours, self.from_neighbours = room.chunk(2)
        self._mean = self.to_neighbours[: 2 * part].view(torch.float32)
        self.to_nodes, self.from_nodes = self.from_neighbours[: 2 * part].chunk(2)
        by_node = input.view(nodes, ranks, -1)
        self.to_neighbours.view(ranks, nodes, -1).copy_(by_node.transpose(0, 1))

    def sum_in_node(self) -> None:
        """Make `to_nodes` from `from_neighbours`."""
        mean_in_order(self.from_neighbours.view(self._ranks, -1), self._mean)
        self.to_nodes.copy_(self._mean)

    def sum_over_nodes(self, out: Tensor) -> None:
        """Write the mean over all ranks, from `from_nodes`, into `out` (n,), float32."""
        mean_in_order(self.from_nodes.view(self._nodes, -1), out)
