"""16-bit reductions over several nodes: bit-equal to a plain calculation, whatever the grid; and what each level sends.

The ranks are threads of one process, and the exchange between them is imitated here, so that grids are possible which
the pool of four ranks has no room for: with two nodes of two ranks, nodes and ranks taken for each other would be
equally many.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distmuon.comm import group as collectives
from distmuon.comm import two_levels
from distmuon.comm.group import DataParallelGroup
from distmuon.comm.two_levels import num_nodes


def mean_in_levels(inputs: list[Tensor], nodes: int) -> Tensor:
    """The oracle: the mean of all ranks' `inputs`, of a 16-bit dtype, over `nodes` of equally many ranks, float32.

    Each node's float32 mean in rank order is rounded to the inputs' dtype, and the mean of those goes in node order.
    One node: the float32 mean in rank order.
    """
    ranks = len(inputs) // nodes
    means = []
    for node in range(nodes):
        total = inputs[node * ranks].float()
        for other in inputs[node * ranks + 1 : (node + 1) * ranks]:
            total = total + other.float()
        means.append(total / ranks if nodes == 1 else (total / ranks).to(other.dtype).float())
    total = means[0]
    for other in means[1:]:
        total = total + other
    return total / nodes


class _Exchange:
    """torch.distributed's all-to-all among threads; `group` is the rank."""

    def __init__(self, dp_size: int) -> None:
        self._sent: dict[int, tuple[Tensor, list[int]]] = {}
        self._met = threading.Barrier(dp_size, timeout=60)
        self.dp_size = dp_size

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        receive_counts: list[int] | None = None,
        send_counts: list[int] | None = None,
        *,
        group: int,
        async_op: bool,
    ) -> Any:
        even = [input.numel() // self.dp_size] * self.dp_size
        output.fill_(torch.nan)

        def meet() -> None:
            self._sent[group] = (input.clone(), send_counts or even)
            self._met.wait()
            sent = [self._sent[rank] for rank in range(self.dp_size)]
            parts = [torch.split(tensor, counts)[group] for tensor, counts in sent]
            assert [part.numel() for part in parts] == (receive_counts or even)
            output.copy_(torch.cat(parts))
            self._met.wait()

        return SimpleNamespace(wait=meet)


def _reduce(inputs: list[Tensor], node_size: int, monkeypatch: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Each rank's slice of the mean, and what it counted: bytes, bytes between nodes, calls."""
    dp_size = len(inputs)
    monkeypatch.setattr(collectives, "dist", _Exchange(dp_size))
    counted: list[dict[str, Any]] = [defaultdict(int) for _ in inputs]

    def of_rank(rank: int) -> Tensor:
        def count(stage: str, num_bytes: int, far: int) -> None:
            assert stage == "reduce_scatter"
            for name, value in (("bytes", num_bytes), ("far", far), ("calls", 1)):
                counted[rank][name] += value

        group = DataParallelGroup(None, count)
        group.dp_size, group.dp_rank, group.node_size = dp_size, rank, node_size
        group.process_group = rank  # type: ignore[assignment]
        output = torch.full((inputs[rank].numel() // dp_size,), torch.nan)
        given = inputs[rank].clone()
        pending = group.start_reduce_scatter(output, given, stage="reduce_scatter")
        reduced = pending.wait()
        assert reduced is output is pending.wait()
        assert torch.equal(given.view(torch.uint8), inputs[rank].view(torch.uint8)), "the gradients were written"
        return reduced

    with ThreadPoolExecutor(dp_size) as pool:
        return list(pool.map(of_rank, range(dp_size))), [dict(of) for of in counted]


def _inputs(dp_size: int, size: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    make = torch.Generator().manual_seed(dp_size)
    return [(scale * torch.randn(dp_size * size, generator=make)).to(dtype) for _ in range(dp_size)]


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("nodes", "ranks"), [(2, 2), (3, 2), (2, 3), (3, 3), (2, 4), (4, 2), (3, 8)])
def test_two_levels_have_the_bits_of_a_plain_calculation(
    monkeypatch: Any, nodes: int, ranks: int, dtype: torch.dtype, size: int
) -> None:
    """Every rank's slice; and each level's bytes, of which only the second's leave the node."""
    inputs = _inputs(nodes * ranks, size, dtype)
    shards, counted = _reduce(inputs, ranks, monkeypatch)
    assert torch.equal(torch.cat(shards), mean_in_levels(inputs, nodes))
    far = 2 * size * (nodes - 1)
    sent = {"bytes": 2 * size * nodes * (ranks - 1) + far, "far": far, "calls": 2}
    assert counted == [sent] * len(inputs)


@pytest.mark.parametrize(
    ("dp_size", "node_size", "ranks_of_node"),
    [(4, 4, [4] * 4), (4, 1, [1] * 4), (5, 2, [2, 2, 2, 2, 1]), (7, 4, [4, 4, 4, 4, 3, 3, 3])],
    ids=["one node", "one rank a node", "a smaller last node", "a smaller last node of several"],
)
def test_elsewhere_a_reduction_has_one_level(
    monkeypatch: Any, dp_size: int, node_size: int, ranks_of_node: list[int]
) -> None:
    inputs = _inputs(dp_size, 6, torch.bfloat16)
    shards, counted = _reduce(inputs, node_size, monkeypatch)
    assert torch.equal(torch.cat(shards), mean_in_levels(inputs, 1))
    for of_rank, beside in zip(counted, ranks_of_node, strict=True):
        assert of_rank == {"bytes": 12 * (dp_size - 1), "far": 12 * (dp_size - beside), "calls": 1}


def test_float32_gradients_have_one_level_and_no_known_places(monkeypatch: Any) -> None:
    """On NCCL a ring's path is the library's, so their bytes are not told apart."""
    inputs = _inputs(4, 6, torch.float32)
    shards, counted = _reduce(inputs, 2, monkeypatch)
    assert torch.equal(torch.cat(shards) / 4, mean_in_levels(inputs, 1))
    assert counted == [{"bytes": 3 * 24, "far": 0, "calls": 1}] * 4


def test_a_sum_over_a_node_does_not_overflow_float16(monkeypatch: Any) -> None:
    """Four gradients of 40,000 have a mean that float16 holds, and a sum that it does not."""
    inputs = [torch.full((16,), 40_000.0).half() for _ in range(8)]
    shards, _ = _reduce(inputs, 4, monkeypatch)
    assert all(torch.equal(shard, torch.full((2,), 40_000.0)) for shard in shards)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_the_error_is_half_of_the_last_place_of_a_nodes_mean(
    monkeypatch: Any, dtype: torch.dtype, rounding: float
) -> None:
    """Against the exact mean of the same gradients, element by element; a sum in 16 bits is several times as wrong."""
    nodes, ranks = 3, 8
    inputs = _inputs(nodes * ranks, 512, dtype)
    found = torch.cat(_reduce(inputs, ranks, monkeypatch)[0]).double()
    by_node = torch.stack(inputs).double().view(nodes, ranks, -1).mean(1)
    allowed = rounding * by_node.abs().mean(0) + 1e-6
    wrong = (found - by_node.mean(0)).abs()
    assert bool((wrong <= allowed).all())
    ring = inputs[0]
    for other in inputs[1:]:
        ring = ring + other
    in_16_bits = (ring.double() / len(inputs) - by_node.mean(0)).norm()
    assert 0 < 3 * wrong.norm() < in_16_bits


def test_not_a_number_stays(monkeypatch: Any) -> None:
    inputs = _inputs(6, 4, torch.bfloat16)
    inputs[4][9], inputs[0][5] = torch.nan, torch.inf
    shards, _ = _reduce(inputs, 2, monkeypatch)
    found = torch.cat(shards)
    assert found[9].isnan() and found[5].isinf() and int((~found.isfinite()).sum()) == 2


@pytest.mark.parametrize(
    ("dp_size", "node_size", "found"),
    [(8, 4, 2), (8, 8, 1), (8, 1, 1), (8, 3, 1), (6, 2, 3), (4, 8, 1), (1, 1, 1)],
)
def test_the_nodes_of_a_reduction(dp_size: int, node_size: int, found: int) -> None:
    assert num_nodes(dp_size, node_size) == found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_kernel_gives_the_mean_as_well(dtype: torch.dtype) -> None:
    """What a GPU runs, in float32: a sum in 16 bits would be off by 1e-3, or leave float16's range."""
    rows = (torch.randn(8, 33) * 2e4).to(dtype)
    found, wanted = torch.empty(33), torch.empty(33)
    two_levels.mean_in_one_kernel(rows, found)
    two_levels.mean_in_order(rows, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-2)
