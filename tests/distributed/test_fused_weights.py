"""Fused weights whose parts need scales of their own: each part is a matrix, so its update has that matrix's scale.

The scale was once kept by parameter: the query rows of a fused weight with fewer key and value rows than columns got
the scale of the latter (0.71 of what they should), and at another dp_size all of them that of the query.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from tests.reference import Reference
from tests.training import Weights, assert_equals_reference, weights

ROWS = [64, 16, 16]  # of 32 columns: the first is taller than wide, the others are not
RULES = {"qkv.weight": "muon", "out.weight": "muon"}
OPTIONS = [
    {"adjust_lr_fn": scale, "packing": packing, "param_gather": gather}
    for scale, packing, gather in itertools.product(
        ("match_rms_adamw", "original"), ("balanced", "contiguous"), ("parameters", "updates")
    )
]


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, sum(ROWS), bias=False)
        self.out = nn.Linear(sum(ROWS), 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sin(self.qkv(x))).square().mean()


def _batch(rank: int, step: int) -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(10 * step + rank))


def _train(group: dist.ProcessGroup) -> list[Weights]:
    return [_trained(group, options) for options in OPTIONS]


def _trained(group: dist.ProcessGroup, options: dict[str, Any]) -> Weights:
    model = Fused()
    routes = [distmuon.Route("qkv.weight", "muon", split=ROWS), distmuon.Route("out.weight", "muon")]
    wire = {"ns_dtype": torch.float32, "exchange_dtype": torch.float32}
    optimizer = distmuon.DistMuon(model, lr=0.02, routes=routes, process_group=group, **wire, **options)
    for step in range(2):
        model(_batch(dist.get_rank(group), step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model, optimizer)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_each_part_of_a_fused_weight_has_its_own_scale(spawn, dp_size: int) -> None:
    start = {fqn: param.detach().clone() for fqn, param in Fused().named_parameters()}
    for of_rank in zip(*spawn(_train, dp_size), OPTIONS, strict=True):
        *everyone, options = of_rank
        oracle = Reference(
            Fused(), RULES, lr=0.02, splits={"qkv.weight": (ROWS, 0)}, adjust_lr_fn=options["adjust_lr_fn"]
        )
        for step in range(2):
            oracle.step(lambda model, x: model(x), [[_batch(rank, step)] for rank in range(dp_size)])
        for got in everyone:
            assert_equals_reference(got, oracle.weights, start)
