"""Hugging Face accelerate: `prepare` replaces `accelerator.prepare`.

    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    model, optimizer, loader = distmuon.integrations.accelerate.prepare(accelerator, model, optimizer, loader)

A model that a DistMuon trains is not wrapped in DDP, so its gradients are averaged once, and no second set of gradient
buckets is held. Models of other optimizers, and of a DistMuon with grad_reduction="external", are wrapped as usual.
The accelerator's `accumulate`, `no_sync`, `clip_grad_norm_`, `save_state`, `load_state` and
`optimizer_step_was_skipped` keep working; each call goes to the optimizer that manages the parameters. With "fp16" a
`distmuon.GradScaler` with the same settings replaces the accelerator's scaler.

This module decides which accelerator methods are replaced; it knows no step and no layout.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.errors import problem
from distmuon.integrations import (
    averaged_model,
    averaging_managers_of,
    need,
    params_of,
    reduced_by,
    reducing_managers_of,
)
from distmuon.integrations.grad_scaler import GradScaler
from distmuon.optimizer import DistMuon

accelerate: Any = need("accelerate", "accelerate")

PREPARE = "distmuon.integrations.accelerate.prepare"


def prepare(accelerator: Any, *objects: Any, device_placement: list[bool] | None = None) -> Any:
    """Call `accelerator.prepare(*objects)` for any number of models, optimizers, loaders and schedulers.

    Returns them in order. Later objects may go through `accelerator.prepare` as well. Raises `ValueError` for FSDP,
    Megatron, tensor parallelism, fp8 and `sync_each_batch`; and if the model of a DistMuon is neither among `objects`
    nor prepared, or is wrapped in DDP already.
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
    if accelerator.distributed_type not in (kinds.NO, kinds.MULTI_CPU, kinds.MULTI_GPU):
        raise problem(
            "accelerator",
            found=f"distributed_type {accelerator.distributed_type.value}",
            needed="plain data parallelism is needed: distmuon shards the optimizer itself",
            cure="launch with torchrun and without an FSDP, Megatron or tensor-parallel plugin",
        )
    if accelerator.mixed_precision not in ("no", "bf16", "fp16"):
        raise problem(
            "accelerator",
            found=f"mixed_precision={accelerator.mixed_precision!r}, which replaces layers of the model",
            needed="the parameters must stay the same objects",
            cure='use mixed_precision="bf16" or "fp16"',
        )
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
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
