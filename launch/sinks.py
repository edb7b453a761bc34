"""Where the records of a run go besides its `metrics.jsonl`: `log.sinks` names what this module finds.

A sink is any class with the constructor and the two methods of `Sink`. `KNOWN` has the names of those that are here; a
class of your own is named as Python imports it:

    log:
      sinks: [report, tensorboard, my_package.sinks.Mine]

The first record is of kind `run` and has the whole config; `launch.logs` lists the other kinds. Sinks live on rank 0
alone. What a sink raises ends the run.
"""

from __future__ import annotations

import html
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from uuid import uuid4

from distmuon.errors import problem

Record: TypeAlias = dict[str, Any]
TENSORBOARD_FOLDER = "tensorboard"
PROJECT = "distmuon"
NUMBERS = ("train", "val", "telemetry")
"""The kinds of records whose numbers are drawn as curves."""


class Sink(Protocol):
    """A receiver of records, made as `Class(folder, step)` when the first step is near.

    `folder` is the run's own, and exists. `step` is the last one that an earlier start has recorded for good: 0 in a
    new run; a run that resumes repeats the steps behind it.
    """

    def write(self, record: Record) -> None:
        """Take one record; its values are plain, and may be nested."""

    def close(self) -> None:
        """Write out what is left. Called at the end of the process, also after an error."""


SinkClass: TypeAlias = Callable[[Path, int], Sink]


class TensorBoardSink:
    """Each number as a scalar, nested ones as `lr/muon`, and samples as text; goes on after `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an optional package, as all of them here

        self._writer: Any = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=step + 1 if step else None)

    def write(self, record: Record) -> None:
        for tag, number in numbers(record):
            self._writer.add_scalar(tag, number, record["step"])
        if record["kind"] == "sample":
            self._writer.add_text("sample", f"<pre>{html.escape(record['text'])}</pre>", record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A W&B run of the folder's name, which a run that resumes goes on with. W&B's own environment variables count.

    Curves are drawn over `step`; steps that a resumed run repeats are there twice.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._id = folder, _run_id(folder / "wandb.id", step)
        self._run: Any = None
        self._finished = False

    def write(self, record: Record) -> None:
        import wandb

        if record["kind"] == "run":
            self._begin(wandb, record)
        found: dict[str, Any] = dict(numbers(record))
        if record["kind"] == "sample":
            found["sample"] = wandb.Html(f"<pre>{html.escape(record['text'])}</pre>")
        if found:
            self._run.log({**found, "step": record["step"]})
        self._finished |= record["kind"] == "summary"

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if self._finished else 1)

    def _begin(self, wandb: Any, record: Record) -> None:
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", self._folder.absolute().name),
                dir=self._folder,
                id=self._id,
                resume="allow",
                config=record["config"],
            )
        except wandb.Error as error:
            raise problem(
                "log.sinks",
                found=f"found wandb, which says: {str(error).strip().rstrip('.')}",
                needed="a W&B account or its offline mode is needed",
                cure="run `wandb login`, or set WANDB_MODE=offline",
            ) from error
        self._run.define_metric("*", step_metric="step")


class TrackioSink:
    """A trackio run, named after the folder and a number of its own; trackio keeps it where TRACKIO_DIR says."""

    def __init__(self, folder: Path, step: int) -> None:
        self._name = f"{folder.absolute().name}-{_run_id(folder / 'trackio.id', step)}"
        self._run: Any = None

    def write(self, record: Record) -> None:
        import trackio

        if record["kind"] == "run":
            project = os.environ.get("TRACKIO_PROJECT", PROJECT)
            self._run = trackio.init(project=project, name=self._name, resume="allow", config=record["config"])
        if found := dict(numbers(record)):
            self._run.log(found, step=record["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _report(folder: Path, step: int) -> Sink:
    from launch.report import ReportSink

    return ReportSink(folder, step)


KNOWN: dict[str, tuple[SinkClass, Sequence[str]]] = {
    "report": (_report, ("jinja2", "plotly")),
    "tensorboard": (TensorBoardSink, ("tensorboard",)),
    "wandb": (WandbSink, ("wandb",)),
    "trackio": (TrackioSink, ("trackio",)),
}
"""Each with the packages that it needs."""


def sink_class(name: str) -> SinkClass:
    """The class that `log.sinks` names. Raises ValueError if there is none, ImportError if its package is missing."""
    if name in KNOWN:
        made, packages = KNOWN[name]
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            raise ImportError(
                f"log.sinks: found no `{missing[0]}` package; {name} needs it; pip install {' '.join(packages)}, or "
                f"leave {name} out of log.sinks"
            )
        return made
    module, _, attribute = name.rpartition(".")
    found: Any = None
    try:
        found = getattr(importlib.import_module(module), attribute) if module else None
    except ModuleNotFoundError as error:
        if not module.startswith(str(error.name)):
            raise  # a package that the module itself needs
    except AttributeError:
        pass
    if not all(callable(getattr(found, method, None)) for method in ("write", "close")):
        raise problem(
            "log.sinks",
            found=f"found {name!r}" + (", which has no write and close" if found is not None else ""),
            needed=f"{', '.join(KNOWN)} or package.module.Class of a class like launch.sinks.Sink is needed; "
            "metrics.jsonl is written in any case",
            cure="correct log.sinks; the class must be importable from the working directory",
        )
    own: SinkClass = found
    return own


def numbers(record: Record) -> Iterator[tuple[str, float]]:
    """(tag, number) of all numbers that a curve is drawn of: train/loss, train/lr/muon."""
    if record["kind"] in NUMBERS:
        parts = {name: value for name, value in record.items() if name not in ("kind", "step")}
        yield from _leaves(parts, record["kind"])


def _leaves(value: Any, tag: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _leaves(part, f"{tag}/{name}")
    elif isinstance(value, (int, float)):
        yield tag, value


def _run_id(path: Path, step: int) -> str:
    """The id under which an earlier start of this run is known, or a new one, kept in `path`."""
    if step == 0 or not path.exists():
        path.write_text(uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")
