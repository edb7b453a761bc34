"""Learning-rate schedules as ratios of the base lr.

Decides one number per step from the step alone, so that a resumed run needs no schedule state. `LambdaLR` multiplies
every group's own base lr by it, which keeps the ratio between the Muon and the AdamW group. Knows no optimizer.

All of them count steps from 1: step `s` of `steps` trains at `ratio(s)`. The warmup of `w` steps is `s / w`, so that
step `w` is the first at full height and the first step does not train at 0. A run that is no longer than its warmup
ends on the way up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from launch.config import TrainConfig


def constant(step: int, *, warmup_steps: int) -> float:
    """Linear warmup, then 1."""
    return min(1.0, step / max(1, warmup_steps))


def cosine(step: int, *, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Linear warmup to 1, then half a cosine that reaches `min_ratio` at the last step."""
    if step < warmup_steps or steps <= warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (steps - warmup_steps))
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def three_stage(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    min_ratio: float,
    cooldown_steps: int,
    cooldown_rise_steps: int,
    cooldown_ratio: float,
) -> float:
    """Moonlight's schedule (arXiv 2502.16982): warmup, cosine, and a cooldown on the best data.

    There: 2,000 steps up to 4.2e-4 | cosine down to 4.2e-5 | 100 steps up to 1e-4, then linearly to 0. As ratios of a
    base lr of 4.2e-4: 1, 0.1 and 0.238. The ratio is 0 at the very last step.
    """
    cooldown_start = steps - cooldown_steps
    if step <= cooldown_start:
        return cosine(step, steps=cooldown_start, warmup_steps=warmup_steps, min_ratio=min_ratio)
    step -= cooldown_start
    if step <= cooldown_rise_steps:
        return min_ratio + (cooldown_ratio - min_ratio) * step / cooldown_rise_steps
    return max(0.0, cooldown_ratio * (cooldown_steps - step) / (cooldown_steps - cooldown_rise_steps))


def lr_lambda(train: TrainConfig) -> Callable[[int], float]:
    """The chosen schedule as `LambdaLR` calls it: with the number of steps already done."""

    def ratio(steps_done: int) -> float:
        step = steps_done + 1
        if train.schedule == "constant":
            return constant(step, warmup_steps=train.warmup_steps)
        if train.schedule == "cosine":
            return cosine(step, steps=train.steps, warmup_steps=train.warmup_steps, min_ratio=train.min_lr_ratio)
        return three_stage(
            step,
            steps=train.steps,
            warmup_steps=train.warmup_steps,
            min_ratio=train.min_lr_ratio,
            cooldown_steps=train.cooldown_steps,
            cooldown_rise_steps=train.cooldown_rise_steps,
            cooldown_ratio=train.cooldown_lr_ratio,
        )

    return ratio
