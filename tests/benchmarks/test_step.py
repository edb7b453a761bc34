"""The benchmark runs, lists what cannot run with its reason, and sees a wrong rule."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import report
from benchmarks.measure import measure
from benchmarks.peers import Peer, System, all_peers, ours
from benchmarks.setting import Setting, Trainee

ROOT = Path(__file__).parents[2]
TINY = Setting(d_model=32, layers=1, vocabulary=64, batch=1, seq_len=16)


def test_one_command_measures_every_column(tmp_path: Path) -> None:
    """Two processes, four rows, one of which cannot run on a CPU, since its package needs Triton and a GPU."""
    rows = "distmuon,distmuon AdamW,DDP + ZeRO-1 torch.optim.Muon,FSDP2 + muonium"
    command = ["--ranks", "2", "--d-model", "32", "--layers", "1", "--vocabulary", "64", "--batch", "1"]
    command += ["--seq-len", "16", "--rounds", "2", "--rows", rows, "--out", str(tmp_path / "run.json")]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", *command], cwd=ROOT, capture_output=True, text=True, timeout=170
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "run.json").read_text())
    assert [row["name"] for row in found["rows"]] == rows.split(",")[:3]
    left_out = next(row for row in found["not_run"] if row["name"] == "FSDP2 + muonium")
    assert left_out["reason"] and left_out["reason"] in run.stdout, "the reason is printed as well"
    for row in found["rows"]:
        assert all(len(row[key]) == 2 and min(row[key]) > 0 for key in ("whole", "sync_step"))
        assert row["replicas_equal"]
        assert row["distance"]["float32"]["update"] < (0.05 if row["rule"] == "muon" else 1e-3)
    muon, adamw, zero = found["rows"]
    assert sum(muon["ns_matrices"]) == sum(zero["ns_matrices"]) == 6
    # 12*32*32 elements of matrices, of which each rank holds a half, 4 bytes; AdamW's 8 on top
    assert 12 * 32 * 32 * 4 < sum(muon["state_bytes"]) < sum(adamw["state_bytes"])
    if found["conditions"]["wire"]:
        assert all(row["wire_bytes"] is None for row in found["rows"])
    else:
        assert 1.2 * muon["wire_bytes"] < zero["wire_bytes"], "all-reduce and broadcast send half as much again"


def _broken(trainee: Trainee, setting: Setting) -> System:
    raise RuntimeError("planted <reason>")


def _measure(*peers: Peer) -> dict[str, Any]:
    return measure(peers, TINY, rounds=1, check_steps=3, device=torch.device("cpu"), wire=False)


def test_a_row_that_raises_is_listed_and_the_others_run() -> None:
    found = _measure(Peer(name="broken", make=_broken), Peer(name="distmuon", make=ours()))
    assert found["not_run"] == [{"name": "broken", "reason": "RuntimeError: planted <reason>", "note": ""}]
    assert [row["name"] for row in found["rows"]] == ["distmuon"] and len(found["plain"]) == 1


def test_the_distance_sees_a_planted_wrong_scale() -> None:
    """A scale sqrt(max(1, m/n)) in place of 0.2*sqrt(max(m, n)), and an AdamW whose decay is off by a factor."""
    right, wrong, decay = _measure(
        Peer(name="right", make=ours()),
        Peer(name="wrong scale", make=ours(adjust_lr_fn="original")),
        Peer(name="wrong decay", make=ours(routes="adamw", adamw_weight_decay=10.0), rule="adamw"),
    )["rows"]
    assert right["distance"]["float32"]["update"] < 0.05
    assert wrong["distance"]["float32"]["update"] > 0.05
    assert decay["distance"]["float32"]["update"] > 0.05


def test_names_of_rows_are_distinct_and_reasons_survive_markdown() -> None:
    names = [peer.name for peer in all_peers()]
    assert len(set(names)) == len(names) and names[0] == report.OURS and report.OURS_ADAMW in names
    assert report._plain("a|b <c> `d`") == "a/b (c) 'd'"


@pytest.mark.parametrize(("peer_ms", "verdict"), [(13.0, "met"), (10.5, "MISSED")])
def test_verdicts_compare_with_the_best_peer_of_the_same_rule_only(peer_ms: float, verdict: str) -> None:
    def row(name: str, ms: float, rule: str = "muon", equal: bool = True) -> dict[str, Any]:
        return {"name": name, "rule": rule, "equal": equal, "sync_step": [ms] * 3, "whole": [ms + 10] * 3}

    rows = [
        row("distmuon", 10.0),
        row("peer", peer_ms),
        row("slow", 99.0),
        row("other", 1.0, equal=False),
        row("distmuon AdamW", 9.9, "adamw"),
        row("AdamW", 1.0, "adamw"),
    ]
    setting = {"d_model": 512, "batch": 64, "seq_len": 256}
    first, second = report.verdicts({"rows": rows, "setting": setting, "plain": [10.0] * 3})
    assert first.endswith(f"{peer_ms / 10:.3f}; target 1.1: {verdict}.") and "(peer)" in first
    assert "1.005; target 1.03: met." in second


def test_the_page_is_what_the_generator_makes_of_the_committed_results() -> None:
    assert list(report.RESULTS.glob("step_*.json")), "no result is committed"
    assert report.page() == report.PAGE.read_text(), "run python -m benchmarks.report"
