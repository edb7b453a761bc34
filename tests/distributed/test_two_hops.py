"""Exchanges in two hops over nodes of gloo ranks: the bits of one hop, the bytes and collectives of the plan.

Matrices of tests are small, so the second hop is declared free. tests/unit/test_messages.py has the messages,
tests/streams the streams of a GPU.
"""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distmuon.layout import layout as layouts
from distmuon.planning.plan import plan
from distmuon.step.matrix_exchange import MatrixExchange
from tests.distributed.test_planned_equals_counted import _counted, on_meta, planned
from tests.training import digest, make, policies, train, weights

CASES: list[dict[str, Any]] = [
    {},
    {"overlap": False},
    {"overlap": "forward"},
    {"packing": "contiguous"},
    {"model_dtype": torch.bfloat16, "ns_dtype": torch.bfloat16},
    {"exchange_dtype": torch.bfloat16, "param_gather": "updates"},
    {"grad_reduction": "external"},
    {"own_exchange_group": True, "overlap": "forward"},
    {"normuon_beta2": 0.95},
    {"telemetry_every": 1, "reduce_dtype": torch.bfloat16},
]


def _trained(group: dist.ProcessGroup, cases: list[dict[str, Any]], cost: float) -> list[tuple[str, int, int]]:
    """For each case the digest of the weights after two steps; and how many collectives and bytes its exchanges had."""
    found = []
    patch = pytest.MonkeyPatch()
    patch.setattr(layouts, "_SECOND_HOP", cost)
    try:
        for case in cases:
            options = dict(case)
            dtype = options.pop("model_dtype", torch.float32)
            if options.pop("own_exchange_group", False):
                options["exchange_group"] = dist.new_group([0, 1, 2, 3])
            model, optimizer = make(group, make(None)[0].to(dtype), **options)
            if "grad_reduction" in options:
                for step in range(2):
                    torch.manual_seed(step)  # averaged already: the same on all ranks
                    for param in model.parameters():
                        param.grad = torch.randn_like(param) if param.requires_grad else None
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                train(group, model, optimizer, range(2))
            metrics = optimizer.metrics()
            calls = sum(metrics["calls"][stage] for stage in ("dp_gather", "scatter"))
            sent = sum(metrics["bytes"][stage] for stage in ("dp_gather", "scatter"))
            found.append((digest(weights(model, optimizer)), calls, sent))
    finally:
        patch.undo()
    return found


def test_two_hops_have_the_bits_of_one(spawn) -> None:
    cases = [{**case, "gpus_per_node": 2} for case in CASES]
    in_one, in_two = (spawn(_trained, 4, cases=cases, cost=cost, timeout=120) for cost in (inf, -inf))
    for number, case in enumerate(cases):
        one, two = ([results[number] for results in by_rank] for by_rank in (in_one, in_two))
        assert len({weights for weights, _, _ in one + two}) == 1, case
        assert two[0][1] > one[0][1], case
        assert sum(sent for _, _, sent in two) > sum(sent for _, _, sent in one), "relays pass on"


def _counted_in_two(group: dist.ProcessGroup, **given: Any) -> list[dict[str, Any]]:
    patch = pytest.MonkeyPatch()
    patch.setattr(layouts, "_SECOND_HOP", -inf)
    try:
        return _counted(group, **given)
    finally:
        patch.undo()


def test_planned_equals_counted_in_two_hops(spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of each stage, those between nodes, and collectives, on every rank."""
    ways: list[dict[str, Any]] = [
        {"gpus_per_node": 2},
        {"gpus_per_node": 2, "packing": "contiguous", "param_gather": "updates"},
    ]
    by_rank = spawn(_counted_in_two, 4, name="standing", ways=ways, timeout=120)
    monkeypatch.setattr(layouts, "_SECOND_HOP", -inf)
    model, given = on_meta("standing")
    for number, way in enumerate(ways):
        found = plan(model, **policies(dp_size=4, compare=False, **given, **way))
        assert found.ranks[0].calls["scatter"] > 1 and found.sent_between_nodes > 0
        for rank, results in enumerate(by_rank):
            assert planned(found.ranks[rank]) == results[number], (way, rank)


FAULTS = ("parts in the wrong order", "a part is lost")


def _trained_with_fault(group: dist.ProcessGroup, fault: str) -> str:
    patch = pytest.MonkeyPatch()
    patch.setattr(layouts, "_SECOND_HOP", -inf)
    plain = MatrixExchange._arrived

    def faulty(received: torch.Tensor, hop: Any) -> Any:
        arrivals = plain(received, hop)
        cut = [place for place, (part, _) in enumerate(arrivals) if part.length < part.piece.length]
        if fault == "a part is lost":
            for place in cut[:1]:
                arrivals[place][1].zero_()
        elif len(cut) > 1 and arrivals[cut[0]][0].length == arrivals[cut[1]][0].length:
            first, second = (arrivals[place][1].clone() for place in cut[:2])
            arrivals[cut[0]][1].copy_(second)
            arrivals[cut[1]][1].copy_(first)
        return arrivals

    patch.setattr(MatrixExchange, "_arrived", staticmethod(faulty))
    try:
        model, optimizer = make(group, gpus_per_node=2)
        train(group, model, optimizer, range(2))
        return digest(weights(model, optimizer))
    finally:
        patch.undo()


def test_a_fault_at_a_relay_is_seen(spawn) -> None:
    right = spawn(_trained, 4, cases=[{"gpus_per_node": 2}], cost=-inf)[0][0][0]
    for fault in FAULTS:
        assert right not in set(spawn(_trained_with_fault, 4, fault=fault)), fault
