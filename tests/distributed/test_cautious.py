"""Cautious weight decay (arXiv 2510.12402): the plain formula, at every cut, under both rules, and after a resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distmuon
from tests.distributed.test_meshes import (
    LR,
    SHAPES,
    Weights,
    _assemble,
    _check,
    _give,
    _gradients,
    _locals,
    _make,
    _oracle,
    hsdp,
    row_parallel,
)
from tests.distributed.test_telemetry import fsdp2

DECAY = 0.5
STEPS = 4


def _expected(cautious: set[str]) -> Weights:
    """The oracle without decay gives each step's update; the decay is then taken by hand."""
    weights = {name: weight.clone() for name, weight in _oracle().weights.items()}
    oracle = _oracle(weight_decay=0.0)
    for step in range(STEPS):
        for name, weight in weights.items():
            oracle.weights[name].copy_(weight)
        oracle.apply(_gradients(step))
        for name, weight in weights.items():
            update = (weight - oracle.weights[name]) / LR
            decay = DECAY * weight
            if name in cautious:
                decay[update * weight < 0] = 0.0
            weights[name] = weight - LR * (update + decay)
    return weights


def _run(group: dist.ProcessGroup, cut: Callable[..., None] | None, resumed: bool = False, **options: Any) -> Any:
    if cut is None:
        options |= {"grad_reduction": "external", "process_group": group}
    model, optimizer = _make(group, cut, weight_decay=DECAY, cautious_weight_decay=True, **options)
    for step in range(STEPS):
        if resumed and step == 2:
            saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
            model, optimizer = _make(group, cut, weight_decay=0.0, **options)
            model.load_state_dict(weights)
            optimizer.load_state_dict(saved)
        _give(model, _gradients(step))
        optimizer.step()
    sent = optimizer.metrics()["bytes"]
    return _locals(model), sent


@pytest.mark.parametrize(
    ("cut", "size", "options"),
    [
        (None, 1, {}),
        (None, 3, {"packing": "contiguous"}),
        (None, 2, {"param_gather": "updates"}),
        (None, 2, {"resumed": True}),
        (fsdp2, 4, {}),
        (hsdp, 4, {}),
        (row_parallel, 2, {"resumed": True}),
    ],
)
def test_decay_is_cautious_at_every_cut(spawn, cut: Any, size: int, options: dict[str, Any]) -> None:
    found = spawn(_run, size, cut=cut, **options)
    wanted = _expected(set(SHAPES))
    _check(_assemble([held for held, _ in found]), wanted)
    plain = _expected(set())
    assert all(not torch.allclose(wanted[name], plain[name], rtol=1e-4, atol=1e-4) for name in SHAPES)


def test_cautious_decay_sends_nothing_more(spawn) -> None:
    cautious = spawn(_run, 2, cut=fsdp2)
    assert [sent for _, sent in cautious] == [sent for _, sent in spawn(_run, 2, cut=fsdp2)]
    assert set(cautious[0][1]) <= {"dp_gather", "scatter", "guard"}


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_one_parameter_may_be_cautious(name: str) -> None:
    """As an option of a route; a skipped step decays nothing."""

    def trained(cautious: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(20, 20)
        option = {"cautious_weight_decay": True} if cautious else {}
        rule: Any = {"weight": "muon", "bias": "adamw"}[name]
        routes = [distmuon.Route(name, rule, options=option)]
        optimizer = distmuon.DistMuon(model, lr=0.1, weight_decay=0.5, routes=routes)
        for scale in (1.0, float("nan"), 1.0):
            before = copy.deepcopy(model)
            (scale * model(torch.randn(6, 20)).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if scale != 1.0:
                assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
        return model

    plain, cautious = trained(False), trained(True)
    assert not torch.equal(plain.get_parameter(name), cautious.get_parameter(name))


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_cautious_is_true_or_false(wrong: Any) -> None:
    with pytest.raises(ValueError, match="cautious_weight_decay"):
        distmuon.DistMuon(nn.Linear(20, 20), cautious_weight_decay=wrong)
