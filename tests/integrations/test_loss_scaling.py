"""float16 under accelerate and Fabric in one process: whose scaler works, with which settings, who hears of a skip.

Bits on several ranks are compared in test_trainers.py. accelerate has no float16 on a CPU, so what it sets for it on a
GPU is planted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon

SETTINGS = {"init_scale": 64.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """As `Accelerator(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(...)])` is on a GPU."""
    accelerate = pytest.importorskip("accelerate", reason="pip install distmuon[accelerate]")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    made = accelerate.Accelerator(cpu=True)
    made.state._mixed_precision, made.native_amp = "fp16", True
    made.scaler = torch.amp.GradScaler("cpu", **SETTINGS)
    yield made
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def _made() -> tuple[nn.Module, distmuon.DistMuon]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return model, distmuon.DistMuon(model, lr=0.02, precision=distmuon.Precision(newton_schulz=torch.float32))


def _loss(model: nn.Module, step: int) -> Tensor:
    """Overflows in step 1."""
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    return model(inputs).float().square().mean() * (float("inf") if step == 1 else 1.0)


@pytest.mark.supports("fp16 with a loss scaler", "accelerate", "Trainer")
def test_accelerates_scaler_is_exchanged_and_its_schedulers_hear_of_a_skip(accelerator: Any) -> None:
    from distmuon.integrations.accelerate import prepare

    model, optimizer = _made()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    model, wrapped, scheduler = prepare(accelerator, model, optimizer, scheduler)
    assert isinstance(accelerator.scaler, distmuon.GradScaler) and wrapped.scaler is accelerator.scaler
    seen = []
    for step in range(5):
        accelerator.backward(_loss(model, step))
        norm = accelerator.clip_grad_norm_(model.parameters(), 100.0)
        wrapped.step()
        scheduler.step()
        wrapped.zero_grad()
        skipped = wrapped.step_was_skipped
        assert skipped == accelerator.optimizer_step_was_skipped and (skipped or float(norm) < 10.0), "unscaled"
        seen.append((skipped, accelerator.scaler.get_scale(), scheduler.get_last_lr()[0]))
    # backoff by a quarter, growth by four after three good steps; no schedule step where the optimizer took none
    assert [s for s, *_ in seen] == [False, True, False, False, False]
    assert [s for _, s, _ in seen] == [64.0, 16.0, 16.0, 16.0, 64.0]
    assert [lr for *_, lr in seen] == pytest.approx([0.02 / n for n in (2, 2, 3, 4, 5)])
    assert optimizer.metrics()["skipped_steps"] == 1


def test_accelerates_own_prepare_with_float16_serves_in_one_process(accelerator: Any) -> None:
    """Without ours torch's scaler is in place; `param.grad` stays there for it, so it was refused for nothing."""
    from distmuon.integrations.accelerate import prepare

    ends = []
    for own in (True, False):
        model, optimizer = _made()
        model, wrapped = accelerator.prepare(model, optimizer) if own else prepare(accelerator, model, optimizer)
        scales = []
        for step in range(3):
            accelerator.backward(_loss(model, step))
            wrapped.step()
            wrapped.zero_grad()
            scales.append((wrapped.step_was_skipped, accelerator.scaler.get_scale()))
        assert [skipped for skipped, _ in scales] == [False, True, False]
        assert isinstance(wrapped.scaler, distmuon.GradScaler) is not own
        ends.append((scales, [param.detach().clone() for param in model.parameters()]))
        accelerator.scaler = torch.amp.GradScaler("cpu", **SETTINGS)
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1]))


def test_a_disabled_scaler_stays_disabled(accelerator: Any) -> None:
    from distmuon.integrations.accelerate import prepare

    accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    model, wrapped = prepare(accelerator, *_made())
    accelerator.backward(_loss(model, 0))
    assert float(accelerator.clip_grad_norm_(model.parameters(), 1.0)) < 10.0
    wrapped.step()
    assert not accelerator.scaler.is_enabled() and not wrapped.step_was_skipped


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Fabric joins a process group of its own otherwise, and leaves it, and its variables, to the next test."""
    with mock.patch.dict(os.environ):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.supports("fp16 with a loss scaler", "Fabric")
def test_fabrics_scaler_is_exchanged_with_its_settings_and_state(one_rank: None) -> None:
    lightning = pytest.importorskip("lightning_fabric", reason="pip install distmuon[fabric]")
    from lightning_fabric.plugins import MixedPrecision

    from distmuon.integrations.fabric import DistMuonStrategy, setup

    given = torch.amp.GradScaler("cpu", **SETTINGS)
    given.load_state_dict({**given.state_dict(), "_growth_tracker": 2})
    plugins = [MixedPrecision("16-mixed", "cpu", given)]
    fabric = lightning.Fabric(accelerator="cpu", devices=1, strategy=DistMuonStrategy(), plugins=plugins)
    fabric.launch()
    model, wrapped = setup(fabric, *_made())
    precision = fabric.strategy.precision
    assert isinstance(precision.scaler, distmuon.GradScaler) and precision.state_dict() == given.state_dict()
    scales = []
    for step in range(2):
        fabric.backward(_loss(model, step))
        fabric.clip_gradients(model, wrapped, max_norm=1.0)
        wrapped.step()
        wrapped.zero_grad()
        scales.append(precision.scaler.get_scale())
    assert scales == [256.0, 64.0], "the third good step in a row, then an overflow"
