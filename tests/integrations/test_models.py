"""What people put around a model: LoRA adapters, frozen backbones, torch.compile, gradient checkpointing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distmuon
from tests.training import digest, weights


class Blocks(nn.Module):
    """Two blocks and a head; `recompute` drops the blocks' activations."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)) for _ in range(2))
        self.head = nn.Linear(12, 5)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return self.head(x)


def _steps(model: nn.Module, called: nn.Module, group: Any, lengths: list[int], **options: Any) -> dict[str, Tensor]:
    """One step for each length, two micro-batches each; `called` is what runs, `model` what is trained."""
    optimizer = distmuon.DistMuon(model, lr=0.02, ns_dtype=torch.float32, process_group=group, **options)
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    for step, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * step + rank)
        for micro in range(2):
            x = torch.randn(length, 12, generator=generator)
            if micro:
                called(x).square().mean().backward()
            else:
                with optimizer.no_sync():
                    called(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model, optimizer)


def _recomputed(group: dist.ProcessGroup) -> tuple[str, str]:
    plain, recomputed = Blocks(), Blocks(recompute=True)
    lengths = [7, 7, 7]
    return digest(_steps(plain, plain, group, lengths)), digest(_steps(recomputed, recomputed, group, lengths))


def test_gradient_checkpointing_changes_no_bit(spawn) -> None:
    """The second forward, inside backward, meets parameters that have arrived and hooks that have run."""
    for plain, recomputed in spawn(_recomputed, 2):
        assert plain == recomputed


def _compiled(group: dist.ProcessGroup, num_shapes: int) -> tuple[float, int, bool]:
    """(largest relative difference to eager, compilations, whether a global setting changed)."""
    import torch._dynamo as dynamo
    import torch._dynamo.testing

    dynamo.reset()
    # dynamo looks at .grad of what a broken graph hands on; the pool makes errors of warnings
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    before = {name: getattr(dynamo.config, name) for name in ("recompile_limit", "assume_static_by_default")}
    lengths = [3 + step for step in range(num_shapes)]
    eager = Blocks()
    wanted = _steps(eager, eager, group, lengths)
    model = Blocks()
    counter = dynamo.testing.CompileCounter()  # counts graphs, runs them eagerly: no C++ compiler is needed
    got = _steps(model, torch.compile(model, backend=counter), group, lengths)
    worst = max(float((got[fqn] - wanted[fqn]).norm() / wanted[fqn].norm()) for fqn in wanted)
    same = before == {name: getattr(dynamo.config, name) for name in before}
    return worst, counter.frame_count, same


def test_thirty_shapes_of_a_compiled_model_compile_a_few_graphs(spawn) -> None:
    """Each module that waits breaks the graph; shapes are static at first, dynamic from the second on."""
    for worst, graphs, settings_kept in spawn(_compiled, 2, timeout=240.0, num_shapes=30):
        assert worst <= 1e-6 and settings_kept
        assert 1 < graphs <= 12, f"{graphs} graphs for 30 shapes"


def _frozen(group: dist.ProcessGroup) -> tuple[bool, bool, int]:
    model = Blocks()
    model.first.requires_grad_(False)
    start = {fqn: param.detach().clone() for fqn, param in model.named_parameters()}
    optimizer = distmuon.DistMuon(model, lr=0.02, process_group=group)
    held = sum(len(g["params"]) for g in optimizer.param_groups)
    ends = _steps(model, model, group, [7, 7])
    frozen = all(torch.equal(ends[f], start[f]) for f in start if f.startswith("first"))
    moved = all(not torch.equal(ends[f], start[f]) for f in start if not f.startswith("first"))
    return frozen, moved, held


def test_a_frozen_backbone_holds_still_and_holds_no_state(spawn) -> None:
    for frozen, moved, held in spawn(_frozen, 2):
        assert frozen and moved and held == 6


def test_lora_adapters_go_to_adamw_and_only_they_move() -> None:
    peft = pytest.importorskip("peft", reason="pip install distmuon[peft]")
    config = peft.LoraConfig(r=2, target_modules=["first.0", "second.0"])
    wrapped = peft.get_peft_model(Blocks(), config)
    with pytest.raises(ValueError, match='routes="adamw"'):  # no Muon at all is never silent
        distmuon.DistMuon(wrapped)
    wrapped = peft.get_peft_model(Blocks(), config)
    start = {fqn: param.detach().clone() for fqn, param in wrapped.named_parameters()}
    ends = _steps(wrapped, wrapped, None, [7, 7], routes="adamw")
    moved = {fqn for fqn in start if not torch.equal(start[fqn], ends[fqn])}
    assert moved == {fqn for fqn in start if "lora_" in fqn}

    explicit = peft.get_peft_model(Blocks(), config)
    optimizer = distmuon.DistMuon(explicit, routes=[distmuon.Route("*lora_A*", "muon")])
    rules = {fqn: g["rule"] for g in optimizer.param_groups for fqn in g["param_names"]}
    assert {rule for fqn, rule in rules.items() if "lora_A" in fqn} == {"muon"}
    assert {rule for fqn, rule in rules.items() if "lora_B" in fqn} == {"adamw"}
