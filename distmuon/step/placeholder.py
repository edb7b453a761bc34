"""What stands in `param.grad` while the gradient itself is in the reduction.

Decides what may be done with it: nothing, except to ask for its shape and the like, and to drop it. Everything else
raises, because the loop that asks (torch's own clipping above all) would read, scale or log what is not there.

[Note: a gradient that says where it is] The placeholder holds no memory. Python reaches it through
`__torch_function__`, which refuses. Autograd does not: when the next backward adds a gradient to what stands in
`param.grad`, the call arrives in `__torch_dispatch__`, and the new gradient is kept in `arrived` until the hook that
follows takes it. So one object serves for as long as the optimizer lives, and nothing of torch is patched.
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
    """The placeholder of one parameter's gradient: its shape, dtype and device, and no elements."""

    fqn: str
    arrived: Tensor | None  # what backward has added since the gradient before was taken away

    @staticmethod
    def __new__(cls, param: nn.Parameter, fqn: str) -> InReduction:
        made: InReduction = Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device
        )
        made.fqn, made.arrived = fqn, None
        return made

    def taken(self) -> Tensor | None:
        """The gradient that backward has added, once."""
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
        here = args[0] if args else None
        if isinstance(here, InReduction) and func in (_aten.add_.Tensor, _aten.add.Tensor):
            here.arrived = args[1]  # autograd accumulates; out of place with create_graph=True
            return here if func is _aten.add_.Tensor else args[1]
        raise _not_here(args)


def _not_here(args: Sequence[Any]) -> ValueError:
    flat = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    fqn = next((each.fqn for each in flat if isinstance(each, InReduction)), "a parameter")
    return problem(
        f"{fqn}.grad",
        found="it was used after backward, when the gradient is in the reduction over the ranks",
        needed="whoever reads, clips or writes gradients needs the optimizer, or gradients that somebody else "
        "has averaged",
        cure="clip with optimizer.clip_grad_norm_ (it returns the norm; metrics()['grad_norm'] has it, too) or "
        "max_grad_norm=, and drop gradients with zero_grad(). If the model is wrapped in DDP, which reduces as well, "
        'pass grad_reduction="external" or use distmuon.integrations.ddp.silence',
    )
