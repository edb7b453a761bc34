"""16-bit reductions over two nodes of two ranks: gradients bit-equal to a plain calculation, in every way to a step.

tests/unit/test_two_levels.py has the other grids; tests/streams has the streams of a GPU.
"""

from __future__ import annotations

import re
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from distmuon.comm import lost_ranks as roll_call
from distmuon.comm.two_levels import TwoLevels
from tests.distributed.late import late_collectives
from tests.distributed.test_lost_ranks import GRACE_S, LIMIT_S, _limit, _own_group
from tests.distributed.test_parity import _train_by_hand, _wanted_by_hand
from tests.standing import Standing
from tests.training import digest, errors, make, train, weights
from tests.unit.test_two_levels import mean_in_levels

NODES: dict[str, Any] = {"reduce_dtype": torch.bfloat16, "gpus_per_node": 2}
CASES: list[dict[str, Any]] = [
    {},
    {"num_micro": 3},
    {"num_micro": 3, "reduce_dtype": torch.float16},
    {"missing": True},
    {"overlap": False, "num_micro": 2},
    {"release_grads": True, "num_micro": 3, "missing": True},
    {"late": True, "num_micro": 2},
    {"late": True, "release_grads": True},
    {"forgets": True},
]


class Layers(nn.Module):
    """Layers of uneven sizes, of which a rank may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [(24, 40), (40, 24), (7, 33), (24, 24), (33, 7)]
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(*size)) for size in sizes])
        self.scale = nn.Parameter(torch.randn(19))

    def terms(self, seed: int, missing: bool) -> dict[str, Tensor]:
        """By parameter, the gradient of `loss` with the same arguments."""
        make = torch.Generator().manual_seed(seed)
        grads = {fqn: torch.randn(param.shape, generator=make) for fqn, param in self.named_parameters()}
        return {fqn: grad for fqn, grad in grads.items() if not (missing and fqn in ("layers.1", "scale"))}

    def loss(self, seed: int, missing: bool) -> Tensor:
        terms = [(self.get_parameter(fqn) * grad).sum() for fqn, grad in self.terms(seed, missing).items()]
        return torch.stack(terms).sum()


def _of_rank(model: Layers, step: int, rank: int, num_micro: int, missing: bool) -> dict[str, Tensor]:
    """The gradients of `rank`, summed over micro-batches in float32; zeros where it has none."""
    total = {fqn: torch.zeros_like(param) for fqn, param in model.named_parameters()}
    for micro in range(num_micro):
        for fqn, grad in model.terms(100 * step + 10 * rank + micro, missing and rank == 2).items():
            total[fqn] += grad
    return total


def _reduced(group: dist.ProcessGroup, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case: whether every element of this rank's reduced gradients is as calculated, in two steps; and the
    digest of the weights after them."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    found = []
    for case in cases:
        options = {**NODES, **case}
        num_micro, missing = options.pop("num_micro", 1), options.pop("missing", False)
        dtype, forgets = options["reduce_dtype"], options.pop("forgets", False)
        with late_collectives() if options.pop("late", False) else nullcontext():
            model = Layers()
            routes = [distmuon.Route("layers.*", "muon"), distmuon.Route("*", "adamw")]
            optimizer = distmuon.DistMuon(model, process_group=group, bucket_mb=0.003, routes=routes, **options)
            right = flat = 0
            for step in range(2):
                if forgets:
                    model.loss(7 + rank, False).backward()  # reduced under backward, and dropped
                    optimizer.zero_grad()
                for micro in range(num_micro):
                    with optimizer.no_sync() if micro < num_micro - 1 else nullcontext():
                        optimizer.synchronize()
                        model.loss(100 * step + 10 * rank + micro, missing and rank == 2).backward()
                optimizer.reduce_gradients()
                sums = [_of_rank(model, step, peer, num_micro, missing) for peer in range(size)]
                for bucket in optimizer._engine.storage.buckets:
                    for piece in bucket.muon + bucket.adamw:
                        fqn, start = optimizer.layout.specs[piece.segment.param].fqn, piece.segment.param_offset
                        part = slice(start, start + piece.segment.length)
                        rounded = [of_rank[fqn].view(-1)[part].to(dtype) for of_rank in sums]
                        assert torch.equal(piece.grad.view(-1), mean_in_levels(rounded, size // 2)), (case, step, fqn)
                        right += 1
                        flat += torch.equal(piece.grad.view(-1), mean_in_levels(rounded, 1))
                optimizer.step()
                optimizer.zero_grad()
            found.append(
                {
                    "weights": digest(weights(model, optimizer)),
                    "pieces": right,
                    "as in one level": flat,
                    "bytes": (optimizer.metrics()["bytes"], optimizer.metrics()["bytes_between_nodes"]),
                    "calls": optimizer.metrics()["calls"]["reduce_scatter"],
                    "buckets": len(optimizer.layout.buckets),
                }
            )
    return found


def test_gradients_are_summed_in_two_levels(spawn) -> None:
    """Bit-equal on every rank with micro-batches, without a gradient on a rank, in memory that is released, with
    collectives that are late, and after a backward that is dropped; so are all replicas, and all runs of one data."""
    by_rank = spawn(_reduced, 4, cases=CASES)
    for number, case in enumerate(CASES):
        results = [of_rank[number] for of_rank in by_rank]
        assert len({result["weights"] for result in results}) == 1, case
        for result in results:
            assert result["buckets"] > 2 and result["pieces"] > 4
            assert result["as in one level"] < result["pieces"] / 2, "or else the second level does not round"
            times = 4 if "forgets" in case else 2
            assert result["calls"] == times * result["buckets"], case
            sent, far = (counted["reduce_scatter"] for counted in result["bytes"])
            assert sent == 3 * far > 0, "two slices to the neighbour, one to the other node"
    digests = [by_rank[0][number]["weights"] for number in range(len(CASES))]
    assert digests[0] == digests[7] == digests[8] != digests[1] and len(set(digests)) == 6
    assert spawn(_reduced, 4, cases=CASES[:2])[0][0]["weights"] == digests[0], "twice the same"


def _last_node_is_smaller(group: dist.ProcessGroup) -> tuple[str, str, int, int]:
    """Digests with nodes of two and one, and with one node; calls and buckets of the former."""
    ends = []
    for nodes in ({"gpus_per_node": 2}, {"gpus_per_node": "all"}):
        model, optimizer = make(group, reduce_dtype=torch.bfloat16, **nodes)
        train(group, model, optimizer, range(2))
        ends.append((digest(weights(model, optimizer)), optimizer.metrics()["calls"]["reduce_scatter"]))
    return ends[0][0], ends[1][0], ends[0][1], len(optimizer.layout.buckets)


def test_a_smaller_last_node_has_one_level(spawn) -> None:
    """With the bits and the calls of one node: nothing is summed wrongly because a rank has no partner."""
    for uneven, plain, calls, buckets in spawn(_last_node_is_smaller, 3):
        assert uneven == plain and calls == buckets


def test_the_error_of_two_levels(spawn) -> None:
    """Of the accumulated update after five steps, worst parameter, against the oracle in float32; and of one level."""
    oracle = _wanted_by_hand("float32", 4)
    cases = [{**NODES, "gpus_per_node": "all"}, NODES]
    worst = []
    for _, masters in spawn(_train_by_hand, 4, dtypes="float32", cases=cases)[0]:
        (_, _), (error, fqn) = errors(masters, oracle.weights, Standing().state_dict())
        print(f"\n{error:.1e} of the update ({fqn})")
        worst.append(error)
    assert 1e-5 < worst[0] <= 0.003 and worst[0] / 2 < worst[1] <= 0.004


# ------------------------------------------------------------------------------------------------------ a lost rank


def _late_between_nodes(group: dist.ProcessGroup) -> tuple[str, str]:
    """Rank 3 sleeps between the levels of the second step: what is raised, and by what is tried after it."""
    roll_call.GRACE_S, own = GRACE_S, _own_group([0, 1, 2, 3])
    messages: list[str] = []
    model, optimizer = make(own, **NODES)
    train(own, model, optimizer, [0])
    _limit(own)
    plain = TwoLevels.sum_in_node

    def sleepy(levels: TwoLevels) -> None:
        TwoLevels.sum_in_node = plain  # type: ignore[method-assign]
        time.sleep(LIMIT_S + 3)
        plain(levels)

    try:
        if dist.get_rank(own) == 3:
            TwoLevels.sum_in_node = sleepy  # type: ignore[method-assign]
        for _ in range(2):
            with pytest.raises(distmuon.LostRanks) as raised:
                if not messages:
                    train(own, model, optimizer, [1])
                optimizer.step()
            messages.append(str(raised.value))
    finally:
        TwoLevels.sum_in_node = plain  # type: ignore[method-assign]
        dist.barrier(group)
    return messages[0], messages[1]


def test_a_rank_that_is_lost_between_the_levels_is_named(spawn) -> None:
    """With the bucket, by all ranks; and the step that they try next says the same, it does not take the half sum."""
    for rank, (message, again) in enumerate(spawn(_late_between_nodes, 4)[:3]):
        assert re.match(rf"rank {rank} at (reduce_scatter of bucket \d+ \(.+\)|guard), step 2: rank 3 missing", message)
        assert again == message
