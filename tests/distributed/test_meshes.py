"""HSDP, tensor and expert parallelism: whoever has cut the model, and over which meshes, the result is the oracle's.

The zoo holds each kind of parameter; its gradients are given by hand, as FSDP2 and DTensor leave them, so that each
way to cut it is a few lines. `test_fsdp2.py` has meshes of one dimension; trained models are in the integrations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distmuon
from distmuon.layout.boxes import boxes_of_runs
from distmuon.math.newton_schulz import orthogonalize
from distmuon.step import cut as cut_module
from distmuon.step.bucket import Bucket
from distmuon.step.dtensors import box_of, local_of
from tests.reference import Reference
from tests.training import REL_UPDATE, REL_WEIGHTS, errors

LR = 0.02
STEPS = 3
Weights = dict[str, Tensor]
SHAPES = {
    "fused": (24, 10),  # three matrices by rows
    "wide": (10, 12),  # two matrices by columns
    "tall": (17, 4),
    "moe.experts": (4, 6, 8),
    "picture.weight": (8, 3, 2, 2),
    "table": (9, 10),  # AdamW
    "bias": (5,),  # AdamW
}
MUON = ("fused", "wide", "tall", "moe.experts", "picture.weight")
ROUTES = (
    distmuon.Route("fused", "muon", split=[8, 8, 8]),
    distmuon.Route("wide", "muon", split=[7, 5], split_dim=1),
    *(distmuon.Route(name, "muon") for name in MUON[2:]),
    distmuon.Route("*", "adamw"),
)
NUM_MATRICES = 3 + 2 + 1 + 4 + 1


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.picture = nn.Conv2d(3, 8, 2, bias=False)
        self.moe = nn.Module()
        for name, shape in SHAPES.items():
            _set(self, name, nn.Parameter(0.1 * torch.randn(shape, generator=generator)))


def _set(model: nn.Module, name: str, param: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, param)


def _gradients(step: int) -> Weights:
    generator = torch.Generator().manual_seed(1000 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _oracle(**options: Any) -> Reference:
    model = Zoo()
    of = {name: "muon" if name in MUON else "adamw" for name in SHAPES}
    splits: Any = {"fused": ([8, 8, 8], 0), "wide": ([7, 5], 1)}
    return Reference(model, of, splits=splits, stacks=["moe.experts"], **{"lr": LR, **options})


def _expected(steps: int = STEPS, **options: Any) -> Weights:
    oracle = _oracle(**options)
    for step in range(steps):
        oracle.apply(_gradients(step))
    return oracle.weights


# --------------------------------------------------------------------------------------------- ways to cut the zoo


def _line(group: dist.ProcessGroup) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu")


@functools.cache
def _grid(*names: str) -> DeviceMesh:
    """The four ranks in a square; one a worker, for the threads of its groups wake hundreds of times a second."""
    return DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=names)


def _place(model: nn.Module, mesh: DeviceMesh, dim_of: dict[str, int | None]) -> None:
    """Shard each parameter of `dim_of` on this dimension over `mesh`; None: replicate it."""
    for name, dim in dim_of.items():
        whole = model.get_parameter(name).detach()
        placement = Replicate() if dim is None else Shard(dim)
        _set(model, name, nn.Parameter(distribute_tensor(whole, mesh, [placement])))


def hsdp(model: nn.Module, group: dist.ProcessGroup) -> None:
    fully_shard(model, mesh=_grid("replicate", "shard"))


def columns_by_fsdp2(model: nn.Module, group: dist.ProcessGroup) -> None:
    """FSDP2 cuts a second dimension only if it is cut evenly."""

    def dim_of(param: nn.Parameter) -> Shard | None:
        return Shard(1) if param.ndim > 1 and param.shape[1] % group.size() == 0 else None

    fully_shard(model, mesh=_line(group), shard_placement_fn=dim_of)


def column_parallel(model: nn.Module, group: dist.ProcessGroup) -> None:
    """The output features over the ranks; what is not named stays plain on each, as parallelize_module leaves it."""
    _place(model, _line(group), {"fused": 0, "wide": 0, "tall": 0, "table": 0})


def row_parallel(model: nn.Module, group: dist.ProcessGroup) -> None:
    _place(model, _line(group), {"fused": 1, "wide": 1, "tall": 1, "moe.experts": 2, "picture.weight": 1, "bias": None})


def replicated(model: nn.Module, group: dist.ProcessGroup) -> None:
    _place(model, _line(group), dict.fromkeys(SHAPES))


def stacks_by_rows(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Each expert cut by rows: torchtitan's answer to more ranks than experts."""
    _place(model, _line(group), {"moe.experts": 1, "table": 1})


def tensor_parallel_and_fsdp2(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Strided shards, rows of columns, a norm on a part of the mesh, and replicas over the tensor-parallel ranks."""
    mesh = _grid("data", "tensor")
    _place(
        model, mesh["tensor"], {"fused": 0, "wide": 1, "tall": 0, "moe.experts": 2, "table": 0, "picture.weight": None}
    )
    fully_shard(model, mesh=mesh["data"])


def whole_experts(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Experts on their ranks, by expert parallelism alone, the rest on FSDP2."""
    _place(model, _line(group), {"moe.experts": 0})
    fully_shard(model, mesh=_line(group), ignored_params={model.get_parameter("moe.experts")})


def experts_and_fsdp2(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Experts over one dimension of a mesh and their rows over the other, the rest over all ranks: two meshes."""
    mesh = _grid("shard", "expert")
    _place(model, mesh["expert"], {"moe.experts": 0})
    fully_shard(model.get_submodule("moe"), mesh=mesh["shard"], shard_placement_fn=lambda p: Shard(1))
    fully_shard(model, mesh=_line(group))


CUTS: list[tuple[Callable[..., None], int]] = [
    (hsdp, 4),
    (columns_by_fsdp2, 2),
    (columns_by_fsdp2, 4),
    (column_parallel, 2),
    (column_parallel, 3),
    (row_parallel, 2),
    (row_parallel, 4),
    (replicated, 3),
    (stacks_by_rows, 4),
    (tensor_parallel_and_fsdp2, 4),
    (whole_experts, 2),
    (whole_experts, 4),
    (experts_and_fsdp2, 4),
]
EVERY_CUT = pytest.mark.parametrize(("cut", "size"), CUTS, ids=lambda v: v.__name__ if callable(v) else f"{v}")
ON_FOUR = [hsdp, tensor_parallel_and_fsdp2, experts_and_fsdp2]


# --------------------------------------------------------------------------------------------------- training


def _make(group: dist.ProcessGroup, cut: Callable[..., None] | None, dtype: Any = None, **options: Any) -> Any:
    model = Zoo().to(dtype or torch.float32)
    if cut is not None:
        cut(model, group)
    options = {"lr": LR, "routes": ROUTES, "bucket_mb": 0.001, "ns_dtype": torch.float32, **options}
    optimizer = distmuon.DistMuon(model, **options)
    return model, optimizer


def _local_part(param: Tensor, whole: Tensor) -> Tensor:
    box = box_of(param)
    assert box is not None
    return whole[tuple(slice(offset, offset + size) for offset, size in zip(*box))].contiguous()


def _give(model: nn.Module, grads: Weights, scale: float = 1.0) -> None:
    for name, param in model.named_parameters():
        mine = (scale * _local_part(param, grads[name])).to(param.dtype)
        if isinstance(param, DTensor):
            facts: Any = {"shape": param.shape, "stride": param.stride(), "run_check": False}
            mine = DTensor.from_local(mine, param.device_mesh, param.placements, **facts)
        param.grad = mine


def _locals(model: nn.Module, optimizer: Any = None) -> dict[str, tuple[Any, Tensor]]:
    """The box of each parameter, and of each entry of its state, with this rank's elements."""
    found: dict[str, tuple[Any, Tensor]] = {}
    for name, param in model.named_parameters():
        found[name] = box_of(param), local_of(param).detach().clone()
        for key, value in optimizer.state[param].items() if optimizer is not None else ():
            if value.ndim:
                found[f"{name}.{key}"] = box_of(param), local_of(value).detach().clone().view(local_of(param).shape)
    return found


def _assemble(by_rank: list[dict[str, tuple[Any, Tensor]]]) -> Weights:
    """Whole tensors from all ranks' boxes; every element must be there, and replicas must be equal bit by bit."""
    found: Weights = {}
    for key in by_rank[0]:
        whole = torch.full(SHAPES[next(name for name in SHAPES if key.startswith(name))], float("nan"))
        for held in by_rank:
            box, local = held[key]
            place = whole[tuple(slice(offset, offset + size) for offset, size in zip(*box))]
            assert not (place == place).any() or torch.equal(place, local.float()), f"{key}: replicas differ"
            place.copy_(local)
        assert not whole.isnan().any(), key
        found[key] = whole
    return found


def _check(got: Weights, wanted: Weights, scale: float = 1.0) -> None:
    start = {name: param.detach() for name, param in Zoo().named_parameters()}
    of_weights, of_updates = errors({name: got[name] for name in start}, wanted, start)
    assert of_weights[0] <= scale * REL_WEIGHTS, of_weights
    assert of_updates[0] <= scale * REL_UPDATE, of_updates


def _run(group: dist.ProcessGroup, cut: Callable[..., None]) -> Any:
    """Train; return this rank's boxes, the metrics of a step, the layout, and how often DTensor gathered anything."""
    model, optimizer = _make(group, cut)
    gathers = 0

    def counted(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal gathers
            gathers += 1
            return method(*args, **kwargs)

        return call

    kinds: Any = DTensor
    before = kinds.full_tensor, kinds.redistribute
    kinds.full_tensor, kinds.redistribute = map(counted, before)
    try:
        for step in range(STEPS):
            _give(model, _gradients(step))
            optimizer.step()
    finally:
        kinds.full_tensor, kinds.redistribute = before
    return _locals(model, optimizer), optimizer.metrics(), optimizer.layout, gathers


@EVERY_CUT
def test_every_cut_equals_the_oracle(spawn, cut: Callable[..., None], size: int) -> None:
    """Replicas stay equal bit by bit, each matrix is orthogonalized once over all ranks, the exchange sends what the
    boxes say, and nothing is gathered whole."""
    found = spawn(_run, size, cut=cut)
    _check(_assemble([local for local, _, _, _ in found]), _expected())
    assert sum(metrics["ns_matrices"] for _, metrics, _, _ in found) == NUM_MATRICES
    assert [gathers for _, _, _, gathers in found] == [0] * size
    norm = float(torch.stack([g.double().square().sum() for g in _gradients(STEPS - 1).values()]).sum().sqrt())
    sent_at_all = 0
    for rank, (_, metrics, layout, _) in enumerate(found):
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6), "a replica counts once"
        there, back = _planned(layout, rank)
        sent = metrics["bytes"]
        assert (sent.get("dp_gather", 0), sent.get("scatter", 0)) == (there, back)
        assert set(sent) <= {"dp_gather", "scatter", "guard"}, sent
        sent_at_all += there + back
    assert sent_at_all > 0


def _owners_and_sources(group: dist.ProcessGroup) -> Any:
    _, optimizer = _make(group, hsdp)
    return [(placed.workers[0], [source.rank for source in placed.sources]) for placed in optimizer.layout.matrices]


def test_pieces_reach_the_owner_inside_its_shard_group(spawn) -> None:
    """Under HSDP the shard group is a node, and owners are in all of them."""
    found = spawn(_owners_and_sources, 4)[0]
    assert {owner // 2 for owner, _ in found} == {0, 1}
    for owner, sources in found:
        assert {rank // 2 for rank in sources} == {owner // 2}


def _planned(layout: Any, rank: int) -> tuple[int, int]:
    """The bytes that `rank` sends in float32, counted from masks of whole parameters, not from segments."""
    there = back = 0
    for placed in layout.matrices:
        spec = layout.specs[placed.param]
        (owner,) = placed.workers
        masks = []
        for box in layout.given[placed.param]:
            mask = torch.zeros(spec.shape, dtype=torch.bool)
            if box is not None:
                mask[tuple(slice(offset, offset + size) for offset, size in zip(*box))] = True
            masks.append(mask.view(-1)[placed.unit.offset : placed.unit.offset + placed.unit.numel])
        back += 4 * sum(int(mask.sum()) for holder, mask in enumerate(masks) if owner == rank != holder)
        sends = torch.zeros_like(masks[0])
        for source in (s for s in placed.sources if s.rank == rank != owner):
            for offsets, sizes in boxes_of_runs(
                spec.shape, source.param_offset, source.length, source.run, source.stride
            ):
                mask = torch.zeros(spec.shape, dtype=torch.bool)
                mask[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))] = True
                sends |= mask.view(-1)[placed.unit.offset : placed.unit.offset + placed.unit.numel]
        assert not (sends & masks[owner]).any(), "the owner has it already"
        there += 4 * int(sends.sum())
    return there, back


def _shard_alone(bucket: Bucket, key: Any, stack: Tensor, step: Any) -> Tensor:
    """Newton-Schulz on each half of the rows by itself: the error that all of this exists to avoid."""
    group = step.param_groups[key.group]
    halves = stack.split(-(-stack.size(1) // 2), dim=1)
    factors = [orthogonalize(x, steps=group["ns_steps"], coefficients=group["ns_coefficients"]) for x in halves]
    return torch.cat([x.float() for x in factors], dim=1)


def _control_run(group: dist.ProcessGroup, cut: Callable[..., None]) -> Any:
    before, Bucket._orthogonalize = Bucket._orthogonalize, _shard_alone  # type: ignore[method-assign]
    try:
        return _run(group, cut)
    finally:
        Bucket._orthogonalize = before  # type: ignore[method-assign]


def test_newton_schulz_on_the_shard_is_not_the_oracle(spawn) -> None:
    got = _assemble([local for local, _, _, _ in spawn(_control_run, 4, cut=hsdp)])
    with pytest.raises(AssertionError):
        _check(got, _expected(), scale=100.0)


def _clip_run(group: dist.ProcessGroup, cut: Callable[..., None], how: str, transposed: bool = False) -> Any:
    model, optimizer = _make(group, cut, **({"max_grad_norm": 3.0} if how == "option" else {}))
    for step in range(STEPS):
        _give(model, _gradients(step))
        if transposed:  # as autograd leaves the gradient of a transposed weight
            grad: Any = model.get_parameter("fused").grad
            grad._local_tensor = grad._local_tensor.t().contiguous().t()
            assert not grad._local_tensor.is_contiguous()
        if how == "ours":
            optimizer.clip_grad_norm_(3.0)
        optimizer.step()
    return _locals(model)


@pytest.mark.parametrize("how", ["ours", "option"])
@pytest.mark.parametrize("cut", ON_FOUR)
def test_clipping_counts_a_replica_once(spawn, cut: Callable[..., None], how: str) -> None:
    _check(_assemble(spawn(_clip_run, 4, cut=cut, how=how)), _expected(max_norm=3.0))


def test_a_gradient_in_column_major_order_is_clipped_too(spawn) -> None:
    found = spawn(_clip_run, 2, cut=column_parallel, how="ours", transposed=True)
    _check(_assemble(found), _expected(max_norm=3.0))


def _broken_run(group: dist.ProcessGroup, cut: Callable[..., None], broken: int) -> Any:
    model, optimizer = _make(group, cut)
    _give(model, _gradients(0))
    optimizer.step()
    before = _locals(model, optimizer)
    _give(model, _gradients(1))
    if group.rank() == broken:
        local_of(model.bias.grad).fill_(float("inf"))  # also where this rank's elements are another's replica
    optimizer.step()
    after = _locals(model, optimizer)
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(before.values(), after.values())), optimizer.metrics()


@pytest.mark.parametrize("broken", [0, 2, 3])
def test_a_non_finite_replica_skips_the_step_everywhere(spawn, broken: int) -> None:
    for same, metrics in spawn(_broken_run, 4, cut=hsdp, broken=broken):
        assert same and metrics["skipped_steps"] == 1


def _absent_run(group: dist.ProcessGroup, cut: Callable[..., None]) -> Any:
    model, optimizer = _make(group, cut)
    for step in range(STEPS):
        _give(model, _gradients(step))
        if step == 1:
            model.fused.grad = model.bias.grad = None
        if step == 1 and group.rank() % 2:
            model.tall.grad = None
        optimizer.step()
    return _locals(model)


def test_a_rank_without_a_gradient_does_not_hang(spawn) -> None:
    """None everywhere leaves the parameter alone; on one rank of each replica it counts as zeros in its part."""
    oracle = _oracle()
    for step in range(STEPS):
        grads = _gradients(step)
        if step == 1:
            del grads["fused"], grads["bias"]
            grads["tall"][9:] = 0  # the second shard's rows
        oracle.apply(grads)
    _check(_assemble(spawn(_absent_run, 4, cut=hsdp)), oracle.weights)


def _bf16_run(group: dist.ProcessGroup, cut: Callable[..., None] | None) -> Any:
    alone: dict[str, Any] = {} if cut is not None else {"process_group": group}
    model, optimizer = _make(group, cut, torch.bfloat16, momentum_dtype=torch.bfloat16, **alone)
    for step in range(STEPS):
        _give(model, _gradients(step))
        optimizer.step()
    return _locals(model, optimizer) if cut is not None else _by_name(optimizer.full_state_dict())


def _by_name(state: Any) -> dict[str, Any]:
    """The whole tensors of a state dict as "name.key"."""
    names = dict(pair for group in state["param_groups"] for pair in zip(group["params"], group["param_names"]))
    found = {
        f"{names[number]}.{key}": value for number, entry in state["state"].items() for key, value in entry.items()
    }
    return {name: value for name, value in found.items() if value.ndim}


@pytest.mark.parametrize(("cut", "size"), [(row_parallel, 2), (tensor_parallel_and_fsdp2, 4), (hsdp, 4)])
def test_bfloat16_is_that_of_one_process(spawn, cut: Callable[..., None], size: int) -> None:
    """Dice fall by the position in the parameter, so momentum has the same bits; masters are float32 on each rank."""
    (alone,) = spawn(_bf16_run, 1, cut=None)
    got = _assemble(spawn(_bf16_run, size, cut=cut))
    for name in MUON:
        assert torch.equal(got[f"{name}.momentum_buffer"], alone[f"{name}.momentum_buffer"].float()), name
    for name in SHAPES:
        torch.testing.assert_close(got[f"{name}.master"], alone[f"{name}.master"], rtol=1e-5, atol=1e-6)
        assert torch.equal(got[name], got[f"{name}.master"].bfloat16().float())


# ------------------------------------------------------------------------------------------- state and checkpoints


def _full_run(group: dist.ProcessGroup, cut: Callable[..., None]) -> Any:
    model, optimizer = _make(group, cut)
    for step in range(STEPS):
        _give(model, _gradients(step))
        optimizer.step()
    full = optimizer.full_state_dict()
    whole = _by_name(full)
    assert {float(entry["step"]) for entry in full["state"].values() if "step" in entry} == {float(STEPS)}
    again_model, again = _make(group, cut)
    with torch.no_grad():
        for new, old in zip(again_model.parameters(), model.parameters()):
            local_of(new).copy_(local_of(old))
    again.load_state_dict(optimizer.state_dict())
    for one, other in ((model, optimizer), (again_model, again)):
        _give(one, _gradients(STEPS))
        other.step()
    same = [torch.equal(local_of(a), local_of(b)) for a, b in zip(model.parameters(), again_model.parameters())]
    return whole, _locals(model, optimizer), all(same)


@pytest.mark.parametrize(("cut", "size"), [(row_parallel, 3), *((cut, 4) for cut in ON_FOUR)])
def test_state_by_state_dict(spawn, cut: Callable[..., None], size: int) -> None:
    """The full state is that of the shards, counts included; a rank's own state loads back, and the next step is the
    same."""
    found = spawn(_full_run, size, cut=cut)
    oracle = _oracle()
    for step in range(STEPS):
        oracle.apply(_gradients(step))
    for whole, _, same in found:
        assert same
        for name in SHAPES:
            for key, value in oracle.state[name].items():
                if isinstance(value, Tensor) and value.ndim:
                    torch.testing.assert_close(whole[f"{name}.{key}"], value, rtol=1e-5, atol=1e-6)


def _dcp_run(group: dist.ProcessGroup, cut: Callable[..., None], path: str) -> bool:
    """torch's own checkpoint and state helpers, as with torch.optim.AdamW; then the next step of both."""
    model, optimizer = _make(group, cut)
    for step in range(STEPS):
        _give(model, _gradients(step))
        optimizer.step()
    optimizer.zero_grad()
    states = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(states, checkpoint_id=path)
    again_model, again = _make(group, cut)
    states = {"model": get_model_state_dict(again_model), "optim": get_optimizer_state_dict(again_model, again)}
    dcp.load(states, checkpoint_id=path)
    set_model_state_dict(again_model, states["model"])
    set_optimizer_state_dict(again_model, again, states["optim"])
    for one, other in ((model, optimizer), (again_model, again)):
        _give(one, _gradients(STEPS))
        other.step()
    pairs = zip(_locals(model, optimizer).values(), _locals(again_model, again).values(), strict=True)
    return all(torch.equal(one, other) for (_, one), (_, other) in pairs)


@pytest.mark.parametrize("cut", [*ON_FOUR, row_parallel])
def test_torchs_checkpoints_need_no_adapter(spawn, tmp_path: Path, cut: Callable[..., None]) -> None:
    assert all(spawn(_dcp_run, 4, cut=cut, path=str(tmp_path)))


def _saved(group: dist.ProcessGroup, cut: Callable[..., None] | None, path: str, start: str = "") -> Any:
    """Load from `start`, train, save; return this rank's part of what was saved, and of the step after it."""
    options = {} if cut is not None else {"process_group": group, "grad_reduction": "external"}
    model, optimizer = _make(group, cut, **options)
    first = 0
    if start:
        distmuon.load_checkpoint(start, model, optimizer)
        first = STEPS
        loaded = _whole_or_local(model, optimizer, cut)
    else:
        for step in range(STEPS):
            _give(model, _gradients(step))
            optimizer.step()
        loaded = None
    distmuon.save_checkpoint(path, model, optimizer)
    _give(model, _gradients(first or STEPS))
    optimizer.step()
    return loaded, _whole_or_local(model, optimizer, cut)


def _whole_or_local(model: Any, optimizer: Any, cut: Any) -> Any:
    if cut is not None:
        return _locals(model, optimizer)
    optimizer.synchronize()
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return {**weights, **_by_name(optimizer.full_state_dict())}


@pytest.mark.parametrize(("cut", "size"), [(row_parallel, 2), (stacks_by_rows, 4), *((cut, 4) for cut in ON_FOUR)])
def test_checkpoints_go_to_and_fro(spawn, tmp_path: Path, cut: Callable[..., None], size: int) -> None:
    """What plain ZeRO-1 saved at 4 ranks loads under every cut, and what that saves loads at 2 plain ranks, bit for
    bit; the next step is the oracle's."""
    paths = [str(tmp_path / name) for name in ("zero-1", "cut-1", "zero-2")]
    plain = spawn(_saved, 4, cut=None, path=paths[0])
    there = spawn(_saved, size, cut=cut, path=paths[1], start=paths[0])
    back = spawn(_saved, 2, cut=None, path=paths[2], start=paths[1])
    loaded, returned = _assemble([loaded for loaded, _ in there]), back[0][0]
    assert loaded.keys() == returned.keys()
    for name, value in returned.items():
        assert torch.equal(loaded[name], value), name
    wanted = _expected(STEPS + 1)
    _check(_assemble([after for _, after in there]), wanted)
    for _, after in (*plain, *back):
        _check(after, wanted)


# ------------------------------------------------------------------------------------------------------- refusals


def _other_values(group: dist.ProcessGroup) -> None:
    """A plain parameter beside tensor parallelism, made from another seed on each rank."""
    model = Zoo()
    column_parallel(model, group)
    with torch.no_grad():
        model.get_parameter("bias").add_(group.rank())
    _, optimizer = model, distmuon.DistMuon(model, lr=LR, routes=ROUTES)
    _give(model, _gradients(0))
    optimizer.step()


def _other_gradients(group: dist.ProcessGroup) -> None:
    """Tensor parallelism over ranks that see other data, and nobody averages the replicas' gradients."""
    model, optimizer = _make(group, column_parallel)
    _give(model, _gradients(0))
    bias: Any = model.get_parameter("bias")
    bias.grad *= 1 + group.rank()
    optimizer.step()


def _partial(group: dist.ProcessGroup) -> None:
    model, mesh = Zoo(), _line(group)
    _set(model, "bias", nn.Parameter(DTensor.from_local(model.get_parameter("bias").detach(), mesh, [Partial()])))
    distmuon.DistMuon(model, lr=LR, routes=ROUTES)


def _inside_a_row(group: dist.ProcessGroup) -> None:
    model = Zoo()
    _place(model, _line(group), {"picture.weight": 2})
    distmuon.DistMuon(model, lr=LR, routes=ROUTES)


def _other_model(group: dist.ProcessGroup) -> None:
    model = Zoo()
    if group.rank() == 1:
        model.register_parameter("more", nn.Parameter(torch.zeros(4)))
    fully_shard(model, mesh=_line(group))
    distmuon.DistMuon(model, lr=LR, routes=ROUTES)


def _whole_as_shard(group: dist.ProcessGroup) -> None:
    """Every rank says that its rows are the first: nobody holds the last."""
    model = Zoo()
    fully_shard(model, mesh=_line(group))
    before = cut_module.box_of
    cut_module.box_of = lambda tensor: ((0,) * tensor.ndim, (2, *tensor.shape[1:]))
    try:
        distmuon.DistMuon(model, lr=LR, routes=ROUTES)
    finally:
        cut_module.box_of = before


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_other_values, r"bias: ranks 0 and 1 hold the same part of it with other values; .*nobody sends them"),
        (_other_gradients, r"bias: ranks 0 and 1 hold the same part of it, and their gradients differ; .*averaged"),
        (_partial, r"bias: the parameter is placed \(Partial\(sum\),\); sharded or replicated"),
        (_inside_a_row, r"picture\.weight: .*neither rows nor columns of its matrices"),
        (_other_model, r"rank 1: it trains more \(4,\), .*a pipeline's stages are meshes of their own"),
        (_whole_as_shard, r"fused: its shape is \(24, 10\), .*overlap, or leave elements out"),
    ],
)
def test_what_is_no_cut_is_refused(spawn_raises, make: Callable[..., None], match: str) -> None:
    spawn_raises(make, 2, match=match)


def _two_stages(group: dist.ProcessGroup) -> Any:
    """A pipeline of two stages, each HSDP over two ranks: the process group is the stage's mesh, not the world.

    Some of the pool's processes have made more groups than the others, so each makes as many as are missing.
    """
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 1, 2), mesh_dim_names=("stage", "replicate", "shard"))
    groups: Any = dist.distributed_c10d._world.pg_names
    counts: list[Any] = [0] * group.size()
    dist.all_gather_object(counts, len(groups), group=group)
    while len(groups) < max(counts):
        dist.new_group([group.rank()], use_local_synchronization=True)
    model: Any = Zoo()
    kept = ROUTES
    if group.rank() < 2:
        del model.tall, model.moe
        kept = tuple(route for route in ROUTES if route.pattern not in ("tall", "moe.experts"))
    fully_shard(model, mesh=mesh["replicate", "shard"])
    optimizer = distmuon.DistMuon(model, lr=LR, routes=kept, bucket_mb=0.001, ns_dtype=torch.float32)
    for step in range(STEPS):
        _give(model, _gradients(step))
        optimizer.step()
    return _locals(model)


def test_the_stages_of_a_pipeline_do_not_wait_for_each_other(spawn) -> None:
    found = spawn(_two_stages, 4)
    wanted = _expected()
    for ranks in (found[:2], found[2:]):
        got = _assemble(ranks)
        for name, value in got.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------- other parts of the model

OTHERS = (("tall", "moe", "table"), ("fused", "wide", "picture"))  # by stage, what the other holds; the bias is tied


def _stage_run(group: dist.ProcessGroup, sharded: bool, copies: int, broken: bool) -> Any:
    """Two stages of two data-parallel ranks; gradients clipped to the norm of both, the tied bias counted once."""
    mesh = _grid("stage", "data")
    model: Any = Zoo()
    for name in OTHERS[group.rank() // 2]:
        delattr(model, name)
    if sharded:
        fully_shard(model, mesh=mesh["data"])
    here = [name for name, _ in model.named_parameters() if name != "bias"]
    routes = [distmuon.Route("bias", "adamw", copies=copies)]
    routes += [route for route in ROUTES[:-1] if route.pattern in here]
    routes += [distmuon.Route("table", "adamw")] if "table" in here else []
    options: Any = {} if sharded else {"process_group": mesh.get_group("data"), "grad_reduction": "external"}
    options |= {"model_parallel_group": mesh.get_group("stage"), "max_grad_norm": 3.0, "lr": LR, "routes": routes}
    optimizer = distmuon.DistMuon(model, bucket_mb=0.001, ns_dtype=torch.float32, **options)
    for step in range(STEPS):
        _give(model, _gradients(step))
        if broken and step == 1 and group.rank() == 3:
            local_of(model.tall.grad).fill_(float("nan"))
        optimizer.step()
    optimizer.synchronize()
    return _locals(model), optimizer.metrics()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_norm_and_skip_are_those_of_all_stages(spawn, sharded: bool, broken: bool) -> None:
    found = spawn(_stage_run, 4, sharded=sharded, copies=2, broken=broken)
    oracle = _oracle(max_norm=3.0)
    for step in (0, 2) if broken else range(STEPS):
        oracle.apply(_gradients(step))
    norm = float(torch.stack([g.double().square().sum() for g in _gradients(STEPS - 1).values()]).sum().sqrt())
    for ranks in (found[:2], found[2:]):
        for name, value in _assemble([held for held, _ in ranks]).items():
            torch.testing.assert_close(value, oracle.weights[name], rtol=1e-5, atol=1e-6)
    for _, metrics in found:
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert metrics["skipped_steps"] == broken


@pytest.mark.parametrize(
    ("copies", "match"),
    [
        (3, r"bias: its route says that 3 ranks of model_parallel_group hold it; at most the 2"),
        (0, r"Route\('bias'\)\.copies: found 0"),
    ],
)
def test_impossible_copies_are_refused(spawn_raises, copies: int, match: str) -> None:
    spawn_raises(_stage_run, 4, match=match, sharded=False, copies=copies, broken=False)


def test_a_fragment_is_no_matrix() -> None:
    """Megatron marks its plain tensors; orthogonalizing each by itself would train another model than one process."""
    layer = nn.Linear(8, 8, bias=False)
    layer.weight.tensor_model_parallel = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"weight: a fragment .*parallelize_module"):
        distmuon.DistMuon(layer, routes=[distmuon.Route("*", "muon")])
    distmuon.DistMuon(layer, routes="adamw")
