"""What a run leaves behind: one stream of plain records, written to JSONL, to TensorBoard and to the terminal.

A record is a flat dict with a `kind`: `run` once at every start, `train` for every step, `val` for every validation,
`warning` for what a reader should look at, `summary` once at the end (its absence marks an unfinished run). Decides
formats only; asks no model and no optimizer.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from launch.config import LogConfig

Record: TypeAlias = dict[str, Any]
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PLAIN_LINES = 20
"""About this many progress lines a run where there is no terminal."""


class Sink(Protocol):
    """Somewhere records go."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


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


class TensorBoardSink:
    """Every number of the train and val records as a scalar, nested ones as `lr/muon`; goes on after `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = _summary_writer()(str(folder), purge_step=step + 1 if step else None)

    def write(self, record: Record) -> None:
        if record["kind"] not in ("train", "val"):
            return
        numbers = {name: value for name, value in record.items() if name not in ("kind", "step")}
        for name, value in numbers.items():
            for tag, number in (
                ((f"{name}/{part}", number) for part, number in value.items())
                if isinstance(value, dict)
                else ((name, value),)
            ):
                if number is not None:
                    self._writer.add_scalar(f"{record['kind']}/{tag}", number, record["step"])

    def close(self) -> None:
        self._writer.close()


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

    def __init__(self, config: LogConfig | None = None, steps: int = 0) -> None:
        self._config, self._steps = config, steps  # None: nothing is written
        self._sinks: list[Sink] = []

    @property
    def folder(self) -> Path | None:
        """The run's folder, on the rank that writes there."""
        return None if self._config is None else Path(self._config.dir)

    def begin(self, step: int) -> None:
        """Open the sinks of a run that goes on after `step`; records of another run are moved aside."""
        config = self._config
        if config is None:
            return
        folder = Path(config.dir)
        if step == 0:
            set_aside(folder)
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(folder / TENSORBOARD_FOLDER, step))
        if config.jsonl:
            self._sinks.append(JsonlSink(folder / METRICS_FILE, step))
        if config.progress:
            kind = BarSink if sys.stdout.isatty() else LineSink
            self._sinks.append(kind(self._steps, step))

    def write(self, kind: str, **fields: Any) -> None:
        for sink in self._sinks:
            sink.write({"kind": kind, **fields})

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


@contextmanager
def open_log(config: LogConfig, *, rank: int, steps: int) -> Iterator[RunLog]:
    """The log of this rank; rank 0 creates the folder."""
    if rank == 0:
        if config.tensorboard:
            _summary_writer()
        Path(config.dir).mkdir(parents=True, exist_ok=True)
    log = RunLog(config if rank == 0 else None, steps)
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


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "log.tensorboard: found no `tensorboard` package; it writes the events; pip install tensorboard, or "
            "leave log.tensorboard false"
        ) from error
    return SummaryWriter


class StepMeter:
    """Collects steps without reading the device, and turns an interval of them into records at once."""

    def __init__(self, *, tokens_per_step: int, average: Callable[[Tensor], Tensor]) -> None:
        self._tokens_per_step = tokens_per_step
        self._average = average  # over ranks
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
        norms = numbers[len(self._steps) :]
        records = [
            {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens_per_s": self._tokens_per_step / seconds,
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


def _train_text(record: Record) -> str:
    norm = record["grad_norm"]
    parts = [f"loss {record['loss']:.4f}", f"grad {'-' if norm is None else format(norm, '.3g')}"]
    parts.append("lr " + " ".join(f"{lr:.2e}" for lr in dict.fromkeys(record["lr"].values())))
    parts.append(f"{record['tokens_per_s']:,.0f} tok/s")
    if record["skipped_steps"]:
        parts.append(f"skipped {record['skipped_steps']}")
    return "  ".join(parts)


def _text_of_its_own(record: Record) -> str:
    """The line of a record that has one whatever its step."""
    if record["kind"] == "val":
        return f"validation loss {record['loss']:.4f} at step {record['step']}"
    return f"warning: {record['text']}" if record["kind"] == "warning" else ""


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
