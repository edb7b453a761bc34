"""Sinks: every number reaches TensorBoard and W&B, a class of one's own gets the records, a wrong name is refused."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import dry_run, pretrain
from launch.config import LogConfig, parse
from launch.logs import METRICS_FILE, RunLog, open_log, read_records
from launch.sinks import sink_class
from tests.launch.test_pretrain import ROOT, SHORT, TINY

TRAIN = {"loss": 2.5, "lr": {"muon": 0.5, "adamw": 0.25}, "grad_norm": None, "bytes": {"scatter": 8}, "mfu": None}
SCALARS = {
    "train/loss": 2.5,
    "train/lr/muon": 0.5,
    "train/lr/adamw": 0.25,
    "train/bytes/scatter": 8,
    "val/loss": 2.25,
    "telemetry/parameters/a.weight/update_rms": 0.2,
}


def write_a_run(log: RunLog) -> None:
    log.begin(0)
    log.write("run", config={"optimizer": {"lr": 0.5}})
    log.write("train", step=1, **TRAIN)
    log.write("val", step=1, loss=2.25)
    log.write("sample", step=1, prompt="a", text="b<c")
    parameters = {"a.weight": {"rule": "muon", "update_rms": 0.2, "update_singular_values": [0.7, 1.1]}}
    log.write("telemetry", step=1, parameters=parameters)
    log.write("warning", step=1, text="look")
    log.write("summary", val_loss=2.25)


def test_tensorboard_gets_every_number_and_the_sample(tmp_path: Path) -> None:
    with open_log(LogConfig(dir=str(tmp_path), sinks=["tensorboard"], progress=False), rank=0, steps=2) as log:
        write_a_run(log)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert scalars == pytest.approx(SCALARS)
    (text,) = events.Tensors("sample/text_summary")
    assert text.tensor_proto.string_val == [b"<pre>b&lt;c</pre>"]


def test_tensorboard_goes_on_where_the_run_does(tmp_path: Path) -> None:
    """The steps that a resumed run repeats replace those of the start before it."""
    config = LogConfig(dir=str(tmp_path), sinks=["tensorboard"], progress=False)
    for begin, losses in ((0, {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}), (2, {3: 3.5})):
        with open_log(config, rank=0, steps=4) as log:
            log.begin(begin)
            for step, loss in losses.items():
                log.write("train", step=step, loss=loss)
        time.sleep(1.1)  # event files are ordered by the second of their names
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 5.0), (2, 4.0), (3, 3.5)]


@pytest.mark.slow  # W&B starts a process of its own: 10 s
def test_wandb_gets_every_number_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with open_log(LogConfig(dir=str(tmp_path), sinks=["wandb"], progress=False), rank=0, steps=2) as log:
        write_a_run(log)
        run = wandb.run
        assert run is not None and run.id == (tmp_path / "wandb.id").read_text()
        assert (run.name, run.project, run.resumed) == (tmp_path.name, "distmuon", False)
        assert dict(run.config) == {"optimizer": {"lr": 0.5}}
        found = dict(run.summary)
    assert wandb.run is None and len([*tmp_path.glob("wandb/offline-run-*/run-*.wandb")]) == 1
    assert {tag: found[tag] for tag in SCALARS} == SCALARS
    assert found["step"] == 1 and found["sample"]["_type"] == "html-file"


def test_wandb_without_an_account_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with (
        pytest.raises(ValueError, match=r"log\.sinks: found wandb, which says: No API key.*WANDB_MODE=offline"),
        open_log(LogConfig(dir=str(tmp_path), sinks=["wandb"], progress=False), rank=0, steps=1) as log,
    ):
        log.begin(0)
        log.write("run", config={})


def test_a_run_leaves_a_report_of_itself(tmp_path: Path) -> None:
    assert parse([]).log.sinks == ["report"]
    folder = tmp_path / "run"
    given = ["--config", str(ROOT / "configs/quickstart.yaml"), *TINY, *SHORT, "--train.steps=2", f"--log.dir={folder}"]
    pretrain.main([*given, "--log.sinks=[report]"])
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "llama" in page


class Mine:
    """A sink of a user's own."""

    made: ClassVar[list[tuple[Path, int]]] = []
    got: ClassVar[list[str]] = []

    def __init__(self, folder: Path, step: int) -> None:
        self.made.append((folder, step))

    def write(self, record: dict[str, Any]) -> None:
        self.got.append(record["kind"])

    def close(self) -> None:
        self.got.append("closed")


def test_a_class_of_ones_own_gets_all_records_after_an_error_too(tmp_path: Path) -> None:
    config = LogConfig(dir=str(tmp_path), sinks=[f"{__name__}.Mine"], progress=False)
    with pytest.raises(KeyError), open_log(config, rank=0, steps=9) as log:
        log.begin(7)
        log.write("run", config={})
        log.write("train", step=8, loss=2.5)
        raise KeyError
    assert Mine.made == [(tmp_path, 7)]
    assert Mine.got == ["run", "train", "closed"]
    assert [record["kind"] for record in read_records(tmp_path / METRICS_FILE)] == ["run", "train"]


@pytest.mark.parametrize("name", ["tensorbord", "no_such_package.Mine", f"{__name__}.mine", f"{__name__}.TRAIN"])
def test_a_wrong_name_is_refused_on_all_ranks_and_by_a_dry_run(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=rf"log\.sinks: found '{name}'.*report, tensorboard, wandb, trackio or package"),
        open_log(LogConfig(dir=str(tmp_path), sinks=[name]), rank=1, steps=1),
    ):
        pass
    with pytest.raises(ValueError, match=r"log\.sinks: found"):
        dry_run.dry_run(parse([f"--log.sinks=[{name}]"]), 2)


def test_what_the_module_of_a_sink_needs_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_sinks.py").write_text("import package_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="package_that_nobody_has"):
        sink_class("my_sinks.Mine")


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("trackio", "trackio"), ("report", "plotly")],
)
def test_a_missing_package_names_the_cure(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"found no `{package}` package; .*pip install .*leave {name} out of"):
        sink_class(name)


class FakeTrackio:
    """trackio 0.43's `init` and `Run`, as far as they are used."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, project: str, name: str, *, resume: str, config: dict[str, Any]) -> FakeTrackio:
        self.calls.append(("init", (project, name, resume, config)))
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.calls.append(("log", (metrics, step)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_trackio_goes_on_with_the_run_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr("launch.sinks.find_spec", lambda _: object())
    config = LogConfig(dir=str(tmp_path), sinks=["trackio"], progress=False)
    for step in (0, 3):
        with open_log(config, rank=0, steps=9) as log:
            log.begin(step)
            log.write("run", config={"a": 1})
            log.write("val", step=step + 1, loss=2.5)
    name = f"{tmp_path.name}-{(tmp_path / 'trackio.id').read_text()}"
    init = ("init", ("distmuon", name, "allow", {"a": 1}))
    logs = [("log", ({"val/loss": 2.5}, step)) for step in (1, 4)]
    assert trackio.calls == [init, logs[0], ("finish", None), init, logs[1], ("finish", None)]
