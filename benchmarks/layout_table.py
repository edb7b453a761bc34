"""What the default packing does to real models: `python -m benchmarks.layout_table` prints the table of docs/design.md.

Integers only: shapes in, a `Layout` a row, no tensor, no process group. fp32 gradients, bf16 parameters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distmuon.config import Options
from distmuon.layout import Layout, make_layout, ns_cost
from distmuon.planner import sent_bytes
from distmuon.routing import Matrix, ParamSpec

OPTIONS = Options()
STAGES = ("reduce_scatter", "dp_gather", "scatter", "all_gather")


def spec(fqn: str, *shape: int, muon: bool = False) -> ParamSpec:
    """A bf16 parameter; a Muon one of three dimensions is a stack."""
    rows, columns = (1, *shape)[-2:]
    count = shape[0] if len(shape) == 3 else 1
    matrices = tuple(Matrix(i * rows * columns, rows, columns) for i in range(count)) if muon else ()
    return ParamSpec(fqn, shape, torch.bfloat16, "muon" if muon else "adamw", matrices, "table")


def gpt2() -> Iterator[ParamSpec]:
    d = 768
    yield from (spec("wte", 50257, d), spec("wpe", 1024, d))
    for i in range(12):
        yield from (spec(f"{i}.{name}", d) for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"))
        for name, m, n in (("qkv", d, 3 * d), ("proj", d, d), ("fc", d, 4 * d), ("fc_proj", 4 * d, d)):
            yield from (spec(f"{i}.{name}.weight", m, n, muon=True), spec(f"{i}.{name}.bias", n))


def llama(d: int, layers: int, ffn: int, kv: int, vocabulary: int = 128256) -> Iterator[ParamSpec]:
    yield spec("embed", vocabulary, d)
    for i in range(layers):
        for name, m, n in (("q", d, d), ("k", kv, d), ("v", kv, d), ("o", d, d)):
            yield spec(f"{i}.{name}", m, n, muon=True)
        for name, m, n in (("gate", ffn, d), ("up", ffn, d), ("down", d, ffn)):
            yield spec(f"{i}.{name}", m, n, muon=True)
        yield from (spec(f"{i}.{name}", d) for name in ("norm_1", "norm_2"))
    yield from (spec("norm", d), spec("head", vocabulary, d))


def moonlight() -> Iterator[ParamSpec]:
    """16B-A3B (moonshotai/Moonlight-16B-A3B config), experts stacked as transformers 5 stores them."""
    d, vocabulary = 2048, 163840
    yield spec("embed", vocabulary, d)
    for i in range(27):
        for name, m, n in (("q", 3072, d), ("kv_a", 576, d), ("kv_b", 4096, 512), ("o", d, 2048)):
            yield spec(f"{i}.{name}", m, n, muon=True)
        ffn = 11264 if i == 0 else 2816
        for name, m, n in (("gate", ffn, d), ("up", ffn, d), ("down", d, ffn)):
            yield spec(f"{i}.{name}", m, n, muon=True)
        if i:
            yield spec(f"{i}.router", 64, d, muon=True)
            # gate and up are 64 matrices each; one stack of 128 here, so that each is a unit
            yield from (spec(f"{i}.gate_up", 128, 1408, d, muon=True), spec(f"{i}.down_e", 64, d, 1408, muon=True))
        yield from (spec(f"{i}.{name}", size) for name, size in (("norm_1", d), ("norm_2", d), ("kv_norm", 512)))
    yield from (spec("norm", d), spec("head", vocabulary, d))


def row(layout: Layout) -> str:
    """Straddlers, traffic, balances, padding and staging of one layout, in Markdown."""
    specs, ranks = layout.specs, range(layout.dp_size)
    total = sum(s.numel for s in specs)
    baseline = sum(sent_bytes(layout, OPTIONS, 0)[stage] for stage in ("reduce_scatter", "all_gather"))
    extra_out = [0] * layout.dp_size
    cost = [0] * layout.dp_size
    state = [0] * layout.dp_size
    for placed in layout.matrices:
        owner = placed.workers[0]
        cost[owner] += ns_cost(placed.matrix)
        for piece in placed.pieces:
            if piece.rank != owner:  # out to the owner, and back from it
                extra_out[piece.rank] += 2 * piece.length
                extra_out[owner] += 2 * piece.length
    for bucket in layout.buckets:
        for segment in bucket.segments:
            state[segment.rank] += segment.length * (8 if specs[segment.param].matrices else 12)
    straddlers = sum(placed.straddling for placed in layout.matrices)
    padding = sum(bucket.shard_size for bucket in layout.buckets) * layout.dp_size / total - 1
    staged = sum(s.numel for i, s in enumerate(specs) if layout.contiguous_start(i) is None) / total
    largest = max(sum(specs[p].numel for p in bucket.params) for bucket in layout.buckets) / total
    balance = [max(load) * len(ranks) / sum(load) for load in (cost, state)]
    return (
        f"| {layout.dp_size} | {len(layout.buckets)} | {largest:.0%} | {straddlers} "
        f"| {1 + max(extra_out) / baseline:.4f} "
        f"| {balance[0]:.3f} | {balance[1]:.3f} | {padding:.4%} | {staged:.1%} |"
    )


def main() -> None:
    models = {
        "GPT-2 124M": (list(gpt2()), (2, 4, 8)),
        "Llama 1B": (list(llama(2048, 16, 8192, 512)), (8, 64)),
        "Llama 8B": (list(llama(4096, 32, 14336, 1024)), (8, 16, 64)),
        "Llama 70B": (list(llama(8192, 80, 28672, 1024)), (8, 64, 256)),
        "Moonlight 16B-A3B": (list(moonlight()), (8, 64, 256)),
    }
    print("| model | dp | buckets | largest | straddlers | traffic | NS balance | state balance | padding | staged |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, (specs, dp_sizes) in models.items():
        for dp_size in dp_sizes:
            print(f"| {name} {row(make_layout(specs, dp_size))}")


if __name__ == "__main__":
    main()
