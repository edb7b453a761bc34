"""The schedules' exact values, and that `LambdaLR` keeps the ratio between groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from launch.config import TrainConfig
from launch.schedules import constant, cosine, lr_lambda, three_stage


def test_constant_rises_linearly_and_stays() -> None:
    assert [constant(step, warmup_steps=4) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert constant(1, warmup_steps=0) == 1.0


def test_cosine_touches_peak_middle_and_end() -> None:
    ratios = {step: cosine(step, steps=14, warmup_steps=4, min_ratio=0.1) for step in range(1, 15)}
    assert [ratios[step] for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert ratios[9] == pytest.approx(0.55, abs=1e-15)  # half way down
    assert ratios[14] == pytest.approx(0.1, abs=1e-15)
    assert ratios[5] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 10)), abs=1e-15)
    assert cosine(1, steps=1, warmup_steps=0, min_ratio=0.1) == pytest.approx(0.1)


def test_three_stage_is_moonlights_in_absolute_values() -> None:
    """The paper's numbers, at a tenth of a million steps: 4.2e-4 by step 2,000; 4.2e-5; 1e-4 after 100; 0."""
    base, steps, cooldown_steps = 4.2e-4, 100_000, 10_100

    def lr(step: int) -> float:
        return base * three_stage(
            step,
            steps=steps,
            warmup_steps=2000,
            min_ratio=0.1,
            cooldown_steps=cooldown_steps,
            cooldown_rise_steps=100,
            cooldown_ratio=1e-4 / 4.2e-4,
        )

    start = steps - cooldown_steps
    expected = {
        1: 4.2e-4 / 2000,
        1000: 2.1e-4,
        2000: 4.2e-4,
        (2000 + start) // 2: (4.2e-4 + 4.2e-5) / 2,
        start: 4.2e-5,
        start + 50: (4.2e-5 + 1e-4) / 2,
        start + 100: 1e-4,
        start + 100 + 2500: 0.75e-4,
        start + 100 + 5000: 0.5e-4,
        steps - 1: 1e-4 / 10_000,
        steps: 0.0,
    }
    assert {step: lr(step) for step in expected} == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert all(lr(step) > 0 for step in range(1, steps, 97))


def test_train_config_defaults_are_the_papers_ratios() -> None:
    train = TrainConfig()
    assert train.min_lr_ratio == pytest.approx(4.2e-5 / 4.2e-4)
    assert train.cooldown_lr_ratio == pytest.approx(100 / 420)
    assert train.cooldown_rise_steps == 100


@pytest.mark.parametrize("schedule", ["constant", "cosine", "three_stage"])
def test_lambda_lr_trains_every_step_at_its_ratio_and_keeps_the_groups_apart(schedule: str) -> None:
    train = TrainConfig(
        steps=40,
        schedule=schedule,  # type: ignore[arg-type]
        warmup_steps=5,
        cooldown_steps=10,
        cooldown_rise_steps=3,
    )
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": lr} for lr in (0.8, 0.2)]
    optimizer = torch.optim.SGD(groups)
    scheduler = LambdaLR(optimizer, lr_lambda(train))
    used = []
    for _ in range(train.steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    exact = {
        "constant": lambda step: constant(step, warmup_steps=5),
        "cosine": lambda step: cosine(step, steps=40, warmup_steps=5, min_ratio=0.1),
        "three_stage": lambda step: three_stage(
            step,
            steps=40,
            warmup_steps=5,
            min_ratio=0.1,
            cooldown_steps=10,
            cooldown_rise_steps=3,
            cooldown_ratio=1e-4 / 4.2e-4,
        ),
    }[schedule]
    for step, (first, second) in enumerate(used, start=1):
        assert first == pytest.approx(0.8 * exact(step), rel=1e-12, abs=1e-18)
        assert second == pytest.approx(first / 4, rel=1e-12, abs=1e-18)
