"""The live view: it follows the file as runs write, move and replace it, and shows the records' own numbers."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from launch import tail
from launch.logs import set_aside
from tests.launch.recorded import header, train, whole_run, write


def text_of(folder: Path, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    tail.follow(folder, console, once=True)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_panel_shows_the_last_records(tmp_path: Path) -> None:
    recorded = whole_run()[:-1]
    recorded.append({"kind": "warning", "step": 7, "text": "step 7 was [skipped]"})
    text = text_of(write(tmp_path, recorded))
    for shown in (
        "step 40/40",
        "2.0750",
        "2.5750 at step 40",
        "lr, muon",
        f"{0.002 / 40:.3g}",
        "1,040",
        "163,840",
        "40.0%",
        "3.00 GiB",
        "step 7: step 7 was [skipped]",
        "loss, 5 to 2.08",
        "main(): # 40",
        "llama on 2 ranks",
    ):
        assert shown in text, shown
    assert "finished" not in text
    assert "step 40/40  finished" in text_of(write(tmp_path, whole_run()))


def test_a_run_of_an_earlier_version_and_one_that_diverged(tmp_path: Path) -> None:
    text = text_of(write(tmp_path, [{"kind": "run"}, {"kind": "train", "step": 3, "loss": None, "lr": {"adamw": 0.1}}]))
    assert "step 3" in text and "not finite" in text
    assert "waiting for" in text_of(write(tmp_path, []))


def test_the_time_left_is_that_of_the_last_steps(tmp_path: Path) -> None:
    status = tail.Status(tmp_path)
    for record in (header(300), *(train(step, step_ms=2000.0) for step in range(1, 201))):
        status.take(record)
    assert status.left_s == 200.0 and status.line() == "step 200/300  3 min left"


def test_a_line_that_is_not_whole_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = tail.Follower(path)
    assert list(follower.new()) == []  # no file yet
    first, second = json.dumps(train(1)) + "\n", json.dumps(train(2)) + "\n"
    path.write_text(first + second[:20])
    assert list(follower.new()) == [None, train(1)]
    with path.open("a") as file:
        file.write(second[20:])
    assert list(follower.new()) == [train(2)] and list(follower.new()) == []


def test_a_file_that_is_moved_aside_or_replaced_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = tail.Follower(path)
    write(tmp_path, [header(5), train(1), train(2)])
    assert len(list(follower.new())) == 4
    set_aside(tmp_path)
    assert list(follower.new()) == []
    write(tmp_path, [header(9)])
    assert list(follower.new()) == [None, header(9)]
    whole = tmp_path / "metrics.new"  # as a run that resumes does
    whole.write_text(json.dumps(header(9)) + "\n" + json.dumps(train(1)) + "\n")
    whole.replace(path)
    assert list(follower.new()) == [None, header(9), train(1)]
    path.write_text("")  # the same file, cut off
    assert list(follower.new()) == [None]


def test_without_a_terminal_validations_are_lines_and_the_summary_is_the_end(tmp_path: Path) -> None:
    recorded = whole_run()
    recorded.insert(4, {"kind": "warning", "step": 2, "text": "odd [thing]"})
    write(tmp_path, recorded[:20])
    output = io.StringIO()
    watching = threading.Thread(
        target=tail.follow, args=(tmp_path, Console(file=output, width=200)), kwargs={"poll_s": 0.02}, daemon=True
    )
    watching.start()
    time.sleep(0.2)
    assert watching.is_alive() and "validation loss 2.8000" in output.getvalue()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in recorded[20:]))
    watching.join(timeout=10)
    assert not watching.is_alive()
    lines = output.getvalue().splitlines()
    assert lines[:2] == ["step 0: validation loss 5.5000", "step 2: warning: odd [thing]"]
    assert lines[-2:] == ["step 40: validation loss 2.5750", "step 40/40  finished"]


def test_a_terminal_is_live_until_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, whole_run()[:-1])
    output = io.StringIO()
    monkeypatch.setattr(tail, "Console", lambda: Console(file=output, force_terminal=True, width=80))

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tail.time, "sleep", interrupt)
    tail.main([str(tmp_path)])
    assert "step 40/40" in output.getvalue()


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no folder; a run's folder is needed"):
        tail.main([str(tmp_path / "nothing")])


def test_the_sparkline_falls_with_the_loss_and_has_gaps() -> None:
    assert tail.sparkline([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == "█▇▆▅▄▃▂▁"
    assert tail.sparkline([2.0, None, 1.0]) == "█ ▁" and tail.sparkline([None]) == " " and tail.sparkline([]) == ""
    long = tail.sparkline([1.0] * 500 + [2.0] * 500, width=10)
    assert long == "▁▁▁▁▁█████"
