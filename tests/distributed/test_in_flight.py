"""What happens to parameters between steps: read, written, saved, replaced, while their all-gather may be in flight
(overlap="forward") or has arrived.

Each test tells a bug that a review found in the first version of this library. A slow peer (its all-gathers start late)
makes "in flight" certain where a fast machine would hide it.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
import distmuon.step.param_gather
from tests.standing import Standing
from tests.training import digest, make, state_tensors, train, weights


class slow_peer:
    """Every rank but the first starts its all-gathers late, so that on rank 0 they are in flight for sure."""

    def __init__(self, group: dist.ProcessGroup, seconds: float = 0.3) -> None:
        self.late, self.seconds = dist.get_rank(group) > 0, seconds

    def __enter__(self) -> None:
        self.original = original = distmuon.step.param_gather.Parameters.start
        pause = self.seconds if self.late else 0.0

        def start(transport: Any) -> None:
            time.sleep(pause)
            original(transport)

        distmuon.step.param_gather.Parameters.start = start  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        distmuon.step.param_gather.Parameters.start = self.original  # type: ignore[method-assign]


class Pair(nn.Module):
    """Two matrices and an embedding whose weight the root uses before any child is called."""

    def __init__(self, sneak: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(8, 12)
        self.mid = nn.Linear(12, 10)
        self.out = nn.Linear(10, 8)
        self.sneak = sneak

    def forward(self, x: Tensor) -> Tensor:
        looked_up = self.table.weight.square() if self.sneak else self.table(torch.arange(8))
        x = torch.tanh(x @ looked_up)
        return self.out(torch.tanh(self.mid(x)))


def _step(model: nn.Module, optimizer: Any, seed: int = 0) -> None:
    model(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _in_flight(group: dist.ProcessGroup, act: str) -> tuple[str, Any]:
    """Two steps; `act` follows the second one while the all-gathers are in flight on rank 0. (error, result)."""
    model, optimizer = make(group, Pair(), routes=None, bucket_mb=1e-4, overlap="forward")
    _step(model, optimizer)
    with slow_peer(group):
        _step(model, optimizer, 1)
    try:
        if act == "evaluate":
            model.sneak = True  # without gradients no backward would notice
            with torch.no_grad():
                got = model(torch.ones(8, 8))
            optimizer.synchronize()
            with torch.no_grad():
                return "", torch.equal(got, model(torch.ones(8, 8)))
        if act == "save a part":
            saved = {key: value.clone() for key, value in model.mid.state_dict().items()}
            optimizer.synchronize()
            return "", all(torch.equal(value, saved[key]) for key, value in model.mid.state_dict().items())
        if act == "load a part":
            model.mid.load_state_dict({key: torch.full_like(v, 7.0) for key, v in model.mid.state_dict().items()})
            optimizer.synchronize()
            return "", bool((model.mid.weight == 7.0).all())
        with torch.no_grad():
            model.out.bias.clamp_(-1e-4, 1e-4)
        optimizer.synchronize()
        return "", None
    except ValueError as error:
        optimizer._engine.wait_params([0, 1, 2, 3])  # let the other buckets arrive, so that ranks stay in step
        return str(error), None


@pytest.mark.parametrize("act", ["evaluate", "save a part", "load a part"])
def test_what_waits_by_itself(spawn, act: str) -> None:
    """Evaluation, and the state dict of a submodule, were stale or lost on the rank whose gathers were in flight."""
    for error, right in spawn(_in_flight, 2, act=act, timeout=30):
        assert not error and right, (act, error)


def test_a_write_in_flight_raises(spawn) -> None:
    """`clamp_` right after `step` was overwritten by the all-gather, on some ranks, without a word."""
    for error, _ in spawn(_in_flight, 2, act="write", timeout=30):
        assert error.startswith("out.bias: it was written while its all-gather was in flight; ")
        assert "optimizer.synchronize()" in error


def _sneak(group: dist.ProcessGroup, bucket_mb: float) -> str:
    model, optimizer = make(group, Pair(sneak=True), routes=None, bucket_mb=bucket_mb, overlap="forward")
    try:
        with slow_peer(group, 0.1):
            _step(model, optimizer)
            _step(model, optimizer, 1)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("bucket_mb", "wanted"),
    [(1e-4, "table.weight: it was used in forward before its all-gather"), (1.0, "modified by an inplace operation")],
    ids=["nobody waited", "a later module waited for the same bucket"],
)
def test_a_weight_used_before_it_arrived_is_noticed_in_backward(spawn, bucket_mb: float, wanted: str) -> None:
    """The root read `table.weight` before any module had waited for it, and trained on a stale one."""
    for error in spawn(_sneak, 2, bucket_mb=bucket_mb, timeout=30):
        assert wanted in error


def _orders(group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    model, optimizer = make(group, Pair(), routes=None, bucket_mb=1e-4, overlap="forward")
    _step(model, optimizer)
    started, waited = [], []
    for bucket in optimizer._engine.buckets:
        bucket.start_param_gather = lambda bucket=bucket: (
            started.append(bucket.index),
            type(bucket).start_param_gather(bucket),
        )
        bucket.wait_params = lambda bucket=bucket: (waited.append(bucket.index), type(bucket).wait_params(bucket))
    _step(model, optimizer, 1)
    model(torch.ones(8, 8))
    return started, waited


def test_gathers_start_in_the_order_in_which_the_forward_waits(spawn) -> None:
    """They started in backward's order: on NCCL, one stream, the first layer's wait was a wait for all."""
    for started, waited in spawn(_orders, 2):
        assert len(started) > 2 and started == sorted(started, reverse=True)
        assert waited[-len(started) :] == started, "table, mid, out"


# ------------------------------------------------------------------------------------- foreign writes and masters


def _masters(optimizer: Any) -> dict[str, Tensor]:
    return {key: value for key, value in state_tensors(optimizer).items() if key.endswith(".master")}


def _rewrites(group: dist.ProcessGroup, how: str) -> tuple[bool, bool]:
    """bf16: (masters kept their bits over a rewrite of equal values, a real write was taken over by the next step)."""
    model, optimizer = make(group, Standing().bfloat16())
    train(group, model, optimizer, range(2))
    optimizer.synchronize()
    before = digest(_masters(optimizer))
    values = {fqn: value.clone() for fqn, value in model.state_dict().items()}
    if how == "load_state_dict":
        model.load_state_dict(values)
    else:  # an EMA swap through .data, there and back
        for fqn, param in model.named_parameters():
            param.data.zero_()
            param.data.copy_(values[fqn])
    for group_ in optimizer.param_groups:
        group_["lr"] = 0.0
    optimizer.step()  # no gradients, lr 0: nothing may change
    kept = digest(_masters(optimizer)) == before
    for param in model.parameters():
        param.data.mul_(2)
    wanted = {fqn: param.detach().clone() for fqn, param in model.named_parameters()}
    train(group, model, optimizer, [2])  # lr 0
    ends = weights(model, optimizer)
    return kept, all(torch.equal(ends[fqn], value) for fqn, value in wanted.items())


@pytest.mark.parametrize("how", ["load_state_dict", "data"])
def test_foreign_writes_keep_the_masters_precision_and_are_not_undone(spawn, how: str) -> None:
    """Any in-place write rounded the fp32 master to bf16, even of equal values; a write through .data was undone."""
    assert all(kept and taken for kept, taken in spawn(_rewrites, 3, how=how))


# ------------------------------------------------------------------------------------------- what is replaced


def test_parameters_replaced_after_the_build_raise() -> None:
    """`load_state_dict(assign=True)` left the optimizer training tensors that the model no longer held."""
    model, optimizer = make(None, Pair(), routes=None)
    _step(model, optimizer)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="no longer the one that the model holds"):
        _step(model, optimizer)


def test_param_groups_with_other_parameters_raise() -> None:
    """Engines put fp32 copies into the groups; the copies got nothing and nobody said so."""
    model, optimizer = make(None, Pair(), routes=None)
    _step(model, optimizer)
    copies = [nn.Parameter(param.detach().clone()) for param in optimizer.param_groups[0]["params"]]
    optimizer.param_groups[0]["params"] = copies
    with pytest.raises(ValueError, match=r"param_groups: they hold .*do not use other optimizers' wrappers"):
        _step(model, optimizer)


def test_new_param_group_dicts_are_obeyed() -> None:
    """The walk kept the list of construction: a replaced list with lr 0 still moved the weights."""
    model, optimizer = make(None, Pair(), routes=None)
    _step(model, optimizer)
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    before = digest(dict(model.named_parameters()))
    _step(model, optimizer)
    assert digest(dict(model.named_parameters())) == before


# ----------------------------------------------------------------------------------------------- first use


def _evaluate_on_rank_0(group: dist.ProcessGroup) -> str:
    model, optimizer = make(group, Pair(), routes=None)
    if dist.get_rank(group) == 0:
        with torch.inference_mode():
            model(torch.ones(8, 8))
    _step(model, optimizer)
    return digest(weights(model, optimizer))


def test_one_rank_may_evaluate_before_training(spawn) -> None:
    """The first forward built the buffers, also on one rank alone (a hang) and in inference mode (a crash)."""
    assert len(set(spawn(_evaluate_on_rank_0, 3, timeout=20))) == 1


def _named_pairs(group: dist.ProcessGroup) -> None:
    torch.manual_seed(dist.get_rank(group))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pairs = list(model.named_parameters())
    _step(model, distmuon.DistMuon(pairs, process_group=group, routes=[distmuon.Route("*weight", "muon")]))


def test_values_that_differ_after_the_first_forward_raise(spawn_raises) -> None:
    """Without a module there is no forward to build in: rank 0's values came after the forward had used other ones."""
    messages = spawn_raises(_named_pairs, 2, match="0.weight: rank 1 starts from other values than rank 0", timeout=10)
    assert len(set(messages)) == 1


# -------------------------------------------------------------------------------------------- refusals


def test_states_with_other_keys_raise() -> None:
    """A state keyed by names, or by JSON's strings, reset all momentum."""
    model, optimizer = make(None, Pair(), routes=None)
    _step(model, optimizer)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="the state has an entry '0'"):
        optimizer.load_state_dict({**saved, "state": {str(key): value for key, value in saved["state"].items()}})
    with pytest.raises(ValueError, match="the state of the same rule is needed"):
        optimizer.load_state_dict({**saved, "state": {key: {"exp_avg": torch.zeros(1)} for key in saved["state"]}})


def test_a_refused_load_changes_nothing() -> None:
    model, optimizer = make(None, Pair(), routes=None)
    _step(model, optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"], saved["param_groups"][0]["weight_decay"] = 0.5, -1.0
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=r"weight_decay: found -1\.0"):
        optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in before]


def test_a_misspelt_route_option_raises() -> None:
    route = distmuon.Route("*norm*", "adamw", options={"weigth_decay": 0.0})
    with pytest.raises(ValueError, match=r"option 'weigth_decay' in its route; one of .*weight_decay"):
        make(None, Standing(), routes=[*_standing_routes(), route])


def _standing_routes() -> tuple[Any, ...]:
    from tests.standing import routes

    return routes()
