"""FSDP2: `fully_shard(model)`, then `DistMuon(model, lr=...)`, against the oracle, and all that is refused there.

The standing model is one unit of `fully_shard`, because its loss reads all parameters; `Layers` has a unit a layer, so
that parameters come and go during forward and backward. Its only scalar has one dimension, which FSDP2 demands.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distmuon
from distmuon import checks
from distmuon.layout.given import rows_of
from distmuon.layout.layout import Layout
from distmuon.math.newton_schulz import orthogonalize
from distmuon.step.bucket import Bucket
from tests.reference import Reference
from tests.standing import SPLITS, STACKS, Batch, Standing, loss_fn, make_batch, make_batches, routes, rules
from tests.training import REL_UPDATE, REL_WEIGHTS, errors, mean_hand_gradients

LR = 0.02
Weights = dict[str, Tensor]


class Whole(nn.Module):
    """The standing model with its loss as its output: what a root of FSDP2 computes in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Standing()
        self.inner.temperature = nn.Parameter(self.inner.temperature.detach().view(1))

    def forward(self, batch: Batch) -> Tensor:
        return loss_fn(self.inner, batch)


class Layer(nn.Module):
    """Uneven matrices, a norm, a stack of experts; returns what the next layer gets, and a pull on its own weights."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fused = nn.Linear(width, 2 * hidden + 3, bias=False)
        self.down = nn.Linear(hidden, width)
        self.experts = nn.Parameter(torch.randn(experts, width, width) * width**-0.5)

    def forward(self, x: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = self.fused(self.norm(x)).split([self.down.in_features, self.down.in_features, 3], dim=-1)
        x = x + self.down(torch.tanh(a) * b) + c.sum(-1, keepdim=True)
        x = x + torch.einsum("bd,edm->bm", torch.tanh(x), self.experts)
        fused = self.fused.weight.split([self.down.in_features, self.down.in_features, 3])
        for weight in (*fused, self.down.weight, *self.experts):
            pull = pull + weight.diagonal().sum()
        return x, pull + self.norm.weight.sum() + self.norm.bias.sum() + self.down.bias.sum()


class Layers(nn.Module):
    """A chain of layers, each a unit of `fully_shard`."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList([Layer(17, 11, experts), Layer(17, 6, experts)])
        self.head = nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        pull = x.new_zeros(())
        for layer in self.layers:
            x, pull = layer(x, pull)
        out: Tensor = self.head(x).square().mean() + pull + self.head.weight.sum() + self.head.bias.sum()
        return out


LAYER_ROUTES = (
    distmuon.Route("layers.0.fused.weight", "muon", split=[11, 11, 3]),
    distmuon.Route("layers.1.fused.weight", "muon", split=[6, 6, 3]),
    distmuon.Route("*down.weight", "muon"),
    distmuon.Route("*experts", "muon"),
    distmuon.Route("head.weight", "adamw"),
)


def _rows(step: int, rank: int, micro: int = 0) -> Tensor:
    return torch.randn(7, 17, generator=torch.Generator().manual_seed(10_000 * step + 100 * rank + micro))


def _prefixed(prefix: str) -> tuple[distmuon.Route, ...]:
    found = routes()
    return tuple(distmuon.Route(prefix + r.pattern, r.rule, split=r.split, split_dim=r.split_dim) for r in found)


def _mesh(group: dist.ProcessGroup) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu")


def _optimizer(model: nn.Module, given: Any = None, **options: Any) -> distmuon.DistMuon:
    if given is None:
        given = _prefixed("inner.") if isinstance(model, Whole) else LAYER_ROUTES
    settings = {"lr": LR, "ns_dtype": torch.float32, "bucket_mb": 0.026, "routes": given, **options}
    return distmuon.DistMuon(model, **settings)


def _whole(group: dist.ProcessGroup, fsdp: dict[str, Any] | None = None, **options: Any) -> tuple[Whole, Any]:
    model = Whole()
    fully_shard(model, mesh=_mesh(group), **(fsdp or {}))
    return model, _optimizer(model, **options)


def _layers(group: dist.ProcessGroup, experts: int = 4, **fsdp: Any) -> tuple[Layers, Any]:
    model = Layers(experts)
    for layer in model.layers:
        fully_shard(layer, mesh=_mesh(group), **fsdp)
    fully_shard(model, mesh=_mesh(group), **fsdp)
    return model, _optimizer(model)


def _full(model: nn.Module) -> Weights:
    """The whole parameters, on every rank, without "inner."."""
    found = {}
    for fqn, param in model.named_parameters():
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        found[fqn.removeprefix("inner.")] = whole.detach().clone()
    return found


def _train(model: Any, optimizer: Any, group: dist.ProcessGroup, steps: Sequence[int], num_micro: int = 1) -> None:
    rank = dist.get_rank(group)
    for step in steps:
        for micro in range(num_micro):
            model.set_requires_gradient_sync(micro == num_micro - 1)
            inputs = make_batch(step, rank, micro) if isinstance(model, Whole) else _rows(step, rank, micro)
            (model(inputs) / num_micro).backward()
        optimizer.step()
        optimizer.zero_grad()


def _oracle(model: nn.Module, **options: Any) -> Reference:
    """The oracle of a whole model; of the standing model the inner one."""
    if isinstance(model, Whole):
        return Reference(model.inner, rules(model.inner), splits=SPLITS, stacks=STACKS, **{"lr": LR, **options})
    of = {fqn: "muon" if p.ndim > 1 and "head" not in fqn else "adamw" for fqn, p in model.named_parameters()}
    splits: dict[str, tuple[Sequence[int], int]] = {
        f"layers.{i}.fused.weight": ([h, h, 3], 0) for i, h in enumerate((11, 6))
    }
    stacks = [fqn for fqn in of if "experts" in fqn]
    return Reference(model, of, splits=splits, stacks=stacks, **{"lr": LR, **options})


def _expected(model: nn.Module, dp_size: int, steps: Sequence[int], num_micro: int = 1, **options: Any) -> Weights:
    oracle = _oracle(model, **options)
    for step in steps:
        if isinstance(model, Whole):
            oracle.step(loss_fn, make_batches(step, dp_size, num_micro))
        else:
            inputs = [[_rows(step, rank, micro) for micro in range(num_micro)] for rank in range(dp_size)]
            oracle.step(lambda m, x: m(x), inputs)
    return oracle.weights


def _check(got: Weights, wanted: Weights, model: nn.Module, scale: float = 1.0) -> None:
    start = {fqn.removeprefix("inner."): p.detach() for fqn, p in model.named_parameters()}
    of_weights, of_updates = errors(got, wanted, start)
    assert of_weights[0] <= scale * REL_WEIGHTS, of_weights
    assert of_updates[0] <= scale * REL_UPDATE, of_updates


# ------------------------------------------------------------------------------------------------------- numbers


def _standing_run(group: dist.ProcessGroup, reshard: bool, num_micro: int) -> tuple[Weights, int, Any, Any]:
    model, optimizer = _whole(group, {"reshard_after_forward": reshard})
    _train(model, optimizer, group, range(5), num_micro)
    metrics = optimizer.metrics()
    return _full(model), metrics["ns_matrices"], metrics["bytes"], optimizer.layout


@pytest.mark.parametrize(
    ("dp_size", "reshard", "num_micro"), [(1, True, 1), (2, True, 1), (2, False, 2), (3, False, 1), (4, True, 2)]
)
def test_the_standing_model_equals_the_oracle(spawn, dp_size: int, reshard: bool, num_micro: int) -> None:
    """Uneven and empty shards, a stack, a fused weight, convolutions, tied and frozen parameters; each matrix is
    orthogonalized once in the group, and the exchange sends what the segments say."""
    from tests.standing import num_logical_matrices

    found = spawn(_standing_run, dp_size, timeout=120, reshard=reshard, num_micro=num_micro)
    wanted = _expected(Whole(), dp_size, range(5), num_micro)
    for got, _, _, _ in found:
        _check(got, wanted, Whole())
    assert sum(count for _, count, _, _ in found) == num_logical_matrices(Standing())
    for rank, (_, _, sent, layout) in enumerate(found):
        there, back = _bytes(layout, rank)
        assert (sent.get("dp_gather", 0), sent.get("scatter", 0)) == (there, back)
        assert set(sent) <= {"dp_gather", "scatter", "guard"}, sent
        assert dp_size == 1 or there + back > 0


def _bytes(layout: Layout, rank: int) -> tuple[int, int]:
    """What `rank` sends to owners and back in float32, by the rows that FSDP2 gives each rank, and the owners."""
    there = back = 0
    for placed in layout.matrices:
        spec = layout.specs[placed.param]
        row = spec.numel // spec.shape[0]
        first, last = placed.unit.offset, placed.unit.offset + placed.unit.numel
        (owner,) = placed.workers
        for holder in range(layout.dp_size):
            start, stop = (edge * row for edge in rows_of(spec.shape[0], layout.dp_size, holder))
            held = max(0, min(stop, last) - max(start, first))
            there += 4 * held * (holder == rank != owner)
            back += 4 * held * (owner == rank != holder)
    return there, back


def _layers_run(group: dist.ProcessGroup, reshard: bool, num_micro: int) -> Weights:
    model, optimizer = _layers(group, reshard_after_forward=reshard)
    _train(model, optimizer, group, range(5), num_micro)
    return _full(model)


@pytest.mark.parametrize(("dp_size", "reshard", "num_micro"), [(2, True, 2), (3, True, 1), (4, False, 1)])
def test_a_unit_a_layer_equals_the_oracle(spawn, dp_size: int, reshard: bool, num_micro: int) -> None:
    wanted = _expected(Layers(), dp_size, range(5), num_micro)
    for got in spawn(_layers_run, dp_size, reshard=reshard, num_micro=num_micro):
        _check(got, wanted, Layers())


def test_a_mesh_need_not_begin_at_the_first_rank(spawn) -> None:
    wanted = _expected(Layers(), 2, range(5))
    for got in spawn(_layers_run, 2, first_rank=2, reshard=True, num_micro=1):
        _check(got, wanted, Layers())


def _pairs_run(group: dist.ProcessGroup) -> bool:
    found = []
    for by_name in (False, True):
        model = Layers()
        fully_shard(model, mesh=_mesh(group))
        params: Any = list(model.named_parameters()) if by_name else model
        optimizer = distmuon.DistMuon(params, lr=LR, routes=LAYER_ROUTES)
        _train(model, optimizer, group, range(2))
        found.append(_full(model))
    return _same(*found)


def test_parameters_by_name_serve_as_well(spawn) -> None:
    assert spawn(_pairs_run, 2) == [True, True]


def _stack_run(group: dist.ProcessGroup) -> tuple[list[bool], list[bool]]:
    _, optimizer = _layers(group)
    of_stacks = {i for i, spec in enumerate(optimizer.layout.specs) if "experts" in spec.fqn}
    cut = [(placed.param in of_stacks, placed.straddling) for placed in optimizer.layout.matrices]
    return [s for is_stack, s in cut if is_stack], [s for is_stack, s in cut if not is_stack]


def test_a_stack_cut_on_whole_experts_needs_no_exchange(spawn) -> None:
    for stacks, others in spawn(_stack_run, 2):
        assert stacks == [False] * 8
        assert any(others)


def _mixed_run(group: dist.ProcessGroup) -> tuple[Weights, Weights, Weights, set[torch.dtype]]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer = _layers(group, mp_policy=policy)
    _train(model, optimizer, group, range(2))
    oracle = _oracle(Layers())
    model(_rows(2, dist.get_rank(group))).backward()
    grads: Weights = {}
    for fqn, param in model.named_parameters():
        grad: Any = param.grad
        grads[fqn] = grad.full_tensor().clone()
        oracle.weights[fqn].copy_(param.full_tensor().detach())  # type: ignore[attr-defined]
        for key, value in optimizer.state[param].items():
            oracle.state[fqn][key] = value.full_tensor().clone() if isinstance(value, DTensor) else int(value)
    optimizer.step()
    before = {fqn: weight.clone() for fqn, weight in oracle.weights.items()}
    oracle.apply(grads)
    return _full(model), oracle.weights, before, {param.dtype for param in model.parameters()}


def test_a_mixed_precision_policy_keeps_float32_shards(spawn) -> None:
    """Forward and backward in bfloat16: from the state and the gradients of that step the oracle makes the same."""
    for got, wanted, before, dtypes in spawn(_mixed_run, 2):
        assert dtypes == {torch.float32}
        of_weights, of_updates = errors(got, wanted, before)
        assert of_weights[0] <= REL_WEIGHTS and of_updates[0] <= 10 * REL_UPDATE, (of_weights, of_updates)


# ----------------------------------------------------------------------------------- gradients given by hand


def _give(model: nn.Module, grads: dict[str, Tensor], absent: Sequence[str] = ()) -> None:
    """Averaged gradients as FSDP2 leaves them, this rank's rows, with no collective."""
    for fqn, param in model.named_parameters():
        name = fqn.removeprefix("inner.")
        if not param.requires_grad:
            continue
        assert isinstance(param, DTensor)
        mesh, whole = param.device_mesh, grads[name].to(param.dtype)
        start, stop = rows_of(whole.shape[0], mesh.size(), mesh.get_local_rank())
        facts: Any = {"shape": param.shape, "stride": param.stride(), "run_check": False}
        mine = DTensor.from_local(whole[start:stop].clone(), mesh, param.placements, **facts)
        param.grad = None if name in absent else mine


def _mean(step: int, dp_size: int) -> dict[str, Tensor]:
    return mean_hand_gradients(Whole().inner, step, dp_size)


def _by_hand(dp_size: int, steps: int, **options: Any) -> Weights:
    oracle = _oracle(Whole(), **options)
    for step in range(steps):
        oracle.apply(_mean(step, dp_size))
    return oracle.weights


def _clip_run(group: dist.ProcessGroup, how: str) -> tuple[Weights, list[float]]:
    model, optimizer = _whole(group, **({"max_grad_norm": 3.0} if how == "option" else {}))
    norms = []
    for step in range(3):
        _give(model, _mean(step, group.size()))
        if how == "torch":
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 3.0).full_tensor()))  # type: ignore[attr-defined]
        elif how == "torch after reduce_gradients":
            optimizer.reduce_gradients()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 3.0).full_tensor()))  # type: ignore[attr-defined]
        elif how == "ours":
            norms.append(float(optimizer.clip_grad_norm_(3.0)))
        optimizer.step()
        norms = norms if how != "option" else [*norms, optimizer.metrics()["grad_norm"]]
        optimizer.zero_grad()
    return _full(model), norms


@pytest.mark.parametrize("how", ["torch", "torch after reduce_gradients", "ours", "option"])
def test_clipping(spawn, how: str) -> None:
    """Whoever clips, each element counts once in the norm."""
    wanted = _by_hand(3, 3, max_norm=3.0)
    squares = [[grad.double().square().sum() for grad in _mean(step, 3).values()] for step in range(3)]
    for got, norms in spawn(_clip_run, 3, how=how):
        _check(got, wanted, Whole())
        assert norms == pytest.approx([float(torch.stack(each).sum().sqrt()) for each in squares], rel=1e-5)


def _non_finite_run(group: dist.ProcessGroup) -> tuple[list[bool], int, bool]:
    model, optimizer = _whole(group)
    _give(model, _mean(0, group.size()))
    optimizer.step()
    before = _locals(model, optimizer)
    _give(model, _mean(1, group.size()))
    if dist.get_rank(group) == 1:
        param: Any = model.inner.up.weight
        param.grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    same = [torch.equal(a, b) for a, b in zip(before, _locals(model, optimizer), strict=True)]
    skipped = optimizer.metrics()["skipped_steps"]
    _give(model, _mean(1, group.size()))
    optimizer.step()
    moved = any(not torch.equal(a, b) for a, b in zip(before, _locals(model, optimizer), strict=True))
    return same, skipped, moved


def _scaler_run(group: dist.ProcessGroup, ours: bool) -> tuple[Weights, list[float]]:
    model, optimizer = _whole(group)
    scaler: Any = distmuon.GradScaler("cpu", init_scale=2.0**10) if ours else torch.amp.GradScaler("cpu", 2.0**10)
    scales = []
    for step in range(4):
        scale = float(scaler.scale(torch.ones(())))
        _give(model, {fqn: grad * scale for fqn, grad in _mean(step, group.size()).items()})
        if step == 2 and dist.get_rank(group) == 1:
            up: Any = model.inner.up.weight
            up.grad.to_local().fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return _full(model), scales


@pytest.mark.parametrize("ours", [True, False])
def test_loss_scaling(spawn, ours: bool) -> None:
    """A step that overflows on one rank is skipped, and the scale halved, on all."""
    oracle = _oracle(Whole())
    for step in (0, 1, 3):
        oracle.apply(_mean(step, 2))
    for got, scales in spawn(_scaler_run, 2, ours=ours):
        _check(got, oracle.weights, Whole())
        assert scales == [1024.0, 1024.0, 512.0, 512.0]


def _late_run(group: dist.ProcessGroup, of_dtensor: bool) -> tuple[int, int]:
    """One rank writes its gradients after `reduce_gradients` has judged them."""
    model, optimizer = _whole(group)
    for step in range(2):
        _give(model, _mean(step, group.size()))
        optimizer.reduce_gradients()
        grad: Any = model.inner.up.weight.grad
        with torch.no_grad():
            if step == 1:  # every rank must look again, as with torch's clip
                (grad if of_dtensor else grad.to_local()).mul_(float("nan") if dist.get_rank(group) == 1 else 1.0)
        optimizer.step()
    return optimizer.metrics()["skipped_steps"], optimizer.metrics()["steps"]


@pytest.mark.parametrize("of_dtensor", [True, False])
def test_gradients_written_after_the_verdict_are_judged_again(spawn, of_dtensor: bool) -> None:
    assert spawn(_late_run, 2, of_dtensor=of_dtensor) == [(1, 2), (1, 2)]


def _locals(model: nn.Module, optimizer: Any) -> list[Tensor]:
    tensors: list[Any] = [p for p in model.parameters() if p.requires_grad]
    tensors += [value for entry in optimizer.state.values() for value in entry.values()]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def test_a_non_finite_gradient_on_one_rank_skips_all(spawn) -> None:
    for same, skipped, moved in spawn(_non_finite_run, 3):
        assert all(same) and skipped == 1 and moved


def _none_run(group: dist.ProcessGroup) -> Weights:
    model, optimizer = _whole(group)
    for step in range(3):
        absent = ["picture.weight", "norm_in.bias"] if step == 1 else []
        if step == 1 and dist.get_rank(group) == 1:
            absent += ["up.weight", "down.bias"]
        _give(model, _mean(step, group.size()), absent)
        optimizer.step()
    return _full(model)


def test_none_gradients(spawn) -> None:
    """None on one rank counts as zeros in its rows; None everywhere leaves the parameter alone."""
    dp_size = 3
    oracle = _oracle(Whole())
    for step in range(3):
        grads = _mean(step, dp_size)
        if step == 1:
            for fqn in ("up.weight", "down.bias"):
                start, stop = rows_of(grads[fqn].shape[0], dp_size, 1)
                grads[fqn][start:stop] = 0
            del grads["picture.weight"], grads["norm_in.bias"]
        oracle.apply(grads)
    for got in spawn(_none_run, dp_size):
        _check(got, oracle.weights, Whole())


def _bf16_run(group: dist.ProcessGroup, momentum: Any) -> tuple[Weights, Weights, Any]:
    model = Whole().to(torch.bfloat16)
    fully_shard(model, mesh=_mesh(group))
    optimizer = _optimizer(model, momentum_dtype=momentum)
    for step in range(4):
        _give(model, _mean(step, group.size()))
        optimizer.step()
        optimizer.zero_grad()
    full = optimizer.full_state_dict()
    names = {n: f for g in full["param_groups"] for n, f in zip(g["params"], g["param_names"], strict=True)}
    masters = {names[n].removeprefix("inner."): entry["master"] for n, entry in full["state"].items()}
    return _full(model), masters, optimizer.metrics()["state_bytes"]


@pytest.mark.parametrize("momentum", [None, torch.bfloat16])
def test_shards_of_16_bits_have_masters(spawn, momentum: Any) -> None:
    """The masters follow the oracle in float32, and the parameters are the masters rounded."""
    dp_size = 3
    model = Whole().to(torch.bfloat16)
    oracle = Reference(model.inner, rules(model.inner), splits=SPLITS, stacks=STACKS, lr=LR)
    for step in range(4):
        oracle.apply({fqn: grad.bfloat16().float() for fqn, grad in _mean(step, dp_size).items()})
    start = {fqn: p.detach().float() for fqn, p in model.inner.named_parameters()}
    for got, masters, _ in spawn(_bf16_run, dp_size, momentum=momentum):
        for fqn, weight in masters.items():
            assert torch.equal(got[fqn], weight.bfloat16())
        of_weights, of_updates = errors(masters, oracle.weights, start)
        bound = 1.0 if momentum is None else 2e3
        assert of_weights[0] <= bound * REL_WEIGHTS and of_updates[0] <= bound * REL_UPDATE, (of_weights, of_updates)


def _ns_on_shards(group: dist.ProcessGroup) -> Weights:
    """The negative control: every rank takes its rows for whole matrices."""
    model, optimizer = _whole(group)
    _give(model, _mean(0, group.size()))
    optimizer._built()

    def update(self: Bucket, step: Any) -> Any:
        updates = [self._update_momentum(piece, step) for piece in self.storage.muon]
        polar = []
        for piece, each in zip(self.storage.muon, updates, strict=True):
            columns = optimizer.layout.unit_of(piece.segment).columns
            rows = each.view(1, -1, columns) if each.numel() else None
            found = each if rows is None else orthogonalize(rows, dtype=torch.float32, steps=5, coefficients="jordan")
            polar.append(found.reshape(-1))
        yield "to_owners"
        yield "to_holders"
        with self.storage.masters() as masters:
            self.transport.apply(masters, polar, lambda *piece: self._apply_muon(step, *piece))
            self._adamw(masters, step)

    for bucket in optimizer._engine.buckets:
        bucket.update = partial(update, bucket)
    optimizer.step()
    return _full(model)


def test_the_comparison_sees_newton_schulz_on_shards(spawn) -> None:
    wanted = _by_hand(2, 1)
    (got, _) = spawn(_ns_on_shards, 2)
    with pytest.raises(AssertionError):
        _check(got, wanted, Whole(), scale=1000.0)


# --------------------------------------------------------------------------------------------------------- state


def _state_run(group: dist.ProcessGroup) -> None:
    model, optimizer = _whole(group)
    assert optimizer.state_dict()["state"] == {}
    _give(model, _mean(0, group.size()))
    optimizer.step()
    for group_ in optimizer.param_groups:
        for param in group_["params"]:
            entry = optimizer.state[param]
            keys = {"momentum_buffer"} if group_["rule"] == "muon" else {"exp_avg", "exp_avg_sq", "step"}
            assert set(entry) == keys
            for key in keys - {"step"}:
                value = entry[key]
                assert isinstance(value, DTensor)
                assert value.shape == param.shape and value.placements == param.placements
                assert value.device_mesh == param.device_mesh and value.to_local().shape == param.to_local().shape
            assert "step" not in entry or (not isinstance(entry["step"], DTensor) and float(entry["step"]) == 1.0)


def test_state_is_shown_as_dtensors(spawn) -> None:
    """Also where a rank has no rows: its count of steps is that of the others."""
    spawn(_state_run, 4)


def _alone_run(group: dist.ProcessGroup) -> bool:
    """Rank 0 asks and loads; the other ranks do neither."""
    model, optimizer = _whole(group)
    _give(model, _mean(0, group.size()))
    optimizer.step()
    if dist.get_rank(group) == 0:
        state = optimizer.state_dict()
        kept = {number: {k: v.clone() for k, v in entry.items()} for number, entry in state["state"].items()}
        for entry in state["state"].values():
            for value in entry.values():
                (value.to_local() if isinstance(value, DTensor) else value).fill_(7.0)
        optimizer.load_state_dict({"state": kept, "param_groups": state["param_groups"]})
    _give(model, _mean(1, group.size()))
    optimizer.step()
    wanted = _by_hand(group.size(), 2)
    _check(_full(model), wanted, Whole())
    return True


def test_one_rank_may_ask_and_load_alone(spawn) -> None:
    assert spawn(_alone_run, 2) == [True, True]


def _held(model: nn.Module, optimizer: Any) -> Weights:
    """All parameters and all state, whole. Collective."""
    full = optimizer.full_state_dict()
    names = {n: f for g in full["param_groups"] for n, f in zip(g["params"], g["param_names"], strict=True)}
    found = {f"{names[n]}.{key}": value for n, entry in full["state"].items() for key, value in entry.items()}
    return found | _full(model)


def _of_dtype(group: dist.ProcessGroup, dtype: torch.dtype, moved: float = 0.0, shard: bool = True) -> tuple[Any, Any]:
    model = Whole().to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(moved)
    if shard:
        fully_shard(model, mesh=_mesh(group))
    return model, _optimizer(model, **({} if shard else {"process_group": group, "grad_reduction": "external"}))


def _hand_steps(model: nn.Module, optimizer: Any, steps: Sequence[int]) -> None:
    for step in steps:
        if optimizer.keeps_grads and not any(isinstance(p, DTensor) for p in model.parameters()):
            for fqn, param in model.named_parameters():
                if param.requires_grad:
                    param.grad = _mean(step, 2)[fqn.removeprefix("inner.")].to(param.dtype)
        else:
            _give(model, _mean(step, 2))
        optimizer.step()
        optimizer.zero_grad()


def _dcp_save(group: dist.ProcessGroup, folder: str, dtype: torch.dtype) -> Weights:
    model, optimizer = _of_dtype(group, dtype)
    _hand_steps(model, optimizer, range(2))
    saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=folder, process_group=group)
    return _held(model, optimizer)


def _dcp_load(group: dist.ProcessGroup, folder: str, dtype: torch.dtype) -> tuple[Weights, Weights]:
    model, optimizer = _of_dtype(group, dtype, moved=1.0)
    saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    assert saved["optimizer"]["state"]
    dcp.load(saved, checkpoint_id=folder, process_group=group)
    set_model_state_dict(model, saved["model"])
    set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    assert optimizer.metrics()["steps"] == 0
    loaded = _held(model, optimizer)
    _hand_steps(model, optimizer, [2])
    return loaded, _held(model, optimizer)


def _uninterrupted(group: dist.ProcessGroup, dtype: torch.dtype) -> Weights:
    model, optimizer = _of_dtype(group, dtype)
    _hand_steps(model, optimizer, range(3))
    return _held(model, optimizer)


def _save_after_evaluation(group: dist.ProcessGroup, folder: str) -> None:
    """A forward without a backward leaves whole parameters in the root; the save is of the shards all the same."""
    model, optimizer = _layers(group)
    _train(model, optimizer, group, range(1))
    with torch.no_grad():
        model(_rows(1, dist.get_rank(group)))
    distmuon.save_checkpoint(folder, model, optimizer)
    with torch.no_grad():
        model(_rows(1, dist.get_rank(group)))
    distmuon.load_checkpoint(folder, model, optimizer)
    _train(model, optimizer, group, range(1, 2))


def test_a_checkpoint_may_follow_an_evaluation(spawn, tmp_path: Path) -> None:
    spawn(_save_after_evaluation, 2, folder=str(tmp_path / "step-1"))


def _same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_checkpoints_need_no_adapter(spawn, tmp_path: Path, dtype: torch.dtype) -> None:
    """Saved by 4 ranks, some without rows, and loaded by 4, and by 3: every bit comes back, and at 4 ranks the next
    step has the bits of a run that never stopped."""
    folder = str(tmp_path / "checkpoint")
    saved = spawn(_dcp_save, 4, folder=folder, dtype=dtype)[0]
    unstopped = spawn(_uninterrupted, 4, dtype=dtype)[0]
    for loaded, after in spawn(_dcp_load, 4, folder=folder, dtype=dtype):
        assert _same(loaded, saved) and _same(after, unstopped)
    for loaded, _ in spawn(_dcp_load, 3, folder=folder, dtype=dtype):
        assert _same(loaded, saved)


def _our_save(group: dist.ProcessGroup, folder: str, dtype: torch.dtype, shard: bool, behind: bool) -> Weights:
    model, optimizer = _of_dtype(group, dtype, shard=shard)
    _hand_steps(model, optimizer, range(2))
    distmuon.save_checkpoint(folder, model, optimizer, asynchronous=behind).wait()
    return _held(model, optimizer)


def _our_load(group: dist.ProcessGroup, folder: str, dtype: torch.dtype, shard: bool) -> Weights:
    model, optimizer = _of_dtype(group, dtype, moved=1.0, shard=shard)
    distmuon.load_checkpoint(folder, model, optimizer)
    return _held(model, optimizer)


@pytest.mark.parametrize(("dtype", "behind"), [(torch.float32, False), (torch.bfloat16, True)])
def test_our_checkpoints_are_those_of_zero_1(spawn, tmp_path: Path, dtype: torch.dtype, behind: bool) -> None:
    """Frozen parameters that FSDP2 has cut are in them as well."""
    names = {True: str(tmp_path / "fsdp2-2"), False: str(tmp_path / "zero1-2")}
    for shard, dp_size in ((True, 4), (False, 2)):
        saved = spawn(_our_save, dp_size, folder=names[shard], dtype=dtype, shard=shard, behind=behind)[0]
        for into, load_size in ((True, 3), (False, 2)):
            for loaded in spawn(_our_load, load_size, folder=names[shard], dtype=dtype, shard=into):
                different = [f for f in saved if f not in loaded or not torch.equal(saved[f], loaded[f])]
                assert not different and saved.keys() == loaded.keys(), (shard, into, different)


def _plain_state_run(group: dist.ProcessGroup) -> tuple[Weights, Weights]:
    plain, optimizer = _of_dtype(group, torch.float32, shard=False)
    _hand_steps(plain, optimizer, range(2))
    saved = _held(plain, optimizer)
    model, sharded = _of_dtype(group, torch.float32, shard=True)
    model.load_state_dict({f: distribute_tensor(t, _mesh(group), [Shard(0)]) for f, t in plain.state_dict().items()})
    sharded.load_state_dict(optimizer.state_dict())
    return saved, _held(model, sharded)


def test_whole_state_loads_into_shards(spawn) -> None:
    for saved, loaded in spawn(_plain_state_run, 2):
        assert _same(saved, loaded)


def _write_state_run(group: dist.ProcessGroup) -> Weights:
    """State moved away and back, as a trainer does that empties the device; and one entry taken out."""
    model, optimizer = _whole(group)
    _give(model, _mean(0, group.size()))
    optimizer.step()
    for param, entry in optimizer.state.items():
        away = {key: value.clone() for key, value in entry.items()}
        for value in entry.values():
            (value.to_local() if isinstance(value, DTensor) else value).fill_(7.0)
        optimizer.state[param] = away
    del optimizer.state[model.inner.up.weight]
    _give(model, _mean(1, group.size()))
    optimizer.step()
    return _full(model)


def test_what_users_put_into_state_counts(spawn) -> None:
    oracle = _oracle(Whole())
    oracle.apply(_mean(0, 3))
    oracle.state["up.weight"].clear()
    oracle.apply(_mean(1, 3))
    for got in spawn(_write_state_run, 3):
        _check(got, oracle.weights, Whole())


def _touch_run(group: dist.ProcessGroup) -> None:
    """Nothing of FSDP2's is moved, hooked or kept."""
    model, optimizer = _layers(group)
    hooks = [len(m._forward_pre_hooks) + len(m._state_dict_pre_hooks) for m in model.modules()]
    plain = Layers()
    for layer in plain.layers:
        fully_shard(layer, mesh=_mesh(group))
    fully_shard(plain, mesh=_mesh(group))
    assert hooks == [len(m._forward_pre_hooks) + len(m._state_dict_pre_hooks) for m in plain.modules()]
    params: list[Any] = list(model.parameters())
    places = [param.to_local().data_ptr() for param in params]
    model(_rows(0, dist.get_rank(group))).backward()
    grads = [weakref.ref(param.grad.to_local().untyped_storage()) for param in params]
    versions = [param._version for param in params]
    optimizer.step()
    assert [param.to_local().data_ptr() for param in params] == places
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    assert all(param.grad is not None for param in params)
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in grads)
    held = sum(param.to_local().numel() * (1 if rule == "muon" else 2) for param, rule in _rules(optimizer))
    assert optimizer.metrics()["state_bytes"] == 4 * held


def _rules(optimizer: Any) -> list[tuple[Any, str]]:
    return [(param, group["rule"]) for group in optimizer.param_groups for param in group["params"]]


def _moved_run(group: dist.ProcessGroup) -> Weights:
    """`model.to` puts new local tensors under the parameters, as when a model makes room for another and comes back."""
    model, optimizer = _whole(group)
    for step in range(3):
        _give(model, _mean(step, group.size()))
        optimizer.step()
        optimizer.zero_grad()
        model.to(torch.float64).to(torch.float32)
    return _full(model)


def test_a_model_may_move_away_and_back_between_steps(spawn) -> None:
    for got in spawn(_moved_run, 2):
        _check(got, _by_hand(2, 3), Whole())


def test_nothing_of_fsdp2_is_moved_hooked_or_kept(spawn) -> None:
    spawn(_touch_run, 2)


def _succession_run(group: dist.ProcessGroup) -> str:
    model, optimizer = _layers(group)
    newer = _optimizer(model)
    model(_rows(0, dist.get_rank(group))).backward()
    newer.step()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def test_a_newer_optimizer_takes_over(spawn) -> None:
    assert all("taken over by a newer DistMuon" in text for text in spawn(_succession_run, 2))


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _routing_run(group: dist.ProcessGroup) -> list[tuple[str, list[Any]]]:
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    moe = Qwen3MoeConfig(**small, **heads, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    makes: list[Callable[[], Any]] = [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)),
        lambda: Qwen3MoeForCausalLM(moe),
    ]
    found = []
    for make in makes:
        of_each: list[Any] = []
        for units in ("none", "blocks", "all"):
            model = make()
            for name, module in [*model.named_modules()][::-1] if units != "none" else []:
                is_unit = name.split(".")[-1].isdigit() if units == "blocks" else _holds(module)
                is_tied = isinstance(module, nn.Embedding) or name == "lm_head"  # stay together, in the root's unit
                if name and is_unit and not is_tied and not isinstance(module, nn.ModuleList):
                    fully_shard(module, mesh=_mesh(group))
            if units != "none":
                fully_shard(model, mesh=_mesh(group))
            of_each.append([(s.fqn, s.shape, s.rule, s.matrices, s.reason) for s, _ in distmuon.route(model)])
        found.append((type(model).__name__, of_each))
    return found


def test_the_rule_never_depends_on_the_layout(spawn) -> None:
    """`fully_shard` gives modules another class; a transformers Conv1D is still known for what it is."""
    for name, (plain, blocks, everything) in spawn(_routing_run, 1)[0]:
        assert plain == blocks and plain == everything, name
        assert any(rule == "muon" for _, _, rule, _, _ in plain)


# ------------------------------------------------------------------------------------------------------ refusals


def _load_other_cut(group: dist.ProcessGroup) -> None:
    model, optimizer = _layers(group)
    model(_rows(0, dist.get_rank(group))).backward()
    optimizer.step()
    packed = optimizer.state_dict()

    def replicated(value: Any) -> Any:
        is_cut = isinstance(value, DTensor)
        return distribute_tensor(value.full_tensor(), _mesh(group), [Replicate()]) if is_cut else value

    state = {number: {k: replicated(v) for k, v in entry.items()} for number, entry in packed["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def _plain_gradient(group: dist.ProcessGroup) -> None:
    model, optimizer = _layers(group)
    model(_rows(0, dist.get_rank(group))).backward()
    weight: Any = model.head.weight
    grad = weight.grad.full_tensor()
    weight.grad = distribute_tensor(grad, _mesh(group), [Replicate()])
    optimizer.step()


def _consolidate(group: dist.ProcessGroup) -> None:
    _layers(group)[1].consolidate_state_dict()


def _cast_later(group: dist.ProcessGroup) -> None:
    model, optimizer = _layers(group)
    model(_rows(0, dist.get_rank(group))).backward()
    optimizer.step()
    model.to(torch.bfloat16)
    optimizer.step()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (_load_other_cut, r"the state is a DTensor .*cut otherwise; .*get_optimizer_state_dict"),
        (
            _plain_gradient,
            r"head\.weight: its gradient is a DTensor placed \(Replicate\(\),\) of local shape",
        ),
        (_consolidate, r"consolidate_state_dict: called under FSDP2; .*full_state_dict"),
        (_cast_later, r"its local tensor is .*bfloat16 .*cast, move and shard the model first"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else None,
)
def test_what_cannot_be_taken_is_refused(spawn_raises, call: Callable[..., None], match: str) -> None:
    spawn_raises(call, 2, match=match)


def _ignored(group: dist.ProcessGroup) -> None:
    model = Layers()
    fully_shard(model, mesh=_mesh(group), ignored_params={model.head.bias})
    _optimizer(model)


def _unsharded(group: dist.ProcessGroup) -> None:
    model = Layers()
    fully_shard(model, mesh=_mesh(group), reshard_after_forward=False)
    with torch.no_grad():
        model(_rows(0, 0))
    _optimizer(model)


def _sharded_afterwards(group: dist.ProcessGroup) -> None:
    model = Layers()
    optimizer = distmuon.DistMuon(model, lr=LR, routes=LAYER_ROUTES, process_group=group)
    fully_shard(model, mesh=_mesh(group))
    model(_rows(0, dist.get_rank(group))).backward()
    optimizer.step()


def _other_group(group: dist.ProcessGroup) -> None:
    model = Layers()
    fully_shard(model, mesh=_mesh(group))
    _optimizer(model, process_group=dist.group.WORLD)


@pytest.mark.parametrize(
    ("make", "dp_size", "match"),
    [
        (_ignored, 2, r"head\.bias: it is trained and is a plain tensor .*ignored_params"),
        (_unsharded, 2, r"it is trained and is a plain tensor .*model\.reshard\(\)"),
        (_sharded_afterwards, 2, r"fully_shard was called after DistMuon .*call fully_shard\(model\) first"),
        (_other_group, 2, r"process_group: ranks \[0, 1, 2, 3\]; .*\[0, 1\], .*leave process_group out"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else None,
)
def test_what_is_not_plain_fsdp2_is_refused(spawn_raises, make: Callable[..., None], dp_size: int, match: str) -> None:
    spawn_raises(make, dp_size, match=match)


def _with_options(group: dist.ProcessGroup, **options: Any) -> None:
    model = Layers()
    fully_shard(model, mesh=_mesh(group))
    _optimizer(model, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"packing": "contiguous"}, r"sharding\.packing: .*others have cut"),
        ({"placement": "replicated"}, r"sharding\.placement: .*all ranks but one"),
        ({"param_gather": "updates"}, r"sharding\.param_gather: "),
        ({"release_grads": True}, r"sharding\.release_grads: "),
        ({"overlap": "forward"}, r"sharding\.overlap: "),
        ({"reduce_dtype": torch.bfloat16}, r"precision\.reduce: .*MixedPrecisionPolicy"),
        ({"verify_every": 3}, r"verify_every: "),
        ({"master_format": "remainder"}, r"precision\.master: .*torch's checkpoints"),
        ({"momentum_dtype": torch.int8}, r"precision\.momentum: int8 .*bfloat16"),
    ],
)
def test_options_that_mean_nothing_there_are_refused(spawn_raises, options: dict[str, Any], match: str) -> None:
    spawn_raises(_with_options, 2, match=match, **options)


class _Offloaded:
    """What a DTensor of CPUOffloadPolicy says of itself; the policy itself needs an accelerator."""

    __module__ = "torch.distributed.tensor"
    placements = (Shard(0),)
    _local_tensor = torch.zeros(2, 3)

    class device_mesh:
        ndim, device_type = 1, "cuda"


def test_offloaded_parameters_are_refused() -> None:
    found = checks.not_a_cut(_Offloaded())
    assert found == "offloaded to cpu from a mesh of cuda"


def _different(group: dist.ProcessGroup) -> None:
    model = Layers()
    fully_shard(model, mesh=_mesh(group))
    optimizer = _optimizer(model, lr=LR * (1 + dist.get_rank(group)))
    optimizer.step()


def test_ranks_that_differ_are_told_before_the_first_step(spawn_raises) -> None:
    spawn_raises(_different, 2, match=r"rank 1: found param_groups\[0\]\.lr = 0\.04, on rank 0 .*0\.02")


def _nan(group: dist.ProcessGroup) -> None:
    model = Layers()
    fully_shard(model, mesh=_mesh(group))
    if dist.get_rank(group) == 1:
        param: Any = model.head.weight
        with torch.no_grad():
            param.to_local().fill_(float("nan"))
    _optimizer(model).step()


def test_a_start_from_nan_on_one_rank_is_refused_on_all(spawn_raises) -> None:
    spawn_raises(_nan, 2, match=r"head\.weight: 1 parameters hold NaN or inf on rank 1")
