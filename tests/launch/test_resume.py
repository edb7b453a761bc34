"""Runs that are interrupted: they go on by themselves, bit for bit where the number of ranks is the same."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import distmuon
from distmuon import Sharding
from launch import pretrain
from launch.config import Config, as_dict
from launch.logs import read_records
from launch.resume import StopRequest, check_same_run
from tests import forks
from tests.launch.test_pretrain import ROOT, SHORT, TINY, numbers, records

RUN = [*TINY, *SHORT, "--checkpoint.every=2", "--train.verify_every=3", "--optimizer.precision.newton_schulz=float32"]


def start(
    folder: Path,
    *arguments: str,
    nproc: int = 2,
    launcher: tuple[str, ...] = ("--standalone",),
    program: tuple[str, ...] = ("-m", "launch.pretrain"),
    session: bool = False,
) -> subprocess.Popen[str]:
    """torchrun with the tiny run, in the background."""
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", *launcher]
    command += [f"--nproc_per_node={nproc}", *program, "--config", "configs/quickstart.yaml", *RUN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = str(ROOT)  # for a program that lies elsewhere
    return subprocess.Popen(
        [*command, f"--log.dir={folder}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=session,
    )


def two_ranks(folder: Path, *arguments: str) -> str:
    """The tiny run on two ranks where nothing happens that torchrun would see; what it prints."""
    given = ["--config", "configs/quickstart.yaml", *RUN, f"--log.dir={folder}", *arguments]
    done = forks.torchrun("launch.pretrain", *given, nproc=2, environment={"PYTHONWARNINGS": "error"})
    assert done.returncode == 0, done.stdout
    return done.stdout


def alone(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The same run in this process."""
    pretrain.main(["--config", str(ROOT / "configs/quickstart.yaml"), *RUN, f"--log.dir={folder}", *arguments])
    return records(folder)


def finish(process: subprocess.Popen[str], timeout: float = 240.0) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def history(run: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be the same however often a run was interrupted; the load's own all-gather is counted as state."""
    for record in run:
        for stage in ("state_dict", "verify"):  # which steps are verified is counted from the start of a process
            record.get("bytes", {}).pop(stage, None)
    return numbers(run)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that this torchrun started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process.pid:
            found.append(int(stat.parent.name))
    return sorted(found)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the record of `step` is written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(
        f"step {step} was not reached: {process.communicate()[0] if process.poll() is not None else ''}"
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    two_ranks(folder, "--train.steps=8")
    return records(folder)


LATE_AFTER_A_RESTART = """
import os, time
from launch.pretrain import main
if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and os.environ["RANK"] == "0":
    time.sleep(3)
main()
"""


@pytest.mark.promise(
    "Restarts and preemption",
    "Under `torchrun --max-restarts` a killed worker costs one restart and the steps since the last "
    "checkpoint; all losses are the unbroken run's, bit for bit",
)
def test_a_killed_worker_is_restarted_and_the_run_ends_as_if_nothing_had_happened(
    unbroken: list[dict[str, Any]], tmp_path: Path
) -> None:
    """SIGKILL of one worker under torchrun --max-restarts: every loss of the record is the unbroken run's.

    One restart, though rank 0 is late for it: torchrun keeps its store, in which the other rank once found where the
    dead rank 0 had listened, and was refused by gloo, or hung. The healthy rank had been sent SIGTERM, of which it only
    takes note; it must end all the same, by the collective that fails, long before torchrun's SIGKILL after 30 s.
    """
    program = tmp_path / "late.py"
    program.write_text(LATE_AFTER_A_RESTART)
    process = start(tmp_path, "--train.steps=8", launcher=("--standalone", "--max-restarts=1"), program=(str(program),))
    wait_for_step(tmp_path, 5, process)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    output = finish(process)
    assert "resumed from" in output and "forcefully exiting" not in output
    assert history(records(tmp_path)) == history(unbroken)
    assert records(tmp_path)[-1]["val_loss"] == unbroken[-1]["val_loss"]
    assert [record["resumed_from"] for record in records(tmp_path) if record["kind"] == "run"][-1] >= 4


@pytest.mark.promise(
    "Restarts and preemption",
    "SIGTERM to torchrun itself: the same, and the same command goes on bit for bit; torchrun's own status is then 1",
)
def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(unbroken: list[dict[str, Any]], tmp_path: Path) -> None:
    """Preemption: torchrun passes SIGTERM on to all workers. They leave with 0, torchrun itself always with 1."""
    command = ("--train.steps=8", "--checkpoint.every=100")
    process = start(tmp_path, *command)
    wait_for_step(tmp_path, 3, process)
    asked = time.monotonic()
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "SignalException" in output and "as SIGTERM asked" in output
    assert "forcefully exiting" not in output and time.monotonic() - asked < 30
    saved = distmuon.latest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None and 3 <= int(saved.name.removeprefix("step-")) < 8
    assert f"resumed from {saved}" in two_ranks(tmp_path, *command)
    assert history(records(tmp_path)) == history(unbroken)


@pytest.mark.slow
@pytest.mark.promise(
    "Restarts and preemption",
    "SIGTERM to one rank: all ranks save and exit 0 together, `log.every` steps and one save later",
)
def test_sigterm_to_one_rank_stops_all_with_a_checkpoint_and_status_0(
    unbroken: list[dict[str, Any]], tmp_path: Path
) -> None:
    process = start(tmp_path, "--train.steps=8", "--checkpoint.every=100")
    wait_for_step(tmp_path, 3, process)
    asked = time.monotonic()
    os.kill(workers_of(process)[-1], signal.SIGTERM)
    output = finish(process)
    assert "as SIGTERM asked" in output and time.monotonic() - asked < 30
    saved = distmuon.latest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None and 3 <= int(saved.name.removeprefix("step-")) < 8
    two_ranks(tmp_path, "--train.steps=8", "--checkpoint.every=100")
    assert history(records(tmp_path)) == history(unbroken)


@pytest.mark.promise("Restarts and preemption", "The recipe goes on at another number of ranks (1 -> 2 -> 1)")
def test_a_run_goes_on_at_another_number_of_ranks(unbroken: list[dict[str, Any]], tmp_path: Path) -> None:
    """1 -> 2 -> 1 ranks: the same losses as two ranks throughout, up to the order of sums."""
    alone(tmp_path, "--train.steps=3")
    output = two_ranks(tmp_path, "--train.steps=5", "--checkpoint.asynchronous=true")
    assert "step-00000003, saved by 1 ranks" in output
    run = alone(tmp_path, "--train.steps=8")
    losses = [(r["kind"], r["step"], r["loss"]) for r in run if r["kind"] == "train"]
    wanted = [(r["kind"], r["step"], r["loss"]) for r in unbroken if r["kind"] == "train"]
    assert [loss[:2] for loss in losses] == [loss[:2] for loss in wanted]
    assert [loss[2] for loss in losses] == pytest.approx([loss[2] for loss in wanted], rel=1e-4)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = alone(tmp_path, "--train.steps=4")
    again = alone(tmp_path, "--train.steps=4")
    assert numbers(again) == numbers(first)
    assert again[-1]["val_loss"] == first[-1]["val_loss"] and again[-1]["train_loss"] == first[-1]["train_loss"]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]


def test_without_checkpoints_a_run_starts_afresh_and_erases_nothing(tmp_path: Path) -> None:
    first = alone(tmp_path, "--train.steps=2", "--checkpoint.every=0")
    again = alone(tmp_path, "--train.steps=2", "--checkpoint.every=0")
    assert numbers(again) == numbers(first) and len(again) == len(first)
    assert read_records(tmp_path / "metrics.1.jsonl") == first
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_without_checkpoints_is_refused_among_those_of_another(tmp_path: Path) -> None:
    """It erased the records of the run that the checkpoints belong to, which then went on with a history of a few
    steps."""
    first = alone(tmp_path, "--train.steps=2")
    with pytest.raises(
        ValueError, match=r"checkpoint\.every: found 0, and .*step-00000002 is of a run in this log\.dir"
    ):
        alone(tmp_path, "--train.steps=2", "--checkpoint.every=0")
    assert records(tmp_path) == first


def test_a_longer_run_takes_its_own_rate_at_once_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step after a resume had the old schedule's rate, the second jumped, and nothing was printed."""
    cosine = ["--train.schedule=cosine", "--optimizer.lr=1e-2"]
    alone(tmp_path, *cosine, "--train.steps=4")
    again = alone(tmp_path, *cosine, "--train.steps=4")
    assert "already at step 4 of 4; raise train.steps to go on" in capsys.readouterr().out
    assert not any(record["kind"] == "warning" for record in again)
    run = alone(tmp_path, *cosine, "--train.steps=8")
    (text,) = (record["text"] for record in run if record["kind"] == "warning")
    assert "the learning rate of step 5 is 3.78e-03; it was to be 1.00e-03 when the checkpoint was saved" in text
    rates = [record["lr"]["muon"] for record in run if record["kind"] == "train"][4:]
    assert rates == pytest.approx([1e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * s / 8))) for s in (5, 6, 7, 8)])


def test_the_rate_of_the_first_step_after_a_resume_is_the_recorded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    take = pretrain.train_step

    def watched(model: Any, optimizer: Any, *rest: Any) -> Any:
        seen.append(optimizer.param_groups[0]["lr"])
        return take(model, optimizer, *rest)

    monkeypatch.setattr(pretrain, "train_step", watched)
    alone(tmp_path, "--train.schedule=cosine", "--train.steps=4")
    run = alone(tmp_path, "--train.schedule=cosine", "--train.steps=8")
    assert seen == [record["lr"]["muon"] for record in run if record["kind"] == "train"]


def test_a_validation_that_fails_does_so_at_the_start_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(tmp_path, "--train.steps=2")

    def broken(*_: object) -> float:
        raise ValueError("validation: broken")

    monkeypatch.setattr("launch.run.validate", broken)
    with pytest.raises(ValueError, match="validation: broken"):
        alone(tmp_path, "--train.steps=4", "--train.eval_every=1000")
    assert max(record.get("step", 0) for record in records(tmp_path)) == 2


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """To the whole group of processes, as a terminal does; torchrun passes it on, too. Its own status is then 1."""
    process = start(tmp_path, "--train.steps=10000", "--checkpoint.every=100000", session=True)
    wait_for_step(tmp_path, 3, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert "as SIGINT asked; the same command goes on from there" in output, output
    saved = distmuon.latest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None and "KeyboardInterrupt" not in output
    assert f"stopped after step {int(saved.name.removeprefix('step-'))}," in output


def test_a_second_ctrl_c_interrupts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("launch.resume.time.monotonic", lambda: now[0])
    stop = StopRequest()
    with stop.listening(active=True):
        for seconds in (0.0, 1.0):
            now[0] = seconds
            os.kill(os.getpid(), signal.SIGINT)  # torchrun passes the first one on
        assert stop.signal == "SIGINT"
        now[0] = 60.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.promise(
    "Restarts and preemption",
    "Another run in the same folder is refused, and its first differing key is named",
)
def test_another_run_in_the_same_folder_is_refused_by_key(tmp_path: Path) -> None:
    alone(tmp_path, "--train.steps=2")
    with pytest.raises(
        ValueError, match=r"optimizer\.lr: found 0\.5, the checkpoints in log\.dir are of a run with 0\.01"
    ):
        alone(tmp_path, "--train.steps=4", "--optimizer.lr=0.5")
    alone(tmp_path, "--train.steps=3", "--train.micro_batch=4")
    check_same_run({"train": {"steps": 1, "seed": 0}}, {"train": {"steps": 2, "seed": 0}})


SHARDING = {
    "packing": "contiguous",
    "placement": "replicated",
    "bucket_mb": 0.5,
    "param_gather": "updates",
    "release_grads": True,
    "overlap": False,
    "gpus_per_node": 1,
}
PRECISION = {
    "reduce": "bfloat16",
    "momentum": "int8",
    "newton_schulz": "float32",
    "exchange": "float32",
    "updates": "int8",
    "master": "remainder",
}


@pytest.mark.parametrize(("policy", "values"), [("sharding", SHARDING), ("precision", PRECISION)])
def test_a_run_may_go_on_with_another_sharding_and_precision(policy: str, values: dict[str, Any]) -> None:
    """release_grads, param_gather, master and exchange were refused once, although they hardly change a bit."""
    begun = Config()
    before = getattr(begun.optimizer, policy)
    assert set(values) == {field.name for field in fields(before)}
    for name, value in values.items():
        now = replace(begun, optimizer=replace(begun.optimizer, **{policy: replace(before, **{name: value})}))
        assert as_dict(now) != as_dict(begun), name
        check_same_run(as_dict(begun), as_dict(now))


def test_a_checkpoint_goes_on_with_all_of_them_changed(unbroken: list[dict[str, Any]], tmp_path: Path) -> None:
    """On one rank; none of them changes a bit, so the losses are those of two ranks up to the order of sums."""
    alone(tmp_path, "--train.steps=3")
    given = {"packing": "contiguous", "placement": "replicated", "bucket_mb": "0.5", "release_grads": "true"}
    given |= {"overlap": "false", "param_gather": "updates", "gpus_per_node": "1"}
    run = alone(tmp_path, "--train.steps=8", *(f"--optimizer.sharding.{key}={value}" for key, value in given.items()))
    assert set(given) == {field.name for field in fields(Sharding)}
    losses, wanted = ([r["loss"] for r in each if r["kind"] == "train"] for each in (run, unbroken))
    assert losses == pytest.approx(wanted, rel=1e-4)


def test_sigterm_is_noted_only_while_listening() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().listening(active=False):
        assert signal.getsignal(signal.SIGTERM) is before
    with StopRequest().listening(active=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
