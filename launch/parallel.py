"""Where the model of a run lies: cut over a mesh of ranks before its optimizer is made, or left whole.

zero1 leaves the model whole, for DistMuon shards it. fsdp2 and hsdp call torch's `fully_shard` on each transformer
block and on the model around them; tp first gives each rank a part of every large matrix product, by the plan that
transformers has for the architecture. DistMuon reads the placement off the parameters, so nothing else of the recipe
depends on it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import distmuon
from distmuon.errors import names, problem
from launch.config import Config, ParallelConfig
from launch.ranks import Ranks

STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
"""transformers' words for a cut of a linear layer."""


def shard_model(model: nn.Module, config: Config, ranks: Ranks) -> None:
    """Cut `model` in place as `config.parallel` says. Collective, unless it is left whole."""
    parallel = config.parallel
    if parallel.shard == "zero1":
        return
    if ranks.world_size == 1:
        raise problem(
            "parallel.shard",
            found=f"found {parallel.shard} in a single process",
            needed="ranks to shard over are needed",
            cure="start with torchrun --nproc_per_node=2, or leave parallel.shard at zero1",
        )
    shape, axes = parallel.mesh_shape(ranks.world_size), ("replicate", "shard", "tp")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=axes)
    if parallel.tp > 1:
        parallelize_module(model, mesh["tp"], tensor_parallel_plan(model, parallel.tp))
    over = mesh["replicate", "shard"] if parallel.shard == "hsdp" else mesh["shard"]
    policy = MixedPrecisionPolicy(reduce_dtype=config.optimizer.precision.reduce)
    for block in transformer_blocks(model):
        fully_shard(block, mesh=over, mp_policy=policy)
    fully_shard(model, mesh=over, mp_policy=policy)


def check_model(model: nn.Module, parallel: ParallelConfig) -> None:
    """Raise unless `model` can be cut as `parallel` says; any device will do."""
    if parallel.shard != "zero1":
        transformer_blocks(model)
    if parallel.tp > 1:
        tensor_parallel_plan(model, parallel.tp)


def reduce_in_backward(model: nn.Module, optimizer: distmuon.DistMuon, last: bool) -> None:
    """Say whether the next backward is the `last` of its step and reduces gradients; until then they add up."""
    optimizer.set_requires_gradient_sync(last)
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model: the modules that it asks to keep together."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise problem(
            "parallel.shard",
            found=f"found no transformer blocks in {type(model).__name__}",
            needed="transformers must name them (`_no_split_modules`)",
            cure="set parallel.shard zero1, or take another model.arch",
        )
    return blocks


def tensor_parallel_plan(model: Any, tp: int) -> dict[str, ParallelStyle]:
    """The plan of `parallelize_module`: column for q, k, v, gate and up, row for o and down, as transformers says."""
    config, arch = model.config, model.config.model_type
    styles: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    unknown = sorted({style for style in styles.values() if style not in STYLES})
    if not styles or unknown:
        lacks = names(unknown) if unknown else "no entry"
        raise problem(
            "parallel.tp",
            found=f"found {tp} for arch {arch}, whose plan in transformers has {lacks}",
            needed="a plan of column and row cuts alone is needed, as llama has",
            cure="set parallel.tp 1",
        )
    for kind in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, kind, tp) % tp:
            raise problem(
                "parallel.tp",
                found=f"found {tp} for {kind} {getattr(config, kind)}",
                needed="each rank needs whole heads, as many as the others",
                cure=f"change parallel.tp or model.config.{kind}",
            )
    return {f"{model.base_model_prefix}.{name}": STYLES[style]() for name, style in styles.items()}
