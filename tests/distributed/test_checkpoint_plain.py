"""Plain state: torch.optim's own optimizers take it and give it back; torch's helpers work or say why not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import distmuon
from distmuon.checkpoint.torch_optim import from_torch_optim, to_torch_optim
from tests.standing import Standing, routes
from tests.training import Weights, assert_equals_reference, digest, make, state_tensors, train, weights

OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "adamw_lr": 0.005,
    "weight_decay": 0.1,
    "ns_dtype": torch.float32,
    "routes": [distmuon.Route("[123].weight", "muon")],
}


def _model() -> nn.Module:
    """Matrices and vectors only: what torch.optim.Muon can hold."""
    torch.manual_seed(7)
    layers = [nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 8)]
    return nn.Sequential(nn.Embedding(9, 12), *layers)


def _gradients(model: nn.Module, step: int) -> None:
    """The same on every rank, and well conditioned, so that only the optimizers are compared."""
    generator = torch.Generator().manual_seed(step)
    for fqn, param in model.named_parameters():
        grad = torch.randn(param.shape, generator=generator)
        if param.ndim == 2 and fqn != "0.weight":
            grad.diagonal().add_(6.0)
        param.grad = grad


def _steps(model: nn.Module, optimizers: Any, steps: range) -> None:
    for step in steps:
        _gradients(model, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _unbroken(group: dist.ProcessGroup) -> Weights:
    model = _model()
    optimizer = distmuon.DistMuon(model, process_group=group, **OPTIONS)
    _steps(model, [optimizer], range(6))
    return weights(model, optimizer)


def _leave(group: dist.ProcessGroup, file: str) -> Any:
    """Two steps, then the pair's state dicts and a safetensors file."""
    model = _model()
    optimizer = distmuon.DistMuon(model, process_group=group, **OPTIONS)
    _steps(model, [optimizer], range(2))
    states = to_torch_optim(optimizer)
    if dist.get_rank(group) == 0:
        save_file({name: value.clone() for name, value in model.state_dict().items()}, file)
    return states


def _come_back(group: dist.ProcessGroup, file: str, muon: Any, adamw: Any) -> tuple[Weights, Any]:
    """The pair's state taken over, two more steps."""
    model = _model()
    optimizer = distmuon.DistMuon(model, process_group=group, **OPTIONS)
    model.load_state_dict(load_file(file))
    optimizer.load_state_dict(from_torch_optim(optimizer, muon, adamw))
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    _steps(model, [optimizer], range(4, 6))
    return weights(model, optimizer), groups


@pytest.mark.promise(
    "Plain state",
    "A run goes on in torch.optim.Muon + torch.optim.AdamW with a safetensors file, and comes back at"
    " another number of ranks, equal to the unbroken run",
)
@pytest.mark.parametrize("named", [True, False])
def test_a_run_goes_on_in_torch_optim_and_comes_back(
    spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Two steps on two ranks, two in torch.optim, two on three ranks: equal to six on two ranks within the promise.

    torch's Muon iterates in bfloat16 by calling `grad.bfloat16()`; that call is replaced so that float32 is compared.
    """
    unbroken, start = spawn(_unbroken, 2)[0], _model().state_dict()
    muon_state, adamw_state = spawn(_leave, 2, file=str(tmp_path / "model.safetensors"))[0]
    model = _model()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    params = dict(model.named_parameters())

    def given(state: Any) -> Any:
        fqns = [name for group in state["param_groups"] for name in group["param_names"]]
        return [(fqn, params[fqn]) if named else params[fqn] for fqn in fqns]

    muon, adamw = torch.optim.Muon(given(muon_state)), torch.optim.AdamW(given(adamw_state))
    if not named:
        for group in muon_state["param_groups"] + adamw_state["param_groups"]:
            del group["param_names"]
    muon.load_state_dict(muon_state)
    adamw.load_state_dict(adamw_state)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    _steps(model, [muon, adamw], range(2, 4))
    monkeypatch.undo()
    save_file(model.state_dict(), tmp_path / "later.safetensors")
    states = {"muon": muon.state_dict(), "adamw": adamw.state_dict()}
    for ends, groups in spawn(_come_back, 3, file=str(tmp_path / "later.safetensors"), **states):
        assert_equals_reference(ends, unbroken, start)
        by_rule = {group["rule"]: group for group in groups}
        assert by_rule["muon"]["lr"] == 0.02 and by_rule["muon"]["adjust_lr_fn"] == "match_rms_adamw"
        assert by_rule["adamw"]["lr"] == 0.005 and by_rule["adamw"]["betas"] == (0.9, 0.95)


@pytest.mark.promise("Plain state", "A setting that torch.optim.Muon would train differently is refused by name")
def test_what_torch_muon_would_train_differently_is_refused_by_name() -> None:
    model, optimizer = make(None)
    train(None, model, optimizer, [0])
    with pytest.raises(ValueError, match=r"qkv\.weight.*of several logical matrices or of more than 2 dimensions"):
        to_torch_optim(optimizer)
    model = _model()
    optimizer = distmuon.DistMuon(model, ns_coefficients="polar_express")
    with pytest.raises(ValueError, match=r"ns_coefficients: \d triples in 5 steps"):
        to_torch_optim(optimizer)
    optimizer = distmuon.DistMuon(_model(), **OPTIONS, cautious_weight_decay=True)
    with pytest.raises(ValueError, match=r"cautious_weight_decay: found True for .*; torch.optim decays all weights"):
        to_torch_optim(optimizer)


def test_a_pair_that_lacks_parameters_is_refused_by_name() -> None:
    model = _model()
    optimizer = distmuon.DistMuon(model, **OPTIONS)
    _steps(model, [optimizer], range(1))
    muon, adamw = to_torch_optim(optimizer)
    muon["param_groups"][0]["param_names"][0] = "other"
    with pytest.raises(ValueError, match=r"1\.weight: not in one group of torch.optim's muon state"):
        from_torch_optim(optimizer, muon, adamw)
    muon["param_groups"][0]["param_names"][0] = "1.weight"
    with pytest.raises(ValueError, match=r"not in one group of torch.optim's adamw state"):
        from_torch_optim(optimizer, muon, None)


# ------------------------------------------------------------------------- torch's state dict helpers


def _through_torch(group: dist.ProcessGroup, bf16: bool, whole: bool) -> list[str]:
    """Digests of all state: of the source, and of what `set_optimizer_state_dict` made of it elsewhere."""
    options = StateDictOptions(full_state_dict=whole)
    found = []
    taken: Any = None
    for seed in (0, 77):
        model, optimizer = make(group, Standing().bfloat16() if bf16 else Standing())
        train(group, model, optimizer, [seed])
        if taken is not None:
            model.load_state_dict(taken[0])
            set_optimizer_state_dict(model, optimizer, taken[1], options=options)
        taken = (
            {k: v.clone() for k, v in model.state_dict().items()},
            get_optimizer_state_dict(model, optimizer, options=options),
        )
        found.append(digest({**weights(model, optimizer), **state_tensors(optimizer)}))
    return found


@pytest.mark.promise(
    "Plain state",
    "torch's `get_state_dict` and `set_state_dict` pass, sharded, full, from rank 0 and flattened, "
    "fresh and built, plain and DDP, with the unbroken run's bits",
)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_torch_state_dict_helpers_round_trip(spawn, bf16: bool, whole: bool) -> None:
    for source, loaded in spawn(_through_torch, 2, bf16=bf16, whole=whole):
        assert loaded == source


def test_a_flattened_form_that_torch_cannot_restore_is_refused() -> None:
    """torch asks `optimizer.state` which entries a parameter has: none before the first step, where gradients stand."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = make(None, Standing())
    train(None, model, optimizer, [0])
    flat = get_optimizer_state_dict(model, optimizer, options=options)
    assert "state.up.weight.momentum_buffer" in flat
    model, optimizer = make(None, Standing())
    model.up.weight.grad = torch.ones_like(model.up.weight)
    with pytest.raises(ValueError, match=r"the state of every parameter is empty .* call optimizer\.zero_grad\(\)"):
        set_optimizer_state_dict(model, optimizer, flat, options=options)


def _moved(group: dist.ProcessGroup, how: str) -> Any:
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    saved, kept = optimizer.full_state_dict(), state_tensors(optimizer)
    other_routes = [distmuon.Route("up.weight", "adamw"), *routes()]
    model, optimizer = make(group, routes=other_routes)
    optimizer.load_state_dict(saved, on_route_change=how)
    return kept, state_tensors(optimizer)


@pytest.mark.promise("Planted faults", "routing changed between runs")
def test_plain_state_of_another_routing_raises_and_names_the_parameters(spawn_raises) -> None:
    spawn_raises(_moved, 2, how="raise", match=r"up\.weight \(muon -> adamw\): 1 parameters have another rule")
    spawn_raises(_moved, 2, how="ignore", match=r"on_route_change: found 'ignore'")


@pytest.mark.promise(
    "Plain state",
    "State saved under another routing is refused and the parameters are named; "
    '`on_route_change="reset"` keeps their values and starts their state from zero',
)
def test_plain_state_of_another_routing_can_be_reset(spawn) -> None:
    for kept, state in spawn(_moved, 2, how="reset"):
        assert {name for name in state if name not in kept} == {
            "up.weight.exp_avg",
            "up.weight.exp_avg_sq",
            "up.weight.step",
        }
        for name, value in state.items():
            if name in kept:
                assert torch.equal(value, kept[name]), name
            else:
                assert not value.any(), name


def test_an_entry_that_no_group_knows_is_named() -> None:
    model, optimizer = make(None)
    train(None, model, optimizer, [0])
    saved = optimizer.full_state_dict()
    saved["state"][999] = saved["state"][0]
    with pytest.raises(ValueError, match=re.escape("load_state_dict: the state has an entry 999")):
        optimizer.load_state_dict(saved)
