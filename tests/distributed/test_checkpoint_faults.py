"""What goes wrong with checkpoints: kills, damage, full disks, hostile files, other models. Nothing good is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import distmuon
from distmuon.checkpoint import folder as snapshot
from distmuon.checkpoint import save as saving
from distmuon.checkpoint.manifest import write_file
from distmuon.comm.agreement import agree_on_bits
from distmuon.step.engine import Engine
from tests.training import digest, make, state_tensors, train, weights

ROOT = Path(__file__).parents[2]


def _small(routes: Any = None, seed: int = 0) -> tuple[nn.Module, distmuon.DistMuon]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return model, distmuon.DistMuon(model, lr=0.02, ns_dtype=torch.float32, routes=routes)


def _step(model: nn.Module, optimizer: distmuon.DistMuon) -> None:
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _whole(model: nn.Module, optimizer: Any) -> str:
    return digest({**weights(model, optimizer), **state_tensors(optimizer)})


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with step-1 and step-2 of one process, and their digests."""
    model, optimizer = _small()
    digests = []
    for step in (1, 2):
        _step(model, optimizer)
        optimizer.param_groups[0]["lr"] *= 0.9  # no file is the same in both
        distmuon.save_checkpoint(tmp_path / f"step-{step}", model, optimizer, extra={"step": step})
        digests.append(_whole(model, optimizer))
    return tmp_path, digests


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _of_another_step(path: Path) -> None:
    shutil.copy(path.parent.with_name("step-1") / path.name, path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped byte": _flip,
    "truncated": _truncate,
    "missing": Path.unlink,
    "of another step": _of_another_step,
}
FILES = ("__0_0.distcp", ".metadata", "rank-00000.json", "rank-00000.pt", "shared.pt", "manifest.json", "COMPLETE")


@pytest.mark.promise(
    "Crashes",
    "A flipped byte, a truncated or missing file, a file of another step, in any of the files: the "
    "checkpoint is refused with the file's name, and the checkpoint before it is loaded",
)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_loaded(
    two: tuple[Path, list[str]], damage: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, digests = two
    model, optimizer = _small(seed=1)
    path = folder / "step-2" / name
    DAMAGES[damage](path)
    blamed = "manifest.json" if name == "COMPLETE" and damage != "missing" else name
    named = re.escape(str(folder / "step-2" / blamed))
    with pytest.raises(ValueError, match=named):
        distmuon.load_checkpoint(folder / "step-2", model, optimizer)
    if damage in ("truncated", "missing"):  # seen without reading any data
        assert distmuon.latest_checkpoint(folder) == folder / "step-1"
    loaded = distmuon.load_checkpoint(folder, model, optimizer)
    assert loaded.path.name == "step-1" and loaded.extra == {"step": 1} and _whole(model, optimizer) == digests[0]
    assert len(loaded.skipped) == 1 and re.search(named, loaded.skipped[0])
    assert re.search(named, caplog.text)


@pytest.mark.promise(
    "Crashes",
    "Unfinished and half-copied folders are skipped, with the reason in the log and in `found.skipped`",
)
def test_latest_skips_what_is_not_complete_and_says_so(
    two: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = two
    assert distmuon.latest_checkpoint(folder) == folder / "step-2"
    shutil.copytree(folder / "step-2", folder / "step-30", ignore=shutil.ignore_patterns("COMPLETE"))
    shutil.copytree(folder / "step-2", folder / ".step-40.abc.saving")
    (folder / "step-50").mkdir()
    (folder / "notes-99").write_text("not a folder")
    assert distmuon.latest_checkpoint(folder) == folder / "step-2"
    assert "step-30/COMPLETE" in caplog.text and "step-50" in caplog.text
    model, optimizer = _small(seed=1)
    loaded = distmuon.load_checkpoint(folder, model, optimizer)
    assert loaded.path == folder / "step-2"
    assert [name for name in ("step-30", "step-40", "step-50") if any(name in why for why in loaded.skipped)] == [
        "step-30",
        "step-40",
        "step-50",
    ]
    assert distmuon.latest_checkpoint(folder / "step-50") is None
    assert distmuon.latest_checkpoint(folder / "none") is None
    with pytest.raises(ValueError, match=r"no complete checkpoint there"):
        distmuon.load_checkpoint(folder / "step-50", model, optimizer)


# ------------------------------------------------------------------------------------------------- kills


EARLY = [f"{stage}:{rank}" for stage in ("before data", "in data", "after data") for rank in (0, 1)]
EARLY += ["before manifest:0", "before marker:0", "before rename:0"]
LATE = ["after rename:0", "while deleting:0"]


def _killed(folder: Path, *deaths: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "error", "-m", "tests.distributed.killed_saves", str(folder), *deaths]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check_killed(folder: Path, deaths: list[str]) -> None:
    unbroken, *runs = _killed(folder, *deaths)
    assert unbroken["codes"] == [0, 0] and unbroken["kept"] == ["step-3"]
    killed = [run for run in runs if -9 in run["codes"][:2]]
    assert len(killed) == len(deaths) if ":" in deaths[0] else len(killed) >= 12  # some runs are faster than the first
    for run in runs:
        assert run["codes"][2:] == [0, 0], run
        assert run["end"] == unbroken["end"], run
        assert run["kept"] == ["step-3"], run  # what the kill left was tidied up
        if ":" in run["death"]:
            assert run["from"] == ("step-2" if run["death"] in LATE else "step-1"), run


@pytest.mark.slow
@pytest.mark.promise(
    "Crashes",
    "SIGKILL of either rank at any stage of a save: the run resumes from a complete step and ends bit-equal",
)
def test_a_killed_save_costs_one_step_and_nothing_else(tmp_path: Path) -> None:
    _check_killed(tmp_path, ["in data:1", "after rename:0"])


@pytest.mark.promise(
    "Crashes",
    "SIGKILL of either rank at any stage of a save: the run resumes from a complete step and ends bit-equal",
)
@pytest.mark.slow
def test_a_kill_at_every_stage_of_a_save(tmp_path: Path) -> None:
    """Each rank where both write; rank 0 where it alone commits. The run goes on bit for bit from a complete step."""
    _check_killed(tmp_path, EARLY + LATE)


@pytest.mark.promise("Crashes", "The same holds at 20 random moments")
@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    moments = random.Random(4)
    _check_killed(tmp_path, [f"{moments.uniform(0.05, 0.95):.6f}" for _ in range(20)])


# ------------------------------------------------------------------------------------- disks and folders


@contextlib.contextmanager
def _mounted(options: str) -> Iterator[Path]:
    """A tmpfs of its own, where this user may mount one; not below pytest's folders, which it could not clean up."""
    folder = tempfile.mkdtemp(prefix="disk-")
    command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    try:
        mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("no right to mount a tmpfs here")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
    finally:
        os.rmdir(folder)


@pytest.mark.promise(
    "Crashes",
    "A full disk is reported on all ranks with the file's name; the checkpoint before is intact",
)
def test_a_full_disk_is_reported_and_the_one_before_is_intact() -> None:
    with _mounted("size=512k") as disk:
        model, optimizer = _small()
        _step(model, optimizer)
        distmuon.save_checkpoint(disk / "step-1", model, optimizer)
        before = _whole(model, optimizer)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        with pytest.raises(ValueError, match=r"disk.*(step-2|could not be written).*No space left"):
            distmuon.save_checkpoint(disk / "step-2", model, optimizer, keep_last=1)
        filler.unlink()
        assert [path.name for path in disk.iterdir()] == ["step-1"]
        _step(model, optimizer)
        assert distmuon.load_checkpoint(disk, model, optimizer).path.name == "step-1"
        assert _whole(model, optimizer) == before
        distmuon.save_checkpoint(disk / "step-2", model, optimizer, keep_last=1)
        assert [path.name for path in disk.iterdir()] == ["step-2"]


def _limited(group: dist.ProcessGroup, folder: str, rank: int, asynchronous: bool) -> tuple[str, str]:
    """On one rank no file may grow: (what the save raised, the digest after loading what was there)."""
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    distmuon.save_checkpoint(f"{folder}/step-1", model, optimizer)
    before = _whole(model, optimizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank(group) == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        save = distmuon.save_checkpoint(f"{folder}/step-2", model, optimizer, asynchronous=asynchronous)
        if asynchronous:
            train(group, model, optimizer, [1])
            with pytest.raises(ValueError, match="step-2") as raised:
                distmuon.save_checkpoint(f"{folder}/step-3", model, optimizer)  # the next save tells
            save.wait()  # told once
            return str(raised.value), before
        raise AssertionError("the save did not raise")
    except ValueError as error:
        return str(error), before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _load_newest(group: dist.ProcessGroup, folder: str) -> tuple[str, str]:
    model, optimizer = make(group)
    loaded = distmuon.load_checkpoint(folder, model, optimizer)
    return loaded.path.name, _whole(model, optimizer)


@pytest.mark.promise(
    "Crashes",
    "A full disk is reported on all ranks with the file's name; the checkpoint before is intact",
)
@pytest.mark.promise(
    "Crashes",
    "Steps after an asynchronous save cannot alter it; it completes by itself; its error is raised by"
    " the next save, on all ranks",
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_rank_that_cannot_write_fails_the_save_on_all(spawn, tmp_path: Path, asynchronous: bool) -> None:
    found = spawn(_limited, 3, folder=str(tmp_path), rank=1, asynchronous=asynchronous)
    for message, _ in found:
        assert re.search(r"step-2.*saving/__1_0.distcp: it could not be written \(File too large\)", message)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert spawn(_load_newest, 2, folder=str(tmp_path)) == [("step-1", found[0][1])] * 2


@pytest.mark.promise("Crashes", "A read-only folder is reported")
def test_a_read_only_folder_is_reported(tmp_path: Path) -> None:
    model, optimizer = _small()
    _step(model, optimizer)
    if os.geteuid() == 0:  # whom permissions do not stop
        with _mounted("ro") as disk, pytest.raises(ValueError, match=rf"{disk}: no folder can be made there"):
            distmuon.save_checkpoint(disk / "step-1", model, optimizer)
    else:
        tmp_path.chmod(0o555)
        with pytest.raises(ValueError, match=r"no folder can be made there"):
            distmuon.save_checkpoint(tmp_path / "step-1", model, optimizer)
        tmp_path.chmod(0o755)


# ------------------------------------------------------------------------------ names, keep_last, behind


@pytest.mark.promise("Crashes", "`keep_last` deletes neither the checkpoint just saved nor an incomplete one")
def test_keep_last_keeps_the_newest_complete_and_the_one_just_saved(tmp_path: Path) -> None:
    model, optimizer = _small()
    for step in (1, 2, 3, 4):
        distmuon.save_checkpoint(tmp_path / f"step-{step}", model, optimizer)
    (tmp_path / "step-4" / "COMPLETE").unlink()
    (tmp_path / "other").mkdir()
    distmuon.save_checkpoint(tmp_path / "step-10", model, optimizer, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-10", "step-3", "step-4"]
    distmuon.save_checkpoint(tmp_path / "step-5", model, optimizer, keep_last=1)  # somebody went back
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-4", "step-5"]
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=rf"keep_last: found {wrong!r}; 1 or more"):
            distmuon.save_checkpoint(tmp_path / "step-6", model, optimizer, keep_last=wrong)  # type: ignore[arg-type]


@pytest.mark.promise(
    "Crashes",
    "Several optimizers may save into one folder: `keep_last` counts names that differ in their last "
    "digits only, and touches no save of another series",
)
def test_two_optimizers_may_save_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One's `keep_last` once deleted the other's checkpoints, and what it was just writing."""
    first, second, go = _small(), _small(seed=1), threading.Event()

    def reached(stage: str) -> None:
        if stage == "before data" and threading.current_thread() is not threading.main_thread():
            go.wait(60)

    monkeypatch.setattr(snapshot, "fault_point", reached)
    behind = distmuon.save_checkpoint(tmp_path / "gen-10", *first, asynchronous=True, keep_last=2)
    killed = tmp_path / ".disc-5.0123abcd.saving"
    killed.mkdir()
    for step in (10, 20, 30):
        distmuon.save_checkpoint(tmp_path / f"disc-{step}", *second, keep_last=2)
    assert not killed.exists()
    go.set()
    behind.wait()
    distmuon.save_checkpoint(tmp_path / "gen-20", *first, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disc-20", "disc-30", "gen-10", "gen-20"]


@pytest.mark.promise("Crashes", "A name is used once; a damaged checkpoint in the way is renamed, not deleted")
def test_a_name_is_used_once_and_nothing_damaged_is_deleted(two: tuple[Path, list[str]]) -> None:
    folder, _ = two
    model, optimizer = _small(seed=1)
    with pytest.raises(ValueError, match=r"step-2: a complete checkpoint of this name exists"):
        distmuon.save_checkpoint(folder / "step-2", model, optimizer)
    _flip(folder / "step-2" / "__0_0.distcp")
    distmuon.save_checkpoint(folder / "step-2", model, optimizer)
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == ["step-1", "step-2"] and re.fullmatch(r"step-2\.\w+\.damaged", names[2])
    assert distmuon.load_checkpoint(folder, model, optimizer).path.name == "step-2"


@pytest.mark.promise(
    "Crashes",
    "Steps after an asynchronous save cannot alter it; it completes by itself; its error is raised by"
    " the next save, on all ranks",
)
def test_an_asynchronous_save_completes_by_itself(tmp_path: Path) -> None:
    model, optimizer = _small()
    _step(model, optimizer)
    before = _whole(model, optimizer)
    distmuon.save_checkpoint(tmp_path / "step-1", model, optimizer, asynchronous=True)
    deadline = time.monotonic() + 30
    while distmuon.latest_checkpoint(tmp_path) is None and time.monotonic() < deadline:
        _step(model, optimizer)
    distmuon.load_checkpoint(tmp_path, model, optimizer)
    assert _whole(model, optimizer) == before


def _never_writes(group: dist.ProcessGroup, folder: str) -> str:
    model, optimizer = make(group)
    saving.PEER_S = 0.3
    if dist.get_rank(group) == 1:
        saving._write_part = lambda *_: time.sleep(1.0)
    save = distmuon.save_checkpoint(f"{folder}/step-1", model, optimizer, asynchronous=True)
    try:
        save.wait()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.promise("Crashes", "A rank that never writes its part is named")
def test_a_rank_that_does_not_write_is_named(tmp_path: Path, pool: Any) -> None:
    for message in pool.spawn(_never_writes, 2, folder=str(tmp_path)):
        assert re.search(r"ranks \[1\] have not written their part; the limit is 0.3 s", message)
    pool.close()  # the workers are changed
    assert distmuon.latest_checkpoint(tmp_path) is None


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "State that could not be loaded safely is refused when it is saved",
)
def test_state_that_could_not_be_loaded_safely_is_refused(tmp_path: Path) -> None:
    model, optimizer = _small()
    with pytest.raises(ValueError, match=r"extra: it holds a value that cannot be loaded safely"):
        distmuon.save_checkpoint(tmp_path / "step-1", model, optimizer, extra={"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- hostile files


class _Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def _seal(folder: Path) -> None:
    """Make every sum right again, as a stranger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A checkpoint from an untrusted source executes nothing, whichever file holds a hostile pickle",
)
@pytest.mark.parametrize("name", [".metadata", "shared.pt", "rank-00000.pt", "__0_0.distcp"])
def test_a_strangers_checkpoint_executes_nothing(two: tuple[Path, list[str]], name: str, tmp_path: Path) -> None:
    """The manifest lists the planted file's own sum. `.metadata` is a pickle by DCP's design and is not opened."""
    folder, digests = two
    mark, path = tmp_path / "executed", folder / "step-2" / name
    model, optimizer = _small(seed=1)
    before = _whole(model, optimizer)
    if name == ".metadata":
        path.write_bytes(pickle.dumps(_Bomb(mark)))
    elif name.endswith(".pt"):
        torch.save(_Bomb(mark), path)
    else:  # in place of the first tensor
        data = bytearray(path.read_bytes())
        table = json.loads((folder / "step-2" / "rank-00000.json").read_text())
        bomb = pickle.dumps(_Bomb(mark))
        for entry in table["tensors"].values():
            for _, _, at, length in entry["boxes"]:
                data[at : at + length] = bomb.ljust(length, b"\0")
        path.write_bytes(data)
    _seal(folder / "step-2")
    if name == ".metadata":
        distmuon.load_checkpoint(folder, model, optimizer)
        assert _whole(model, optimizer) == digests[1]
    else:
        with pytest.raises(ValueError, match=r"cannot be (loaded safely|read)"):
            distmuon.load_checkpoint(folder / "step-2", model, optimizer)
        assert name == "__0_0.distcp" or _whole(model, optimizer) == before
    assert not mark.exists()
    if name == ".metadata":  # the bomb is live: whoever unpickles it is hit
        pickle.loads(path.read_bytes())
        assert mark.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "Whatever the lists in such a checkpoint say, loading ends well or in a `ValueError`",
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_the_lists_say_a_load_ends_in_a_value_error_or_well(
    two: tuple[Path, list[str]], data: st.DataObject
) -> None:
    """One value of the manifest or of the table is replaced, and every sum made right."""
    folder, _ = two
    path = folder / "fuzz-3"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder / "step-2", path)
    name = data.draw(st.sampled_from(["manifest.json", "rank-00000.json"]))
    place = tree = json.loads((path / name).read_text())
    keys: list[Any] = []
    while isinstance(place, (dict, list)) and place and (not keys or data.draw(st.booleans())):
        keys.append(data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))))
        parent, place = place, place[keys[-1]]
    parent[keys[-1]] = data.draw(JSON)
    (path / name).write_text(json.dumps(tree))
    model, optimizer = _small(seed=1)
    with contextlib.suppress(ValueError):
        if name != "manifest.json":
            _seal(path)
        else:
            (path / "COMPLETE").write_text(hashlib.sha256((path / name).read_bytes()).hexdigest())
        distmuon.load_checkpoint(path, model, optimizer)


def test_lists_that_lead_elsewhere_are_refused_by_name(two: tuple[Path, list[str]]) -> None:
    """A manifest that names files outside of its folder, and boxes outside of their file; every sum is right."""
    folder, _ = two
    path, (model, optimizer) = folder / "step-2", _small(seed=1)
    before = _whole(model, optimizer)
    table = json.loads((path / "rank-00000.json").read_text())
    next(iter(table["tensors"].values()))["boxes"][0][2] = 10**9
    good = (path / "rank-00000.json").read_text()
    (path / "rank-00000.json").write_text(json.dumps(table))
    _seal(path)
    wanted = r"rank-00000\.json: .*has boxes of another shape or outside of its file.*; a complete"
    with pytest.raises(ValueError, match=wanted):
        distmuon.load_checkpoint(path, model, optimizer)
    (path / "rank-00000.json").write_text(good)
    _seal(path)
    manifest = json.loads((path / "manifest.json").read_text())
    for name, match in (("../shared.pt", r"file name '\.\./shared\.pt'"), ("/etc/hosts", "file name '/etc/hosts'")):
        text = json.dumps({**manifest, "files": {**manifest["files"], name: {"size": 0, "sha256": ""}}})
        (path / "manifest.json").write_text(text)
        (path / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())
        with pytest.raises(
            ValueError, match=rf"manifest\.json: it cannot be understood \(TypeError: {match}\); a comp"
        ):
            distmuon.load_checkpoint(path, model, optimizer)
    assert _whole(model, optimizer) == before


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"none/x: it could not be written \(No such file or directory\); space and perm"
    ):
        write_file(tmp_path / "none" / "x", b"data")


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "A checkpoint of format 1 loads for ever; a newer format is refused by its number",
)
def test_a_newer_format_is_refused(two: tuple[Path, list[str]]) -> None:
    folder, _ = two
    manifest = json.loads((folder / "step-2" / "manifest.json").read_text())
    (folder / "step-2" / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    _seal(folder / "step-2")
    with pytest.raises(ValueError, match=r"manifest.json: the checkpoint has format 2; format 1 is read here"):
        distmuon.load_checkpoint(folder / "step-2", *_small())


# ------------------------------------------------------------------------------ other models, other routes


@pytest.mark.promise(
    "Plain state",
    "State saved under another routing is refused and the parameters are named; "
    '`on_route_change="reset"` keeps their values and starts their state from zero',
)
@pytest.mark.promise("Planted faults", "routing changed between runs")
def test_another_routing_raises_and_names_the_parameters_or_resets_them(two: tuple[Path, list[str]]) -> None:
    folder, _ = two
    source = _small()
    distmuon.load_checkpoint(folder, *source)
    saved, kept = state_tensors(source[1]), weights(*source)
    model, optimizer = _small(routes=[distmuon.Route("2.weight", "adamw", options={"lr": 0.5})], seed=1)
    before = _whole(model, optimizer)
    with pytest.raises(ValueError, match=r"2\.weight \(muon -> adamw\): 1 parameters have another rule"):
        distmuon.load_checkpoint(folder, model, optimizer)
    assert _whole(model, optimizer) == before
    distmuon.load_checkpoint(folder, model, optimizer, on_route_change="reset")
    state = state_tensors(optimizer)
    assert digest(weights(model, optimizer)) == digest(kept)
    for name, value in state.items():
        expected = torch.zeros_like(value) if name.startswith("2.weight.") else saved[name]
        assert torch.equal(value, expected), name
    assert {group["lr"] for group in optimizer.param_groups} == {0.02 * 0.9 * 0.9, 0.02, 0.5}
    with pytest.raises(ValueError, match=r"on_route_change: found 'ignore'"):
        distmuon.load_checkpoint(folder, model, optimizer, on_route_change="ignore")


def test_frozen_since_is_a_change_of_route(two: tuple[Path, list[str]]) -> None:
    folder, _ = two
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    optimizer = distmuon.DistMuon(model, lr=0.02)
    with pytest.raises(ValueError, match=r"0\.weight \(muon -> none\)|0\.weight \(adamw -> none\)"):
        distmuon.load_checkpoint(folder, model, optimizer)
    distmuon.load_checkpoint(folder, model, optimizer, on_route_change="reset")
    source = _small()
    distmuon.load_checkpoint(folder, *source)
    assert digest(weights(model, optimizer)) == digest(weights(*source))


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "The checkpoint of another model is refused, its tensors named",
)
def test_another_model_is_refused_by_name(two: tuple[Path, list[str]]) -> None:
    folder, _ = two
    for layers, match in (
        ([nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9)], r"4\.weight, 4\.bias: 2 tensors of the checkpoint"),
        (
            [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 4)],
            r"model\.\d\.\w+ has shape \(\d.*\), not \(\d.*\).* tensors do not fit",
        ),
        ([*_small()[0], nn.Linear(4, 3)], r"model\.5\.weight has shape None, not \(3, 4\)"),
    ):
        model = nn.Sequential(*layers)
        routes = [distmuon.Route("4.weight", "adamw")] if len(layers) > 5 else None  # no longer the last
        with pytest.raises(ValueError, match=match):
            distmuon.load_checkpoint(folder, model, distmuon.DistMuon(model, routes=routes))


# -------------------------------------------------------------------------------- what all ranks compare


def _forgets_to_gather(group: dist.ProcessGroup, folder: str) -> None:
    model, optimizer = make(group)
    distmuon.save_checkpoint(folder, model, optimizer)
    train(group, model, optimizer, [0])
    gather_all, Engine.gather_all = Engine.gather_all, lambda engine: None  # type: ignore[method-assign]
    try:
        distmuon.load_checkpoint(folder, model, optimizer)
    finally:
        Engine.gather_all = gather_all  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.promise(
    "State survives, at any number of ranks",
    "After a load all ranks compare the bits of all parameters",
)
@pytest.mark.promise("Planted faults", "no synchronization after a load (planted)")
def test_a_load_that_forgets_to_gather_is_caught(spawn_raises, tmp_path: Path) -> None:
    spawn_raises(_forgets_to_gather, 3, folder=str(tmp_path / "1"), match=r"its bits on ranks \[.*\] are not those on")


def _one_bit(group: dist.ProcessGroup, rank: int) -> None:
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    optimizer.synchronize()
    named = dict(model.named_parameters())
    agree_on_bits(list(named), list(named.values()), optimizer.group)
    if dist.get_rank(group) == rank:
        named["up.weight"].data.view(-1).view(torch.int32)[3] ^= 1
    agree_on_bits(list(named), list(named.values()), optimizer.group)


@pytest.mark.promise("Faults while training", "`verify_parameters` finds one flipped bit and names tensor and rank")
@pytest.mark.promise("Planted faults", "one bit flipped on one rank (planted)")
def test_one_flipped_bit_is_found_with_its_tensor_and_rank(spawn_raises) -> None:
    spawn_raises(_one_bit, 3, rank=2, match=r"up\.weight: its bits on ranks \[2\] are not those on ranks \[0, 1\]")


def test_the_stages_of_a_save_are_passed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kills above stop a save at these names."""
    stages: list[str] = []
    monkeypatch.setattr(snapshot, "fault_point", lambda stage: stages.append(stage))
    model, optimizer = _small()
    for step in (1, 2):
        distmuon.save_checkpoint(tmp_path / f"step-{step}", model, optimizer, keep_last=1)
    once = ["before data", "in data", "after data", "before manifest", "before marker", "before rename", "after rename"]
    assert list(dict.fromkeys(stages)) == [*once, "while deleting"]
