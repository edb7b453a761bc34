"""DeepSpeed: the engine trains, distmuon reduces, clips and shards. ZeRO stage 0, because distmuon is the ZeRO-1.

    distmuon.integrations.deepspeed.register()         # then in any launch: {"optimizer": {"type": "DistMuon", ...}}
    engine, optimizer, _, scheduler = distmuon.integrations.deepspeed.initialize(model=model, config=config)

`initialize` is `register` and `deepspeed.initialize`. Stage >= 1, fp16 and pipelines are refused.

[Note: the seams] Of DeepSpeed's own code these are used: the private method `_configure_optimizer`, replaced by
`register` so that the optimizer is made from the engine's module, which has been cast and moved by then, and is not
wrapped; `optimizer.get_grads_for_reduction`, which the engine asks at the last micro-batch and which tells it to
average nothing; `optimizer.set_gradient_accumulation_boundary`, by which accelerate says before a backward whether it
is the last; `_global_grad_norm` and `overflow`, read after the step. Written for 0.19.8; `register` raises under other
versions, or where a seam is missing, and each engine is looked at once more after it has configured its optimizer.

[Note: bf16] The engine's bf16 block does two things at stage 0: it casts the parameters (buffers stay float32) and it
wraps the optimizer in masters of its own, with another order of clipping and reduction. The cast is over when the
optimizer is configured. While it is, the flag is off, so that nothing is wrapped: masters are distmuon's. Afterwards it
is on again, because scripts cast their inputs by `engine.bfloat16_enabled()`. What the engine decides by it later makes
no difference here: it clears gradients by `optimizer.zero_grad`, and passes `load_optimizer_states` when it loads.
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
_SEAM = "_configure_optimizer"
_RENAMED = {"betas": "adamw_betas", "eps": "adamw_eps"}  # as transformers fills them in
_KEEPS_RATIO = {  # DeepSpeed's other schedulers write the same lr into every group
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
    """Make ``{"optimizer": {"type": "DistMuon", "params": {...}}}`` known to DeepSpeed. May be called again.

    `params`: the arguments of `DistMuon`; sharding, precision and each of the routes as an object with the fields of
    `Sharding`, `Precision` and `Route`, dtypes by name: ``{"precision": {"momentum": "bfloat16"}}``.
    A `DistMuon` given to `deepspeed.initialize` as optimizer= is then led, and refused, in the same way.
    """
    engine_class = deepspeed.DeepSpeedEngine
    original: Any = getattr(engine_class, _SEAM, None)
    if getattr(original, "knows_distmuon", False):
        return
    version = (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__)
    _, lowest, below = TESTED["deepspeed"]
    takes = [] if original is None else list(inspect.signature(original).parameters)
    if not lowest <= version < below or takes != ["self", "client_optimizer", "model_parameters"]:
        raise problem(
            "deepspeed",
            found=f"version {deepspeed.__version__}, {_SEAM}({', '.join(takes)})",
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
                needed="the optimizer itself is needed: its masters and its reduction are the only ones",
                cure="take what asks for the wrapper out of the config",
            )

    torch.optim.DistMuon = DistMuon  # type: ignore[attr-defined]  # DeepSpeed looks there whether it knows a name
    configure.knows_distmuon = True  # type: ignore[attr-defined]
    setattr(engine_class, _SEAM, configure)


def initialize(
    *, model: nn.Module, config: Mapping[str, Any] | str | Path, optimizer: DistMuon | None = None, **kwargs: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize(...)`: (engine, optimizer, dataloader, scheduler).

    `config` names DistMuon, or `optimizer` is one. Other optimizers and stages are refused before an engine is made.
    """
    settled = _read(config)
    register()
    if optimizer is None and settled.get("optimizer", {}).get("type") != NAME:
        raise problem(
            "initialize",
            found=f"optimizer {settled.get('optimizer', {}).get('type')!r} in the config",
            needed="DistMuon is needed, there or as optimizer=",
            cure=f'write "optimizer": {{"type": "{NAME}", "params": {{...}}}}',
        )
    check_stage(int(settled.get("zero_optimization", {}).get("stage", 0)))
    engine, *rest = deepspeed.initialize(model=model, config=settled, optimizer=optimizer, **kwargs)
    return engine, rest[0], rest[1], rest[2]


def take_over(engine: Any, optimizer: DistMuon) -> None:
    """Lead the engine's clipping and its accumulation to `optimizer`; refuse an engine that would train wrongly.

    `register` calls it for each engine, when the model has been cast and before the optimizer could be wrapped.
    """
    _check(engine, optimizer)
    if (max_norm := float(engine.gradient_clipping() or 0.0)) > 0.0:  # DeepSpeed's default is 1.0
        optimizer.options = replace(optimizer.options, max_grad_norm=max_norm)
    engine._config.gradient_clipping = 0.0
    for param in engine.module.parameters():
        if hasattr(param, "use_muon"):  # DeepSpeed's own Muon looks for the tag, and for "muon" in class names
            del param.use_muon
    optimizer.engine_is_led = True
    engine_ref, optimizer_ref = weakref.ref(engine), weakref.ref(optimizer)

    def before_forward(_module: nn.Module, _args: object) -> None:
        its, ours = engine_ref(), optimizer_ref()
        if its is not None and ours is not None:  # unmanaged, the boundary is the engine's step, and never known here
            ours.set_requires_gradient_sync(its.is_gradient_accumulation_boundary() and not its.inside_no_sync_ctxt)

    untraced = torch.compiler.disable(before_forward)
    engine.module.register_forward_pre_hook(untraced, prepend=True)


def check_stage(stage: int) -> None:
    """Refuse DeepSpeed's ZeRO: it would flatten and cut the parameters under our shards."""
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
    clip, own_clip = float(engine.gradient_clipping() or 0.0), optimizer.options.max_grad_norm
    ranks = engine.dp_world_size if engine.sequence_parallel_size == 1 else 0
    if engine.pipeline_parallelism:
        found, cure = "a PipelineModule, whose engine reduces by itself", "use the plain engine"
    elif engine.fp16_enabled() or engine.torch_autocast_z0_gradscaler is not None:
        found = "fp16, which scales the loss"
        cure = 'use bfloat16 ("bf16": {"enabled": true}), or distmuon.GradScaler in a loop of your own'
    elif engine.has_moe_layers:
        found, cure = "deepspeed.moe layers, reduced over groups of their own", "use expert stacks of the plain model"
    elif ranks != optimizer.group.dp_size:
        found = f"an engine that averages over other ranks than the {optimizer.group.dp_size} of the optimizer's group"
        cure = "take tensor and sequence parallelism (mpu) out, or give DistMuon the engine's group as process_group="
    elif not engine.gradient_average:
        found, cure = 'gradient_allreduce_op "sum"', 'use "mean", and a larger loss if you need one'
    elif engine._config.grad_accum_dtype not in (None, "fp32"):
        found = f"grad_accum_dtype {engine._config.grad_accum_dtype!r}, for buffers that the engine does not have here"
        cure = 'take it out, or write "precision": {"reduce": ...} in the optimizer\'s params'
    elif own_clip is not None and 0.0 < clip != own_clip:
        found = f"gradient_clipping {clip} (1.0 if not given) beside the optimizer's max_grad_norm {own_clip}"
        cure = 'write "gradient_clipping" alone'
    elif one_lr_for_all and len(lrs) > 1:
        found = f"scheduler {engine.scheduler_name()}, which gives groups of lr {sorted(lrs)} one and the same"
        cure = "write its lrs as lists, one a group, or pass a torch scheduler as lr_scheduler="
    else:
        return
    raise problem(
        "DeepSpeed config",
        found=found,
        needed="one reduction, one set of masters and two learning rates are kept",
        cure=cure,
    )


def _from_json(engine: Any, model_parameters: Any) -> DistMuon:
    """The optimizer that the config describes, for all that the engine's module trains."""
    entries = [entry if isinstance(entry, dict) else {"params": [entry]} for entry in model_parameters]
    if own := sorted({key for entry in entries for key in entry if key != "params"}):
        raise problem(
            "model_parameters",
            found=f"groups with {', '.join(own)} of their own",
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
            cure="leave model_parameters out and freeze what shall not be trained",
        )
    return DistMuon(engine.module, **_options(engine.optimizer_params() or {}))


def _options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `DistMuon` from JSON."""
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
    """The policy with the fields that the JSON gives; the class itself refuses values."""
    known = [field.name for field in fields(kind)]
    if unknown := [key for key in entries if key not in known]:
        found = f"{kind.__name__} has no such field"
        raise problem(
            f"{name}.{unknown[0]}", found=found, needed=f"one of {', '.join(known)} is needed", cure="correct the name"
        )
    return kind(**entries)


def _read(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return deepcopy(dict(config))
    loaded: dict[str, Any] = json.loads(Path(config).read_text())
    return loaded
