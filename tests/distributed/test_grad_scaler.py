"""Loss scaling: the same numbers as without, and all ranks skip when one overflows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distmuon
from tests.standing import Standing, loss_fn, make_batch
from tests.training import digest, make, state_tensors, train, weights


def _scaled(
    group: dist.ProcessGroup, options: dict[str, Any], clip: float | None, scale: float
) -> tuple[str, str, float]:
    """Digests of parameters and state, and the last norm, after three scaled steps of two micro-batches."""
    model, optimizer = make(group, **options)
    scaler = distmuon.GradScaler("cpu", init_scale=scale, growth_interval=100)
    for step in range(3):
        with optimizer.no_sync():
            scaler.scale(loss_fn(model, make_batch(step, dist.get_rank(group), 0)) / 2).backward()
        scaler.scale(loss_fn(model, make_batch(step, dist.get_rank(group), 1)) / 2).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return digest(weights(model, optimizer)), digest(state_tensors(optimizer)), optimizer.metrics()["grad_norm"]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "overlap": False}], ids=["plain", "max_grad_norm"])
def test_a_power_of_two_changes_no_bit(spawn, options: dict[str, Any], clip: float | None) -> None:
    """1024 only moves exponents; without unscaling, momentum and moments would be 1024 times too large."""
    scaled, plain = (spawn(_scaled, 3, options=options, clip=clip, scale=s) for s in (1024.0, 1.0))
    assert len({*scaled, *plain}) == 1


def _overflow(group: dist.ProcessGroup) -> dict[str, Any]:
    model, optimizer = make(group)
    scaler = distmuon.GradScaler("cpu", init_scale=256.0)
    train(group, model, optimizer, range(1))
    before = digest(weights(model, optimizer)), digest(state_tensors(optimizer))
    loss = loss_fn(model, make_batch(1, dist.get_rank(group), 0))
    scaler.scale(loss * (float("inf") if dist.get_rank(group) == 1 else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    after = digest(weights(model, optimizer)), digest(state_tensors(optimizer))
    scaler.scale(loss_fn(model, make_batch(2, dist.get_rank(group), 0))).backward()
    scaler.step(optimizer)
    moved = digest(weights(model, optimizer)) != after[0]
    return {
        "untouched": before == after,
        "scale": scaler.get_scale(),
        "moved": moved,
        "ends": weights(model, optimizer),
    }


@pytest.mark.promise(
    "Faults while training",
    "float16 with `distmuon.GradScaler`: if one rank alone overflows, all ranks skip and all scales halve",
)
def test_an_overflow_on_one_rank_alone_skips_the_step_on_all(spawn) -> None:
    """torch's scaler would let the other ranks step, and wait for this one for ever."""
    results = spawn(_overflow, 3)
    assert all(found["untouched"] and found["moved"] and found["scale"] == 128.0 for found in results)
    assert len({digest(found["ends"]) for found in results}) == 1


def _float16(group: dist.ProcessGroup) -> tuple[list[float], int]:
    """Losses of a float16 model whose gradients vanish without scaling: 2e-9 is below float16's smallest number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 16, bias=False)).half()
    optimizer = distmuon.DistMuon(model, lr=0.02, process_group=group, routes=[distmuon.Route("*", "muon")])
    scaler, losses = distmuon.GradScaler("cpu", init_scale=2.0**50, growth_interval=1000), []
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(dist.get_rank(group))).half()
    for _ in range(30):
        loss = (model(inputs).float() - inputs.float()).square().mean() * 1e-9
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()) * 1e9)
    return losses, int(scaler.get_scale() < 2.0**50)


def test_float16_parameters_train_where_gradients_would_vanish(spawn) -> None:
    for losses, backed_off in spawn(_float16, 2):
        assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])
        assert backed_off, "or else nothing overflowed at first"


def _too_early(group: dist.ProcessGroup, options: dict[str, Any], first: str) -> None:
    model, optimizer = make(group, Standing(), **options)
    scaler = distmuon.GradScaler("cpu")
    scaler.scale(loss_fn(model, make_batch(0, dist.get_rank(group), 0))).backward()
    if first == "reduce":
        optimizer.reduce_gradients()
    elif first == "clip":
        optimizer.clip_grad_norm_(1.0)
    scaler.step(optimizer)


@pytest.mark.parametrize(
    ("options", "first", "message"),
    [
        ({"max_grad_norm": 1.0}, "reduce", "before reduce_gradients"),
        ({}, "clip", "before clip_grad_norm_"),
    ],
    ids=["reduced before", "clipped before"],
)
def test_scaled_gradients_that_were_used_already_raise(
    spawn_raises, options: dict[str, Any], first: str, message: str
) -> None:
    spawn_raises(_too_early, 2, match=message, options=options, first=first)


def test_other_optimizers_are_scaled_as_ever() -> None:
    model = nn.Linear(4, 4)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), distmuon.GradScaler("cpu", init_scale=8.0)
    before = model.bias.detach().clone()
    scaler.scale(model(torch.ones(1, 4)).sum()).backward()
    scaler.step(optimizer)
    assert torch.allclose(before - model.bias, torch.ones(4))


def _external(group: dist.ProcessGroup, scaler: str, scale: float) -> list[tuple[str, float]]:
    """DDP averages and `param.grad` stays: by step digest of the weights and scale; rank 1 overflows in the second."""
    inner = Standing()
    model = DistributedDataParallel(inner, process_group=group)
    _, optimizer = make(group, model, grad_reduction="external")
    kind = torch.amp.GradScaler if scaler == "torch" else distmuon.GradScaler
    scaling = kind("cpu", init_scale=scale, growth_interval=100)
    seen = []
    for step in range(3):
        loss = loss_fn(model, make_batch(step, dist.get_rank(group), 0))
        scaling.scale(loss * (float("inf") if step == 1 and dist.get_rank(group) == 1 else 1.0)).backward()
        scaling.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(inner.parameters(), 0.5)  # torch's own, on what stays where it was
        scaling.step(optimizer)
        scaling.update()
        optimizer.zero_grad()
        seen.append((digest(weights(inner, optimizer)), scaling.get_scale() / scale))
    return seen


def test_where_somebody_else_averages_torchs_own_scaler_serves_too(spawn) -> None:
    """It was refused, though `param.grad` is averaged and stays; ours hid the gradients from torch's clip."""
    runs = [spawn(_external, 2, scaler=kind, scale=scale) for kind in ("torch", "ours") for scale in (1024.0, 1.0)]
    first = runs[0][0]
    assert all(ranks == [first, first] for ranks in runs)
    assert [scale for _, scale in first] == [1.0, 0.5, 0.5] and first[0][0] == first[1][0] != first[2][0]


def _torchs_scaler(group: dist.ProcessGroup) -> None:
    model, optimizer = make(group)
    scaler = torch.amp.GradScaler("cpu")
    assert optimizer._step_supports_amp_scaling is False, "asked before there is any gradient: nothing is missed"
    scaler.scale(loss_fn(model, make_batch(0, dist.get_rank(group), 0))).backward()
    scaler.step(optimizer)


def test_torchs_scaler_is_refused_where_the_gradients_have_left(spawn_raises) -> None:
    spawn_raises(_torchs_scaler, 2, match=r"GradScaler: torch's scaler, or a trainer's clip.*use distmuon\.GradScaler")
