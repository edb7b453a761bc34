"""FLOPs of a token against sums by hand, and which GPUs have a known peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from launch.config import ModelConfig
from launch.flops import mfu_of_a_token_per_s, peak_flops, training_flops_per_token
from launch.ranks import Ranks

LLAMA = ModelConfig(
    config={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
    },
    seq_len=16,
)


def test_a_dense_model_takes_6_flops_a_weight_and_its_attention() -> None:
    matrices = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64  # of a layer
    attention = 2 * 16 * 32  # weights and values of 16 positions, over all heads
    wanted = 6 * (2 * (matrices + attention) + 300 * 32)
    assert training_flops_per_token(LLAMA, 256) == wanted
    # what training adds or leaves out of its own accord is no work of the model
    other = replace(LLAMA, compile=True, gradient_checkpointing=True, dtype="bfloat16")
    assert training_flops_per_token(other, 256) == wanted


def test_of_a_mixture_the_experts_in_use_count() -> None:
    config = {**LLAMA.config, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 32 * 8 + 2 * (3 * 32 * 16)
    wanted = 6 * (2 * (layer + 2 * 16 * 32) + 300 * 32)
    mixture = ModelConfig(arch="qwen3_moe", config=config, seq_len=16)
    assert training_flops_per_token(mixture, 256) == wanted


@pytest.mark.parametrize(
    ("gpu", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_only_a_known_peak_counts(gpu: str, flops: float | None) -> None:
    assert peak_flops(gpu) == flops


def test_the_utilization_is_over_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    ranks = Ranks(world_size=4, device=torch.device("cuda"))
    bfloat16 = replace(LLAMA, dtype="bfloat16")
    wanted = training_flops_per_token(LLAMA, 256) / (4 * 989e12)
    assert mfu_of_a_token_per_s(bfloat16, 256, ranks) == wanted
    assert mfu_of_a_token_per_s(LLAMA, 256, ranks) is None  # float32
    assert mfu_of_a_token_per_s(bfloat16, 256, Ranks(device=torch.device("cpu"))) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA T4")
    assert mfu_of_a_token_per_s(bfloat16, 256, ranks) is None
