"""benchmarks.prove_gpu: its dry run holds, a part that fails stops no other, and docs/gpu.md says what was measured."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import prove_gpu
from benchmarks.prove_gpu import PARTS, Run, Span, main, prove, structure, table

ROOT = Path(__file__).parents[2]
CHEAP = ("facts", "newton_schulz", "passes")


def test_the_parts_that_need_no_ranks_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--cpu", "--parts", ",".join(CHEAP), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert set(json.loads(out.read_text())) == set(CHEAP)
    assert main(["--table", str(out)]) == 0 and capsys.readouterr().out == printed


@pytest.mark.slow
def test_the_whole_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--cpu", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert list(results) == list(PARTS)
    assert results["promises"]["holds"] and results["probe"]["backend"] == "gloo"
    assert results["share"]["shares"][0]["planned_gib"] > 0
    stages = results["profile"]["by_overlap"]["True"]["stages"]
    assert {"distmuon::reduce_scatter", "distmuon::newton_schulz", "distmuon::all_gather"} <= set(stages)
    assert len(table(results).splitlines()) == 2 + len(PARTS)


def test_a_part_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(run: Run) -> dict[str, Any]:
        raise RuntimeError("no such | kernel")

    monkeypatch.setitem(PARTS, "probe", broken)
    out = tmp_path / "gpu.json"
    results = prove(Run(dry=True, ends_at=time.monotonic() + 60), ["probe", "passes"], out)
    assert "no such" in results["probe"]["error"] and results["passes"]["gb_per_s"]
    assert json.loads(out.read_text()) == results
    lines = table(results).splitlines()
    assert "**failed**" in lines[2] and all(line.count("|") == 5 for line in lines)
    assert main(["--cpu", "--parts", "probe"]) == 1


def test_what_there_is_no_time_for_is_listed(tmp_path: Path) -> None:
    results = prove(Run(dry=True, ends_at=time.monotonic() - 1), ["passes"], None)
    assert results["passes"]["error"] == "not run: no time left"


def test_without_a_gpu_the_dry_mode_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(prove_gpu, "num_gpus", lambda: 0)
    with pytest.raises(SystemExit):
        main([])
    assert "--cpu is the dry mode" in capsys.readouterr().err


def test_the_structure_of_a_profile() -> None:
    """Backward launches two kernels; of three reduce-scatters two start before the second kernel ends."""
    launch = "cudaLaunchKernel"
    spans = [
        Span("prove::backward", 0, 10, False, 0),
        Span("prove::step", 10, 20, False, 0),
        Span("prove::forward", 20, 30, False, 0),
        Span("distmuon::reduce_scatter/0", 1, 2, False, 0),
        Span(launch, 1, 2, False, 1),
        Span("gemm", 3, 8, True, 1),
        Span(launch, 5, 6, False, 2),
        Span("gemm", 8, 30, True, 2),
        Span("ncclDevKernel_ReduceScatter_PreMulSum_f32_RING_LL", 9, 12, True, 3),
        Span("ncclDevKernel_ReduceScatter_PreMulSum_f32_RING_LL", 12, 29, True, 4),
        Span("ncclDevKernel_ReduceScatter_PreMulSum_f32_RING_LL", 31, 33, True, 5),
        Span("cudaStreamSynchronize", 12, 13, False, 6),
        Span("cudaStreamSynchronize", 25, 26, False, 7),
        Span("ncclDevKernel_AllGather_RING_LL", 40, 50, True, 8),
    ]
    found = structure(spans)
    assert (found["reduce_scatters"], found["before_the_last_backward_kernel"]) == (3, 2)
    assert found["host_waits_in_step"] == {
        "cudaStreamSynchronize": 1,
        "cudaDeviceSynchronize": 0,
        "cudaEventSynchronize": 0,
    }
    assert found["step_returns_before_the_device_ms"] == pytest.approx(0.03)
    assert found["all_gathers_end_after_step_ms"] == pytest.approx(0.03)


def test_the_page_says_what_was_measured() -> None:
    """The table of the JSON file where there is one; else, plainly, that there is none."""
    page = (ROOT / "docs/gpu.md").read_text()
    said = page.partition("<!-- measured -->")[2].partition("<!-- end -->")[0]
    measured = ROOT / "benchmarks/results/gpu.json"
    if measured.exists():
        assert table(json.loads(measured.read_text())) in said
    else:
        assert "**Nothing has run on CUDA**" in said
