"""Bad input that only several ranks can give or notice: each raises the same text on all, and nobody waits for ever."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import distmuon
from distmuon.comm.agreement import agree_on_plan, raise_together
from distmuon.comm.group import DataParallelGroup
from tests.training import digest, make, state_tensors, train, weights


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def _step(model: nn.Module, optimizer: distmuon.DistMuon) -> None:
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------------------- arguments by rank


def _unlike(group: dist.ProcessGroup, name: str, values: list[Any]) -> None:
    model = _model()
    _step(model, distmuon.DistMuon(model, process_group=group, **{name: values[dist.get_rank(group)]}))


@pytest.mark.promise(
    "Faults while training",
    "An argument or learning rate that differs by rank is refused before the first step; "
    "`verify_parameters` refuses a value that went apart later. Each error names rank and value",
)
@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        (
            "lr",
            [0.1, 0.1, 0.2],
            r"rank 2: found param_groups\[0\]\.lr = 0\.2, on rank 0 param_groups\[0\]\.lr = 0\.1; ",
        ),
        ("lr", [torch.tensor(0.5), torch.tensor(0.25)], r"rank 1: found param_groups\[0\]\.lr = 0\.25, on rank 0"),
        ("momentum", [0.9, 0.95], r"rank 1: found param_groups\[0\]\.momentum = 0\.95"),
        ("adamw_betas", [(0.9, 0.95), (0.9, 0.99)], r"rank 1: found param_groups\[1\]\.betas = \(0\.9, 0\.99\)"),
        ("ns_steps", [5, 6], r"rank 1: found param_groups\[0\]\.ns_steps = 6"),
        ("max_grad_norm", [None, 1.0], r"rank 1: found max_grad_norm = 1\.0, on rank 0 max_grad_norm = None"),
        ("bucket_mb", [None, 1.0], r"rank 1: found sharding\.bucket_mb = 1\.0"),
        (
            "broadcast_buffers",
            [True, False],
            "rank 1: found broadcast_buffers = False, on rank 0 broadcast_buffers = True",
        ),
        ("routes", ["adamw", None], r"rank 1: found 0\.weight .* muon, on rank 0 0\.weight .* adamw"),
    ],
)
def test_an_argument_that_differs_by_rank(spawn_raises, name: str, values: list[Any], match: str) -> None:
    """Each rank would train its shard by its own; the parameters, gathered from them, would agree all the same."""
    messages = spawn_raises(_unlike, len(values), match=match, name=name, values=values)
    assert len(set(messages)) == 1 and "independent of the rank" in messages[0]


def _other_version(group: dist.ProcessGroup) -> None:
    """Another version of the packing cuts the same parameters otherwise."""
    agree_on_plan(f"layout of rank {dist.get_rank(group)}", ["w (3, 3)"], DataParallelGroup(group, lambda *_: None))


def test_a_layout_that_differs_though_all_was_given_alike(spawn_raises) -> None:
    match = "ValueError: plan: ranks agree on parameters and options but not on the layout .*; install the same version"
    assert len(set(spawn_raises(_other_version, 2, match=match))) == 1


def _plateau(group: dist.ProcessGroup) -> None:
    """ReduceLROnPlateau fed with the rank's own loss."""
    model = _model()
    optimizer = distmuon.DistMuon(model, lr=0.5, process_group=group)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for step in range(3):
        _step(model, optimizer)
        distmuon.verify_parameters(model, optimizer)
        scheduler.step(1.0 + step * (dist.get_rank(group) - 0.5))


@pytest.mark.promise(
    "Faults while training",
    "An argument or learning rate that differs by rank is refused before the first step; "
    "`verify_parameters` refuses a value that went apart later. Each error names rank and value",
)
def test_an_lr_that_went_apart_is_found_where_all_is_verified(spawn_raises) -> None:
    messages = spawn_raises(_plateau, 2, match=r"rank 1: found param_groups\[0\]\.lr = 0\.05, on rank 0 .* = 0\.5; ")
    assert len(set(messages)) == 1


def _nan_on(group: dist.ProcessGroup, rank: int, by_name: bool) -> None:
    model = _model()
    if dist.get_rank(group) == rank:
        model[2].weight.data[1, 1] = math.nan
    optimizer = distmuon.DistMuon(
        [*model.named_parameters()] if by_name else model,
        process_group=group,
        **({"routes": [distmuon.Route("*weight", "muon")]} if by_name else {}),
    )
    _step(model, optimizer)


def test_weights_that_are_nan_on_one_rank(spawn_raises) -> None:
    """Rank 0's become all ranks'; those of others are looked at where a forward has used them."""
    needed = "before the first step; finite values are needed to start with; initialize the model"
    messages = spawn_raises(_nan_on, 3, rank=0, by_name=False, match=f"2.weight: 1 parameters hold NaN or inf {needed}")
    assert len(set(messages)) == 1
    messages = spawn_raises(_nan_on, 3, rank=2, by_name=True, match=f"2.weight: .* NaN or inf on rank 2 {needed}")
    assert len(set(messages)) == 1


# ------------------------------------------------------------------------------------------- state by rank


def _loads(group: dist.ProcessGroup, how: str) -> tuple[str, bool, str]:
    """(what was raised, whether nothing has changed, digest after one more step)."""
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    saved = optimizer.state_dict()
    train(group, model, optimizer, [1])
    before = digest({**weights(model, optimizer), **state_tensors(optimizer)})
    if dist.get_rank(group) == 1:
        if how == "empty":
            saved["state"] = {}
        elif how == "None":
            saved = None
        else:
            saved["state"][0]["momentum_buffer"] = torch.ones(2, 2)
            saved["param_groups"][0]["lr"] = 0.7
    with pytest.raises(ValueError) as raised:
        optimizer.load_state_dict(saved)
    unchanged = before == digest({**weights(model, optimizer), **state_tensors(optimizer)})
    train(group, model, optimizer, [2])
    return str(raised.value), unchanged and optimizer.param_groups[0]["lr"] == 0.02, digest(weights(model, optimizer))


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A state dict that is broken, on all ranks or on one, is refused on all before anything has changed",
)
@pytest.mark.parametrize(
    ("how", "text"),
    [
        (
            "empty",
            "load_state_dict: the state of ranks [1] is empty, that of other ranks is not; every rank needs the ",
        ),
        ("None", "load_state_dict: no dict of states under 'state'; torch.optim's form is needed; pass what "),
        ("shape", "momentum_buffer: the state has shape (2, 2); "),
    ],
)
def test_a_state_dict_that_is_broken_on_one_rank(spawn, how: str, text: str) -> None:
    """The others went on into the gather of the parameters, and waited there."""
    results = spawn(_loads, 3, how=how)
    assert len({message for message, _, _ in results}) == 1 and text in results[0][0]
    assert all(unchanged for _, unchanged, _ in results) and len({ends for _, _, ends in results}) == 1


def _fails_on(group: dist.ProcessGroup, rank: int) -> None:
    def action() -> float:
        return 1.0 / (dist.get_rank(group) - rank)

    raise_together(DataParallelGroup(group, lambda stage, num_bytes: None), action)


def test_what_is_no_value_error_names_its_rank(spawn_raises) -> None:
    text = "ValueError: rank 1: ZeroDivisionError: float division by zero; all ranks must succeed; see that rank's"
    assert len(set(spawn_raises(_fails_on, 3, rank=1, match=text))) == 1


def _own_folder(group: dist.ProcessGroup, folder: str) -> None:
    """As if each machine had a disk of its own."""
    mine = Path(folder) / str(dist.get_rank(group))
    mine.mkdir()
    model, optimizer = make(group)
    distmuon.save_checkpoint(mine / "step-1", model, optimizer)


def test_a_folder_that_other_ranks_do_not_see(spawn_raises, tmp_path: Path) -> None:
    match = "1: this rank does not see the folder that rank 0 made; all ranks must see the same file system; save to a"
    assert len(set(spawn_raises(_own_folder, 2, folder=str(tmp_path), match=match))) == 1
    assert not [*tmp_path.rglob("*.saving")]


# ------------------------------------------------------------------------------------------- wrappers and groups


def _sharded(group: dist.ProcessGroup, how: str) -> None:
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    model: nn.Module = _model()
    if how == "FullyShardedDataParallel":
        model = FullyShardedDataParallel(model, process_group=group, device_id=torch.device("cpu"))
    elif how == "a part under FSDP1":
        model[0] = FullyShardedDataParallel(model[0], process_group=group, device_id=torch.device("cpu"))  # type: ignore[operator]
    else:
        fully_shard(model[0], mesh=mesh)
    distmuon.DistMuon(model, process_group=group)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (
            "FullyShardedDataParallel",
            r"params: a model wrapped in FullyShardedDataParallel \(FSDP1\), .*fully_shard\(model\)",
        ),
        ("a part under FSDP1", r"0: a model wrapped in FullyShardedDataParallel \(FSDP1\), .*pass the plain module"),
        ("a layer", r"2\.weight: it is trained and is a plain tensor in a model that fully_shard has cut"),
    ],
)
def test_a_model_that_fsdp_has_cut(spawn_raises, how: str, match: str) -> None:
    assert len(set(spawn_raises(_sharded, 2, how=how, match=match))) == 1


def test_an_optimizer_made_before_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train each rank by itself."""
    model = _model()
    optimizer = distmuon.DistMuon(model)
    before = digest(weights(model, optimizer))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    from torch.testing._internal.distributed.fake_pg import FakeStore  # a group of 2 whose other rank is not there

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        match = "process_group: DistMuon was made before the group of 2 ranks; .*; call init_process_group first"
        with pytest.raises(ValueError, match=match):
            _step(model, optimizer)
    finally:
        dist.destroy_process_group()
    assert digest(weights(model, optimizer)) == before
