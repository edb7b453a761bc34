"""Loss scaling for float16: `torch.amp.GradScaler` whose unscaling and overflow check see the reduced gradients.

torch's own looks into `param.grad`, which is empty by then, and each rank would look by itself: one that overflows
alone would skip a step that the others take. Here all ranks hold the guard's verdict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GradScaler(torch.amp.GradScaler):
    """Drop-in for `torch.amp.GradScaler` (same arguments and state) around `DistMuon` and other optimizers.

    ``scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()``, with ``scaler.unscale_(optimizer)`` and
    ``optimizer.clip_grad_norm_`` in between if wanted. As with torch's, `step` reads the overflow flag on the host.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """`optimizer.step`, unless some rank's gradients overflowed; then no rank steps."""
        if hasattr(optimizer, "loss_scaling"):
            optimizer.loss_scaling = True
        return super().step(optimizer, *args, **kwargs)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        unscale = getattr(optimizer, "unscale_grads", None)
        if unscale is None:
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        flag: Tensor = unscale(inv_scale)
        return {flag.device: flag}
