"""An experiment as its YAML file describes it, and the trials that it asks for.

    title, number, hypothesis, source     for the page
    config       the file that all trials start from: the recipe's, or one that experiments.images reads
    rates        name -> learning rates; equally many for sides that are compared
    arms         name -> set (the recipe's keys), rates (the list that it is tuned over), variant (see
                 experiments.variants), nproc, seeds (how many of the size's; all if left out)
    claims       what the source says, in a form that experiments.analysis decides
    reading      what a reader may conclude, and what not; without numbers, which are the results' own
    sizes        name -> what differs at that size: config, set, rates, arms, nproc, seeds
    ratios       triples of arms: Muon, AdamW, and Muon at AdamW's best rate, for a table of rates
    by_kind      arms whose weights' RMS a table shows for each kind of matrix
    check        the arm that a test trains again, and the band in which its loss must lie

An arm with `rates` is tuned first: every rate at `TUNING_SEED`. Then it runs at its best rate with each of the size's
seeds, which do not include `TUNING_SEED`, so that the choice of the rate does not flatter the result.

In `set` a value may refer to others: {best: ARM, times: X} is the best rate of another arm, times X; {times: X} is X
times the value that the size or the config file has for the same key.

A trial is its settings: two arms, or two experiments, that ask for the same one share it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from distmuon.errors import names, problem
from launch.config import leaves

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "grids"
LR, SEED = "optimizer.lr", "train.seed"
TUNING_SEED = 0
Settings = dict[str, Any]
Loss = Callable[["Wanted"], float | None]
"""The final validation loss of a trial: inf if it diverged, None if it has not run."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One trial that an experiment asks for."""

    config: str
    settings: Settings
    """All keys that it is run with, those of the config file included."""
    variant: str
    nproc: int

    @cached_property
    def key(self) -> str:
        """The same for the same trial, whichever experiment asks for it."""
        return key_of(self.settings, self.variant, self.nproc)

    @property
    def seed(self) -> int:
        return int(self.settings[SEED])


def key_of(settings: Settings, variant: str, nproc: int) -> str:
    return json.dumps([settings, variant, nproc], sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison."""

    name: str
    set: Settings = field(default_factory=dict)
    rates: str = ""
    variant: str = ""
    nproc: int = 1
    seeds: int | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment at one size."""

    name: str
    number: int
    title: str
    hypothesis: str
    source: str
    size: str
    config: str
    set: Settings
    rates: Mapping[str, Sequence[float]]
    arms: Mapping[str, Arm]
    seeds: Sequence[int]
    claims: Sequence[Mapping[str, Any]]
    check: Mapping[str, Any]
    picture: Mapping[str, Any]
    about: str
    reading: str
    ratios: Sequence[Sequence[str]] = ()
    by_kind: Sequence[str] = ()

    @cached_property
    def base(self) -> Settings:
        """The keys of the config file and of the size."""
        found = dict(leaves(yaml.safe_load((ROOT / self.config).read_text(encoding="utf-8"))))
        return {**{key: value for key, value in found.items() if not key.startswith("log.")}, **self.set}

    def tuning(self, arm: Arm, loss: Loss) -> list[Wanted] | None:
        """The trials that choose the arm's rate; None if they depend on others that have not run."""
        settings = self._resolved(arm, loss)
        if settings is None:
            return None
        rates = self.rates[arm.rates] if arm.rates else ()
        return [self._wanted(arm, {**settings, LR: rate, SEED: TUNING_SEED}) for rate in rates]

    def best_rate(self, arm: Arm, loss: Loss) -> float | None:
        """The rate with the lowest loss; None until all have run, or if none has trained."""
        tried = self.tuning(arm, loss)
        losses = [loss(wanted) for wanted in tried or ()]
        done = [found for found in losses if found is not None]
        if not tried or len(done) < len(tried) or not math.isfinite(min(done)):
            return None
        return float(tried[done.index(min(done))].settings[LR])

    def final(self, arm: Arm, loss: Loss) -> list[Wanted] | None:
        """The trials that count, one a seed; None if they depend on others that have not run."""
        settings = self._resolved(arm, loss)
        if settings is None:
            return None
        if arm.rates:
            rate = self.best_rate(arm, loss)
            if rate is None:
                return None
            settings = {**settings, LR: rate}
        return [self._wanted(arm, {**settings, SEED: seed}) for seed in self.seeds[: arm.seeds]]

    def missing(self, loss: Loss) -> list[Wanted]:
        """The trials that can be run now and have not been."""
        found: dict[str, Wanted] = {}
        for arm in self.arms.values():
            for wanted in [*(self.tuning(arm, loss) or ()), *(self.final(arm, loss) or ())]:
                if loss(wanted) is None:
                    found[wanted.key] = wanted
        return list(found.values())

    def all_there(self, loss: Loss) -> bool:
        """Whether every arm has run, or cannot be run because nothing trained at any of its rates."""
        return not self.missing(loss) and any(self.final(arm, loss) for arm in self.arms.values())

    def _wanted(self, arm: Arm, settings: Settings) -> Wanted:
        return Wanted(config=self.config, settings={**self.base, **settings}, variant=arm.variant, nproc=arm.nproc)

    def _resolved(self, arm: Arm, loss: Loss) -> Settings | None:
        """The arm's settings, with references replaced; None if one of them is not known yet."""
        found = {key: self._value(key, value, loss) for key, value in arm.set.items()}
        return None if any(_unknown(value) for value in found.values()) else found

    def _value(self, key: str, value: Any, loss: Loss) -> Any:
        if isinstance(value, list):
            return [self._value(key, entry, loss) for entry in value]
        if not isinstance(value, dict):
            return value
        if value.keys() <= {"best", "times"}:
            base = self.best_rate(self.arms[value["best"]], loss) if "best" in value else self.base[key]
            return None if base is None else _rounded(base * value.get("times", 1), of=base)
        return {name: self._value(key, entry, loss) for name, entry in value.items()}


def _rounded(value: float, of: float) -> float:
    """Six digits, so that a product is the number that a reader would type; whole if what it is made of is."""
    return round(value) if isinstance(of, int) else float(f"{value:.6g}")


def _unknown(value: Any) -> bool:
    """Whether a reference inside has no value yet. A null that a file gives is no option of any arm."""
    if isinstance(value, dict):
        return any(map(_unknown, value.values()))
    return any(map(_unknown, value)) if isinstance(value, list) else value is None


def read(name: str, size: str, folder: Path = FOLDER) -> Experiment:
    """The experiment of a file, at one of its sizes. Raises ValueError for a size or a key that is not there."""
    path = folder / f"{name}.yaml"
    given = _numbers(yaml.safe_load(path.read_text(encoding="utf-8")))
    sizes = given.pop("sizes")
    if size not in sizes:
        raise problem(
            str(path), found=f"found no size {size!r}", needed=f"{names(list(sizes))} are there", cure="choose one"
        )
    at = sizes[size]
    only = at.pop("arms", list(given["arms"]))
    arms = {arm: {**entry, **({"nproc": at["nproc"]} if "nproc" in at else {})} for arm, entry in given["arms"].items()}
    merged = {
        "about": "",
        "reading": "",
        "picture": {},
        "check": {},
        **given,
        "config": at.get("config", given.get("config")),
        "set": {**given.get("set", {}), **at.get("set", {})},
        "rates": {**given.get("rates", {}), **at.get("rates", {})},
        "arms": {arm: Arm(name=arm, **entry) for arm, entry in arms.items() if arm in only},
        "seeds": at["seeds"],
    }
    if unknown := at.keys() - {"config", "set", "rates", "seeds", "nproc"}:
        raise problem(
            str(path), found=f"found {names(sorted(unknown))}", needed="a size has other keys", cure="see above"
        )
    for arm in merged["arms"].values():
        if arm.variant and arm.nproc > 1:
            raise problem(
                str(path),
                found=f"found variant {arm.variant} with {arm.nproc} processes in arm {arm.name}",
                needed="a variant changes one process",
                cure=f"leave the arm out of size {size}",
            )
    return Experiment(name=name, size=size, **merged)


def read_all(size: str, folder: Path = FOLDER) -> list[Experiment]:
    """All experiments that have this size, by their number."""
    paths = sorted(folder.glob("*.yaml"))
    have = [path.stem for path in paths if size in yaml.safe_load(path.read_text(encoding="utf-8"))["sizes"]]
    return sorted((read(name, size, folder) for name in have), key=lambda experiment: experiment.number)


def _numbers(value: Any) -> Any:
    """YAML takes 1e-3 for a text; it is a number here."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
