"""What a run leaves behind: one stream of plain records, written to JSONL, to TensorBoard and to the terminal.

A record is a flat dict with a `kind`: `run` once at the start, `train` for every step, `val` for every validation,
`summary` once at the end (its absence marks an unfinished run). Decides formats only; asks no model and no optimizer.

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
PLAIN_LINES = 20
"""About this many progress lines a run where there is no terminal."""


class Sink(Protocol):
    """Somewhere records go."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line, flushed at once. What JSON cannot say (nan, inf) is null."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Begin after `step`: what an earlier start recorded later is dropped, everything if `step` is 0."""
        kept = (
            [r for r in read_records(self._path) if r["kind"] == "run" or r.get("step", step + 1) <= step]
            if step
            else []
        )
        self._file.close()
        whole = self._path.with_suffix(".new")
        whole.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        whole.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        print(json.dumps(_json_safe(record), allow_nan=False), file=self._file, flush=True)

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Every number of the train and val records as a scalar, nested ones as `lr/muon`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "log.tensorboard: found no `tensorboard` package; it writes the events; pip install tensorboard, or "
                "leave log.tensorboard false"
            ) from error
        self._writer = SummaryWriter(str(folder))

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
    """A progress bar for a terminal; validation losses stay above it."""

    def __init__(self, steps: int) -> None:
        from tqdm import tqdm  # here: only a terminal needs it

        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True)

    def write(self, record: Record) -> None:
        if record["kind"] == "train":
            self._bar.set_postfix_str(_train_text(record), refresh=False)
            self._bar.update(record["step"] - self._bar.n)
        elif record["kind"] == "val":
            self._bar.write(_val_text(record))

    def close(self) -> None:
        self._bar.close()


class LineSink:
    """Plain progress lines: about `PLAIN_LINES` of them, and every validation loss."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._stride = max(1, steps // PLAIN_LINES)
        self._start = time.perf_counter()

    def write(self, record: Record) -> None:
        if record["kind"] == "val":
            print(_val_text(record), flush=True)
        elif record["kind"] == "train" and record["step"] % self._stride == 0:
            step = record["step"]
            left = (time.perf_counter() - self._start) * (self._steps - step) / step
            print(f"step {step:>5}/{self._steps}  {_train_text(record)}  {left:4.0f} s left", flush=True)

    def close(self) -> None:
        pass


class RunLog:
    """Hands every record to every sink. On ranks other than 0 there are none."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def rewind(self, step: int) -> None:
        """The run goes on after `step`: records of later steps were of a start that did not live to save them."""
        for sink in self._sinks:
            if isinstance(sink, JsonlSink):
                sink.rewind(step)

    def write(self, kind: str, **fields: Any) -> None:
        for sink in self._sinks:
            sink.write({"kind": kind, **fields})


@contextmanager
def open_log(config: LogConfig, *, rank: int, steps: int) -> Iterator[RunLog]:
    """The log of this rank; rank 0 creates the folder."""
    if rank != 0:
        yield RunLog([])
        return
    folder = Path(config.dir)
    folder.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = []
    if config.tensorboard:  # first: where the package is missing, an earlier run's metrics stay untouched
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    if config.jsonl:
        sinks.append(JsonlSink(folder / METRICS_FILE))
    if config.progress:
        sinks.append(BarSink(steps) if sys.stdout.isatty() else LineSink(steps))
    try:
        yield RunLog(sinks)
    finally:
        for sink in sinks:
            sink.close()


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

    def add(self, step: int, *, loss: Tensor, lr: dict[str, float], grad_norm: Tensor | None) -> None:
        """One finished step; tensors are 0-dim and stay on their device."""
        self._steps.append((step, lr))
        self._losses.append(loss)
        if grad_norm is not None:
            self._norms.append(grad_norm.detach().float())

    def flush(self) -> list[Record]:
        """The steps since the last restart as record fields. See [Note: reading the device]."""
        if not self._steps:
            return []
        losses = self._average(torch.stack(self._losses).float())
        losses_and_norms = torch.cat([losses, torch.stack(self._norms)]) if self._norms else losses
        numbers: list[float] = losses_and_norms.tolist()
        seconds = (time.perf_counter() - self._start) / len(self._steps)
        norms: list[float | None] = [*numbers[len(self._steps) :]] or [None] * len(self._steps)
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


def _train_text(record: Record) -> str:
    lr = next(iter(record["lr"].values()))
    return f"loss {record['loss']:.4f}  lr {lr:.2e}  {record['tokens_per_s']:,.0f} tok/s"


def _val_text(record: Record) -> str:
    return f"validation loss {record['loss']:.4f} at step {record['step']}"


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
