"""Loss scaling for float16: a `torch.amp.GradScaler` whose unscaling and overflow check see the reduced gradients.

torch's scaler reads `param.grad`, which is empty by then, and on each rank separately: a rank that overflows alone
would skip a step that the others take. Here all ranks use the verdict of the step. If gradients arrive averaged
(`DistMuon.keeps_grads`), they stay in `param.grad`, and torch's scaler works as well as this class. This module decides
only where the check happens; the optimizer does the unscaling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GradScaler(torch.amp.GradScaler):
    """Drop-in for `torch.amp.GradScaler` (same arguments and state) around `DistMuon` and other optimizers.

    ``scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()``, with ``scaler.unscale_(optimizer)`` and
    ``optimizer.clip_grad_norm_`` in between if wanted. `DistMuon.step` is always called, and itself decides to skip.
    """

    @classmethod
    def in_place_of(cls, scaler: torch.amp.GradScaler, device: torch.device | str) -> GradScaler:
        """Make a scaler for `device` with the settings and state of `scaler`, for trainers that made torch's scaler."""
        made = cls(torch.device(device).type, enabled=scaler.is_enabled())
        made.load_state_dict(scaler.state_dict())
        return made

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Call `optimizer.step`, unless gradients overflowed on any rank; then no rank steps."""
        if hasattr(optimizer, "loss_scaling"):
            optimizer.loss_scaling = True
        return super().step(optimizer, *args, **kwargs)

    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        """Call `DistMuon.step` in any case: it skips by the verdict of all ranks, counts the skip, frees gradients."""
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
