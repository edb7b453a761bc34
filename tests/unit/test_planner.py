"""Plans of real models: shape tables, totals, targets, what is compared, and plans of models without tensors."""

from __future__ import annotations

import gc
import math
import random
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import nn

import distmuon
from distmuon.layout import layout
from distmuon.layout.layout import make_layout, start_gathers
from distmuon.layout.report import describe
from distmuon.layout.routing import ParamSpec, route
from distmuon.options import Options, Precision, Sharding
from distmuon.planning.baselines import whole_matrix_layout
from distmuon.planning.counts import count, plan_rank, sent_bytes
from distmuon.planning.plan import plan, plan_blind
from distmuon.planning.shapes import TABLES, shape_table
from distmuon.planning.step_time import HARDWARE, BucketLoad, Coding, Hardware, HopLoad, Order, StepTime, estimate
from tests.standing import Standing, routes

# Sums of the shapes in the published safetensors (the number that each model's page on huggingface.co shows), without
# the routers' selection bias, which is no parameter: 26*64 in Moonlight's 15,960,110,208, 60*384 in Kimi's
# 1,026,408,232,448.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "qwen3-30b-a3b": 30_532_122_624,
    "moonlight-16b-a3b": 15_960_110_208 - 26 * 64,
    "kimi-k2-1t": 1_026_408_232_448 - 60 * 384,
}
DEEPSEEK = {
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 163840,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 2048,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # what the published config.json say of shapes
    "gpt2-124m": ("gpt2", {}),
    "llama-1b": (
        "llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    "llama-8b": (
        "llama",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "llama-70b": (
        "llama",
        {
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "moe_intermediate_size": 768,
            "vocab_size": 151936,
        },
    ),
    "moonlight-16b-a3b": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "hidden_size": 2048,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "q_lora_rank": None,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "intermediate_size": 11264,
            "moe_intermediate_size": 1408,
        },
    ),
    "kimi-k2-1t": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "num_attention_heads": 64,
            "q_lora_rank": 1536,
            "num_key_value_heads": 64,
            "n_routed_experts": 384,
            "n_shared_experts": 1,
            "intermediate_size": 18432,
        },
    ),
}


def numel(name: str) -> int:
    return sum(spec.numel for spec in shape_table(name))


def test_every_table_has_a_published_total() -> None:
    assert {name: numel(name) for name in TABLES} == PUBLISHED


@pytest.mark.parametrize("name", list(TABLES))
def test_a_table_is_what_routing_makes_of_the_published_config(name: str) -> None:
    """Same names, order, shapes, rules and matrices as transformers' own model: so the same layout as in training."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        from transformers import AutoConfig, AutoModelForCausalLM

        model_type, config = CONFIGS[name]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))

    def key(spec: ParamSpec) -> tuple[object, ...]:
        return spec.fqn, spec.shape, spec.rule, spec.matrices

    assert [key(spec) for spec in shape_table(name)] == [key(spec) for spec, _ in route(model)]


# (model, dp_size, traffic, Newton-Schulz balance): issue 3, item 1. The other bounds are the same for all.
TARGETS = [
    ("gpt2", 4, 1.005, 1.03),
    ("llama-8b", 8, 1.005, 1.03),
    ("llama-8b", 64, 1.012, 1.15),
    ("llama-70b", 8, 1.005, 1.03),
    ("llama-70b", 64, 1.012, 1.10),
    ("llama-70b", 256, None, 1.75),  # two of the largest matrices on one rank, whose node has nine; 1.2 without nodes
    ("moonlight", 8, 1.005, 1.03),
    ("moonlight", 64, 1.012, 1.10),
]


@pytest.mark.parametrize(("name", "dp_size", "traffic", "balance"), TARGETS)
def test_targets(name: str, dp_size: int, traffic: float | None, balance: float) -> None:
    """Busiest rank, fp32 gradients, bf16 parameters."""
    found = plan(name, dp_size=dp_size)
    assert found.traffic is not None and (traffic is None or found.traffic <= traffic)
    assert found.padding <= 0.001
    assert found.state_balance <= 1.02
    assert found.largest_bucket <= (0.32 if dp_size <= 8 else 0.80)  # GPT-2's embedding alone is 31 %
    assert found.ns_balance <= balance


NODES = [
    *[("llama-1b", dp_size) for dp_size in (16, 64)],
    *[("llama-8b", dp_size) for dp_size in (16, 64, 256)],
    pytest.param("llama-8b", 1024, marks=pytest.mark.slow),  # 10 s
    *[("llama-70b", dp_size) for dp_size in (64, 256)],
    *[("moonlight", dp_size) for dp_size in (64, 256)],
    ("qwen3", 64),
]


@pytest.mark.parametrize(("name", "dp_size"), NODES)
def test_over_several_nodes_a_step_is_no_longer_than_with_whole_matrices(name: str, dp_size: int) -> None:
    """Within 1 %, nor than with the layout that knows no nodes; from 256 ranks on also with what the forward hides."""
    found = plan(name, dp_size=dp_size, sharding=Sharding(overlap="forward"))
    blind = plan_blind(name, dp_size, "h100", Sharding(overlap="forward"))
    whole = found.others[2]
    assert found.time and whole.time and blind.time
    assert found.time.step_s <= 1.01 * min(whole.time.step_s, blind.time.step_s)
    if dp_size >= 256:
        assert found.time.step_s + found.time.left_s <= whole.time.step_s + whole.time.left_s


@pytest.mark.parametrize(("name", "dp_size"), [("llama-8b", 16), ("llama-8b", 64), ("llama-70b", 64), ("qwen3", 64)])
def test_matrices_that_fit_hardly_leave_their_node(name: str, dp_size: int) -> None:
    """At most 2 % of the exchange of buckets of which a node's part is twice the largest matrix."""
    made = make_layout(shape_table(name), dp_size, node_size=8)
    moved = far = 0
    for placed in made.matrices:
        bucket = made.buckets[placed.bucket]
        largest = max(unit.numel for param in bucket.params for unit in made.specs[param].matrices)
        for piece in placed.pieces if 8 * bucket.shard_size >= 2 * largest else ():
            owner = placed.workers[0]
            moved += piece.length * (piece.rank != owner)
            far += piece.length * (piece.rank // 8 != owner // 8)
    assert moved and far <= 0.02 * moved


def test_a_bucket_is_not_much_larger_than_those_after_it() -> None:
    """A backward hides a bucket's reduce-scatter only while it computes what comes after: at most 12 times less."""
    for name, dp_size in (("llama-8b", 64), ("llama-8b", 256), ("llama-70b", 256)):
        made = make_layout(shape_table(name), dp_size, node_size=8)
        sizes = [bucket.shard_size for bucket in made.buckets if len(bucket.params) > 1]
        for number in range(1, len(sizes)):
            assert sizes[number - 1] <= 13 * sum(sizes[number:])


def test_experts_keep_in_whole_buckets_of_their_own() -> None:
    """Stacks of 64 and 128 equal matrices on 256 ranks: three or five stacks give each rank one or two, none cut."""
    made = make_layout(shape_table("moonlight"), 256, node_size=8)
    stacks = [bucket for bucket in made.buckets if all(len(made.specs[p].matrices) > 1 for p in bucket.params)]
    assert [len(bucket.params) for bucket in stacks] == [3, 5] * 6 + [3, 1]
    even = {bucket.index for bucket in stacks[:-1]}
    assert not any(placed.straddling for placed in made.matrices if placed.bucket in even)
    assert not any(made.is_staged(param) for bucket in stacks for param in bucket.params)


def test_what_waits_for_the_first_layer_waits_in_every_way_to_cut() -> None:
    """The padded shards' last bucket of matrices holds layer 0, but was not counted: embedding and norms come later."""
    specs = shape_table("llama-8b")
    made = whole_matrix_layout(specs, 64, 5000.0)
    loads = count(made, Options())[1]
    first = next(placed for placed in made.matrices if placed.param == min(m.param for m in made.matrices))
    assert loads[first.bucket].ready_last and sum(load.ready_last for load in loads) == 2


def test_70b_on_1024_ranks_is_planned_in_seconds() -> None:
    """Under 10 s on an idle core; processor time, because the test machine is shared."""
    start = time.process_time()
    found = plan("llama-70b", dp_size=1024)
    assert time.process_time() - start < 10.0
    assert len(found.ranks) == 1024 and gc.isenabled()


def test_the_plan_of_a_meta_model_is_that_of_the_real_one() -> None:
    real = Standing()
    with torch.device("meta"):
        unreal = Standing()
    for dp_size in (1, 3):
        given = {"dp_size": dp_size, "routes": routes(), "sharding": Sharding(bucket_mb=0.026)}
        assert plan(unreal, **given) == plan(real, **given) == distmuon.planning.plan.plan(real, **given)
    assert all(param.is_meta for param in unreal.parameters())


def test_sums_over_ranks() -> None:
    """What all ranks hold together is the model's state, once; each matrix is done once, or by each holder."""
    specs = shape_table("gpt2")
    muon = sum(spec.numel for spec in specs if spec.rule == "muon")
    found = plan("gpt2", dp_size=5)
    held = [rank.held for rank in found.ranks]
    assert sum(h.master for h in held) == 4 * found.num_elements == 4 * numel("gpt2")
    assert sum(h.momentum for h in held) == 4 * muon and sum(h.moments for h in held) == 8 * (numel("gpt2") - muon)
    assert sum(rank.ns_matrices for rank in found.ranks) == found.num_matrices == 12 * 6
    adamw, paper, whole = found.others
    assert sum(rank.ns_matrices for rank in paper.ranks) > found.num_matrices
    assert all(rank.ns_flops == 0 and rank.held.momentum == 0 for rank in adamw.ranks)
    assert sum(h.moments for h in (rank.held for rank in adamw.ranks)) == 8 * numel("gpt2")
    assert {stage for rank in paper.ranks for stage in rank.sent_bytes} == {
        "reduce_scatter",
        "guard",
        "dp_gather",
        "all_gather",
    }
    assert {stage for rank in whole.ranks for stage in rank.sent_bytes} == {"reduce_scatter", "guard", "all_gather"}


def test_what_paper_and_whole_matrices_cost() -> None:
    """The orders that the research notes report: redundant Newton-Schulz there, padding here."""
    found = plan("llama-8b", dp_size=64)
    adamw, paper, whole = found.others
    assert [way.way for way in found.others] == ["adamw", "paper", "whole matrices"]
    assert adamw.traffic is None and found.traffic == found.sent / adamw.sent
    assert whole.padding > 0.3 and whole.sent > 1.3 * found.sent and whole.straddlers == 0
    assert max(r.ns_flops for r in paper.ranks) > 2.5 * max(r.ns_flops for r in found.ranks)


def test_whole_matrices_are_laid_largest_first() -> None:
    """By hand: 9, 7, 5, 4 rows of 64 on two ranks make shards of 13 rows' blocks, one of 12; padded to the taller."""
    model = nn.Sequential(*(nn.Linear(64, rows, bias=False) for rows in (4, 9, 5, 7)))
    specs = [spec for spec, _ in route(model)]
    made = whole_matrix_layout(specs, 2, 1.0)
    assert [bucket.shard_size for bucket in made.buckets] == [13 * 64]
    assert {(s.length // 64, s.rank) for s in made.buckets[0].segments} == {(9, 0), (7, 1), (5, 1), (4, 0)}


def test_the_old_face_still_counts_one_rank() -> None:
    """`plan_rank`, `sent_bytes` and `describe` on a layout."""
    specs = shape_table("gpt2")
    made = make_layout(specs, 8)
    found = plan("gpt2", dp_size=8, compare=False)
    assert plan_rank(made, Options(), 3) == found.ranks[3]
    assert sent_bytes(made, Options(), 3) == found.ranks[3].sent_bytes
    assert f"{found.num_buckets} buckets, {found.straddlers} straddlers" in describe(made)
    assert f"Newton-Schulz max/mean {found.ns_balance:.3f}" in describe(made)


# ------------------------------------------------------------------------------------------------------------- times


def _moved(*sent: int, far: int = 0) -> list[HopLoad]:
    """An exchange in one hop between two ranks: what each sends the other receives. `far`: of it, over the card."""
    hop = HopLoad(2)
    hop.sent, hop.received = [*sent], [*sent[::-1]]
    hop.far_sent, hop.far_received = ([min(far, n) for n in way] for way in (hop.sent, hop.received))
    return [hop]


def _load(**counts: Any) -> BucketLoad:
    load = BucketLoad(2, counts.pop("reduce_scatter", 0), counts.pop("all_gather", 0))
    load.ready_last = True
    for name, value in counts.items():
        setattr(load, name, value)
    return load


F32 = torch.float32
FLAT = HARDWARE["h100"].__class__(
    flops=1e12, memory=1e30, nvlink=1e9, network=1e9, flops_share=1.0, memory_share=1.0, link_share=1.0, latency_s=0.0
)


def _estimate(loads: Sequence[BucketLoad], hardware: Hardware = FLAT, **given: Any) -> StepTime:
    """Of rates that make seconds whole; as overlap="forward" has it, where nothing else is given."""
    usual: dict[str, Any] = {"guard_bytes": 0, "ns_bytes": 2, "wire_bytes": 2, "ns_steps": 1}
    return estimate(loads, hardware, **{**usual, "overlap": True, "gathers_in_forward": True, **given})


def seconds(*loads: BucketLoad, overlap: bool = True) -> float:
    return _estimate(loads, overlap=overlap, gathers_in_forward=overlap).step_s


def test_the_step_time_by_hand() -> None:
    """Two ranks, 1 GB/s, 1 TFLOP/s: the last reduce-scatter, Newton-Schulz, all-gather follow one another."""
    one = _load(reduce_scatter=3 * 10**9, all_gather=2 * 10**9, ns_flops=[4 * 10**12, 10**12])
    assert seconds(one) == pytest.approx(3 + 4 + 2)
    time_ = _estimate([one])
    assert (time_.newton_schulz_s, time_.communication_s, time_.exposed_s) == pytest.approx((4, 5, 5))
    halved = _estimate([one], ns_bytes=4)
    assert halved.newton_schulz_s == pytest.approx(8)


def test_what_gathers_nothing_waits_for_nothing() -> None:
    """Where FSDP2 gathers the parameters there is the guard, two latencies, and no all-gather that costs another."""
    found = _estimate([_load(ns_flops=[4 * 10**12] * 2)] * 3, replace(FLAT, latency_s=1.0), gathers_in_forward=False)
    assert (found.step_s, found.communication_s, found.left_s) == pytest.approx((2 + 3 * 4, 2, 0))


def test_a_wider_wire_takes_longer_and_newton_schulz_does_not() -> None:
    """1 s of exchange at 2 bytes an element; the dtype of Newton-Schulz was taken for that of the wire."""
    load = _load(ns_flops=[10**12] * 2, gather=_moved(10**9 // 2, 0))
    narrow, wide = _estimate([load]), _estimate([load], wire_bytes=4)
    assert (narrow.communication_s, wide.communication_s) == pytest.approx((1, 2))
    assert narrow.newton_schulz_s == wide.newton_schulz_s
    steps = [
        plan("llama-1b", dp_size=8, precision=Precision(exchange=dtype), compare=False).time for dtype in (None, F32)
    ]
    assert steps[0] is not None and steps[1] is not None and steps[1].communication_s > steps[0].communication_s


def test_an_exchange_is_priced_by_where_it_goes() -> None:
    """1 GB that leaves its node takes 1 s, 1 GB inside it 0.1 s, one after the other; so does the latency."""
    near = _load(gather=_moved(10**9 // 2, 0))
    hardware = replace(FLAT, nvlink=1e10, node_size=1)
    assert _estimate([near], hardware).communication_s == pytest.approx(0.1)
    far = _load(gather=_moved(10**9, 0, far=10**9 // 2))
    assert _estimate([far], hardware).communication_s == pytest.approx(1.1)
    hardware = replace(hardware, latency_s=1.0)  # two of two nodes for the guard, and one or two for the exchange
    assert _estimate([near], hardware).communication_s == pytest.approx(4 + 1 + 0.1)
    assert _estimate([far], hardware).communication_s == pytest.approx(4 + 2 + 1.1)
    both = _load(gather=far.gather + near.gather)  # two hops, the second inside the node
    assert _estimate([both], hardware).communication_s == pytest.approx(4 + 2 + 1.1 + 1 + 0.1)


def test_a_reduction_is_priced_by_where_it_goes() -> None:
    """Around a ring 3 GB take 3 s at 1 GB/s; by exchanges the GB that leaves the node 1 s, the two inside it 0.2 s, and
    the 1.5 * 10^9 gradients that arrive 1.5 s of sums where two bytes take 1 ns. A second level is a second
    latency, of one node. What is not ready last hides, its sums too."""
    hardware = replace(FLAT, nvlink=1e10, node_size=1, memory=2e9)
    ring = _load(reduce_scatter=3 * 10**9)
    assert _estimate([ring], replace(FLAT, network=1e9)).step_s == pytest.approx(3)
    by_level = _load(reduce_scatter=3 * 10**9, reduce_far=[10**9, 0])
    found = _estimate([by_level], hardware)
    assert (found.communication_s, found.elementwise_s) == pytest.approx((1.2, 1.5))
    assert found.step_s == pytest.approx(2.7) and found.exposed_s == pytest.approx(1.2)
    inside = _load(reduce_scatter=3 * 10**9, reduce_far=[0, 0])
    assert _estimate([inside], hardware).communication_s == pytest.approx(0.3)
    late = replace(hardware, latency_s=1.0)  # 4 of the guard; 2 between two nodes, 1 inside one
    for load, levels, latency in ((inside, 1, 1), (by_level, 1, 2), (by_level, 2, 3)):
        load.reduce_levels = levels
        wire = 0.3 if load is inside else 1.2
        assert _estimate([load], late).communication_s == pytest.approx(4 + latency + wire)
    by_level.ready_last = False
    assert _estimate([by_level], hardware).step_s == 0


def test_passes_over_memory_by_hand() -> None:
    """At 1 GB/s a billion elements of a pass over n bytes take n seconds. Masters are compared beside the reduction;
    updates that travel are applied to the elements of both ranks."""
    slow = replace(FLAT, memory=1e9)
    plain = _load(muon=[10**9, 0], stacked=[10**9, 0])
    assert _estimate([plain], slow).elementwise_s == pytest.approx(14 + 6 + 10 + 4)
    compared = _load(muon=[10**9, 0], stacked=[10**9, 0], compare=5, publish=7)
    assert _estimate([compared], slow).elementwise_s == pytest.approx(14 + 6 + 10 + 4 + 5 + 7)
    compared.reduce_scatter = 5 * 10**9
    assert _estimate([compared], slow).step_s == pytest.approx(5 + 14 + 6 + 10 + 4 + 7)
    travelling = _load(muon=[10**9, 10**9], adamw=[0, 10**9], updates_travel=True)
    assert _estimate([travelling], slow).elementwise_s == pytest.approx(14 + 6 + 2 * 10 + 8 + (4 + 4 + 28 + 8))
    travelling.stacked, travelling.coding = [10**9, 10**9], Coding(1000, 100, 10)
    assert _estimate([travelling], slow).elementwise_s == pytest.approx(92 + 6 + 1000 + 100 + 2 * 10)


def _reduction_bytes(dp_size: int, rank: int, known: int, node_size: int) -> tuple[int, int, int, int]:
    """(bytes of the reductions that `rank` sends, of them to other nodes, calls, bytes of a slice of every bucket)."""
    layout = make_layout(shape_table("gpt2-124m"), dp_size, node_size=known)
    options = Options(precision=Precision(reduce=torch.bfloat16))
    found = count(layout, options, node_size=node_size)[0][rank]
    far = found.sent_between_nodes.get("reduce_scatter", 0)
    calls = found.calls["reduce_scatter"] // len(layout.buckets)
    return found.sent_bytes["reduce_scatter"], far, calls, 2 * sum(bucket.shard_size for bucket in layout.buckets)


@pytest.mark.parametrize(
    ("known", "node_size", "rank", "slices", "far", "calls"),
    [
        (4, 4, 5, 3 * 3 + 2, 2, 2),  # three nodes of four: three slices to each of three neighbours, two to other nodes
        (12, 12, 5, 11, 0, 1),
        (12, 4, 5, 11, 8, 1),  # the layout knows no nodes, and so does not the reduction
        (1, 1, 5, 11, 11, 1),
        (5, 5, 4, 11, 7, 1),
        (5, 5, 11, 11, 10, 1),  # the smaller last node
    ],
)
def test_slices_of_a_16_bit_reduction_by_hand(
    known: int, node_size: int, rank: int, slices: int, far: int, calls: int
) -> None:
    sent, between, times, slice_bytes = _reduction_bytes(12, rank, known, node_size)
    assert (sent, between, times) == (slices * slice_bytes, far * slice_bytes, calls)


def test_two_levels_spare_the_network() -> None:
    """8 nodes of 8: everything to everyone takes several times as long as the float32 ring, two levels do not. All
    columns of a plan reduce alike."""
    short = Precision(reduce=torch.bfloat16)
    blind = make_layout(shape_table("llama-8b"), 64)
    last = [load for load in count(blind, Options(precision=short), node_size=8)[1] if load.ready_last]
    everyone = sum(max(load.reduce_far) for load in last) / (0.8 * HARDWARE["h100"].network)
    ring, levels = (plan("llama-8b", dp_size=64, precision=given) for given in (Precision(), short))
    assert ring.time and levels.time and levels.time.step_s - ring.time.step_s < everyone / 8
    assert {way.ranks[0].calls["reduce_scatter"] // way.num_buckets for way in (levels, *levels.others)} == {2}


def test_bytes_between_nodes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """From segments and owners alone: what a rank of the exchange sends to ranks of other nodes, in 16 bits. Two hops
    send as much, and no rank more than its share."""
    made = make_layout(shape_table("llama-1b"), 16, node_size=4)
    in_two = count(made, Options())[0]
    assert any(made.two_hops)
    monkeypatch.setattr(layout, "_SECOND_HOP", math.inf)
    made = replace(made)  # without what it has cached
    assert not any(made.two_hops)
    ranks = count(made, Options())[0]
    for stage in ("dp_gather", "scatter"):
        before, after = ([rank.sent_between_nodes.get(stage, 0) for rank in plans] for plans in (ranks, in_two))
        assert sum(before) == sum(after) > 0
        assert stage == "dp_gather" or max(before) > 2 * max(after)
    for rank in (0, 7):
        gather = sum(
            2 * piece.length
            for placed in made.matrices
            for piece in placed.pieces
            if piece.rank == rank and placed.workers[0] // 4 != rank // 4
        )
        scatter = sum(
            2 * piece.length
            for placed in made.matrices
            for piece in placed.pieces
            if placed.workers[0] == rank and piece.rank // 4 != rank // 4
        )
        expected = {stage: n for stage, n in (("dp_gather", gather), ("scatter", scatter)) if n}
        assert ranks[rank].sent_between_nodes == expected
    assert plan("llama-1b", dp_size=16, compare=False, sharding=Sharding(gpus_per_node="all")).sent_between_nodes == 0


def test_an_exchange_hides_under_the_newton_schulz_of_its_neighbour() -> None:
    """1 s of exchange there, 5 s of Newton-Schulz: serial 2 * 6 s, pipelined 1 s less."""
    loads = [_load(ns_flops=[5 * 10**12] * 2, gather=_moved(10**9 // 2, 0)) for _ in range(2)]
    assert seconds(*loads, overlap=False) == pytest.approx(12)
    assert seconds(*loads) == pytest.approx(11)


def test_the_next_forward_hides_all_gathers_but_the_first() -> None:
    """2 s and 3 s, the first layers' bucket (the last) first; where the step waits for all, it takes 2 s longer."""
    loads = [_load(all_gather=2 * 10**9, ns_flops=[10**12, 0]) for _ in range(2)]
    loads[-1].all_gather = 3 * 10**9
    first = _estimate(loads)
    assert (first.step_s, first.left_s) == pytest.approx((2 + 3, 2))
    whole = _estimate(loads, gathers_in_forward=False)
    assert (whole.step_s, whole.left_s) == pytest.approx((2 + 3 + 2, 0))
    both = _estimate(loads, overlap=False, gathers_in_forward=False)
    assert (both.step_s, both.left_s) == pytest.approx((1 + 3 + 2, 0))


def in_order(*loads: BucketLoad, order: Order, started: Sequence[int] = ()) -> tuple[float, float]:
    found = _estimate(loads, order=order, gathers_started=started)
    return found.step_s, found.left_s


def test_the_three_orders_by_hand() -> None:
    """Buckets with all-gathers of 4 s; the last one to walk exchanges, 1 s each way, and gathers for 1 s."""

    def last(ns_seconds: int) -> BucketLoad:
        ways = {"gather": _moved(10**9 // 2, 0), "scatter": _moved(0, 10**9 // 2)}
        return _load(all_gather=10**9, ns_flops=[ns_seconds * 10**12] * 2, **ways)

    plain = [_load(all_gather=4 * 10**9) for _ in range(3)]
    # One queue: all-gather 0-4, exchange 4-5, all-gather 5-9, scatter 9-10, all-gathers 10-14-15.
    assert in_order(last(0), *plain, order="one_group") == pytest.approx((10, 5))
    # Two: exchange 0-2 and scatter 2-4 at half speed, the first all-gather 0-6, the others 6-15.
    assert in_order(last(0), *plain, order="exchange_group") == pytest.approx((6, 9))
    # Held back: exchange 0-1, scatter 1-2, all-gathers 2-6-15.
    assert in_order(last(0), *plain, order="gathers_wait", started=(0, 0, 3, 4)) == pytest.approx((6, 9))
    # 3 s of Newton-Schulz between the exchanges, and one bucket less. One queue: exchange 0-1, all-gather 1-5,
    # scatter 5-6, all-gathers 6-10-11.
    assert in_order(last(3), *plain[1:], order="one_group") == pytest.approx((6, 5))
    # Two: exchange 0-2, Newton-Schulz 2-5, scatter 5-7; all-gathers 0-5, 5-10 and 10-11.
    assert in_order(last(3), *plain[1:], order="exchange_group") == pytest.approx((7, 4))
    # Held back: exchange 0-1, Newton-Schulz 1-4, scatter 4-5, all-gathers 5-9-13-14.
    assert in_order(last(3), *plain[1:], order="gathers_wait", started=(0, 2, 3)) == pytest.approx((9, 5))


def test_gathers_that_start_early_make_the_step_shorter() -> None:
    """Against all of them held back, for random buckets: shorter by 3 % in the mean, longer by 2 % at the most."""
    draw = random.Random(0)
    ratios: list[float] = []
    while len(ratios) < 500:
        seconds = [(draw.choice((0.5, 1, 2, 4)), draw.choice((0.1, 0.5, 1, 2, 4))) for _ in range(draw.randint(4, 7))]
        exchanges = [draw.choice((0, 0, 0.1, 0.5, 1, 2)) for _ in seconds]
        last = max((number for number, found in enumerate(exchanges) if found), default=0)
        if last < 2:
            continue
        loads = []
        for (ns, gather), exchange in zip(seconds, exchanges):
            half = int(exchange * 10**9 / 2)
            ways = {"gather": _moved(half, 0), "scatter": _moved(0, half)} if half else {}
            loads.append(_load(all_gather=int(gather * 10**9), ns_flops=[int(ns * 10**12)] * 2, **ways))
        started = start_gathers([gather for _, gather in seconds], [ns for ns, _ in seconds], exchanges)
        held = [done if done >= last else 0 for done in range(1, len(loads) + 1)]
        early, late = (in_order(*loads[::-1], order="gathers_wait", started=when)[0] for when in (started, held))
        ratios.append(early / late)
    assert max(ratios) < 1.02 and fmean(ratios) < 0.97


@pytest.mark.parametrize(
    ("model", "dp_size"), [("llama-1b", 8), ("llama-8b", 16), ("llama-70b", 256), ("moonlight", 64)]
)
def test_gathers_that_start_early_hardly_delay_exchanges(model: str, dp_size: int) -> None:
    """Against all of them held back until the last scatter, by the same estimate: no longer, and less is left."""
    node_size = 8 if dp_size > 8 else 0
    made = make_layout(shape_table(model), dp_size, node_size=node_size)
    loads = count(made, Options(), node_size=8)[1]
    exchanging = [number for number, load in enumerate(loads[::-1]) if load.gather or load.scatter]
    held = [number + 1 if number + 1 >= max(exchanging) else 0 for number in range(len(loads))]
    given = {"hardware": HARDWARE["h100"], "order": "gathers_wait", "guard_bytes": 1000, "ns_steps": 5}
    early = _estimate(loads, **given, gathers_started=made.gathers_started)
    late = _estimate(loads, **given, gathers_started=held)
    assert early.step_s <= 1.001 * late.step_s and early.left_s <= late.left_s
    assert early.left_s < 0.99 * late.left_s or model == "moonlight", "there nothing fits"


def test_what_is_ready_last_is_reduced_in_the_open() -> None:
    """The buckets of the embedding and of the first layers, the latter with all attention of a mixture of experts."""
    for name in ("llama-8b", "moonlight"):
        made = make_layout(shape_table(name), 8)
        loads = count(made, Options())[1]
        last = [bucket for bucket, load in zip(made.buckets, loads) if load.ready_last]
        assert [min(bucket.params) for bucket in last] == [1, 0]
        before = _estimate(loads).step_s
        loads[-2].ready_last = False
        after = _estimate(loads).step_s
        assert before - after == pytest.approx(loads[-2].reduce_scatter / FLAT.nvlink)


def test_staged_parameters_are_copied_in_the_step() -> None:
    """Read and written once: 1 GB at 1 GB/s takes 2 s, and nothing hides it."""
    slow = replace(FLAT, memory=1e9)
    loads = [_load(staged=10**9), _load()]
    found = _estimate(loads, hardware=slow)
    assert (found.step_s, found.elementwise_s, found.exposed_s) == pytest.approx((2, 2, 0))


def test_estimates_of_real_models_are_in_order() -> None:
    """More hardware is faster, fewer steps are, and AdamW, which has no Newton-Schulz, is faster than any Muon."""
    h100, b200 = (plan("llama-8b", dp_size=8, hardware=name) for name in ("h100", "b200"))
    short = plan("llama-8b", dp_size=8, ns_steps=3, compare=False)
    assert h100.time and b200.time and short.time and h100.others[0].time and h100.others[1].time
    assert b200.time.step_s < h100.time.step_s and short.time.step_s < h100.time.step_s
    assert h100.others[0].time.step_s < h100.time.step_s < h100.others[1].time.step_s
    assert plan("gpt2", dp_size=2, hardware=None).time is None
    cpu = plan("gpt2", dp_size=2, hardware="cpu", precision=Precision(newton_schulz=torch.float32), compare=False).time
    assert cpu and cpu.step_s > 1.0, "a processor takes seconds for what a GPU does in milliseconds"


def test_the_order_asked_for_is_the_one_that_is_shown() -> None:
    forward = Sharding(overlap="forward")
    own = plan("llama-8b", dp_size=64, sharding=forward, exchange_group=True, compare=False)
    last = plan("llama-8b", dp_size=64, sharding=forward, compare=False)
    assert own.orders == last.orders and own.time == own.orders["exchange_group"]
    assert own.time != last.time == last.orders["gathers_wait"]
    one = plan("llama-8b", dp_size=64, compare=False)
    assert one.time == one.orders["one_group"] and one.time and last.time and one.time.left_s == 0 < last.time.left_s
    assert one.time.step_s > last.time.step_s
    assert list(plan("gpt2", dp_size=2, sharding=Sharding(overlap=False), compare=False).orders) == ["one_group"]


def test_auto_takes_the_bucket_size_with_the_shortest_step_and_says_why() -> None:
    found = plan("llama-1b", dp_size=16, auto_bucket=True, compare=False)
    best, _, sizes = found.why.partition(" has the shortest estimated step of ")
    shown = {size: float(step) for size, step in re.findall(r"(\d+ MiB|None) ([\d.]+) ms", sizes)}
    assert len(shown) > 3 and found.time and min(shown, key=lambda size: shown[size]) == best
    assert shown[best] == pytest.approx(1e3 * found.time.step_s, abs=0.006)
    given = None if best == "None" else float(best.split()[0])
    again = plan("llama-1b", dp_size=16, sharding=Sharding(bucket_mb=given), compare=False)
    assert again.time and again.time.step_s == pytest.approx(found.time.step_s, rel=0.02)  # its MiB are rounded


@pytest.mark.parametrize(("name", "dp_size"), [("llama-8b", 8), ("llama-8b", 64), ("llama-70b", 64), ("moonlight", 64)])
def test_the_default_is_near_the_best_size(name: str, dp_size: int) -> None:
    """What `bucket_mb=None` chooses by integers alone takes hardly longer than the best that `auto_bucket` finds."""
    default = plan(name, dp_size=dp_size, compare=False).time
    auto = plan(name, dp_size=dp_size, compare=False, auto_bucket=True).time
    assert default and auto and auto.step_s <= default.step_s <= 1.15 * auto.step_s


def test_sizes_that_cut_alike_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stacks of experts have buckets of their own, all sizes cut alike: a trillion parameters in one pass."""
    packed = []
    pack = layout._pack
    monkeypatch.setattr(layout, "_pack", lambda *given: packed.append(given[1]) or pack(*given))
    made = make_layout(shape_table("moonlight"), 8)
    assert len(packed) == len(made.buckets)


@pytest.mark.parametrize(
    ("model", "given", "match"),
    [
        ("nonsense", {}, "nonsense.*gpt2-124m"),
        ("llama", {}, "'llama'.*llama-1b"),
        ("gpt2", {"dp_size": 0}, "dp_size: found 0"),
        ("gpt2", {"hardware": "abacus"}, "hardware: found 'abacus'.*h100"),
        ("gpt2", {"sharding": "neat"}, "sharding: found 'neat'; a distmuon.Sharding is needed"),
        ("gpt2", {"auto_bucket": True, "hardware": None}, "auto_bucket: found no hardware"),
        ("gpt2", {"routes": [distmuon.Route("*", "muon")]}, "routed already"),
        ([], {}, "no trainable parameter"),
        (nn.Linear(3, 3).requires_grad_(False), {}, "updated by Muon|no trainable parameter"),
    ],
)
def test_bad_input_names_thing_number_and_cure(model: Any, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan(model, **{"dp_size": 2, **given})
