"""What this machine's CPU and loopback give, as a row of `step_time.HARDWARE`, and how near the estimate comes.

    python -m benchmarks.hardware [--processes 2] [--threads 1] [--rounds 9] [--width 512]

Every process measures at the same time, as in a step: each has its share of the cores, of memory and of loopback.
A round measures the rates and then real steps of `DistMuon` (backward apart), so that what else the machine does hits
both; the ratio measured / estimated is taken within a round, with that round's rates. Printed are median and quartiles
of the quieter half of the rounds, those in which other processes took least, and the share of the machine they took.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from benchmarks.newton_schulz import others
from distmuon.comm.group import DataParallelGroup
from distmuon.planning.step_time import ON_CPU, Hardware

LAYERS, VOCABULARY, BUCKETS = 4, 4096, 4
LARGE = 4 << 20  # elements of what is copied or sent: 16 MiB of float32
SIDE = 768  # of the matrices: (SIDE, SIDE) @ (SIDE, 4 * SIDE), as in Newton-Schulz of a 4:1 matrix


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one rank; seconds of a step."""

    row: Hardware
    measured: float
    estimated: float
    others: float  # share of the machine that other processes took


class Block(nn.Module):
    """The matrices of a GPT-2 layer and a norm; no attention, which is not the optimizer's business."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(torch.tanh(q) * k + v)
        mixed: Tensor = x + self.down(torch.tanh(self.up(x)))
        return mixed


def model(width: int) -> nn.Module:
    """GPT-2's shapes, small."""
    return nn.Sequential(nn.Embedding(VOCABULARY, width), *(Block(width) for _ in range(LAYERS)), nn.LayerNorm(width))


def seconds(work: Callable[[], object], calls: int = 9) -> float:
    """Median of so many calls, after one; all ranks begin together."""
    work()
    dist.barrier()
    return statistics.median(time_of(work) for _ in range(calls))


def time_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rates() -> Hardware:
    """What one process gets, while the others measure the same. The link is the slower of the two collectives."""
    group = DataParallelGroup(None, lambda *_: None)
    ranks, flops = group.dp_size, {}
    for dtype in (torch.bfloat16, torch.float32):
        pair = torch.randn(SIDE, SIDE).to(dtype), torch.randn(SIDE, 4 * SIDE).to(dtype)
        flops[dtype] = 2 * SIDE * SIDE * 4 * SIDE / seconds(partial(torch.matmul, *pair))
    source, target = torch.ones(LARGE), torch.empty(LARGE)
    memory = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    whole, small, each = torch.empty(ranks * LARGE), torch.zeros(64, dtype=torch.float64), [LARGE] * ranks
    received = torch.empty(ranks * LARGE)
    link = (
        (ranks - 1)
        * source.nbytes
        / max(
            seconds(lambda: group.start_all_gather(whole, source, stage="").wait()),
            seconds(lambda: group.start_all_to_all(received, whole, each, each, stage="").wait()),
        )
    )
    return Hardware(
        flops=flops[torch.bfloat16],
        memory=memory,
        nvlink=link,
        network=link,
        flops_share=1.0,
        memory_share=1.0,
        link_share=1.0,
        latency_s=seconds(lambda: group.start_all_reduce(small, stage="").wait()),
        float32_share=flops[torch.float32] / flops[torch.bfloat16],
        passes=ON_CPU,
    )


def step_seconds(network: nn.Module, optimizer: distmuon.DistMuon) -> float:
    """From the last gradient until every parameter has arrived; the slowest rank's."""
    network(torch.randint(VOCABULARY, (1, 64))).square().mean().backward()
    dist.barrier()
    start = time.perf_counter()
    optimizer.step()
    optimizer.synchronize()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return taken.item()


def elsewhere() -> float:
    """Processor seconds of all processes but ours, of all ranks."""
    own = torch.tensor(sum(os.times()[:2]), dtype=torch.float64)
    everybody = own.clone()
    dist.all_reduce(everybody)
    return others() - (everybody - own).item()


def measure(rank: int, arguments: argparse.Namespace, file: str, found: Queue[list[Round]]) -> None:
    """One process: the rounds, which rank 0 reports."""
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=arguments.processes)
    torch.manual_seed(0)
    network = model(arguments.width)
    sharding = distmuon.Sharding(bucket_mb=4 * sum(p.numel() for p in network.parameters()) / (1 << 20) / BUCKETS)
    optimizer = distmuon.DistMuon(network, sharding=sharding)
    with torch.device("meta"):
        unreal = model(arguments.width)
    for _ in range(2):
        step_seconds(network, optimizer)
    rounds = []
    for _ in range(arguments.rounds):
        start, before = time.perf_counter(), elsewhere()
        row = rates()
        measured = statistics.median(step_seconds(network, optimizer) for _ in range(5))
        share = (elsewhere() - before) / (time.perf_counter() - start) / (os.cpu_count() or 1)
        plan = distmuon.plan(unreal, dp_size=arguments.processes, sharding=sharding, hardware=row, compare=False)
        assert plan.time is not None
        rounds.append(Round(row, measured, plan.time.step_s + plan.time.left_s, share))
    if rank == 0:
        found.put(rounds)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("processes", 2), ("threads", 1), ("rounds", 9), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    context = get_context("spawn")
    found: Queue[list[Round]] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (arguments, str(Path(folder) / "store"), found)
        workers = [context.Process(target=measure, args=(rank, *given)) for rank in range(arguments.processes)]
        for worker in workers:
            worker.start()
        rounds = found.get(timeout=600)
        for worker in workers:
            worker.join()
    rounds = sorted(rounds, key=lambda one: one.others)[: max(2, len(rounds) // 2)]
    share = statistics.median(one.others for one in rounds)
    threads = f"{arguments.processes} processes of {arguments.threads} threads"
    print(f"{len(rounds)} of {arguments.rounds} rounds, {threads}; others took {share:.0%} of the machine")
    units = {
        "flops": (1e9, "GFLOP/s, bf16"),
        "float32_share": (1, "of it in fp32"),
        "memory": (1e9, "GB/s"),
        "nvlink": (1e9, "GB/s, loopback"),
        "latency_s": (1e-3, "ms"),
    }
    median = {}
    for name, (unit, words) in units.items():
        low, median[name], high = statistics.quantiles(getattr(one.row, name) for one in rounds)
        print(f"{name:14} {median[name] / unit:10.2f} {words:16} (quartiles {low / unit:.2f} to {high / unit:.2f})")
    row = replace(rounds[0].row, network=median["nvlink"], **median)
    numbers = ", ".join(f"{name}={value:.3g}" for name, value in median.items())
    shares = "flops_share=1.0, memory_share=1.0, link_share=1.0, passes=ON_CPU"
    print(f"Hardware({numbers}, network={row.network:.3g}, {shares})")
    low, middle, high = statistics.quantiles(one.measured / one.estimated for one in rounds)
    print(f"step, measured / estimated: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
