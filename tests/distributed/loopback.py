"""What the kernel says was sent: the loopback device's own counters in a network namespace where nobody else talks.

Run by `test_bytes.py` as ``unshare -n python -m tests.distributed.loopback``; prints one JSON object.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distmuon
from tests.pool import Pool

STEPS, LAYERS, WIDTH = 4, 13, 480
IFF_UP, SIOCSIFFLAGS = 0x1, 0x8914


def bring_up_loopback() -> None:
    """``ip link set lo up`` without the tool, which may be missing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def loopback_bytes() -> int:
    """Bytes sent over `lo` since it exists."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (fields,) = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(fields[8])


def wire_bytes(group: dist.ProcessGroup, one_step: Callable[[int], None]) -> int:
    """The bytes on the wire of `STEPS` steps, between two barriers; a step before them builds and connects."""
    one_step(0)
    dist.barrier(group)
    before = loopback_bytes()
    dist.barrier(group)
    for step in range(1, STEPS + 1):
        one_step(step)
    dist.barrier(group)
    return loopback_bytes() - before


def measure_optimizer(group: dist.ProcessGroup, packing: str) -> tuple[int, dict[str, int]]:
    """(bytes on the wire between two barriers, bytes counted by this rank in between, by stage)."""
    torch.manual_seed(0)  # gradients by hand before any forward need the same values on all ranks
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    optimizer = distmuon.DistMuon(model, process_group=group, packing=packing, ns_steps=1, bucket_mb=4.5)
    counted: dict[str, int] = {}

    def one_step(step: int) -> None:
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
        optimizer.synchronize()
        if step:
            for stage, sent in optimizer.metrics()["bytes"].items():
                counted[stage] = counted.get(stage, 0) + sent

    return wire_bytes(group, one_step), counted


def measure_exchange(group: dist.ProcessGroup, replicas: int) -> tuple[int, int]:
    """(bytes on the wire of `STEPS` steps on FSDP2's or HSDP's shards, Muon elements); gradients are given by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    if replicas > 1:
        mesh = DeviceMesh("cpu", torch.arange(4).view(replicas, -1), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(model, mesh=mesh)
    routes = [distmuon.Route("*weight", "muon"), distmuon.Route("*bias", "adamw")]
    optimizer = distmuon.DistMuon(model, routes=routes, ns_steps=1, bucket_mb=4.5)
    params: list[Any] = list(model.parameters())

    def one_step(step: int) -> None:
        for param in params:
            local = torch.full_like(param.to_local(), 1.0 + step)
            param.grad = DTensor.from_local(local, mesh, param.placements, shape=param.shape, stride=param.stride())
        optimizer.step()

    return wire_bytes(group, one_step), sum(param.numel() for param in params if param.ndim == 2)


def measure_gloo(group: dist.ProcessGroup) -> tuple[int, int]:
    """(bytes on the wire, the floor's bytes) of torch's own reduce-scatter on gloo, all ranks together."""
    dp_size = dist.get_world_size(group)
    source, target = torch.ones(1 << 21), torch.empty((1 << 21) // dp_size)

    def one_step(step: int) -> None:
        dist.reduce_scatter_single(target, source, group=group)

    return wire_bytes(group, one_step), STEPS * dp_size * (dp_size - 1) * target.numel() * target.element_size()


def main() -> None:
    bring_up_loopback()
    pool = Pool(4)
    found: dict[str, list[Any]] = {}
    for dp_size in (2, 4):
        for packing in ("balanced", "contiguous"):
            results = pool.spawn(measure_optimizer, dp_size, packing=packing)
            stages = {stage: sum(counted[stage] for _, counted in results) for stage in results[0][1]}
            found[f"optimizer, dp_size {dp_size}, {packing}"] = [results[0][0], sum(stages.values()), stages]
        found[f"exchange, dp_size {dp_size}"] = list(pool.spawn(measure_exchange, dp_size, replicas=1)[0])
        found[f"gloo, dp_size {dp_size}"] = list(pool.spawn(measure_gloo, dp_size)[0])
    found["exchange, 2 x 2"] = list(pool.spawn(measure_exchange, 4, replicas=2)[0])
    pool.close(patience_s=0.0)
    print(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
