"""Hugging Face accelerate: `prepare` replaces `accelerator.prepare`.

    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    model, optimizer, loader = distmuon.integrations.accelerate.prepare(accelerator, model, optimizer, loader)

A model that a DistMuon trains is not wrapped in DDP, so its gradients are averaged once, and no second set of gradient
buckets is held. Models of other optimizers, and of a DistMuon with grad_reduction="external", are wrapped as usual.
The accelerator's `accumulate`, `no_sync`, `clip_grad_norm_`, `save_state`, `load_state` and
`optimizer_step_was_skipped` keep working; each call goes to the optimizer that manages the parameters. With "fp16" a
`distmuon.GradScaler` with the same settings replaces the accelerator's scaler.

This module decides which accelerator methods are replaced; it knows no step.

[Note: FSDP2] Under accelerate's FSDP2 plugin `accelerator.prepare` cuts the model, and writes the new parameters into
the param groups of the optimizers that it gets. A DistMuon has a layout and a group as well. So it is constructed again
from the cut model, as the same object: schedulers, step hooks and variables keep their optimizer. In the meantime
accelerate gets a plain optimizer of the same groups, and the DistMuon holds no parameter: what anything holds is not
freed when it has been cut, and the whole model would stay on each device. Gradients then stay in `param.grad`, so
accumulation, clipping and saving are accelerate's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from distmuon.checks import check_one_group, unwrap
from distmuon.errors import problem
from distmuon.integrations import (
    averaged_model,
    averaging_managers_of,
    is_cut,
    need,
    params_of,
    reduced_by,
    reducing_managers_of,
)
from distmuon.integrations.grad_scaler import GradScaler
from distmuon.layout.routing import ParamSpec, Route
from distmuon.optimizer import DistMuon

accelerate: Any = need("accelerate", "accelerate")

PREPARE = "distmuon.integrations.accelerate.prepare"


def prepare(accelerator: Any, *objects: Any, device_placement: list[bool] | None = None) -> Any:
    """Call `accelerator.prepare(*objects)` for any number of models, optimizers, loaders and schedulers.

    Returns them in order. Later objects may go through `accelerator.prepare` as well. Raises `ValueError` for FSDP1,
    Megatron, fp8 and, without FSDP2, `sync_each_batch`; and if the model of a DistMuon is neither among `objects` nor
    prepared, or is wrapped in DDP already.
    """
    if accelerator.distributed_type == accelerate.DistributedType.DEEPSPEED:
        return _prepare_deepspeed(accelerator, *objects)
    check(accelerator)
    _check_objects(accelerator, objects)
    route(accelerator)
    return accelerator.prepare(*objects, device_placement=device_placement)


def _check_objects(accelerator: Any, objects: tuple[Any, ...]) -> None:
    """Refuse objects that `accelerator.prepare` would accept and train wrongly."""
    kinds = ", ".join(type(item).__name__ for item in objects) or "nothing"
    optimizers = [item for item in objects if isinstance(item, DistMuon)]
    if not optimizers:
        raise problem(
            PREPARE,
            found=f"no DistMuon in ({kinds})",
            needed="the optimizer and its model are needed",
            cure="pass model and optimizer in one call; objects without a DistMuon go through accelerator.prepare",
        )
    models = [item for item in (*objects, *accelerator._models) if isinstance(item, nn.Module)]
    if any(map(is_cut, optimizers)) and accelerator.distributed_type != accelerate.DistributedType.FSDP:
        raise problem(
            PREPARE,
            found=f"the model of a DistMuon that fully_shard has cut, in ({kinds})",
            needed="accelerate would wrap it in DDP, which averages shards of different rows",
            cure="pass fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2) to the Accelerator, which leaves the "
            "cut as it is",
        )
    held = {id(param) for model in models for param in model.parameters()}
    for optimizer in optimizers:
        if any(id(param) not in held for param in params_of(optimizer)):
            raise problem(
                PREPARE,
                found=f"a DistMuon without its model in ({kinds})",
                needed="the model that it trains is needed, too",
                cure="pass the model, as an nn.Module, in the same call",
            )
    for model in models:
        if isinstance(model, nn.parallel.DistributedDataParallel) and averaging_managers_of(model.parameters()):
            raise problem(
                PREPARE,
                found=f"the model of a DistMuon in DistributedDataParallel, in ({kinds}) or from accelerator.prepare",
                needed="gradients must be reduced once",
                cure='pass the unwrapped model to this function only, or let DDP average: grad_reduction="external"',
            )


def check(accelerator: Any) -> None:
    """Raise `ValueError` for an accelerator under which distmuon would train wrongly."""
    kinds = accelerate.DistributedType
    if accelerator.distributed_type == kinds.FSDP and not accelerator.is_fsdp2:
        raise problem(
            "accelerator",
            found="version 1 of FSDP, whose flat parameters have no matrices",
            needed="plain data parallelism or FSDP2 is needed",
            cure="pass FullyShardedDataParallelPlugin(fsdp_version=2), or fsdp_config={'version': 2} to the Trainer",
        )
    if accelerator.distributed_type not in (kinds.NO, kinds.MULTI_CPU, kinds.MULTI_GPU, kinds.FSDP):
        raise problem(
            "accelerator",
            found=f"distributed_type {accelerator.distributed_type.value}",
            needed="plain data parallelism or FSDP2 is needed",
            cure="launch with torchrun and without a Megatron plugin",
        )
    if accelerator.mixed_precision not in ("no", "bf16", "fp16"):
        raise problem(
            "accelerator",
            found=f"mixed_precision={accelerator.mixed_precision!r}, which replaces layers of the model",
            needed="the parameters must stay the same objects",
            cure='use mixed_precision="bf16" or "fp16"',
        )
    syncs_each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    if syncs_each and accelerator.distributed_type != kinds.FSDP:
        raise problem(
            "accelerator",
            found="sync_each_batch=True, a reduction for every micro-batch",
            needed="gradients must be reduced once a step",
            cure="leave it out: distmuon's buckets take no more memory with accumulation",
        )


def route(accelerator: Any) -> None:
    """Replace methods of this accelerator by methods that call the DistMuon that manages the parameters. Idempotent.

    See [Note: call targets].
    """
    check(accelerator)
    if accelerator.distributed_type == accelerate.DistributedType.FSDP:
        if not isinstance(getattr(accelerator.prepare, "__self__", None), _Cutting):
            accelerator.prepare = _Cutting(accelerator).prepare
        return
    if accelerator.scaler is not None and not isinstance(accelerator.scaler, _Scaler):
        replaced, accelerator.scaler = accelerator.scaler, _Scaler.in_place_of(accelerator.scaler, accelerator.device)
        for prepared in accelerator._optimizers:  # optimizers that were prepared earlier share the loss scale
            if getattr(prepared, "scaler", None) is replaced:
                prepared.scaler = accelerator.scaler
    if isinstance(getattr(accelerator.clip_grad_norm_, "__self__", None), _Routed):
        return
    routed = _Routed(accelerator)
    accelerator.prepare_model = routed.prepare_model
    accelerator.no_sync = routed.no_sync
    accelerator.clip_grad_norm_ = routed.clip_grad_norm_
    accelerator.clip_grad_value_ = routed.clip_grad_value_
    accelerator.join_uneven_inputs = routed.join_uneven_inputs


class _Routed:
    """Replacements for methods of an accelerator."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = weakref.proxy(accelerator)
        self._class = type(accelerator)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        """Prepare `model`, without DDP if DistMuon averages its gradients."""
        is_averaged = averaged_model(model)
        prepared = self._class.prepare_model(
            self._accelerator, model, device_placement=device_placement, evaluation_mode=evaluation_mode or is_averaged
        )
        if is_averaged:
            _give_no_sync(prepared)
        return prepared

    def no_sync(self, model: nn.Module | None = None) -> AbstractContextManager[Any]:
        """Skip the reduction for `model`; None: for all models that the accelerator has prepared."""
        models = self._accelerator._models if model is None else [model]
        stack = ExitStack()
        for item in models:
            contexts = [optimizer.no_sync() for optimizer in averaging_managers_of(item.parameters())]
            for context in contexts or [self._class.no_sync(self._accelerator, item)]:
                stack.enter_context(context)
        return stack

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        params = _listed(parameters)
        optimizer = reduced_by("accelerator.clip_grad_norm_", params)
        if optimizer is not None:
            self._accelerator.unscale_gradients(optimizer)
            return optimizer.clip_grad_norm_(max_norm, norm_type)
        self._unscale(params)
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type=norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        params = _listed(parameters)
        if reducing_managers_of(params):
            raise problem(
                "clip_grad_value_",
                found=f"clip_value={clip_value}",
                needed="gradients are reduced in shards, and only their norm is known",
                cure="use accelerator.clip_grad_norm_",
            )
        self._unscale(params)
        torch.nn.utils.clip_grad_value_(params, clip_value)

    def join_uneven_inputs(self, joinables: list[Any], even_batches: bool | None = None) -> Any:
        for item in joinables:
            if isinstance(item, DistMuon) or (isinstance(item, nn.Module) and averaged_model(item)):
                raise problem(
                    "join_uneven_inputs",
                    found="a model that DistMuon reduces",
                    needed="every rank must run every backward of a step",
                    cure="leave it out: Accelerator(even_batches=True), the default, evens the batches",
                )
        return self._class.join_uneven_inputs(self._accelerator, joinables, even_batches)

    def _unscale(self, params: list[Tensor]) -> None:
        """Undo the loss scale only for optimizers that hold `params`: the others may be in the middle of a step."""
        wanted = {id(param) for param in params}
        for prepared in self._accelerator._optimizers:
            if any(id(param) in wanted for group in prepared.param_groups for param in group["params"]):
                self._accelerator.unscale_gradients(prepared)


class _Cutting:
    """Replacement for the method of an accelerator that cuts models by FSDP2; see [Note: FSDP2]."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = weakref.proxy(accelerator)
        self._class = type(accelerator)

    def prepare(self, *objects: Any, device_placement: list[bool] | None = None) -> Any:
        """Prepare `objects`, a DistMuon among them from the parameters that the model has afterwards."""
        optimizers = {index: item for index, item in enumerate(objects) if isinstance(item, torch.optim.Optimizer)}
        inner = {index: getattr(item, "optimizer", item) for index, item in optimizers.items()}  # if it is prepared
        found = {index: each for index, each in inner.items() if isinstance(each, DistMuon)}
        models = [item for item in objects if isinstance(item, nn.Module)]
        if not found or not models:
            return self._class.prepare(self._accelerator, *objects, device_placement=device_placement)
        for optimizer in found.values():
            _check_whole(models[0], optimizer)
        schedulers = {index: item for index, item in enumerate(objects) if isinstance(item, LRScheduler)}
        stand_ins = {index: _stand_in(optimizer) for index, optimizer in found.items()}
        uncut = {index: _Recipe.of(optimizer) for index, optimizer in found.items() if not is_cut(optimizer)}
        given = {index: item for index, item in enumerate(objects) if index not in schedulers} | stand_ins
        prepared = dict(zip(given, self._class.prepare(self._accelerator, *given.values())))
        model = next(item for item in prepared.values() if isinstance(item, nn.Module))
        for index, optimizer in found.items():
            self._accelerator._optimizers.remove(prepared[index])
            if index in uncut:
                uncut[index].make(optimizer, model, stand_ins[index])
            prepared[index] = self._accelerator.prepare_optimizer(objects[index])
        for index, scheduler in schedulers.items():  # they look for their prepared optimizer
            prepared[index] = self._accelerator.prepare_scheduler(scheduler)
        for index in (*found, *schedulers):
            prepared[index]._is_accelerate_prepared = True  # as accelerate marks what its `prepare` returns
        return tuple(prepared[index] for index in range(len(objects)))


def _check_whole(model: nn.Module, optimizer: DistMuon) -> None:
    """Raise unless `optimizer` trains all trainable parameters of `model`."""
    params = [param for param in model.parameters() if param.requires_grad]
    trained = {id(param) for param in params_of(optimizer)}
    num_foreign = sum(id(param) not in trained for param in params)
    if num_foreign:
        raise problem(
            type(model).__name__,
            found=f"{num_foreign} of {len(params)} trainable parameters are not DistMuon's",
            needed="DistMuon is made again from the model that FSDP2 has cut",
            cure="give DistMuon the whole model (routes decide on AdamW), or freeze the rest",
        )


def _stand_in(optimizer: DistMuon) -> torch.optim.Optimizer:
    """An optimizer with the groups of `optimizer`, into which accelerate writes the cut parameters."""
    return torch.optim.SGD([{"params": list(group["params"])} for group in optimizer.param_groups], lr=0.0)


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What makes a DistMuon again, of other parameters in the same groups; it holds no parameter."""

    specs: list[list[ParamSpec]]  # by param group
    entries: list[dict[str, Any]]  # of each param group, as schedulers have left them
    defaults: dict[str, Any]
    hooks: dict[str, Any]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, optimizer: DistMuon) -> _Recipe:
        """The recipe of `optimizer`, which lets go of its parameters. Raises `ValueError` if it has state."""
        if optimizer.state:
            raise problem(
                "accelerator.prepare",
                found="a DistMuon that has state",
                needed="prepare puts other parameters into the model, and no state would follow them",
                cure="prepare it before the first forward, and load a state afterwards",
            )
        cure = "place experts by DTensors on a mesh of their own, without process_group in their routes"
        check_one_group(optimizer.layout.specs, "accelerator.prepare", cure)
        spec_of = {spec.fqn: spec for spec in optimizer.layout.specs}
        groups = optimizer.param_groups
        exchange_group = optimizer._exchange_group.process_group
        options = optimizer.options
        recipe = cls(
            specs=[[spec_of[fqn] for fqn in group["param_names"]] for group in groups],
            entries=[{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups],
            defaults=optimizer.defaults,
            hooks={
                name: held for name, held in vars(optimizer).items() if name.endswith("_hooks") and name != "_hooks"
            },
            arguments={
                "sharding": options.sharding,
                "precision": options.precision,
                "max_grad_norm": options.max_grad_norm,
                "verify_every": options.verify_every,
                "telemetry_every": options.telemetry_every,
                "process_group": optimizer.group.process_group,
                "exchange_group": exchange_group if optimizer._exchange_group is not optimizer.group else None,
                "model_parallel_group": optimizer.model_parallel_group,
            },
        )
        optimizer.release()
        del optimizer.layout, optimizer._params, optimizer._frozen, optimizer.param_groups
        return recipe

    def make(self, optimizer: DistMuon, model: nn.Module, cut: torch.optim.Optimizer) -> None:
        """Make `optimizer` again, of the parameters of `cut`, which `model` holds."""
        name_of = {id(param): fqn for fqn, param in unwrap(model, "external").named_parameters()}
        routes: list[Route] = []
        entries_of: dict[str, dict[str, Any]] = {}
        for group, specs, entries in zip(cut.param_groups, self.specs, self.entries):
            for param, spec in zip(group["params"], specs):
                fqn = name_of[id(param)]
                routes.append(_route_of(fqn, spec))
                entries_of[fqn] = entries
        DistMuon.__init__(optimizer, model, routes=routes, **self.arguments)
        vars(optimizer).update(self.hooks)
        optimizer.defaults.update(self.defaults)
        for group in optimizer.param_groups:
            group.update(entries_of[group["param_names"][0]])


def _route_of(fqn: str, spec: ParamSpec) -> Route:
    """The route that decides for `fqn` what `spec` says, of which the fqn may differ."""
    if spec.rule == "adamw":
        return Route(escape(fqn), "adamw", options=dict(spec.options), copies=spec.copies)
    first = spec.matrices[0]
    if first.column_split:
        return Route(escape(fqn), "muon", first.column_split, 1, dict(spec.options))
    is_stack = len(spec.shape) == 3 and sum(unit.rows for unit in spec.matrices) == spec.shape[0] * spec.shape[1]
    num_parts = len(spec.matrices) // (spec.shape[0] if is_stack else 1)
    return Route(escape(fqn), "muon", [unit.rows for unit in spec.matrices[:num_parts]], 0, dict(spec.options))


def _listed(parameters: Any) -> list[Tensor]:
    given: Iterable[Tensor] = [parameters] if isinstance(parameters, Tensor) else parameters
    return list(given)


def _give_no_sync(model: Any) -> None:
    """Give `model` the method `no_sync`, which models have if DDP wraps them."""
    model_ref = weakref.ref(model)

    def no_sync() -> AbstractContextManager[None]:
        model = model_ref()
        return _no_sync([] if model is None else averaging_managers_of(model.parameters()))

    model.no_sync = no_sync


@contextmanager
def _no_sync(optimizers: list[DistMuon]) -> Iterator[None]:
    """Accumulate gradients, and refuse steps: with DDP every rank would step alone (accelerate's LocalSGD)."""
    with ExitStack() as stack:
        for optimizer in optimizers:
            stack.enter_context(optimizer.no_sync())
            stack.callback(optimizer.register_step_pre_hook(_no_local_step).remove)
        yield


def _no_local_step(*_: object) -> None:
    raise problem(
        "step",
        found="called within model.no_sync(), as accelerate's LocalSGD does, where every rank would step alone",
        needed="all ranks must step together, since each rank holds a shard of the optimizer's state",
        cure="leave LocalSGD out, and use accelerator.accumulate(model) for fewer reductions",
    )


class _Scaler(GradScaler):
    """Scaler that shows skipped steps to accelerate, which checks whether its patched `step` was called."""

    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        if not isinstance(optimizer, DistMuon) or not self._overflowed(optimizer_state):
            return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
        DistMuon.step(optimizer)  # all ranks skip this step and count it
        return None

    def _overflowed(self, optimizer_state: dict[str, Any]) -> bool:
        """Whether gradients overflowed; waits for the device, as torch's scaler does."""
        return any(bool(flag) for flag in optimizer_state["found_inf_per_device"].values())


def _prepare_deepspeed(accelerator: Any, *objects: Any) -> Any:
    """Prepare under accelerate's DeepSpeed plugin: accelerate makes the engine, and our DeepSpeed module manages it."""
    from distmuon.integrations import deepspeed

    deepspeed.register()
    return accelerator.prepare(*objects)
