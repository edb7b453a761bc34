"""Loss scaling for float16: `torch.amp.GradScaler` whose unscaling and overflow check see the reduced gradients.

torch's own looks into `param.grad`, which is empty by then, and each rank would look by itself: one that overflows
alone would skip a step that the others take. Here all ranks hold the guard's verdict. Where somebody else averages
(`DistMuon.keeps_grads`), `param.grad` is averaged and stays, and torch's own scaler serves as well as this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GradScaler(torch.amp.GradScaler):
    """Drop-in for `torch.amp.GradScaler` (same arguments and state) around `DistMuon` and other optimizers.

    ``scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()``, with ``scaler.unscale_(optimizer)`` and
    ``optimizer.clip_grad_norm_`` in between if wanted. `DistMuon.step` is called in any case and skips by itself.
    """

    @classmethod
    def in_place_of(cls, scaler: torch.amp.GradScaler, device: torch.device | str) -> GradScaler:
        """A scaler for `device` with the settings and the state of `scaler`: for trainers that made torch's own."""
        ours = cls(torch.device(device).type, enabled=scaler.is_enabled())
        ours.load_state_dict(scaler.state_dict())
        return ours

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """`optimizer.step`, unless some rank's gradients overflowed; then no rank steps."""
        if hasattr(optimizer, "loss_scaling"):
            optimizer.loss_scaling = True
        return super().step(optimizer, *args, **kwargs)

    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        """DistMuon skips by the verdict of all ranks, counts it, and lets go of the gradients: it must be called."""
        if hasattr(optimizer, "unscale_grads"):
            loss: float | None = optimizer.step(*args, **kwargs)
            return loss
        return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        unscale = getattr(optimizer, "unscale_grads", None)
        if unscale is None:
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        flag: Tensor = unscale(inv_scale)
        return {flag.device: flag}
