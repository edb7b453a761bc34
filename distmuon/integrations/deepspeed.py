"""DeepSpeed: the engine trains, distmuon reduces, clips and shards. ZeRO stage 0, because distmuon is the ZeRO-1.

    distmuon.integrations.deepspeed.register()         # then in any launch: {"optimizer": {"type": "DistMuon", ...}}
    engine, optimizer, _, scheduler = distmuon.integrations.deepspeed.initialize(model=model, config=config)

`initialize` is `deepspeed.initialize` that also casts the model for ``bf16``; both refuse stage >= 1, fp16, pipelines.

[Note: the seams] Of DeepSpeed's own code these are used: the private method `_configure_basic_optimizer`, replaced by
`register` so that the optimizer is made from the engine's module; `optimizer.get_grads_for_reduction`, which the engine
asks at the last micro-batch and which tells it to average nothing; `_global_grad_norm` and `overflow`, which it reads
after the step. Written for 0.19; `register` raises where a seam is missing.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distmuon.errors import problem
from distmuon.integrations import need
from distmuon.optimizer import DistMuon
from distmuon.routing import Route

deepspeed: Any = need("deepspeed", "deepspeed")

NAME = "DistMuon"
_SEAM = "_configure_basic_optimizer"
_DTYPES = ("reduce_dtype", "momentum_dtype", "ns_dtype")
_KEEPS_RATIO = {None, "WarmupCosineLR"}  # DeepSpeed's other schedulers write the same lr into every group


def register() -> None:
    """Make ``{"optimizer": {"type": "DistMuon", "params": {...}}}`` known to DeepSpeed. May be called again.

    `params`: the arguments of `DistMuon`; dtypes by name ("float32"), routes as objects with `Route`'s fields.
    """
    engine_class = deepspeed.DeepSpeedEngine
    original = getattr(engine_class, _SEAM, None)
    if original is None or not hasattr(engine_class, "buffered_allreduce_fallback"):
        raise problem(
            "deepspeed", f"version {deepspeed.__version__} without {_SEAM}", "the engine's seams of 0.19 are needed",
            'pip install "deepspeed==0.19.*"',
        )  # fmt: skip
    if getattr(original, "knows_distmuon", False):
        return

    def configure(engine: Any, model_parameters: Any) -> Any:
        if engine.optimizer_name() != NAME:
            return original(engine, model_parameters)
        given = {id(p) for entry in model_parameters for p in (entry["params"] if isinstance(entry, dict) else [entry])}
        trained = {id(p) for p in engine.module.parameters() if p.requires_grad}
        if given and not trained <= given:
            raise problem(
                "model_parameters", f"{len(given)} of the model's {len(trained)} trainable parameters",
                "distmuon routes the whole model", "leave model_parameters out and freeze what shall not be trained",
            )  # fmt: skip
        optimizer = DistMuon(engine.module, **_options(engine.optimizer_params() or {}))
        take_over(engine, optimizer)
        return optimizer

    torch.optim.DistMuon = DistMuon  # type: ignore[attr-defined]  # DeepSpeed looks there whether it knows a name
    configure.knows_distmuon = True  # type: ignore[attr-defined]
    setattr(engine_class, _SEAM, configure)


def initialize(
    *, model: nn.Module, config: Mapping[str, Any] | str | Path, optimizer: DistMuon | None = None, **kwargs: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize(...)`: (engine, optimizer, dataloader, scheduler).

    `config` names DistMuon, or `optimizer` is one. A ``bf16`` block casts the model here and is taken out: masters are
    distmuon's.
    """
    settled = _read(config)
    if settled.pop("bf16", {}).get("enabled", False):
        model = model.to(torch.bfloat16)
    register()
    if optimizer is None and settled.get("optimizer", {}).get("type") != NAME:
        raise problem(
            "initialize", f"optimizer {settled.get('optimizer', {}).get('type')!r} in the config",
            "DistMuon is needed, there or as optimizer=", f'write "optimizer": {{"type": "{NAME}", "params": {{...}}}}',
        )  # fmt: skip
    check_stage(int(settled.get("zero_optimization", {}).get("stage", 0)))
    engine, *rest = deepspeed.initialize(model=model, config=settled, optimizer=optimizer, **kwargs)
    if optimizer is not None:
        take_over(engine, optimizer)
    return engine, rest[0], rest[1], rest[2]


def take_over(engine: Any, optimizer: DistMuon) -> None:
    """Lead the engine's clipping and its accumulation to `optimizer`; refuse an engine that would train wrongly."""
    _check(engine, optimizer)
    if (max_norm := float(engine.gradient_clipping() or 0.0)) > 0.0:  # DeepSpeed's default is 1.0
        object.__setattr__(optimizer.options, "max_grad_norm", max_norm)
    engine._config.gradient_clipping = 0.0
    for param in engine.module.parameters():
        if hasattr(param, "use_muon"):  # DeepSpeed's own Muon looks for the tag, and for "muon" in class names
            del param.use_muon
    engine_ref, optimizer_ref = weakref.ref(engine), weakref.ref(optimizer)

    def before_forward(_module: nn.Module, _args: object) -> None:
        its, ours = engine_ref(), optimizer_ref()
        if its is not None and ours is not None:  # an unmanaged accumulation ends where the engine's step says so
            known = its.managed_gradient_accumulation()
            ours.set_requires_gradient_sync(known and its.is_gradient_accumulation_boundary())

    untraced = torch.compiler.disable(before_forward)  # type: ignore[no-untyped-call]
    engine.module.register_forward_pre_hook(untraced, prepend=True)


def check_stage(stage: int) -> None:
    """Refuse DeepSpeed's ZeRO: it would flatten and cut the parameters under our shards."""
    if stage >= 1:
        raise problem(
            f"zero_optimization.stage {stage}", "DeepSpeed would cut the parameters into flat 1-D partitions",
            "whole matrices are needed; distmuon shards optimizer state itself, as stage 1 does",
            'set "zero_optimization": {"stage": 0}',
        )  # fmt: skip


def _check(engine: Any, optimizer: DistMuon) -> None:
    check_stage(int(engine.zero_optimization_stage()))
    lrs = {float(group["lr"]) for group in optimizer.param_groups}
    given = engine.scheduler_params() or {}
    has_lists = any(isinstance(value, list) for value in given.values())
    one_lr_for_all = engine.scheduler_name() not in _KEEPS_RATIO and not has_lists
    if engine.pipeline_parallelism:
        found, cure = "a PipelineModule, whose engine reduces by itself", "use the plain engine"
    elif engine.bfloat16_enabled():
        found = "bf16.enabled, which wraps the optimizer in masters of its own"
        cure = "call distmuon.integrations.deepspeed.initialize, or cast the model and take the bf16 block out"
    elif engine.fp16_enabled() or engine.torch_autocast_z0_gradscaler is not None:
        found, cure = "fp16, which scales the loss", "use bfloat16"
    elif engine.has_moe_layers:
        found, cure = "deepspeed.moe layers, reduced over groups of their own", "use expert stacks of the plain model"
    elif one_lr_for_all and len(lrs) > 1:
        found = f"scheduler {engine.scheduler_name()}, which gives groups of lr {sorted(lrs)} one and the same"
        cure = "write its lrs as lists, one a group, or pass a torch scheduler as lr_scheduler="
    else:
        return
    raise problem("DeepSpeed config", found, "one reduction, one set of masters and two learning rates are kept", cure)


def _options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `DistMuon` from JSON."""
    options = dict(params)
    for key in _DTYPES:
        if isinstance(options.get(key), str):
            options[key] = getattr(torch, options[key])
    for key in ("adamw_betas", "ns_coefficients"):
        if isinstance(options.get(key), list):
            options[key] = tuple(options[key])
    if isinstance(options.get("routes"), list):
        options["routes"] = [Route(**entry) for entry in options["routes"]]
    return options


def _read(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return deepcopy(dict(config))
    loaded: dict[str, Any] = json.loads(Path(config).read_text())
    return loaded
