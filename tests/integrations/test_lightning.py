"""Lightning's Trainer with DistMuon in external mode: bit for bit what the same loop by hand does with DDP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distmuon
from tests import forks

WAYS = ["plain", "clip and accumulation", "clip by value", "bf16-mixed", "bf16-true"]
Ranks = list[dict[str, Any]]


def run(folder: Path, nproc: int, grad_reduction: str) -> Ranks:
    pytest.importorskip("lightning.pytorch", reason="pip install distmuon[lightning]")
    given = ("tests.integrations.lightning_worker", str(folder), grad_reduction)
    done = forks.python(*given, timeout=560) if nproc == 1 else forks.torchrun(*given, nproc=nproc, timeout=560)
    assert done.returncode == 0, done.stdout[-6000:]
    ranks: Ranks = json.loads((folder / "found.json").read_text())
    return ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run(tmp_path_factory.mktemp("lightning"), 2, "external")


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks) -> Ranks:
    return two_ranks if request.param == 2 else run(tmp_path_factory.mktemp("lightning"), 1, "external")


def check(found: Ranks, way: str) -> None:
    for rank in found:
        trainer, plain = rank[way]
        assert trainer == plain
    if isinstance(found[0][way][0], dict):
        assert len({str(rank[way][0]["whole"]) for rank in found}) == 1 and len(found[0][way][0]["losses"]) >= 4
    else:
        assert len({rank[way][0] for rank in found}) == 1


@pytest.mark.supports("weights, state and logged norms bit-equal to the plain loop", "Lightning")
@pytest.mark.supports("accumulation, clipping, bf16 weights", "Lightning")
@pytest.mark.supports("bf16 autocast", "Lightning")
@pytest.mark.supports("clipping by value", "Lightning")
@pytest.mark.supports("save and resume, bit-equal", "Lightning")
@pytest.mark.parametrize("way", WAYS)
def test_lightnings_trainer_equals_the_loop_by_hand(found: Ranks, way: str) -> None:
    """Automatic optimization, and a run that goes on from a ModelCheckpoint of its middle. With bf16-mixed a clip was
    refused for a GradScaler that is not there."""
    check(found, way)


@pytest.mark.supports("several models and optimizers", "Lightning")
@pytest.mark.parametrize("second", ["muon", "adamw"])
def test_manual_optimization_of_two_networks_equals_the_loop_by_hand(found: Ranks, second: str) -> None:
    """`self.optimizers()` are wrappers that borrow our class; their `zero_grad` was refused."""
    check(found, f"manual, {second}")


@pytest.mark.refuses("DDP around the model, not silenced", "Lightning", use='`grad_reduction="external"`')
def test_without_external_mode_two_processes_are_refused(two_ranks: Ranks) -> None:
    for rank in two_ranks:
        assert "DistributedDataParallel: it runs the model" in rank["default"]
        assert rank["default"].endswith('(Lightning\'s Trainer): grad_reduction="external"')


def test_in_one_process_the_default_mode_equals_the_loop_by_hand(tmp_path: Path) -> None:
    found = run(tmp_path, 1, "reduce_scatter")
    for way in [*WAYS, "manual, muon", "manual, adamw"]:
        check(found, way)


class Wrapper:
    """As Lightning's and Fabric's: it passes for the class of what it wraps, and forwards what it does not find."""

    def __init__(self, wrapped: distmuon.DistMuon) -> None:
        self._optimizer = wrapped
        self.__class__ = type("Wrapped", (self.__class__, wrapped.__class__), {})

    def step(self, closure: Any = None) -> str:
        return f"the wrapper's own, then {self._optimizer.step(closure)}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _made() -> tuple[nn.Sequential, distmuon.DistMuon]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4))
    return model, distmuon.DistMuon(model, lr=0.02)


def test_a_wrapper_that_borrows_the_class_leads_to_the_optimizer() -> None:
    """What it wrote stayed in the wrapper: `no_sync` and `set_requires_gradient_sync` were not heard."""
    model, optimizer = _made()
    wrapped: Any = Wrapper(optimizer)
    assert isinstance(wrapped, distmuon.DistMuon)
    wrapped.set_requires_gradient_sync(False)
    assert optimizer._sync is False and "_sync" not in vars(wrapped)
    with wrapped.no_sync():
        model(torch.ones(2, 12)).sum().backward()
    wrapped.zero_grad()
    model(torch.ones(2, 12)).sum().backward()
    assert float(wrapped.clip_grad_norm_(1.0)) > 1.0
    assert wrapped.step() == "the wrapper's own, then None"
    assert wrapped.overflow is False and float(wrapped._global_grad_norm) == wrapped.metrics()["grad_norm"] > 0.0
    wrapped.consolidate_state_dict()
    assert optimizer._consolidated is not None and set(vars(wrapped)) == {"_optimizer"}
    optimizer.zero_grad = lambda: "exchanged"  # type: ignore[assignment]  # as schedulers do with step
    assert wrapped.zero_grad() == "exchanged"


def test_a_subclass_with_a_mixin_of_its_own_is_its_own_optimizer() -> None:
    class Counting:
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)  # type: ignore[misc]

    class Ours(Counting, distmuon.DistMuon):
        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none)
            self.cleared = True

    model, _ = _made()
    optimizer = Ours(model, lr=0.02)
    model(torch.ones(2, 12)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.steps == 1 and optimizer.cleared and optimizer.metrics()["grad_norm"] > 0.0
