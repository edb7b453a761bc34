"""What torch.distributed.optim.ZeroRedundancyOptimizer promises, asked of DistMuon on two gloo ranks.

The demands are those of its documentation and of its own argument checks; what belongs to the wrapped class it takes
(`optimizer_class`, functional optimizers, `overlap_with_ddp`, `parameters_as_bucket_view`) has no counterpart here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

import distmuon
from tests.contracts.differences import differs
from tests.contracts.inputs import assert_state_equal
from tests.pool import WorkerError
from tests.training import digest

night = pytest.mark.slow
STEPS = 5
ADAMW = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}


def _zero(*args: Any, **kwargs: Any) -> Any:
    """torch's own. Imported where it is used: its neighbours in the package compile with torch.jit, for seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(*args, **kwargs)


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))


def _optimizer(model: nn.Module, group: Any, **options: Any) -> distmuon.DistMuon:
    """Matrices by Muon unless `routes` says otherwise."""
    routes = [distmuon.Route(name, "muon") for name, param in model.named_parameters() if param.ndim > 1]
    precision = distmuon.Precision(newton_schulz=torch.float32)
    given = {"lr": 0.02, "routes": routes, "precision": precision, **options}
    return distmuon.DistMuon(model, process_group=group, **given)


def _adamw(model: nn.Module, group: Any, **options: Any) -> distmuon.DistMuon:
    return distmuon.DistMuon(model, lr=0.02, routes="adamw", process_group=group, **options)


def _batch(step: int, rank: int) -> Tensor:
    return torch.randn(32, 6, generator=torch.Generator().manual_seed(100 * step + rank))


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - 0.5).square().mean()
    return loss


def _pulled(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradients have full rank: bfloat16 rounds the small singular values of others away."""
    return _loss(model, batch) + sum(0.1 * param.diagonal().sum() for param in model.parameters() if param.ndim > 1)


def _steps(
    model: nn.Module,
    optimizer: Any,
    group: Any,
    first: int = 0,
    last: int = STEPS,
    loss: Callable[[nn.Module, Tensor], Tensor] = _loss,
) -> dict[str, Tensor]:
    for step in range(first, last):
        loss(model, _batch(step, dist.get_rank(group))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _weights(model)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): param.detach().clone() for name, param in model.named_parameters()}


def _alone(kind: Callable[[Any], Any], last: int = STEPS, each_step: Callable[[Any], None] | None = None) -> Any:
    """(model, optimizer) of one process after training on the mean loss of two ranks."""
    model = _model()
    optimizer = kind(model)
    for step in range(last):
        (sum(_loss(model, _batch(step, rank)) for rank in range(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if each_step is not None:
            each_step(optimizer)
    return model, optimizer


def _close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=1e-6, msg=f"{name} differs")


# ------------------------------------------------------------------------------------------- training


def _trained(group: Any, ddp: bool, **options: Any) -> dict[str, Tensor]:
    model: nn.Module = _model(seed=dist.get_rank(group) if not ddp else 0)
    if ddp:
        model, options = DistributedDataParallel(model, process_group=group), {**options, "grad_reduction": "external"}
    if dist.get_rank(group) and not ddp:
        with torch.no_grad():
            model[0].weight.add_(1.0)
    return _steps(model, _adamw(model, group, **options), group)


@pytest.mark.parametrize("ddp", [True, False])
def test_ranks_train_as_one_process(spawn: Any, ddp: bool) -> None:
    """Weights are, on all ranks, those of the plain optimizer in one process, from rank 0's first values."""
    wanted = _weights(_alone(lambda model: torch.optim.AdamW(model.parameters(), **ADAMW))[0])
    ours = spawn(_trained, 2, ddp=ddp)
    assert digest(ours[0]) == digest(ours[1])
    _close(ours[0], wanted)


def _beside(group: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ours, theirs = (DistributedDataParallel(_model(), process_group=group) for _ in range(2))
    zero = _zero(theirs.parameters(), optimizer_class=torch.optim.AdamW, process_group=group, **ADAMW)
    return _steps(ours, _adamw(ours, group, grad_reduction="external"), group), _steps(theirs, zero, group)


@night
def test_it_trains_as_zero_does(spawn: Any) -> None:
    """Under DDP, weights are those of ZeroRedundancyOptimizer around torch.optim.AdamW."""
    for ours, theirs in spawn(_beside, 2):
        _close(ours, theirs)


def _muon_and_adamw(group: Any, ours: bool) -> dict[str, Tensor]:
    model = DistributedDataParallel(_model(), process_group=group)
    if ours:
        optimizer = _optimizer(model.module, group, grad_reduction="external", precision=distmuon.Precision())
        return _steps(model, optimizer, group, loss=_pulled)
    matrices = [param for param in model.parameters() if param.ndim > 1]
    vectors = [param for param in model.parameters() if param.ndim < 2]
    pair = [
        _zero(matrices, torch.optim.Muon, group, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        _zero(vectors, torch.optim.AdamW, group, **ADAMW),
    ]
    for step in range(STEPS):
        _pulled(model, _batch(step, dist.get_rank(group))).backward()
        for each in pair:
            each.step()
            each.zero_grad()
    return _weights(model)


@night
def test_muon_and_adamw_train_as_a_pair_of_zeros(spawn: Any) -> None:
    """Muon and AdamW together train as two ZeroRedundancyOptimizers do, up to the rounding of Muon's iteration."""
    start = _weights(_model())
    ours, theirs = spawn(_muon_and_adamw, 2, ours=True)[0], spawn(_muon_and_adamw, 2, ours=False)[0]
    for name, value in theirs.items():
        assert (ours[name] - value).norm() < 0.02 * (value - start[name]).norm(), name


def _in_groups(group: Any) -> dict[str, Tensor]:
    model = _model()
    routes = [
        distmuon.Route("0.*", "adamw", options={"lr": 0.1, "weight_decay": 0.0}),
        distmuon.Route("2.*", "muon", options={"lr": 0.0}),
        distmuon.Route("4.weight", "adamw", options={"betas": (0.5, 0.9)}),
        distmuon.Route("4.bias", "adamw"),
    ]
    return _steps(model, _optimizer(model, group, routes=routes), group)


def test_groups_of_their_own(spawn: Any) -> None:
    """Several groups with their own hyperparameters train as in one process."""

    def plain(model: nn.Sequential) -> torch.optim.Optimizer:
        given = [
            {"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.0},
            {"params": model[2].parameters(), "lr": 0.0},
            {"params": [model[4].weight], "betas": (0.5, 0.9)},
            {"params": [model[4].bias]},
        ]
        return torch.optim.AdamW(given, **ADAMW)

    _close(spawn(_in_groups, 2)[1], _weights(_alone(plain)[0]))


def _scheduled(group: Any) -> dict[str, Tensor]:
    model = _model()
    optimizer = _adamw(model, group)
    schedule = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for step in range(STEPS):
        _steps(model, optimizer, group, step, step + 1)
        schedule.step()
    return _weights(model)


def test_a_scheduler_reaches_every_shard(spawn: Any) -> None:
    """What a scheduler or a user writes into `param_groups` is what every rank's part of the step uses."""
    wanted = _weights(_alone(lambda m: torch.optim.AdamW(m.parameters(), **ADAMW), each_step=_halve)[0])
    for ours in spawn(_scheduled, 2):
        _close(ours, wanted)


def _halve(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


def _by_closure(group: Any) -> tuple[list[float], dict[str, Tensor]]:
    model = _model()
    optimizer = _adamw(model, group)
    losses = []
    for step in range(STEPS):
        batch = _batch(step, dist.get_rank(group))

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = _loss(model, batch)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure=closure).detach()))
    return losses, _weights(model)


def test_a_closure(spawn: Any) -> None:
    """`step(closure=...)` evaluates the model, steps on all ranks and returns this rank's loss."""
    wanted = _weights(_alone(lambda model: torch.optim.AdamW(model.parameters(), **ADAMW))[0])
    for rank, (losses, ours) in enumerate(spawn(_by_closure, 2)):
        assert losses[0] == pytest.approx(float(_loss(_model(), _batch(0, rank)).detach()))
        assert len(losses) == STEPS
        _close(ours, wanted)


def _cleared(group: Any) -> bool:
    model = _model()
    optimizer = _adamw(model, group)
    _loss(model, _batch(0, dist.get_rank(group))).backward()
    optimizer.zero_grad()
    cleared = all(param.grad is None for param in model.parameters())
    before = digest(_weights(model))
    optimizer.step()
    return cleared and digest(_weights(model)) == before


def test_zero_grad_clears_every_gradient(spawn: Any) -> None:
    """`zero_grad` drops the gradients of all parameters, not only of this rank's."""
    assert spawn(_cleared, 2) == [True, True]


def _on_a_subgroup(group: Any) -> dict[str, Tensor]:
    model = _model()
    return _steps(model, _adamw(model, group), group)


@night
def test_a_group_other_than_the_default(spawn: Any) -> None:
    """A process group that does not begin at global rank 0 trains alike."""
    ours = spawn(_on_a_subgroup, 2, first_rank=2)
    _close(ours[0], _weights(_alone(lambda model: torch.optim.AdamW(model.parameters(), **ADAMW))[0]))
    assert digest(ours[0]) == digest(ours[1])


def _some_without(group: Any) -> list[dict[str, Tensor]]:
    """A parameter that no rank uses, and one that rank 1 alone uses."""
    found = []
    for make in (_adamw, _plain_averaged):
        model = _model()
        model.register_module("unused", nn.Linear(3, 3))
        model.register_module("rare", nn.Linear(3, 3))
        optimizer = make(model, group)
        for step in range(3):
            hidden = model[4](model[3](model[2](model[1](model[0](_batch(step, dist.get_rank(group)))))))
            if dist.get_rank(group) == 1:
                hidden = model.rare(hidden)
            hidden.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(_weights(model))
    return found


def _plain_averaged(model: nn.Module, group: Any) -> torch.optim.Optimizer:
    """torch.optim.AdamW whose step first averages gradients; a rank without one counts as zero."""
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def average(*_: object) -> None:
        for param in model.parameters():
            has = torch.tensor(float(param.grad is not None))
            dist.all_reduce(has, group=group)
            if has > 0:
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
                dist.all_reduce(param.grad, group=group)
                param.grad.div_(2)

    optimizer.register_step_pre_hook(average)
    return optimizer


def test_parameters_without_gradients(spawn: Any) -> None:
    """A parameter without a gradient on any rank stays; one with a gradient on a single rank is stepped on all."""
    for ours, theirs in spawn(_some_without, 2):
        _close(ours, theirs)
        assert torch.equal(ours["unused.weight"], theirs["unused.weight"])


# ------------------------------------------------------------------------------------------- state


def _bytes(group: Any) -> tuple[int, int]:
    model = _model()
    optimizer = _optimizer(model, group)
    _steps(model, optimizer, group, 0, 1)
    states = optimizer.state_dict()["state"].values()
    whole = sum(value.nbytes for state in states for key, value in state.items() if key != "step")
    return optimizer.metrics()["state_bytes"], whole


def test_state_is_shared_out(spawn: Any) -> None:
    """Each rank keeps its part of the state: together one copy, alike but for the padding of shards."""
    of_ranks = spawn(_bytes, 2)
    shares, whole = [share for share, _ in of_ranks], of_ranks[0][1]
    assert whole <= sum(shares) <= whole + 2 * 1024
    assert max(shares) < 0.75 * whole


def _consolidated(group: Any, ours: bool) -> dict[str, Any]:
    model = DistributedDataParallel(_model(), process_group=group)
    if ours:
        optimizer: Any = _adamw(model, group, grad_reduction="external")
    else:
        optimizer = _zero(model.parameters(), torch.optim.AdamW, group, **ADAMW)
    _steps(model, optimizer, group)
    optimizer.consolidate_state_dict()
    state: dict[str, Any] = optimizer.state_dict() if dist.get_rank(group) == 0 else {}
    return state


@night
def test_the_whole_state_is_that_of_zero(spawn: Any) -> None:
    """The consolidated state is the plain optimizer's: the same numbers, keys, shapes and values."""
    ours, theirs = spawn(_consolidated, 2, ours=True)[0], spawn(_consolidated, 2, ours=False)[0]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, kept in theirs["state"].items():
        assert ours["state"][number].keys() == kept.keys()
        for key, value in kept.items():
            torch.testing.assert_close(ours["state"][number][key], value, rtol=1e-5, atol=1e-7)


def _one_asks(group: Any) -> dict[str, Any] | None:
    """After all have consolidated, rank 1 alone asks, in the middle of the next step's reduction."""
    model = _model()
    optimizer = _optimizer(model, group)
    _steps(model, optimizer, group)
    optimizer.consolidate_state_dict()
    state = optimizer.state_dict() if dist.get_rank(group) == 1 else None
    _steps(model, optimizer, group, STEPS, STEPS + 1)
    return state


def test_one_rank_may_ask_for_a_consolidated_state(spawn: Any) -> None:
    """Once all ranks have consolidated, one rank alone calls `state_dict`, and training goes on."""
    nothing, state = spawn(_one_asks, 2)
    assert nothing is None and all(state["state"].values())


def _consolidated_to(group: Any) -> str:
    model = _model()
    optimizer: Any = _optimizer(model, group)
    _steps(model, optimizer, group, 0, 1)
    optimizer.consolidate_state_dict(to=1)
    try:
        return "kept" if all(optimizer.state_dict()["state"].values()) else "empty"
    except ValueError as error:
        return str(error)


def test_consolidation_names_a_rank(spawn: Any) -> None:
    """`consolidate_state_dict(to=rank)` gathers the state on that rank; another one that asks is told at once."""
    elsewhere, kept = spawn(_consolidated_to, 2)
    assert kept == "kept" and "consolidated on rank 1 alone" in elsewhere


def _unconsolidated(group: Any) -> str:
    model = _model()
    optimizer: Any = _optimizer(model, group)
    _steps(model, optimizer, group, 0, 1)
    if dist.get_rank(group) == 1:
        return ""
    try:
        return str(optimizer.state_dict())
    except ValueError as error:
        return str(error)


@night
def test_one_rank_alone_is_told(spawn: Any) -> None:
    """A rank that asks for the state, though nothing was consolidated, gets an error that says what to call."""
    alone, _ = spawn(_unconsolidated, 2)
    assert "consolidate_state_dict() on all ranks" in alone


def _resumed(group: Any, state: dict[str, Any], weights: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model = _model()
    model.load_state_dict(weights)
    optimizer = _adamw(model, group)
    for each in optimizer.param_groups:
        each["lr"] = 77.0
    optimizer.load_state_dict(state)
    lr = optimizer.param_groups[0]["lr"]
    return lr, _steps(model, optimizer, group, STEPS, 2 * STEPS)


def test_a_plain_state_is_loaded_into_shards(spawn: Any) -> None:
    """A state saved by the plain optimizer in one process loads on all ranks, lr included, and training goes on."""
    model, optimizer = _alone(lambda model: torch.optim.AdamW(model.parameters(), **ADAMW))
    wanted = _weights(_alone(lambda model: torch.optim.AdamW(model.parameters(), **ADAMW), 2 * STEPS)[0])
    for lr, ours in spawn(_resumed, 2, state=optimizer.state_dict(), weights=_weights(model)):
        assert lr == ADAMW["lr"]
        _close(ours, wanted)


def _and_back(group: Any) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    model = _model()
    optimizer = _adamw(model, group)
    weights = _steps(model, optimizer, group)
    state = optimizer.state_dict()
    return state, weights, _steps(model, optimizer, group, STEPS, 2 * STEPS)


def test_the_state_loads_into_the_plain_optimizer(spawn: Any) -> None:
    """The whole state loads into the plain optimizer of one process, which trains on as the ranks would have."""
    state, weights, wanted = spawn(_and_back, 2)[0]
    model = _model()
    model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    optimizer.load_state_dict(state)
    for step in range(STEPS, 2 * STEPS):
        (sum(_loss(model, _batch(step, rank)) for rank in range(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    _close(_weights(model), wanted)


def _from_two(group: Any, state: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    model = _model()
    model.load_state_dict(weights)
    optimizer = _optimizer(model, group)
    optimizer.load_state_dict(state)
    return optimizer.state_dict(), _weights(model)


def _to_others(group: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = _model()
    optimizer = _optimizer(model, group)
    weights = _steps(model, optimizer, group)
    return optimizer.state_dict(), weights


@night
def test_a_state_loads_at_another_number_of_ranks(spawn: Any) -> None:
    """A state consolidated from two ranks loads on one and on three, bit for bit."""
    state, weights = spawn(_to_others, 2)[0]
    for dp_size in (1, 3):
        for loaded, after in spawn(_from_two, dp_size, state=state, weights=weights):
            assert_state_equal(loaded, state)
            assert digest(after) == digest(weights)


# ------------------------------------------------------------------------------------------- arguments


def _bad(group: Any, what: str) -> None:
    model = _model()
    given: dict[str, Any] = {
        "nothing": [],
        "None": None,
        "a tensor": torch.zeros(3, requires_grad=True),
        "no tensors": [1, 2],
        "integers": [("a", nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False))],
        "a name twice": [*model.named_parameters(), *model.named_parameters()],
    }
    distmuon.DistMuon(given[what], process_group=group, routes=[])


@pytest.mark.parametrize("what", ["nothing", "None", "a tensor", "no tensors", "integers", "a name twice"])
def test_what_is_no_parameter_is_refused(spawn_raises: Any, what: str) -> None:
    """Nothing, None, a single tensor, no tensors and what cannot be trained are refused, on all ranks."""
    spawn_raises(_bad, 2, match=r"^ValueError: .*; .*; ", what=what)


def _made_of(group: Any, what: str) -> None:
    model = _model()
    given: dict[str, Any] = {
        "a generator": model.parameters(),
        "a list": list(model.parameters()),
        "groups": [{"params": [param]} for param in model.parameters()],
    }
    _steps(model, distmuon.DistMuon(given[what], process_group=group), group, 0, 1)


@pytest.mark.parametrize("what", ["a generator", "a list", "groups"])
@differs(
    instead="refused, and the message says what to pass",
    reason="routing, checkpoints and errors go by name",
    match=r"params: parameters without names",
    raises=WorkerError,
)
def test_parameters_need_no_names(spawn: Any, what: str) -> None:
    """A generator or a list of parameters, or dicts of them, are enough."""
    spawn(_made_of, 2, what=what)


def _added(group: Any) -> None:
    model = _model()
    optimizer = _optimizer(model, group)
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.zeros(2, 2)))], "rule": "muon"})


@differs(
    instead="refused: make a new optimizer",
    reason="where every element lies is planned once, for all parameters together",
    match="add_param_group: called after construction",
    raises=WorkerError,
)
def test_a_group_may_be_added(spawn: Any) -> None:
    """`add_param_group` shares the new parameters out over the ranks."""
    spawn(_added, 2)


def _unfrozen(group: Any) -> None:
    model = _model()
    model[0].weight.requires_grad_(False)
    optimizer = _adamw(model, group)
    _steps(model, optimizer, group, 0, 1)
    model[0].weight.requires_grad_(True)
    before = model[0].weight.detach().clone()
    _steps(model, optimizer, group, 1, 2)
    assert not torch.equal(model[0].weight.detach(), before)


@differs(
    instead="refused before anything is written: make a new optimizer when parameters are unfrozen",
    reason="the layout holds no state for it",
    match=r"0\.weight: (requires_grad was switched on after|it is trainable now)",
    raises=WorkerError,
)
def test_what_is_trainable_may_change(spawn: Any) -> None:
    """A parameter that is unfrozen during training is trained from then on."""
    spawn(_unfrozen, 2)


def _frozen_later(group: Any) -> bool:
    model = _model()
    optimizer = _adamw(model, group)
    _steps(model, optimizer, group, 0, 2)
    model[2].weight.requires_grad_(False)
    before = model[2].weight.detach().clone()
    _steps(model, optimizer, group, 2, 4)
    return torch.equal(model[2].weight.detach(), before)


def test_a_parameter_may_be_frozen_later(spawn: Any) -> None:
    """A parameter that is frozen during training keeps its value from then on."""
    assert spawn(_frozen_later, 2) == [True, True]


def _uneven(group: Any) -> None:
    model = DistributedDataParallel(_model(), process_group=group)
    optimizer: Any = _optimizer(model.module, group, grad_reduction="external")
    with Join([model, optimizer]):
        _steps(model, optimizer, group, 0, 2 + dist.get_rank(group))


@differs(
    instead="not offered: give all ranks as many batches (`drop_last`, or a batch of weight 0)",
    reason="every step has a verdict of all ranks; a rank without data would have to shadow each collective of a step",
    match=r"join_hook",
    raises=WorkerError,
)
def test_ranks_may_run_out_of_data_at_different_times(spawn: Any) -> None:
    """`Join([ddp, optimizer])` lets ranks with more batches than others finish them."""
    spawn(_uneven, 2)


def _on_two_devices(group: Any) -> None:
    model = _model()
    model[2] = nn.Linear(16, 8, bias=False, device="meta")
    _optimizer(model, group)


@differs(
    instead="refused by name",
    reason="one flat buffer a bucket, on one device",
    match=r"2\.weight: the parameter is on (the meta device|meta)",
    raises=WorkerError,
)
def test_parameters_may_lie_on_several_devices(spawn: Any) -> None:
    """A model whose layers lie on different devices is accepted."""
    spawn(_on_two_devices, 2)
