"""Lightning Fabric: a strategy that lets DistMuon reduce gradients, and `setup`, which replaces `fabric.setup`.

    fabric = Fabric(devices=8, strategy=distmuon.integrations.fabric.DistMuonStrategy(), precision="bf16-mixed")
    model, optimizer = distmuon.integrations.fabric.setup(fabric, model, optimizer)

Models of other optimizers, and of a DistMuon with grad_reduction="external", are wrapped in DDP as usual.
`fabric.backward`, `no_backward_sync`, `clip_gradients(max_norm=...)`, `save` and `load` keep working. With "16-mixed" a
`distmuon.GradScaler` with the same settings replaces the precision plugin's scaler. Fabric's ModelParallelStrategy, for
FSDP2, needs nothing of this module.

This module decides which models Fabric wraps and which optimizer a call means; it knows no step and no layout.

[Note: rounded inputs] Fabric's mixed precisions round the float inputs of a model to 16 bits before its forward, and
return its float outputs in float32; torch.autocast does neither. Token ids are integers and stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from distmuon.errors import problem
from distmuon.integrations import averaged_model, averaging_managers_of, need, params_of
from distmuon.integrations.grad_scaler import GradScaler
from distmuon.optimizer import DistMuon

strategies: Any = need("lightning_fabric.strategies", "fabric")


class _NoSync(strategies.strategy._BackwardSyncControl):  # type: ignore[misc]
    """Control of the reduction in backward; `ddp_control` is the strategy's, for modules in DDP."""

    def __init__(self, ddp_control: Any) -> None:
        self._ddp_control = ddp_control

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        optimizers = averaging_managers_of(module.parameters())
        if not enabled or not optimizers:
            context: AbstractContextManager[Any] = self._ddp_control.no_backward_sync(module, enabled)
            return nullcontext() if not enabled else context
        stack = ExitStack()
        for optimizer in optimizers:
            stack.enter_context(optimizer.no_sync())
        return stack


class DistMuonStrategy(strategies.DDPStrategy):  # type: ignore[misc]
    """Fabric's DDP strategy, except that a model whose gradients DistMuon reduces is not wrapped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._backward_sync_control = _NoSync(strategies.ddp._DDPBackwardSyncControl())
        self._averaged = WeakIdKeyDictionary()  # parameters that DDP averages

    def setup_module(self, module: nn.Module) -> nn.Module:
        if averaged_model(module):
            return module
        self._averaged.update(dict.fromkeys(module.parameters(), True))
        if not any(param.requires_grad for param in module.parameters()):
            return module
        wrapped: nn.Module = super().setup_module(module)
        return wrapped

    def setup_optimizer(self, optimizer: Any) -> Any:
        averages = isinstance(optimizer, DistMuon) and optimizer.options.grad_reduction != "external"
        if averages and any(param in self._averaged for param in params_of(optimizer)):
            raise problem(
                "DistMuonStrategy",
                found="the model was set up before its DistMuon was made, and is wrapped in DDP",
                needed="gradients must be reduced once",
                cure="make the optimizer first, then distmuon.integrations.fabric.setup(fabric, model, optimizer)",
            )
        return optimizer

    def clip_gradients_norm(
        self, module: nn.Module, optimizer: Any, max_norm: float, norm_type: float = 2.0, **kwargs: Any
    ) -> Any:
        """Clip the averaged gradient. All ranks skip a non-finite gradient in `step`, so this does not raise."""
        if not isinstance(optimizer, DistMuon) or optimizer.options.grad_reduction == "external":
            return super().clip_gradients_norm(module, optimizer, max_norm, norm_type, **kwargs)
        self.precision.unscale_gradients(optimizer)
        return optimizer.clip_grad_norm_(max_norm, norm_type)

    def clip_gradients_value(self, module: nn.Module, optimizer: Any, clip_val: float) -> None:
        if not isinstance(optimizer, DistMuon) or optimizer.keeps_grads:
            super().clip_gradients_value(module, optimizer, clip_val)
            return
        raise problem(
            "clip_gradients",
            found=f"clip_val={clip_val}",
            needed="gradients are reduced in shards, and only their norm is known",
            cure="use max_norm",
        )

    def get_optimizer_state(self, optimizer: Any) -> Mapping[str, Any]:
        state: Mapping[str, Any] = optimizer.state_dict()
        return state


def setup(fabric: Any, model: nn.Module, *optimizers: Any, **kwargs: Any) -> Any:
    """Call `fabric.setup` for one model and its optimizers, a DistMuon among them; return (model, *optimizers).

    Raises `ValueError` for another strategy, and for arguments in another order.
    """
    if not isinstance(fabric.strategy, DistMuonStrategy):
        raise problem(
            "Fabric",
            found=f"strategy {type(fabric.strategy).__name__}",
            needed="distmuon must reduce the gradients",
            cure="pass strategy=distmuon.integrations.fabric.DistMuonStrategy(); under ModelParallelStrategy (FSDP2) "
            "call fabric.setup_module(model), then fabric.setup_optimizers(DistMuon(model)), instead of this function",
        )
    distmuons = [optimizer for optimizer in optimizers if isinstance(optimizer, DistMuon)]
    held = {id(param) for param in model.parameters()} if isinstance(model, nn.Module) else set()
    is_one_model = all(isinstance(optimizer, Optimizer) for optimizer in optimizers)
    trained = [param for optimizer in distmuons for param in params_of(optimizer)]
    if not (distmuons and is_one_model and all(id(param) in held for param in trained)):
        raise problem(
            "distmuon.integrations.fabric.setup",
            found=f"({', '.join(type(item).__name__ for item in (model, *optimizers))})",
            needed="one model and the DistMuon made from it are needed, in this order",
            cure="call it once for each model; a model that has no DistMuon goes through fabric.setup",
        )
    precision = fabric.strategy.precision
    if getattr(precision, "scaler", None) is not None:
        if not isinstance(precision.scaler, GradScaler):
            precision.scaler = GradScaler.in_place_of(precision.scaler, precision.device)
        for optimizer in distmuons:
            optimizer.loss_scaling = True  # Fabric's clipping reads it before the first step
    return fabric.setup(model, *optimizers, **kwargs)
