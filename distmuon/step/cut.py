"""Which rank holds which box of which parameter: asked once, when the optimizer is made, if others have cut them.

Decides the process group, which is all ranks of the parameters' meshes, and whether the boxes are a cut: they must hold
every element, and the matrices must be cut by rows or columns. Meshes may differ by parameter: experts lie on another
mesh than the rest, a norm under tensor parallelism on a part of the mesh, or whole on every rank. So boxes are
gathered, not computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon.comm.agreement import bit_sums
from distmuon.comm.group import DataParallelGroup, group_of_ranks
from distmuon.errors import problem
from distmuon.layout.boxes import Box, runs_of, tiles_exactly
from distmuon.layout.given import HeldBoxes, replicas_of
from distmuon.layout.routing import ParamSpec
from distmuon.step.dtensors import box_of, local_of, mesh_ranks

_STAGE = "comparison of the cuts"


def group_of_meshes(params: Sequence[nn.Parameter], given: Any) -> Any:
    """The process group of all ranks that hold a part of `params`, or a replica; None for the default group.

    Raises if the user has `given` another. Makes a group if there is none, which all these ranks must do.
    """
    ranks = sorted(set().union(*(mesh_ranks(param) for param in params)))
    if given is not None:
        found = sorted(dist.get_process_group_ranks(given))
        if found != ranks:
            raise problem(
                "process_group",
                found=f"ranks {found}",
                needed=f"the ranks of the parameters' meshes, {ranks}, are needed",
                cure="leave process_group out: the parameters' meshes say it",
            )
        return given
    for param in params:
        mesh: Any = getattr(param, "device_mesh", None)
        if mesh is not None and mesh.ndim == 1 and list(mesh_ranks(param)) == ranks:
            group = mesh.get_group()
            return None if group is dist.group.WORLD else group
    if ranks == list(range(dist.get_world_size())):
        return None
    return group_of_ranks(ranks)


def gather_boxes(
    specs: Sequence[ParamSpec], params: Sequence[nn.Parameter], group: DataParallelGroup
) -> tuple[HeldBoxes, ...]:
    """The box of each parameter on each rank. Collective. Raises on all ranks unless they are a cut of the model."""
    local = [(spec.fqn, spec.shape, box_of(param)) for spec, param in zip(specs, params)]
    by_rank = group.gather_objects(local, stage=_STAGE)
    for rank, found in enumerate(by_rank):
        if [entry[:2] for entry in found] != [entry[:2] for entry in by_rank[0]]:
            others = [f"{fqn} {shape}" for fqn, shape, _ in found]
            mine = [f"{fqn} {shape}" for fqn, shape, _ in by_rank[0]]
            first = next((a for a, b in zip(others, mine) if a != b), f"{len(others)} parameters")
            raise problem(
                f"rank {rank}",
                found=f"it trains {first}, where rank 0 trains {dict(zip(others, mine)).get(first, len(mine))}",
                needed="all ranks of the parameters' meshes must train the same parameters in the same order",
                cure="make the same model on all ranks of a mesh; a pipeline's stages are meshes of their own",
            )
    boxes = [tuple(found[index][2] for found in by_rank) for index in range(len(specs))]
    known: set[tuple[tuple[int, ...], tuple[Box, ...]]] = set()
    for spec, held in zip(specs, boxes):
        kinds = replicas_of(held)
        if (spec.shape, tuple(kinds)) not in known and not tiles_exactly(spec.shape, kinds):
            raise _no_cut(spec, f"boxes {kinds[:4]} that overlap, or leave elements out")
        known.add((spec.shape, tuple(kinds)))
        columns = spec.matrices[0].columns if spec.matrices else 0
        for box in kinds if columns else ():
            _, _, run, stride = runs_of(spec.shape, box)[0]
            if stride and stride != columns and (stride % columns or run % columns):
                raise _no_cut(spec, f"box {box}, which is neither rows nor columns of its matrices")
    return tuple(boxes)


def _no_cut(spec: ParamSpec, found: str) -> ValueError:
    return problem(
        spec.fqn,
        found=f"its shape is {spec.shape}, and the ranks hold {found}",
        needed="every element must lie on some rank, in a matrix cut by rows or columns",
        cure="shard the first or the second dimension, by fully_shard, parallelize_module or distribute_tensor",
    )


def check_replicas(
    specs: Sequence[ParamSpec], boxes: Sequence[HeldBoxes], params: Sequence[nn.Parameter], group: DataParallelGroup
) -> None:
    """Raise on all ranks unless ranks with the same box of a parameter hold the same bits in it. Collective.

    Nobody sends values to replicas, so those that start apart would stay apart.
    """
    shared = _shared(boxes)
    sums = [bit_sums(local_of(params[index])) for index in shared]
    for index, first, second in _differences(shared, boxes, sums, group, tolerance=0.0):
        raise problem(
            specs[index].fqn,
            found=f"ranks {first} and {second} hold the same part of it with other values",
            needed="replicas must start equal: nobody sends them",
            cure="seed all ranks equally, or load the same checkpoint on all; what differs by rank on purpose, such as "
            "experts, must be a DTensor that is sharded over a mesh of these ranks",
        )


def check_replicated_grads(
    specs: Sequence[ParamSpec], boxes: Sequence[HeldBoxes], params: Sequence[nn.Parameter], group: DataParallelGroup
) -> None:
    """Raise on all ranks if the gradients of replicas differ by more than rounding. Collective."""
    shared = _shared(boxes)
    zero = torch.zeros((), dtype=torch.float64, device=local_of(params[0]).device)
    norms = []
    for index in shared:
        grad = params[index].grad
        norms.append(zero if grad is None else torch.linalg.vector_norm(local_of(grad), dtype=torch.float64))
    for index, first, second in _differences(shared, boxes, norms, group, tolerance=1e-3):
        raise problem(
            specs[index].fqn,
            found=f"ranks {first} and {second} hold the same part of it, and their gradients differ",
            needed="gradients must arrive averaged over the ranks that hold a replica",
            cure="let fully_shard hold the parameter, or average its gradient before optimizer.step()",
        )


def _shared(boxes: Sequence[HeldBoxes]) -> list[int]:
    """The parameters of which several ranks hold the same elements."""
    return [index for index, held in enumerate(boxes) if any(len(ranks) > 1 for ranks in _holders(held))]


def _holders(held: HeldBoxes) -> list[list[int]]:
    """The ranks that hold each box."""
    found: dict[Box, list[int]] = {}
    for rank, box in enumerate(held):
        if box is not None and 0 not in box[1]:
            found.setdefault(box, []).append(rank)
    return list(found.values())


def _differences(
    shared: Sequence[int],
    boxes: Sequence[HeldBoxes],
    facts: Sequence[Tensor],
    group: DataParallelGroup,
    tolerance: float,
) -> Iterator[tuple[int, int, int]]:
    """Yield (parameter, rank, rank) of replicas with other `facts`: of this rank, a small tensor by shared parameter.

    Collective if anything is shared; the device is read once.
    """
    if not shared:
        return
    numbers = torch.stack(list(facts)).view(len(shared), -1).tolist()
    by_rank = group.gather_objects(numbers, stage=_STAGE)
    for number, index in enumerate(shared):
        for first, *others in _holders(boxes[index]):
            for other in others:
                pairs = zip(by_rank[first][number], by_rank[other][number])
                if any(isfinite(a - b) and abs(a - b) > tolerance * max(abs(a), abs(b)) for a, b in pairs):
                    yield index, first, other
