"""The recipe under Ray Train, with two workers on CPUs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integrations.test_recipes import curve, launched, torchrun


@pytest.mark.slow
def test_ray_has_the_loss_curve_of_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it goes on where a run under torchrun has ended, as after a lost worker."""
    pytest.importorskip("ray", reason="pip install distmuon[ray]")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    under_ray = [sys.executable, "-m", "launch.ray_train", "--workers", "2"]
    whole = curve(torchrun("pretrain", tmp_path / "torchrun"))
    assert len(whole) > 4 and curve(launched(under_ray, tmp_path / "ray")) == whole

    torchrun("pretrain", tmp_path / "both", "--train.steps=2", "--train.schedule=constant")
    both = launched(under_ray, tmp_path / "both", "--train.schedule=constant")
    steps = [record["step"] for record in both if record["kind"] == "train"]
    trainers = [record["trainer"] for record in both if record["kind"] == "run"]
    assert steps == [1, 2, 3, 4] and trainers == ["pretrain", "ray"]
