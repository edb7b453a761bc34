"""Passes over a GPU's memory, each as one kernel where Triton can make it: the comparison with masters, momentum and
the step of a weight.

This module decides whether a device has these kernels (`ready`), and makes them operators of torch. It knows no rank
and no bucket. The formulas are those of rules.py and codecs.py, whose plain forms serve everywhere else. Kernels save
memory traffic: 6 bytes an element instead of 22 for a comparison, 14 instead of 42 for momentum, 10 instead of 46 for a
weight (tests/unit/test_launches.py).

[Note: rounding] In a kernel every product and every sum rounds once, as in the plain form of a weight's step and of a
comparison: these give the same bits. The plain form of momentum is torch's lerp, which may round a product and a sum at
once, so the last bits of momentum may differ.

[Note: tried first] Triton compiles a kernel on the user's machine, for the user's GPU. So `ready` runs each kernel once
on a small example and compares. If one does not compile, or gives something else, `ready` warns, and the plain forms
serve. It is called when buffers are built, since it waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_library = torch.library.Library("distmuon", "DEF")
_library.define("absorb_(Tensor param, Tensor(a!) master) -> ()")
_library.define(
    "momentum_(Tensor grad, Tensor(a!) buffer, Tensor(b!) update, Tensor skip, float rate, float blend) -> ()"
)
_library.define("weight_(Tensor(a!) master, Tensor polar, Tensor skip, float decay, float rate) -> ()")


@cache
def ready(device: torch.device) -> bool:
    """Whether `device` has the kernels; see [Note: tried first]. The first call waits for the device."""
    if device.type != "cuda":
        return False
    try:
        from distmuon.math import kernels  # noqa: F401
    except ImportError:  # Triton is not there
        return False
    try:
        wrong = differing(device)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    else:
        if not wrong:
            return True
        why = f"{', '.join(wrong)} give other values than the plain form"
    warnings.warn(
        f"{device}: Triton's kernels do not work ({why}); steps take the plain forms, which move more memory; "
        "update Triton, and install a C compiler",
        stacklevel=2,
    )
    return False


def absorb(param: Tensor, master: Tensor) -> None:
    """Overwrite the elements of `master`, float32, that do not round to those of `param`, of 16 bits; also NaNs."""
    (torch.ops.distmuon.absorb_ if ready(master.device) else _absorb)(param, master)


def momentum(grad: Tensor, buffer: Tensor, update: Tensor, skip: Tensor, rate: float, blend: float) -> None:
    """``M <- M + rate*(G-M)`` in `buffer` unless `skip` is 1; in any case `update` is ``blend*M + (1-blend)*G`` of the
    new M.

    All (n,): `grad` and `buffer` float32, `update` of any floating-point dtype; `skip` 0-dim float32 on their device.
    """
    torch.ops.distmuon.momentum_(grad.contiguous(), buffer, update, skip, rate, blend)


def weight(master: Tensor, polar: Tensor, skip: Tensor, decay: float, rate: float) -> None:
    """``W <- decay*W + rate*O`` in `master`, (n,) float32, unless `skip` is 1; `polar`: (n,) of any floating dtype."""
    torch.ops.distmuon.weight_(master, polar.contiguous(), skip, decay, rate)


def _absorb(param: Tensor, master: Tensor) -> None:
    torch.where(param == master.to(param.dtype), master, param, out=master)


def _momentum(grad: Tensor, buffer: Tensor, update: Tensor, skip: Tensor, rate: float, blend: float) -> None:
    new = torch.lerp(buffer, grad, rate)
    update.copy_(new.mul(blend).add_(grad, alpha=1.0 - blend))
    torch.where(skip == 0, new, buffer, out=buffer)


def _weight(master: Tensor, polar: Tensor, skip: Tensor, decay: float, rate: float) -> None:
    new = torch.mul(master, decay).add_(polar.to(torch.float32, copy=True).mul_(rate))
    torch.where(skip == 0, new, master, out=master)


def _on_cuda(name: str) -> Callable[..., None]:
    def launch(first: Tensor, *rest: Tensor | float) -> None:
        from distmuon.math import kernels

        with torch.cuda.device(first.device):
            getattr(kernels, name)(first, *rest)

    return launch


for _name, _plain in (("absorb", _absorb), ("momentum", _momentum), ("weight", _weight)):
    _library.impl(f"{_name}_", _on_cuda(_name), "CUDA")
    _library.impl(f"{_name}_", _plain, "CPU")  # what `differing` compares with, and models of a GPU on a CPU run
    _library.impl(f"{_name}_", lambda *_: None, "Meta")


def differing(device: torch.device) -> list[str]:
    """The kernels that give other values on `device` than their plain forms on the CPU, for 1,029 elements."""
    random = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 1029, generator=random)
    half = x.bfloat16()
    half[::3] = z[::3].bfloat16()
    half[7] = torch.nan
    found = []
    for skip in (torch.zeros(()), torch.ones(())):
        examples = {
            "absorb_": (half, x),
            "momentum_": (x, y, half, skip, 0.05, 0.95),
            "weight_": (y, half.nan_to_num(), skip, 0.999, -0.02),
        }
        for name, given in examples.items():
            run = getattr(torch.ops.distmuon, name)
            here, there = [
                [value.to(place, copy=True) if isinstance(value, Tensor) else value for value in given]
                for place in ("cpu", device)
            ]
            run(*here)
            run(*there)
            pairs = [(a, b.cpu()) for a, b in zip(here, there) if isinstance(a, Tensor) and isinstance(b, Tensor)]
            if not all(_agree(a, b, exactly=name != "momentum_") for a, b in pairs):
                found.append(name)
    return found


def _agree(a: Tensor, b: Tensor, *, exactly: bool) -> bool:
    relative = 0.0 if exactly else 4 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=relative, atol=relative, equal_nan=True)
