"""Lightning Fabric: a strategy without DDP, and `setup` in the place of `fabric.setup`.

    fabric = Fabric(devices=8, strategy=distmuon.integrations.fabric.DistMuonStrategy(), precision="bf16-mixed")
    model, optimizer = distmuon.integrations.fabric.setup(fabric, model, optimizer)

`fabric.backward`, `no_backward_sync`, `clip_gradients(max_norm=...)`, `save` and `load` stay Fabric's own words. With
"16-mixed" a `distmuon.GradScaler` of the same settings stands in the place of the precision plugin's.

[Note: rounded inputs] Fabric's mixed precisions round the float inputs of a model to 16 bits before its forward, and
give its float outputs back in float32; torch.autocast alone does neither. Token numbers are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from distmuon.errors import problem
from distmuon.grad_scaler import GradScaler
from distmuon.integrations import need
from distmuon.optimizer import DistMuon

strategies: Any = need("lightning_fabric.strategies", "fabric")


class _OptimizerNoSync(strategies.strategy._BackwardSyncControl):  # type: ignore[misc]
    def __init__(self) -> None:
        self.optimizer: DistMuon | None = None

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return self.optimizer.no_sync() if enabled and self.optimizer is not None else nullcontext()


class DistMuonStrategy(strategies.DDPStrategy):  # type: ignore[misc]
    """Fabric's DDP launcher and process group; the model stays unwrapped and distmuon reduces."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._backward_sync_control = _OptimizerNoSync()

    def setup_module(self, module: nn.Module) -> nn.Module:
        return module

    def setup_optimizer(self, optimizer: Any) -> Any:
        if not isinstance(optimizer, DistMuon):
            raise problem(
                "DistMuonStrategy", f"a {type(optimizer).__name__}", "it averages no gradients, DistMuon does",
                "use Fabric's DDPStrategy for other optimizers",
            )  # fmt: skip
        self._backward_sync_control.optimizer = optimizer
        return optimizer

    def clip_gradients_norm(
        self, module: nn.Module, optimizer: Any, max_norm: float, norm_type: float = 2.0, **_: Any
    ) -> Tensor:
        """The averaged gradient's; a non-finite one is skipped by all ranks in `step`, so none raises here."""
        self.precision.unscale_gradients(optimizer)
        norm: Tensor = optimizer.clip_grad_norm_(max_norm, norm_type)
        return norm

    def clip_gradients_value(self, module: nn.Module, optimizer: Any, clip_val: float) -> None:
        raise problem(
            "clip_gradients", f"clip_val={clip_val}", "gradients are in the reduction, where only the norm is known",
            "use max_norm",
        )  # fmt: skip

    def get_optimizer_state(self, optimizer: Any) -> Mapping[str, Any]:
        state: Mapping[str, Any] = optimizer.state_dict()
        return state


def setup(fabric: Any, model: nn.Module, optimizer: DistMuon, **kwargs: Any) -> tuple[Any, Any]:
    """(model, optimizer) as `fabric.setup` returns them; the optimizer's methods are DistMuon's own.

    Fabric's wrapper borrows the class of what it wraps: without this its `clip_grad_norm_` or `no_sync` would write
    into the wrapper (the optimizer refuses that). Raises `ValueError` for another strategy.
    """
    if not isinstance(fabric.strategy, DistMuonStrategy):
        raise problem(
            "Fabric", f"strategy {type(fabric.strategy).__name__}", "gradients must be left to distmuon",
            "pass strategy=distmuon.integrations.fabric.DistMuonStrategy()",
        )  # fmt: skip
    precision = fabric.strategy.precision
    if getattr(precision, "scaler", None) is not None:
        precision.scaler = GradScaler.in_place_of(precision.scaler, precision.device)
        optimizer.loss_scaling = True  # Fabric's clipping asks before the first step
    wrapped_model, wrapped = fabric.setup(model, optimizer, **kwargs)[:2]
    own = {"state_dict", "load_state_dict", "step"}  # Fabric's
    for name in dir(DistMuon):
        if not name.startswith("_") and name not in own and callable(getattr(optimizer, name)):
            setattr(wrapped, name, getattr(optimizer, name))
    return wrapped_model, wrapped
