"""A folder that several runs and readers use at once: nobody's save is touched, no look comes too early, and a save
that is complete is never called failed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distmuon
from distmuon.checkpoint import folder as snapshot
from distmuon.checkpoint import load as loading
from distmuon.checkpoint import tensors as sharded

ROOT = Path(__file__).parents[2]


def _small() -> tuple[nn.Module, distmuon.DistMuon]:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    return model, distmuon.DistMuon(model)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------- saves of others


@pytest.mark.promise(
    "Crashes",
    "`keep_last` and a new save leave saves under way alone, of other series and of other runs of the"
    " same series. The remains of a killed save are removed once its process has ended, or after an "
    "hour without a change where that cannot be seen",
)
@pytest.mark.parametrize(
    ("under_way", "saved"),
    [("v1.d-10", "v2"), ("10.x-3", "11"), ("gen-10", "disc-20"), ("step-10", "step-11"), ("step-11", "step-11x1")],
    ids=["stem and a dot", "digits and a dot", "another stem", "another run of the series", "a longer stem"],
)
def test_keep_last_leaves_a_save_under_way_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, under_way: str, saved: str
) -> None:
    """The first names of the series that was tidied, digits and a dot were enough to lose it."""
    first, second, go = _small(), _small(), threading.Event()

    def reached(stage: str) -> None:
        if stage == "before data" and threading.current_thread() is not threading.main_thread():
            go.wait(60)

    monkeypatch.setattr(snapshot, "fault_point", reached)
    behind = distmuon.save_checkpoint(tmp_path / under_way, *first, asynchronous=True, keep_last=1)
    distmuon.save_checkpoint(tmp_path / saved, *second, keep_last=1)
    go.set()
    assert behind.wait().is_dir() and distmuon.latest_checkpoint(tmp_path) is not None
    assert not [name for name in _names(tmp_path) if name.startswith(".")]


def _aside(folder: Path, name: str, **writer: Any) -> Path:
    """A save under way, as somebody else would leave it."""
    aside = folder / f".{name}.0123abcd.saving"
    aside.mkdir()
    (aside / "__0_0.distcp").write_bytes(b"half")
    if writer:
        (aside / snapshot.WRITER).write_text(json.dumps({**snapshot._this_process(), **writer}))
    return aside


def _ended() -> int:
    """The number of a process that is no more."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def _old(aside: Path) -> Path:
    for path in (*aside.iterdir(), aside):
        os.utime(path, (time.time() - 2 * snapshot.UNTOUCHED_S,) * 2)
    return aside


@pytest.mark.promise(
    "Crashes",
    "`keep_last` and a new save leave saves under way alone, of other series and of other runs of the"
    " same series. The remains of a killed save are removed once its process has ended, or after an "
    "hour without a change where that cannot be seen",
)
def test_a_save_is_tidied_once_nobody_writes_it(tmp_path: Path) -> None:
    """By its process where that can be seen, by an hour without a change where it cannot; only of the same series."""
    alive = _aside(tmp_path, "step-1", pid=os.getpid())
    reused = _aside(tmp_path, "step-2", pid=os.getpid(), started="another time")
    ended = _aside(tmp_path, "step-3", pid=_ended())
    elsewhere = _aside(tmp_path, "step-4", machine=["another", "boot", "pid:[1]"])
    long_ago = _old(_aside(tmp_path, "step-5", machine=["another", "boot", "pid:[1]"]))
    nameless, nameless_old = _aside(tmp_path, "step-6"), _old(_aside(tmp_path, "step-7"))
    others = [_old(_aside(tmp_path, name, pid=_ended())) for name in ("gen-8", "step8", "steps-8", "step-8.d-1", "20")]
    half_deleted, half_begun = tmp_path / ".step-9.deleted", tmp_path / ".step-9.0123abcd.saving.begun"
    for path in (half_deleted, half_begun, tmp_path / ".gen-9.deleted"):
        path.mkdir()
    distmuon.save_checkpoint(tmp_path / "step-20", *_small(), keep_last=3)
    for kept in (alive, elsewhere, nameless, *others, half_begun, tmp_path / ".gen-9.deleted"):
        assert kept.exists(), kept
    for gone in (reused, ended, long_ago, nameless_old, half_deleted):
        assert not gone.exists(), gone


def test_a_new_save_of_the_same_name_takes_the_place_of_a_killed_one_only(tmp_path: Path) -> None:
    ended, alive = _aside(tmp_path, "step-3", pid=_ended()), tmp_path / ".step-3.89abcdef.saving"
    shutil.copytree(ended, alive)
    (alive / snapshot.WRITER).write_text(json.dumps(snapshot._this_process()))
    longer = _aside(tmp_path, "step-3.d-1", pid=_ended())
    distmuon.save_checkpoint(tmp_path / "step-3", *_small())
    assert (ended.exists(), alive.exists(), longer.exists()) == (False, True, True)


def test_two_runs_that_save_one_name_end_with_one_of_them_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(stage: str) -> None:
        if stage == "before rename" and not (tmp_path / "step-1").exists():
            monkeypatch.setattr(snapshot, "fault_point", lambda stage: None)
            distmuon.save_checkpoint(tmp_path / "step-1", *_small())

    monkeypatch.setattr(snapshot, "fault_point", reached)
    with pytest.raises(ValueError, match=r"step-1: it could not be put in place \(Directory not empty\)"):
        distmuon.save_checkpoint(tmp_path / "step-1", *_small())
    assert _names(tmp_path) == ["step-1"] and distmuon.latest_checkpoint(tmp_path) == tmp_path / "step-1"


# --------------------------------------------------------------------------- complete is never called failed


def _refusing(monkeypatch: pytest.MonkeyPatch, call: str, which: Callable[..., bool], code: int) -> None:
    """`os.<call>` fails where `which` says so."""
    real = getattr(os, call)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if which(*args):
            raise OSError(code, os.strerror(code))  # without a file's name, as fsync does
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, refuse)


@pytest.mark.promise(
    "Crashes",
    "A complete save is not reported as failed: if an older checkpoint cannot be removed, or a folder"
    " cannot be synced to the disk after the rename, that is logged",
)
def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The save was complete, raised on all ranks, and was refused when it was tried again."""
    distmuon.save_checkpoint(tmp_path / "step-1", *_small())
    _refusing(monkeypatch, "rename", lambda source, *_: Path(source).name == "step-1", errno.EACCES)
    distmuon.save_checkpoint(tmp_path / "step-2", *_small(), keep_last=1)
    assert _names(tmp_path) == ["step-1", "step-2"]
    assert f"{tmp_path / 'step-1'} could not be removed (Permission denied) and stays" in caplog.text
    distmuon.save_checkpoint(tmp_path / "step-3", *_small(), keep_last=1, asynchronous=True).wait()
    assert distmuon.latest_checkpoint(tmp_path) == tmp_path / "step-3"


def test_what_is_only_half_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    distmuon.save_checkpoint(tmp_path / "step-1", *_small())
    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)
    distmuon.save_checkpoint(tmp_path / "step-2", *_small(), keep_last=1)
    assert _names(tmp_path) == [".step-1.deleted", "step-2"] and "could not be removed completely" in caplog.text
    monkeypatch.setattr(shutil, "rmtree", real)
    distmuon.save_checkpoint(tmp_path / "step-3", *_small(), keep_last=1)
    assert _names(tmp_path) == ["step-3"]


def _of_a_folder(name: str) -> Callable[[int], bool]:
    return lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name.endswith(name)


@pytest.mark.promise(
    "Crashes",
    "A complete save is not reported as failed: if an older checkpoint cannot be removed, or a folder"
    " cannot be synced to the disk after the rename, that is logged",
)
def test_a_folder_that_is_not_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the rename it is a warning, before it an error that names the folder; some file systems cannot."""
    with monkeypatch.context() as patch:
        _refusing(patch, "fsync", _of_a_folder(tmp_path.name), errno.EIO)
        distmuon.save_checkpoint(tmp_path / "step-1", *_small())
    assert "step-1 is complete, but a power failure now may lose it" in caplog.text
    with monkeypatch.context() as patch:
        _refusing(patch, "fsync", _of_a_folder(".saving"), errno.EIO)
        with pytest.raises(ValueError, match=r"step-2.*saving: it could not be synced to the disk \(Input/output err"):
            distmuon.save_checkpoint(tmp_path / "step-2", *_small())
    assert _names(tmp_path) == ["step-1"]
    with monkeypatch.context() as patch:
        _refusing(patch, "fsync", lambda handle: os.path.isdir(f"/proc/self/fd/{handle}"), errno.EINVAL)
        distmuon.save_checkpoint(tmp_path / "step-2", *_small())
    assert distmuon.latest_checkpoint(tmp_path) == tmp_path / "step-2"


@pytest.mark.promise(
    "Crashes",
    "A complete save is not reported as failed: if an older checkpoint cannot be removed, or a folder"
    " cannot be synced to the disk after the rename, that is logged",
)
def test_older_ones_that_cannot_be_listed_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "iterdir", refuse)
    distmuon.save_checkpoint(tmp_path / "step-1", *_small(), keep_last=1)
    assert "step-1 is complete, but older checkpoints could not be examined" in caplog.text
    for look in (distmuon.latest_checkpoint, lambda folder: distmuon.load_checkpoint(folder, *_small())):
        with pytest.raises(ValueError, match=rf"{tmp_path}: it cannot be listed \(Stale file handle\)"):
            look(tmp_path)


@pytest.mark.promise(
    "Crashes",
    "Every refusal of the file system before that is raised with the file's name, and leaves nothing",
)
@pytest.mark.parametrize(
    ("call", "which", "match"),
    [
        ("rename", lambda source, *_: str(source).endswith(".json.new"), r"rank-00000\.json: it could not be written"),
        ("rename", lambda source, *_: str(source).endswith(".saving"), r"step-1: it could not be put in place"),
        ("rename", lambda source, *_: str(source).endswith(".begun"), r": no folder can be made there"),
        ("fsync", _of_a_folder("manifest.json"), r"manifest\.json: it could not be written"),
        ("fsync", _of_a_folder("WRITER"), r"WRITER: it could not be written"),
    ],
)
def test_whatever_fails_before_the_rename_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, which: Callable[..., bool], match: str
) -> None:
    _refusing(monkeypatch, call, which, errno.EDQUOT)
    with pytest.raises(ValueError, match=rf"{match} \(Disk quota exceeded\)"):
        distmuon.save_checkpoint(tmp_path / "step-1", *_small())
    assert _names(tmp_path) == []


def test_the_file_of_other_readers_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError("quota")  # some file systems give no number

    monkeypatch.setattr(sharded.FileSystemWriter, "finish", refuse)
    with pytest.raises(ValueError, match=r"\.metadata: it could not be written \(quota\)"):
        distmuon.save_checkpoint(tmp_path / "step-1", *_small())


def test_a_folder_that_goes_while_it_is_written_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmuon.checkpoint.save._write_part", lambda aside, *_: shutil.rmtree(aside))
    saving = distmuon.save_checkpoint(tmp_path / "step-1", *_small(), asynchronous=True)
    with pytest.raises(ValueError, match=r"step-1.*saving: it disappeared while it was being written"):
        saving.wait()


# --------------------------------------------------------------------------------------- looking again

WRITER = """
import sys, time, pathlib, torch, distmuon
folder, keep, most = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
model = torch.nn.Linear(6, 4)
optimizer = distmuon.DistMuon(model)
step, end = 0, time.monotonic() + most
while time.monotonic() < end and not (folder.parent / "stop").exists():
    step += 1
    distmuon.save_checkpoint(folder / f"step-{step}", model, optimizer, keep_last=keep)
    if step == 1:
        print("first", flush=True)
print(step, flush=True)
"""


class _Writing:
    """Another process that saves without a pause."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-c", WRITER, str(folder), "1", "120"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> _Writing:
        assert self.process.stdout is not None and self.process.stdout.readline() == "first\n"
        return self

    def __exit__(self, *_: object) -> None:
        (self.folder.parent / "stop").touch()
        assert self.process.stdout is not None
        with self.process.stdout as output:
            self.saves = int(output.read() or 0)
        assert self.process.wait() == 0


@pytest.mark.slow
@pytest.mark.promise(
    "Crashes",
    "Beside a run with `keep_last=1` that saves without a pause, `latest_checkpoint` never answers "
    "None and `load_checkpoint` never fails: both look again",
)
def test_no_look_and_no_load_fails_beside_a_run_that_keeps_one(tmp_path: Path) -> None:
    """71 of 68,117 looks answered None, which a recipe takes for "start afresh", and every fifth load failed."""
    folder, looks, loads = tmp_path / "run", 0, 0
    model, optimizer = _small()
    steps = [0]
    with _Writing(folder) as writing:
        until = time.monotonic() + 8
        while time.monotonic() < until:
            for _ in range(50):
                found = distmuon.latest_checkpoint(folder)
                assert found is not None
                steps.append(int(found.name.removeprefix("step-")))
                looks += 1
            distmuon.load_checkpoint(folder, model, optimizer)
            loads += 1
    assert looks > 500 and loads > 10 and writing.saves > 10, (looks, loads, writing.saves)
    assert steps == sorted(steps)
    print(f"{looks} looks, {loads} loads beside {writing.saves} saves")


STAGES = {"listed": (loading, "check_files"), "summed": (sharded, "Reader"), "written": (sharded, "write_value")}


@pytest.mark.promise(
    "Crashes",
    "Beside a run with `keep_last=1` that saves without a pause, `latest_checkpoint` never answers "
    "None and `load_checkpoint` never fails: both look again",
)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_removed_under_a_load_is_looked_for_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """At whatever moment the newest goes and a newer one comes: the newer one is loaded."""
    model, optimizer = _small()
    model.register_buffer("read_last", torch.zeros(1))
    folder, newer = tmp_path / "run", tmp_path / "step-3"
    for path, step in ((folder / "other-1", -1), (folder / "step-1", 1), (folder / "step-2", 2), (newer, 3)):
        model.read_last.fill_(step)
        distmuon.save_checkpoint(path, model, optimizer, extra=step)
    module, name = STAGES[stage]
    real = getattr(module, name)

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        if newer.exists():
            newer.rename(folder / "step-3")
            for step in (1, 2):
                shutil.rmtree(folder / f"step-{step}")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, overtaken)
    assert distmuon.load_checkpoint(folder, model, optimizer).extra == 3 and float(model.read_last) == 3.0


def test_a_look_does_not_fall_back_to_another_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest went while it was looked at, and its successor was there; the other series' was answered."""
    for name in ("disc-3", "gen-9", "kept/gen-10"):
        distmuon.save_checkpoint(tmp_path / name, *_small())
    real = snapshot.why_incomplete

    def overtaken(path: Path) -> str | None:
        if (tmp_path / "kept" / "gen-10").exists():
            (tmp_path / "kept" / "gen-10").rename(tmp_path / "gen-10")
            shutil.rmtree(tmp_path / "gen-9")
        return real(path)

    monkeypatch.setattr(snapshot, "why_incomplete", overtaken)
    assert distmuon.latest_checkpoint(tmp_path) == tmp_path / "gen-10"


def test_a_checkpoint_that_is_asked_for_by_name_and_has_gone_is_an_error(tmp_path: Path) -> None:
    model, optimizer = _small()
    distmuon.save_checkpoint(tmp_path / "step-3", model, optimizer)
    with pytest.raises(ValueError, match=r"step-9: no complete checkpoint there"):
        distmuon.load_checkpoint(tmp_path / "step-9", model, optimizer)


def test_an_empty_folder_is_answered_soon(tmp_path: Path) -> None:
    began = time.monotonic()
    assert distmuon.latest_checkpoint(tmp_path) is None and distmuon.latest_checkpoint(tmp_path / "none") is None
    assert time.monotonic() - began < 1


def test_a_folder_that_never_stops_changing_is_answered_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something with numbers in its names comes and goes all the time, and none of it is a checkpoint."""
    number = [0]

    def changing(folder: Path) -> list[Path]:
        number[0] += 1
        return [folder / f"log-{number[0]}"]

    monkeypatch.setattr(snapshot, "steps_in", changing)
    monkeypatch.setattr(snapshot, "MOST_LOOKS", 20)
    assert distmuon.latest_checkpoint(tmp_path) is None and number[0] == 20
