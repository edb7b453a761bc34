"""Records: one a step whatever the interval, averaged over ranks, valid JSON; what the terminal shows of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from launch.config import LogConfig
from launch.logs import METRICS_FILE, StepMeter, amount, duration, open_log, read_records

STEP = {
    "lr": {"muon": 1e-3, "adamw": 1e-3},
    "tokens": 4096,
    "tokens_per_s": 12345.6,
    "mfu": None,
    "peak_bytes": None,
    "grad_norm": 0.125,
    "skipped_steps": 0,
}


def test_an_interval_gives_one_record_a_step() -> None:
    meter = StepMeter(tokens_per_step=1000, average=lambda losses: losses / 2, mfu_of_a_token_per_s=1e-3)
    for step in (4, 5, 6):
        meter.add(step, loss=torch.tensor(float(step)), lr={"muon": step / 10}, grad_norm=torch.tensor(step * 10.0))
    records = meter.flush()
    assert [(record["step"], record["loss"], record["grad_norm"]) for record in records] == [
        (4, 2.0, 40.0),
        (5, 2.5, 50.0),
        (6, 3.0, 60.0),
    ]
    assert [record["lr"] for record in records] == [{"muon": 0.4}, {"muon": 0.5}, {"muon": 0.6}]
    assert len({record["step_ms"] for record in records}) == 1
    assert records[0]["tokens_per_s"] == pytest.approx(1e6 / records[0]["step_ms"])
    assert [record["tokens"] for record in records] == [4000, 5000, 6000]
    assert records[0]["mfu"] == pytest.approx(1e-3 * records[0]["tokens_per_s"])
    assert meter.flush() == []


def test_jsonl_holds_what_was_written_and_null_for_what_json_cannot_say(tmp_path: Path) -> None:
    with open_log(LogConfig(dir=str(tmp_path / "run"), progress=False), rank=0, steps=2) as log:
        log.begin(0)
        log.write("train", step=1, loss=float("nan"), lr={"muon": 0.5, "adamw": float("inf")})
        log.write("summary", steps=1)
    path = tmp_path / "run" / METRICS_FILE
    assert read_records(path) == [
        {"kind": "train", "step": 1, "loss": None, "lr": {"muon": 0.5, "adamw": None}},
        {"kind": "summary", "steps": 1},
    ]
    with path.open("a") as file:
        file.write('{"kind": "tra')  # killed in the middle of a line
    assert len(read_records(path)) == 2
    path.write_text("not json\n{}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: found 'not json'"):
        read_records(path)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_log(LogConfig(dir=str(tmp_path / "run"), sinks=["tensorboard"]), rank=1, steps=2) as log:
        log.begin(0)
        log.write("train", step=1)
    assert not (tmp_path / "run").exists()


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(LogConfig(dir=str(tmp_path)), rank=0, steps=100) as log:
        log.begin(0)
        for step in range(1, 101):
            log.write("train", step=step, loss=2.5, **STEP)
        log.write("val", step=100, loss=2.25)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("step     5/100  loss 2.5000  grad 0.125  lr 1.00e-03  4.1 k tokens  12,346 tok/s  ")
    assert lines[-1] == "validation loss 2.2500 at step 100"


def test_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with open_log(LogConfig(dir=str(tmp_path)), rank=0, steps=2) as log:
        log.begin(0)
        log.write("val", step=0, loss=3.5)
        for step in (1, 2):
            log.write("train", step=step, loss=2.5, **STEP)
    output = capsys.readouterr()
    assert "validation loss 3.5000 at step 0" in output.out
    assert "2/2" in output.err
    assert "loss 2.5000" in output.err


def test_json_lines_are_json(tmp_path: Path) -> None:
    with open_log(LogConfig(dir=str(tmp_path), progress=False), rank=0, steps=1) as log:
        log.begin(0)
        log.write("run", report="two\nlines", shape=(1, 2))
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line) == {"kind": "run", "report": "two\nlines", "shape": [1, 2]}


def test_a_run_that_begins_among_the_records_of_another_moves_them_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were erased, and TensorBoard showed both as one. A start that took no step leaves nothing to keep."""
    config = LogConfig(dir=str(tmp_path), sinks=["tensorboard"], progress=False)
    for number in range(3):
        for begun in (False, True):
            with open_log(config, rank=0, steps=1) as log:
                log.begin(0)
                log.write("run", number=number)
                if begun:
                    log.write("train", step=1, loss=1.0, lr={}, bytes={})
    found = {path.name: read_records(path)[0]["number"] for path in tmp_path.glob("*.jsonl")}
    assert found == {"metrics.1.jsonl": 0, "metrics.2.jsonl": 1, METRICS_FILE: 2}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "tensorboard",
        "tensorboard.1",
        "tensorboard.2",
    }
    assert "are now in metrics.2.jsonl" in capsys.readouterr().out


def test_a_run_that_goes_on_drops_the_steps_that_it_repeats(tmp_path: Path) -> None:
    config = LogConfig(dir=str(tmp_path), progress=False)
    for step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with open_log(config, rank=0, steps=4) as log:
            log.begin(step)
            log.write("run", begin=step)
            for number in steps:
                log.write("train", step=number)
            log.write("summary")
    kinds = [
        (record["kind"], record.get("step", record.get("begin"))) for record in read_records(tmp_path / METRICS_FILE)
    ]
    assert kinds == [("run", 0), ("train", 1), ("train", 2), ("run", 2), ("train", 3), ("train", 4), ("summary", None)]


def test_the_time_left_is_that_of_this_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At step 24 of 60 of a resumed run it said 1 s with 36 steps to go, and the first steps' set-up counted."""
    now = [0.0]
    monkeypatch.setattr("launch.logs.time.perf_counter", lambda: now[0])
    with open_log(LogConfig(dir=str(tmp_path)), rank=0, steps=60) as log:
        log.begin(20)
        for step, seconds in ((21, 1000.0), (22, 10.0), (23, 10.0), (24, 10.0)):
            now[0] += seconds
            log.write("train", step=step, loss=2.5, **STEP)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == ["6 min left", "6 min left"]  # steps 22 and 24
    assert [duration(seconds) for seconds in (0.4, 89, 100, 7000, 90_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "1 h 57 min",
        "1 d 1 h",
    ]


def test_the_line_has_both_rates_where_they_differ_and_the_skips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = {**STEP, "lr": {"muon": 2e-2, "adamw": 1e-3}, "grad_norm": float("nan"), "skipped_steps": 3}
    step |= {"tokens": 1_250_000, "mfu": 0.4125, "peak_bytes": 3 << 29}
    with open_log(LogConfig(dir=str(tmp_path)), rank=0, steps=1) as log:
        log.begin(0)
        log.write("train", step=1, loss=2.5, **step)
        log.write("warning", step=1, text="look")
        log.write("sample", step=1, prompt="de", text="f\n\x9b" + "g" * 200)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("step     1/1  loss 2.5000  grad nan  lr 2.00e-02 (adamw 1.00e-03)  1.2 M tokens  12,346")
    assert first.endswith("tok/s  mfu 41.2 %  peak 1.5 GiB  skipped 3")
    assert second == "warning: look"
    assert third == 'sample "def\\n\\x9b' + "g" * 91 + '..."'
    assert [amount(count) for count in (999, 1000, 2.5e9, 3e12, 4e15)] == ["999", "1.0 k", "2.5 G", "3.0 T", "4000.0 T"]
