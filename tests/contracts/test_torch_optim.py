"""What torch.optim promises of every optimizer, tried on DistMuon in one process.

The demands are those of torch.optim.Optimizer's documentation and of what torch tests of each of its own optimizers on
a CPU, without foreach, fused, capturable, differentiable, complex and sparse, which DistMuon does not offer. The words
and the code are our own. Each test's docstring says what is demanded; see differences.py for `differs`.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import distmuon
from tests.contracts.differences import differs
from tests.contracts.inputs import (
    ANY,
    EXACT_LR,
    MATRICES,
    MIXED,
    Given,
    assert_equal,
    assert_state_equal,
    copies,
    every_input,
    every_rule,
    gradients,
    groups,
    make,
    named,
    train,
)

BOTH = Given(MIXED)
night = pytest.mark.slow


# ------------------------------------------------------------------------------------------- a step


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": _transposed,
}
WITH: dict[str, Callable[[torch.optim.Optimizer], list[Any]]] = {
    "no scheduler": lambda o: [],
    "StepLR": lambda o: [lr_scheduler.StepLR(o, 5, gamma=0.9)],
    "ExponentialLR and plateau": lambda o: [lr_scheduler.ExponentialLR(o, 0.99), lr_scheduler.ReduceLROnPlateau(o)],
    "LinearLR and warm restarts": lambda o: [
        lr_scheduler.LinearLR(o, 0.4, total_iters=4),
        lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    ],
}


@every_input
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("scheduled", ["no scheduler", *(pytest.param(name, marks=night) for name in [*WITH][1:])])
def test_training_descends(given: Given, memory: str, scheduled: str) -> None:
    """Steps lower the loss, whatever the memory format of parameters, with schedulers and without."""
    params = [nn.Parameter(MEMORY[memory](param.detach())) for param in given.params()]
    assert memory == "contiguous" or not all(param.is_contiguous() for param in params)
    optimizer = given.make(params)
    schedulers = WITH[scheduled](optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([(param - 2.0).square().mean() for param in params]).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step(*([loss.detach()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert closure().item() < first


@differs(
    instead="refused, and the message says what to put there",
    reason="a parameter's values are one run of a flat buffer",
    match=r"p0: the parameter of shape \(10, 5\) has strides \(10, 2\)",
)
def test_parameters_may_have_gaps() -> None:
    """A parameter may be a slice of a larger tensor, with gaps between its elements."""
    params = [nn.Parameter(torch.stack([param.detach()] * 2, dim=-1)[..., 0]) for param in BOTH.params()]
    train(BOTH.make(params), params, 0, 1)


@pytest.mark.parametrize("kwargs", [{}, {"weight_decay": 0.3}, {"adamw_betas": (0.8, 0.99)}, {"adamw_eps": 1e-4}])
def test_adamw_is_torchs(kwargs: dict[str, Any]) -> None:
    """AdamW's weights are those of torch.optim.AdamW."""
    ours, theirs = (Given(ANY).params() for _ in range(2))
    betas, eps = kwargs.get("adamw_betas", (0.9, 0.95)), kwargs.get("adamw_eps", 1e-8)
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=betas, eps=eps, weight_decay=kwargs.get("weight_decay", 0.1))
    train(make(ours, only_adamw=True, lr=0.01, **kwargs), ours, 0, 20)
    train(reference, theirs, 0, 20)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"weight_decay": 0.3}, {"momentum": 0.8}, {"nesterov": False}, {"ns_steps": 6}])
def test_muon_is_torchs(kwargs: dict[str, Any]) -> None:
    """Muon's weights are those of torch.optim.Muon, up to what its bfloat16 iteration rounds."""
    ours, theirs = (Given(MATRICES).params() for _ in range(2))
    start = copies(ours)
    options = {"lr": 0.01, "weight_decay": 0.1, **kwargs}
    reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    train(make(ours, **options), ours, 0, 20)
    train(reference, theirs, 0, 20)
    for begun, one, other in zip(start, copies(ours), copies(theirs)):
        assert (one - other).norm() < 0.02 * (other - begun).norm()


@every_input
def test_a_step_without_gradients_changes_nothing(given: Given) -> None:
    """Where no parameter has a gradient, a step changes neither weights nor state."""
    params = given.params()
    optimizer, start = given.make(params), copies(params)
    optimizer.step()
    assert_equal(copies(params), start)
    train(optimizer, params, 0, 2)
    trained, state = copies(params), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert_equal(copies(params), trained)
    assert_state_equal(optimizer.state_dict(), state)


@every_input
def test_zero_gradients_only_decay(given: Given) -> None:
    """Gradients of zero move nothing but by weight decay."""
    params = given.params()
    optimizer, wanted = given.make(params), copies(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        for group in optimizer.param_groups:
            for param in group["params"]:
                index = next(i for i, other in enumerate(params) if other is param)
                wanted[index].mul_(1.0 - float(group["lr"]) * group["weight_decay"])
    for param, value in zip(params, wanted):
        torch.testing.assert_close(param.detach(), value, rtol=1e-6, atol=0.0)


@every_rule
def test_a_parameter_without_a_gradient_is_left_alone(given: Given) -> None:
    """A parameter whose gradient is None keeps its value and state while others step, and goes on later."""
    params, twins = given.params(), given.params()
    optimizer, reference = given.make(params), given.make(twins)
    train(optimizer, params, 0, 2)
    train(reference, twins, 0, 2)
    before = copies(params)
    for step in (2, 3):
        gradients(params, step)
        params[0].grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(copies(params[:1]), before[:1])
    assert not any(torch.equal(now, then) for now, then in zip(copies(params)[1:], before[1:]))
    for which, stepped in ((params, optimizer), (twins, reference)):
        gradients(which, 4)
        stepped.step()
    assert_equal(copies(params[:1]), copies(twins[:1]))


@every_input
def test_gradients_are_read_and_not_written(given: Given) -> None:
    """After a step `param.grad` is the same tensor with the same elements."""
    params = given.params()
    optimizer = given.make(params)
    for step in range(2):
        gradients(params, step)
        held, values = [param.grad for param in params], copies([param.grad for param in params])
        optimizer.step()
        assert all(param.grad is grad for param, grad in zip(params, held))
        assert_equal([param.grad for param in params], values)


@every_rule
def test_gradients_may_have_any_strides(given: Given) -> None:
    """Expanded and transposed gradients count like their contiguous copies."""
    params, twins = given.params(), given.params()
    optimizer, reference = given.make(params), given.make(twins)
    for value in (1.0, -3.0):
        for param in params:
            param.grad = torch.tensor(value).expand(param.shape)
            if param.ndim == 2 and value < 0:
                param.grad = torch.arange(param.numel()).float().view(param.shape[::-1]).t()
        for param, twin in zip(params, twins):
            twin.grad = param.grad.contiguous()
        optimizer.step()
        reference.step()
    assert_equal(copies(params), copies(twins))


def test_parameters_may_be_scalars_or_empty() -> None:
    """A parameter of no dimension is trained, one of no elements is accepted."""
    params = Given(((), (0,), (0, 5), (3,), (2, 3))).params()
    optimizer = make(params, only_adamw=True)
    start = copies(params)
    train(optimizer, params, 0, 2)
    moved = [not torch.equal(now, then) for now, then in zip(copies(params), start)]
    assert moved == [True, False, False, True, True]


@every_input
def test_adamw_counts_its_steps(given: Given) -> None:
    """The state says how many steps each parameter of AdamW has taken, as a tensor of one element."""
    params = given.params()
    optimizer = given.make(params)
    train(optimizer, params, 0, 3)
    state = optimizer.state_dict()
    numbers = [number for group in state["param_groups"] if group["rule"] == "adamw" for number in group["params"]]
    counts = [state["state"][number]["step"] for number in numbers]
    assert all(torch.is_tensor(count) and count.numel() == 1 and float(count) == 3.0 for count in counts)


@every_rule
@pytest.mark.parametrize("shape", [(), (1,), pytest.param((1, 1), marks=night)])
def test_an_lr_may_be_a_tensor(given: Given, shape: tuple[int, ...]) -> None:
    """An lr in a tensor of one element trains as its number does, and is not written by a step."""
    params, twins = given.params(), given.params()
    lr = torch.full(shape, EXACT_LR)
    optimizer = given.make(params, lr=lr)
    train(optimizer, params, 0, 3)
    train(given.make(twins, lr=EXACT_LR), twins, 0, 3)
    assert_equal(copies(params), copies(twins))
    for group in optimizer.param_groups:
        assert torch.is_tensor(group["lr"]) and group["lr"].shape == shape and float(group["lr"]) == EXACT_LR
    for group in optimizer.param_groups:
        group["lr"].zero_()
    trained = copies(params)
    train(optimizer, params, 3, 4)
    assert_equal(copies(params), trained)


@every_rule
def test_a_closure_is_called_once_with_gradients_on(given: Given) -> None:
    """`step(closure)` calls it once, with gradients switched on, and returns its loss; without one it returns None."""
    params = given.params()
    optimizer = given.make(params)
    called = []

    def closure() -> Tensor:
        called.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = torch.stack([param.square().sum() for param in params]).sum()
        loss.backward()
        return loss

    wanted = float(closure().detach())
    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert called == [True, True] and float(loss.detach()) == pytest.approx(wanted)
    assert optimizer.step() is None and torch.is_grad_enabled()


@every_rule
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(given: Given, set_to_none: bool) -> None:
    """`zero_grad` sets gradients to None, or to zeros with `set_to_none=False`."""
    params = given.params()
    optimizer = given.make(params)
    for step in range(2):
        gradients(params, step)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)
        gradients(params, step)
        optimizer.step()


@every_rule
def test_values_written_between_steps_count(given: Given) -> None:
    """What is written into a parameter between two steps is what the next step starts from."""
    params, twins = given.params(), given.params(seed=1)
    optimizer = given.make(params, weight_decay=0.0)
    with torch.no_grad():
        optimizer.step()
        for param, twin in zip(params, twins):
            param.copy_(twin)
    train(optimizer, params, 0, 1)
    train(given.make(twins, weight_decay=0.0), twins, 0, 1)
    assert_equal(copies(params), copies(twins))


def test_two_optimizers_train_apart() -> None:
    """Optimizers of different parameters do not disturb each other."""
    params, twins = Given(MIXED).params(), Given(MIXED).params()
    first, second = make(params[:2], lr=0.1), make(params[2:], lr=0.01)
    alone = [make(twins[:2], lr=0.1), make(twins[2:], lr=0.01)]
    for step in range(3):
        gradients(params, step)
        second.step()
        first.step()
    for optimizer in alone:
        for step in range(3):
            gradients(twins, step)
            optimizer.step()
    assert_equal(copies(params), copies(twins))


@differs(
    instead="the newer optimizer takes over, the older one raises when it is used",
    reason="a parameter's storage and hooks have one manager",
    match="taken over by a newer DistMuon",
)
def test_two_optimizers_may_share_parameters() -> None:
    """Two optimizers may be made of the same parameters and stepped in turn."""
    params = BOTH.params()
    for optimizer in [BOTH.make(params), BOTH.make(params)]:
        train(optimizer, params, 0, 1)


def test_a_step_has_its_name_in_a_profile() -> None:
    """The profiler shows a step under the class's name."""
    params = BOTH.params()
    optimizer = BOTH.make(params)
    gradients(params, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#DistMuon.step", "Optimizer.zero_grad#DistMuon.zero_grad"} <= names


# ------------------------------------------------------------------------------------------- groups


def test_each_group_has_its_own_lr() -> None:
    """An lr in a group's dict is that group's, the others have the constructor's."""
    params = Given(MATRICES).params()
    start = copies(params)
    given = [{"params": [pair], "rule": "muon"} for pair in named(params)]
    optimizer = distmuon.DistMuon([{**given[0], "lr": 0.0}, given[1]], lr=0.05, weight_decay=0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.05]
    train(optimizer, params, 0, 2)
    assert [torch.equal(now, then) for now, then in zip(copies(params), start)] == [True, False]


def test_each_group_has_its_own_weight_decay() -> None:
    """A weight decay in a group's dict is that group's."""
    params = BOTH.params()
    start = copies(params)
    muon, adamw = groups(params)
    optimizer = distmuon.DistMuon([{**muon, "weight_decay": 0.0}, {**adamw, "weight_decay": 0.5}], lr=0.1)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for now, then in zip(copies(params), start):
        torch.testing.assert_close(now, then if now.ndim > 1 else then * 0.95)


@every_rule
def test_what_is_written_into_a_group_counts(given: Given) -> None:
    """lr and weight decay are read from the groups at every step."""
    params, twins = given.params(), given.params()
    optimizer, reference = given.make(params, lr=0.1), given.make(twins, lr=0.02, weight_decay=0.3)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.02, 0.3
    train(optimizer, params, 0, 2)
    train(reference, twins, 0, 2)
    assert_equal(copies(params), copies(twins))


@every_rule
def test_groups_hold_the_parameters_themselves(given: Given) -> None:
    """The groups hold the very parameters that were given, before and after steps and loads, and they stay leaves."""
    params = given.params()
    optimizer = given.make(params)

    def held() -> list[int]:
        return sorted(id(param) for group in optimizer.param_groups for param in group["params"])

    wanted = sorted(map(id, params))
    assert held() == wanted
    train(optimizer, params, 0, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert held() == wanted
    assert all(param.is_leaf and param.requires_grad and type(param) is nn.Parameter for param in params)


@every_input
def test_every_group_has_the_defaults(given: Given) -> None:
    """Each entry of `defaults` is in every group."""
    optimizer = given.make(given.params())
    assert {"lr", "weight_decay"} <= optimizer.defaults.keys()
    for group in optimizer.param_groups:
        assert optimizer.defaults.keys() <= group.keys()


@every_input
def test_it_can_be_printed(given: Given) -> None:
    """`repr` names the class, each group and each hyperparameter, and no parameter's elements."""
    optimizer = given.make(given.params())
    text = repr(optimizer)
    assert text.startswith("DistMuon (")
    for number, group in enumerate(optimizer.param_groups):
        assert f"Parameter Group {number}\n" in text
        assert all(f"    {key}: {group[key]}\n" in text for key in group if key != "params")
    assert "tensor([" not in text


@every_rule
def test_names_are_kept_in_the_groups(given: Given) -> None:
    """Named parameters leave their names in the groups."""
    optimizer = given.make(given.params())
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == [f"p{number}" for number in range(len(given.shapes))]


@differs(
    instead="refused, and the message says what to pass",
    reason="routing, checkpoints and errors go by name",
    match=r"params: parameters without names",
)
def test_parameters_need_no_names() -> None:
    """`Optimizer(model.parameters())`: an iterable of tensors is enough."""
    distmuon.DistMuon(nn.Linear(4, 4).parameters())


@differs(
    instead="refused: make a new optimizer",
    reason="where every element lies is planned once, for all parameters together",
    match="add_param_group: called after construction",
)
def test_a_group_may_be_added() -> None:
    """`add_param_group` adds parameters to an optimizer that is there."""
    BOTH.make(BOTH.params()).add_param_group({"params": named([nn.Parameter(torch.zeros(2, 2))], 9)})


@differs(
    instead="refused before anything is written: make a new optimizer when parameters are unfrozen",
    reason="the layout holds no state for it",
    match=r"p1: requires_grad was switched on after construction",
)
def test_a_frozen_parameter_may_be_unfrozen() -> None:
    """A parameter that needs no gradient when it is given is trained once it needs one."""
    params = BOTH.params()
    params[1].requires_grad_(False)
    optimizer = distmuon.DistMuon(({"params": iter(g["params"]), "rule": g["rule"]} for g in groups(params)), lr=0.1)
    train(optimizer, [params[0], *params[2:]], 0, 1)
    params[1].requires_grad_(True)
    before = copies(params)
    train(optimizer, params, 1, 2)
    assert not torch.equal(params[1].detach(), before[1])


@differs(
    instead="refused: unfreeze some parameters",
    reason="an optimizer that can never move anything is a mistake, most often of a freeze that went too far",
    match="no trainable parameter",
)
def test_no_parameter_need_be_trainable() -> None:
    """An optimizer may be made of frozen parameters alone."""
    params = BOTH.params()
    for param in params:
        param.requires_grad_(False)
    BOTH.make(params)


@differs(
    instead="refused by name",
    reason="state and masters are float32 or narrower",
    match=r"p0: the parameter is of dtype torch\.float64",
)
def test_parameters_may_be_float64() -> None:
    """Parameters may be float64."""
    train(BOTH.make(params := BOTH.params(dtype=torch.float64)), params, 0, 1)


# ------------------------------------------------------------------------------------------- state


@every_input
@pytest.mark.parametrize("way", ["memory", pytest.param("deepcopy", marks=night), "file"])
def test_state_goes_into_another_optimizer(given: Given, way: str) -> None:
    """A state dict loads into an optimizer of equal parameters, which then trains on bit for bit.

    Through a file it is read with `weights_only=True`.
    """
    params = given.params()
    optimizer = given.make(params)
    train(optimizer, params, 0, 4)
    state = optimizer.state_dict()
    if way == "deepcopy":
        state = copy.deepcopy(state)
    elif way == "file":
        torch.save(state, file := io.BytesIO())
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        assert_state_equal(state, optimizer.state_dict())
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = given.make(twins)
    other.load_state_dict(state)
    assert_state_equal(other.state_dict(), optimizer.state_dict())
    train(optimizer, params, 4, 8)
    train(other, twins, 4, 8)
    assert_equal(copies(twins), copies(params))
    assert_state_equal(other.state_dict(), optimizer.state_dict())


@every_rule
def test_the_form_of_a_state_dict(given: Given) -> None:
    """A state dict has "state" by number and "param_groups" with those numbers in order, and holds no parameter."""
    params = given.params()
    optimizer = given.make(params)
    assert not any(optimizer.state_dict()["state"].values())
    train(optimizer, params, 0, 1)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    assert numbers == list(range(len(params))) == sorted(state["state"])
    assert all(len(kept) > 0 for kept in state["state"].values())
    for ours, saved in zip(optimizer.param_groups, state["param_groups"]):
        assert saved.keys() == ours.keys()
        assert_state_equal({**saved, "params": 0}, {**ours, "params": 0})
    flat = [value for kept in state["state"].values() for value in kept.values()]
    assert not any(isinstance(value, nn.Parameter) for value in flat)


@every_rule
def test_a_state_from_before_a_hyperparameter_was_there(given: Given) -> None:
    """Groups saved by an older version, without some entries, load: the entries stay as they are."""
    params, twins = given.params(), given.params()
    optimizer, other = given.make(params), given.make(twins, weight_decay=0.25)
    train(optimizer, params, 0, 2)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for key in ("weight_decay", "nesterov", "ns_steps", "eps"):
            group.pop(key, None)
    other.load_state_dict(state)
    assert {group["weight_decay"] for group in other.param_groups} == {0.25}
    train(other, twins, 2, 3)


@every_rule
def test_a_state_without_names_loads(given: Given) -> None:
    """A state saved without parameter names loads into an optimizer with names, by position."""
    params, twins = given.params(), given.params()
    optimizer, other = given.make(params), given.make(twins)
    train(optimizer, params, 0, 2)
    state = optimizer.state_dict()
    bare = copy.deepcopy(state)
    for group in bare["param_groups"]:
        del group["param_names"]
    other.load_state_dict(bare)
    assert_state_equal(other.state_dict(), state)


@every_rule
@differs(
    instead="refused, naming the first difference",
    reason="the momentum of one weight would go to another of its shape in silence",
    match=r"the state has 'p0' where this optimizer has 'q0'",
)
def test_a_state_under_other_names_loads(given: Given) -> None:
    """A state saved under other parameter names loads, by position."""
    params, twins = given.params(), given.params()
    optimizer = given.make(params)
    train(optimizer, params, 0, 2)
    if given.only_adamw:
        other = distmuon.DistMuon([(f"q{n}", p) for n, p in enumerate(twins)], routes="adamw")
    else:
        renamed = [{**g, "params": [(f"q{n[1:]}", p) for n, p in g["params"]]} for g in groups(twins)]
        other = distmuon.DistMuon(renamed)
    other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("only_adamw", [True, False])
def test_a_count_of_steps_may_be_a_number(only_adamw: bool) -> None:
    """A state whose "step" is a plain number, as older versions saved it, loads."""
    given = Given(MIXED, only_adamw)
    params, twins = given.params(), given.params()
    optimizer, other = given.make(params), given.make(twins)
    train(optimizer, params, 0, 3)
    state = optimizer.state_dict()
    for kept in state["state"].values():
        if "step" in kept:
            kept["step"] = int(kept["step"])
    other.load_state_dict(state)
    with torch.no_grad():
        for param, twin in zip(params, twins):
            twin.copy_(param)
    train(optimizer, params, 3, 5)
    train(other, twins, 3, 5)
    assert_equal(copies(params), copies(twins))


@every_rule
def test_a_state_of_another_form_is_refused(given: Given) -> None:
    """A state with more or fewer groups, or with a group of another size, raises ValueError and changes nothing."""
    params = given.params()
    optimizer = given.make(params)
    train(optimizer, params, 0, 1)
    state, before = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    first = state["param_groups"][0]
    short = {key: value[:-1] if key in ("params", "param_names") else value for key, value in first.items()}
    for wrong in ([*state["param_groups"], first], state["param_groups"][1:], [short, *state["param_groups"][1:]]):
        with pytest.raises(ValueError, match=r"load_state_dict"):
            optimizer.load_state_dict({**state, "param_groups": wrong})
    assert_state_equal(optimizer.state_dict(), before)


@every_rule
def test_hyperparameters_come_from_the_state(given: Given) -> None:
    """Loading takes lr, weight decay and entries of the user's own over from the saved groups."""
    optimizer, other = given.make(given.params(), lr=0.07), given.make(given.params(), lr=0.5)
    for group in optimizer.param_groups:
        group["note"] = [group["rule"], 3]
    other.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(optimizer.param_groups, other.param_groups):
        assert theirs["lr"] == 0.07 and theirs["note"] == [ours["rule"], 3] and theirs["note"] is not ours["note"]


@every_rule
def test_a_loaded_state_is_the_optimizers_own(given: Given) -> None:
    """Steps after a load do not write into the dict that was loaded, nor does writing into it reach the optimizer."""
    params, twins = given.params(), given.params()
    optimizer, other = given.make(params), given.make(twins)
    train(optimizer, params, 0, 2)
    state = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(state)
    train(other, twins, 2, 3)
    assert_state_equal(state, optimizer.state_dict())
    before = copy.deepcopy(other.state_dict())
    for kept in state["state"].values():
        for value in kept.values():
            value.fill_(9.0)
    assert_state_equal(other.state_dict(), before)


@every_rule
def test_state_can_be_looked_at(given: Given) -> None:
    """After a step `optimizer.state[param]` holds what is kept for each parameter."""
    params = given.params()
    optimizer = given.make(params)
    train(optimizer, params, 0, 1)
    rules = {id(param): group["rule"] for group in optimizer.param_groups for param in group["params"]}
    for param in params:
        keys = {"momentum_buffer"} if rules[id(param)] == "muon" else {"exp_avg", "exp_avg_sq", "step"}
        assert set(optimizer.state[param]) == keys
        assert all(value.shape == param.shape for key, value in optimizer.state[param].items() if key != "step")


@every_rule
def test_what_a_hook_writes_into_the_state_is_saved(given: Given) -> None:
    """What a pre-hook of `state_dict` writes into `optimizer.state` is in the state dict."""
    params = given.params()
    optimizer = given.make(params)
    train(optimizer, params, 0, 1)
    optimizer.register_state_dict_pre_hook(lambda hooked: hooked.state.update(mark=1))
    assert optimizer.state_dict()["state"].get("mark") == 1


@every_rule
@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@differs(
    instead="refused: use `state_dict()` or `distmuon.save_checkpoint`",
    reason="the copy would manage other parameters than the model's, without the hooks that reduce their gradients",
    match=r"DistMuon: copied or pickled as an object",
)
def test_an_optimizer_can_be_copied(given: Given, way: Callable[[Any], Any]) -> None:
    """`copy.deepcopy` and pickle give an optimizer with the same groups, state and defaults."""
    params = given.params()
    optimizer = given.make(params)
    train(optimizer, params, 0, 1)
    assert_state_equal(way(optimizer).state_dict(), optimizer.state_dict())


# ------------------------------------------------------------------------------------------- hooks


@every_rule
def test_step_hooks_are_called_in_order(given: Given) -> None:
    """Global pre-hooks, its own pre-hooks, the step, its own post-hooks, global post-hooks; none once it is removed."""
    params = given.params()
    optimizer = given.make(params)
    start, seen = copies(params), []

    def note(which: str) -> Callable[..., None]:
        def hook(hooked: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert hooked is optimizer and isinstance(args, tuple) and kwargs == {}
            seen.append((which, all(torch.equal(now, then) for now, then in zip(copies(params), start))))

        return hook

    handles = [
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_pre_hook(note("second pre")),
        register_optimizer_step_pre_hook(note("global pre")),
    ]
    try:
        train(optimizer, params, 0, 1)
    finally:
        for handle in handles:
            handle.remove()
    before = [("global pre", True), ("pre", True), ("second pre", True)]
    assert seen == [*before, ("post", False), ("global post", False)]
    train(optimizer, params, 1, 2)
    assert len(seen) == 5


@every_rule
def test_a_pre_hook_may_change_the_arguments(given: Given) -> None:
    """A step pre-hook may return new arguments; anything but None or a pair of them is an error."""
    params = given.params()
    optimizer = given.make(params)
    gradients(params, 0)
    handle = optimizer.register_step_pre_hook(lambda hooked, args, kwargs: (args, {"closure": lambda: 42.0}))
    assert optimizer.step() == 42.0
    handle.remove()
    optimizer.register_step_pre_hook(lambda hooked, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@every_rule
def test_hooks_of_state_dict(given: Given) -> None:
    """Pre-hooks of `state_dict` run before it, in order; post-hooks may change or replace what it returns."""
    params = given.params()
    optimizer = given.make(params)
    train(optimizer, params, 0, 1)
    seen: list[str] = []

    def lower_lr(hooked: Any) -> None:
        seen.append("second")
        hooked.param_groups[0]["lr"] = 0.0625

    def add(hooked: Any, state: dict[str, Any]) -> None:
        state["added"] = len(state["state"])

    def replace(hooked: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "replaced": state["added"] + 1}

    optimizer.register_state_dict_pre_hook(lower_lr)
    optimizer.register_state_dict_pre_hook(lambda hooked: seen.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(replace)
    optimizer.register_state_dict_post_hook(add, prepend=True)
    state = optimizer.state_dict()
    assert seen == ["first", "second"] and state["param_groups"][0]["lr"] == 0.0625
    assert (state["added"], state["replaced"]) == (len(params), len(params) + 1)


@every_rule
def test_hooks_of_load_state_dict(given: Given) -> None:
    """Pre-hooks of `load_state_dict` may change or replace what is loaded; post-hooks see the optimizer loaded."""
    params, twins = given.params(), given.params()
    optimizer, other = given.make(params), given.make(twins, lr=0.5)
    train(optimizer, params, 0, 2)
    seen: list[Any] = []

    def fill_in(hooked: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("first")
        return {**state, "param_groups": [{**group, "lr": 0.25} for group in state["param_groups"]]}

    def look(hooked: Any, state: dict[str, Any]) -> None:
        seen.append(state["param_groups"][0]["lr"])

    other.register_load_state_dict_pre_hook(look)
    other.register_load_state_dict_pre_hook(fill_in, prepend=True)
    other.register_load_state_dict_post_hook(lambda hooked: seen.append(hooked.param_groups[0]["lr"]))
    other.register_load_state_dict_post_hook(lambda hooked: seen.append("before it"), prepend=True)
    other.load_state_dict(optimizer.state_dict())
    assert seen == ["first", 0.25, "before it", 0.25]
    assert_state_equal(other.state_dict()["state"], optimizer.state_dict()["state"])


# ------------------------------------------------------------------------------------------- errors


def _one(shape: tuple[int, ...] = (2, 3), **kind: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, **kind), requires_grad=True)


def _muon(*pairs: Any) -> dict[str, Any]:
    return {"params": list(pairs), "rule": "muon"}


_SHARED = _one()
REFUSED: dict[str, Callable[[], Any]] = {
    "nothing": lambda: distmuon.DistMuon([]),
    "a parameter in two groups": lambda: distmuon.DistMuon([_muon(("a", _SHARED)), _muon(("b", _SHARED))]),
    "a name used twice": lambda: distmuon.DistMuon([_muon(("a", _one()), ("a", _one()))]),
    "some without names": lambda: distmuon.DistMuon([_muon(("a", _one()), _one())]),
    "a group without names": lambda: distmuon.DistMuon([_muon(("a", _one())), _muon(_one())]),
    "a group without parameters": lambda: distmuon.DistMuon([{"rule": "muon"}]),
    "an lr of two elements": lambda: make([_one()], lr=torch.ones(2)),
    "lr": lambda: make([_one()], lr=-0.5),
    "weight decay": lambda: make([_one()], weight_decay=-0.5),
    "momentum": lambda: make([_one()], momentum=-0.5),
    "betas": lambda: make([_one()], only_adamw=True, adamw_betas=(1.0, 0.95)),
    "eps": lambda: make([_one()], only_adamw=True, adamw_eps=-1.0),
    "scale": lambda: make([_one()], adjust_lr_fn="arbitrary"),
    "iterations": lambda: make([_one()], ns_steps=100),
    "Muon for a vector": lambda: distmuon.DistMuon([_muon(("a", _one((3,))))]),
    "complex": lambda: make([_one(dtype=torch.complex64)]),
    "not a leaf": lambda: distmuon.DistMuon([_muon(("a", _one() * 2))]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused(what: str) -> None:
    """Empty, repeated, half named, complex or derived parameters and illegal hyperparameters raise when it is made."""
    with pytest.raises(ValueError, match=r": .*; .*; "):
        REFUSED[what]()


WRONG: dict[str, Any] = {
    "a parameter": _one(),
    "a number in a tensor": torch.tensor(1.0),
    "a set": {_one()},
    "no tensor": [("a", "b")],
    "a number": 3,
    "None": None,
}


@pytest.mark.parametrize("what", WRONG)
@differs(
    instead="ValueError with the cure in it, as every refusal of distmuon",
    reason="one kind of error for bad input, the same on all ranks",
    match=r"params: parameters without names",
)
def test_wrong_types_are_type_errors(what: str) -> None:
    """A tensor, a set or no tensor at all in the place of the parameters raises TypeError."""
    with pytest.raises(TypeError):
        distmuon.DistMuon(WRONG[what])


@differs(
    instead="refused by name",
    reason="torch announces that it will be an error there, too",
    match=r"a: its name or parameter was given before",
)
def test_a_parameter_twice_in_a_group_is_warned_of() -> None:
    """A parameter that stands twice in one group warns, and is stepped twice."""
    with warnings.catch_warnings(record=True) as caught:
        distmuon.DistMuon([_muon(("a", param := _one()), ("a", param))])
    assert any("duplicate parameters" in str(warning.message) for warning in caught)
