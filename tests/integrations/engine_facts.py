"""Facts about DeepSpeed's real engines: what is refused, and what they report of a step. `engines.py` runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DDP_BFLOAT16
from torch import nn

import distmuon
from distmuon.integrations import deepspeed as integration

ROOT = Path(__file__).parents[2]
UNLED = integration.deepspeed.DeepSpeedEngine._configure_optimizer


def config(**changes: Any) -> dict[str, Any]:
    """A config file's content; None takes an entry out."""
    base = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "DistMuon", "params": {"lr": 0.02, "adamw_lr": 0.001}},
        **changes,
    }
    return {key: value for key, value in base.items() if value is not None}


def start(model: nn.Module, settings: dict[str, Any], **kwargs: Any) -> Any:
    """The engine, as any launch makes it."""
    return integration.deepspeed.initialize(model=model, config=settings, **kwargs)[0]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def stages() -> nn.Module:
    from deepspeed.pipe import PipelineModule

    return PipelineModule(
        layers=[nn.Linear(6, 8), nn.Linear(8, 4)], num_stages=dist.get_world_size(), loss_fn=nn.MSELoss()
    )


def experts() -> nn.Module:
    from deepspeed.moe.layer import MoE

    return nn.Sequential(nn.Linear(6, 8), MoE(8, nn.Linear(8, 8), num_experts=2))


class Shifted:
    """An mpu of a launch that trains each model on two ranks: no data parallelism is left."""

    def __init__(self) -> None:
        self.alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]

    def __getattr__(self, name: str) -> Any:
        rank_or_size = {"_rank": 0, "_world_size": 1}
        if "model_parallel" in name:
            rank_or_size = {"_rank": dist.get_rank(), "_world_size": dist.get_world_size()}
        for ending, value in rank_or_size.items():
            if name.endswith(ending):
                return lambda: value
        if name.startswith("get_") and name.endswith("_group"):
            return lambda: dist.group.WORLD if "model_parallel" in name else self.alone
        raise AttributeError(name)


def schedule(name: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


def wrongly_wrapped() -> None:
    """A DeepSpeed that wraps where 0.19.8 does not."""
    engine_class = integration.deepspeed.DeepSpeedEngine
    wrap = patch.object(
        engine_class, "_configure_fp16_optimizer", lambda _, inner, __: SimpleNamespace(optimizer=inner)
    )
    with patch.object(engine_class, "_do_optimizer_sanity_check", lambda *_: DDP_BFLOAT16), wrap:
        start(small(), config())


def without_register() -> None:
    """The optimizer in an engine that nobody leads: nothing would be clipped."""
    with patch.object(integration.deepspeed.DeepSpeedEngine, "_configure_optimizer", UNLED):
        model = small()
        engine = start(model, config(optimizer=None), optimizer=distmuon.DistMuon(model))
        engine.backward(engine(torch.ones(2, 6)).sum())


def on_a_device_with_fp16(trigger: Callable[[], Any]) -> Any:
    """DeepSpeed refuses the fp16 block by itself on most CPUs; elsewhere the refusal must be ours."""
    from deepspeed.accelerator import get_accelerator

    with patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: True):
        return trigger()


def with_optimizer(settings: dict[str, Any], **of_optimizer: Any) -> None:
    model = small()
    start(model, config(optimizer=None, **settings), optimizer=distmuon.DistMuon(model, **of_optimizer))


def with_groups(*groups: Any) -> None:
    model = small()
    start(model, config(), model_parameters=[*[{"params": [p], **g} for p, g in zip(model.parameters(), groups)]])


REFUSED: dict[str, Callable[[], Any]] = {
    **{
        f"stage {stage}": lambda stage=stage: start(
            small(), config(zero_optimization={"stage": stage}, zero_allow_untested_optimizer=True)
        )
        for stage in (1, 2, 3)
    },
    "stage 1, client": lambda: with_optimizer(
        {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    ),
    "pipeline": lambda: start(stages(), config()),
    "pipeline, bf16": lambda: start(stages(), config(bf16={"enabled": True})),
    "fp16": lambda: on_a_device_with_fp16(lambda: start(small(), config(fp16={"enabled": True}))),
    "fp16, client": lambda: on_a_device_with_fp16(lambda: with_optimizer({"fp16": {"enabled": True}})),
    "autocast fp16": lambda: start(small(), config(torch_autocast={"enabled": True, "dtype": "float16"})),
    "moe": lambda: start(experts(), config()),
    "mpu": lambda: start(small(), config(), mpu=Shifted()),
    "sum": lambda: start(small(), config(gradient_allreduce_op="sum")),
    "two clips": lambda: with_optimizer({}, max_grad_norm=0.5),
    "accumulated in bf16": lambda: start(
        small(), config(bf16={"enabled": True}, data_types={"grad_accum_dtype": "bf16"})
    ),
    "WarmupLR": lambda: start(small(), config(**schedule("WarmupLR", warmup_max_lr=0.1))),
    "WarmupDecayLR": lambda: start(small(), config(**schedule("WarmupDecayLR", total_num_steps=9, warmup_max_lr=0.1))),
    "OneCycle": lambda: start(small(), config(**schedule("OneCycle", cycle_min_lr=0.01, cycle_max_lr=0.1))),
    "LRRangeTest": lambda: start(small(), config(**schedule("LRRangeTest"))),
    "groups of their own": lambda: with_groups({}, {"weight_decay": 0.0}, {}, {}),
    "part of the model": lambda: with_groups({}, {}),
    "wrapped": wrongly_wrapped,
    "not registered": without_register,
}


def refusals() -> dict[str, str]:
    """By case, what was raised: before anything was trained."""
    from deepspeed.utils import groups

    messages = {}
    for name, trigger in REFUSED.items():
        try:
            trigger()
            messages[name] = "nothing was raised"
        except Exception as error:
            messages[name] = f"{type(error).__name__} {error}"
        groups.mpu = None  # DeepSpeed keeps the last launch's
    return messages


def infinity_on_one_rank() -> dict[str, Any]:
    """Rank 1 alone overflows in the second of three steps; a schedule counts the steps that were taken."""
    model = small()
    engine = start(model, config(**schedule("WarmupCosineLR", total_num_steps=9, warmup_num_steps=2)))
    seen: dict[str, Any] = {"norms": [], "skipped": [], "applied": [], "lrs": [], "asked twice": []}
    for step in range(3):
        batch = torch.ones(2, 6) * (float("inf") if step == 1 and dist.get_rank() == 1 else 1.0)
        engine.backward(engine(batch).nansum() * (float("inf") if step == 1 and dist.get_rank() == 1 else 1.0))
        before = [p.detach().clone() for p in model.parameters()]
        engine.step()
        engine.optimizer.synchronize()
        seen["norms"].append(float(engine.get_global_grad_norm()))
        seen["skipped"].append(engine.skipped_steps)
        seen["applied"].append(engine.was_step_applied())
        seen["asked twice"].append(engine.optimizer.overflow)
        seen["lrs"].append([group["lr"] for group in engine.optimizer.param_groups])
        if step == 1:
            seen["untouched"] = all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    return seen


def schedules() -> dict[str, list[list[float]]]:
    """By schedule of the config, both groups' lr after each of four steps."""
    wanted = {
        "WarmupCosineLR": schedule("WarmupCosineLR", total_num_steps=9, warmup_num_steps=2),
        "LinearLR": schedule("LinearLR", start_factor=0.5, total_iters=4),
        "WarmupLR": schedule("WarmupLR", warmup_max_lr=[0.02, 0.001], warmup_num_steps=3),
        "WarmupDecayLR": schedule("WarmupDecayLR", total_num_steps=6, warmup_max_lr=[0.02, 0.001], warmup_num_steps=2),
    }
    lrs = {}
    for name, entry in wanted.items():
        engine = start(small(), config(**entry))
        lrs[name] = []
        for _ in range(4):
            engine.backward(engine(torch.ones(2, 6)).sum())
            engine.step()
            lrs[name].append([float(group["lr"]) for group in engine.optimizer.param_groups])
    return lrs


def own_muon() -> dict[str, Any]:
    """DeepSpeed's Muon trains first and tags the model. Its path at stage 1 would take our class for its own."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    model = small()
    params = {"lr": 0.02, "torch_adam": True}  # its own Adam would be compiled first, for a minute
    theirs = start(model, config(optimizer={"type": "Muon", "params": params}))
    tagged = [name for name, p in model.named_parameters() if getattr(p, "use_muon", False)]
    zero = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    zero.optimizer = distmuon.DistMuon(model)
    takes_ours = zero._is_muon_group([model[0].weight])
    engine = start(model, config())
    left = [name for name, p in model.named_parameters() if hasattr(p, "use_muon")]
    return {
        "theirs": type(theirs.optimizer).__name__,
        "tagged": tagged,
        "takes ours": takes_ours,
        "left": left,
        "ours": type(engine.optimizer).__name__,
    }


def float32_buffers() -> dict[str, str]:
    """The bf16 block casts parameters and leaves buffers, with `register` and with `initialize`."""
    dtypes = {}
    for name, make in {
        "register": start,
        "initialize": lambda m, c: integration.initialize(model=m, config=c)[0],
    }.items():
        model = small()
        model.register_buffer("inv_freq", torch.ones(3))
        engine = make(model, config(bf16={"enabled": True}))
        asked = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
        engine.backward(engine(torch.ones(2, 6, dtype=asked)).sum())  # a script casts its inputs by what it is told
        engine.step()
        kind = type(engine.optimizer).__name__
        dtypes[name] = f"{model[0].weight.dtype} {model.inv_freq.dtype} {engine.bfloat16_enabled()} {kind}"
    return dtypes


def configs() -> dict[str, str]:
    """Each file of configs/deepspeed takes a step: optimizer, dtype of the weights, norm that gradients are cut to."""
    trained = {}
    for file in sorted((ROOT / "configs" / "deepspeed").glob("*.json")):
        model = small()
        settings: dict[str, Any] = json.loads(file.read_text())
        given: dict[str, Any] = {}
        if "optimizer" not in settings:  # the recipe's: batch and clipping come from its own config
            settings.update(train_micro_batch_size_per_gpu=2, gradient_clipping=0.5)
            given["optimizer"] = distmuon.DistMuon(model)
        engine = start(model, settings, **given)
        engine.backward(engine(torch.ones(2, 6, dtype=model[0].weight.dtype)).sum())
        engine.step()
        assert engine.global_steps == 1 and engine.skipped_steps == 0
        optimizer = engine.optimizer
        trained[file.name] = f"{type(optimizer).__name__} {model[0].weight.dtype} {optimizer.options.max_grad_norm}"
    return trained


FACTS = (refusals, infinity_on_one_rank, schedules, own_muon, float32_buffers, configs)
