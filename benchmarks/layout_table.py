"""What the default layout does to real models, as Markdown. Integers and formulas only: no tensor, no process group.

python -m benchmarks.layout_table            the table of docs/design.md: fp32 gradients, bf16 parameters
python -m benchmarks.layout_table --orders   the table of docs/planner.md: estimated steps by order of collectives
python -m benchmarks.layout_table --nodes    the table of docs/planner.md: steps with and without knowledge of nodes
python -m benchmarks.layout_table --shards   the table of docs/sharding.md: memory and traffic under each sharding
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from distmuon.options import Sharding
from distmuon.planning.plan import Plan, plan, plan_blind
from distmuon.planning.step_time import ORDERS

LAYOUTS = {
    "gpt2-124m": (2, 4, 8),
    "llama-1b": (8, 64),
    "llama-8b": (8, 16, 64),
    "llama-70b": (8, 64, 256),
    "qwen3-30b-a3b": (8, 64),
    "moonlight-16b-a3b": (8, 64, 256),
    "kimi-k2-1t": (64, 512),
}
TIMES = {
    "llama-1b": (8, 64),
    "llama-8b": (8, 64),
    "llama-70b": (64, 256),
    "qwen3-30b-a3b": (64,),
    "moonlight-16b-a3b": (8, 64, 256),
    "kimi-k2-1t": (64, 512),
}

OVER_NODES = {
    "llama-1b": (16, 64),
    "llama-8b": (16, 32, 64, 256, 1024),
    "llama-70b": (64, 256, 1024),
    "qwen3-30b-a3b": (64,),
    "moonlight-16b-a3b": (64, 256),
    "kimi-k2-1t": (512,),
}

SHARDED = ("llama-1b", "llama-8b", "llama-70b")
SHARDED_RANKS = (8, 64, 256)
NODE = 8  # ranks of a replica under HSDP, and of a tensor-parallel group


def layout_row(found: Plan) -> str:
    """Straddlers, traffic, balances, padding and staging of one layout."""
    return (
        f"{found.num_buckets} | {found.largest_bucket:.0%} | {found.straddlers} | {found.traffic:.4f} | "
        f"{found.ns_balance:.3f} | {found.state_balance:.3f} | {found.padding:.4%} | {found.staged:.1%}"
    )


def order_row(found: Plan) -> str:
    """AdamW's step, Newton-Schulz of the slowest rank, and per order the step and what is left on the wire, in ms."""
    assert found.time and found.others[0].time
    cells = [found.others[0].time.step_s, found.time.newton_schulz_s]
    times = [found.orders[order] for order in ORDERS]
    best = min(time.step_s for time in times)
    marks = ["**" if time.step_s <= 1.01 * best else "" for time in times]
    both = [f"{m}{1e3 * time.step_s:.1f}{m} + {1e3 * time.left_s:.1f}" for m, time in zip(marks, times)]
    return " | ".join([*(f"{1e3 * cell:.1f}" for cell in cells), *both])


def far_share(found: Plan) -> float:
    """The share of the exchanges' bytes that leaves a node, all ranks together."""
    pairs = [(rank, name) for rank in found.ranks for name in ("dp_gather", "scatter")]
    far = sum(rank.sent_between_nodes.get(name, 0) for rank, name in pairs)
    return far / max(1, sum(rank.sent_bytes.get(name, 0) for rank, name in pairs))


def nodes_row(name: str, dp_size: int, hardware: str) -> str:
    """Without and with knowledge of nodes, and with whole matrices: the step, and what is left on the wire, in ms."""
    sharding = Sharding(overlap="forward")
    found = plan(name, dp_size=dp_size, hardware=hardware, sharding=sharding)
    blind = plan_blind(name, dp_size, hardware, sharding)
    times = [way.time for way in (blind, found, found.others[2])]
    cells = [f"{1e3 * time.step_s:.1f} + {1e3 * time.left_s:.1f}" for time in times if time]
    return " | ".join([*cells, f"{far_share(blind):.0%}", f"{far_share(found):.1%}"])


def shardings(ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the shardings of `ranks` ranks: label, arguments of `plan`."""
    yield "zero1", {"dp_size": ranks}
    yield "fsdp2", {"dp_size": ranks, "shard": "fsdp2"}
    if ranks > NODE:
        label = f"hsdp, {ranks // NODE} replicas"
        yield label, {"dp_size": ranks, "shard": "hsdp", "replicas": ranks // NODE, "hardware": None}
    label = f"fsdp2 x {ranks // NODE}, tp {NODE}" if ranks > NODE else f"tp {NODE}"
    yield label, {"dp_size": ranks // NODE, "shard": "fsdp2", "tp": NODE}


def shard_row(found: Plan) -> str:
    """Bytes held and sent on the fullest and on the busiest rank, and its Newton-Schulz."""
    held = found.fullest
    if found.given is None:
        meanwhile, own = held.transient, found.stage_bytes("reduce_scatter") + found.stage_bytes("all_gather")
    else:  # the optimizer steps when FSDP2's buffers are free
        meanwhile = max(held.transient, found.given.fsdp2.unsharded_bytes)
        own = sum(found.given.fsdp2.sent_bytes.values())
    exchange = max(
        sum(rank.sent_bytes.get(name, 0) for name in ("guard", "dp_gather", "scatter")) for rank in found.ranks
    )
    numbers = (held.total - held.transient, meanwhile, own, exchange)
    flops = max(rank.ns_flops for rank in found.ranks)
    return " | ".join([*(f"{n / 1e9:.2f}" for n in numbers), f"{flops / 1e12:.1f}"])


def shard_rows(name: str) -> Iterator[str]:
    """Yield the rows of a model in the table of docs/sharding.md."""
    for ranks in SHARDED_RANKS:
        for label, given in shardings(ranks):
            yield f"| {name} | {ranks} | {label} | {shard_row(plan(name, compare=False, **given))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", action="store_true")
    parser.add_argument("--shards", action="store_true")
    parser.add_argument("--nodes", action="store_true")
    parser.add_argument("--hardware", default="h100")
    arguments = parser.parse_args()
    if arguments.shards:
        print(
            "| model | ranks | sharding | held, GB | meanwhile, GB | sharding sends, GB | exchange sends, GB | TFLOP |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for name in SHARDED:
            print("\n".join(shard_rows(name)))
        return
    if arguments.nodes:
        print("| model | dp | nodes not known | nodes known | whole matrices | leaves its node, not known | known |")
        print("|---|---|---|---|---|---|---|")
        for name, dp_sizes in OVER_NODES.items():
            for dp_size in dp_sizes:
                print(f"| {name} | {dp_size} | {nodes_row(name, dp_size, arguments.hardware)} |", flush=True)
        return
    columns = "buckets | largest | straddlers | traffic | NS balance | state balance | padding | staged"
    if arguments.orders:
        columns = "AdamW | Newton-Schulz | one group | exchange group | gathers wait"
    print(f"| model | dp | {columns} |")
    print("|---|---|" + "---|" * (columns.count("|") + 1))
    for name, dp_sizes in (TIMES if arguments.orders else LAYOUTS).items():
        for dp_size in dp_sizes:
            found = plan(name, dp_size=dp_size, hardware=arguments.hardware, sharding=Sharding(overlap="forward"))
            print(f"| {name} | {dp_size} | {order_row(found) if arguments.orders else layout_row(found)} |")


if __name__ == "__main__":
    main()
