"""The sweep: the same grid for both optimizers, finished runs skipped, stale ones run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import sweep
from launch.config import as_dict, parse


def finish(trial: sweep.Trial, val_loss: float | None, nproc: int) -> None:
    """What a finished run of this trial leaves."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    run = {"kind": "run", "config": as_dict(parse([*trial.arguments])), "world_size": nproc}
    summary = {"kind": "summary", "val_loss": val_loss}
    (trial.folder / "metrics.jsonl").write_text(f"{json.dumps(run)}\n{json.dumps(summary)}\n")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 10}\n")
    return path


def test_both_optimizers_get_the_same_grid(config: Path, tmp_path: Path) -> None:
    grid = sweep.trials(config, [1e-3, 2e-3], ["train.seed=7"], tmp_path)
    assert [(trial.optimizer, trial.lr) for trial in grid] == [
        ("distmuon", 1e-3),
        ("distmuon", 2e-3),
        ("adamw", 1e-3),
        ("adamw", 2e-3),
    ]
    parsed = [parse([*trial.arguments]) for trial in grid]
    assert {(run.train.seed, run.train.steps) for run in parsed} == {(7, 10)}
    assert [(run.optimizer.name, run.optimizer.lr) for run in parsed] == [(trial.optimizer, trial.lr) for trial in grid]
    assert len({run.log.dir for run in parsed}) == 4
    assert sweep.GRID == (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def test_only_a_finished_run_of_the_same_configuration_counts(config: Path, tmp_path: Path) -> None:
    (trial, *_) = sweep.trials(config, [1e-3], [], tmp_path)
    assert trial.final_val(2) is None
    finish(trial, 2.5, nproc=2)
    assert trial.final_val(2) == 2.5
    assert trial.final_val(1) is None
    config.write_text("train: {steps: 11}\n")
    assert trial.final_val(2) is None


def test_a_second_sweep_runs_only_what_is_missing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {("distmuon", 1e-3): 2.5, ("distmuon", 2e-3): 2.25, ("adamw", 1e-3): 2.75, ("adamw", 2e-3): None}
    ran: list[tuple[str, float]] = []

    def run(trial: sweep.Trial, nproc: int) -> None:
        ran.append((trial.optimizer, trial.lr))
        finish(trial, losses[trial.optimizer, trial.lr], nproc)

    monkeypatch.setattr(sweep.Trial, "run", run)
    arguments = ["--config", str(config), "--lrs", "1e-3", "2e-3", "--out", str(tmp_path / "sweep")]
    sweep.main(arguments)
    assert ran == list(losses)
    (tmp_path / "sweep" / "adamw-lr0.001" / "metrics.jsonl").unlink()
    sweep.main(arguments)
    assert ran[4:] == [("adamw", 1e-3)]
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "The best of distmuon, 0.002, lies on the edge of the grid: widen it with --lrs." in table
    assert "The best of adamw, 0.001, lies on the edge" in table
    assert "| 0.001 | 2.5000 | **2.7500** |\n| 0.002 | **2.2500** | diverged |\n" in table
    assert table in capsys.readouterr().out


def test_the_best_inside_the_grid_is_not_on_its_edge() -> None:
    losses = {("distmuon", lr): loss for lr, loss in ((1e-3, 3.0), (2e-3, 2.0), (4e-3, 2.5))}
    assert "edge" not in sweep.table({**losses, ("adamw", 1e-3): 2.0})  # AdamW's grid is not finished
    assert "edge" in sweep.table({**losses, ("distmuon", 4e-3): 1.0})


def test_a_wrong_override_is_told_before_the_first_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a CalledProcessError with the whole command, after the first run had been started."""
    monkeypatch.setattr(sweep.Trial, "run", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(SystemExit):
        sweep.main(["--config", str(config), "--out", str(tmp_path / "sweep"), "--set", "train.stps=20"])
    assert "unrecognized arguments: --train.stps=20; did you mean train.steps?" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_reason(config: Path, tmp_path: Path) -> None:
    (trial, *_) = sweep.trials(config, [1e-3], ["data.source=bin", "data.train=none", "data.val=none"], tmp_path)
    with pytest.raises(ValueError, match=r"distmuon-lr0\.001: found exit status 1: error: data\.train: found no file"):
        trial.run(1)
