"""Passes over a GPU's memory, each as one kernel where Triton can make it: the comparison with masters, momentum, the
step of a weight, and masters as remainders.

This module decides whether a device has these kernels (`ready`), and makes them operators of torch. It knows no rank
and no bucket. The formulas are those of rules.py and codecs.py, whose plain forms serve everywhere else. Kernels save
memory traffic: 6 bytes an element instead of 22 for a comparison, 14 instead of 42 for momentum, 10 instead of 46 for a
weight, 16 instead of 60 for a remainder (tests/unit/test_launches.py).

[Note: rounding] In a kernel every product and every sum rounds once, as in the plain forms but momentum's:
these give the same bits. The plain form of momentum is torch's lerp, which may round a product and a sum at
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

from distmuon.math import remainders

_library = torch.library.Library("distmuon", "DEF")
_library.define("absorb_(Tensor param, Tensor(a!) master) -> ()")
_library.define(
    "momentum_(Tensor grad, Tensor(a!) buffer, Tensor(b!) update, Tensor skip, float rate, float blend) -> ()"
)
_library.define("weight_(Tensor(a!) master, Tensor polar, Tensor skip, float decay, float rate) -> ()")
_library.define("join_(Tensor param, Tensor remainder, Tensor(a!) master) -> ()")
_library.define("split_(Tensor master, Tensor(a!) param, Tensor(b!) remainder) -> ()")


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


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of `param`, bfloat16, and `remainder`, int16, in new memory; see remainders.py."""
    if not ready(param.device):
        return remainders.join(param, remainder)
    master = torch.empty(param.shape, dtype=torch.float32, device=param.device)
    torch.ops.distmuon.join_(param, remainder, master)
    return master


def split(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Write a float32 master to `param`, bfloat16, and `remainder`, int16; see remainders.py."""
    if ready(param.device):
        torch.ops.distmuon.split_(master.contiguous(), param, remainder)
    else:
        _split(master, param, remainder)


def _absorb(param: Tensor, master: Tensor) -> None:
    torch.where(param == master.to(param.dtype), master, param, out=master)


def _momentum(grad: Tensor, buffer: Tensor, update: Tensor, skip: Tensor, rate: float, blend: float) -> None:
    new = torch.lerp(buffer, grad, rate)
    update.copy_(new.mul(blend).add_(grad, alpha=1.0 - blend))
    torch.where(skip == 0, new, buffer, out=buffer)


def _weight(master: Tensor, polar: Tensor, skip: Tensor, decay: float, rate: float) -> None:
    new = torch.mul(master, decay).add_(polar.to(torch.float32, copy=True).mul_(rate))
    torch.where(skip == 0, new, master, out=master)


def _join(param: Tensor, remainder: Tensor, master: Tensor) -> None:
    master.copy_(remainders.join(param, remainder))


def _split(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    for place, value in zip((param, remainder), remainders.split(master)):
        place.copy_(value)


def _on_cuda(name: str) -> Callable[..., None]:
    def launch(first: Tensor, *rest: Tensor | float) -> None:
        from distmuon.math import kernels

        with torch.cuda.device(first.device):
            getattr(kernels, name)(first, *rest)

    return launch


for _plain in (_absorb, _momentum, _weight, _join, _split):
    _name = _plain.__name__.strip("_")
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
            "join_": (half, (1000 * y).to(torch.int16), z),
            "split_": (x, half, half.to(torch.int16)),
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
