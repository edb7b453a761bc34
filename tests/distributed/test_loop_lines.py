"""The table "Your loop" of docs/coming_from.md, line by line on two ranks: what stays, what raises, what is written."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distmuon

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text()


class Loop:
    """A small model, its optimizer, and one backward of this rank's batch."""

    def __init__(self, group: dist.ProcessGroup, *, ddp: bool = False) -> None:
        torch.manual_seed(3)
        self.plain = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))
        self.model: nn.Module = DistributedDataParallel(self.plain, process_group=group) if ddp else self.plain
        self.optimizer = distmuon.DistMuon(
            self.model, lr=1e-2, process_group=group, grad_reduction="external" if ddp else "reduce_scatter"
        )
        self.rank, self.group = dist.get_rank(group), group

    def loss(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.rank)
        batch = torch.randn(8, 24, generator=generator)
        return self.model(batch).square().mean()

    def backward(self) -> Loop:
        self.loss().backward()
        return self

    def is_equal_on_all_ranks(self) -> bool:
        flat = nn.utils.parameters_to_vector(self.plain.parameters()).detach()
        others = [torch.empty_like(flat) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(others, flat, group=self.group)
        return all(torch.equal(flat, other) for other in others)


def raised(call: Callable[[], object]) -> str:
    """The message of the error that `call` must raise."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def lines_without_ddp(group: dist.ProcessGroup) -> dict[str, Any]:
    clip = torch.nn.utils.clip_grad_norm_
    found: dict[str, Any] = {}

    loop = Loop(group)
    wrapped = DistributedDataParallel(loop.plain, process_group=group)
    found["DDP by mistake"] = raised(lambda: wrapped(torch.randn(8, 24)))

    loop = Loop(group).backward()
    found["torch's clip"] = raised(lambda: clip(loop.plain.parameters(), 1.0))
    found["p.grad.norm()"] = raised(lambda: loop.plain[0].weight.grad.norm())
    returned = loop.optimizer.clip_grad_norm_(1.0)
    loop.optimizer.step()
    found["norm"] = loop.optimizer.metrics()["grad_norm"] == float(returned) > 0
    found["whole after step"] = loop.is_equal_on_all_ranks()
    loop.optimizer.zero_grad()
    loop.plain.zero_grad()

    with loop.optimizer.no_sync():
        loop.backward()
    loop.backward().optimizer.step()
    loop.optimizer.zero_grad()
    for last in (False, True):
        loop.optimizer.set_requires_gradient_sync(last)
        loop.backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    found["accumulated"] = loop.optimizer.metrics()["calls"]["reduce_scatter"] == len(loop.optimizer.layout.buckets)

    loop.optimizer.consolidate_state_dict()
    if loop.rank == 0:
        found["state on rank 0"] = len(loop.optimizer.state_dict()["state"]) == 4
        torch.save(loop.plain.state_dict(), io.BytesIO())
    found["add_param_group"] = raised(lambda: loop.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}))
    found["torch.save(model)"] = raised(lambda: torch.save(loop.plain, io.BytesIO()))

    for entry in loop.optimizer.param_groups:
        entry["lr"] = 5e-3
    loop.backward().optimizer.step()
    found["lr"] = set(loop.optimizer.metrics()["lr"].values()) == {5e-3}

    twice = Loop(group).backward()
    found["two backwards"] = raised(twice.backward)

    ours, theirs = distmuon.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    loop = Loop(group)
    ours.scale(loop.loss()).backward()
    ours.step(loop.optimizer)
    ours.update()
    found["our scaler"] = loop.optimizer.metrics()["steps"] == 1 and loop.is_equal_on_all_ranks()
    loop = Loop(group)
    theirs.scale(loop.loss()).backward()
    found["torch's scaler"] = raised(lambda: theirs.step(loop.optimizer))

    loop = Loop(group)
    before = nn.utils.parameters_to_vector(loop.plain.parameters()).clone()
    (loop.loss() * (float("nan") if loop.rank == 1 else 1.0)).backward()
    loop.optimizer.step()
    after = nn.utils.parameters_to_vector(loop.plain.parameters())
    found["skipped"] = loop.optimizer.metrics()["skipped_steps"] == 1 and torch.equal(before, after)
    return found


def lines_with_ddp(group: dist.ProcessGroup) -> dict[str, Any]:
    """All lines as they were, but for the state and the number of groups."""
    found: dict[str, Any] = {}
    loop = Loop(group, ddp=True)
    with loop.model.no_sync():
        loop.backward()
    loop.backward()
    norm = torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.01)
    clipped = torch.stack([p.grad.norm() for p in loop.plain.parameters() if p.grad is not None]).norm()
    found["torch's clip"] = float(norm) > 0.01 and abs(float(clipped) - 0.01) < 1e-5
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loop.loss()).backward()
    scaler.step(loop.optimizer)
    scaler.update()
    found["torch's scaler"] = loop.optimizer.metrics()["steps"] == 2 and loop.is_equal_on_all_ranks()
    loop.optimizer.zero_grad()
    loop.backward().backward()
    loop.optimizer.step()
    found["two backwards"] = loop.is_equal_on_all_ranks()
    return found


RAISES = {
    "DDP by mistake": "averages the gradients that DistMuon reduces",
    "torch's clip": "clip_grad_norm_",
    "p.grad.norm()": "metrics",
    "add_param_group": "make a new DistMuon with all parameters",
    "torch.save(model)": "pickle",
    "two backwards": "no_sync",
    "torch's scaler": "distmuon.GradScaler",
}


def test_each_line_without_ddp(spawn: Callable[..., list[Any]]) -> None:
    ranks = spawn(lines_without_ddp, 2)
    for found in ranks:
        for line, part in RAISES.items():
            assert re.match(r"\w+: ", found[line]) and part in found[line], (line, found[line])
        held = {line: value for line, value in found.items() if line not in RAISES}
        assert all(value is True for value in held.values()), held
    assert ranks[0]["state on rank 0"]


def test_each_line_with_ddp(spawn: Callable[..., list[Any]]) -> None:
    for found in spawn(lines_with_ddp, 2):
        assert all(value is True for value in found.values()), found


def test_the_page_says_of_each_line_whether_it_raises() -> None:
    (table,) = re.findall(r"^## Your loop$.*?(^\| your line .*?)^$", PAGE, re.MULTILINE | re.DOTALL)
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    refused = {row[0] for row in rows if row[3].startswith(("raises", "drop it"))}
    assert len(refused) == len(RAISES) - 2 and len(rows) >= 15  # the two others are refused with DDP, too
