"""`optimizer.state` as torch.optim's users know it: it shows what is kept, can be written, and keeps what they add."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from tests.standing import Standing
from tests.training import digest, make, state_tensors, train, weights


def _small(**options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return model, distmuon.DistMuon(model, lr=0.05, routes=[distmuon.Route("*weight", "muon")], **options)


def _take(model: nn.Module, optimizer: Any, num_steps: int = 1) -> None:
    for step in range(num_steps):
        model(torch.linspace(-1, step, 18).view(3, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _steps(model: nn.Module, optimizer: Any, num_steps: int = 1) -> str:
    _take(model, optimizer, num_steps)
    return digest({**weights(model, optimizer), **state_tensors(optimizer)})


def _bytes_of(optimizer: Any) -> int:
    """What a monitor of memory sums up."""
    values = [value for entry in optimizer.state.values() for key, value in entry.items() if key != "step"]
    tensors = [tensor for value in values for tensor in (value if isinstance(value, tuple) else (value,))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _monitored(group: dist.ProcessGroup, options: dict[str, Any], bf16: bool) -> tuple[int, int, list[set[str]]]:
    model, optimizer = make(group, Standing().bfloat16() if bf16 else Standing(), **options)
    assert not optimizer.state
    train(group, model, optimizer, [0])
    return _bytes_of(optimizer), optimizer.metrics()["state_bytes"], [set(e) for e in optimizer.state.values()]


@pytest.mark.parametrize(
    ("bf16", "options"),
    [(False, {}), (True, {}), (True, {"master_format": "remainder"}), (True, {"packing": "contiguous"})],
)
def test_the_state_of_this_rank_is_seen_to_the_byte(spawn, bf16: bool, options: dict[str, Any]) -> None:
    """Memory monitors once showed nothing. All ranks show all keys: torch's helpers read them everywhere."""
    results = spawn(_monitored, 2, options=options, bf16=bf16)
    for shown, counted, keys in results:
        assert shown == counted > 0
        assert all(("master" in entry) == bf16 for entry in keys)
    assert results[0][2] == results[1][2]


def test_alone_entries_have_the_shape_of_their_parameter() -> None:
    model, optimizer = _small()
    _steps(model, optimizer)
    for param, entry in optimizer.state.items():
        assert {value.shape for key, value in entry.items() if key != "step"} == {param.shape}
    assert optimizer.state[model[0].bias]["step"] == 1


def test_what_is_written_into_an_entry_counts() -> None:
    """Resets of the state as scripts for torch.optim do them: in place, by exchange, of an entry, of everything."""
    ends = set()
    for way in ("in place", "exchanged", "taken out", "cleared", "anew", "loaded"):
        model, optimizer = _small()
        start = optimizer.state_dict()
        _steps(model, optimizer, 2)
        if way == "in place":
            for entry in optimizer.state.values():
                for value in entry.values():
                    value.zero_()
        elif way == "exchanged":
            for entry in optimizer.state.values():
                entry.update({key: torch.zeros_like(value) for key, value in entry.items()})
        elif way == "taken out":
            for param in model.parameters():
                del optimizer.state[param]
        elif way == "cleared":
            optimizer.state.clear()
        elif way == "anew":
            optimizer.state = defaultdict(dict)
        else:
            optimizer.load_state_dict(start)
        ends.add(_steps(model, optimizer, 2))
        assert all(entry for entry in optimizer.state.values()) and len(optimizer.state) == 4
    assert len(ends) == 1


def _moved_away_and_back(group: dist.ProcessGroup, options: dict[str, Any], bf16: bool) -> bool:
    """Trainers move a state to the host and back, which makes other tensors of it."""
    ends = []
    for move in (False, True):
        model, optimizer = make(group, Standing().bfloat16() if bf16 else Standing(), **options)
        train(group, model, optimizer, [0])
        if move:
            for entry in optimizer.state.values():
                for key, value in entry.items():
                    entry[key] = value.clone() if isinstance(value, Tensor) else value
        train(group, model, optimizer, [1])
        ends.append(digest({**weights(model, optimizer), **state_tensors(optimizer)}))
    return ends[0] == ends[1]


@pytest.mark.parametrize(
    ("bf16", "options"), [(True, {}), (True, {"master_format": "remainder"}), (False, {"momentum_dtype": torch.int8})]
)
def test_a_state_that_was_moved_away_and_back_is_the_same(spawn, bf16: bool, options: dict[str, Any]) -> None:
    assert spawn(_moved_away_and_back, 2, bf16=bf16, options=options) == [True, True]


def _whole_given(group: dist.ProcessGroup) -> tuple[str, str]:
    """Momentum given as whole tensors is cut as this rank's part is; state_dict takes it over before any step."""
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    given = {}
    for (fqn, param), number in zip(optimizer._named(), range(100)):
        entry = optimizer.state[param]
        if "momentum_buffer" in entry:
            given[fqn] = entry["momentum_buffer"] = torch.full(param.shape, float(number))
    found = {k.removesuffix(".momentum_buffer"): v for k, v in state_tensors(optimizer).items() if "momentum" in k}
    return digest(given), digest(found)


def test_an_entry_may_be_given_whole(spawn) -> None:
    for given, found in spawn(_whole_given, 2):
        assert given == found


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("momentum_buffer", torch.ones(3), r"\(3,\) torch\.float32"),
        ("momentum_buffer", None, "None"),
        ("momentum_buffer", 0.0, r"0\.0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(key: str, value: Any, found: str) -> None:
    model, optimizer = _small()
    before = _steps(model, optimizer)
    own = optimizer.state[model[0].weight][key]
    optimizer.state[model[0].weight][key] = value
    with pytest.raises(
        ValueError, match=rf"optimizer\.state\[0\.weight\]\['{key}'\]: found {found} in place of .*copy_"
    ):
        optimizer.step()
    optimizer.state[model[0].weight][key] = own
    assert digest({**weights(model, optimizer), **state_tensors(optimizer)}) == before


def test_entries_that_users_add_are_saved_and_come_back() -> None:
    """A hook's counter was lost once buffers existed; a wrapper's slow weights would have been as well."""
    model, optimizer = _small()
    optimizer.register_state_dict_pre_hook(lambda opt: opt.state.__setitem__("asked", opt.state.get("asked", 0) + 1))
    assert optimizer.state_dict()["state"] == {"asked": 1}
    _take(model, optimizer)
    slow = torch.arange(8.0)
    optimizer.state[model[0].bias]["slow"] = slow
    saved = optimizer.state_dict()
    asked = saved["state"]["asked"]
    assert asked >= 2 and torch.equal(saved["state"][2]["slow"], slow)
    _take(model, optimizer)  # an entry beside ours disturbs no step
    assert optimizer.state[model[0].bias]["slow"] is slow

    other_model, other = _small()
    other.state["forgotten"] = 1
    other.load_state_dict(saved)
    assert other.state["asked"] == asked and "forgotten" not in other.state
    assert torch.equal(other.state[other_model[0].bias]["slow"], slow)
    assert set(other.state[other_model[2].bias]) == {"exp_avg", "exp_avg_sq", "step"}
    other.load_state_dict(other.state_dict(), on_route_change="reset")
    assert other.state["asked"] == asked and "slow" in other.state[other_model[0].bias]
