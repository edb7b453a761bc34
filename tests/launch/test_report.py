"""The report: each number that it shows stands in the records, whatever is missing in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean, median
from threading import Thread
from typing import Any

import pytest

import distmuon
from launch import pretrain, report
from launch.models import build_model
from launch.report import ReportSink, command, page
from launch.report.chart import thin
from launch.report.history import read_history
from launch.report.kinds import kind
from launch.report.timing import median_step
from launch.report.traffic import Planned, bytes_table
from tests.launch.recorded import MATRICES, SENT, STAGES, Record, header, telemetry, train, whole_run, write
from tests.launch.test_pretrain import ROOT, SHORT, TINY, records

Charts = dict[str, Any]


def html_of(*folders: Path, out: Path | None = None) -> str:
    path = out or folders[0] / "report.html"
    report.write_report(list(folders), path)
    return path.read_text(encoding="utf-8")


def text_of(html: str) -> str:
    """What a reader sees of the page's markup, without its parts that are code."""
    return unescape(own_text(html))


def charts_of(html: str) -> Charts:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    charts: Charts = json.loads(found[1])
    return charts


def own_text(html: str) -> str:
    """The page without plotly's source."""
    return re.sub(r'<script id="plotly">.*?</script>', "", html, flags=re.DOTALL)


def trace(charts: Charts, chart: str, name: str) -> dict[str, Any]:
    (found,) = [trace for trace in charts[chart]["traces"] if trace["name"] == name]
    return dict(found)


def rows_of(html: str, caption: str) -> dict[str, list[str]]:
    """The cells of the table whose caption says so, by their first."""
    tables = re.findall(r"<table>(.*?)</table>", html, re.DOTALL)
    (table,) = [found for found in tables if caption in found.partition("</caption>")[0]]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
    return {row[0]: row[1:] for row in rows if row}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Record], str]:
    recorded = whole_run()
    return recorded, html_of(write(tmp_path_factory.mktemp("whole"), recorded))


def of_kind(recorded: list[Record], kind: str) -> list[Record]:
    return [record for record in recorded if record["kind"] == kind]


# ------------------------------------------------------------------------------------------------- what the page says


def test_the_curves_are_the_records(whole: tuple[list[Record], str]) -> None:
    recorded, html = whole
    charts, steps = charts_of(html), of_kind(recorded, "train")
    loss = trace(charts, "loss", "training")
    assert loss["x"] == [record["step"] for record in steps]
    assert loss["y"] == [record["loss"] for record in steps]
    assert loss["xs"]["tokens"] == [record["tokens"] for record in steps]
    assert loss["xs"]["time"][-1] == pytest.approx(sum(record["step_ms"] for record in steps) / 1e3, abs=1e-4)
    assert charts["loss"]["choices"]["time"] == "time of all steps (s)"
    val = trace(charts, "loss", "validation")
    assert list(zip(val["x"], val["y"])) == [(record["step"], record["loss"]) for record in of_kind(recorded, "val")]
    assert val["xs"]["tokens"] == [0, *(4096 * step for step in (10, 20, 30, 40))]
    for rule, name in (("muon", "Muon"), ("adamw", "AdamW")):
        assert trace(charts, "lr", name)["y"] == [record["lr"][rule] for record in steps]
    assert trace(charts, "grad_norm", "norm")["y"] == [record["grad_norm"] for record in steps]
    assert trace(charts, "tokens_per_s", "tokens per second")["y"] == [record["tokens_per_s"] for record in steps]
    assert trace(charts, "step_ms", "step")["y"] == [record["step_ms"] for record in steps]
    assert trace(charts, "mfu", "utilization")["y"] == [0.4] * 40
    assert trace(charts, "peak_bytes", "peak")["y"] == [3 << 30] * 40


def test_the_facts_are_the_records(whole: tuple[list[Record], str]) -> None:
    html = whole[1]
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert "finished step 40 of 40 after 2 min" in html
    assert facts["validation loss"] == "2.5750 at step 40"
    assert facts["tokens seen"] == "163,840"
    assert facts["median step"] == "41 ms" and facts["median speed"] == "1,020 tokens/s"
    assert facts["median MFU"] == "40.0%" and facts["peak memory"] == "4 GiB" and facts["skipped steps"] == "0"


def test_telemetry_is_the_mean_over_a_kind_with_its_extremes(whole: tuple[list[Record], str]) -> None:
    recorded, html = whole
    charts, last = charts_of(html), of_kind(recorded, "telemetry")[-1]
    for key in (
        "update_rms",
        "update_to_weight",
        "weight_rms",
        "residual",
        "momentum_entropy",
        "update_entropy",
        "weight_entropy",
    ):
        for matrix, name in zip(MATRICES, ("q", "o", "down")):
            values = [fields[key] for parameter, fields in last["parameters"].items() if matrix in parameter]
            drawn = trace(charts, key, name)
            assert drawn["x"] == [10, 20, 30, 40]
            assert drawn["y"][-1] == pytest.approx(fmean(values))
            assert drawn["customdata"][-1] == [min(values), max(values), 3]
    assert trace(charts, "update_rms_adamw", "embedding")["y"] == [0.9] * 4
    assert [t["name"] for t in charts["update_rms"]["traces"]] == ["q", "o", "down"]
    assert trace(charts, "update_singular_values", "least")["y"] == [0.58] * 4
    assert trace(charts, "update_singular_values", "greatest")["y"] == [1.12] * 4
    assert trace(charts, "weight_singular_values", "greatest")["y"] == [2.1, 2.2, 2.3, 2.4]
    (box,) = charts["weight_singular_values_by_kind"]["traces"]
    assert box["x"] == ["q", "o", "down"] and box["upperfence"] == [2.4] * 3 and box["median"] == [0.5] * 3
    assert trace(charts, "attention_logits", "model.layers.1.self_attn")["y"] == [12.0, 13.0, 14.0, 15.0]
    assert charts["attention_logits"]["layout"]["shapes"][0]["y0"] == 100
    assert trace(charts, "output_rms", "model.layers.2")["y"] == [3.0] * 4
    (band,) = charts["update_rms"]["layout"]["shapes"]
    assert (band["y0"], band["y1"]) == pytest.approx((0.18, 0.22))
    outside = rows_of(html, "3 of 9 Muon parameters had an update RMS outside 0.2")
    assert outside["model.layers.0.mlp.down_proj.weight"] == ["down", "0.14"]  # the farthest


def test_of_many_layers_the_extremes_and_the_median_are_drawn(tmp_path: Path) -> None:
    charts = charts_of(html_of(write(tmp_path, whole_run(layers=12))))
    assert trace(charts, "output_rms", "greatest of 12 layers")["y"] == [12.0] * 4
    assert trace(charts, "output_rms", "least of 12 layers")["customdata"] == ["model.layers.0"] * 4
    assert trace(charts, "output_rms", "median of 12 layers")["y"] == [7.0] * 4


def test_another_scale_of_updates_has_no_band(tmp_path: Path) -> None:
    recorded = whole_run()
    recorded[0]["config"]["optimizer"]["adjust_lr_fn"] = "original"
    html = html_of(write(tmp_path, recorded))
    assert charts_of(html)["update_rms"]["layout"]["shapes"] == [] and "outside 0.2" not in html


def test_the_timeline_holds_the_medians_end_to_end(whole: tuple[list[Record], str], tmp_path: Path) -> None:
    recorded, html = whole
    typical = median_step(read_history(write(tmp_path, recorded)))
    assert typical is not None
    step_ms = median(record["step_ms"] for record in of_kind(recorded, "train")[1:])  # the first one builds buffers
    assert typical.step_ms == step_ms == 41.0
    assert {span.stage: span.length for span in typical.spans[1:]} == STAGES
    assert typical.spans[0].length == step_ms - sum(STAGES.values())
    assert typical.spans[-1].start + typical.spans[-1].length == pytest.approx(step_ms)
    assert typical.waited == 3.0 + 1.0 + 1.5 + 0.75
    assert "waits for other ranks 6.25 ms (15.2%)" in html
    short = median_step(read_history(write(tmp_path / "short", [header(2), train(1), train(2)])))
    assert short is not None and short.step_ms == 42.0
    charts = charts_of(html)
    travels = trace(charts, "timeline", "to owners")
    begin = {span.stage: span.start for span in typical.spans}
    assert travels["base"] == [begin["start_dp_gather"]] and travels["x"] == [0.5 + 1.5]
    assert travels["customdata"] == ["300 bytes sent by rank 0"]
    assert trace(charts, "timeline", "reduce-scatter")["base"] == [0.0]
    assert rows_of(html, "Median of each stage")["newton_schulz"] == ["orthogonalizes whole matrices", "6", "14.6%"]
    stacked = trace(charts, "stage_ms", "apply")
    assert stacked["y"] == [4.0] * 40 and stacked["stackgroup"]
    assert "On a CPU the host's times are those of the work itself" in text_of(html)


def test_on_a_gpu_the_page_says_what_host_times_mean(tmp_path: Path) -> None:
    html = html_of(write(tmp_path, whole_run(device="cuda", gpus=["NVIDIA H200"])))
    assert "These are times of the host. On a GPU the host queues kernels and goes on" in html
    assert "NVIDIA H200" in html


def test_bytes_and_state_stand_beside_the_plan(tmp_path: Path) -> None:
    """Two ranks of the quickstart; the counted numbers are those that such a run has recorded."""
    quickstart = ["--config", str(ROOT / "configs/quickstart.yaml")]
    counted = {"reduce_scatter": 3739136, "guard": 344, "all_gather": 3739136}
    recorded = whole_run(steps=4)
    recorded[-1]["per_rank"] = [{"state_bytes": n, "bytes": counted} for n in (3939328, 3938816)]
    folder = write(tmp_path / "run", recorded)
    config = pretrain.parse_program(quickstart)[0]
    (folder / "config.yaml").write_text((ROOT / "configs/quickstart.yaml").read_text())
    build_model(config.model, 256).config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    html = html_of(folder)
    table = rows_of(html, "Bytes that the busiest rank sent in the last recorded step.")
    assert table["reduce_scatter"] == ["3,739,136", "3,739,136", "1"]
    assert table["all stages"] == ["7,478,616", "7,478,616", "1"]
    assert rows_of(html, "Memory of the fullest rank.")["optimizer state"] == ["3.757 MiB", "3.757 MiB"]
    # while it runs, rank 0's last record is all there is
    write(folder, recorded[:-1])
    assert rows_of(html_of(folder), "Bytes that rank 0 sent")["dp_gather"] == ["300", "0", "-"]


def test_the_busiest_rank_is_beside_the_plan_of_the_busiest(tmp_path: Path) -> None:
    plan = Planned({"dp_gather": 300}, {"dp_gather": 800}, state=1, parameters=1, gradients=1, transient=1, total=1)
    recorded = whole_run(steps=2)
    for records_there, planned in ((recorded, 800), (recorded[:-1], 300)):  # at the end, and while it runs
        table = bytes_table(read_history(write(tmp_path, records_there)), plan)
        assert table is not None
        (row,) = [row for row in table.rows if row[0] == "dp_gather"]
        assert row[2] == str(planned)


def test_without_a_plan_only_what_was_counted_is_shown(whole: tuple[list[Record], str], tmp_path: Path) -> None:
    table = rows_of(whole[1], "Bytes that the busiest rank sent in the last recorded step.")
    assert table["dp_gather"] == ["400"] and table["all stages"] == [f"{sum(SENT.values()) + 100:,}"]
    assert rows_of(whole[1], "Memory of the fullest rank.") == {"optimizer state": ["5.859 KiB"], "peak": ["4 GiB"]}
    folder = write(tmp_path, whole_run())
    (folder / "config.yaml").write_text("train: {a_key_of_another_version: 1}")
    (folder / "config.json").write_text("{}")
    assert "planned" not in rows_of(html_of(folder), "Bytes that the busiest rank sent")


# --------------------------------------------------------------------------------------------- runs that lack something


def test_a_real_run(tmp_path: Path) -> None:
    run = ["--config", str(ROOT / "configs/quickstart.yaml"), *TINY, *SHORT, "--train.steps=3"]
    pretrain.main([*run, f"--log.dir={tmp_path}", "--optimizer.adamw_lr=1e-3"])
    html = html_of(tmp_path)
    charts, steps = charts_of(html), of_kind(records(tmp_path), "train")
    assert trace(charts, "loss", "training")["y"] == [record["loss"] for record in steps]
    assert trace(charts, "lr", "AdamW")["y"] == pytest.approx([1e-3] * 3)
    assert "finished step 3 of 3" in html and distmuon.__version__ in html
    assert "the rule of each parameter" in html and "model.layers.1.mlp.up_proj.weight" in html
    state = rows_of(html, "Memory of the fullest rank.")["optimizer state"]
    assert state[0] == state[1]  # counted and planned


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, [header(9), train(1), train(2), train(3)])
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    html = html_of(folder)
    assert trace(charts_of(html), "loss", "training")["x"] == [1, 2]
    assert "still running, at step 2 of 9" in html and 'data-reload="30"' in html


def test_a_run_without_news_has_crashed(tmp_path: Path) -> None:
    folder = write(tmp_path, whole_run()[:-1])
    assert read_history(folder).state == "running"
    an_hour_ago = time.time() - 3600
    os.utime(folder / "metrics.jsonl", (an_hour_ago, an_hour_ago))
    html = html_of(folder)
    assert "no summary, and no record for 1 h 0 min: crashed or stopped at step 40 of 40" in html
    assert 'data-reload="0"' in html
    slow = [{**record, "step_ms": 100_000.0} if record["kind"] == "train" else record for record in whole_run()[:-1]]
    write(folder, slow)
    os.utime(folder / "metrics.jsonl", (an_hour_ago, an_hour_ago))
    assert read_history(folder).state == "running"  # 50 of its steps take longer than an hour


def test_a_diverged_run_says_from_where(tmp_path: Path) -> None:
    recorded = [header(30), {"kind": "val", "step": 0, "loss": 5.5}, *(train(step) for step in range(1, 21))]
    recorded += [train(step, loss=None, grad_norm=None, skipped_steps=step - 20) for step in range(21, 31)]
    recorded.append({"kind": "val", "step": 30, "loss": None})
    html = html_of(write(tmp_path, recorded))
    charts = charts_of(html)
    assert "10 steps were skipped; the loss is not finite from step 21" in html
    assert trace(charts, "loss", "training")["y"][20:] == [None] * 10
    marks = trace(charts, "grad_norm", "skipped steps (10)")
    assert marks["x"][::3] == list(range(21, 31))
    assert trace(charts, "loss", "skipped steps (10)")["xs"]["tokens"][0] == 4096 * 21
    everything_lost = [{**record, "loss": None} for record in recorded if record["kind"] in ("train", "val")]
    html = html_of(write(tmp_path, [header(30), *everything_lost]))
    assert "loss" not in charts_of(html) and "the loss is not finite from step 0" in html


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """No norms, stages, tokens or header beyond the config; AdamW alone; a summary without ranks."""
    old = {"kind": "run", "config": {"optimizer": {"name": "adamw", "lr": 1e-3}}}
    steps = [{"kind": "train", "step": step, "loss": 5.0 - step, "lr": {"adamw": 1e-3}} for step in (1, 2, 3)]
    html = html_of(write(tmp_path, [old, *steps, {"kind": "summary", "steps": 3}]))
    charts = charts_of(html)
    assert set(charts) == {"loss", "lr"}
    assert trace(charts, "loss", "training")["y"] == [4.0, 3.0, 2.0] and "finished step 3" in html
    assert charts["loss"]["choices"] == {"steps": "step (count)"}
    for anchor in ("inside", "time", "bytes", "samples", "difference"):
        assert f'id="{anchor}"' not in html


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_run_that_has_just_begun(kept: int, tmp_path: Path) -> None:
    html = html_of(write(tmp_path, whole_run()[:kept]))
    assert f"still running, at step {int(kept == 3)} of 40" in html


def test_a_run_under_a_trainer(tmp_path: Path) -> None:
    folder = write(tmp_path, whole_run(trainer="lightning"))
    (folder / "config.yaml").write_text((ROOT / "configs/quickstart.yaml").read_text())
    (folder / "config.json").write_text("{}")
    html = html_of(folder)
    assert "<dt>trainer</dt><dd>lightning</dd>" in html
    assert rows_of(html, "Bytes that the busiest rank sent")["guard"] == ["8"]  # its own reduction is not planned


def test_a_run_of_several_starts(tmp_path: Path) -> None:
    second = header(40, resumed_from=20)
    recorded = whole_run()
    place = recorded.index(train(21))
    slow = [
        {**record, "step_ms": 9e3} if record.get("step") == 21 and "step_ms" in record else record
        for record in recorded
    ]
    folder = write(tmp_path, [*slow[:place], second, *slow[place:]])
    html = html_of(folder)
    assert "step 0 on 2 ranks; step 20 on 2 ranks" in html and "finished step 40 of 40" in html
    typical = median_step(read_history(folder))
    assert typical is not None and typical.step_ms == 41.0
    again = [*recorded, header(80, resumed_from=40), train(41)]
    assert read_history(write(tmp_path, again)).state == "running"  # the summary is an earlier start's


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    muon = write(tmp_path / "muon", whole_run())
    baseline = whole_run(steps=30)
    baseline[0]["config"]["optimizer"] |= {"name": "adamw", "lr": 2e-3}
    adamw = write(tmp_path / "adamw", baseline)
    html = html_of(muon, adamw, out=tmp_path / "both" / "report.html")
    charts = charts_of(html)
    assert trace(charts, "loss", "muon, validation")["y"][-1] == 2.575
    assert trace(charts, "loss", "adamw, validation")["y"][-1] == 2.6
    assert trace(charts, "grad_norm", "adamw, norm")["x"] == list(range(1, 31))
    assert "finished step 30 of 30" in html and "finished step 40 of 40" in html
    difference = rows_of(html, " keys differ.")
    assert difference["optimizer.name"] == ["distmuon", "adamw"]
    assert difference["optimizer.lr"] == ["0.016", "0.002"] and difference["train.steps"] == ["40", "30"]
    assert "Inside the optimizer: muon" in html and trace(charts, "update_rms-1", "q")
    one, other = write(tmp_path / "x" / "a", whole_run()), write(tmp_path / "y" / "a", whole_run())
    html = html_of(one, other)
    assert "<title>x/a and y/a</title>" in html and "All keys are alike." in html


# ------------------------------------------------------------------------------------------------------ the page itself


def test_every_axis_has_a_unit(whole: tuple[list[Record], str]) -> None:
    charts = charts_of(whole[1])
    assert len(charts) == 23
    for name, chart in charts.items():
        for axis in ("xaxis", "yaxis"):
            if chart["layout"][axis].get("type") != "category":
                assert re.fullmatch(r".+ \(.+\)", chart["layout"][axis]["title"]["text"]), (name, axis)
        assert all(re.fullmatch(r".+ \(.+\)", title) for title in chart["choices"].values())


def test_nothing_is_loaded_from_outside(whole: tuple[list[Record], str]) -> None:
    html = own_text(whole[1])
    assert not re.findall(r"https?:|\ssrc=|@import|url\(|<link", html)
    assert "default-src 'none'" in html
    assert 'id="plotly">' in whole[1] and len(whole[1]) > 1_000_000  # the library is in the page


def test_what_a_record_says_is_text_and_no_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><b>"
    recorded = whole_run(command=[evil])
    recorded[1:1] = [
        {"kind": "warning", "step": 0, "text": evil},
        {"kind": "sample", "step": 1, "prompt": evil, "text": evil},
    ]
    recorded.append({**telemetry(40), "output_rms": {evil: 1.0}})
    html = html_of(write(tmp_path, recorded))
    assert "<script>alert" not in own_text(html) and "&lt;script&gt;alert" in html
    assert trace(charts_of(html), "output_rms", evil)


def test_warnings_and_samples_are_shown(tmp_path: Path) -> None:
    recorded = whole_run()
    recorded.insert(5, {"kind": "warning", "step": 3, "text": "step 3 was skipped"})
    html = html_of(write(tmp_path, recorded))
    assert "<b>step 3</b> step 3 was skipped" in html
    assert "<b>def </b>main(): # 40\n    pass</p>" in html
    assert html.index("main(): # 40") < html.index("main(): # 10")  # the newest first


def test_long_curves_are_thinned_to_recorded_points_with_their_extremes(tmp_path: Path) -> None:
    values: list[float | None] = [float(step % 97) for step in range(50_000)]
    values[33_333], values[44_444] = 1e6, -1e6
    values[12_345] = None
    kept = thin(values)
    assert len(kept) <= 1300 and {0, 12_345, 33_333, 44_444, 49_999} <= set(kept) and kept == sorted(set(kept))
    steps = [train(step) for step in range(1, 10_001)]
    html = html_of(write(tmp_path, [header(10_000), *steps]))
    drawn = trace(charts_of(html), "grad_norm", "norm")
    assert all(y == steps[x - 1]["grad_norm"] for x, y in zip(drawn["x"], drawn["y"]))
    assert len(own_text(html)) < 2_000_000


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.10.self_attn.q_proj.weight", "q"),
        ("model.layers.0.self_attn.q_proj.bias", "bias"),
        ("transformer.h.0.attn.c_attn.weight", "qkv"),
        ("transformer.h.0.attn.c_proj.weight", "o"),
        ("transformer.h.0.mlp.c_proj.weight", "down"),
        ("transformer.wpe.weight", "embedding"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("model.layers.0.self_attn.kv_a_layernorm.weight", "norm"),
        ("model.layers.0.self_attn.kv_b_proj.weight", "kv_b_proj"),
        ("model.layers.1.mlp.experts.7.down_proj.weight", "expert down"),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", "shared expert up"),
        ("model.layers.1.mlp.gate.weight", "router"),
        ("lm_head.weight", "head"),
        ("backbone.layers.0.mixer.in_proj.weight", "in_proj"),
    ],
)
def test_the_kind_of_a_parameter(name: str, expected: str) -> None:
    assert kind(name) == expected


# ----------------------------------------------------------------------------------------------- command and live page


def test_the_command_writes_beside_the_run_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "run", whole_run())
    command.main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html") and (folder / "report.html").is_file()
    command.main([str(folder), str(folder / "metrics.jsonl"), "--out", str(tmp_path / "new" / "page.html")])
    assert (tmp_path / "new" / "page.html").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.html"]  # no file half written
    with pytest.raises(ValueError, match=r"found 1 files and no folder; at least one run's folder is needed"):
        command.main([str(folder / "metrics.jsonl")])
    with pytest.raises(ValueError, match=r"found no metrics\.jsonl; the folder of a run is needed"):
        command.main([str(tmp_path)])
    with pytest.raises(ValueError, match=r"found 1 records and no header"):
        command.main([str(write(tmp_path / "headless", [train(1)]))])
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    page.packages.cache_clear()
    with pytest.raises(ImportError, match=r"found no `plotly\.offline`; jinja2 and plotly write the page"):
        command.main([str(folder)])


def test_the_page_of_a_run_that_goes_on_is_written_at_validations_and_at_the_end(tmp_path: Path) -> None:
    path, recorded = tmp_path / "report.html", whole_run()
    write(tmp_path, recorded[:3])
    sink = ReportSink(tmp_path)
    sink.write(recorded[2])
    assert not path.exists()
    sink.write(recorded[1])
    first = path.read_text()
    assert "still running, at step 1 of 40" in first and 'data-reload="30"' in first
    write(tmp_path, recorded[:-1])
    sink.write(recorded[1])
    assert path.read_text() == first  # at once again would take more than its share of the time
    sink.close()
    assert "ended at step 40 of 40 without a summary" in path.read_text() and 'data-reload="0"' in path.read_text()
    write(tmp_path, recorded)
    ReportSink(tmp_path).close()
    assert "finished step 40 of 40" in path.read_text()


def test_a_page_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, whole_run())
    sink = ReportSink(tmp_path)

    def broken(*arguments: Any) -> str:
        raise RuntimeError("a defect in the report")

    monkeypatch.setattr(page, "render", broken)
    sink.write({"kind": "val", "step": 0, "loss": 1.0})
    sink.close()
    said = capsys.readouterr().err
    assert said.count("report.html was not written: RuntimeError: a defect in the report") == 1


def _browser(tmp_path: Path) -> list[str]:
    """The command of a browser without a window."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "this test draws the page: install chromium"
    return [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]


@pytest.mark.slow
@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_draws_every_chart_without_complaint(look: str, width: int, tmp_path: Path) -> None:
    html_of(write(tmp_path, whole_run()))
    done = subprocess.run(
        [
            *_browser(tmp_path),
            *("--enable-logging=stderr", "--dump-dom", "--virtual-time-budget=8000", f"--window-size={width},4000"),
            f"--blink-settings=preferredColorScheme={0 if look == 'dark' else 1}",
            f"file://{tmp_path / 'report.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count('class="plot-container') == 23
    assert done.stdout.count('<svg class="main-svg"') >= 23


@pytest.mark.slow
@pytest.mark.parametrize("running", [True, False])
def test_the_page_of_a_run_that_goes_on_loads_itself_again(
    running: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "RELOAD_S", 2)
    recorded = whole_run()
    html_of(write(tmp_path, recorded[:-1] if running else recorded))
    asked: list[float] = []

    class Counting(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/report.html":
                asked.append(time.monotonic())
            super().do_GET()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Counting, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/report.html"
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*_browser(tmp_path), "--remote-debugging-port=0", address], **quiet) as browser:
            until = time.monotonic() + 90
            while time.monotonic() < until and (not asked or (len(asked) < 3 and time.monotonic() < asked[0] + 30)):
                time.sleep(0.1)
            browser.terminate()
        server.shutdown()
    assert len(asked) == (3 if running else 1)
