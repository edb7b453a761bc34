"""What the default layout does to real models, as Markdown. Integers and formulas only: no tensor, no process group.

python -m benchmarks.layout_table            the table of docs/design.md: fp32 gradients, bf16 parameters
python -m benchmarks.layout_table --orders   the table of docs/planner.md: estimated steps by order of collectives
"""

from __future__ import annotations

import argparse

from distmuon.options import Sharding
from distmuon.planning.plan import Plan, plan
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", action="store_true")
    parser.add_argument("--hardware", default="h100")
    arguments = parser.parse_args()
    columns = "buckets | largest | straddlers | traffic | NS balance | state balance | padding | staged"
    if arguments.orders:
        columns = "AdamW | Newton-Schulz | one group | exchange group | gathers last"
    print(f"| model | dp | {columns} |")
    print("|---|---|" + "---|" * (columns.count("|") + 1))
    for name, dp_sizes in (TIMES if arguments.orders else LAYOUTS).items():
        for dp_size in dp_sizes:
            found = plan(name, dp_size=dp_size, hardware=arguments.hardware, sharding=Sharding(overlap="forward"))
            print(f"| {name} | {dp_size} | {order_row(found) if arguments.orders else layout_row(found)} |")


if __name__ == "__main__":
    main()
