"""Watch a run live in the terminal: where it stands, its last numbers, the curve of its loss.

    python -m launch.tail runs/first            # until the run ends, or Ctrl-C
    python -m launch.tail runs/first --once     # as it is now

Follows the run's `metrics.jsonl`, also when another run moves it aside or a resumed one writes it anew. Without a
terminal it prints a line for every validation and warning.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distmuon.errors import problem
from launch.failures import run_program
from launch.logs import METRICS_FILE, Record, duration

POLL_S = 0.5
BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60


class Follower:
    """Yields the records of a metrics file as they are written, and None where the file begins anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._offset = 0

    def new(self) -> Iterator[Record | None]:
        """What has been written since the last call. A line that is not yet whole waits for the next call."""
        try:
            with self._path.open("rb") as file:
                # A run that resumes puts a new file in its place; one that begins moves the old one aside.
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._inode, self._offset = found.st_ino, 0
                    yield None
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(whole) + len(newline)
        for text in whole.splitlines():
            if text.strip():
                yield json.loads(text)


@dataclass
class Status:
    """What is known of the run so far; grows by `take`."""

    folder: Path
    header: Record = field(default_factory=dict)
    train: Record = field(default_factory=dict)
    val: Record = field(default_factory=dict)
    summary: Record | None = None
    warnings: deque[Record] = field(default_factory=lambda: deque(maxlen=3))
    sample: Record = field(default_factory=dict)
    losses: list[float | None] = field(default_factory=list)
    step_ms: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def take(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "run":
            self.header, self.summary = record, None
        elif kind == "train":
            self.train = record
            self.losses.append(record.get("loss"))
            if record.get("step_ms"):
                self.step_ms.append(record["step_ms"])
        elif kind == "val":
            self.val = record
        elif kind == "warning":
            self.warnings.append(record)
        elif kind == "sample":
            self.sample = record
        elif kind == "summary":
            self.summary = record

    @property
    def step(self) -> int:
        return int(max(self.train.get("step", 0), self.val.get("step", 0)))

    @property
    def steps(self) -> int | None:
        planned: int | None = (self.header.get("config") or {}).get("train", {}).get("steps")
        return planned

    @property
    def left_s(self) -> float | None:
        """Seconds of steps still to take, at the mean of the last ones."""
        if not self.step_ms or not self.steps:
            return None
        return max(0, self.steps - self.step) * sum(self.step_ms) / len(self.step_ms) / 1e3

    def line(self) -> str:
        """The run in one line."""
        text = f"step {self.step:,}" + (f"/{self.steps:,}" if self.steps else "")
        if self.summary is not None:
            return f"{text}  finished"
        return text + (f"  {duration(self.left_s)} left" if self.left_s else "")

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) of the last numbers that the records have."""
        train = self.train
        found = [
            ("loss", _number(train.get("loss"), ".4f")) if train else None,
            ("validation loss", f"{_number(self.val['loss'], '.4f')} at step {self.val['step']:,}")
            if self.val
            else None,
            ("gradient norm", _number(train.get("grad_norm"), ".3g")) if "grad_norm" in train else None,
            *((f"lr, {rule}", f"{lr:.3g}") for rule, lr in (train.get("lr") or {}).items()),
            ("tokens per second", f"{train['tokens_per_s']:,.0f}") if train.get("tokens_per_s") else None,
            ("tokens seen", f"{train['tokens']:,}") if train.get("tokens") else None,
            ("MFU", f"{train['mfu']:.1%}") if train.get("mfu") is not None else None,
            ("peak memory", f"{train['peak_bytes'] / 2**30:.2f} GiB") if train.get("peak_bytes") else None,
            ("skipped steps", f"{train['skipped_steps']:,}") if train.get("skipped_steps") else None,
        ]
        return [row for row in found if row is not None]


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def sparkline(values: Sequence[float | None], width: int = SPARK_WIDTH) -> str:
    """The curve as blocks, one a stretch of values: its mean; a stretch without a finite value is a gap."""
    if not values:
        return ""
    columns = min(width, len(values))
    cuts = [number * len(values) // columns for number in range(columns + 1)]
    stretches = [[v for v in values[a:b] if v is not None] for a, b in pairwise(cuts)]
    means = [sum(part) / len(part) if part else None for part in stretches]
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * columns
    low, spread = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if mean is None else BLOCKS[round((mean - low) / spread * (len(BLOCKS) - 1))] for mean in means)


def view(status: Status, width: int = SPARK_WIDTH) -> RenderableType:
    """The panel for a terminal."""
    if not status.header:
        return Panel(f"waiting for {status.folder / METRICS_FILE}")
    table = Table.grid(padding=(0, 2))
    for name, value in status.rows():
        table.add_row(Text(name, style="dim"), Text(value))
    parts: list[Any] = [Text(status.line(), style="bold green" if status.summary is not None else "bold"), table]
    known = [loss for loss in status.losses if loss is not None]
    if known:
        parts.append(Text(f"loss, {max(known):.3g} to {min(known):.3g}", style="dim"))
        parts.append(Text(sparkline(status.losses, width), style="cyan"))
    parts += [Text(f"step {w.get('step', '?')}: {w['text']}", style="yellow") for w in status.warnings]
    if status.sample:
        words = f"{status.sample.get('prompt', '')}{status.sample.get('text', '')}"
        parts += [Text(f"sample at step {status.sample['step']:,}", style="dim"), Text(words[:300])]
    config = status.header.get("config") or {}
    title = (
        f"{status.folder}  {config.get('model', {}).get('arch', '')} on {status.header.get('world_size', '?')} ranks"
    )
    return Panel(Group(*parts), title=title, title_align="left")


def follow(folder: Path, console: Console, *, once: bool = False, poll_s: float = POLL_S) -> None:
    """Show the run until its summary."""
    if not folder.is_dir():
        raise problem(str(folder), found="found no folder", needed="a run's folder is needed", cure="name its log.dir")
    follower, status = Follower(folder / METRICS_FILE), Status(folder)

    def catch_up() -> Status:
        nonlocal status
        for record in follower.new():
            if record is None:
                status = Status(folder)
            else:
                status.take(record)
                _say(record, console, once)
        return status

    if once:
        console.print(view(catch_up(), _width(console)))
        return
    if not console.is_terminal:
        while catch_up().summary is None:
            time.sleep(poll_s)
        console.print(status.line())
        return
    with Live(view(catch_up(), _width(console)), console=console, refresh_per_second=4) as live:
        while status.summary is None:
            time.sleep(poll_s)
            live.update(view(catch_up(), _width(console)))


def _say(record: Record, console: Console, once: bool) -> None:
    """Where there is no terminal, the records that matter are lines."""
    if console.is_terminal or once:
        return
    if record["kind"] == "val":
        console.print(f"step {record['step']}: validation loss {_number(record['loss'], '.4f')}", highlight=False)
    elif record["kind"] == "warning":
        console.print(f"step {record.get('step', '?')}: warning: {record['text']}", highlight=False, markup=False)


def _width(console: Console) -> int:
    return max(10, min(SPARK_WIDTH * 2, console.width - 6))


def main(argv: list[str] | None = None) -> None:
    """Watch the run that the command line names."""
    parser = argparse.ArgumentParser(
        description="Watch a run live in the terminal, until it ends or Ctrl-C.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--once", action="store_true", help="show the run as it is now, and leave")
    arguments = parser.parse_args(argv)
    with suppress(KeyboardInterrupt):  # the reader has seen enough; the run goes on
        follow(arguments.run, Console(), once=arguments.once)


if __name__ == "__main__":
    run_program(main)
