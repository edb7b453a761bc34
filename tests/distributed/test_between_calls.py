"""What may come between backward, clip and step: skipped branches, forgotten steps, states, loads, a scaler that skips.

Each of these once lost an update, a state or the ranks' common order without a word.
"""

from __future__ import annotations

import gc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from tests.training import digest, state_tensors, weights

WIDTHS = (8, 72, 24, 72, 72, 56)


class Branched(nn.Module):
    """A trunk, and a branch that a forward may leave out; some of its weights are staged."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(24, 40, bias=False)
        self.c = nn.Linear(40, 8, bias=False)
        self.branch = nn.Sequential(*[nn.Linear(m, n, bias=False) for m, n in pairwise(WIDTHS)])

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        h = self.c(torch.sin(self.a(x)))
        return h.square().mean() + (self.branch(h).square().mean() if branch else 0.0)


def _made(group: dist.ProcessGroup, **options: Any) -> tuple[Branched, Any, Tensor]:
    model = Branched()
    given = {"lr": 0.05, "bucket_mb": 0.0505, "routes": [distmuon.Route("*weight", "muon")], **options}
    inputs = torch.randn(4, 24, generator=torch.Generator().manual_seed(dist.get_rank(group)))
    return model, distmuon.DistMuon(model, process_group=group, **given), inputs


def _step(model: Branched, optimizer: Any, inputs: Tensor, branch: bool = True) -> None:
    model(inputs, branch).backward()
    optimizer.step()
    optimizer.zero_grad()


def _clipped_while_in_flight(group: dist.ProcessGroup, wait: bool) -> tuple[str, int]:
    model, optimizer, inputs = _made(group, overlap="forward")
    _step(model, optimizer, inputs)
    if wait:
        optimizer.synchronize()
    model(inputs, False).backward()  # waits for none of the branch's buckets
    optimizer.clip_grad_norm_(1e9)
    optimizer.step()
    return digest(weights(model, optimizer)), sum(len(b.staged_here) for b in optimizer._engine.storage.buckets)


def test_clipping_after_a_forward_that_skipped_a_branch_keeps_its_update(spawn) -> None:
    """Staged weights were read before their all-gather had arrived, and the update before was lost on all ranks."""
    waited, found = (spawn(_clipped_while_in_flight, 2, wait=wait) for wait in (True, False))
    assert found == waited and sum(staged for _, staged in found) > 0


def _ranks_differ(group: dist.ProcessGroup, act: str, overlap: Any) -> str:
    """A backward in which rank 0 alone uses the branch, and then something else than a step."""
    model, optimizer, inputs = _made(group, packing="contiguous", bucket_mb=0.01, overlap=overlap)
    _step(model, optimizer, inputs)
    if act != "nothing":
        model(inputs, dist.get_rank(group) == 0).backward()
    if act == "state":
        optimizer.synchronize()
        assert any(optimizer.state_dict()["state"].values())
    optimizer.zero_grad()
    _step(model, optimizer, inputs)
    return digest(weights(model, optimizer))


@pytest.mark.parametrize("overlap", [True, "forward"])
def test_ranks_stay_in_step_where_a_backward_is_not_followed_by_a_step(spawn, overlap: Any) -> None:
    """They had started different reductions; the state's collectives, went between these."""
    wanted = spawn(_ranks_differ, 2, act="nothing", overlap=overlap)
    for act in ("forget", "state"):
        assert spawn(_ranks_differ, 2, act=act, overlap=overlap) == wanted, act


def _consolidated(group: dist.ProcessGroup, folder: str) -> list[bool]:
    model, optimizer, inputs = _made(group)
    _step(model, optimizer, inputs)
    distmuon.save_checkpoint(folder, model, optimizer)
    saved = digest(state_tensors(optimizer))
    _step(model, optimizer, inputs)
    optimizer.consolidate_state_dict()
    distmuon.load_checkpoint(folder, model, optimizer)
    fresh = digest(state_tensors(optimizer)) == saved
    optimizer.consolidate_state_dict()
    model.load_state_dict(model.state_dict())
    return [fresh, optimizer._consolidated is None]


def test_a_load_ends_what_was_consolidated(spawn, tmp_path) -> None:
    assert spawn(_consolidated, 2, folder=str(tmp_path / "step")) == [[True, True]] * 2


def _after_an_overflow(group: dist.ProcessGroup, external: bool) -> tuple[bool, float, int]:
    """One overflow, and a loop that clears gradients by the model's zero_grad, as many do."""
    model, optimizer, inputs = _made(group, grad_reduction="external" if external else "reduce_scatter")
    inputs = torch.ones(4, 24)  # the same on all ranks: averaged already
    scaler = distmuon.GradScaler("cpu", init_scale=256.0)
    for step in range(4):
        loss = model(inputs, True) * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        before = model.a.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.synchronize()
        moved = not torch.equal(before, model.a.weight)
        model.zero_grad()
        assert moved == (step != 1), step
    return moved, scaler.get_scale(), optimizer.metrics()["skipped_steps"]


@pytest.mark.parametrize("external", [False, True])
def test_a_scaler_that_skips_lets_training_go_on_and_counts(spawn, external: bool) -> None:
    assert spawn(_after_an_overflow, 2, external=external) == [(True, 128.0, 1)] * 2


def _left_out(group: dist.ProcessGroup) -> list[float]:
    model, optimizer, _ = _made(group, grad_reduction="external")
    norms = []
    for size in (100.0, 1.0):
        model(torch.full((4, 24), 0.01) * size, True).backward()
        norms.append(float(optimizer.clip_grad_norm_(1e-3)))
        model.zero_grad()  # and no step
    exact = Branched()
    exact(torch.full((4, 24), 0.01), True).backward()
    return [*norms, float(torch.nn.utils.get_total_norm([p.grad for p in exact.parameters() if p.grad is not None]))]


def test_external_gradients_of_a_step_that_was_left_out_are_not_used(spawn) -> None:
    """The clipped gradient of the step before was applied in the place of the next."""
    for first, second, exact in spawn(_left_out, 2):
        assert second == pytest.approx(exact, rel=1e-5) and first > 2 * second


def _drop_optimizer(group: dist.ProcessGroup, gather: str, keep: bool) -> str:
    model = Branched()

    def trained() -> Any:
        inputs = torch.randn(4, 24, generator=torch.Generator().manual_seed(dist.get_rank(group)))
        options = {"bucket_mb": 0.0505, "param_gather": gather, "overlap": "forward"}
        optimizer = distmuon.DistMuon(model, lr=0.05, process_group=group, **options)
        for _ in range(2):
            _step(model, optimizer, inputs)
        assert optimizer._engine.must_wait
        return optimizer if keep else None

    kept = [trained()]
    gc.collect()
    state = digest(dict(model.state_dict()))
    kept.clear()
    return state


@pytest.mark.promise(
    "Faults while training",
    "The last update reaches the model though the optimizer is dropped right after its step",
)
@pytest.mark.parametrize("gather", ["parameters", "updates"])
def test_a_dropped_optimizer_leaves_its_last_update_to_the_model(spawn, gather: str) -> None:
    """`def train(): ...; return model` once returned weights that were still under way, on each rank others."""
    kept = spawn(_drop_optimizer, 2, gather=gather, keep=True)
    assert len(set(kept)) == 1
    assert spawn(_drop_optimizer, 2, gather=gather, keep=False) == kept


def test_the_state_of_before_the_first_step_is_none() -> None:
    """Loading it must end momentum and counters, as with torch.optim: learning-rate finders go back to it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    optimizer = distmuon.DistMuon(model, lr=0.05, routes=[distmuon.Route("*weight", "muon")])
    begin, start = optimizer.state_dict(), {key: value.clone() for key, value in model.state_dict().items()}

    def run() -> str:
        for _ in range(2):
            model(torch.eye(8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return digest({**weights(model, optimizer), **state_tensors(optimizer)})

    first = run()
    model.load_state_dict(start)
    optimizer.load_state_dict(begin)
    assert all(not tensor.any() for key, tensor in state_tensors(optimizer).items() if not key.endswith("master"))
    assert run() == first


def _other_calls(group: dist.ProcessGroup, call: str, folder: str) -> str:
    """What talks to the other ranks, after a backward in which the ranks used different branches."""
    model, optimizer, inputs = _made(group, packing="contiguous", bucket_mb=0.01)
    _step(model, optimizer, inputs)
    if call == "load":
        distmuon.save_checkpoint(f"{folder}/a-1", model, optimizer)
    if call in ("save", "finish"):
        distmuon.save_checkpoint(f"{folder}/a-1", model, optimizer, asynchronous=True)
    if call == "alone":
        optimizer.consolidate_state_dict()
    model(inputs, call != "alone" and dist.get_rank(group) == 0).backward()
    if call == "verify":
        distmuon.verify_parameters(model, optimizer)
    elif call == "load":
        distmuon.load_checkpoint(folder, model, optimizer)
    elif call == "save":
        distmuon.save_checkpoint(f"{folder}/a-2", model, optimizer)
    elif call == "finish":
        distmuon.finish_saves(optimizer)
    elif dist.get_rank(group) == 0:
        optimizer.state_dict()
    if call == "alone":
        dist.barrier(group)
    optimizer.step()
    return digest(weights(model, optimizer))


@pytest.mark.promise(
    "Faults while training",
    "Saves, loads and checks between a backward and its step wait for the reductions that the "
    "backward began, even if ranks used different branches",
)
@pytest.mark.parametrize("call", ["verify", "load", "save", "finish", "alone"])
def test_whatever_talks_to_other_ranks_first_ends_what_a_backward_began(spawn, call: str, tmp_path: Path) -> None:
    assert len(set(spawn(_other_calls, 2, call=call, folder=str(tmp_path)))) == 1


def _verified_without_backward(group: dist.ProcessGroup) -> str:
    model, optimizer, inputs = _made(group, verify_every=2)
    _step(model, optimizer, inputs)
    if dist.get_rank(group) == 0:
        model(inputs, True).backward()  # rank 1 has no data left
    optimizer.step()
    return digest(weights(model, optimizer))


def test_a_rank_without_a_backward_verifies_with_the_others(spawn) -> None:
    """It compared bits while the others still reduced."""
    assert len(set(spawn(_verified_without_backward, 2))) == 1


def _bad_on_one_rank(group: dist.ProcessGroup, what: str) -> None:
    model, optimizer, inputs = _made(group)
    _step(model, optimizer, inputs)
    if dist.get_rank(group) == 1 and what == "lr":
        optimizer.param_groups[0]["lr"] = float("nan")
    if dist.get_rank(group) == 1 and what == "hook":
        optimizer.register_load_state_dict_pre_hook(lambda *_: {}["absent"])
    if what == "lr":
        distmuon.verify_parameters(model, optimizer)
    else:
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(("what", "match"), [("lr", r"param_groups\[0\]\.lr: found nan"), ("hook", "rank 1: KeyError")])
def test_what_is_wrong_on_one_rank_raises_on_all(spawn_raises, what: str, match: str) -> None:
    """It raised there, and the others waited."""
    spawn_raises(_bad_on_one_rank, 2, match=match, what=what)
