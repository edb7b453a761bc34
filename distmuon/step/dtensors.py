"""What a DTensor says about the cut of a parameter. This is the only file that knows DTensor.

Decides nothing. The boxes are torch's own, with uneven and strided shards; `checks.py` compares them with the local
tensors, and all ranks' boxes with the whole tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distmuon.layout.boxes import Box


def is_dtensor(tensor: object) -> bool:
    """Whether `tensor` is a DTensor, told without an import that takes a second."""
    return type(tensor).__module__.startswith("torch.distributed.tensor")


@torch.no_grad()
def local_of(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, as a plain one in the same memory; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    found: Tensor = tensor._local_tensor  # type: ignore[attr-defined]  # `to_local` is a new Parameter each time
    return found


def is_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on `module`, told without an import that takes a second."""
    return any(kind.__module__.startswith("torch.distributed.fsdp") for kind in type(module).__mro__)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put its shards back into `model`, where an evaluation has left whole parameters. Local."""
    for module in model.modules():
        if is_fsdp2(module) and hasattr(module, "reshard"):  # FSDP1 has no such method
            module.reshard()  # type: ignore[operator]


def box_of(tensor: Tensor) -> Box | None:
    """The box of a tensor that this rank holds: all of a plain one; None outside the mesh of a DTensor."""
    if not is_dtensor(tensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placed: Any = tensor
    if placed.device_mesh.get_coordinate() is None:
        return None
    sizes, offsets = compute_local_shape_and_global_offset(placed.shape, placed.device_mesh, placed.placements)
    return tuple(map(int, offsets)), tuple(map(int, sizes))


def mesh_ranks(tensor: Tensor) -> tuple[int, ...]:
    """The global ranks of the mesh of a DTensor, ascending; of a plain tensor none."""
    placed: Any = tensor
    return tuple(sorted(placed.device_mesh.mesh.flatten().tolist())) if is_dtensor(tensor) else ()


def like(param: Tensor, local: Tensor) -> Any:
    """`local`, this rank's elements in order, as a tensor of the kind of `param`: of its local shape, with its mesh and
    placements. Shares the memory of `local`."""
    shaped = local.view(local_of(param).shape)
    if not is_dtensor(param):
        return shaped
    from torch.distributed.tensor import DTensor

    placed: Any = param
    facts: Any = {"run_check": False, "shape": placed.shape, "stride": placed.stride()}
    return DTensor.from_local(shaped, placed.device_mesh, placed.placements, **facts)


def is_placed_like(tensor: Tensor, param: Tensor) -> bool:
    """Whether a DTensor has the placements, the shape and the local shape of `param`."""
    given: Any = tensor
    placed: Any = param
    if not is_dtensor(param) or given.placements != placed.placements or given.shape != placed.shape:
        return False
    return local_of(tensor).shape == local_of(param).shape
