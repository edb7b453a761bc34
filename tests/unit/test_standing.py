"""The standing model is as awkward as it says; otherwise tests that lean on it prove less than they seem to."""

from __future__ import annotations

import copy

import pytest
import torch

from distmuon.layout.layout import Layout, make_layout
from distmuon.layout.routing import route
from tests.reference import Reference
from tests.standing import (
    BUCKET_MB,
    SPLITS,
    STACKS,
    Standing,
    loss_fn,
    make_batches,
    num_logical_matrices,
    routes,
    rules,
)


def _layout(dp_size: int, packing: str) -> Layout:
    specs = [spec for spec, _ in route(Standing(), routes())]
    return make_layout(specs, dp_size, packing=packing, bucket_mb=BUCKET_MB)


def test_routing_comes_to_the_rules_written_by_hand() -> None:
    model = Standing()
    specs = [spec for spec, _ in route(model, routes())]
    assert {spec.fqn: spec.rule for spec in specs} == rules(model)
    assert (
        sum(len(matrix.logical_shapes) for spec in specs for matrix in spec.matrices)
        == num_logical_matrices(model)
        == 22
    )


@pytest.mark.parametrize("packing", ["balanced", "contiguous"])
def test_layout_is_awkward(packing: str) -> None:
    spans: dict[int, set[int]] = {}
    for dp_size in (2, 3, 4):
        layout = _layout(dp_size, packing)
        spans[dp_size] = {len({piece.rank for piece in placed.pieces}) for placed in layout.matrices}
        rules_on = {}
        for bucket in layout.buckets:
            for segment in bucket.segments:
                rules_on.setdefault((bucket.index, segment.rank), set()).add(layout.specs[segment.param].rule)
        assert len(layout.buckets) >= 4
        assert {"adamw"} in rules_on.values(), "a shard that is only sand"
        assert {"adamw", "muon"} in rules_on.values()
    assert spans[2] >= {1, 2} and spans[3] >= {1, 2, 3} and spans[4] >= {1, 2, 3, 4}


def test_gradients_are_well_conditioned_and_five_steps_are_cheap() -> None:
    """Rank order of the sum is the only difference: what remains is rounding, a quarter of what parity tests allow."""
    model = Standing()
    start = copy.deepcopy(model.state_dict())
    one, other = (Reference(model, rules(model), splits=SPLITS, stacks=STACKS, lr=0.02) for _ in range(2))
    for step in range(5):
        batches = make_batches(step, 4)
        one.step(loss_fn, batches)
        other.step(loss_fn, batches[::-1])
    assert model.head.weight is model.embed.weight and not model.frozen.weight.requires_grad
    for fqn, weight in one.weights.items():
        moved = (weight - start[fqn]).norm()
        assert moved > 0.02
        assert (weight - other.weights[fqn]).norm() / moved < 2.5e-6, fqn
    assert torch.equal(one.model.frozen.weight, start["frozen.weight"])
