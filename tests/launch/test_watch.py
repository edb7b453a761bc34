"""What the recipe records of forwards: those of measured steps, and of nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import distmuon
from distmuon.integrations.activations import AttentionLogits, OutputRms
from launch.ranks import Ranks
from launch.watch import Watch


def _model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50))


def test_a_record_has_the_forwards_of_its_own_step() -> None:
    """A measured step that was skipped once left its forwards to the next record."""
    model = _model()
    optimizer = distmuon.DistMuon(model, lr=0.01, telemetry_every=2)
    watch = Watch(model, 2, compiled=False)
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    query = model.model.layers[0].self_attn.q_proj.weight
    found = []
    for number in range(1, 5):
        tokens = torch.randint(50, (2, 8))
        alone = AttentionLogits(model, watching=number == 4), OutputRms(model, watching=number == 4)
        skipped = number == 2
        with torch.no_grad():
            query.mul_(1000.0 if skipped else 1.0)
        watch.begin(number)
        loss = model(input_ids=tokens, labels=tokens).loss
        (loss * (float("nan") if skipped else 1.0)).backward()
        with torch.no_grad():
            query.div_(1000.0 if skipped else 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(watch.record(optimizer, ranks))
    assert found[:3] == [None, None, None]
    assert list(found[3]) == ["parameters", "output_rms", "attention_logits"]
    assert found[3]["attention_logits"] == pytest.approx(alone[0].read())
    assert found[3]["output_rms"] == pytest.approx(alone[1].read())


def test_a_compiled_model_is_left_alone() -> None:
    model = _model()
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    Watch(model, 2, compiled=True)
    Watch(model, 0, compiled=False)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == before
