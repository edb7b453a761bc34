"""torch's own recipe for checkpoints, with DistMuon in the place of torch.optim.AdamW: what AdamW passes, passes.

`torch.distributed.checkpoint.state_dict` in 24 combinations: a plain model and one under DDP, loaded into an optimizer
that has stepped and one that has not, by six sets of options. A resume is right if three further steps give the bits
of the unbroken run. Two uses are refused by torch itself, for every optimizer: see `FORBIDDEN`.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel

import distmuon
from tests.training import digest, state_tensors

SAVED_WITH: dict[str, dict[str, bool]] = {
    "sharded": {},
    "offloaded": {"cpu_offload": True},
    "full": {"full_state_dict": True},
    "full, from rank 0": {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
    "full, offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},
}
# Rank 0 alone holds what was saved, and torch is not told to broadcast it.
FORBIDDEN = "full, offloaded"


@dataclass
class Run:
    """A model, wrapped or not, and its optimizer."""

    model: nn.Module
    optimizer: Any

    def steps(self, first: int, last: int) -> str:
        """Take the steps `first` to `last`, each on this rank's own batch; the digest of the weights after them.

        Two ranks have gradients: a sum of two does not depend on the order, which DDP changes after its first backward.
        """
        for step in range(first, last):
            batch = torch.randn(8, 12, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
            self.model(batch).square().mean().mul(dist.get_rank() < 2).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.synchronize()
        return digest({name.removeprefix("module."): p for name, p in self.model.named_parameters()})

    def synchronize(self) -> None:
        if isinstance(self.optimizer, distmuon.DistMuon):
            self.optimizer.synchronize()


def _run(group: dist.ProcessGroup, kind: str, seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    """`kind`: the optimizer, and "ddp" where the model is wrapped. AdamW's gradients are averaged by DDP only."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(
        nn.Linear(12, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 4)
    )
    model = model.to(dtype)
    if "ddp" in kind or "adamw" in kind:
        model = DistributedDataParallel(model, process_group=group)
        options["grad_reduction"] = "external"
    if "adamw" in kind:
        return Run(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    routes = [distmuon.Route("0.weight", "muon"), distmuon.Route("4.weight", "adamw")]
    return Run(model, distmuon.DistMuon(model, lr=1e-2, routes=routes, process_group=group, **options))


def _combinations() -> Iterator[tuple[bool, str]]:
    for built in (False, True):
        for saved_with in SAVED_WITH:
            yield built, saved_with


def _resumed(group: dist.ProcessGroup, kind: str) -> dict[tuple[bool, str], str]:
    """By combination: "" where the resumed run has the unbroken one's bits, else what went wrong."""
    found = {}
    for built, saved_with in _combinations():
        if saved_with == FORBIDDEN and built:
            continue
        options = StateDictOptions(**SAVED_WITH[saved_with])
        source = _run(group, kind, 0)
        source.steps(0, 2)
        model_state, optimizer_state = get_state_dict(source.model, source.optimizer, options=options)
        model_state, optimizer_state = deepcopy((model_state, optimizer_state))  # AdamW's are the tensors it steps on
        unbroken = source.steps(2, 5)
        other = _run(group, kind, 1)
        if built:
            other.steps(0, 1)
        if saved_with == FORBIDDEN:  # what the file of rank 0 has is read on every rank, as scripts do
            states = [(model_state, optimizer_state)]
            dist.broadcast_object_list(states, src=0)
            model_state, optimizer_state = states[0]
            options = StateDictOptions()
        try:
            # One by one: `set_state_dict` takes the empty state of ranks other than 0 for a model left out.
            set_optimizer_state_dict(other.model, other.optimizer, optimizer_state, options=options)
            set_model_state_dict(other.model, model_state, options=options)
            same = other.steps(2, 5) == unbroken
            found[built, saved_with] = "" if same else "other weights after three steps"
        except (AssertionError, RuntimeError, ValueError, KeyError) as error:
            found[built, saved_with] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.promise(
    "Plain state",
    "torch's `get_state_dict` and `set_state_dict` pass, sharded, full, from rank 0 and flattened, "
    "fresh and built, plain and DDP, with the unbroken run's bits",
)
@pytest.mark.parametrize("kind", ["distmuon", "distmuon ddp"])
def test_every_combination_that_adamw_passes(spawn, kind: str) -> None:
    for result in spawn(_resumed, 4, kind=kind, timeout=240):
        assert set(result.values()) == {""}, result
        assert len(result) == 11


@pytest.mark.slow
def test_adamw_passes_them_by_the_same_measure(spawn) -> None:
    for result in spawn(_resumed, 4, kind="adamw", timeout=240):
        assert set(result.values()) == {""}, result


def _flattened(group: dist.ProcessGroup, dtype: torch.dtype, options: dict[str, Any]) -> tuple[str, str]:
    """State and weights of the source, and of what torchtitan's form brings back in a fresh optimizer."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    ends, state = [], None
    for seed in (0, 1):
        run = _run(group, "distmuon", seed, dtype, **options)
        if state is not None:
            run.model.load_state_dict(state[0])
            set_optimizer_state_dict(run.model, run.optimizer, state[1], options=flat)
        else:
            batch = torch.randn(8, 12, generator=torch.Generator().manual_seed(dist.get_rank(group))).to(dtype)
            run.model(batch).square().mean().backward()
            run.optimizer.step()
        run.synchronize()
        weights = {key: value.clone() for key, value in run.model.state_dict().items()}
        state = (weights, get_optimizer_state_dict(run.model, run.optimizer, options=flat))
        ends.append(digest({**weights, **state_tensors(run.optimizer)}))
    return ends[0], ends[1]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"precision": distmuon.Precision(master="remainder")}),
        (torch.float32, {"precision": distmuon.Precision(momentum=torch.int8)}),
        (torch.float32, {"ns_coefficients": (3.4445, -4.7750, 2.0315)}),
    ],
)
def test_the_flattened_form_keeps_masters_and_narrow_state(spawn, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """torch unflattens what stands in `optimizer.state`, where nothing once stood."""
    for saved, loaded in spawn(_flattened, 2, dtype=dtype, options=options):
        assert saved == loaded


class AppState(Stateful):
    """The wrapper of torch's tutorial."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._run.model, self._run.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self._run.model, self._run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


def _through_files(group: dist.ProcessGroup, folder: str, save: bool) -> str:
    """The digest of weights and state: of the run that saves, or of a fresh one that loads."""
    run = _run(group, "distmuon", 0 if save else 1)
    if save:
        batch = torch.randn(8, 12, generator=torch.Generator().manual_seed(dist.get_rank(group)))
        for _ in range(2):
            run.model(batch).square().mean().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.optimizer.param_groups[0]["lr"] = 0.005
        dcp.save({"app": AppState(run)}, checkpoint_id=folder, process_group=group)
    else:
        dcp.load({"app": AppState(run)}, checkpoint_id=folder, process_group=group)
    assert run.optimizer.param_groups[0]["lr"] == 0.005
    run.synchronize()
    return digest({**dict(run.model.named_parameters()), **state_tensors(run.optimizer)})


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_the_tutorials_recipe_at_another_number_of_ranks(spawn, tmp_path: Path, dp_size: int) -> None:
    """The optimizer that loads has never stepped: torch asks it for its state, to load into it."""
    saved = spawn(_through_files, 2, folder=str(tmp_path), save=True)
    assert len(set(saved)) == 1
    assert set(spawn(_through_files, dp_size, folder=str(tmp_path), save=False)) == set(saved)


def _asked(group: dist.ProcessGroup, kind: str, ask: bool) -> tuple[str, int, bool]:
    run = _run(group, kind, 0)
    if ask:
        state = get_optimizer_state_dict(run.model, run.optimizer)
        assert all("momentum_buffer" in entry or float(entry["step"]) == 0 for entry in state["state"].values())
        assert all(not value.any() for entry in state["state"].values() for value in entry.values())
    return run.steps(0, 2), run.optimizer.metrics()["steps"], run.optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("kind", ["distmuon", "distmuon ddp"])
def test_being_asked_before_the_first_step_is_no_step(spawn, kind: str) -> None:
    """torch steps it with gradients of zero; AdamW's own bias correction notices that, ours must not."""
    asked, plain = (spawn(_asked, 2, kind=kind, ask=ask) for ask in (True, False))
    assert asked == plain and {steps for _, steps, _ in asked} == {2} and all(lr for *_, lr in asked)


def _warm_up(group: dist.ProcessGroup) -> tuple[int, bool]:
    """A first step with lr 0 and gradients is a step: momentum begins."""
    run = _run(group, "distmuon", 0)
    for param_group in run.optimizer.param_groups:
        param_group["lr"] = 0.0
    run.steps(0, 1)
    moved = any(value.any() for name, value in state_tensors(run.optimizer).items() if name.endswith("momentum_buffer"))
    return run.optimizer.metrics()["steps"], bool(moved)


def test_a_step_of_a_schedule_that_begins_at_zero_counts(spawn) -> None:
    assert spawn(_warm_up, 2) == [(1, True)] * 2


def test_a_plain_state_dict_before_the_first_step_builds_nothing() -> None:
    """accelerate asks for it and loads it before it moves the model."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = distmuon.DistMuon(model, routes=[distmuon.Route("*weight", "muon")])
    addresses = [param.data_ptr() for param in model.parameters()]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"] == {} and not optimizer.state
    assert [param.data_ptr() for param in model.parameters()] == addresses
    model.bfloat16()
    model(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
