"""Format version 1, for ever: `checkpoint_v1/step-3` was written by distmuon 0.1.0 and must load with every later one.

`checkpoint_v1/whole.pt` is the same state, whole, by plain torch.save: what loading must come to. Both were made by
`run` below on two ranks; they are never made again, for a new format gets a folder of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import distmuon
from tests.training import digest, state_tensors

FIXTURE = Path(__file__).with_name("checkpoint_v1")


class _Tiny(nn.Module):
    """A stack, a matrix larger than a shard, an embedding, a 0-d parameter, a frozen weight and a module buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.embed = nn.Embedding(5, 4)
        self.experts_up = nn.Parameter(torch.randn(2, 3, 4))
        self.out = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += 1
        x = torch.einsum("bd,emd->bm", self.embed(tokens), self.experts_up)
        return self.out(torch.tanh(x)) * self.scale + self.frozen.sum()


def _make(group: dist.ProcessGroup) -> tuple[Any, Any, Any]:
    model = _Tiny().bfloat16()
    routes = [distmuon.Route(name, "muon") for name in ("experts_*", "out.weight")]  # rules of then, whatever is now
    optimizer = distmuon.DistMuon(model, lr=0.01, process_group=group, routes=routes, bucket_mb=0.0001)
    return model, optimizer, LambdaLR(optimizer, lambda step: 0.5**step)


def run(group: dist.ProcessGroup, checkpoint: str, whole: str) -> None:
    """How the fixture was made."""
    model, optimizer, scheduler = _make(group)
    for step in range(3):
        model(torch.tensor([step, dist.get_rank(group)])).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    distmuon.save_checkpoint(checkpoint, model, optimizer, scheduler=scheduler, extra={"step": 3, "order": [2, 0, 1]})
    state = {"model": model.state_dict(), "state": state_tensors(optimizer), "lr": optimizer.param_groups[0]["lr"]}
    if dist.get_rank(group) == 0:
        torch.save(state, whole)


def _load(group: dist.ProcessGroup) -> Any:
    model, optimizer, scheduler = _make(group)
    loaded = distmuon.load_checkpoint(FIXTURE, model, optimizer, scheduler=scheduler)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    return kept, state_tensors(optimizer), optimizer.param_groups[0]["lr"], scheduler.last_epoch, loaded


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "A checkpoint of format 1 loads for ever; a newer format is refused by its number",
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_version_1_loads(spawn, size: int) -> None:
    whole = torch.load(FIXTURE / "whole.pt", weights_only=True)
    for model, state, lr, last_epoch, loaded in spawn(_load, size):
        assert digest(model) == digest(whole["model"])
        assert digest(state) == digest(whole["state"])
        assert lr == whole["lr"] == 0.01 * 0.5**3 and last_epoch == 3
        assert loaded.path.name == "step-3" and loaded.extra == {"step": 3, "order": [2, 0, 1]}
        assert loaded.dp_size == 2 and loaded.rng_restored == (size == 2) and loaded.skipped == ()
