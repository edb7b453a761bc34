"""Checkpoints from a careless or a hostile hand: any byte, any value, any type may be wrong, and every sum made right.

A load ends well, or in a `ValueError` that names the file or what in it does not fit; then not one bit of the model,
the optimizer, the scheduler or the random generators has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import distmuon
from tests.training import digest, state_tensors, weights

FUZZ = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DEEP = "deep"  # written as a list nested too deeply for any parser


class Run:
    """All that a load may change."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.BatchNorm1d(24), nn.Linear(24, 9)
        )
        self.optimizer = distmuon.DistMuon(
            self.model, lr=0.02, process_group=group, bucket_mb=0.004, ns_dtype=torch.float32
        )
        self.scheduler = LambdaLR(self.optimizer, lambda step: 0.9**step)

    def step(self) -> None:
        self.model(torch.randn(6, 24)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def save(self, path: Path | str) -> None:
        distmuon.save_checkpoint(path, self.model, self.optimizer, scheduler=self.scheduler, extra={"position": 7})

    def load(self, path: Path) -> None:
        distmuon.load_checkpoint(path, self.model, self.optimizer, scheduler=self.scheduler)

    def bits(self) -> tuple[Any, ...]:
        buffers = dict(self.model.named_buffers())
        tensors = digest({**weights(self.model, self.optimizer), **state_tensors(self.optimizer), **buffers})
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        kind, keys, *rest = np.random.get_state()
        generators = digest({"torch": torch.get_rng_state()}), random.getstate(), (kind, keys.tolist(), *rest)
        return tensors, repr(groups), repr(self.scheduler.state_dict()), generators


def _saved_by(group: dist.ProcessGroup, path: str) -> None:
    run = Run(group)
    run.step()
    run.save(path)


@pytest.fixture
def saved(pool: Any, tmp_path: Path) -> dict[int, Path]:
    """By the number of ranks that saved it, a good checkpoint; those of three ranks are cut into boxes."""
    np.random.seed(0)
    run = Run()
    run.step()
    run.save(tmp_path / "alone-1")
    pool.spawn(_saved_by, 3, path=str(tmp_path / "three-1"))
    return {1: tmp_path / "alone-1", 3: tmp_path / "three-1"}


def _seal(folder: Path) -> None:
    """Make every sum right again, as a stranger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    _mark(folder)


def _mark(folder: Path) -> None:
    (folder / "COMPLETE").write_text(hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest())


def _load_changed(run: Run, source: Path, change: Callable[[Path], None]) -> str:
    """What loading a copy of `source` with a `change` ends in: "" or the message; a refusal must change nothing."""
    path = source.with_name("fuzzed-2")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, path)
    change(path)
    before = run.bits()
    try:
        run.load(path)
    except ValueError as error:
        named = (str(path), "param_groups[", "ns_", "load_state_dict: ", *run.model.state_dict())
        assert any(name in str(error) for name in named), error
        assert run.bits() == before, f"half loaded before: {error}"
        return str(error)
    return ""


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ bytes


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A load that is refused, whatever bytes, values or types any file holds, has changed no bit of "
    "model, optimizer, scheduler or random generators: each rank reads its part once for a test "
    "before anything is written",
)
@settings(FUZZ, max_examples=150)
@given(st.data())
def test_any_bytes_of_any_file(saved: dict[int, Path], data: st.DataObject) -> None:
    run, source = Run(), saved[data.draw(st.sampled_from([1, 3]))]
    name = data.draw(st.sampled_from(_files(source)))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "double", "replace"]))
    where, length, seed = data.draw(st.floats(0, 1)), data.draw(st.integers(1, 40)), data.draw(st.integers(0, 1000))

    def change(path: Path) -> None:
        old, noise = (path / name).read_bytes(), random.Random(seed).randbytes(length)
        at = min(len(old) - 1, int(where * len(old)))
        new = bytearray(old)
        if kind == "flip":
            for byte in noise:
                new[(at + byte) % len(new)] ^= 1 << byte % 8
        elif kind == "cut":
            del new[at : at + length]
        elif kind == "insert":
            new[at:at] = noise
        elif kind == "double":
            new[at:at] = old[at : at + length]
        else:
            new[at : at + length] = noise[: len(new) - at]
        (path / name).write_bytes(new)
        if name == "manifest.json":
            _mark(path)
        elif name != "COMPLETE":
            _seal(path)

    _load_changed(run, source, change)


# ------------------------------------------------------------------------------------------- JSON's values


NASTY: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 0.5),
    *(1.0, float("nan"), float("inf"), 2**31, 2**63, -(2**63), 10**30, 10**5000, ""),
    *("\0", "\ud800", "a" * 300, "../COMPLETE", "/etc/hostname", ".", "0.weight", "torch.float32", "torch.nn", "qint8"),
    *("torch.bits8", "torch.complex64", [], {}, [[]], [1], [-1, 2], {"": 0}, DEEP),
]


def _text(tree: Any) -> str:
    """JSON of `tree`, also of what Python's own writer refuses."""
    text = json.dumps(tree, default=str) if not _holds_huge(tree) else _by_hand(tree)
    return text.replace(json.dumps(DEEP), "[" * 100_000)


def _holds_huge(tree: Any) -> bool:
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return (type(tree) is int and abs(tree) > 10**4000) or any(_holds_huge(value) for value in inner)


def _by_hand(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_by_hand(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(_by_hand, tree)) + "]"
    return "1" + "0" * 5000 if type(tree) is int and abs(tree) > 10**4000 else json.dumps(tree)


def _change_one(tree: Any, data: st.DataObject, values: st.SearchStrategy[Any]) -> None:
    """One place of nested containers gets another value, goes, comes twice, or changes places with its neighbour."""
    place, parent, key = tree, None, None
    while isinstance(place, (dict, list)) and place and (parent is None or data.draw(st.integers(0, 5))):
        parent, key = place, data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        place = parent[key]
    assert parent is not None
    kind = data.draw(st.sampled_from(["replace", "replace", "nudge", "remove", "double", "rename"]))
    if kind == "remove":
        del parent[key]
    elif kind == "nudge" and type(place) is int:
        parent[key] = place + data.draw(st.sampled_from([-64, -8, -1, 1, 8, 64]))
    elif kind == "double" and isinstance(parent, list):
        parent.insert(key, place)
    elif kind == "rename" and isinstance(parent, dict):
        parent[data.draw(st.sampled_from([v for v in NASTY if isinstance(v, str)] + list(parent)))] = parent.pop(key)
    else:
        parent[key] = data.draw(values)


@pytest.mark.slow
@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A load that is refused, whatever bytes, values or types any file holds, has changed no bit of "
    "model, optimizer, scheduler or random generators: each rank reads its part once for a test "
    "before anything is written",
)
@settings(FUZZ, max_examples=250)
@given(st.data())
def test_any_value_in_the_lists(saved: dict[int, Path], data: st.DataObject) -> None:
    run, ranks = Run(), data.draw(st.sampled_from([1, 3, 3]))
    name = data.draw(st.sampled_from(["manifest.json", "rank-00000.json", f"rank-{ranks - 1:05d}.json"]))
    tree = json.loads((saved[ranks] / name).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        if tree:
            _change_one(tree, data, st.sampled_from(NASTY))

    def change(path: Path) -> None:
        (path / name).write_text(_text(tree))
        if name == "manifest.json":
            _mark(path)
        else:
            _seal(path)

    _load_changed(run, saved[ranks], change)


# -------------------------------------------------------------------------------------- state beside tensors


ODD: list[Any] = [
    *(None, True, -1, 0, 2, 0.5, float("nan"), float("inf"), 10**400, "", "muon", [], {}, [1, 2], (3,), {"a": 1}, b"x"),
    *(torch.zeros(0), torch.ones(3), torch.tensor(float("nan")), torch.zeros(5056, dtype=torch.uint8), 1j),
]


@pytest.mark.slow
@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A load that is refused, whatever bytes, values or types any file holds, has changed no bit of "
    "model, optimizer, scheduler or random generators: each rank reads its part once for a test "
    "before anything is written",
)
@settings(FUZZ, max_examples=200)
@given(st.data())
def test_any_value_of_the_state_beside_tensors(saved: dict[int, Path], data: st.DataObject) -> None:
    """Hyperparameters, the scheduler, generators and positions: each of them any type that is loaded safely."""
    run, name = Run(), data.draw(st.sampled_from(["shared.pt", "rank-00000.pt"]))
    tree = torch.load(saved[1] / name, weights_only=True)
    _change_one(tree, data, st.sampled_from(ODD))

    def change(path: Path) -> None:
        torch.save(tree, path / name)
        _seal(path)

    if _load_changed(run, saved[1], change) == "":
        assert all(0 <= group["lr"] < float("inf") for group in run.optimizer.param_groups)


# ------------------------------------------------------------------------------------------ by hand


def _edited(name: str, edit: Callable[[Any], None]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tree = json.loads((path / name).read_text())
        edit(tree)
        (path / name).write_text(json.dumps(tree))
        if name == "manifest.json":
            _mark(path)
        else:
            _seal(path)

    return change


def _shifted(table: Any) -> None:
    """One box of a tensor that is cut moves by a row."""
    for entry in table["tensors"].values():
        for box in entry["boxes"]:
            if entry["shape"] and box[1] != entry["shape"]:
                (offsets, sizes), rows = box[:2], entry["shape"][0]
                offsets[0] += 1 if offsets[0] + sizes[0] < rows else -1
                return
    raise AssertionError("nothing is cut")


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "Boxes that overlap or leave a hole, files that no sum vouches for, and pipes are refused",
)
def test_boxes_that_overlap_and_leave_a_hole_are_refused(saved: dict[int, Path]) -> None:
    """Their sizes added up, so the load went well and the hole was whatever memory held before."""
    for rank in range(3):
        message = _load_changed(Run(), saved[3], _edited(f"rank-{rank:05d}.json", _shifted))
        assert "do not cover it exactly once" in message


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "Boxes that overlap or leave a hole, files that no sum vouches for, and pipes are refused",
)
def test_a_file_that_no_sum_vouches_for_is_refused(saved: dict[int, Path]) -> None:
    """Whatever it holds, nobody would notice."""
    for name in ("shared.pt", "rank-00000.pt", "rank-00002.json"):
        message = _load_changed(Run(), saved[3], _edited("manifest.json", lambda m, name=name: m["files"].pop(name)))
        assert re.search(rf"manifest.json: .*no sum of {name}", message)


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "Boxes that overlap or leave a hole, files that no sum vouches for, and pipes are refused",
)
@pytest.mark.parametrize("name", ["manifest.json", "COMPLETE", "shared.pt", "rank-00000.json", "__0_0.distcp"])
def test_a_pipe_is_not_waited_for(saved: dict[int, Path], name: str) -> None:
    """Reading one hung for ever."""

    def change(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    assert re.search(rf"{name}: it cannot be read \(it is not a regular file\)", _load_changed(Run(), saved[1], change))
    assert distmuon.latest_checkpoint(saved[1].parent) != saved[1].with_name("fuzzed-2")


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A load that is refused, whatever bytes, values or types any file holds, has changed no bit of "
    "model, optimizer, scheduler or random generators: each rank reads its part once for a test "
    "before anything is written",
)
def test_a_tensor_that_cannot_be_read_is_noticed_before_anything_is_loaded(saved: dict[int, Path]) -> None:
    """The last tensor of the file: those before it were loaded by then, and stayed."""

    def change(path: Path) -> None:
        table = json.loads((path / "rank-00000.json").read_text())
        _, _, at, length = max(
            (box for entry in table["tensors"].values() for box in entry["boxes"]), key=lambda b: b[2]
        )
        data = bytearray((path / "__0_0.distcp").read_bytes())
        data[at : at + length] = b"x" * length
        (path / "__0_0.distcp").write_bytes(data)
        _seal(path)

    assert "__0_0.distcp: its tensors cannot be read" in _load_changed(Run(), saved[1], change)


# ------------------------------------------------------------------------------- what must not be restored


def _rng(generator: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """One generator's state becomes what `edit` makes of it."""

    def change(path: Path) -> None:
        tree = torch.load(path / "rank-00000.pt", weights_only=True)
        tree["rng"][generator] = edit(tree["rng"][generator])
        torch.save(tree, path / "rank-00000.pt")
        _seal(path)

    return change


def _torch_state(at: int, new: bytes) -> Callable[[Any], Any]:
    """The state of torch's generator with other bytes from `at` on: 8 is `left`, 12 `seeded`, 16 the position."""
    return lambda state: torch.tensor([*state[:at], *new, *state[at + len(new) :]], dtype=torch.uint8)


def _replaced(place: int, value: Any) -> Callable[[Any], Any]:
    return lambda state: (*state[:place], value, *state[place + 1 :])


NAN = float("nan")
FORGED_RNG: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a position beyond NumPy's table": (
        "numpy",
        _replaced(2, 10**9),
        "NumPy's generator .* position 1000000000 of 624",
    ),
    "one before it": ("numpy", _replaced(2, -1), "NumPy's generator .* position -1"),
    "another kind": ("numpy", _replaced(0, "PCG64"), "NumPy's generator .* kind 'PCG64'"),
    "words of 64 bits": ("numpy", lambda s: (s[0], [1 << 40] * 624, *s[2:]), "NumPy's generator .* 32 bits"),
    "zeros for ever": ("numpy", lambda s: (s[0], [0] * 624, *s[2:]), "NumPy's generator .* all 0"),
    "too few words": ("numpy", lambda s: (s[0], s[1][:9], *s[2:]), "NumPy's generator .* 624 entries"),
    "a text for a number": ("numpy", _replaced(4, "x"), "NumPy's generator .* 'x' as the next"),
    "NaN comes next": ("numpy", _replaced(4, NAN), "NumPy's generator .* nan as the next"),
    "three gausses": ("numpy", _replaced(3, 3), "NumPy's generator .* has_gauss 3"),
    "nothing": ("numpy", lambda s: None, "NumPy's generator .* 5 entries"),
    "torch's table is left": (
        "cpu",
        _torch_state(16, (624).to_bytes(8, "little")),
        "torch's generator .* position 624 of",
    ),
    "torch reads beside it": ("cpu", _torch_state(8, (624).to_bytes(4, "little")), "torch's generator .* of 624"),
    "torch is not seeded": ("cpu", _torch_state(12, bytes(4)), "torch's generator"),
    "torch draws NaN": ("cpu", _torch_state(5024, b"\xff" * 8), "torch's generator .* as normal numbers"),
    "too short for torch": ("cpu", lambda s: s[:-1], r"torch's generator .* \(5056,\) bytes"),
    "no tensor": ("cpu", lambda s: b"x", "torch's generator"),
    "Python's position": ("python", lambda s: (3, (*s[1][:-1], 10**6), None), "Python's generator .* position 1000000"),
    "Python's version": ("python", _replaced(0, 2), "Python's generator .* version 2"),
    "Python draws a text": ("python", _replaced(2, "x"), "Python's generator .* 'x' as the next"),
    "Python's words": ("python", lambda s: (3, (-1, *s[1][1:]), None), "Python's generator .* 32 bits"),
}


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "No generator (torch, Python, NumPy) is put into a state that it cannot have",
)
@pytest.mark.parametrize("forged", FORGED_RNG)
def test_a_generator_is_never_put_where_none_can_be(saved: dict[int, Path], forged: str) -> None:
    """NumPy believed the position: the next number came from beside its table, and the process died."""
    generator, edit, match = FORGED_RNG[forged]
    message = _load_changed(Run(), saved[1], _rng(generator, edit))
    assert re.search(rf"rank-00000\.pt: its state cannot be loaded \(ValueError: {match}", message), message


def test_every_state_that_the_generators_can_be_in_is_restored(saved: dict[int, Path]) -> None:
    """At each place of the tables, with and without a second normal number kept."""
    from distmuon.checkpoint.extras import restore_rng, rng_states

    for draws in (0, 1, 2, 623, 624, 625, 1248):
        for kept in (False, True):
            torch.manual_seed(5)
            np.random.seed(5)
            random.seed(5)
            torch.rand(draws)
            np.random.random_sample(draws)
            for _ in range(draws):
                random.random()
            if kept:
                torch.randn(1), torch.randn(1, dtype=torch.float64), np.random.randn(), random.gauss(0, 1)
            states = rng_states(torch.device("cpu"))
            following = torch.randn(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)
            restore_rng(states, torch.device("cpu"))
            assert (torch.randn(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)) == following


# -------------------------------------------------------------------------------- what must not be inflated


def _rezipped(
    data: bytes, method: int = zipfile.ZIP_DEFLATED, edit: Callable[[str, bytes], bytes] | None = None
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, edit(name, content) if edit else content)
    return out.getvalue()


def _of_file(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).write_bytes(edit((path / name).read_bytes()))
        _seal(path)

    return change


def _peak(action: Callable[[], Any]) -> tuple[Any, int, float]:
    """(what it returned, most bytes that Python held meanwhile, seconds of this process: others may be busy)."""
    tracemalloc.start()
    began = time.process_time()
    try:
        return action(), tracemalloc.get_traced_memory()[1], time.process_time() - began
    finally:
        tracemalloc.stop()


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A file that would take much more memory or time than its own bytes is refused before it is read:"
    " compressed members, memory asked for by a number, state that refers to itself again and again, "
    "boxes of more than 64 dimensions, lists nested more than 16 deep or longer than 256 MiB",
)
@pytest.mark.parametrize("name", ["shared.pt", "rank-00000.pt"])
def test_a_compressed_member_is_refused_before_it_is_inflated(saved: dict[int, Path], name: str) -> None:
    """4.7 MB became 1.28 GB. torch.save compresses nothing."""
    zeros = io.BytesIO()
    torch.save({"extra": torch.zeros(25_000_000)}, zeros)
    for data in (_rezipped((saved[1] / name).read_bytes()), _rezipped(zeros.getvalue())):
        message, peak, _ = _peak(lambda data=data: _load_changed(Run(), saved[1], _of_file(name, lambda _: data)))
        assert re.search(rf"{name}: it cannot be loaded safely \('.*' is compressed, \d+ to \d+ bytes\)", message)
        assert peak < 20_000_000


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A file that would take much more memory or time than its own bytes is refused before it is read:"
    " compressed members, memory asked for by a number, state that refers to itself again and again, "
    "boxes of more than 64 dimensions, lists nested more than 16 deep or longer than 256 MiB",
)
def test_a_compressed_box_is_refused_before_it_is_inflated(saved: dict[int, Path]) -> None:
    def change(path: Path) -> None:
        table, data = json.loads((path / "rank-00000.json").read_text()), (path / "__0_0.distcp").read_bytes()
        for entry in table["tensors"].values():
            for box in entry["boxes"]:
                packed = _rezipped(data[box[2] : box[2] + box[3]])
                box[2:] = [len(data), max(len(packed), box[3])]
                data += packed.rjust(box[3], b"\0")
        (path / "rank-00000.json").write_text(json.dumps(table))
        (path / "__0_0.distcp").write_bytes(data)
        _seal(path)

    assert re.search(r"__0_0\.distcp: its tensors cannot be read", _load_changed(Run(), saved[1], change))


def _pickled(*parts: bytes) -> Callable[[bytes], bytes]:
    """The file with another pickle in it, stored."""

    def edit(data: bytes) -> bytes:
        swap = lambda name, content: b"".join(parts) if name.endswith("data.pkl") else content  # noqa: E731
        return _rezipped(data, zipfile.ZIP_STORED, swap)

    return edit


def _twice(times: int) -> bytes:
    """A list of the same list twice, so many times: a few bytes, shown as 2 to that many items."""
    value: Any = [1]
    for _ in range(times):
        value = [value, value]
    return pickle.dumps(value, protocol=2)


BOMBS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "bytearray of a number": (
        _pickled(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x70\x85R."),
        "asked for by number",
    ),
    "tensor of a number": (_pickled(b"\x80\x02ctorch\nTensor\nJ\x00\x00\x00\x70\x85R."), "asked for by number"),
    "storage of a number": (
        _pickled(b"\x80\x02ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x70\x85R."),
        "asked for by number",
    ),
    "doubled lists": (_pickled(_twice(60)), "more than .* items"),
    "deep lists": (_pickled(b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b"."), "nested more than 100 deep"),
    "deep tuples": (_pickled(b"\x80\x02)" + b"\x85" * 100_000 + b"."), "nested more than 100 deep"),
    "bytes after the end": (lambda data: data + b"x" * 30, "data follows its end"),
    "a comment": (lambda data: data[:-2] + b"\x05\x00later", "data follows its end"),
    "two lists of members": (lambda data: data[:-50] + b"\1" + data[-49:], "end records"),
    "no archive": (lambda data: pickle.dumps({"extra": 1, "rng": {}}), "no zip archive"),
    "a member twice": (lambda data: _doubled(data), "twice"),
}


def _doubled(data: bytes) -> bytes:
    out = io.BytesIO(_rezipped(data, zipfile.ZIP_STORED))
    with zipfile.ZipFile(out, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"other")
    return out.getvalue()


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A file that would take much more memory or time than its own bytes is refused before it is read:"
    " compressed members, memory asked for by a number, state that refers to itself again and again, "
    "boxes of more than 64 dimensions, lists nested more than 16 deep or longer than 256 MiB",
)
@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ["shared.pt", "rank-00000.pt"])
def test_what_would_take_more_than_the_files_own_bytes_is_refused(saved: dict[int, Path], bomb: str, name: str) -> None:
    edit, match = BOMBS[bomb]
    message, peak, took = _peak(lambda: _load_changed(Run(), saved[1], _of_file(name, edit)))
    assert re.search(rf"{name}: it cannot be loaded safely \(.*{match}", message), message
    assert peak < 50_000_000 and took < 10


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A file that would take much more memory or time than its own bytes is refused before it is read:"
    " compressed members, memory asked for by a number, state that refers to itself again and again, "
    "boxes of more than 64 dimensions, lists nested more than 16 deep or longer than 256 MiB",
)
def test_a_box_of_more_dimensions_than_any_tensor_is_refused_at_once(saved: dict[int, Path]) -> None:
    """100,000 dimensions kept a load busy for 40 s."""

    def deepen(table: Any) -> None:
        entry = next(entry for entry in table["tensors"].values() if entry["shape"])
        many = 100_000
        entry["shape"] += [1] * many
        for box in entry["boxes"]:
            box[0] += [0] * many
            box[1] += [1] * many

    message, _, took = _peak(lambda: _load_changed(Run(), saved[1], _edited("rank-00000.json", deepen)))
    assert re.search(r"rank-00000\.json: .* has \d+ dimensions, more than the 64 of any tensor", message) and took < 5


def test_a_tensor_of_64_dimensions_is_saved_and_loaded(tmp_path: Path) -> None:
    model = nn.Linear(6, 4)
    model.register_buffer("deep", torch.arange(6.0).view(*[1] * 31, 2, *[1] * 31, 3))
    optimizer = distmuon.DistMuon(model)
    distmuon.save_checkpoint(tmp_path / "step-1", model, optimizer)
    model.deep.zero_()
    distmuon.load_checkpoint(tmp_path, model, optimizer)
    assert model.deep.flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A file that would take much more memory or time than its own bytes is refused before it is read:"
    " compressed members, memory asked for by a number, state that refers to itself again and again, "
    "boxes of more than 64 dimensions, lists nested more than 16 deep or longer than 256 MiB",
)
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.json"])
@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[" * 100_000, "it is nested more than 16 deep"),
        (b'{"format": 1, "x": ' + b'{"a":' * 20 + b"1" + b"}" * 21, "it is nested more than 16 deep"),
        (b'{"' + b'\\"' * 500_000, "a string in it never ends"),
        (b'{"format": 1, "a": "[[[[[[[[[[[[[[[[[[[[[["}', "KeyError"),
        ("[[1]]".encode("utf-16"), "UnicodeDecodeError"),
    ],
    ids=["lists", "dicts", "an endless text", "brackets in a text", "another encoding"],
)
def test_a_list_is_measured_before_it_is_parsed(saved: dict[int, Path], name: str, text: bytes, match: str) -> None:
    def change(path: Path) -> None:
        (path / name).write_bytes(text)
        _mark(path) if name == "manifest.json" else _seal(path)

    message, _, took = _peak(lambda: _load_changed(Run(), saved[1], change))
    assert re.search(rf"{name}: it cannot be understood \(.*{match}", message) and took < 5, message


def test_a_list_longer_than_any_is_not_read(saved: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmuon.checkpoint.manifest.read_small.__defaults__", (1000,))
    assert re.search(r"manifest\.json: it has more than 1000 bytes", _load_changed(Run(), saved[1], lambda path: None))


def test_a_box_that_claims_more_than_its_file_has_is_refused(saved: dict[int, Path]) -> None:
    """Memory would be made for what it claims."""

    def enlarge(table: Any) -> None:
        entry = table["tensors"]["model.3.running_mean"]
        entry["shape"] = [10**12]
        entry["boxes"][0][1] = [10**12]

    message = _load_changed(Run(), saved[1], _edited("rank-00000.json", enlarge))
    assert re.search(r"rank-00000\.json: .*running_mean.* outside of its file", message)
