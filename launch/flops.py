"""How many FLOPs a token takes in training, and what share of the GPUs' peak that is: the `mfu` of the records.

Model FLOPs utilization: 3 times the forward's matrix products (backward has twice as many), with whole attention
matrices and without the recomputation of activations, by the GPU's dense 16-bit peak. torch counts them on tensors
without data. Decides nothing.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from distmuon.planning.step_time import HARDWARE
from launch.config import ModelConfig
from launch.models import build_model
from launch.ranks import Ranks

SLOWER = {"pcie", "nvl"}
"""Words in the names of cards whose peak is not that of the module in `HARDWARE`."""


def mfu_of_a_token_per_s(config: ModelConfig, vocab_size: int | None, ranks: Ranks) -> float | None:
    """The utilization of the run's GPUs at one token a second; None where there are none or their peak is not known.

    Only bfloat16 models have one: in float32 the peak depends on settings.
    """
    if ranks.device.type != "cuda" or config.dtype != "bfloat16":
        return None
    peak = peak_flops(torch.cuda.get_device_name(ranks.device))
    if peak is None:
        return None
    return training_flops_per_token(config, vocab_size) / (peak * ranks.world_size)


def peak_flops(gpu: str) -> float | None:
    """Dense 16-bit FLOPs a second of a GPU by the name that CUDA gives it, None if the planner does not know it."""
    words = set(re.split(r"[^a-z0-9]+", gpu.lower()))
    found = [row.flops for name, row in HARDWARE.items() if name != "cpu" and name in words]
    return found[0] if found and not words & SLOWER else None


def training_flops_per_token(config: ModelConfig, vocab_size: int | None) -> float:
    """FLOPs of forward and backward for one token of a sequence of `seq_len`; in a mixture, of the experts in use."""
    with FakeTensorMode(), torch.no_grad():
        plain = replace(config, dtype="bfloat16", compile=False, gradient_checkpointing=False)
        model = build_model(plain, vocab_size).eval()
        model.set_attn_implementation("eager")  # type: ignore[operator]  # the products that the fused kernels contain
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped}) as counter:
            model(input_ids=torch.zeros(1, config.seq_len, dtype=torch.int64))
    total: int = counter.get_total_flops()
    return 3 * total / config.seq_len


def _grouped(rows: tuple[int, int], experts: tuple[int, int, int], *_: Any, **__: Any) -> int:
    """FLOPs of the experts' product: each row, a token of one of its experts, passes one (in, out) matrix."""
    return 2 * rows[0] * experts[1] * experts[2]
