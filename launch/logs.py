"""What a run leaves behind: one stream of plain records, written to JSONL, to the terminal and to `launch.sinks`.

A record is a dict with a `kind`: `run` once at every start, `train` for every step, `val` and `sample` for every
validation, `telemetry` every `log.telemetry_every` steps, `warning` for what a reader should look at, `summary` once at
the end (its absence marks an unfinished run). Decides formats only; asks no model and no optimizer.

Nothing that a run has recorded is erased: a run that begins in a folder with the records of another one moves them to
`metrics.1.jsonl`, the next to `metrics.2.jsonl`. A run that resumes drops the records of the steps that it repeats.

[Note: reading the device] A loss lives on the device, and reading it waits for everything queued before it. So the
meter keeps the losses and norms of an interval as tensors and reads them in one transfer when the interval closes.
Times of an interval are spread evenly over its steps: on an accelerator a single step has no honest host time.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.config import LogConfig
from launch.sinks import TENSORBOARD_FOLDER, Sink, SinkClass, sink_class
from launch.sinks import Record as Record

METRICS_FILE = "metrics.jsonl"
PLAIN_LINES = 20
"""About this many progress lines a run where there is no terminal."""
SAMPLE_WIDTH = 100
"""Characters of a sample that the terminal shows."""


class JsonlSink:
    """One JSON object a line, flushed at once. What JSON cannot say (nan, inf) is null.

    Goes on after `step`; what an earlier start recorded later is dropped, for its steps are taken again.
    """

    def __init__(self, path: Path, step: int) -> None:
        known = read_records(path) if path.exists() else []
        kept = [r for r in known if step and (r["kind"] == "run" or r.get("step", step + 1) <= step)]
        whole = path.with_suffix(".new")
        whole.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        whole.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        print(json.dumps(_json_safe(record), allow_nan=False), file=self._file, flush=True)

    def close(self) -> None:
        self._file.close()


class BarSink:
    """A progress bar for a terminal; validation losses and warnings stay above it."""

    def __init__(self, steps: int, step: int) -> None:
        from tqdm import tqdm  # here: only a terminal needs it

        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def write(self, record: Record) -> None:
        if record["kind"] == "train":
            self._bar.set_postfix_str(_train_text(record), refresh=False)
            self._bar.update(record["step"] - self._bar.n)
        elif text := _text_of_its_own(record):
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()


class LineSink:
    """Plain progress lines: about `PLAIN_LINES` of them, and every validation loss and warning.

    The time left is estimated from this start's own steps, without the first, which builds buffers and kernels.
    """

    def __init__(self, steps: int, step: int) -> None:
        self._steps = steps
        self._stride = max(1, (steps - step) // PLAIN_LINES)
        self._first: tuple[int, float] | None = None

    def write(self, record: Record) -> None:
        if text := _text_of_its_own(record):
            print(text, flush=True)
        if record["kind"] != "train":
            return
        step, now = record["step"], time.perf_counter()
        if self._first is None:
            self._first = step, now
        first, began = self._first
        if step % self._stride and step != self._steps:
            return
        line = f"step {step:>5}/{self._steps}  {_train_text(record)}"
        if step > first and now > began:
            line += f"  {duration((now - began) / (step - first) * (self._steps - step))} left"
        print(line, flush=True)

    def close(self) -> None:
        pass


class RunLog:
    """Hands every record to every sink. On ranks other than 0 there are none."""

    def __init__(self, config: LogConfig | None = None, steps: int = 0, classes: Sequence[SinkClass] = ()) -> None:
        self._config, self._steps, self._classes = config, steps, classes  # None: nothing is written
        self._sinks: list[Sink] = []
        self._open = ExitStack()

    @property
    def folder(self) -> Path | None:
        """The run's folder, on the rank that writes there."""
        return None if self._config is None else Path(self._config.dir)

    def begin(self, step: int) -> None:
        """Open the sinks of a run that goes on after `step`; records of another run are moved aside."""
        config, folder = self._config, self.folder
        if config is None or folder is None:
            return
        if step == 0:
            set_aside(folder)
        self._add(JsonlSink(folder / METRICS_FILE, step))
        for made_by in self._classes:
            self._add(made_by(folder, step))
        if config.progress:
            kind = BarSink if sys.stdout.isatty() else LineSink
            self._add(kind(self._steps, step))

    def _add(self, sink: Sink) -> None:
        self._open.callback(sink.close)
        self._sinks.append(sink)

    def write(self, kind: str, **fields: Any) -> None:
        for sink in self._sinks:
            sink.write({"kind": kind, **fields})

    def close(self) -> None:
        self._open.close()


@contextmanager
def open_log(config: LogConfig, *, rank: int, steps: int) -> Iterator[RunLog]:
    """The log of this rank; rank 0 creates the folder. A sink that does not exist raises on all ranks."""
    classes = [sink_class(name) for name in config.sinks]
    if rank == 0:
        Path(config.dir).mkdir(parents=True, exist_ok=True)
    log = RunLog(config if rank == 0 else None, steps, classes)
    try:
        yield log
    finally:
        log.close()


def set_aside(folder: Path) -> None:
    """Rename what an earlier run has recorded in `folder`, if it is more than a header, so that another may begin."""
    path = folder / METRICS_FILE
    if not path.exists() or all(record["kind"] == "run" for record in read_records(path)):
        return
    number = 1
    while (folder / f"metrics.{number}.jsonl").exists():
        number += 1
    path.rename(folder / f"metrics.{number}.jsonl")
    if (folder / TENSORBOARD_FOLDER).exists():
        (folder / TENSORBOARD_FOLDER).rename(folder / f"{TENSORBOARD_FOLDER}.{number}")
    print(f"the records of an earlier run in {folder} are now in metrics.{number}.jsonl", flush=True)


class StepMeter:
    """Collects steps without reading the device, and turns an interval of them into records at once.

    `average` is over ranks. `mfu_of_a_token_per_s`: see `launch.flops`; None leaves the utilization out.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        average: Callable[[Tensor], Tensor],
        mfu_of_a_token_per_s: float | None = None,
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._average = average
        self._mfu_of_a_token_per_s = mfu_of_a_token_per_s
        self.restart()

    def restart(self) -> None:
        """Begin an interval now: what came before (a validation, the first build) is nobody's step time."""
        self._steps: list[tuple[int, dict[str, float]]] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._start = time.perf_counter()

    def add(self, step: int, *, loss: Tensor, lr: dict[str, float], grad_norm: Tensor) -> None:
        """One finished step; tensors are 0-dim and stay on their device."""
        self._steps.append((step, lr))
        self._losses.append(loss)
        self._norms.append(grad_norm.detach().float())

    def flush(self) -> list[Record]:
        """The steps since the last restart as record fields. See [Note: reading the device]."""
        if not self._steps:
            return []
        losses = self._average(torch.stack(self._losses).float())
        numbers: list[float] = torch.cat([losses, torch.stack(self._norms)]).tolist()
        seconds = (time.perf_counter() - self._start) / len(self._steps)
        norms, rate = numbers[len(self._steps) :], self._tokens_per_step / seconds
        records = [
            {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens": step * self._tokens_per_step,
                "tokens_per_s": rate,
                "mfu": None if self._mfu_of_a_token_per_s is None else rate * self._mfu_of_a_token_per_s,
                "step_ms": 1e3 * seconds,
            }
            for (step, lr), loss, norm in zip(self._steps, numbers, norms)
        ]
        self.restart()
        return records


def read_records(path: Path) -> list[Record]:
    """The records of a metrics file, in order; a last line torn by a kill is left out."""
    records: list[Record] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: found {line[:80]!r}; one JSON object a line is needed") from error
    return records


def duration(seconds: float) -> str:
    """A time as a reader says it: 45 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def amount(count: float) -> str:
    """A count as a reader says it: 812, 4.1 k, 1.3 M."""
    power = min(4, max(0, (len(str(int(count))) - 1) // 3))
    return f"{count / 1000**power:.1f} {'kMGT'[power - 1]}" if power else f"{count:.0f}"


def _train_text(record: Record) -> str:
    norm = record["grad_norm"]
    parts = [f"loss {record['loss']:.4f}", f"grad {'-' if norm is None else format(norm, '.3g')}"]
    first, *others = dict.fromkeys(f"{lr:.2e}" for lr in record["lr"].values())
    parts.append(f"lr {first}" + "".join(f" (adamw {lr})" for lr in others))
    parts.append(f"{amount(record['tokens'])} tokens")
    parts.append(f"{record['tokens_per_s']:,.0f} tok/s")
    if record["mfu"] is not None:
        parts.append(f"mfu {100 * record['mfu']:.1f} %")
    if record["peak_bytes"] is not None:
        parts.append(f"peak {record['peak_bytes'] / (1 << 30):.1f} GiB")
    if record["skipped_steps"]:
        parts.append(f"skipped {record['skipped_steps']}")
    return "  ".join(parts)


def _text_of_its_own(record: Record) -> str:
    """The line of a record that has one whatever its step."""
    if record["kind"] == "val":
        return f"validation loss {record['loss']:.4f} at step {record['step']}"
    if record["kind"] == "sample":
        text = record["prompt"] + record["text"]
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return f'sample "{line if len(line) <= SAMPLE_WIDTH else line[:SAMPLE_WIDTH] + "..."}"'
    return f"warning: {record['text']}" if record["kind"] == "warning" else ""


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
