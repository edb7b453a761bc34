"""Bad input, argument by argument: one ValueError that says thing, finding, need and cure, before anything changed.

What all ranks must raise together is in tests/distributed/test_bad_input.py.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distmuon
from distmuon import Precision, Route, Sharding
from distmuon.checkpoint.extras import unpacked
from distmuon.layout.routing import route
from distmuon.planning.plan import plan
from tests.training import digest, state_tensors, weights

FORM = re.compile(r"(?s).+: .+; .+; .+")


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def _made(**options: Any) -> tuple[nn.Sequential, distmuon.DistMuon]:
    model = _model()
    return model, distmuon.DistMuon(model, **{"routes": [Route("*.weight", "muon")], **options})


def _step(model: nn.Module, optimizer: distmuon.DistMuon) -> None:
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def refused(call: Callable[[], Any], match: str) -> None:
    """`call` raises a ValueError of the one form that matches."""
    with pytest.raises(ValueError, match=f"(?s){match}") as raised:
        call()
    assert FORM.fullmatch(str(raised.value)), raised.value


NUMBERS: list[Any] = [
    *(None, math.nan, -1, "x", [], (1, 2), True, 1j, torch.ones(2), torch.ones((), device="meta")),
    *(torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(1j)),
]
WORDS: list[Any] = [None, math.nan, -1, 0, 1, "x", "", [], (1, 2), 1j, torch.ones(2), torch.float8_e4m3fn, {}]


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "adamw_lr", "adamw_eps", "adamw_weight_decay"])
def test_a_hyperparameter_is_a_number_from_0_on(name: str) -> None:
    for value in [*NUMBERS, math.inf][name in ("adamw_lr", "adamw_weight_decay") :]:
        key = {"adamw_eps": "eps"}.get(name, name.removeprefix("adamw_"))
        refused(lambda value=value: _made(**{name: value}), rf"param_groups\[[01]\]\.{key}: .*needed")


@pytest.mark.parametrize("name", ["nesterov", "adjust_lr_fn", "ns_steps", "grad_reduction", "broadcast_buffers"])
def test_an_option_is_one_of_its_words(name: str) -> None:
    """0 is not False and 1 not True: what is compared across ranks is the option itself."""
    for value in WORDS:
        named = isinstance(value, int) and name == "ns_steps" and value == 1
        if not named:
            refused(lambda value=value: _made(**{name: value}), rf"{name}: found .*needed")


POLICIES = {"sharding": Sharding, "precision": Precision}
FIELDS = [(policy, field.name) for policy, kind in POLICIES.items() for field in fields(kind)]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_one_of_ours(policy: str) -> None:
    other = next(kind() for name, kind in POLICIES.items() if name != policy)
    for value in [*(word for word in WORDS if word is not None), other]:
        wanted = rf"{policy}: found .*; a distmuon\.{POLICIES[policy].__name__} is needed"
        refused(lambda value=value: distmuon.DistMuon(_model(), **{policy: value}), wanted)


@pytest.mark.parametrize(("policy", "name"), [each for each in FIELDS if each != ("sharding", "bucket_mb")])
def test_a_field_of_a_policy_is_one_of_its_words(policy: str, name: str) -> None:
    for value in WORDS:
        is_legal = value is None and name in ("exchange", "updates")
        is_legal = is_legal or (name == "gpus_per_node" and (value is None or (type(value) is int and value > 0)))
        if not is_legal:
            wanted = rf"^{policy}\.{name}: found .*needed; correct {policy}\.{name}$"
            refused(lambda value=value: POLICIES[policy](**{name: value}), wanted)


def test_a_dtype_goes_by_its_name() -> None:
    named = Precision(reduce="bfloat16", momentum="int8", newton_schulz="float32", exchange="bfloat16")  # type: ignore[arg-type]
    assert named == Precision(
        reduce=torch.bfloat16, momentum=torch.int8, newton_schulz=torch.float32, exchange=torch.bfloat16
    )
    refused(lambda: Precision(momentum="float64"), r"precision\.momentum: found torch\.float64; one of torch\.float32")  # type: ignore[arg-type]
    refused(lambda: Precision(momentum="Tensor"), r"precision\.momentum: found 'Tensor'; one of")  # type: ignore[arg-type]


def test_a_field_of_a_policy_may_be_given_by_itself() -> None:
    model = _model()
    optimizer = distmuon.DistMuon(model, overlap=False, ns_dtype="float32", sharding=Sharding(packing="contiguous"))
    assert optimizer.options.sharding == Sharding(overlap=False, packing="contiguous")
    assert optimizer.options.precision == Precision(newton_schulz=torch.float32)
    refused(lambda: distmuon.DistMuon(model, overlap="backward"), "sharding.overlap: found 'backward'")


@pytest.mark.parametrize("name", ["reduce", "momentum_buffer", "learning_rate"])
def test_another_argument_is_refused_as_a_call_does(name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected argument '{name}'; .*overlap.*ns_dtype"):
        distmuon.DistMuon(_model(), **{name: 1})


@pytest.mark.parametrize("name", ["bucket_mb", "max_grad_norm"])
def test_a_size_or_norm_is_a_positive_number(name: str) -> None:
    for value in [0, *NUMBERS[1:]]:
        refused(lambda value=value: _made(**{name: value}), f"{name}: found .*; a positive number is needed")
    refused(lambda: _made(bucket_mb=math.inf), "bucket_mb: found inf")


@pytest.mark.parametrize(
    "value", [None, math.nan, 3, ("a", "b", "c"), (None,) * 3, object()], ids=lambda v: type(v).__name__
)
def test_coefficients_are_a_name_or_triples(value: Any) -> None:
    refused(lambda: _made(ns_coefficients=value), "ns_coefficients: .* found; a table's name, one")
    refused(lambda: _made(ns_coefficients=(1, 2)), r"ns_coefficients: rows of \[2\] numbers found for 5 steps")


@pytest.mark.parametrize("value", [None, 0.9, (0.9,), (0.9, 0.95, 0.99), "ab", torch.tensor([0.9, 0.95])], ids=repr)
def test_betas_are_two(value: Any) -> None:
    refused(
        lambda: _made(adamw_betas=value), r"param_groups\[1\]\.betas: found .*; two numbers are needed; pass \(beta1"
    )


@pytest.mark.parametrize("value", [3, "world", object(), -100])
def test_a_process_group_is_one(value: Any) -> None:
    """-100 is what torch.distributed.new_group returns to ranks that are not in it."""
    refused(lambda: _made(process_group=value), "process_group: found .*a group that this rank is in, or None")
    refused(lambda: _made(exchange_group=value), "process_group: found .*a group that this rank is in, or None")


# ------------------------------------------------------------------------------------------- parameters and routes

WEIGHT = nn.Parameter(torch.randn(3, 3))
MUON = [Route("*", "muon")]


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (None, "params: parameters without names"),
        (3, "params: parameters without names"),
        ("model", "params: parameters without names"),
        ([WEIGHT], "params: parameters without names.*pass the model itself"),
        (_model().state_dict(), "params: parameters without names"),
        ([("a", 3)], "params: parameters without names"),
        ([("a", WEIGHT * 2)], "params: parameters without names"),
        ([{"rule": "muon"}], "params: parameters without names"),
        ([{"params": None, "rule": "muon"}], "params: parameters without names"),
        ([{"params": WEIGHT, "rule": "muon"}], "params: parameters without names"),
        ([{"params": [("a", WEIGHT)]}], "rule: found 'unstated'; one of muon, adamw"),
        ([{"params": [("a", WEIGHT)], "rule": ["muon"]}], r"rule: found \['muon'\]"),
        ([{"params": [("a", WEIGHT)], "rule": "muon", "lrr": 3}], "a: option 'lrr' in its route; one of lr, "),
        ([("a", WEIGHT), ("b", WEIGHT)], "b: its name or parameter was given before"),
        ([("a", WEIGHT), ("a", nn.Parameter(torch.ones(3, 3)))], "a: its name or parameter was given before"),
        ([], "params: no trainable parameter"),
        (nn.Identity(), "params: no trainable parameter"),
        (_model().requires_grad_(False), "params: no trainable parameter; at least one is needed; unfreeze"),
        (nn.Sequential(nn.LazyLinear(4)), "0.weight: a lazy parameter without a shape; .*run a forward first"),
        (_model().to("meta"), "0.weight: the parameter is on the meta device, without values"),
        (_model().double(), "0.weight: the parameter is of dtype torch.float64, which a float32 master would round"),
        (
            [("a", nn.Parameter(torch.ones(3, 3, dtype=torch.complex64)))],
            "a: the parameter is of dtype torch.complex64",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_parameters_that_cannot_be_trained(params: Any, match: str) -> None:
    routes = None if isinstance(params, nn.Module) or (isinstance(params, list) and "rule" in str(params)) else MUON
    if params in ([],) or (isinstance(params, nn.Module) and not [*params.parameters()]):
        routes = "adamw"
    refused(lambda: distmuon.DistMuon(params, routes=routes), match)


@pytest.mark.parametrize("value", [3, math.nan, "muon", ["0.weight"], [None], [("0.weight", "muon")], (1, 2)], ids=repr)
def test_routes_are_routes(value: Any) -> None:
    for call in (
        lambda: _made(routes=value),
        lambda: plan(_model(), dp_size=2, routes=value),
        lambda: route(_model(), value),
    ):
        refused(call, r"routes: found .*(one of adamw is needed|a list of distmuon\.Route or \"adamw\" is needed)")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"pattern": None}, "Route: found .*pattern=None.*a string as pattern"),
        ({"pattern": 3}, "Route: found .*pattern=3"),
        ({"rule": "sgd"}, r"Route\('\*'\)\.rule: found 'sgd'; one of muon, adamw"),
        ({"rule": None}, "rule: found None"),
        ({"split": 4}, "Route: found .*split=4.*whole numbers as split"),
        ({"split": "44"}, "Route: found .*split='44'"),
        ({"split": [4.0, 4.0]}, r"Route: found .*split=\[4\.0, 4\.0\]"),
        ({"split": torch.ones(2)}, "Route: found .*split=tensor"),
        ({"split_dim": 2}, r"split_dim: found 2; one of 0, 1"),
        ({"options": None}, "Route: found .*options=None.*a dict as options"),
        ({"options": [("lr", 1)]}, "Route: found .*options="),
        ({"options": {1: 2, "lr": 3}}, "Route: found .*options="),
    ],
)
def test_a_route_says_what_is_wrong_with_it(arguments: dict[str, Any], match: str) -> None:
    refused(lambda: Route(**{"pattern": "*", "rule": "muon", **arguments}), match)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (Route("0.weight", "muon", options={"rule": "adamw"}), "0.weight: option 'rule' in its route; one of lr, "),
        (Route("0.weight", "muon", options={"params": []}), "0.weight: option 'params'"),
        (Route("0.weight", "muon", options={"betas": (0.9, 0.9)}), "0.weight: option 'betas' in its route"),
        (Route("0.weight", "muon", options={"lr": "x"}), r"param_groups\[0\]\.lr: found 'x'; a number >= 0 is needed"),
        (Route("0.weight", "muon", split=[-4, 12]), r"0.weight: split=\[-4, 12\] sums to 8 .*parts >= 1 that sum to 8"),
        (Route("0.bias", "muon"), r"0.bias: shape \(8,\) was routed to muon; a matrix is needed"),
        (Route("9.weight", "muon"), r"Route\('9.weight'\): matched no parameter; .*correct the pattern"),
    ],
)
def test_a_route_that_does_not_fit_the_model(given: Route, match: str) -> None:
    refused(lambda: _made(routes=[given]), match)


def _nan(model: nn.Sequential) -> None:
    model[2].weight.data[1, 1] = math.nan


def _replaced(model: nn.Sequential) -> None:
    model[0] = nn.Linear(6, 8)


def _grown(model: nn.Sequential) -> None:
    model.append(nn.Linear(4, 4))


def _moved(model: nn.Sequential) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_nan, "2.weight: 1 parameters hold NaN or inf before the first step; finite values.*initialize the model"),
        (_replaced, "0.weight: the parameter is no longer the one that the model holds there"),
        (_grown, "3.weight: it is trainable now, but was absent or frozen.*make a new DistMuon once"),
        (_moved, "0.weight: the parameter is no longer the one|on the meta device"),
    ],
)
def test_a_model_that_changed_before_the_first_step(change: Callable[[nn.Sequential], None], match: str) -> None:
    model, _ = _made()
    change(model)
    refused(lambda: model(torch.randn(5, 6, device=next(model.parameters()).device)), match)


def test_a_checkpoint_may_be_loaded_into_any_values(tmp_path: Path) -> None:
    """Only training on them is refused."""
    model, optimizer = _made()
    _step(model, optimizer)
    distmuon.save_checkpoint(tmp_path / "step-1", model, optimizer)
    other, loader = _made()
    for param in other.parameters():
        param.data.fill_(math.nan)
    distmuon.load_checkpoint(tmp_path, other, loader)
    assert digest(weights(other, loader)) == digest(weights(model, optimizer))


# ------------------------------------------------------------------------------------------- param groups


@pytest.mark.parametrize("number", [0, 1])
def test_a_group_edited_by_hand(number: int) -> None:
    """Wrong, missing, or of the other rule: the step is refused and nothing has changed."""
    model, optimizer = _made()
    _step(model, optimizer)
    before, group = digest({**weights(model, optimizer), **state_tensors(optimizer)}), optimizer.param_groups[number]

    def step() -> None:
        optimizer.zero_grad()
        _step(model, optimizer)

    needed = [key for key in group if key not in ("params", "param_names", *["momentum"][:number])]
    for key in needed:
        good = group.pop(key)
        refused(step, rf"param_groups\[{number}\]\.{key}: (missing|found None)")
        for value in (None, "x", math.nan, torch.ones(2), object()):
            group[key] = value
            refused(step, rf"{key}: (found|a tensor)|ns_coefficients: ")
        group[key] = good
    group["rule"] = {"muon": "adamw", "adamw": "muon"}[group["rule"]]
    refused(step, rf"param_groups\[{number}\]\..*: missing")
    group["rule"] = {"muon": "adamw", "adamw": "muon"}[group["rule"]]
    optimizer.zero_grad()
    assert digest({**weights(model, optimizer), **state_tensors(optimizer)}) == before


def _swap(groups: list[dict[str, Any]]) -> None:
    groups.reverse()


def _double(groups: list[dict[str, Any]]) -> None:
    groups.append(groups[0])


def _pop(groups: list[dict[str, Any]]) -> None:
    groups.pop()


def _other_params(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"] = [nn.Parameter(param.detach().clone()) for param in groups[0]["params"]]


def _other_order(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"].reverse()


def _no_list(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"] = None


@pytest.mark.parametrize("change", [_swap, _double, _pop, _other_params, _other_order, _no_list])
def test_groups_are_those_of_construction(change: Callable[[list[dict[str, Any]]], None]) -> None:
    model, optimizer = _made()
    _step(model, optimizer)
    before = digest(weights(model, optimizer))
    change(optimizer.param_groups)
    refused(
        lambda: _step(model, optimizer), r"param_groups: they hold \d parameters that are not the 4 of construction"
    )
    assert digest(weights(model, optimizer)) == before


@pytest.mark.parametrize("value", [None, math.nan, -1.0, 0, "1", True, torch.tensor(1.0), torch.ones(2), 1j], ids=repr)
def test_a_norm_to_clip_to_is_a_positive_number(value: Any) -> None:
    """A NaN made every weight NaN, a negative one climbed."""
    model, optimizer = _made()
    model(torch.randn(5, 6)).sum().backward()
    before = digest(weights(model, optimizer))
    refused(lambda: optimizer.clip_grad_norm_(value), "max_norm: found .*; a positive number is needed; pass inf")
    optimizer.clip_grad_norm_(math.inf)
    assert digest(weights(model, optimizer)) == before


@pytest.mark.parametrize("value", [1.0, math.inf, None, "2", torch.ones(2)], ids=repr)
def test_only_the_2_norm_is_clipped_to(value: Any) -> None:
    model, optimizer = _made()
    model(torch.randn(5, 6)).sum().backward()
    refused(lambda: optimizer.clip_grad_norm_(1.0, norm_type=value), "norm_type: found .*pass norm_type=2")


@pytest.mark.parametrize("options", [{}, {"overlap": False}, {"grad_reduction": "external"}], ids=str)
def test_sparse_gradients(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 4))
    optimizer = distmuon.DistMuon(model, **options)

    def step() -> None:
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()

    refused(step, r"0\.weight: its gradient is torch\.sparse_coo; dense gradients are needed; .*sparse=False")


# ------------------------------------------------------------------------------------------- state dicts

Change = Callable[[dict[str, Any]], Any]


def _set(*path: Any) -> Change:
    """Put the last of `path` under the keys before it."""

    def change(state: Any) -> None:
        for key in path[:-2]:
            state = state[key]
        state[path[-2]] = path[-1]

    return change


def _without(*path: Any) -> Change:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


STATES: list[tuple[Change, str]] = [
    *((lambda _, value=value: [value], "no dict of states under 'state'") for value in (None, 3, "x", [], {}, WEIGHT)),
    (_without("state"), "load_state_dict: no dict of states under 'state'; torch.optim's form is needed"),
    (_set("state", None), "no dict of states"),
    (_set("state", 0, None), "no dict of states"),
    (_set("state", 0, WEIGHT), "no dict of states"),
    (_without("param_groups"), "no list of groups under 'param_groups'"),
    (_set("param_groups", None), "no list of groups"),
    (_set("param_groups", [3, 4]), "no list of groups"),
    (_set("param_groups", 0, "params", None), "a group without a list of 'params'"),
    (_without("param_groups", 0, "params"), "a group without a list of 'params'"),
    (_set("param_groups", 0, "param_names", ["0.weight"]), "a group with other 'param_names' than 'params'"),
    (_set("param_groups", 0, "param_names", 3), "a group with other 'param_names' than 'params'"),
    (_set("param_groups", 0, "param_names", ["2.weight", "0.weight"]), "has '2.weight' where .* has '0.weight'"),
    (_without("param_groups", 1), r"the state has 1 param groups, this optimizer has 2; the same routing is needed"),
    (_set("param_groups", 0, "params", [0]), "a group with other 'param_names'"),
    (_set("param_groups", 0, {"params": [0], "rule": "muon"}), "a group of the state has 1 parameters under 'muon'"),
    (_set("param_groups", 0, "rule", "adamw"), r"0\.weight \(adamw -> muon\), .*2 parameters have another rule"),
    (_set("param_groups", 0, "lr", math.nan), r"param_groups\[0\]\.lr: found nan"),
    (_set("param_groups", 0, "nesterov", "yes"), r"param_groups\[0\]\.nesterov: found 'yes'; one of False, True"),
    (_set("param_groups", 1, "betas", None), r"param_groups\[1\]\.betas: found None"),
    (_set("state", 9, {}), "the state has an entry 9; one of the 4 keys in its groups"),
    (_set("state", 0, {"exp_avg": torch.ones(8, 6)}), r"0\.weight: its state has \['exp_avg'\], not \['mom"),
    (_set("state", 2, "max_exp_avg_sq", torch.ones(8)), r"0\.bias: its state has .*'max_exp_avg_sq'"),
    (_without("state", 2, "step"), r"0\.bias: its state has \['exp_avg', 'exp_avg_sq'\], not"),
    (_set("state", 0, "momentum_buffer", torch.ones(3, 3)), r"0\.weight\.momentum_buffer: .*shape \(3, 3\); \(8, 6\)"),
    (_set("state", 0, "momentum_buffer", None), r"0\.weight\.momentum_buffer: found None; a dense real tensor"),
    (_set("state", 0, "momentum_buffer", [1.0]), r"momentum_buffer: found \[1\.0\]; a dense real tensor"),
    (_set("state", 3, "exp_avg", torch.ones(4, device="meta")), r"2\.bias\.exp_avg: found .* on meta; a dense real"),
    (_set("state", 3, "exp_avg", torch.ones(4).to_sparse()), r"2\.bias\.exp_avg: found torch\.sparse_coo"),
    (_set("state", 3, "exp_avg", torch.ones(4) * 1j), r"2\.bias\.exp_avg: found .*complex64"),
    (_set("state", 3, "step", torch.ones(2)), r"2\.bias\.step: the state has shape \(2,\)"),
    (_set("state", 3, "step", -1), r"2\.bias\.step: found -1\.0; a count is needed"),
    (_set("state", 3, "step", torch.tensor(math.nan)), r"2\.bias\.step: found nan; a count is needed"),
    (_set("state", 3, "step", "7"), r"2\.bias\.step: found '7'; a dense real tensor is needed"),
]


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A state dict that is broken, on all ranks or on one, is refused on all before anything has changed",
)
@pytest.mark.parametrize(("change", "match"), STATES)
def test_a_broken_state_dict_changes_nothing(change: Change, match: str) -> None:
    """A wrong shape in the last bucket was found after the first ones and all hyperparameters had been taken over."""
    model, optimizer = _made(lr=0.5)
    _step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    model, optimizer = _made(lr=0.02)
    _step(model, optimizer)
    before = (digest({**weights(model, optimizer), **state_tensors(optimizer)}), optimizer.param_groups[0]["lr"])
    replaced = change(saved)
    refused(lambda: optimizer.load_state_dict(saved if replaced is None else replaced[0]), match)
    now = digest({**weights(model, optimizer), **state_tensors(optimizer)})
    assert before == (now, optimizer.param_groups[0]["lr"]) and before[1] == 0.02
    _step(model, optimizer)


def test_a_reset_needs_names() -> None:
    model, optimizer = _made()
    _step(model, optimizer)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["param_names"]
    refused(
        lambda: optimizer.load_state_dict(saved, on_route_change="reset"),
        'load_state_dict: the state\'s groups have no param_names and rules; on_route_change="reset" needs them',
    )


# ------------------------------------------------------------------------------------------- checkpoints


def test_what_a_checkpoint_is_asked_for(tmp_path: Path) -> None:
    model, optimizer = _made()
    _step(model, optimizer)
    other = torch.optim.AdamW(_model().parameters())
    save, load, good = distmuon.save_checkpoint, distmuon.load_checkpoint, tmp_path / "step-1"
    save(good, model, optimizer)
    for path in (None, 3, ["a"], "a\0b"):
        refused(lambda path=path: save(path, model, optimizer), "path: found .*a folder's name is needed")
        refused(lambda path=path: load(path, model, optimizer), "path: found .*a folder's name is needed")
    refused(lambda: save("/", model, optimizer), "path: found '/'")
    for wrong in (None, 3, other):
        refused(lambda wrong=wrong: save(tmp_path / "x-1", model, wrong), "optimizer: a .*; a DistMuon is needed")
        refused(lambda wrong=wrong: load(good, model, wrong), "optimizer: a .*; a DistMuon is needed")
        refused(lambda wrong=wrong: distmuon.verify_parameters(model, wrong), "optimizer: a .*; a DistMuon is needed")
    for wrong in (None, model.state_dict(), _model()):
        refused(lambda wrong=wrong: save(tmp_path / "x-2", wrong, optimizer), "model: a .* without some of the optim")
        refused(lambda wrong=wrong: load(good, wrong, optimizer), "model: a .* without some of the optimizer's")
    for wrong in (0, -1, True, 2.0, "2", math.nan):
        refused(lambda wrong=wrong: save(tmp_path / "x-3", model, optimizer, keep_last=wrong), "keep_last: found")
    for wrong in (None, 1, "no"):
        refused(lambda wrong=wrong: save(tmp_path / "x-4", model, optimizer, asynchronous=wrong), "asynchronous: found")
        refused(lambda wrong=wrong: load(good, model, optimizer, on_route_change=wrong), "on_route_change: found")
    refused(lambda: save(tmp_path / "x-5", model, optimizer, scheduler=3), "rank 0: AttributeError: .*state_dict")
    refused(
        lambda: save(tmp_path / "x-6", model, optimizer, extra=_model()),
        "extra: it holds a value that cannot be loaded",
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    before = (digest(state_tensors(optimizer)), optimizer.param_groups[0]["lr"])
    wanted = r"shared\.pt: no scheduler's state is in it; .*None"
    refused(lambda: load(good, model, optimizer, scheduler=scheduler), wanted)
    assert before == (digest(state_tensors(optimizer)), optimizer.param_groups[0]["lr"])
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


# ------------------------------------------------------------------------------------------- planning


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        *(
            ({"dp_size": value}, "dp_size: found .*; a whole number from 1 to 131072")
            for value in (None, 0, -1, 2.0, "8", True, 10**30, math.inf, torch.tensor(2))
        ),
        *(({"ns_steps": value}, "ns_steps: found .*; a whole number from 1 to 99") for value in (None, 0, 1.5, 100)),
        *(({"hardware": value}, "hardware: found .*h100") for value in ("abacus", 3, [])),
        *(({"sharding": value}, "sharding: found .*distmuon.Sharding is needed") for value in ("big", {}, Precision())),
        ({"auto_bucket": True, "hardware": None}, "auto_bucket: found no hardware"),
        *(({"param_dtype": value}, "param_dtype: found .*torch.float32") for value in (3, "fp32", torch.int8)),
        *(({"model": value}, "model: found .*a module, ParamSpecs") for value in (None, 3, "nonsense", [3], WEIGHT)),
        ({"model": "gpt2", "routes": MUON}, "routes: patterns for parameters that are routed already"),
        ({"model": ()}, "model: no trainable parameter"),
    ],
)
def test_a_plan_that_cannot_be(arguments: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"model": _model(), "dp_size": 2, **arguments}
    refused(lambda: plan(given.pop("model"), **given), match)


def test_a_file_that_holds_no_dict(tmp_path: Path) -> None:
    """Other damage to the files of a checkpoint: tests/distributed/test_checkpoint_faults.py."""
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    refused(lambda: unpacked(tmp_path / "list.pt"), r"list\.pt: it cannot be loaded safely \(found list\)")
