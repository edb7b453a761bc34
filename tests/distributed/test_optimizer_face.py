"""DistMuon is a torch.optim.Optimizer: what schedulers, closures, hooks and loaders expect of one, they get."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

import distmuon
from tests.standing import Standing, loss_fn, make_batch, make_batches, num_logical_matrices, routes
from tests.training import (
    Weights,
    assert_equals_reference,
    backward,
    digest,
    hand_gradients,
    make,
    mean_hand_gradients,
    reference,
    reference_weights,
    state_tensors,
    train,
    weights,
)


def _small(**options: Any) -> tuple[nn.Module, distmuon.DistMuon]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return model, distmuon.DistMuon(model, lr=0.02, adamw_lr=0.005, ns_dtype=torch.float32, **options)


def _small_step(model: nn.Module, optimizer: distmuon.DistMuon) -> Tensor:
    loss = model(torch.randn(5, 6)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


# ------------------------------------------------------------------------------------------- schedulers


def _half(step: int) -> float:
    return 0.5**step


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, _half),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, _lrs(o, 0.1), _lrs(o, 1.0), step_size_up=2, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, _lrs(o, 2.0), total_steps=20, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


def _lrs(optimizer: torch.optim.Optimizer, factor: float) -> list[float]:
    return [group["lr"] * factor for group in optimizer.param_groups]


def _every_scheduler() -> list[str]:
    found = [
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    ]
    return [name for name in found if name != "LRScheduler"]


@pytest.mark.parametrize("name", _every_scheduler())
def test_every_scheduler_runs_and_keeps_the_ratio_of_the_groups(name: str) -> None:
    assert name in SCHEDULERS, "torch has a new scheduler: give it arguments in SCHEDULERS"
    model, optimizer = _small()
    scheduler = SCHEDULERS[name](optimizer)
    seen = set()
    for _ in range(8):
        _small_step(model, optimizer)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        lrs = {group["rule"]: group["lr"] for group in optimizer.param_groups}
        seen.add(lrs["muon"])
        assert lrs["muon"] == pytest.approx(4 * lrs["adamw"], rel=1e-9, abs=1e-12)
        assert optimizer.metrics()["lr"] == pytest.approx(lrs)
    assert len(seen) > 1, "the schedule moved the lr"


def _scheduled(group: dist.ProcessGroup, tensor_lr: bool) -> Weights:
    lr = torch.tensor(0.02) if tensor_lr else 0.02
    model, optimizer = make(group, lr=lr)
    scheduler = lr_scheduler.LambdaLR(optimizer, _half)
    for step in range(3):
        train(group, model, optimizer, [step])
        scheduler.step()
        for param_group in optimizer.param_groups:
            param_group["weight_decay"] = 0.1 * step
            if param_group["rule"] == "muon":
                param_group["momentum"] = 0.9
    return weights(model, optimizer)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_group_values_are_read_at_every_step(spawn, tensor_lr: bool) -> None:
    """A changed lr, weight decay and momentum are those of the next step; an lr may be a tensor."""
    oracle = reference()
    for step in range(3):
        oracle.lr = oracle.adamw_lr = 0.02 * _half(step)
        oracle.step(loss_fn, make_batches(step, 2))
        oracle.weight_decay = oracle.adamw_weight_decay = 0.1 * step
        oracle.momentum = 0.9
    for ends in spawn(_scheduled, 2, tensor_lr=tensor_lr):
        assert_equals_reference(ends, oracle.weights)


def _routed_lr(group: dist.ProcessGroup) -> Weights:
    special = distmuon.Route("up.weight", "muon", options={"lr": 0.05, "ns_steps": 3, "weight_decay": 0.0})
    model, optimizer = make(group, routes=[special, *routes()])
    train(group, model, optimizer, range(2))
    return weights(model, optimizer)


def test_options_of_a_route_are_a_group_of_their_own(spawn) -> None:
    """Two Muon groups with different lr, decay and number of iterations, in one bucket."""
    oracles = [reference(), reference(lr=0.05, weight_decay=0.0, ns_steps=3)]
    for step in range(2):
        grads = oracles[0].mean_gradients(loss_fn, make_batches(step, 3))
        oracles[1].apply({"up.weight": grads["up.weight"]})
        oracles[0].apply({fqn: grad for fqn, grad in grads.items() if fqn != "up.weight"})
        for oracle in oracles:
            oracle.weights["up.weight"].copy_(oracles[1].weights["up.weight"])
            oracle.params["up.weight"].data.copy_(oracles[1].weights["up.weight"])
    for ends in spawn(_routed_lr, 3):
        assert_equals_reference(ends, oracles[0].weights)


# ------------------------------------------------------------------------------------------- closures, hooks, zero_grad


def _with_closure(group: dist.ProcessGroup) -> tuple[list[tuple[float, float]], Weights]:
    model, optimizer = make(group)
    losses = []
    for step in range(3):
        batch = make_batch(step, dist.get_rank(group), 0)

        def closure(batch=batch) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            return loss

        returned = optimizer.step(closure)
        losses.append((returned.item(), returned.requires_grad))
    return losses, weights(model, optimizer)


def test_a_closure_gives_the_gradients_and_its_loss_is_returned(spawn) -> None:
    oracle = reference()
    wanted: list[list[float]] = [[], []]
    for step in range(3):
        for rank in range(2):
            wanted[rank].append(loss_fn(oracle.model, make_batch(step, rank, 0)).item())
        oracle.step(loss_fn, make_batches(step, 2))
    for rank, (losses, ends) in enumerate(spawn(_with_closure, 2)):
        assert [loss for loss, _ in losses] == pytest.approx(wanted[rank], rel=1e-5)
        assert_equals_reference(ends, oracle.weights)


def _with_hooks(group: dist.ProcessGroup) -> tuple[list[str], bool]:
    model, optimizer = make(group)
    calls, seen = [], {}

    def post(which: str) -> Any:
        def hook(hooked: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(which)
            seen[which] = digest(dict(model.named_parameters()))

        return hook

    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(post("post")),
    ]
    train(group, model, optimizer, [0])
    of_post = seen["post"] == digest(weights(model, optimizer))
    for handle in handles:
        handle.remove()
    handles = [register_optimizer_step_post_hook(post("global post"))]
    train(group, model, optimizer, [1])
    of_global = seen["global post"] == digest(weights(model, optimizer))
    handles[0].remove()
    train(group, model, optimizer, [2])
    return calls, of_post and of_global


def test_step_hooks_fire_and_see_finished_parameters(spawn) -> None:
    for calls, finished in spawn(_with_hooks, 3):
        assert calls == ["pre", "post", "global post"]
        assert finished, "a post hook reads parameters, so none may be in flight"


def _discarded(group: dist.ProcessGroup, overlap: bool, set_to_none: bool, discard: str) -> Weights:
    model, optimizer = make(group, overlap=overlap)
    rank = dist.get_rank(group)
    for step in range(2):
        wasted = [make_batch(90 + step, rank, micro) for micro in range(2)]
        if discard == "unsynced":
            with optimizer.no_sync():
                loss_fn(model, wasted[0]).backward()
        elif discard == "by hand":
            for fqn, grad in hand_gradients(model, step, rank).items():
                model.get_parameter(fqn).grad = grad
        else:
            backward(model, optimizer, wasted)
        if discard == "clipped":
            optimizer.clip_grad_norm_(1.0)
        optimizer.zero_grad(set_to_none=set_to_none)
        train(group, model, optimizer, [step])
        optimizer.zero_grad(set_to_none=set_to_none)
    assert optimizer.metrics()["steps"] == 2
    return weights(model, optimizer)


@pytest.mark.parametrize("discard", ["reduced", "unsynced", "clipped", "by hand"])
@pytest.mark.parametrize(("overlap", "set_to_none"), [(True, True), (True, False), (False, True)])
def test_zero_grad_discards_a_backward_that_was_not_stepped(
    spawn, discard: str, overlap: bool, set_to_none: bool
) -> None:
    wanted = reference_weights(3, range(2))
    for ends in spawn(_discarded, 3, overlap=overlap, set_to_none=set_to_none, discard=discard, timeout=20):
        assert_equals_reference(ends, wanted)


def _only_unsynced(group: dist.ProcessGroup) -> Weights:
    model, optimizer = make(group)
    with optimizer.no_sync():
        for micro in range(2):
            (loss_fn(model, make_batch(0, dist.get_rank(group), micro)) / 2).backward()
    optimizer.step()
    return weights(model, optimizer)


def test_a_step_after_only_unsynced_backwards_reduces_them(spawn) -> None:
    """Forgetting the last synchronised backward costs overlap, not correctness."""
    wanted = reference_weights(3, [0], 2)
    for ends in spawn(_only_unsynced, 3, timeout=20):
        assert_equals_reference(ends, wanted)


# ------------------------------------------------------------------------------------------- groups and signatures


def test_param_groups_can_be_copied_and_pickled() -> None:
    model, optimizer = _small(weight_decay=0.3, momentum=0.8)
    _small_step(model, optimizer)
    for twin in (copy.deepcopy(optimizer.param_groups), pickle.loads(pickle.dumps(optimizer.param_groups))):
        assert len(twin) == len(optimizer.param_groups) == 2
        for ours, theirs in zip(optimizer.param_groups, twin, strict=True):
            assert {k: v for k, v in ours.items() if k != "params"} == {
                k: v for k, v in theirs.items() if k != "params"
            }
            assert all(torch.equal(p, q) for p, q in zip(ours["params"], theirs["params"], strict=True))
    groups = {group["rule"]: group for group in optimizer.param_groups}
    assert groups["muon"]["param_names"] == ["0.weight"] and groups["muon"]["momentum"] == 0.8
    assert groups["adamw"]["betas"] == (0.9, 0.95) and {g["weight_decay"] for g in groups.values()} == {0.3}


def test_add_param_group_refuses_and_says_what_to_do() -> None:
    _, optimizer = _small()
    with pytest.raises(ValueError, match=r"add_param_group: .*make a new DistMuon"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("method", ["step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"])
def test_signatures_are_those_of_the_base_class(method: str) -> None:
    """Names and kinds of the base's arguments: loaders call some of them by keyword."""
    base, ours = (
        inspect.signature(getattr(kind, method)).parameters for kind in (torch.optim.Optimizer, distmuon.DistMuon)
    )
    for name, parameter in base.items():
        assert name in ours and ours[name].kind == parameter.kind and ours[name].default == parameter.default
    extra = [p for name, p in ours.items() if name not in base]
    assert all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in extra)
    assert issubclass(distmuon.DistMuon, torch.optim.Optimizer)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, r"lr: found -1\.0; a number >= 0"),
        ({"momentum": 1.0}, r"momentum: found 1\.0; a number in \[0, 1"),
        ({"weight_decay": -0.1}, r"weight_decay: found -0\.1"),
        ({"ns_steps": 0}, r"ns_steps: found 0; 1 to 99"),
        ({"adamw_betas": (0.9, 1.0)}, r"betas: found 1\.0"),
        ({"packing": "tight"}, r"packing: found 'tight'; one of balanced, contiguous"),
        ({"placement": "all"}, r"placement: found 'all'; one of owner, replicated"),
        ({"grad_reduction": "ddp"}, r"grad_reduction: found 'ddp'"),
        ({"adjust_lr_fn": "rms"}, r"adjust_lr_fn: found 'rms'"),
        ({"ns_coefficients": "karpathy"}, r"karpathy.*jordan"),
        ({"bucket_mb": 0.0}, r"bucket_mb: found 0\.0; a positive number"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm: found 0\.0"),
        ({"lr": torch.ones(2)}, r"lr: .*tensor of 2 elements; a single element is needed"),
        ({"reduce_dtype": torch.int8}, r"precision\.reduce: found torch\.int8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_illegal_options_raise_with_value_and_cure(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        distmuon.DistMuon(Standing(), routes=routes(), **options)


def test_report_agrees_with_an_independent_walk() -> None:
    model, optimizer = make(None)
    params = {fqn: p for fqn, p in model.named_parameters() if p.requires_grad}
    muon = [p for fqn, p in params.items() if p.ndim > 1 and "embed" not in fqn]
    text = optimizer.report()
    assert (
        f"Muon: {len(muon)} tensors ({num_logical_matrices(model)} matrices), {sum(p.numel() for p in muon):,} elements"
        in text
    )
    rest = sum(p.numel() for p in params.values()) - sum(p.numel() for p in muon)
    assert f"AdamW: {len(params) - len(muon)} tensors, {rest:,} elements" in text
    assert "frozen: 2 tensors" in text
    full = optimizer.report(full=True)
    assert all(fqn in full for fqn in params)


def test_metrics_before_and_after_a_step() -> None:
    model, optimizer = make(None)
    fresh = optimizer.metrics()
    assert fresh["steps"] == 0 and fresh["skipped_steps"] == 0 and fresh["grad_norm"] is None
    train(None, model, optimizer, [0])
    metrics = optimizer.metrics()
    grads = reference().mean_gradients(loss_fn, make_batches(0, 1))
    norm = torch.stack([grad.double().square().sum() for grad in grads.values()]).sum().sqrt().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert metrics["steps"] == 1 and metrics["ns_matrices"] == num_logical_matrices(model)
    assert metrics["bytes"] == {} and set(metrics["lr"]) == {"muon", "adamw"}
    assert metrics["stage_ms"]["newton_schulz"] > 0 and json_is_plain(metrics)


def json_is_plain(value: Any) -> bool:
    """Numbers, strings and containers of them: what any logger takes."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and json_is_plain(item) for key, item in value.items())
    return value is None or type(value) in (int, float, str, bool)


# ------------------------------------------------------------------------------------------- state


PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"bf16": True, "ns_dtype": None},
    "bfloat16 momentum": {"momentum_dtype": torch.bfloat16},
}


def _made(group: dist.ProcessGroup | None, bf16: bool = False, **options: Any) -> tuple[Any, Any]:
    return make(group, Standing().bfloat16() if bf16 else Standing(), **options)


def _save(group: dist.ProcessGroup, precision: str) -> tuple[Any, Any, str, str]:
    """(full state after two steps, the model's state, digests of weights and state after two more)."""
    model, optimizer = _made(group, **PRECISIONS[precision])
    train(group, model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.full_state_dict())
    model_state = {key: value.clone() for key, value in model.state_dict().items()}
    train(group, model, optimizer, range(2, 4))
    return saved, model_state, digest(weights(model, optimizer)), digest(state_tensors(optimizer))


def _load(group: dist.ProcessGroup, precision: str, saved: Any, model_state: Any, **options: Any) -> Any:
    """Loaded into an optimizer that has already gone elsewhere: (state as loaded, digests after two steps, weights)."""
    model, optimizer = _made(group, **PRECISIONS[precision], **options)
    train(group, model, optimizer, [77])
    model.load_state_dict(model_state)
    optimizer.load_state_dict(state_dict=saved)
    loaded = state_tensors(optimizer), optimizer.full_state_dict()["param_groups"]
    train(group, model, optimizer, range(2, 4))
    return loaded, digest(weights(model, optimizer)), digest(state_tensors(optimizer)), weights(model, optimizer)


def _named(saved: Any) -> dict[str, Tensor]:
    names = {n: fqn for g in saved["param_groups"] for n, fqn in zip(g["params"], g["param_names"], strict=True)}
    return {f"{names[n]}.{key}": value for n, state in saved["state"].items() for key, value in state.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_full_state_round_trip_is_bit_exact(spawn, precision: str) -> None:
    """Save, load into another optimizer, train on: state, weights and groups equal the unbroken run's bit for bit."""
    dp_size = 4 if "momentum" in precision else 3  # cut for four, one rank has no Muon element of a mixed bucket
    saves = spawn(_save, dp_size, precision=precision)
    saved, model_state, end, end_state = saves[0]
    assert len({digest(_named(other[0])) for other in saves}) == 1, "every rank gets the whole state"
    for (state, groups), loaded_end, loaded_end_state, _ in spawn(
        _load, dp_size, precision=precision, saved=saved, model_state=model_state
    ):
        assert digest(state) == digest(_named(saved))
        assert groups == saved["param_groups"]
        assert (loaded_end, loaded_end_state) == (end, end_state)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_state_loads_at_another_number_of_ranks_and_another_cut(spawn, dp_size: int) -> None:
    saved, model_state, _, _ = spawn(_save, 3, precision="float32")[0]
    for precision, options in (("float32", {}), ("float32", {"packing": "contiguous", "bucket_mb": 0.05})):
        oracle = reference()
        for step in range(2):
            oracle.step(loss_fn, make_batches(step, 3))
        for step in range(2, 4):
            oracle.step(loss_fn, make_batches(step, dp_size))
        by_rank = spawn(_load, dp_size, precision=precision, saved=saved, model_state=model_state, **options)
        for (state, _), *_, ends in by_rank:
            assert digest(state) == digest(_named(saved))
            assert_equals_reference(ends, oracle.weights)


def _load_masters_alone(group: dist.ProcessGroup, saved: Any) -> tuple[Weights, str]:
    model, optimizer = _made(group, **PRECISIONS["bfloat16"])
    train(group, model, optimizer, [77])
    optimizer.load_state_dict(saved)
    loaded = {fqn: param.detach().clone() for fqn, param in model.named_parameters()}
    train(group, model, optimizer, range(2, 4))
    return loaded, digest(weights(model, optimizer))


def test_loaded_masters_become_the_parameters_of_all_ranks(spawn) -> None:
    """Before any forward or step: a load that forgot to gather would go on with a different model, without an error."""
    saved, model_state, end, _ = spawn(_save, 3, precision="bfloat16")[0]
    for loaded, loaded_end in spawn(_load_masters_alone, 3, saved=saved):
        assert all(torch.equal(value, model_state[fqn]) for fqn, value in loaded.items())
        assert loaded_end == end


def _state_like_torch(group: dist.ProcessGroup) -> dict[str, Tensor]:
    model, optimizer = make(group, lr=0.0)
    for step in range(3):
        for fqn, grad in hand_gradients(model, step, dist.get_rank(group)).items():
            model.get_parameter(fqn).grad = grad
        optimizer.step()
        optimizer.zero_grad()
    return state_tensors(optimizer)


def test_state_is_that_of_torch_muon_and_adamw(spawn) -> None:
    """Same keys, same values: with lr 0 both see the same gradients whatever rounds their updates."""
    model = Standing()
    rules = reference().rules
    params = dict(model.named_parameters())
    muon = torch.optim.Muon([p for fqn, p in params.items() if rules.get(fqn) == "muon" and p.ndim == 2], lr=0.0)
    adamw = torch.optim.AdamW([p for fqn, p in params.items() if rules.get(fqn) == "adamw"], lr=0.0, betas=(0.9, 0.95))
    for step in range(3):
        for fqn, grad in mean_hand_gradients(model, step, 2).items():
            params[fqn].grad = grad
        muon.step()
        adamw.step()
    fqns = {id(p): fqn for fqn, p in params.items()}
    theirs = {f"{fqns[id(p)]}.{k}": v for o in (muon, adamw) for p, state in o.state.items() for k, v in state.items()}
    ours = spawn(_state_like_torch, 2)[0]
    assert {key.rpartition(".")[2] for key in ours} == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)
        assert ours[key].shape == value.shape and ours[key].dtype == value.dtype


def _asked_by_dcp(group: dist.ProcessGroup, when: int) -> tuple[bool, str, str]:
    """Whether the call, before step `when`, left the weights alone; then weights and state after three steps."""
    model, optimizer = make(group)
    alone = True
    for step in range(3):
        if step == when:
            before = digest(weights(model, optimizer))
            get_optimizer_state_dict(model, optimizer)
            alone = digest(weights(model, optimizer)) == before or (step == 0 and dist.get_rank(group) > 0)
        train(group, model, optimizer, [step])
    return alone, digest(weights(model, optimizer)), digest(state_tensors(optimizer))


def test_torch_state_dict_helpers_change_nothing(spawn) -> None:
    """Where they see no state they step once with zero gradients and lr 0: once training has begun they must see some.

    Before the first step torch's own optimizers count that step, too; the weights must not notice.
    """
    assert all(alone for alone, *_ in spawn(_asked_by_dcp, 2, when=0))
    for asked, not_asked in zip(spawn(_asked_by_dcp, 2, when=1), spawn(_asked_by_dcp, 2, when=99), strict=True):
        assert asked == not_asked


def test_a_state_of_another_routing_is_refused() -> None:
    model, optimizer = _small()
    _small_step(model, optimizer)
    saved = optimizer.full_state_dict()
    other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="same routing"):
        distmuon.DistMuon(other, routes="adamw").load_state_dict(saved)
    wide = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    with pytest.raises(ValueError, match=r"0\.weight.*\(8, 6\).*\(9, 6\) is needed"):
        distmuon.DistMuon(wide).load_state_dict(saved)


def _foreign_writes(group: dist.ProcessGroup, dtype: torch.dtype) -> tuple[float, str]:
    """Somebody writes a parameter in place between two steps (EMA swap, pruning, a manual load)."""
    model, optimizer = make(group, Standing().to(dtype))
    train(group, model, optimizer, [0])
    optimizer.synchronize()
    with torch.no_grad():
        model.up.weight.zero_()
        model.norm_in.bias.fill_(0.25)
    for group_ in optimizer.param_groups:
        group_["lr"] = 0.0
    train(group, model, optimizer, [1])
    ends = weights(model, optimizer)
    return float(ends["up.weight"].abs().sum() + (ends["norm_in.bias"] - 0.25).abs().sum()), digest(ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_written_from_outside_are_kept(spawn, dtype: torch.dtype) -> None:
    results = spawn(_foreign_writes, 3, dtype=dtype)
    assert [moved for moved, _ in results] == [0.0] * 3
    assert len({ends for _, ends in results}) == 1


# ------------------------------------------------------------------------------------------- as torch.optim does


def test_a_tensor_lr_is_each_groups_own() -> None:
    """One tensor in all groups was scaled once for each of them by schedulers that write into it."""
    model, optimizer = _small()
    optimizer = distmuon.DistMuon(model, lr=torch.tensor(0.1))
    assert optimizer.param_groups[0]["lr"] is not optimizer.param_groups[1]["lr"]
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.025, 0.025])
    routes = [
        distmuon.Route("0.*", "muon", options={"lr": torch.tensor(0.100001)}),
        distmuon.Route("2.weight", "muon", options={"lr": torch.tensor(0.100004)}),
    ]
    model[0].bias.requires_grad_(False)  # a vector has no Muon
    assert len(distmuon.DistMuon(model, routes=routes).param_groups) == 3, "tensors that print alike are not equal"


def test_hooks_of_the_state_are_called() -> None:
    model, optimizer = _small()
    _small_step(model, optimizer)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": len(state["state"])})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {key: value for key, value in state.items() if key != "extra"}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    state = optimizer.state_dict()
    assert state["extra"] == 4
    optimizer.load_state_dict(state)
    assert seen == ["loaded"]


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, pickle.dumps])
def test_an_optimizer_is_not_copied(way: Any) -> None:
    """A copy once failed at its first step, in words of Python's."""
    _, optimizer = _small()
    with pytest.raises(ValueError, match=r"DistMuon: copied or pickled .* use state_dict"):
        way(optimizer)


def test_a_copied_model_does_not_call_its_originals_optimizer() -> None:
    """A teacher copied from a student once raised in its forward when the student had a newer optimizer."""
    model, optimizer = _small()
    teacher = copy.deepcopy(model)
    newer = distmuon.DistMuon(model, lr=0.02)
    assert teacher(torch.ones(1, 6)).shape == (1, 4)
    _small_step(model, newer)
    del optimizer


def test_two_parameters_in_one_memory_are_refused() -> None:
    """They were untied in silence."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight.data = model[0].weight.data
    wanted = r"1\.weight: it lies in the memory of 0\.weight.*module\.weight = other\.weight"
    with pytest.raises(ValueError, match=wanted):
        distmuon.DistMuon(model)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    _, optimizer = _small(weight_decay=numpy.float32(0.1))
    assert optimizer.param_groups[0]["weight_decay"] == numpy.float32(0.1)


def test_the_norm_is_exact_for_large_shards() -> None:
    """In one float32 sum over all elements it was 8e-5 off at 4 million of them, and clipping with it."""
    model = nn.Linear(2048, 2048, bias=False)
    optimizer = distmuon.DistMuon(model, routes=[distmuon.Route("*", "muon")])
    model(torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    wanted = math.sqrt(float(model.weight.grad.double().square().sum()))
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(wanted, rel=1e-6)


def _stale_in_hook(group: dist.ProcessGroup) -> tuple[bool, bool]:
    """Whether a step pre-hook saw other weights than all ranks have, after a forward that used none of them."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(24, 40, bias=False), nn.Linear(40, 24, bias=False)])
    routes = [distmuon.Route("*", "muon")]
    optimizer = distmuon.DistMuon(model, process_group=group, overlap="forward", bucket_mb=0.001, routes=routes)
    seen: list[dict[str, Tensor]] = []
    hook = lambda *_: seen.append({fqn: p.detach().clone() for fqn, p in model.named_parameters()})  # noqa: E731
    optimizer.register_step_pre_hook(hook)
    inputs = torch.randn(4, 24, generator=torch.Generator().manual_seed(dist.get_rank(group)))
    model[1](model[0](inputs)).square().mean().backward()
    optimizer.step()
    in_flight = optimizer._engine.must_wait
    optimizer.step()
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, digest(seen[1]), group=group)
    return in_flight, len(set(ranks)) == 1


def test_step_pre_hooks_see_finished_parameters(spawn) -> None:
    assert spawn(_stale_in_hook, 2) == [(True, True)] * 2
