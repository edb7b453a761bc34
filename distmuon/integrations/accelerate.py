"""Hugging Face accelerate: `prepare` in the place of `accelerator.prepare`.

    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    model, optimizer, loader = distmuon.integrations.accelerate.prepare(accelerator, model, optimizer, loader)

The model is not wrapped in DDP: nothing else averages, no second set of gradient buckets is held. `accumulate`,
`no_sync`, `clip_grad_norm_`, `save_state`, `load_state`, `optimizer_step_was_skipped` stay the accelerator's own words.
With "fp16" a `distmuon.GradScaler` of the same settings stands in the place of the accelerator's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.errors import problem
from distmuon.grad_scaler import GradScaler
from distmuon.integrations import need
from distmuon.optimizer import DistMuon

accelerate: Any = need("accelerate", "accelerate")


def prepare(accelerator: Any, model: nn.Module, optimizer: DistMuon, *others: Any) -> tuple[Any, ...]:
    """(model, optimizer, *others) as `accelerator.prepare` returns them; `others`: loaders and schedulers.

    Raises `ValueError` for FSDP, Megatron, tensor parallelism, fp8, and `sync_each_batch`.
    """
    if accelerator.distributed_type == accelerate.DistributedType.DEEPSPEED:
        return _prepare_deepspeed(accelerator, model, optimizer, *others)
    route(accelerator, optimizer)
    prepared: tuple[Any, ...] = accelerator.prepare(model, optimizer, *others)
    return prepared


def check(accelerator: Any) -> None:
    """Raise `ValueError` for an accelerator under which distmuon would train wrongly."""
    kinds = accelerate.DistributedType
    if accelerator.distributed_type not in (kinds.NO, kinds.MULTI_CPU, kinds.MULTI_GPU):
        raise problem(
            "accelerator", f"distributed_type {accelerator.distributed_type.value}",
            "plain data parallelism is needed: distmuon shards the optimizer itself",
            "launch with torchrun and without an FSDP, Megatron or tensor-parallel plugin",
        )  # fmt: skip
    if accelerator.mixed_precision not in ("no", "bf16", "fp16"):
        raise problem(
            "accelerator", f"mixed_precision={accelerator.mixed_precision!r}, which exchanges layers of the model",
            "parameters that stay as they are, are needed", 'use mixed_precision="bf16" or "fp16"',
        )  # fmt: skip
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        raise problem(
            "accelerator", "sync_each_batch=True, a reduction for every micro-batch",
            "one reduction a step is needed", "leave it out: distmuon's buckets take no more memory with accumulation",
        )  # fmt: skip


def route(accelerator: Any, optimizer: DistMuon) -> None:
    """Lead what this accelerator does with gradients to `optimizer`. A second call takes the newer optimizer."""
    check(accelerator)
    if accelerator.scaler is not None:
        accelerator.scaler = _Scaler.in_place_of(accelerator.scaler, accelerator.device)

    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        accelerator.unscale_gradients(optimizer)
        return optimizer.clip_grad_norm_(max_norm, norm_type)

    def clip_grad_value_(*_: Any, **__: Any) -> None:
        raise problem(
            "clip_grad_value_", "asked for", "gradients are in the reduction, where only the norm is known",
            "use accelerator.clip_grad_norm_",
        )  # fmt: skip

    def no_sync(model: nn.Module | None = None) -> Any:
        return optimizer.no_sync()

    own = type(accelerator)
    accelerator.prepare_model = partial(own.prepare_model, accelerator, evaluation_mode=True)  # without DDP
    accelerator.no_sync = no_sync
    accelerator.clip_grad_norm_ = clip_grad_norm_
    accelerator.clip_grad_value_ = clip_grad_value_


class _Scaler(GradScaler):
    """Tells accelerate of a skip, so that schedulers wait: its wrapper looks whether its patched `step` was called."""

    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        if not isinstance(optimizer, DistMuon) or not self._overflowed(optimizer_state):
            return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
        DistMuon.step(optimizer)  # which all ranks skip and count
        return None

    def _overflowed(self, optimizer_state: dict[str, Any]) -> bool:
        """Reads the device, as torch's own scaler does."""
        return any(bool(flag) for flag in optimizer_state["found_inf_per_device"].values())


def _prepare_deepspeed(accelerator: Any, model: nn.Module, optimizer: DistMuon, *others: Any) -> tuple[Any, ...]:
    """Under accelerate's DeepSpeed plugin the engine is accelerate's, and led by the DeepSpeed integration."""
    from distmuon.integrations import deepspeed

    deepspeed.register()
    prepared: tuple[Any, ...] = accelerator.prepare(model, optimizer, *others)
    return prepared
