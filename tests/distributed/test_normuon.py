"""NorMuon (arXiv 2510.05491): the plain formula at every cut, its moments in state and checkpoints, and its bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers.pytorch_utils import Conv1D

import distmuon
from distmuon.step.storage import ROW_MOMENT
from tests.distributed.test_meshes import (
    Weights,
    _assemble,
    _check,
    _give,
    _gradients,
    _locals,
    _make,
    _oracle,
    hsdp,
    tensor_parallel_and_fsdp2,
)
from tests.distributed.test_telemetry import fsdp2

BETA2 = 0.9
STEPS = 4
ROUTES = (
    distmuon.Route("fused", "muon", split=[8, 8, 8]),
    distmuon.Route("wide", "muon", split=[7, 5], split_dim=1, options={"normuon_beta2": None}),
    distmuon.Route("tall", "muon"),
    distmuon.Route("moe.experts", "muon"),
    distmuon.Route("picture.weight", "muon"),
    distmuon.Route("*", "adamw"),
)
ROWS = {"fused": 24, "tall": 17, "moe.experts": 24, "picture.weight": 8}


def _made(group: dist.ProcessGroup, cut: Callable[..., None] | None, **options: Any) -> Any:
    if cut is None:
        options |= {"grad_reduction": "external", "process_group": group}
    return _make(group, cut, **{"normuon_beta2": BETA2, "routes": ROUTES, **options})


def _train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        _give(model, _gradients(step))
        optimizer.step()


def _wanted(steps: int = STEPS, first_normalized: int = 0) -> Weights:
    oracle = _oracle(normuon_beta2=BETA2, plain=["wide"])
    for step in range(steps):
        oracle.normuon_beta2 = BETA2 if step >= first_normalized else None
        oracle.apply(_gradients(step))
    return oracle.weights


def _run(group: dist.ProcessGroup, cut: Callable[..., None] | None, by: str = "", **options: Any) -> Any:
    """Train, with a new optimizer after half of the steps where `by` says how its state is passed on."""
    model, optimizer = _made(group, cut, **options)
    _train(model, optimizer, range(STEPS // 2))
    if by:
        saved = {
            "state_dict": lambda: optimizer.state_dict(),
            "full_state_dict": lambda: optimizer.full_state_dict(),
            "dcp": lambda: get_optimizer_state_dict(model, optimizer),
        }[by]()
        saved, weights = copy.deepcopy(saved), copy.deepcopy(model.state_dict())
        model, optimizer = _made(group, cut, **options)
        model.load_state_dict(weights)
        if by == "dcp":
            set_optimizer_state_dict(model, optimizer, optim_state_dict=saved)
        else:
            optimizer.load_state_dict(saved)
    _train(model, optimizer, range(STEPS // 2, STEPS))
    moments = {name: optimizer.state[param].get(ROW_MOMENT) for name, param in model.named_parameters()}
    return _locals(model), moments, optimizer.metrics()


@pytest.mark.parametrize(
    ("cut", "size", "options"),
    [
        (None, 1, {}),
        (None, 3, {"packing": "contiguous"}),
        (None, 3, {"packing": "contiguous", "placement": "replicated", "by": "state_dict"}),
        (None, 2, {"param_gather": "updates", "by": "full_state_dict"}),
        (fsdp2, 4, {"by": "dcp"}),
        (hsdp, 4, {"by": "state_dict"}),
        (tensor_parallel_and_fsdp2, 4, {}),
    ],
)
def test_the_result_is_that_of_one_process(spawn, cut: Any, size: int, options: dict[str, Any]) -> None:
    found = spawn(_run, size, cut=cut, **options)
    _check(_assemble([held for held, *_ in found]), _wanted())
    for _, moments, _ in found:  # whole on every rank, with the same bits
        assert {name: moment.numel() for name, moment in moments.items() if moment is not None} == ROWS
        assert all(torch.equal(moment, found[0][1][name]) for name, moment in moments.items() if moment is not None)


def test_it_sends_four_bytes_a_row_more(spawn) -> None:
    normalized = spawn(_run, 2, cut=fsdp2)
    plain = spawn(_run, 2, cut=fsdp2, normuon_beta2=None)
    for (*_, more), (*_, less) in zip(normalized, plain):
        added = {stage: sent for stage, sent in more["bytes"].items() if sent != less["bytes"].get(stage)}
        assert added == {"row_moments": sum(ROWS.values()) * 4}  # a ring's 2*(2-1)/2 of them
        assert more["state_bytes"] - less["state_bytes"] == sum(ROWS.values()) * 4


def _save(group: dist.ProcessGroup, path: Path, cut: Callable[..., None] | None, steps: range, **options: Any) -> None:
    model, optimizer = _made(group, cut, **options)
    if steps.start:
        distmuon.load_checkpoint(path, model, optimizer)
    _train(model, optimizer, steps)
    distmuon.save_checkpoint(path / str(steps.stop), model, optimizer)


def _loaded(group: dist.ProcessGroup, path: Path, cut: Callable[..., None] | None, steps: range) -> Any:
    model, optimizer = _made(group, cut)
    distmuon.load_checkpoint(path, model, optimizer)
    _train(model, optimizer, steps)
    return _locals(model)


def test_a_checkpoint_loads_under_another_cut(spawn, tmp_path: Path) -> None:
    spawn(_save, 3, path=tmp_path, cut=None, steps=range(2))
    spawn(_save, 4, path=tmp_path, cut=hsdp, steps=range(2, 3))
    _check(_assemble(spawn(_loaded, 2, path=tmp_path, cut=fsdp2, steps=range(3, STEPS))), _wanted())


def test_moments_start_from_zero_after_plain_muon(spawn, tmp_path: Path) -> None:
    spawn(_save, 2, path=tmp_path, cut=None, steps=range(2), normuon_beta2=None)
    _check(_assemble(spawn(_loaded, 2, path=tmp_path, cut=None, steps=range(2, STEPS))), _wanted(first_normalized=2))


def _alone(**options: Any) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    model = nn.Linear(20, 12)
    routes = [distmuon.Route("weight", "muon")]
    return model, distmuon.DistMuon(model, routes=routes, **options)


def test_a_skipped_step_and_a_missing_gradient_write_no_moment() -> None:
    model, optimizer = _alone(normuon_beta2=BETA2)
    model(torch.randn(6, 20)).square().mean().backward()
    optimizer.step()
    moment = optimizer.state[model.weight][ROW_MOMENT]
    before = moment.clone()
    assert (before > 0).all()
    for grad in (torch.full((12, 20), float("nan")), None):
        model.weight.grad, model.bias.grad = grad, torch.ones(12)
        optimizer.step()
        assert torch.equal(moment, before)


def test_zero_gradients_give_finite_weights() -> None:
    model, optimizer = _alone(normuon_beta2=BETA2, weight_decay=0.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros(12, 20)
    optimizer.step()
    assert torch.equal(model.weight, before)


class _Experts(nn.Module):
    """As transformers stores the experts of some models: (expert, in, out)."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.zeros(2, *shape)) for shape in ((8, 32), (16, 8)))


def _stored_in_out(kind: str) -> nn.Module:
    layer = {"convolution": lambda: nn.ConvTranspose1d(8, 8, 3), "Conv1D": lambda: Conv1D(8, 8), "experts": _Experts}
    return nn.ModuleDict({"first": layer[kind](), "second": nn.Linear(8, 8)})


@pytest.mark.parametrize(
    ("kind", "weight"),
    [("convolution", "first.weight"), ("Conv1D", "first.weight"), ("experts", "first.down_proj")],
)
def test_rows_that_are_no_neurons_are_refused(kind: str, weight: str) -> None:
    routes = [distmuon.Route(weight, "muon"), distmuon.Route("second.weight", "muon"), distmuon.Route("*", "adamw")]
    with pytest.raises(ValueError, match=rf"{weight}: its matrices are stored \(in, out\)"):
        distmuon.DistMuon(_stored_in_out(kind), routes=routes, normuon_beta2=BETA2)
    routes[0] = distmuon.Route(weight, "muon", options={"normuon_beta2": None})
    distmuon.DistMuon(_stored_in_out(kind), routes=routes, normuon_beta2=BETA2)


def test_what_cannot_be_normalized_is_refused() -> None:
    with pytest.raises(ValueError, match=r"wide: its matrices are stored \(in, out\) or cut by columns"):
        routes = [distmuon.Route("wide", "muon", split=[7, 5], split_dim=1)]
        distmuon.DistMuon([("wide", nn.Parameter(torch.zeros(10, 12)))], routes=routes, normuon_beta2=BETA2)
    with pytest.raises(ValueError, match=r"normuon_beta2: found 1.0; a number in \[0, 1.0\) is needed"):
        _alone(normuon_beta2=1.0)


def test_moments_of_another_shape_are_refused() -> None:
    model, optimizer = _alone(normuon_beta2=BETA2)
    model(torch.randn(6, 20)).square().mean().backward()
    saved = optimizer.state_dict()
    moment = optimizer.state[model.weight][ROW_MOMENT]
    saved["state"][0][ROW_MOMENT] = torch.ones(11)
    with pytest.raises(ValueError, match=r"weight\.row_exp_avg_sq: the state has shape \(11,\); \(12,\) is needed"):
        optimizer.load_state_dict(saved)
    optimizer.state[model.weight][ROW_MOMENT] = torch.ones(11)
    with pytest.raises(ValueError, match=r"found \(11,\) torch\.float32 in place of distmuon's tensor"):
        optimizer.step()
    optimizer.state[model.weight][ROW_MOMENT] = moment
    optimizer.step()


def test_it_is_chosen_when_the_optimizer_is_made() -> None:
    model, optimizer = _alone()
    optimizer.param_groups[0]["normuon_beta2"] = BETA2
    model.weight.grad, model.bias.grad = torch.ones(12, 20), torch.ones(12)
    with pytest.raises(ValueError, match=r"found 0\.9, and none when the optimizer was made"):
        optimizer.step()
    _, normalized = _alone(normuon_beta2=BETA2)
    with pytest.raises(ValueError, match=r"the state has normuon_beta2 = 0\.9, this optimizer has none"):
        _alone()[1].load_state_dict(normalized.state_dict())
    with pytest.raises(ValueError, match=r"torch\.optim\.Muon does not normalize rows"):
        distmuon.interchange.to_torch_optim(normalized)
