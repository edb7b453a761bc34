"""What people put around a model: gradient checkpointing, frozen backbones, lists of parameters.

torch.compile has `test_compile.py`, peft `test_adapters.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distmuon
from tests.training import digest, weights

BUCKET_MB = 0.002  # four buckets of `Blocks`


class Blocks(nn.Module):
    """Two blocks and a head; `reentrant` drops the blocks' activations, in the one or the other way of torch."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)) for _ in range(2))
        self.head = nn.Linear(12, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return self.head(x)


def make_optimizer(model: nn.Module, group: Any, **options: Any) -> distmuon.DistMuon:
    given = {"lr": 0.02, "ns_dtype": torch.float32, "process_group": group, "bucket_mb": BUCKET_MB, **options}
    return distmuon.DistMuon(model, **given)


def train(called: nn.Module, optimizer: Any, group: Any, lengths: list[int], max_norm: float | None = None) -> None:
    """One step for each length, two micro-batches each."""
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    for step, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * step + rank)
        for micro in range(2):
            x = torch.randn(length, 12, generator=generator).requires_grad_()  # reentrant checkpoints ask for it
            if micro:
                called(x).square().mean().backward()
            else:
                with optimizer.no_sync():
                    called(x).square().mean().backward()
        if max_norm is not None:
            optimizer.clip_grad_norm_(max_norm)
        optimizer.step()
        optimizer.zero_grad()


def trained(model: nn.Module, group: Any, lengths: list[int], **options: Any) -> dict[str, Tensor]:
    optimizer = make_optimizer(model, group, **options)
    train(model, optimizer, group, lengths)
    return weights(model, optimizer)


def _recomputed(group: dist.ProcessGroup, overlap: Any) -> list[str]:
    lengths = [7, 7, 7]
    return [digest(trained(Blocks(way), group, lengths, overlap=overlap)) for way in (None, False, True)]


@pytest.mark.parametrize("overlap", [True, "forward"])
def test_gradient_checkpointing_changes_no_bit(spawn, overlap: Any) -> None:
    """The second forward, inside backward, meets parameters that have arrived and hooks that have run."""
    for plain, not_reentrant, reentrant in spawn(_recomputed, 2, overlap=overlap):
        assert plain == not_reentrant == reentrant


def _frozen(group: dist.ProcessGroup) -> tuple[bool, bool, int]:
    model = Blocks()
    model.first.requires_grad_(False)
    start = {fqn: param.detach().clone() for fqn, param in model.named_parameters()}
    optimizer = make_optimizer(model, group)
    held = sum(len(g["params"]) for g in optimizer.param_groups)
    train(model, optimizer, group, [7, 7])
    ends = weights(model, optimizer)
    frozen = all(torch.equal(ends[f], start[f]) for f in start if f.startswith("first"))
    moved = all(not torch.equal(ends[f], start[f]) for f in start if not f.startswith("first"))
    return frozen, moved, held


def test_a_frozen_backbone_holds_still_and_holds_no_state(spawn) -> None:
    for frozen, moved, held in spawn(_frozen, 2):
        assert frozen and moved and held == 6


class Listed(nn.Module):
    """Weights in containers that are never called; the layer that uses them has no parameter of its own."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.ParameterList(nn.Parameter(torch.randn(12, 12)) for _ in range(2))
            self.rest = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(12))})

        def forward(self, x: Tensor) -> Tensor:
            for matrix in self.matrices:
                x = torch.tanh(x @ matrix)
            return x + self.rest["bias"]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = Listed.Layer(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


def _listed(group: dist.ProcessGroup) -> list[str]:
    routes = [distmuon.Route("layer.matrices*", "muon")]
    return [digest(trained(Listed(), group, [7] * 4, routes=routes, overlap=overlap)) for overlap in (True, False)]


def test_parameters_in_a_list_or_dict_have_arrived_when_their_layer_runs(spawn) -> None:
    """Autograd found them changed after they were saved: nobody waited for what no module's forward stands for."""
    for overlapped, waited in spawn(_listed, 2):
        assert overlapped == waited
