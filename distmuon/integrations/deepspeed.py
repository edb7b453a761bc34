"""DeepSpeed: the engine trains; distmuon reduces, clips and shards. It runs at ZeRO stage 0, since distmuon is ZeRO-1.

    distmuon.integrations.deepspeed.register()         # then in any launch: {"optimizer": {"type": "DistMuon", ...}}
    engine, optimizer, _, scheduler = distmuon.integrations.deepspeed.initialize(model=model, config=config)

`initialize` is `register` followed by `deepspeed.initialize`. Stage >= 1, fp16 and pipelines are refused.

[Note: the seams] This module depends on these parts of DeepSpeed. `register` replaces the private method
`_configure_optimizer`, so that the optimizer is made from the engine's module after it has been cast and moved, and is
not wrapped. The engine calls `optimizer.get_grads_for_reduction` at the last micro-batch; the answer tells it to
average nothing. accelerate calls `optimizer.set_gradient_accumulation_boundary` before a backward to say whether it is
the last. The engine reads `_global_grad_norm` and `overflow` after the step. The module is written for 0.19.8:
`register` raises under other versions and if a seam is missing, and every engine is checked again after it has
configured its optimizer.

[Note: bf16] At stage 0 the engine's bf16 setting does two things: it casts the parameters (buffers stay float32), and
it wraps the optimizer in an optimizer with its own masters and another order of clipping and reduction. The cast is
done before the optimizer is configured. The flag is off while it is configured, so that it is not wrapped and distmuon
keeps the masters. Then the flag is on again, because scripts cast their inputs by `engine.bfloat16_enabled()`. Its
later uses in the engine have no effect here: it clears gradients by `optimizer.zero_grad`, and passes
`load_optimizer_states` when it loads.
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distmuon.errors import problem
from distmuon.integrations import TESTED, need
from distmuon.optimizer import DistMuon
from distmuon.options import Precision, Route, Sharding

deepspeed: Any = need("deepspeed", "deepspeed")

NAME = "DistMuon"
_METHOD = "_configure_optimizer"
_RENAMED = {"betas": "adamw_betas", "eps": "adamw_eps"}  # as transformers fills them in
_KEEPS_RATIO = {  # schedulers that scale each group's lr; DeepSpeed's other schedulers set one lr for all groups
    None,
    "WarmupCosineLR",
    "ConstantLR",
    "ExponentialLR",
    "LinearLR",
    "MultiStepLR",
    "PolynomialLR",
    "StepLR",
}


def register() -> None:
    """Make ``{"optimizer": {"type": "DistMuon", "params": {...}}}`` known to DeepSpeed. Idempotent.

    `params` holds the arguments of `DistMuon`; sharding, precision and the routes are objects with the fields of
    `Sharding`, `Precision` and `Route`, and dtypes are names: ``{"precision": {"momentum": "bfloat16"}}``.
    A `DistMuon` passed to `deepspeed.initialize` as optimizer= is then checked and managed in the same way.
    """
    engine_class = deepspeed.DeepSpeedEngine
    original: Any = getattr(engine_class, _METHOD, None)
    if getattr(original, "knows_distmuon", False):
        return
    version = (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__)
    _, lowest, below = TESTED["deepspeed"]
    takes = [] if original is None else list(inspect.signature(original).parameters)
    if not lowest <= version < below or takes != ["self", "client_optimizer", "model_parameters"]:
        raise problem(
            "deepspeed",
            found=f"version {deepspeed.__version__}, {_METHOD}({', '.join(takes)})",
            needed="the engine's seams of 0.19.8 are needed",
            cure='pip install "deepspeed>=0.19.8,<0.20"',
        )

    def configure(engine: Any, client_optimizer: Any, model_parameters: Any) -> None:
        optimizer = client_optimizer
        if optimizer is None and engine.optimizer_name() == NAME:
            optimizer = _from_json(engine, model_parameters)
        if not isinstance(optimizer, DistMuon):
            original(engine, client_optimizer, model_parameters)
            return
        take_over(engine, optimizer)
        bf16, wanted = engine._config.bfloat16_config, engine.bfloat16_enabled()
        try:
            bf16.enabled = False  # see [Note: bf16]
            original(engine, optimizer, model_parameters)
        finally:
            bf16.enabled = wanted
        if engine.optimizer is not optimizer:
            raise problem(
                "DeepSpeed config",
                found=f"{type(engine.optimizer).__name__} around DistMuon",
                needed="DistMuon must not be wrapped: it alone keeps masters and reduces gradients",
                cure="remove the setting that asks for the wrapper from the config",
            )

    torch.optim.DistMuon = DistMuon  # type: ignore[attr-defined]  # DeepSpeed looks names up there
    configure.knows_distmuon = True  # type: ignore[attr-defined]
    setattr(engine_class, _METHOD, configure)


def initialize(
    *, model: nn.Module, config: Mapping[str, Any] | str | Path, optimizer: DistMuon | None = None, **kwargs: Any
) -> tuple[Any, Any, Any, Any]:
    """Call `deepspeed.initialize`; return (engine, optimizer, dataloader, scheduler).

    `config` names DistMuon, or `optimizer` is a DistMuon. Other optimizers and stages are refused before an engine is
    made.
    """
    settings = _loaded_json(config)
    register()
    if optimizer is None and settings.get("optimizer", {}).get("type") != NAME:
        raise problem(
            "initialize",
            found=f"optimizer {settings.get('optimizer', {}).get('type')!r} in the config",
            needed="DistMuon is needed, in the config or as optimizer=",
            cure=f'write "optimizer": {{"type": "{NAME}", "params": {{...}}}}',
        )
    check_stage(int(settings.get("zero_optimization", {}).get("stage", 0)))
    engine, *rest = deepspeed.initialize(model=model, config=settings, optimizer=optimizer, **kwargs)
    return engine, rest[0], rest[1], rest[2]


def take_over(engine: Any, optimizer: DistMuon) -> None:
    """Pass the engine's clipping and accumulation on to `optimizer`; refuse an engine that would train wrongly.

    `register` calls this for each engine, after the model has been cast and before the optimizer could be wrapped.
    """
    _check(engine, optimizer)
    if (max_norm := float(engine.gradient_clipping() or 0.0)) > 0.0:  # DeepSpeed's default is 1.0
        optimizer.options = replace(optimizer.options, max_grad_norm=max_norm)
    engine._config.gradient_clipping = 0.0
    for param in engine.module.parameters():
        if hasattr(param, "use_muon"):  # DeepSpeed's Muon looks for this attribute, and for "muon" in class names
            del param.use_muon
    optimizer.managed_by_integration = True
    engine_ref, optimizer_ref = weakref.ref(engine), weakref.ref(optimizer)

    def before_forward(_module: nn.Module, _args: object) -> None:
        engine, optimizer = engine_ref(), optimizer_ref()
        if engine is not None and optimizer is not None:
            is_last = engine.is_gradient_accumulation_boundary() and not engine.inside_no_sync_ctxt
            optimizer.set_requires_gradient_sync(is_last)

    untraced = torch.compiler.disable(before_forward)
    engine.module.register_forward_pre_hook(untraced, prepend=True)


def check_stage(stage: int) -> None:
    """Refuse DeepSpeed's ZeRO, which would flatten and cut the parameters."""
    if stage >= 1:
        raise problem(
            f"zero_optimization.stage {stage}",
            found="DeepSpeed would cut the parameters into flat 1-D partitions",
            needed="whole matrices are needed; distmuon shards optimizer state itself, as stage 1 does",
            cure='set "zero_optimization": {"stage": 0}',
        )


def _check(engine: Any, optimizer: DistMuon) -> None:
    check_stage(int(engine.zero_optimization_stage()))
    lrs = {float(group["lr"]) for group in optimizer.param_groups}
    given = engine.scheduler_params() or {}
    has_lists = any(isinstance(value, list) for value in given.values())
    one_lr_for_all = engine.scheduler_name() not in _KEEPS_RATIO and not has_lists
    clip = float(engine.gradient_clipping() or 0.0)
    max_grad_norm = optimizer.options.max_grad_norm
    ranks = engine.dp_world_size if engine.sequence_parallel_size == 1 else 0
    if engine.pipeline_parallelism:
        found, cure = "a PipelineModule, whose engine reduces gradients itself", "use the plain engine"
    elif engine.fp16_enabled() or engine.torch_autocast_z0_gradscaler is not None:
        found = "fp16, which scales the loss"
        cure = 'use bfloat16 ("bf16": {"enabled": true}), or distmuon.GradScaler in your own loop'
    elif engine.has_moe_layers:
        found, cure = "deepspeed.moe layers, reduced over separate groups", "use expert stacks in a plain model"
    elif ranks != optimizer.group.dp_size:
        found = f"an engine that averages over other ranks than the {optimizer.group.dp_size} of the optimizer's group"
        cure = "remove tensor and sequence parallelism (mpu), or pass the engine's group to DistMuon as process_group="
    elif not engine.gradient_average:
        found, cure = 'gradient_allreduce_op "sum"', 'use "mean", and a larger loss if you need one'
    elif engine._config.grad_accum_dtype not in (None, "fp32"):
        found = f"grad_accum_dtype {engine._config.grad_accum_dtype!r}, for buffers that the engine does not have here"
        cure = 'remove it, or write "precision": {"reduce": ...} in the optimizer\'s params'
    elif max_grad_norm is not None and clip > 0.0 and clip != max_grad_norm:
        found = f"gradient_clipping {clip} (1.0 if not given) and the optimizer's max_grad_norm {max_grad_norm}"
        cure = 'set only "gradient_clipping"'
    elif one_lr_for_all and len(lrs) > 1:
        found = f"scheduler {engine.scheduler_name()}, which sets one lr for groups of lr {sorted(lrs)}"
        cure = "write its lrs as lists with an entry for each group, or pass a torch scheduler as lr_scheduler="
    else:
        return
    raise problem(
        "DeepSpeed config",
        found=found,
        needed="one reduction, one set of masters and the learning rate of each group are kept",
        cure=cure,
    )


def _from_json(engine: Any, model_parameters: Any) -> DistMuon:
    """Make the optimizer that the config describes, for all trainable parameters of the engine's module."""
    entries = [entry if isinstance(entry, dict) else {"params": [entry]} for entry in model_parameters]
    keys = sorted({key for entry in entries for key in entry if key != "params"})
    if keys:
        raise problem(
            "model_parameters",
            found=f"groups with their own {', '.join(keys)}",
            needed="distmuon makes the groups by its routes",
            cure='write them as routes: {"pattern": "*norm*", "rule": "adamw", "options": {"weight_decay": 0.0}}',
        )
    given = {id(param) for entry in entries for param in entry["params"]}
    trained = {id(param) for param in engine.module.parameters() if param.requires_grad}
    if given and not trained <= given:
        raise problem(
            "model_parameters",
            found=f"{len(given)} of the model's {len(trained)} trainable parameters",
            needed="distmuon routes the whole model",
            cure="leave model_parameters out and freeze the parameters that must not be trained",
        )
    return DistMuon(engine.module, **_options(engine.optimizer_params() or {}))


def _options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Convert JSON to arguments of `DistMuon`."""
    options = {_RENAMED.get(key, key): value for key, value in params.items()}
    for key, kind in (("sharding", Sharding), ("precision", Precision)):
        if isinstance(options.get(key), Mapping):
            options[key] = _policy(key, kind, options[key])
    for key in ("adamw_betas", "ns_coefficients"):
        if isinstance(options.get(key), list):
            options[key] = tuple(options[key])
    if isinstance(options.get("routes"), list):
        options["routes"] = [Route(**entry) for entry in options["routes"]]
    return options


def _policy(name: str, kind: type[Sharding] | type[Precision], entries: Mapping[str, Any]) -> Sharding | Precision:
    """Make the policy with the fields of the JSON; the class itself checks the values."""
    known = [field.name for field in fields(kind)]
    if unknown := [key for key in entries if key not in known]:
        found = f"{kind.__name__} has no such field"
        raise problem(
            f"{name}.{unknown[0]}", found=found, needed=f"one of {', '.join(known)} is needed", cure="correct the name"
        )
    return kind(**entries)


def _loaded_json(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return deepcopy(dict(config))
    loaded: dict[str, Any] = json.loads(Path(config).read_text())
    return loaded
