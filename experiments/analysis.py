"""What the trials say: intervals over seeds, steps to equal loss, and whether a claim holds. Draws and writes nothing.

A claim compares a quantity of one arm with that of another, or with a number. Trials of one seed have the same weights
at the start and the same order of the data on both sides, so differences are taken seed by seed; the interval is
Student's, 95 %, over the seeds. `of` and `than` are an arm, a list of arms (the one with the lowest mean loss stands
for all), or {arm, to}: the arm beside another. The verdict:

    expect lower, higher     agrees if the whole interval lies on that side of 0, disagrees if it lies on the other
    expect tie, margin m     agrees if the whole interval lies within m of `than`, disagrees if it lies outside
    expect at_most, margin m agrees if the whole interval lies below m, disagrees if it lies above
    expect over, margin m    agrees if the whole interval lies above m, disagrees if it lies below

and "cannot tell" otherwise. A margin is a share of `than`. A seed's run that diverged has an infinite loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev
from typing import Any

from experiments.grids import LR, Experiment
from experiments.trial import Results, Row, kind_of
from launch.compare import steps_to_reach

AGREES, DISAGREES, CANNOT_TELL = "agrees", "disagrees", "cannot tell"
NOT_RUN, NOT_MEASURED = "not run", "not measured"
UNTESTED = (NOT_RUN, NOT_MEASURED)
SIDES = {"lower": "lower", "higher": "higher", "at_most": "lower", "over": "higher"}
BySeed = dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the bounds of its 95 % interval; infinite bounds where a single value has none."""

    mean: float
    low: float
    high: float

    def minus(self, value: float) -> Interval:
        return Interval(mean=self.mean - value, low=self.low - value, high=self.high - value)

    def __str__(self) -> str:
        if math.isinf(self.mean):
            return "infinite"
        if math.isinf(self.high - self.low):
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


@lru_cache
def t_quantile(freedom: int, inside: float = 0.95) -> float:
    """The number that Student's t stays below in absolute value with the probability `inside`.

    With t = sqrt(freedom) tan(a), the density is proportional to cos(a)**(freedom - 1) on (-pi/2, pi/2).
    """
    cells = 20_000
    width = math.pi / 2 / cells
    mass = [math.cos((number + 0.5) * width) ** (freedom - 1) for number in range(cells)]
    wanted, seen = inside * sum(mass), 0.0
    for number, part in enumerate(mass):
        if seen + part >= wanted:
            return math.sqrt(freedom) * math.tan((number + (wanted - seen) / part) * width)
        seen += part
    raise AssertionError("the mass of a density sums up to itself")


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's interval; of values that are not all finite, their mean."""
    mean = fmean(values)
    if not math.isfinite(mean):
        return Interval(mean=mean, low=mean, high=mean)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Interval(mean=mean, low=mean - half, high=mean + half)


def visible(difference: Interval, seeds: int) -> float:
    """The smallest true difference that so many seeds show with a probability of 80 %, at the spread that they have."""
    half = difference.high - difference.mean
    return half * (1 + t_quantile(seeds - 1, 0.6) / t_quantile(seeds - 1)) if seeds > 1 else math.inf


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a claim."""

    text: str
    found: Interval | None
    word: str
    seeds: int = 0
    visible: float = math.nan
    """See the function of that name; nan where a claim is not about seeds."""


class View:
    """An experiment and what has run of it."""

    def __init__(self, experiment: Experiment, results: Results) -> None:
        self.experiment = experiment
        self._results = results

    def rows(self, arm: str) -> dict[int, Row]:
        """Finished trials of an arm at its rate, by seed."""
        wanted = self.experiment.final(self.experiment.arms[arm], self._results.loss) or []
        return {trial.seed: row for trial in wanted if (row := self._results.row(trial)) is not None}

    def is_complete(self, arm: str) -> bool:
        """Whether all its trials have run; not, if this size leaves the arm out."""
        if arm not in self.experiment.arms:
            return False
        wanted = self.experiment.final(self.experiment.arms[arm], self._results.loss) or []
        return bool(wanted) and len(self.rows(arm)) == len(wanted)

    def all_rows(self) -> list[Row]:
        """Every finished trial, those of the tuning too."""
        found: dict[str, Row] = {}
        for arm in self.experiment.arms.values():
            for trial in self._trials(arm):
                if (row := self._results.row(trial)) is not None:
                    found[trial.key] = row
        return list(found.values())

    def _trials(self, arm: Any) -> list[Any]:
        loss = self._results.loss
        return [*(self.experiment.tuning(arm, loss) or ()), *(self.experiment.final(arm, loss) or ())]

    def tuned(self, arm: str) -> list[tuple[float, float]]:
        """(rate, loss) of the tuning trials that have run."""
        tried = self.experiment.tuning(self.experiment.arms[arm], self._results.loss) or []
        losses = [(trial.settings[LR], self._results.loss(trial)) for trial in tried]
        return [(rate, loss) for rate, loss in losses if loss is not None]

    def rate(self, arm: str) -> float | None:
        """The rate at which the arm ran."""
        rows = self.rows(arm)
        return float(next(iter(rows.values()))["settings"][LR]) if rows else None

    def is_on_edge(self, arm: str) -> bool:
        """Whether the best rate is the smallest or the largest that was tried."""
        rates = [rate for rate, _ in self.tuned(arm)]
        return len(rates) > 1 and self.rate(arm) in (min(rates), max(rates))

    def losses(self, arm: str) -> BySeed:
        return {seed: math.inf if row["val_loss"] is None else row["val_loss"] for seed, row in self.rows(arm).items()}

    # ---- claims

    def verdict(self, claim: Mapping[str, Any]) -> Verdict:
        text, expect = claim["text"], claim["expect"]
        if not all(self.is_complete(arm) for arm in arms_of(claim)):
            return Verdict(text=text, found=None, word=NOT_RUN)
        if not all(is_measured(claim["quantity"], row) for arm in arms_of(claim) for row in self.rows(arm).values()):
            return Verdict(text=text, found=None, word=NOT_MEASURED)
        left, right = (self._values(claim["quantity"], claim[side]) for side in ("of", "than"))
        seeds = [seed for seed in left if seed in right]
        difference, level = interval([left[seed] - right[seed] for seed in seeds]), fmean(right[seed] for seed in seeds)
        margin = claim.get("margin", 0.0) * level
        word = tie(difference, margin) if expect == "tie" else on_side(difference.minus(margin), SIDES[expect])
        # beside a number, the quantity itself is what a reader wants to see
        found = difference.minus(-level) if isinstance(claim["than"], float) else difference
        return Verdict(text=text, found=found, word=word, seeds=len(seeds), visible=visible(difference, len(seeds)))

    def _values(self, quantity: str, side: Any) -> BySeed:
        """The quantity of one side of a claim, by seed."""
        if isinstance(side, (int, float)):
            return {seed: float(side) for seed in self.experiment.seeds}
        if isinstance(side, list):
            side = min(side, key=lambda arm: fmean(self.losses(arm).values()))
        if isinstance(side, str):
            return {seed: _of_row(quantity, row) for seed, row in self.rows(side).items()}
        rows, others = self.rows(side["arm"]), self.rows(side["to"])
        return {seed: _of_pair(quantity, rows[seed], others[seed], side) for seed in rows if seed in others}

    def steps_share(self, arm: str, to: str) -> Interval:
        """Share of `to`'s steps after which `arm` is at its final loss."""
        return interval(list(self._values("steps", {"arm": arm, "to": to}).values()))


def on_side(difference: Interval, expect: str) -> str:
    """Whether a difference is wholly below 0, or above it, as expected."""
    low, high = (difference.low, difference.high) if expect == "lower" else (-difference.high, -difference.low)
    if high < 0:
        return AGREES
    return DISAGREES if low > 0 else CANNOT_TELL


def tie(difference: Interval, margin: float) -> str:
    """Whether a difference is within the margin."""
    if -margin < difference.low and difference.high < margin:
        return AGREES
    return DISAGREES if difference.low > margin or difference.high < -margin else CANNOT_TELL


def arms_of(claim: Mapping[str, Any]) -> list[str]:
    """The arms that a claim needs."""
    found: list[str] = []
    for given in (claim["of"], claim["than"]):
        if isinstance(given, str):
            found.append(given)
        elif isinstance(given, list):
            found += given
        elif isinstance(given, dict):
            found += [given["arm"], given["to"]]
    return found


def is_measured(quantity: str, row: Row) -> bool:
    """Whether a trial has what a claim is about. A model of a single block has no outputs of blocks."""
    of_telemetry = quantity in ("weight_rms", "update_rms", "output_rms", "attention_logits")
    return not of_telemetry or (bool(row["telemetry"]) and quantity in row["telemetry"][-1])


def _of_row(quantity: str, row: Row) -> float:
    if quantity == "loss":
        return math.inf if row["val_loss"] is None else float(row["val_loss"])
    last = row["telemetry"][-1]
    return fmean(last[quantity].values()) if isinstance(last[quantity], dict) else float(last[quantity])


def _of_pair(quantity: str, row: Row, other: Row, side: Mapping[str, str]) -> float:
    if quantity in ("steps", "seconds"):
        return _share(quantity, row, other)
    gains: dict[str, float] = {name: value - other["entropy"][name] for name, value in row["entropy"].items()}
    if quantity == "share":
        return fmean(gain > 0 for gain in gains.values())
    if "only" in side:
        return fmean(gain for name, gain in gains.items() if kind_of(name) == side["only"])
    return fmean(gain for name, gain in gains.items() if kind_of(name) != side["but"])


def _share(quantity: str, row: Row, other: Row) -> float:
    """Share of the other's steps, or of its seconds of processor time, after which `row` has the other's last loss."""
    if other["val_loss"] is None:
        return 0.0
    curve = [(step, loss) for step, loss in row["val"] if loss is not None]
    steps = steps_to_reach(curve, other["val_loss"])
    if steps is None:
        return math.inf
    share: float = steps / other["val"][-1][0]
    per_step: float = (row["cpu_s"] / row["val"][-1][0]) / (other["cpu_s"] / other["val"][-1][0])
    return share * per_step if quantity == "seconds" else share
