"""The sweep: grids of any keys, finished trials skipped and stale ones run again, the best named with its edge."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from launch import sweep
from launch.config import as_dict, parse
from tests.launch.test_pretrain import ROOT, SHORT, TINY

LRS = {"optimizer.name": ["distmuon", "adamw"], "optimizer.lr": [1e-3, 2e-3]}


def finish(trial: sweep.Trial, val_loss: float | None, nproc: int) -> None:
    """What a finished run of this trial leaves."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    run = {"kind": "run", "config": as_dict(parse([*trial.arguments])), "world_size": nproc}
    summary = {"kind": "summary", "val_loss": val_loss, "train_loss": 3.0, "seconds": 1.5, "skipped_steps": 0}
    (trial.folder / "metrics.jsonl").write_text(f"{json.dumps(run)}\n{json.dumps(summary)}\n")


def with_losses(settings: Mapping[tuple[tuple[str, Any], ...], tuple[float | None, ...]]) -> list[sweep.Setting]:
    return [sweep.Setting(values=values, losses=losses) for values, losses in settings.items()]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 10}\n")
    return path


def test_both_optimizers_get_the_same_grid(config: Path, tmp_path: Path) -> None:
    grid = sweep.trials(config, [LRS], ["train.seed=7"], tmp_path)
    parsed = [parse([*trial.arguments]) for trial in grid]
    assert {(run.train.seed, run.train.steps) for run in parsed} == {(7, 10)}
    assert [(run.optimizer.name, run.optimizer.lr) for run in parsed] == [
        ("distmuon", 1e-3),
        ("distmuon", 2e-3),
        ("adamw", 1e-3),
        ("adamw", 2e-3),
    ]
    assert [trial.folder.name for trial in grid[:2]] == ["name=distmuon,lr=0.001", "name=distmuon,lr=0.002"]
    assert sweep.DEFAULT["optimizer.lr"] == (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def test_any_key_varies_and_the_last_one_fastest(config: Path, tmp_path: Path) -> None:
    """It was the learning rate alone."""
    given = ["optimizer.adamw_betas=[0.9,0.95],[0.9,0.99]", "optimizer.adamw_lr=null,1e-3", "train.seed=0,1"]
    grid = sweep.trials(config, [dict(map(sweep.parse_vary, given))], [], tmp_path)
    parsed = [parse([*trial.arguments]) for trial in grid]
    found = [(run.optimizer.adamw_betas, run.optimizer.adamw_lr, run.train.seed) for run in parsed]
    assert found == [
        (betas, lr, seed) for betas in ((0.9, 0.95), (0.9, 0.99)) for lr in (None, 1e-3) for seed in (0, 1)
    ]
    assert len({trial.folder for trial in grid}) == 8


def test_each_optimizer_may_have_a_grid_of_its_own(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "grids.yaml"
    path.write_text(
        "- {optimizer.name: distmuon, optimizer.lr: [4e-3, 8e-3]}\n"
        "- optimizer: {name: adamw, lr: [1e-3], adamw_betas: [[0.9, 0.99]]}\n"
    )
    grids = [{**grid, "train.seed": [0, 1]} for grid in sweep.read_grids(path)]
    parsed = [parse([*trial.arguments]) for trial in sweep.trials(config, grids, [], tmp_path)]
    assert [(run.optimizer.name, run.optimizer.lr, run.train.seed) for run in parsed] == [
        *(("distmuon", lr, seed) for lr in (4e-3, 8e-3) for seed in (0, 1)),
        *(("adamw", 1e-3, seed) for seed in (0, 1)),
    ]
    assert parsed[-1].optimizer.adamw_betas == (0.9, 0.99)


def test_only_a_finished_run_of_the_same_configuration_counts(config: Path, tmp_path: Path) -> None:
    def trial(*overrides: str) -> sweep.Trial:
        return sweep.trials(config, [{"optimizer.lr": [1e-3]}], overrides, tmp_path)[0]

    assert trial().final_val(2) is None
    finish(trial(), 2.5, nproc=2)
    assert trial().final_val(2) == 2.5
    assert trial("checkpoint.every=5", "log.every=5").final_val(2) == 2.5  # no other result
    assert trial().final_val(1) is None
    config.write_text("train: {steps: 11}\n")
    assert trial().final_val(2) is None
    finish(trial(), None, nproc=2)
    assert trial().final_val(2) == math.inf
    path = trial().folder / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0])
    assert trial().final_val(2) is None


def test_a_second_sweep_runs_only_what_is_missing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {("distmuon", 1e-3): 2.5, ("distmuon", 2e-3): 2.25, ("adamw", 1e-3): 2.75, ("adamw", 2e-3): None}
    ran: list[tuple[str, float]] = []

    def run(trial: sweep.Trial, nproc: int, environment: Mapping[str, str]) -> None:
        key = trial.settings["optimizer.name"], trial.settings["optimizer.lr"]
        ran.append(key)
        finish(trial, losses[key], nproc)

    monkeypatch.setattr(sweep.Trial, "run", run)
    out = tmp_path / "sweep"
    arguments = ["--config", str(config), "--out", str(out)]
    arguments += ["--vary", "optimizer.name=distmuon,adamw", "--vary", "optimizer.lr=1e-3,2e-3"]
    sweep.main(arguments)
    assert ran == list(losses)
    (out / "name=adamw,lr=0.001" / "metrics.jsonl").unlink()
    sweep.main(arguments)
    assert ran[4:] == [("adamw", 1e-3)]
    table = (out / "sweep.md").read_text()
    assert table in capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert rows[0] == "| optimizer.name | optimizer.lr | validation loss |"
    assert rows[2:] == [
        "| distmuon | 0.001 | 2.5000 |",
        "| distmuon | 0.002 | **2.2500** |",
        "| adamw | 0.001 | **2.7500** |",
        "| adamw | 0.002 | diverged |",
    ]
    largest = "Its optimizer.lr is the largest that was tried: widen the grid."
    assert f"- name distmuon: the best of 2 trials is lr 0.002. {largest}" in table
    assert "- name adamw: the best of 2 trials is lr 0.001. Its optimizer.lr is the smallest" in table
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [result["val_loss"] for result in results] == list(losses.values())
    assert results[0]["settings"] == {"optimizer.name": "distmuon", "optimizer.lr": 1e-3}
    with Image.open(out / "sweep.png") as image:
        assert image.size == (1200, 750)
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 10


def test_seeds_become_mean_and_spread() -> None:
    lr = "optimizer.lr"
    found = with_losses(
        {
            ((lr, 1e-3),): (2.0, 2.2, 2.4),
            ((lr, 2e-3),): (2.0, 2.1, None),
            ((lr, 4e-3),): (1.0, math.inf, 1.0),
            ((lr, 8e-3),): (None, None, None),
        }
    )
    table = sweep.table(found)
    assert "mean and standard deviation over 3 seeds" in table
    for row in ("0.001 | **2.2000** ± 0.2000", "0.002 | 2 of 3 seeds", "0.004 | 1 of 3 diverged", "0.008 | not run"):
        assert f"| {row} |" in table
    assert "widen" not in table and "Some have not finished" in table


def test_the_best_inside_the_grid_is_not_on_its_edge() -> None:
    def verdict(*losses: float) -> str:
        lrs = [(("optimizer.lr", lr), ("optimizer.ns_steps", 5)) for lr in (1e-3, 2e-3, 4e-3)]
        return sweep.table(with_losses(dict(zip(lrs, [(loss,) for loss in losses]))))

    assert "widen" not in verdict(3.0, 2.0, 2.5)
    assert "smallest" in verdict(1.0, 2.0, 2.5) and "largest" in verdict(3.0, 2.0, 1.0)
    assert "nothing has finished" in verdict(math.inf, math.inf, math.inf)


def test_unequal_budgets_are_told() -> None:
    name, lr = "optimizer.name", "optimizer.lr"
    found = with_losses(
        {
            ((name, "distmuon"), (lr, 1e-3)): (2.0,),
            ((name, "distmuon"), (lr, 2e-3)): (2.1,),
            ((name, "adamw"), (lr, 1e-3)): (2.5,),
        }
    )
    assert "The sides were not tuned alike: 2, 1 trials." in sweep.table(found)
    assert "not tuned alike" not in sweep.table(found[1:])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--vary", "optimizer.lr"], r"--vary: found 'optimizer\.lr'"),
        (["--vary", "optimizer.lr=[1"], r"--vary: found 'optimizer\.lr=\[1'"),
        (["--vary", "optimizer.lr=1e-3,0.001"], r"--vary: found the same run twice: lr 0\.001, and lr 0\.001"),
        (["--grid", "nowhere.yaml"], r"--grid: found nowhere\.yaml: .*No such file"),
        (["--grid", "grids.yaml"], r"--grid: found no list of mappings in grids\.yaml"),
    ],
)
def test_what_is_no_grid_is_refused(
    arguments: list[str], named: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("grids.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match=named):
        sweep.main(["--config", str(config), *arguments])
    assert not Path("runs").exists()


def test_a_wrong_key_or_value_is_told_before_the_first_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a CalledProcessError with the whole command, after the first run had been started."""
    monkeypatch.setattr(sweep.Trial, "run", lambda *_: pytest.fail("a run was started"))
    command = ["--config", str(config), "--out", str(tmp_path / "sweep")]
    for given in (["--set", "train.stps=20"], ["--vary", "train.stps=20,30"]):
        with pytest.raises(SystemExit):
            sweep.main([*command, *given])
        assert "unrecognized arguments: --train.stps=20; did you mean train.steps?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sweep.main([*command, "--vary", "train.seed=0,one"])
    assert "train.seed" in capsys.readouterr().err


def test_jobs_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 16)
    gpus = [str(number) for number in range(8)]
    assert sweep.environment(0, nproc=2, jobs=1, gpus=gpus) == {}
    assert sweep.environment(3, nproc=2, jobs=4, gpus=gpus) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "6,7"}
    assert sweep.environment(3, nproc=2, jobs=32, gpus=[]) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert sweep.environment(0, nproc=1, jobs=2, gpus=[]) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert sweep.visible_gpus(nproc=1, jobs=3) == ["4", "5", "6"]
    with pytest.raises(ValueError, match=r"--jobs: found 2 for trials of 2 processes and 3 GPUs; .*set --jobs 1"):
        sweep.visible_gpus(nproc=2, jobs=2)


def test_trials_run_at_once_and_one_that_fails_stops_no_other(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two real trials of one process; the third has no data."""
    (tmp_path / "a.bin").write_bytes(bytes(4000))
    paths = [*SHORT, "--train.steps=2"]
    data = ["data.source=bin", f"data.val={tmp_path}/a.bin", "model.config.vocab_size=256"]
    overrides = [argument.removeprefix("--") for argument in (*TINY, *paths, *data)]
    command = ["--config", str(ROOT / "configs/quickstart.yaml"), "--out", str(tmp_path / "sweep")]
    command += ["--nproc", "1", "--jobs", "2", "--set", *overrides, "--vary", f"data.train=none,{tmp_path}/a.bin"]
    with pytest.raises(ValueError, match=r"found 2 of 4 trials that failed; the first: .*found no file for 'none'"):
        sweep.main([*command, "--vary", "train.seed=0,1"])
    output = capsys.readouterr().out
    assert output.count(": running") == 4 and "[2/4" in output
    assert "± 0." in (tmp_path / "sweep" / "sweep.md").read_text()
