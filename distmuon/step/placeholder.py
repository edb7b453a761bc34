"""The placeholder in `param.grad` while the gradient itself is in the reduction.

This module decides which uses of the placeholder are allowed: its shape and similar attributes may be read, and it may
be dropped. Any other use raises, because the loop (often through torch's clipping) would read, scale or log a gradient
that is not there. The module knows no bucket and no collective.

[Note: placeholder gradients] The placeholder has no memory. Python code reaches it through `__torch_function__`, which
refuses. Autograd does not: when the next backward adds a gradient to `param.grad`, the call arrives in
`__torch_dispatch__`, and the new gradient is kept in `arrived` until the following hook takes it. So a placeholder
serves as long as the optimizer lives, and nothing in torch is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.errors import problem

_aten = torch.ops.aten
_KNOWN = (
    *("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize"),
    *("requires_grad", "grad_fn", "grad", "is_leaf", "_version"),
    *("is_cuda", "is_cpu", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested"),
    *("is_mkldnn",),
)
_ALLOWED = {getattr(Tensor, name).__get__ for name in _KNOWN} | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.element_size,
    Tensor.stride,
    Tensor.storage_offset,
    Tensor.is_contiguous,
    Tensor.get_device,
    Tensor.is_inference,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.requires_grad_,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


class InReduction(Tensor):
    """The placeholder of a parameter's gradient, with its shape, dtype and device, but no elements."""

    fqn: str
    arrived: Tensor | None  # the gradient that backward has added since the last call of `taken`

    @staticmethod
    def __new__(cls, param: nn.Parameter, fqn: str) -> InReduction:
        made: InReduction = Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device
        )
        made.fqn = fqn
        made.arrived = None
        return made

    def taken(self) -> Tensor | None:
        """Take the gradient that backward has added, if any."""
        taken, self.arrived = self.arrived, None
        return taken

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"InReduction({self.fqn!r})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _ALLOWED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise _not_here(args)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        target = args[0] if args else None
        if isinstance(target, InReduction) and func in (_aten.add_.Tensor, _aten.add.Tensor):
            target.arrived = args[1]  # autograd accumulates; out of place with create_graph=True
            return target if func is _aten.add_.Tensor else args[1]
        raise _not_here(args)


def _not_here(args: Sequence[Any]) -> ValueError:
    flat = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    fqn = next((item.fqn for item in flat if isinstance(item, InReduction)), "a parameter")
    return problem(
        f"{fqn}.grad",
        found="it was used after backward, when the gradient is in the reduction over the ranks",
        needed="gradients are read, clipped and written through the optimizer, unless they arrive averaged",
        cure="clip with optimizer.clip_grad_norm_ (it returns the norm; metrics()['grad_norm'] has it, too) or "
        "max_grad_norm=, and drop gradients with zero_grad(). If the model is wrapped in DDP, which also reduces, "
        'pass grad_reduction="external" or use distmuon.integrations.ddp.silence',
    )
