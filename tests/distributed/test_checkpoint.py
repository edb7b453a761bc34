"""Checkpoint folders: what is saved at one number of ranks is loaded, bit for bit, at any other."""

from __future__ import annotations

import json
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

import distmuon
from distmuon.checkpoint import folder as snapshot
from distmuon.layout.boxes import boxes
from tests.standing import Standing, make_batch
from tests.training import (
    Weights,
    assert_equals_reference,
    backward,
    digest,
    make,
    mean_hand_gradients,
    state_tensors,
    train,
    weights,
)

PRECISIONS: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": {"bf16": True}}
SIZES = (1, 2, 3, 4)


def _made(group: dist.ProcessGroup | None, bf16: bool = False, **options: Any) -> tuple[Any, Any]:
    return make(group, Standing().bfloat16() if bf16 else Standing(), **options)


def _masters(model: nn.Module, optimizer: Any) -> Weights:
    """The most precise value of each trained weight."""
    state, trained = state_tensors(optimizer), {fqn for fqn, p in model.named_parameters() if p.requires_grad}
    return {f: state.get(f"{f}.master", weight) for f, weight in weights(model, optimizer).items() if f in trained}


def _whole(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """All that must survive: weights, masters, momentum, moments, counters."""
    return {**weights(model, optimizer), **state_tensors(optimizer)}


def _further_step(model: nn.Module, optimizer: Any) -> Weights:
    """One step with a gradient that is the same on every rank, so that the number of ranks does not matter."""
    for fqn, grad in mean_hand_gradients(model, 9, 2).items():
        param = model.get_parameter(fqn)
        param.grad = grad.to(param.dtype)
    optimizer.step()
    optimizer.zero_grad()
    return _masters(model, optimizer)


def _save(group: dist.ProcessGroup | None, folder: str, precision: str, **options: Any) -> tuple[str, Weights, Weights]:
    """Two steps and a save: (digest of all state, masters at the save, masters a step later)."""
    model, optimizer = _made(group, **PRECISIONS[precision], **options)
    train(group, model, optimizer, range(2))
    distmuon.save_checkpoint(folder, model, optimizer)
    return digest(_whole(model, optimizer)), _masters(model, optimizer), _further_step(model, optimizer)


def _load(
    group: dist.ProcessGroup | None, folders: list[str], precision: str, save_to: str = "", **options: Any
) -> list[tuple[str, Weights]]:
    """Each of `folders` loaded into an optimizer that has gone elsewhere: (digest, masters a step later)."""
    found = []
    for folder in folders:
        model, optimizer = _made(group, **PRECISIONS[precision], **options)
        train(group, model, optimizer, [77])
        distmuon.load_checkpoint(folder, model, optimizer)
        if save_to:
            distmuon.save_checkpoint(save_to, model, optimizer)
        found.append((digest(_whole(model, optimizer)), _further_step(model, optimizer)))
    return found


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "A state saved at W ranks and loaded at W', for W, W' in 1 to 4, float32 and bfloat16 with "
    "masters, is bit-equal to the source, and one further step equals the unbroken run's (weights "
    "1e-6, update 1e-5, relative)",
)
@pytest.mark.parametrize(  # of bfloat16 there is more to save: masters
    "precision", [pytest.param(name, marks=[pytest.mark.slow] if name == "float32" else []) for name in PRECISIONS]
)
def test_saved_at_any_size_loads_at_any_size(spawn, tmp_path: Path, precision: str) -> None:
    """All 16 pairs: gathered state bit-equal to the source, one further step equal to the unbroken run's."""
    folders = {size: str(tmp_path / f"of-{size}") for size in SIZES}
    saved = {size: spawn(_save, size, folder=folders[size], precision=precision)[0] for size in SIZES}
    for size in SIZES:
        by_rank = spawn(_load, size, folders=list(folders.values()), precision=precision, timeout=120.0)
        for loads in by_rank:
            for source, (loaded, later) in zip(SIZES, loads, strict=True):
                before, start, wanted = saved[source]
                assert loaded == before, f"{source} -> {size}"
                assert_equals_reference(later, wanted, start)


CUTS: dict[str, dict[str, Any]] = {
    "contiguous": {"packing": "contiguous"},
    "replicated": {"placement": "replicated", "packing": "contiguous", "bucket_mb": 0.05},
    "one bucket": {"bucket_mb": 100.0},
}


@pytest.mark.promise("State survives, at any number of ranks", "The number of GPUs of a node may change")
def test_the_nodes_may_change(spawn, tmp_path: Path) -> None:
    """Saved by two nodes of two ranks, loaded by two ranks that know no nodes, and back: the same bits."""
    first, second = str(tmp_path / "step-1"), str(tmp_path / "step-2")
    before, start, wanted = spawn(_save, 4, folder=first, precision="bfloat16", gpus_per_node=2)[0]
    given = {"precision": "bfloat16", "gpus_per_node": 1}
    for loaded, later in spawn(_load, 2, folders=[first], save_to=second, **given)[0]:
        assert loaded == before
        assert_equals_reference(later, wanted, start)
    assert spawn(_load, 4, folders=[second], precision="bfloat16", gpus_per_node=2)[0][0][0] == before


@pytest.mark.promise("State survives, at any number of ranks", "Packing, placement and bucket size may change")
@pytest.mark.parametrize("cut", CUTS)
def test_the_cut_may_change(spawn, tmp_path: Path, cut: str) -> None:
    """Any packing, placement and bucket size loads what any other saved; back again it is the same bits."""
    first, second = str(tmp_path / "step-1"), str(tmp_path / "step-2")
    before, start, wanted = spawn(_save, 3, folder=first, precision="bfloat16")[0]
    for loaded, later in spawn(_load, 2, folders=[first], precision="bfloat16", save_to=second, **CUTS[cut])[0]:
        assert loaded == before
        assert_equals_reference(later, wanted, start)
    assert spawn(_load, 3, folders=[second], precision="bfloat16")[0][0][0] == before


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "3 -> 1 -> 4 -> 2 -> 3 ranks ends with the bits of the first",
)
def test_there_and_back_through_every_size(spawn, tmp_path: Path) -> None:
    """3 -> 1 -> 4 -> 2 -> 3, each from the one before: the bits of the first."""
    before, *_ = spawn(_save, 3, folder=str(tmp_path / "0"), precision="bfloat16")[0]
    for step, size in enumerate((1, 4, 2, 3)):
        folder, following = str(tmp_path / f"{step}"), str(tmp_path / f"{step + 1}")
        for ((loaded, _),) in spawn(_load, size, folders=[folder], precision="bfloat16", save_to=following):
            assert loaded == before


def _dtypes(group: dist.ProcessGroup, folder: str, saved: dict[str, Any], loaded: dict[str, Any]) -> Any:
    model, optimizer = _made(group, **saved)
    train(group, model, optimizer, range(2))
    distmuon.save_checkpoint(folder, model, optimizer)
    other, other_optimizer = _made(group, **loaded)
    distmuon.load_checkpoint(folder, other, other_optimizer)
    return [
        (weights(m, o), state_tensors(o), _masters(m, o)) for m, o in ((model, optimizer), (other, other_optimizer))
    ]


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "Parameter and momentum dtype may change; values are rounded once where the new dtype is narrower, masters never",
)
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({}, {"bf16": True}),
        ({"bf16": True}, {}),
        ({}, {"momentum_dtype": torch.bfloat16}),
        ({"momentum_dtype": torch.bfloat16}, {}),
    ],
    ids=["model to bfloat16", "model to float32", "momentum to bfloat16", "momentum to float32"],
)
def test_dtypes_may_change(spawn, tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Values are those of the save, rounded once where the new dtype is narrower; masters are never rounded."""
    theirs, ours = spawn(_dtypes, 2, folder=str(tmp_path / "1"), saved=saved, loaded=loaded)[0]
    assert digest(ours[2]) == digest(theirs[2])
    for fqn, weight in ours[0].items():
        assert fqn not in theirs[2] or torch.equal(weight, theirs[2][fqn].to(weight.dtype)), fqn
    for name, value in ours[1].items():
        if name.endswith(".step") and name not in theirs[1]:
            assert float(value) == 0.0, f"{name}: float32 momentum counts no roundings"
        elif not name.endswith(".master"):
            assert torch.equal(value, theirs[1][name].to(value.dtype)), name


# ---------------------------------------------------------------------------------- the same run goes on


class _Run:
    """A run in which everything matters: noise from every generator, a schedule, an order of data."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.position = group, dist.get_rank(group), 0
        torch.manual_seed(self.rank)
        random.seed(self.rank)
        np.random.seed(self.rank)
        self.model, self.optimizer = make(group)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def train(self, steps: int) -> None:
        for _ in range(steps):
            noise = random.random() + np.random.rand() + float(torch.rand(()))
            backward(self.model, self.optimizer, [make_batch(self.position, self.rank, int(1000 * noise))])
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.position += 1

    def end(self) -> tuple[str, int, float]:
        return digest(_whole(self.model, self.optimizer)), self.position, self.optimizer.param_groups[0]["lr"]


def _unbroken(group: dist.ProcessGroup, folder: str, asynchronous: bool) -> Any:
    run = _Run(group)
    run.train(2)
    extra = {"position": run.position, "rank": run.rank}
    trained, reached = threading.Event(), snapshot.fault_point
    if asynchronous:  # nothing is written before the later steps are done, which the save must not see
        snapshot.fault_point = lambda stage: trained.wait(60) and None
    saving = distmuon.save_checkpoint(
        folder, run.model, run.optimizer, scheduler=run.scheduler, extra=extra, asynchronous=asynchronous
    )
    run.train(3)
    trained.set()
    saving.wait()
    snapshot.fault_point = reached
    return run.end()


def _resumed(group: dist.ProcessGroup, folder: str) -> Any:
    run = _Run(group)
    run.train(1)
    loaded = distmuon.load_checkpoint(folder, run.model, run.optimizer, scheduler=run.scheduler)
    assert loaded.rng_restored and loaded.extra["rank"] == run.rank
    run.position = loaded.extra["position"]
    run.train(3)
    return run.end()


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "At the same number of ranks the run goes on bit for bit, with RNG (torch, Python, NumPy), "
    "schedule and data position",
)
@pytest.mark.promise(
    "Crashes",
    "Steps after an asynchronous save cannot alter it; it completes by itself; its error is raised by"
    " the next save, on all ranks",
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_same_run_goes_on_bit_for_bit(spawn, tmp_path: Path, asynchronous: bool) -> None:
    unbroken = spawn(_unbroken, 3, folder=str(tmp_path / "step-2"), asynchronous=asynchronous)
    assert spawn(_resumed, 3, folder=str(tmp_path)) == unbroken


def _other_size(group: dist.ProcessGroup, folder: str) -> Any:
    run = _Run(group)
    before = torch.get_rng_state()
    loaded = distmuon.load_checkpoint(folder, run.model, run.optimizer, scheduler=run.scheduler)
    return loaded.dp_size, loaded.rng_restored, loaded.extra, torch.equal(before, torch.get_rng_state())


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "At another number of ranks RNG is left alone and every rank gets rank 0's `extra`",
)
def test_at_another_size_rng_is_left_alone_and_extra_is_rank_0s(spawn, tmp_path: Path) -> None:
    spawn(_unbroken, 3, folder=str(tmp_path / "step-2"), asynchronous=False)
    for found in spawn(_other_size, 2, folder=str(tmp_path)):
        assert found == (3, False, {"position": 2, "rank": 0}, True)


# --------------------------------------------------------------------------------- the rest of the model


class _Mixed(nn.Module):
    """Frozen weights, module buffers, one of them not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.frozen(x)))


def _mixed(group: dist.ProcessGroup, folder: str, save: bool) -> dict[str, Tensor]:
    torch.manual_seed(5 if save else 6)
    model = _Mixed()
    optimizer = distmuon.DistMuon(model, process_group=group, routes=[distmuon.Route("out.weight", "muon")])
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if save:
        distmuon.save_checkpoint(folder, model, optimizer)
    else:
        distmuon.load_checkpoint(folder, model, optimizer)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.promise("State survives, at any number of ranks", "Frozen parameters and module buffers are saved")
def test_frozen_parameters_and_module_buffers_are_saved(spawn, tmp_path: Path) -> None:
    saved = spawn(_mixed, 2, folder=str(tmp_path / "1"), save=True)[0]
    for loaded in spawn(_mixed, 3, folder=str(tmp_path / "1"), save=False):
        assert digest(loaded) == digest(saved)


# ----------------------------------------------------------------------------- format: boxes, DCP, memory


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_boxes_make_up_the_range_in_order(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, whole.numel() - 1))
    length = data.draw(st.integers(0, whole.numel() - start))
    found = boxes(shape, start, length)
    assert len(found) <= max(1, 2 * len(shape) - 1)
    parts = []
    for offsets, sizes in found:
        assert len(offsets) == len(sizes) == len(shape)
        part = whole
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            part = part.narrow(dim, offset, size)
        parts.append(part.reshape(-1))
    assert torch.cat([torch.empty(0, dtype=torch.int64), *parts]).tolist() == list(range(start, start + length))


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "Files are torch.distributed.checkpoint's: DCP's own converter reads every tensor, whole, under its name",
)
def test_other_readers_of_the_format_see_whole_tensors(spawn, tmp_path: Path) -> None:
    """torch's own converter, which knows nothing of distmuon, finds every tensor under its name, in its shape."""
    _, masters, _ = spawn(_save, 3, folder=str(tmp_path / "step-2"), precision="bfloat16")[0]
    dcp_to_torch_save(tmp_path / "step-2", tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    state = plain["optimizer"]["state"]
    params = dict(Standing().named_parameters())
    assert params.keys() <= plain["model"].keys()
    for fqn, master in masters.items():
        assert torch.equal(plain["model"][fqn], master.bfloat16())
        assert torch.equal(state[fqn]["master"], master)
        assert {"master", "momentum_buffer"} == set(state[fqn]) or float(state[fqn]["step"]) == 2.0


def test_a_box_takes_its_own_bytes_in_the_file_and_little_more(spawn, tmp_path: Path) -> None:
    """Saved as a view, each would bring the whole shard along."""
    spawn(_save, 2, folder=str(tmp_path / "step-2"), precision="float32")
    for rank in range(2):
        table = json.loads((tmp_path / "step-2" / f"rank-{rank:05d}.json").read_text())
        for name, entry in table["tensors"].items():
            for _, sizes, _, length in entry["boxes"]:
                assert length <= 4 * torch.Size(sizes).numel() + 2048, name


class _Peak(TorchDispatchMode):
    """Most bytes of tensors made inside that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(a.untyped_storage()) for a in args if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            if storage.data_ptr() not in self._seen and storage.nbytes() and id(storage) not in known:
                address, size = storage.data_ptr(), storage.nbytes()
                if not any(isinstance(a, Tensor) and a.untyped_storage().data_ptr() == address for a in args):
                    self._seen.add(address)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, address, size)
        return result

    def _gone(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size


def _peak_of_a_save(group: dist.ProcessGroup, folder: str) -> tuple[int, int, int]:
    """(peak bytes of new tensors in a save, bytes of the largest bucket in float32, of this rank's state)."""
    model, optimizer = _made(group, bf16=True)
    train(group, model, optimizer, range(1))
    with _Peak() as peak:
        distmuon.save_checkpoint(folder, model, optimizer)
    buckets = optimizer.quiesced().storage.buckets
    return peak.peak, max(4 * b.param_flat.numel() for b in buckets), optimizer.metrics()["state_bytes"]


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "A save gathers nothing: its new tensors never need more than one bucket",
)
def test_a_save_needs_memory_for_one_bucket(spawn, tmp_path: Path) -> None:
    for peak, bucket, state in spawn(_peak_of_a_save, 2, folder=str(tmp_path / "1")):
        assert 0 < peak <= bucket < state / 3, (peak, bucket, state)
