"""The planner's three answers are arithmetic on its figures."""

from __future__ import annotations

import math

import pytest

from distmuon.options import Sharding
from distmuon.planning.plan import plan
from distmuon.planning.shapes import shape_table
from distmuon.planning.step_time import HARDWARE, hardware_row
from distmuon.planning.verdict import active_elements, judge


def test_overhead_memory_and_traffic_of_zero1() -> None:
    found = plan("llama-1b", dp_size=8)
    adamw = found.others[0]
    assert found.time and adamw.time
    verdict = judge(found, hardware=HARDWARE["h100"], tokens=1 << 20)
    model_s = 6 * 1_235_814_400 * (1 << 20) / (0.4 * 989e12 * 8)
    assert verdict.model_s == pytest.approx(model_s) and verdict.tokens_per_rank == 131_072
    assert verdict.overhead == pytest.approx((found.time.step_s - adamw.time.step_s) / (model_s + adamw.time.step_s))
    assert 0.002 < verdict.overhead < 0.01  # the share that users ask for: less than half a percent
    assert verdict.fits and verdict.hbm == 80e9 and verdict.traffic == found.traffic
    assert judge(found, hardware=HARDWARE["h100"], tokens=1, hbm=found.fullest.total).fits is True
    assert judge(found, hardware=HARDWARE["h100"], tokens=1, hbm=found.fullest.total - 1).fits is False
    half = judge(found, hardware=HARDWARE["h100"], tokens=1 << 20, mfu=0.8, active_elements=1_235_814_400 // 2)
    assert half.model_s == pytest.approx(model_s / 4)


def test_a_faster_way_is_named_and_adamw_is_none() -> None:
    found = plan("llama-1b", dp_size=64, sharding=Sharding(packing="contiguous"))
    times = {way.way: way.time.step_s for way in (found, *found.others) if way.time}
    best = min((way for way in times if way != "adamw"), key=lambda way: times[way])
    assert times["adamw"] < times[best] < times["distmuon"]
    assert judge(found, hardware=HARDWARE["h100"], tokens=1).faster == best == "whole matrices"
    ahead = plan("llama-8b", dp_size=64)
    assert judge(ahead, hardware=HARDWARE["h100"], tokens=1).faster is None
    alone = plan("llama-1b", dp_size=64, compare=False)
    verdict = judge(alone, hardware=HARDWARE["h100"], tokens=1)
    assert verdict.faster is verdict.overhead is verdict.traffic is None


def test_fsdp2_counts_its_own_traffic_and_all_ranks() -> None:
    found = plan("llama-1b", dp_size=8, shard="hsdp", replicas=2, tp=2)
    verdict = judge(found, hardware=HARDWARE["h100"], tokens=1 << 20)
    assert found.given
    own = sum(found.given.fsdp2.sent_bytes.values())
    assert verdict.num_ranks == 16 and verdict.sent == found.sent + own
    assert verdict.adamw_sent == found.others[0].sent + own


def test_without_hardware_there_are_no_times() -> None:
    verdict = judge(plan("gpt2", dp_size=2, hardware=None), hardware=None, tokens=5)
    assert verdict.model_s is verdict.overhead is verdict.hbm is verdict.fits is verdict.faster is None
    assert verdict.to_dict()["traffic"] == 1.0


def test_a_token_uses_some_experts() -> None:
    """Published: Qwen3-30B-A3B 3.3 B, Moonlight 3 B, Kimi K2 32 B active parameters."""
    for name, experts, billions in (("qwen3", 8, 3.3), ("moonlight", 6, 2.9), ("kimi", 8, 32.9)):
        assert active_elements(shape_table(name), experts) / 1e9 == pytest.approx(billions, abs=0.06)
    llama = shape_table("llama-1b")
    assert active_elements(llama, 8) == sum(spec.numel for spec in llama)


@pytest.mark.parametrize("value", [0, -1, math.nan, True, "many"])
def test_bad_numbers(value: object) -> None:
    found = plan("gpt2", dp_size=2, compare=False)
    for name in ("tokens", "hbm", "mfu"):
        with pytest.raises(ValueError, match=f"{name}: found .*; a .* is needed; correct {name}"):
            judge(found, **{"hardware": None, "tokens": 5, name: value})  # type: ignore[arg-type]


def test_every_row_of_gpus_knows_its_memory_and_a_text_its_row() -> None:
    assert {name: row.hbm for name, row in HARDWARE.items()} == {
        **{"a100": 80e9, "h100": 80e9, "h200": 141e9, "b200": 180e9},
        "cpu": None,
    }
    assert hardware_row("h200") == HARDWARE["h200"]
    own = hardware_row("tflops=400,memory_tbs=2,nvlink_gbs=300,network_gbs=25,hbm_gb=96,node_size=4,latency_us=10")
    assert (own.flops, own.memory, own.nvlink, own.network, own.hbm) == (400e12, 2e12, 300e9, 25e9, 96e9)
    assert (own.node_size, own.latency_s, own.flops_share) == (4, pytest.approx(1e-5), 0.6)
