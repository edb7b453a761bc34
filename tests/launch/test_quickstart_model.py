"""The quickstart's model on two ranks: AdamW's own traffic to the byte, half of the elements, half of the state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import distmuon
from launch.config import parse
from launch.models import build_model, next_token_loss
from launch.run import optimizer_options

CONFIG = ["--config", "configs/quickstart.yaml"]


def _one_step(group: dist.ProcessGroup, name: str) -> dict[str, Any]:
    config = parse([*CONFIG, "--optimizer.name", name])
    torch.manual_seed(0)
    model = build_model(config.model, 256)
    optimizer = distmuon.DistMuon(model, process_group=group, **optimizer_options(config))
    next_token_loss(model, torch.randint(256, (1, 33))).backward()
    optimizer.step()
    optimizer.synchronize()
    mine = [s for b in optimizer.layout.buckets for s in b.segments if s.rank == dist.get_rank(group)]
    elements = sum(spec.numel for spec in optimizer.layout.specs)
    held = sum(bucket.shard_size for bucket in optimizer.layout.buckets)
    state = sum(t.numel() * t.element_size() for s in optimizer.state_dict()["state"].values() for t in s.values())
    return {
        **optimizer.metrics(),
        "held": held,
        "segments": sum(segment.length for segment in mine),
        "elements": elements,
        "whole_state": state,
    }


def test_traffic_and_state_on_two_ranks(spawn) -> None:
    muon, adamw = spawn(_one_step, 2, name="distmuon"), spawn(_one_step, 2, name="adamw")
    for rank, (ours, baseline) in enumerate(zip(muon, adamw, strict=True)):
        assert "dp_gather" not in ours["bytes"] and "scatter" not in ours["bytes"], "no matrix crosses the ranks"
        assert ours["bytes"] == baseline["bytes"], f"rank {rank}: 1.000x of AdamW's traffic, to the byte"
        assert ours["held"] * 2 <= ours["elements"] * 1.001, "padding below 0.1 %"
        assert abs(ours["segments"] * 2 / ours["elements"] - 1) < 1e-3
        for counted in (ours, baseline):
            assert abs(counted["state_bytes"] * 2 / counted["whole_state"] - 1) < 0.02
    assert sum(rank["ns_matrices"] for rank in muon) == 28 and sum(rank["ns_matrices"] for rank in adamw) == 0
