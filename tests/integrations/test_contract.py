"""What trainers ask of the optimizer itself: a state for one rank alone, storages, norms, skips."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distmuon
from distmuon import optimizer as distmuon_optimizer
from distmuon.comm import lost_ranks as roll_call
from distmuon.step.hooks import _over_own_storage
from tests.standing import Standing, loss_fn, make_batch
from tests.training import backward, digest, make, state_tensors, train, weights


def _consolidated(group: dist.ProcessGroup) -> tuple[str, str, str, list[float], bool]:
    """Rank 0 alone asks after all consolidated; the others have gone on to a collective of their own."""
    model, optimizer = make(group)
    train(group, model, optimizer, range(2))
    collective = digest(state_tensors(optimizer))
    optimizer.consolidate_state_dict()
    alone = ""
    if dist.get_rank(group) == 0:
        for param_group in optimizer.param_groups:
            param_group["lr"] = 0.5  # a scheduler's change after the gathering is in the answer
        state = optimizer.state_dict()
        alone = digest(_tensors(state))
        assert {g["lr"] for g in state["param_groups"]} == {0.5}
        for param_group in optimizer.param_groups:
            param_group["lr"] = 0.02
    token = torch.ones(1)
    dist.all_reduce(token, group=group)
    train(group, model, optimizer, [2])
    after = digest(state_tensors(optimizer))  # gathered anew: the step let the consolidated one go
    return collective, alone, after, token.tolist(), optimizer._consolidated is None


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    names = {n: fqn for g in state["param_groups"] for n, fqn in zip(g["params"], g["param_names"], strict=True)}
    return {f"{names[n]}.{k}": v for n, entries in state["state"].items() for k, v in entries.items()}


@pytest.mark.parametrize("dp_size", [2, 3])
def test_one_rank_may_ask_for_a_consolidated_state_until_the_next_step(spawn, dp_size: int) -> None:
    results = spawn(_consolidated, dp_size)
    collective, alone, after, token, freed = results[0]
    assert alone == collective != after
    assert token == [dp_size] and freed
    assert {r[0] for r in results} == {collective} and {r[2] for r in results} == {after}


@contextmanager
def _hasty() -> Iterator[None]:
    """Meetings that end soon, and no word of where a rank stands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distmuon_optimizer, "MEETING_S", 1.0)
        patch.setattr(roll_call, "SAY_S", 0.0)
        patch.setattr(roll_call, "LOOK_S", 0.3)
        yield


def _alone(group: dist.ProcessGroup, ask: str) -> tuple[str, str, bool]:
    """Only the last rank asks; nothing is left half done: training goes on, and a joint call is answered."""
    model, optimizer = make(group)
    if ask != "full_state_dict":
        train(group, model, optimizer, [0])
    message = ""
    if dist.get_rank(group) == 1:
        with _hasty(), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                getattr(optimizer, ask)()
            except ValueError as error:
                message = f"{said.getvalue()}|{error}"
    dist.barrier(group)
    if ask == "full_state_dict":
        train(group, model, optimizer, [0])
    train(group, model, optimizer, [1])
    joint = digest(state_tensors(optimizer))
    ends = weights(model, optimizer)
    wanted_model, wanted = make(group)
    train(group, wanted_model, wanted, range(2))
    same = digest(ends) == digest(weights(wanted_model, wanted)) and joint == digest(state_tensors(wanted))
    return message, joint, same


@pytest.mark.parametrize("ask", ["state_dict", "consolidate_state_dict", "full_state_dict"])
def test_a_rank_that_asks_alone_is_told_who_is_missing_and_nothing_hangs(spawn, ask: str) -> None:
    results = spawn(_alone, 3, ask=ask)
    assert results[0][0] == results[2][0] == ""
    said, message = results[1][0].split("|")
    assert said.count("\n") == 1 and said.startswith(f"distmuon: {ask} on rank 1: waits for ranks [0, 2]"), said
    assert message.startswith(f"{ask} on rank 1: ranks [0, 2] did not call it within 1 s; the state is spread")
    assert all("consolidate_state_dict() on all ranks first" in text for text in (said, message))
    assert len({joint for _, joint, _ in results}) == 1 and all(same for *_, same in results)


def _in_the_next_step(group: dist.ProcessGroup) -> tuple[str, float, str]:
    """Rank 0 asks alone; the other trains on, and its step waits for rank 0, which goes on after it was told."""
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    message, seconds = "", 0.0
    if dist.get_rank(group) == 0:
        start = time.monotonic()
        try:
            optimizer.state_dict()
        except ValueError as error:
            message, seconds = str(error), time.monotonic() - start
    train(group, model, optimizer, [1])
    return message, seconds, digest({**weights(model, optimizer), **state_tensors(optimizer)})


def test_a_rank_whose_peers_train_on_is_told_at_once(spawn) -> None:
    """nanoGPT at its first checkpoint: nothing was said for 300 s. Here the limit is 25 s, which is not waited for."""
    (message, seconds, first), *others = spawn(_in_the_next_step, 3)
    assert re.match(
        r"state_dict on rank 0: ranks \[1, 2\] did not call it; rank [12] stands at \w+ .*step 2, which wai", message
    )
    assert 0 < seconds < 15
    assert {other[2] for other in others} == {first} and all(not other[0] for other in others)


def _late(group: dist.ProcessGroup) -> tuple[str, str]:
    """The last rank comes later than a meeting lasts; consolidation was told so."""
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    with _hasty():
        if dist.get_rank(group) == 1:
            time.sleep(2.5)
        optimizer.consolidate_state_dict(timeout_s=30)
    return digest(_tensors(optimizer.state_dict())), digest(state_tensors(optimizer))


def test_consolidation_can_wait_for_a_rank_that_is_late(spawn) -> None:
    assert len({text for pair in spawn(_late, 2) for text in pair}) == 1


def _on_one_rank(group: dist.ProcessGroup) -> tuple[str, str, int]:
    """After `to=1`: what rank 1 alone gets, what the others are told, and whether a step ends it."""
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    whole = digest(state_tensors(optimizer))
    optimizer.consolidate_state_dict(to=1)
    kept = len(optimizer._consolidated)
    try:
        answer = digest(_tensors(optimizer.state_dict()))
    except ValueError as error:
        answer = str(error)
    train(group, model, optimizer, [1])
    assert set(optimizer.state_dict()["state"]) == set(range(len(optimizer._params)))
    return whole, answer, kept


def test_the_state_is_kept_on_the_rank_that_is_named(spawn) -> None:
    """ZeroRedundancyOptimizer's spelling; there, too, the others raise."""
    first, second = spawn(_on_one_rank, 2)
    assert second[0] == second[1] and second[2] > 0
    assert first[2] == 0 and first[1].startswith("state_dict on rank 0: the state was consolidated on rank 1 alone; ")


@pytest.mark.parametrize("to", [-1, 1, True, 0.0, "0"])
def test_consolidation_goes_to_a_rank_of_the_group(to: Any) -> None:
    optimizer = make(None)[1]
    with pytest.raises(ValueError, match=rf"consolidate_state_dict: found to={to!r}; a rank of the group, 0 to 0"):
        optimizer.consolidate_state_dict(to=to)


def _load_forgets(group: dist.ProcessGroup) -> tuple[str, str]:
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    first = copy.deepcopy(optimizer.state_dict())
    train(group, model, optimizer, [1])
    optimizer.consolidate_state_dict()
    optimizer.load_state_dict(first, load_optimizer_states=True)  # DeepSpeed's keyword
    return digest(_tensors(first)), digest(state_tensors(optimizer))


def test_a_load_lets_the_consolidated_state_go(spawn) -> None:
    for saved, loaded in spawn(_load_forgets, 2):
        assert saved == loaded


def _cut_state(group: dist.ProcessGroup) -> None:
    """What rank 0's shard would be if somebody saved that: a flat part of each tensor, loaded on every rank."""
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        for key in [key for key in entries if key != "step"]:
            entries[key] = entries[key].reshape(-1)[: entries[key].numel() // 2]
    optimizer.load_state_dict(state)


def test_a_shard_loaded_on_every_rank_raises(spawn_raises) -> None:
    spawn_raises(_cut_state, 2, match=r"the state has shape .* is needed")


def test_no_sync_without_a_context() -> None:
    """`set_requires_gradient_sync(False)` for every backward: the reduction waits for the step."""
    ends = []
    for deferred in (False, True):
        model, optimizer = make(None)
        optimizer.set_requires_gradient_sync(not deferred)
        batches = [make_batch(0, 0, micro) for micro in range(2)]
        if deferred:
            for batch in batches:
                (loss_fn(model, batch) / 2).backward()
        else:
            optimizer.set_requires_gradient_sync(True)
            backward(model, optimizer, batches)
        optimizer.step()
        ends.append(digest(weights(model, optimizer)))
    assert ends[0] == ends[1]


def test_deepspeeds_names_for_norm_and_skipped_step() -> None:
    model, optimizer = make(None)
    assert optimizer._global_grad_norm is None and optimizer.overflow is False
    backward(model, optimizer, [make_batch(0, 0, 0)])
    with pytest.raises(ValueError, match=r"integration does not manage.*register\(\) before"):
        optimizer.get_grads_for_reduction()
    optimizer.managed_by_integration = True
    assert optimizer.get_grads_for_reduction() == ([], {})
    optimizer.step()
    assert float(optimizer._global_grad_norm) == optimizer.metrics()["grad_norm"] > 0
    assert optimizer.overflow is False
    for param in model.parameters():
        param.grad = torch.full_like(param, float("inf")) if param.requires_grad else None
    optimizer.step()
    assert optimizer.overflow is True and optimizer.overflow is True  # the engine asks, and accelerate once more
    optimizer.zero_grad()
    backward(model, optimizer, [make_batch(0, 0, 0)])
    optimizer.step()
    assert optimizer.overflow is False


def test_a_state_dict_has_a_storage_for_each_tensor_and_copies_nothing(tmp_path: Path) -> None:
    """accelerate takes tensors of one storage for copies and drops all but the first (27 were lost)."""
    model, optimizer = make(None)
    train(None, model, optimizer, [0])
    state = model.state_dict()
    params = dict(model.named_parameters())
    assert any(p.untyped_storage().nbytes() != p.nbytes for p in params.values()), "views of flat buffers"
    pointers = [tensor.untyped_storage().data_ptr() for tensor in state.values()]
    assert len(set(pointers)) == len(pointers) - 1  # the tied head shares the embedding's
    for fqn, param in params.items():
        assert state[fqn].data_ptr() == param.data_ptr() and torch.equal(state[fqn], param)
    assert all(isinstance(t, nn.Parameter) for t in model.state_dict(keep_vars=True).values())
    safetensors = pytest.importorskip("safetensors.torch", reason="pip install distmuon[accelerate]")
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    fresh = Standing(seed=5)
    safetensors.load_model(fresh, str(tmp_path / "model.safetensors"))
    assert digest(dict(fresh.named_parameters())) == digest(params)


def test_a_state_dict_asks_for_no_exchange_by_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    """DLPack refuses a tensor of a GPU that is not the current one, and so `model.state_dict()` raised there."""

    def refuse(*_: object, **__: object) -> None:
        raise BufferError("Can't export tensors on a different CUDA device index")

    monkeypatch.setattr(torch.Tensor, "__dlpack__", refuse)
    model, optimizer = make(None)
    train(None, model, optimizer, [0])
    for fqn, tensor in model.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, fqn
        assert tensor.data_ptr() == dict(model.state_dict(keep_vars=True))[fqn].data_ptr()


def test_a_storage_of_its_own_keeps_the_order_of_dimensions_and_the_memory() -> None:
    """Weights in channels_last fill one run of memory as well."""
    whole = torch.arange(240.0)
    last = whole[24:144].view(2, 5, 4, 3).permute(0, 3, 1, 2)
    own = _over_own_storage(last)
    assert own.untyped_storage().nbytes() == last.nbytes and own.stride() == last.stride()
    assert own.data_ptr() == last.data_ptr() and own.is_contiguous(memory_format=torch.channels_last)
    whole.add_(1)
    del whole, last
    assert own[0, 0, 0, 0] == 25 and own[1, 2, 4, 3] == 144  # the memory lives on


@pytest.mark.parametrize("method", ["clip_grad_norm_", "zero_grad", "reduce_gradients"])
def test_a_wrapper_that_borrows_the_class_is_refused(method: str) -> None:
    """Lightning's wrapper inherits from DistMuon and forwards reads only: its writes would stay in itself."""

    class Borrowed(distmuon.DistMuon):
        def __init__(self, inner: distmuon.DistMuon) -> None:
            object.__setattr__(self, "inner", inner)

        def __getattr__(self, name: str) -> Any:
            return getattr(object.__getattribute__(self, "inner"), name)

    model, optimizer = make(None)
    backward(model, optimizer, [make_batch(0, 0, 0)])
    arguments = [1.0] if method == "clip_grad_norm_" else []
    with pytest.raises(ValueError, match="Borrowed: it runs DistMuon's methods on itself"):
        getattr(Borrowed(optimizer), method)(*arguments)
