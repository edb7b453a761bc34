"""What the folder of one run says, record by record. Knows no chart and no page.

Records may lack any field: runs of earlier versions, runs without telemetry and runs that were killed are read alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

from distmuon.errors import problem
from launch.logs import METRICS_FILE, Record, duration, read_records

State = Literal["finished", "running", "ended", "silent"]
SILENCE_S = 120.0
"""A file without a summary that is older than this, and than `SILENCE_STEPS` steps, belongs to no living run."""
SILENCE_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class History:
    """The records of a run by kind, in order."""

    folder: Path
    label: str
    starts: list[Record]
    train: list[Record]
    val: list[Record]
    warnings: list[Record]
    samples: list[Record]
    telemetry: list[Record]
    summary: Record | None
    written: float
    """When the last record was written, in seconds since the epoch."""
    known_state: State | None = None
    """What the run itself says; without it the state is told from the records and their age."""

    @cached_property
    def config(self) -> dict[str, Any]:
        return dict(self.starts[-1].get("config", {}))

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key of the config."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    @cached_property
    def steps(self) -> int:
        """The last step on record."""
        return max((int(record["step"]) for record in [*self.train, *self.val]), default=0)

    @property
    def planned_steps(self) -> int | None:
        steps: int | None = self.setting("train.steps")
        return steps

    @property
    def optimizer(self) -> str:
        return {"distmuon": "Muon", "adamw": "AdamW"}.get(self.setting("optimizer.name", ""), "optimizer")

    @cached_property
    def skipped(self) -> int:
        """Skipped steps, as the run counted them, or else as its records show them."""
        counted = [record["skipped_steps"] for record in [*self.train, self.summary or {}] if "skipped_steps" in record]
        return int(counted[-1]) if counted else len(self.skipped_at)

    @cached_property
    def skipped_at(self) -> list[int]:
        """The steps whose gradient was not finite: their norm is null."""
        return [record["step"] for record in self.train if "grad_norm" in record and record["grad_norm"] is None]

    @cached_property
    def step_ms(self) -> float | None:
        """The median over the steps, without the first of each start, which builds buffers and kernels."""
        first = {start.get("resumed_from", 0) + 1 for start in self.starts}
        times = [record["step_ms"] for record in self.train if record.get("step_ms") and record["step"] not in first]
        return median(times) if times else None

    @property
    def state(self) -> State:
        if self.summary is not None:
            return "finished"
        if self.known_state is not None:
            return self.known_state
        age = time.time() - self.written
        return "silent" if age > max(SILENCE_S, SILENCE_STEPS * (self.step_ms or 0) / 1e3) else "running"

    @property
    def verdict(self) -> str:
        """One sentence: how far the run has come, and whether it goes on."""
        of = f"step {self.steps:,}" + (f" of {self.planned_steps:,}" if self.planned_steps else "")
        if self.state == "finished":
            assert self.summary is not None
            seconds = self.summary.get("seconds")
            text = f"finished {of}" + (f" after {duration(seconds)}" if seconds is not None else "")
        elif self.state == "running":
            text = f"still running, at {of}"
        elif self.state == "ended":
            text = f"ended at {of} without a summary: it crashed or was stopped"
        else:
            text = f"no summary, and no record for {duration(time.time() - self.written)}: crashed or stopped at {of}"
        skipped = self.skipped
        if skipped:
            text += f"; {skipped:,} {'step was' if skipped == 1 else 'steps were'} skipped"
        if self.lost_at is not None:
            text += f"; the loss is not finite from step {self.lost_at:,}"
        return text

    @cached_property
    def lost_at(self) -> int | None:
        """The first step whose loss is null, so was not finite."""
        return min((r["step"] for r in [*self.train, *self.val] if r.get("loss", 0) is None), default=None)

    @property
    def tone(self) -> Literal["good", "busy", "bad"]:
        """How a reader should feel about the verdict."""
        if self.lost_at is not None or self.state in ("ended", "silent"):
            return "bad"
        return "busy" if self.skipped or self.state == "running" else "good"

    # ------------------------------------------------------------------------------------------ what stands on x axes

    def tokens_at(self, record: Record) -> int | None:
        """Tokens that the run had seen after the step of a train record."""
        if record.get("tokens") is not None:
            return int(record["tokens"])
        batch, length = self.setting("train.global_batch"), self.setting("model.seq_len")
        return record["step"] * batch * length if batch and length else None

    @cached_property
    def _clock(self) -> dict[int, tuple[int | None, float | None]]:
        """(tokens, seconds of steps) by step."""
        seconds = 0.0
        found: dict[int, tuple[int | None, float | None]] = {0: (0, 0.0)}
        for record in self.train:
            seconds += (record.get("step_ms") or 0.0) / 1e3
            found[record["step"]] = self.tokens_at(record), seconds if seconds else None
        return found

    def clock(self, step: int) -> tuple[int | None, float | None]:
        """(tokens seen, seconds of steps taken) when `step` was done; None where no train record says so."""
        return self._clock.get(step, (None, None))


def read_history(folder: Path, *, label: str | None = None, known_state: State | None = None) -> History:
    """The run in a folder. Raises ValueError where there is none."""
    path = folder / METRICS_FILE
    if not path.is_file():
        raise problem(
            str(folder),
            found=f"found no {METRICS_FILE}",
            needed="the folder of a run is needed",
            cure="name its log.dir; every run of the recipe writes the file",
        )
    by_kind: dict[str, list[Record]] = {}
    summary: Record | None = None
    for record in read_records(path):
        by_kind.setdefault(record["kind"], []).append(record)
        summary = record if record["kind"] == "summary" else None if record["kind"] == "run" else summary
    if "run" not in by_kind:
        raise problem(
            str(path),
            found=f"found {sum(map(len, by_kind.values()))} records and no header",
            needed="a run's first record is needed",
            cure="wait until the run has begun, or name another folder",
        )
    return History(
        folder=folder,
        label=label or folder.resolve().name,
        starts=by_kind["run"],
        train=by_kind.get("train", []),
        val=by_kind.get("val", []),
        warnings=by_kind.get("warning", []),
        samples=by_kind.get("sample", []),
        telemetry=by_kind.get("telemetry", []),
        summary=summary,
        written=path.stat().st_mtime,
        known_state=known_state,
    )


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts))):
        found = ["/".join(path[-length:]) for path in parts]
        if len(set(found)) == len(set(parts)):
            return found
    return [str(folder) for folder in folders]


def column(records: Sequence[Record], value: Callable[[Record], Any]) -> tuple[list[int], list[Any]]:
    """(steps, values) of the records; values may be None."""
    return [record["step"] for record in records], [value(record) for record in records]
