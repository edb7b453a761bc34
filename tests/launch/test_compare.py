"""The comparison, on hand-made runs whose every number is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch import compare


def write_run(
    folder: Path, *, optimizer: str, lr: float, val: dict[int, float], step_ms: list[float], **train: Any
) -> Path:
    """A run of `len(step_ms)` steps whose training loss is 5 - step / 100; `train`: keys of its config."""
    folder.mkdir(parents=True)
    config = {"model": {"arch": "llama"}, "optimizer": {"name": optimizer, "lr": lr}, "train": {"seed": 0, **train}}
    records: list[dict[str, Any]] = [{"kind": "run", "config": {**config, "log": {"dir": str(folder)}}}]
    for step, milliseconds in enumerate(step_ms, start=1):
        record = {"kind": "train", "step": step, "loss": 5 - step / 100, "step_ms": milliseconds}
        records.append({**record, "tokens": 100 * step, "grad_norm": 1 / step, "lr": {"muon": lr, "adamw": lr / 2}})
    records += [{"kind": "val", "step": step, "loss": loss} for step, loss in val.items()]
    stages = {"reduce_scatter": 1000, "all_gather": 2000}
    if optimizer == "distmuon":
        stages["dp_gather"] = 50
    per_rank = [
        {"state_bytes": 4096, "bytes": stages},
        {"state_bytes": 5120, "bytes": {**stages, "all_gather": 2048}},
    ]
    records.append({"kind": "summary", "val_loss": val[max(val)], "per_rank": per_rank})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    muon = write_run(
        tmp_path / "muon",
        optimizer="distmuon",
        lr=4e-3,
        val={0: 5.5, 20: 3.0, 40: 2.0},
        step_ms=[900.0] + [12.0] * 39,
    )
    adamw = write_run(
        tmp_path / "adamw", optimizer="adamw", lr=2e-3, val={0: 5.5, 20: 3.5, 40: 2.5}, step_ms=[10.0] * 40
    )
    return [muon, adamw]


def test_the_table_has_the_right_numbers(folders: list[Path]) -> None:
    table = compare.summary_table([compare.read_run(folder) for folder in folders])
    rows = {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    }
    assert rows[""] == ["Muon (lr 0.004)", "AdamW (lr 0.002)"]
    assert rows["steps"] == ["40", "40"]
    assert rows["tokens"] == ["4,000", "4,000"]
    assert rows["final training loss"] == ["4.6050", "4.6050"]  # steps 39 and 40
    assert rows["final validation loss"] == ["2.0000", "2.5000"]
    assert rows["steps to validation loss 2.5000"] == ["30 (0.75x)", "40"]  # half way from 3.0 at 20 to 2.0 at 40
    assert rows["seconds of steps to that"] == ["0.4 (0.90x)", "0.4"]  # 30 steps of 12 ms, 40 of 10 ms
    assert rows["median step, ms"] == ["12.0", "10.0"]
    assert rows["state, bytes a rank"] == ["5,120", "5,120"]
    assert rows["all_gather, bytes a rank and step"] == ["2,048", "2,048"]
    assert rows["dp_gather, bytes a rank and step"] == ["50", "0"]


def test_the_command_writes_a_picture_and_the_table(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.main([*map(str, folders), "--out", str(tmp_path / "out")])
    with Image.open(tmp_path / "out" / "loss.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == (1800, 1200)
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 10  # lines, not a blank page
    table = (tmp_path / "out" / "summary.md").read_text()
    assert capsys.readouterr().out == table


def test_the_baseline_is_the_best_adamw_and_files_are_passed_by(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was the first one, however badly tuned; and `runs/sweep/*` ended at sweep.md."""
    better = write_run(tmp_path / "tuned", optimizer="adamw", lr=4e-3, val={0: 5.5, 40: 2.25}, step_ms=[10.0] * 40)
    (tmp_path / "sweep.md").write_text("a table")
    compare.main([str(folders[1]), str(tmp_path / "sweep.md"), str(better), "--out", str(tmp_path / "out")])
    assert "| steps to validation loss 2.2500 | not reached | 40 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="runs: found 1 files and no folder"):
        compare.main([str(tmp_path / "sweep.md"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("loss", "steps"), [(6.0, 0.0), (5.5, 0.0), (4.25, 10.0), (3.0, 20.0), (2.75, 25.0), (2.0, 40.0), (1.9, None)]
)
def test_steps_to_reach_interpolates(loss: float, steps: float | None) -> None:
    assert compare.steps_to_reach([(0, 5.5), (20, 3.0), (40, 2.0)], loss) == steps


def test_smoothing_starts_at_the_first_loss_and_keeps_a_constant() -> None:
    assert [loss for _, loss in compare.smoothed([(1, 5.0), (2, 5.0), (3, 5.0)])] == pytest.approx([5.0] * 3)
    (_, first), (_, second) = compare.smoothed([(1, 4.0), (2, 2.0)])
    assert first == pytest.approx(4.0)
    assert second == pytest.approx((0.9 * 4.0 + 2.0) / 1.9)


def test_unfinished_and_missing_runs_are_refused(folders: list[Path], tmp_path: Path) -> None:
    path = folders[0] / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match="no summary; the run has not finished"):
        compare.read_run(folders[0])
    with pytest.raises(ValueError, match=r"nothing: found no metrics\.jsonl"):
        compare.read_run(tmp_path / "nothing")


def test_runs_are_named_by_what_they_differ_in(folders: list[Path], tmp_path: Path) -> None:
    val = {0: 5.5, 40: 2.25}
    others = [
        write_run(tmp_path / str(seed), optimizer="distmuon", lr=4e-3, val=val, step_ms=[1.0] * 40, seed=seed)
        for seed in (0, 1)
    ]
    slower = write_run(tmp_path / "w", optimizer="adamw", lr=2e-3, val=val, step_ms=[1.0] * 40, warmup_steps=9)
    runs = [compare.read_run(folder) for folder in (*others, slower, folders[1])]
    assert compare.labels(runs) == [
        "Muon (lr 0.004, warmup_steps None, seed 0)",
        "Muon (lr 0.004, warmup_steps None, seed 1)",
        "AdamW (lr 0.002, warmup_steps 9)",
        "AdamW (lr 0.002, warmup_steps None)",
    ]


def test_the_picture_has_time_rates_and_norms(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had the losses over steps alone."""
    from matplotlib import pyplot

    twin = write_run(tmp_path / "twin", optimizer="adamw", lr=2e-3, val={0: 5.5, 40: 2.5}, step_ms=[10.0] * 40, seed=1)
    monkeypatch.setattr(pyplot, "close", lambda _: None)
    compare.draw([compare.read_run(folder) for folder in (*folders, twin)], tmp_path / "loss.png")
    figure = pyplot.gcf()
    monkeypatch.undo()
    over_steps, over_time, rates, norms = figure.axes
    try:
        assert [line.get_xdata()[-1] for line in over_steps.lines] == [40] * 6
        seconds = [line.get_xdata()[-1] for line in over_time.lines]
        assert seconds == pytest.approx([0.9 + 39 * 0.012] * 2 + [0.4] * 4)
        assert [(line.get_ydata()[0], line.get_linestyle()) for line in rates.lines][:2] == [(4e-3, "-"), (2e-3, "--")]
        assert [line.get_ydata()[0] for line in norms.lines] == [1.0] * 3
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend == ["Muon (lr 0.004)", "AdamW (lr 0.002, 2 seeds)"]
        assert len({line.get_color() for line in norms.lines}) == 2
        assert figure.get_suptitle() == "3 runs of llama, 40 steps, 4.0 k tokens"
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    finally:
        pyplot.close(figure)
