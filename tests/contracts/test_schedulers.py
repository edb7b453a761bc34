"""Every scheduler of torch.optim.lr_scheduler, and swa_utils.SWALR, leads DistMuon as it leads torch.optim's own.

Values are compared with the same scheduler on torch.optim.SGD or AdamW with the same groups, so a scheduler's
arithmetic is torch's business. Ours is what it finds and writes in the groups, the order of calls, and the steps.
"""

from __future__ import annotations

import gc
import inspect
import io
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, swa_utils
from torch.optim import lr_scheduler as lrs
from torch.optim.lr_scheduler import LRScheduler

import distmuon
from tests.contracts.differences import differs
from tests.contracts.inputs import Given, assert_equal, copies, groups, make, named, train

LRS = (0.5, 0.03125)
EPOCHS = 24
SHAPES = ((3, 2), (3,))
NOT_COMPARED = {"params", "param_names", "weight_decay", "dampening", "nesterov", "maximize", "foreach", "fused"}
NOT_COMPARED |= {"differentiable", "capturable", "amsgrad", "decoupled_weight_decay", "eps"}


def _none(epoch: int) -> tuple[Any, ...]:
    return ()


def _metric(epoch: int) -> tuple[float]:
    """Better for a while, then a plateau, a relapse and a second plateau."""
    return (max(3.0 - epoch, 0.5) if epoch < 14 else 2.5 + 0.001 * (epoch % 2),)


def _fraction(epoch: int) -> tuple[float]:
    return (epoch * 0.7,)


@dataclass(frozen=True)
class Case:
    """`build(optimizer)` -> schedulers that step one after another each epoch, the first with `fed(epoch)`."""

    build: Callable[[Any], Sequence[LRScheduler]]
    fed: Callable[[int], tuple[Any, ...]] = _none
    cycles_momentum: bool = False
    by_night: bool = False


def _each(optimizer: Optimizer, factor: float) -> list[float]:
    return [float(group["lr"]) * factor for group in optimizer.param_groups]


def _half(epoch: int) -> float:
    return 0.5 ** (epoch // 3)


def _nine_tenths(epoch: int) -> float:
    return 0.9


class Decay:
    """A schedule that is an object with a state, as users write them."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, epoch: int) -> float:
        return float(self.rate**epoch)


def _warm_then_cosine(o: Optimizer) -> LRScheduler:
    return lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.CosineAnnealingLR(o, 20)], [4])


def _three_in_turn(o: Optimizer) -> LRScheduler:
    parts = [lrs.ConstantLR(o, 0.1, 3), lrs.CosineAnnealingWarmRestarts(o, 4), lrs.ExponentialLR(o, 0.8)]
    return lrs.SequentialLR(o, parts, [3, 11])


def _in_turn_within(o: Optimizer) -> LRScheduler:
    inner = lrs.SequentialLR(o, [lrs.StepLR(o, 2, 0.5), lrs.MultiStepLR(o, [1, 3], 0.5)], [5])
    return lrs.ChainedScheduler([inner, lrs.ExponentialLR(o, 0.97)], optimizer=o)


def _chained(o: Optimizer) -> LRScheduler:
    return lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)], optimizer=o)


def _four_chained(o: Optimizer) -> LRScheduler:
    parts = [
        lrs.CosineAnnealingLR(o, 15),
        lrs.MultiStepLR(o, [4, 8], 0.5),
        lrs.StepLR(o, 3, 0.9),
        lrs.MultiplicativeLR(o, _nine_tenths),
    ]
    return lrs.ChainedScheduler(parts)


CASES: dict[str, Case] = {
    "LambdaLR": Case(lambda o: [lrs.LambdaLR(o, _half)]),
    "LambdaLR, one each": Case(lambda o: [lrs.LambdaLR(o, [_half, Decay(0.8)])]),
    "MultiplicativeLR": Case(lambda o: [lrs.MultiplicativeLR(o, _nine_tenths)]),
    "MultiplicativeLR, one each": Case(lambda o: [lrs.MultiplicativeLR(o, [_nine_tenths, Decay(0.99)])], by_night=True),
    "StepLR": Case(lambda o: [lrs.StepLR(o, 3)]),
    "StepLR, every step": Case(lambda o: [lrs.StepLR(o, 1, gamma=0.9)], by_night=True),
    "MultiStepLR": Case(lambda o: [lrs.MultiStepLR(o, [2, 5, 9])]),
    "MultiStepLR, twice": Case(lambda o: [lrs.MultiStepLR(o, [9, 2, 2, 5], gamma=0.3)], by_night=True),
    "ConstantLR": Case(lambda o: [lrs.ConstantLR(o)]),
    "ConstantLR, longer": Case(lambda o: [lrs.ConstantLR(o, factor=0.2, total_iters=7)], by_night=True),
    "LinearLR": Case(lambda o: [lrs.LinearLR(o)]),
    "LinearLR, down": Case(lambda o: [lrs.LinearLR(o, 1.0, 0.0, total_iters=9)], by_night=True),
    "ExponentialLR": Case(lambda o: [lrs.ExponentialLR(o, 0.9)]),
    "CosineAnnealingLR": Case(lambda o: [lrs.CosineAnnealingLR(o, EPOCHS)]),
    "CosineAnnealingLR, and up again": Case(lambda o: [lrs.CosineAnnealingLR(o, 5, eta_min=1e-3)], by_night=True),
    "PolynomialLR": Case(lambda o: [lrs.PolynomialLR(o, 10)]),
    "PolynomialLR, squared": Case(lambda o: [lrs.PolynomialLR(o, EPOCHS, power=2.0)], by_night=True),
    "CosineAnnealingWarmRestarts": Case(lambda o: [lrs.CosineAnnealingWarmRestarts(o, 3)]),
    "CosineAnnealingWarmRestarts, longer": Case(
        lambda o: [lrs.CosineAnnealingWarmRestarts(o, 2, T_mult=2, eta_min=1e-3)], by_night=True
    ),
    "CosineAnnealingWarmRestarts, by fractions": Case(
        lambda o: [lrs.CosineAnnealingWarmRestarts(o, 3, T_mult=2)], _fraction
    ),
    "ReduceLROnPlateau": Case(lambda o: [lrs.ReduceLROnPlateau(o, patience=1)], _metric),
    "ReduceLROnPlateau, max": Case(
        lambda o: [lrs.ReduceLROnPlateau(o, "max", 0.5, patience=2, threshold_mode="abs", threshold=0.1)],
        _metric,
        by_night=True,
    ),
    "ReduceLROnPlateau, cooldown": Case(
        lambda o: [lrs.ReduceLROnPlateau(o, factor=0.5, patience=0, cooldown=3, min_lr=[0.1, 0.01])],
        _metric,
    ),
    "CyclicLR": Case(lambda o: [lrs.CyclicLR(o, _each(o, 0.1), _each(o, 1.0), 4, cycle_momentum=False)]),
    "CyclicLR, one bound for all": Case(
        lambda o: [lrs.CyclicLR(o, 0.01, 0.1, 3, 5, mode="triangular2", cycle_momentum=False)], by_night=True
    ),
    "CyclicLR, exp_range": Case(
        lambda o: [lrs.CyclicLR(o, _each(o, 0.1), _each(o, 1.0), 4, 2, "exp_range", 0.97, cycle_momentum=False)],
        by_night=True,
    ),
    "CyclicLR, own scale": Case(
        lambda o: [
            lrs.CyclicLR(o, 0.01, 0.1, 3, scale_fn=Decay(0.7), scale_mode="iterations", cycle_momentum=False),
        ],
        by_night=True,
    ),
    "CyclicLR, momentum": Case(
        lambda o: [lrs.CyclicLR(o, _each(o, 0.1), _each(o, 1.0), 4, base_momentum=0.7, max_momentum=0.95)],
        cycles_momentum=True,
    ),
    "CyclicLR, momentum of each": Case(
        lambda o: [lrs.CyclicLR(o, 0.01, 0.1, 3, base_momentum=[0.7, 0.8], max_momentum=[0.9, 0.95])],
        cycles_momentum=True,
        by_night=True,
    ),
    "OneCycleLR": Case(lambda o: [lrs.OneCycleLR(o, _each(o, 2.0), EPOCHS + 1)], cycles_momentum=True),
    "OneCycleLR, linear": Case(
        lambda o: [lrs.OneCycleLR(o, 0.3, epochs=5, steps_per_epoch=6, anneal_strategy="linear", cycle_momentum=False)]
    ),
    "OneCycleLR, three phases": Case(
        lambda o: [lrs.OneCycleLR(o, _each(o, 2.0), EPOCHS + 1, three_phase=True, base_momentum=[0.8, 0.7])],
        cycles_momentum=True,
        by_night=True,
    ),
    "SequentialLR": Case(lambda o: [_warm_then_cosine(o)]),
    "SequentialLR of three": Case(lambda o: [_three_in_turn(o)], by_night=True),
    "ChainedScheduler": Case(lambda o: [_chained(o)]),
    "ChainedScheduler over SequentialLR": Case(lambda o: [_in_turn_within(o)], by_night=True),
    "ChainedScheduler of four": Case(lambda o: [_four_chained(o)], by_night=True),
    "SWALR": Case(lambda o: [swa_utils.SWALR(o, 0.01, anneal_epochs=6)]),
    "SWALR, linear, of each": Case(
        lambda o: [swa_utils.SWALR(o, [0.2, 0.01], anneal_epochs=9, anneal_strategy="linear")], by_night=True
    ),
    "SWALR, at once": Case(lambda o: [swa_utils.SWALR(o, 0.01, anneal_epochs=0)], by_night=True),
    "two side by side": Case(lambda o: [lrs.StepLR(o, 5, 0.5), lrs.ExponentialLR(o, 0.95)]),
    "a plateau beside another": Case(
        lambda o: [lrs.ReduceLROnPlateau(o, patience=1), lrs.CosineAnnealingLR(o, 12)], _metric, by_night=True
    ),
    "three side by side": Case(
        lambda o: [lrs.LinearLR(o), lrs.MultiStepLR(o, [3, 6], 0.5), swa_utils.SWALR(o, 0.01, anneal_epochs=8)],
        by_night=True,
    ),
}
BY_DAY = ("LambdaLR, one each", "StepLR", "ReduceLROnPlateau, cooldown", "CyclicLR, momentum", "OneCycleLR", "SWALR")
night = pytest.mark.slow
every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=night if case.by_night else ()) for name, case in CASES.items()]
)
some_by_day = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=() if name in BY_DAY else night) for name, case in CASES.items()]
)


EXACT = distmuon.Precision(newton_schulz=torch.float32)


def _ours(lr_in_tensor: bool = False, **kwargs: Any) -> tuple[list[nn.Parameter], distmuon.DistMuon]:
    """A Muon group with the first lr and an AdamW group with the second."""
    params = Given(SHAPES).params()
    given = [
        {**group, "lr": torch.tensor(lr) if lr_in_tensor else lr} for group, lr in zip(groups(params), LRS, strict=True)
    ]
    return params, distmuon.DistMuon(given, momentum=0.9, precision=EXACT, **kwargs)


def _torchs(kind: type[Optimizer], lr_in_tensor: bool = False, **kwargs: Any) -> tuple[list[nn.Parameter], Optimizer]:
    params = Given(SHAPES).params()
    given = [
        {"params": [param], "lr": torch.tensor(lr) if lr_in_tensor else lr}
        for param, lr in zip(params, LRS, strict=True)
    ]
    return params, kind(given, **kwargs)


def _values(optimizer: Optimizer, schedulers: Sequence[LRScheduler], keys: Sequence[set[str]]) -> list[Any]:
    """What the schedulers have put into each group, and what they say themselves."""
    of_groups = [{key: _number(group[key]) for key in sorted(own)} for group, own in zip(optimizer.param_groups, keys)]
    said = [[_number(lr) for lr in scheduler.get_last_lr()] for scheduler in schedulers]
    return [of_groups, said, [getattr(scheduler, "last_epoch", None) for scheduler in schedulers]]


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _epoch(
    case: Case, params: Sequence[Tensor], optimizer: Optimizer, schedulers: Sequence[LRScheduler], epoch: int
) -> None:
    train(optimizer, params, epoch, epoch + 1)
    for number, scheduler in enumerate(schedulers):
        scheduler.step(*(case.fed(epoch) if number == 0 else ()))


def _compare(case: Case, ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    ours_led, theirs_led = case.build(ours[1]), case.build(theirs[1])
    for epoch in range(EPOCHS):
        keys = [group.keys() - NOT_COMPARED for group in theirs[1].param_groups]
        assert _values(ours[1], ours_led, keys) == _values(theirs[1], theirs_led, keys), f"before epoch {epoch}"
        _epoch(case, *ours, ours_led, epoch)
        _epoch(case, *theirs, theirs_led, epoch)
    assert _values(ours[1], ours_led, keys) == _values(theirs[1], theirs_led, keys)


@every_case
def test_values_are_those_on_sgd(case: Case) -> None:
    """lr, momentum and a scheduler's own entries are those that it gives torch.optim.SGD, in every epoch."""
    _compare(case, _ours(), _torchs(torch.optim.SGD, momentum=0.9))


@some_by_day
def test_an_lr_in_a_tensor_is_led_alike(case: Case) -> None:
    """With an lr in a tensor the values are SGD's, too, and it stays the same tensor."""
    ours = _ours(lr_in_tensor=True)
    held = [group["lr"] for group in ours[1].param_groups]
    _compare(case, ours, _torchs(torch.optim.SGD, lr_in_tensor=True, momentum=0.9))
    assert all(group["lr"] is tensor for group, tensor in zip(ours[1].param_groups, held))
    assert held[0] is not held[1]


@some_by_day
def test_weights_follow_as_under_adamw(case: Case) -> None:
    """Values and weights of an AdamW optimizer are torch.optim.AdamW's, also where momentum is cycled in beta1."""
    params, twins = Given(SHAPES).params(), Given(SHAPES).params()
    ours = distmuon.DistMuon(
        [{"params": [pair], "rule": "adamw", "lr": lr} for pair, lr in zip(named(params), LRS, strict=True)]
    )
    given = [{"params": [twin], "lr": lr} for twin, lr in zip(twins, LRS, strict=True)]
    theirs = torch.optim.AdamW(given, betas=(0.9, 0.95), weight_decay=0.1)
    _compare(case, (params, ours), (twins, theirs))
    for one, other in zip(copies(params), copies(twins)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@some_by_day
def test_a_run_goes_on_from_saved_states(case: Case) -> None:
    """With the saved states of optimizer and scheduler a new pair goes on as the first does, bit for bit."""
    params, optimizer = _ours()
    led = case.build(optimizer)
    for epoch in range(7):
        _epoch(case, params, optimizer, led, epoch)
    torch.save([optimizer.state_dict(), *(scheduler.state_dict() for scheduler in led)], file := io.BytesIO())
    weights_only = not any(isinstance(each, Decay) for each in _held(led))
    states = torch.load(io.BytesIO(file.getvalue()), weights_only=weights_only)
    twins, other = _ours()
    with torch.no_grad():
        for twin, param in zip(twins, params):
            twin.copy_(param)
    again = case.build(other)
    other.load_state_dict(states[0])
    for scheduler, state in zip(again, states[1:], strict=True):
        scheduler.load_state_dict(state)
    for epoch in range(7, 14):
        _epoch(case, params, optimizer, led, epoch)
        _epoch(case, twins, other, again, epoch)
        keys = [group.keys() - {"params"} for group in optimizer.param_groups]
        assert _values(optimizer, led, keys) == _values(other, again, keys)
    assert_equal(copies(twins), copies(params))


def _held(schedulers: Sequence[LRScheduler]) -> list[Any]:
    """The callables that stand in the states of `schedulers`."""
    states = [scheduler.state_dict() for scheduler in schedulers]
    return [value for state in states for value in [*state.get("lr_lambdas", ()), state.get("_scale_fn_custom")]]


RESUMED: dict[str, Callable[[Any, int], LRScheduler]] = {
    "StepLR": lambda o, last: lrs.StepLR(o, 3, last_epoch=last),
    "MultiStepLR": lambda o, last: lrs.MultiStepLR(o, [2, 9], last_epoch=last),
    "LambdaLR": lambda o, last: lrs.LambdaLR(o, _half, last_epoch=last),
    "MultiplicativeLR": lambda o, last: lrs.MultiplicativeLR(o, _nine_tenths, last_epoch=last),
    "ConstantLR": lambda o, last: lrs.ConstantLR(o, last_epoch=last),
    "LinearLR": lambda o, last: lrs.LinearLR(o, total_iters=9, last_epoch=last),
    "ExponentialLR": lambda o, last: lrs.ExponentialLR(o, 0.9, last_epoch=last),
    "CosineAnnealingLR": lambda o, last: lrs.CosineAnnealingLR(o, 12, last_epoch=last),
    "PolynomialLR": lambda o, last: lrs.PolynomialLR(o, 12, last_epoch=last),
    "CosineAnnealingWarmRestarts": lambda o, last: lrs.CosineAnnealingWarmRestarts(o, 4, last_epoch=last),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_scheduler_starts_at_last_epoch(name: str) -> None:
    """A scheduler made with `last_epoch` goes on from the groups' "initial_lr", and raises KeyError without it."""
    pairs = [_ours()[1], _torchs(torch.optim.SGD, momentum=0.9)[1]]
    values = []
    for optimizer in pairs:
        with pytest.raises(KeyError, match="initial_lr"):
            RESUMED[name](optimizer, 5)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        scheduler = RESUMED[name](optimizer, 5)
        found = []
        for _ in range(4):
            optimizer.step()
            scheduler.step()
            found.append([group["lr"] for group in optimizer.param_groups])
        values.append(found)
    assert values[0] == values[1]


@some_by_day
def test_a_second_scheduler_starts_from_the_first_lr(case: Case) -> None:
    """A scheduler puts "initial_lr" into the groups once: one made later starts from the same."""
    found = []
    for params, optimizer in (_ours(), _torchs(torch.optim.SGD, momentum=0.9)):
        led = case.build(optimizer)
        for epoch in range(3):
            _epoch(case, params, optimizer, led, epoch)
        later = lrs.LinearLR(optimizer, 0.5)
        found.append([later.base_lrs, [[group["lr"], group["initial_lr"]] for group in optimizer.param_groups]])
    assert found[0] == found[1]


def test_the_order_of_calls_is_watched() -> None:
    """A scheduler that steps before its optimizer warns; in the right order, and after a load, nothing does."""
    _, optimizer = _ours()
    scheduler = lrs.StepLR(optimizer, 3)
    with pytest.warns(UserWarning, match=r"before `optimizer\.step\(\)`"):
        scheduler.step()
    params, optimizer = _ours()
    scheduler = lrs.StepLR(optimizer, 3)
    train(optimizer, params, 0, 1)
    scheduler.step()
    other = _ours()[1]
    again = lrs.StepLR(other, 3)
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(scheduler.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.step()
        again.step()


def test_a_step_that_is_exchanged_is_noticed() -> None:
    """An `optimizer.step` that is replaced after the scheduler was made warns; one replaced before does not."""
    _, optimizer = _ours()
    scheduler = lrs.StepLR(optimizer, 3)
    own = distmuon.DistMuon.step
    optimizer.step = lambda *args: own(optimizer, *args)  # type: ignore[method-assign]
    optimizer.step()
    with pytest.warns(UserWarning, match=r"`optimizer\.step\(\)` has been overridden"):
        scheduler.step()


def test_steps_are_hooked_and_profiled_under_a_scheduler() -> None:
    """Step hooks and a closure's loss come through the step that a scheduler has wrapped, once each."""
    params, optimizer = _ours()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    schedulers = [lrs.StepLR(optimizer, 3), lrs.ExponentialLR(optimizer, 0.9)]
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(optimizer, params, 0, 1)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert seen == ["pre", "post"] * 2 and optimizer.metrics()["steps"] == 2
    for scheduler in schedulers:
        scheduler.step()


@some_by_day
def test_nothing_is_kept_alive(case: Case) -> None:
    """Dropped schedulers are freed at once, without the garbage collector, and leave the optimizer usable."""
    params, optimizer = _ours()
    led: Any = case.build(optimizer)
    _epoch(case, params, optimizer, led, 0)
    watched = [weakref.ref(scheduler) for scheduler in led]
    gc.disable()
    try:
        del led
        assert all(scheduler() is None for scheduler in watched)
    finally:
        gc.enable()
    train(optimizer, params, 1, 2)


def test_no_scheduler_of_torch_is_left_out() -> None:
    """Every class of schedulers that torch exports is among the cases."""
    kinds = {name for name in lrs.__all__ if inspect.isclass(getattr(lrs, name))} - {"LRScheduler"}
    assert kinds | {"SWALR"} == {name.split(",")[0].split(" ")[0] for name in CASES if name[0].isupper()}


def test_lists_are_as_long_as_the_groups() -> None:
    """A list with one value too few for the groups raises ValueError when the scheduler is made."""
    _, optimizer = _ours()
    for build in (
        lambda: lrs.LambdaLR(optimizer, [_half]),
        lambda: lrs.MultiplicativeLR(optimizer, [_half]),
        lambda: lrs.ReduceLROnPlateau(optimizer, min_lr=[0.1]),
        lambda: lrs.CyclicLR(optimizer, [0.1], 0.2),
        lambda: lrs.OneCycleLR(optimizer, [0.1], 9),
        lambda: swa_utils.SWALR(optimizer, [0.1]),
    ):
        with pytest.raises(ValueError, match=r"same length|xpected 2"):
            build()


@pytest.mark.parametrize("kind", [lrs.SequentialLR, lrs.ChainedScheduler])
def test_schedulers_of_two_optimizers_do_not_mix(kind: Any) -> None:
    """Schedulers of different optimizers, or a plateau among them, are refused by what combines schedulers."""
    first, second = _ours()[1], _ours()[1]
    milestones = ([2],) if kind is lrs.SequentialLR else ()

    def combine(schedulers: list[Any]) -> Any:
        return kind(first, schedulers, *milestones) if milestones else kind(schedulers, first)

    with pytest.raises(ValueError, match="same optimizer"):
        combine([lrs.StepLR(first, 3), lrs.StepLR(second, 3)])
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        combine([lrs.StepLR(first, 3), lrs.ReduceLROnPlateau(first)])


def test_a_swa_run() -> None:
    """The documented loop of stochastic weight averaging: a schedule, then SWALR and an AveragedModel."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = distmuon.DistMuon(model, lr=0.1, routes=[distmuon.Route("*.weight", "muon")])
    averaged, schedule = swa_utils.AveragedModel(model), lrs.CosineAnnealingLR(optimizer, 10)
    swa = swa_utils.SWALR(optimizer, 0.05, anneal_epochs=3)
    batch, seen = torch.randn(16, 4), []
    for epoch in range(9):
        (model(batch) - 1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if epoch > 4:
            averaged.update_parameters(model)
            seen.append(copies(list(model.parameters())))
            swa.step()
        else:
            schedule.step()
    for param, values in zip(averaged.parameters(), zip(*seen)):
        torch.testing.assert_close(param.detach(), torch.stack(values).mean(0), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- otherwise


@pytest.mark.parametrize("kind", ["CyclicLR", "OneCycleLR"])
@differs(
    instead="refused at the next step",
    reason="a moving average with such a factor grows without bound",
    match=r"momentum: found \d+\.\d+; a number in \[0, 1",
)
def test_momentum_may_be_any_number(kind: str) -> None:
    """A cycle may lead momentum beyond 1."""
    params, optimizer = _ours()
    if kind == "CyclicLR":
        scheduler: Any = lrs.CyclicLR(optimizer, 0.1, 0.5, 4, base_momentum=1.5, max_momentum=5.0)
    else:
        scheduler = lrs.OneCycleLR(optimizer, 0.5, 9, base_momentum=2.0, max_momentum=22.0)
    for epoch in range(3):
        train(optimizer, params, epoch, epoch + 1)
        scheduler.step()


@pytest.mark.parametrize("kind", ["CyclicLR", "OneCycleLR"])
@differs(
    instead='without Muon as in torch; beside Muon the cycle leads "momentum", which AdamW does not use',
    reason="torch's schedulers choose between momentum and beta1 for all groups at once",
    match=r"beta1 stays",
    raises=AssertionError,
)
def test_beta1_of_adamw_is_cycled(kind: str) -> None:
    """A cycle leads beta1 of AdamW's groups."""
    params, optimizer = _ours()
    (adamw,) = (group for group in optimizer.param_groups if group["rule"] == "adamw")
    if kind == "CyclicLR":
        scheduler: Any = lrs.CyclicLR(optimizer, 0.1, 0.5, 4)
    else:
        scheduler = lrs.OneCycleLR(optimizer, 0.5, 9)
    seen = set()
    for epoch in range(4):
        train(optimizer, params, epoch, epoch + 1)
        scheduler.step()
        seen.add(adamw["betas"])
    assert len(seen) > 1, "beta1 stays"


@differs(
    instead="refused: make a new optimizer",
    reason="where every element lies is planned once, for all parameters together",
    match="add_param_group: called after construction",
)
def test_a_group_may_be_added_under_a_scheduler() -> None:
    """ReduceLROnPlateau goes on when a group is added."""
    _, optimizer = _ours()
    scheduler = lrs.ReduceLROnPlateau(optimizer)
    optimizer.add_param_group({"params": [("p9", nn.Parameter(torch.zeros(2, 2)))], "rule": "muon"})
    scheduler.step(1.0)


@differs(
    instead="refused: its state is a dict; save that",
    reason="the optimizer in it manages a model's parameters, with hooks that a copy would not have",
    match=r"DistMuon: copied or pickled as an object \(or with a scheduler that holds it\)",
)
def test_a_scheduler_can_be_pickled() -> None:
    """A scheduler can be saved as an object, with the optimizer in it."""
    _, optimizer = _ours()
    torch.save(lrs.ExponentialLR(optimizer, 0.9), io.BytesIO())


def test_a_schedule_drives_both_rules() -> None:
    """At an lr of 0 nothing moves, under either rule."""
    params = Given(SHAPES).params()
    optimizer = make(params)
    scheduler = lrs.LambdaLR(optimizer, lambda epoch: float(epoch < 2))
    for epoch in range(4):
        before = copies(params)
        _epoch(Case(lambda o: []), params, optimizer, [scheduler], epoch)
        moved = [not torch.equal(now, then) for now, then in zip(copies(params), before)]
        assert moved == [epoch < 2] * 2
