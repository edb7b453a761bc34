"""What Muon adds to the time of a training step: measured on this machine, and planned for clusters.

    OMP_NUM_THREADS=1 python -m experiments.overhead measured 1 2 4   # ranks, one after the other, on gloo
    python -m experiments.overhead planned                            # by the planner; nothing runs

Both write experiments/results/overhead.json. Measured: two copies of one model, one whose matrices take Muon and one
whose parameters all take AdamW, step in turn in the same processes, both under ZeRO-1 by this library. A step is
forward, backward, reduction and update; its overhead is that of a round's pair. Planned: `distmuon plan`'s answer, with
AdamW's step left out of neither side.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import distmuon
from benchmarks.processes import run_ranks
from distmuon.planning.plan import plan
from distmuon.planning.step_time import HARDWARE
from distmuon.planning.verdict import MFU, judge
from experiments.trial import processor
from launch.config import Config, ModelConfig, OptimizerConfig
from launch.models import build_model, next_token_loss, num_parameters
from launch.run import optimizer_options

RESULTS = Path(__file__).parent / "results" / "overhead.json"
VOCABULARY = 256
MODEL = ModelConfig(
    config={
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    seq_len=256,
)
TOKENS = (256, 1024, 4096)
"""Of a step and rank."""
SIDES = ("adamw", "distmuon")
ROUNDS = 5

GPU = "h100"
MODELS = ("llama-1b", "llama-8b")
NODES = (1, 4, 16, 64)
NETWORKS = (400, 100, 25)
"""Gbit/s a GPU, out of its node."""
PLANNED_TOKENS = (4096, 16384)

Row = dict[str, Any]


# ---- measured


def step(model: nn.Module, optimizer: distmuon.DistMuon, tokens: torch.Tensor) -> None:
    """One training step, until this rank holds the new parameters."""
    optimizer.zero_grad()
    next_token_loss(model, tokens).backward()
    optimizer.step()
    optimizer.synchronize()


def work() -> None:
    """One rank: all rounds; the first rank prints them."""
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", os.environ["BENCH_RENDEZVOUS"], rank=rank, world_size=ranks)
    torch.manual_seed(0)
    models = {side: build_model(MODEL, VOCABULARY) for side in SIDES}
    optimizers = {
        side: distmuon.DistMuon(model, **optimizer_options(Config(optimizer=OptimizerConfig(name=side))))  # type: ignore[arg-type]
        for side, model in models.items()
    }
    order = random.Random(0)
    rows: list[Row] = []
    for number in range(-1, ROUNDS):  # the first round warms up
        for tokens in TOKENS:
            took: dict[str, list[list[float]]] = {}
            for side in order.sample(SIDES, k=len(SIDES)):
                windows = torch.randint(VOCABULARY, (tokens // MODEL.seq_len, MODEL.seq_len + 1))
                dist.barrier()
                wall, busy = time.perf_counter(), time.process_time()
                step(models[side], optimizers[side], windows)
                times = torch.tensor([time.perf_counter() - wall, time.process_time() - busy])
                every = [torch.empty(2) for _ in range(ranks)]
                dist.all_gather(every, times)
                took[side] = torch.stack(every).tolist()
            if number >= 0:
                rows.append(
                    {
                        "ranks": ranks,
                        "tokens": tokens,
                        "wall_ms": {side: round(1e3 * max(t[0] for t in took[side]), 2) for side in SIDES},
                        "processor_ms": {side: round(1e3 * sum(t[1] for t in took[side]), 2) for side in SIDES},
                    }
                )
    if rank == 0:
        found = read()
        found["measured"] = [row for row in found["measured"] if row["ranks"] != ranks] + rows
        found["measured"].sort(key=lambda row: (row["ranks"], row["tokens"]))
        found["machine"], found["torch"] = processor(), torch.__version__
        found["parameters"] = num_parameters(models["adamw"])
        found["date"] = time.strftime("%Y-%m-%d", time.gmtime())
        found["load"] = {**found["load"], str(ranks): round(os.getloadavg()[1], 1)}
        spent = time.process_time() * ranks
        found["cpu_seconds"] = {**found["cpu_seconds"], str(ranks): round(spent)}
        write(found)
    dist.barrier()
    dist.destroy_process_group()


# ---- planned


def planned() -> list[Row]:
    """The planner's overhead of each model on each cluster."""
    return [
        planned_row(model, nodes, network, tokens)
        for model in MODELS
        for nodes in NODES
        for network in NETWORKS
        for tokens in PLANNED_TOKENS
        if nodes > 1 or network == NETWORKS[0]  # inside a node the network is not used
    ]


def planned_row(model: str, nodes: int, network: float, tokens: int) -> Row:
    """`tokens` are those of a step and rank; `network` is in Gbit/s."""
    machine = replace(HARDWARE[GPU], network=network * 1e9 / 8)
    ranks = nodes * machine.node_size
    found = judge(plan(model, dp_size=ranks, hardware=machine), hardware=machine, tokens=tokens * ranks)
    assert found.overhead is not None and found.optimizer_s is not None and found.adamw_s is not None
    return {
        "model": model,
        "nodes": nodes,
        "network_gbit": network,
        "tokens": tokens,
        "overhead": round(found.overhead, 5),
        "added_ms": round(1e3 * (found.optimizer_s - found.adamw_s), 2),
    }


# ---- results


def read() -> dict[str, Any]:
    if RESULTS.exists():
        found: dict[str, Any] = json.loads(RESULTS.read_text())
        return found
    return {"cpu_seconds": {}, "load": {}, "measured": [], "planned": []}


def write(found: dict[str, Any]) -> None:
    """A row a line."""
    parts = []
    for key, value in found.items():
        rows = isinstance(value, list)
        lines = ",\n ".join(json.dumps(row) for row in value) if rows else ""
        parts.append(f"{json.dumps(key)}: " + (f"[\n {lines}\n]" if rows else json.dumps(value)))
    RESULTS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("measured", "planned", "worker"))
    parser.add_argument("ranks", nargs="*", type=int, help="of the measured part")
    options = parser.parse_args(argv)
    if options.part == "worker":
        work()
    elif options.part == "planned":
        rows = planned()
        write({**read(), "planned": rows, "assumed": {"gpu": GPU, "mfu": MFU}})
    else:
        return max(run_ranks(["-m", "experiments.overhead", "worker"], ranks, 1) for ranks in options.ranks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
