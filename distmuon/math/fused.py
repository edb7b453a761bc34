"""Passes over a GPU's memory, each as one kernel where Triton can make it: the comparison with masters, momentum, the
step of a weight, and masters as remainders.

This module decides whether a device has these kernels (`ready`). It knows no rank and no bucket. The formulas are those
of rules.py, codecs.py and remainders.py, whose plain forms serve everywhere else. Kernels save memory traffic: 6 bytes
an element instead of 22 for a comparison, 14 instead of 42 for momentum, 10 instead of 46 for a weight, 16 instead of
60 for a remainder (tests/unit/test_launches.py).

[Note: rounding] In a kernel every product and every sum rounds once, as in the plain forms but momentum's: these give
the same bits. The plain form of momentum is torch's lerp, which may round a product and a sum at once, so the last bits
of momentum may differ.

[Note: tried first] Triton compiles a kernel on the user's machine, for the user's GPU. So `ready` runs each kernel once
on a small example and compares. If one does not compile, or gives something else, `ready` warns, and the plain forms
serve. It is called when buffers are built, since it waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from distmuon.math import remainders


@cache
def ready(device: torch.device) -> bool:
    """Whether `device` has the kernels; see [Note: tried first]. The first call waits for the device."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    try:
        wrong = differing(device)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    else:
        if not wrong:
            return True
        why = f"{', '.join(wrong)}: other values than the plain form's"
    warnings.warn(
        f"{device}: Triton's kernels do not work ({why}); steps take the plain forms, which move more memory; "
        "update Triton, and install a C compiler if there is none",
        stacklevel=2,
    )
    return False


def absorb(param: Tensor, master: Tensor) -> None:
    """Overwrite the elements of `master`, float32, that do not round to those of `param`, of 16 bits; also NaNs."""
    if ready(master.device):
        launch("absorb", param, master)
    else:
        _absorb(param, master)


def momentum(grad: Tensor, buffer: Tensor, update: Tensor, skip: Tensor, rate: float, blend: float) -> None:
    """``M <- M + rate*(G-M)`` in `buffer` unless `skip` is 1; in any case `update` is ``blend*M + (1-blend)*G`` of the
    new M. Only where `ready`.

    All (n,): `grad` and `buffer` float32, `update` of any floating-point dtype; `skip` 0-dim float32 on their device.
    """
    launch("momentum", grad.contiguous(), buffer, update, skip, rate, blend)


def weight(master: Tensor, polar: Tensor, skip: Tensor, decay: float, rate: float) -> None:
    """``W <- decay*W + rate*O`` in `master`, (n,) float32, unless `skip` is 1; `polar`: (n,) of any floating dtype.
    Only where `ready`.
    """
    launch("weight", master, polar.contiguous(), skip, decay, rate)
    increment_version(master)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of `param`, bfloat16, and `remainder`, int16, in new memory; see remainders.py."""
    if not ready(param.device):
        return remainders.join(param, remainder)
    master = torch.empty(param.shape, dtype=torch.float32, device=param.device)
    launch("join", param, remainder, master)
    return master


def split(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Write a float32 master to `param`, bfloat16, and `remainder`, int16; see remainders.py."""
    if ready(param.device):
        launch("split", master.contiguous(), param, remainder)
        increment_version(param)
    else:
        _split(master, param, remainder)


def launch(kernel: str, *args: Any) -> None:
    """Launch a kernel of kernels.py on the device of its tensors, on the current stream."""
    from distmuon.math import kernels

    with torch.cuda.device(args[0].device):
        getattr(kernels, kernel)(*args)


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


PLAIN: dict[str, Callable[..., None]] = {
    "absorb": _absorb,
    "momentum": _momentum,
    "weight": _weight,
    "join": _join,
    "split": _split,
}
"""The plain form of each kernel, with its arguments: what a trial compares with."""


def differing(device: torch.device) -> list[str]:
    """The kernels that give other values on `device` than their plain forms on the CPU, for 1,029 elements."""
    defaults: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's are
    random = torch.Generator().manual_seed(0)

    def numbers() -> Tensor:
        return torch.randn(1029, generator=random, **defaults)

    x, y, z = numbers(), numbers(), numbers()
    half = x.bfloat16()
    half[::3] = z[::3].bfloat16()
    half[7] = torch.nan
    found = []
    for skip in (torch.zeros((), **defaults), torch.ones((), **defaults)):
        examples = {
            "absorb": (half, x),
            "momentum": (x, y, half, skip, 0.05, 0.95),
            "weight": (y, half.nan_to_num(), skip, 0.999, -0.02),
            "join": (half, (1000 * y).to(torch.int16), z),
            "split": (x, half, half.nan_to_num().to(torch.int16)),
        }
        for name, given in examples.items():
            here, there = [
                [value.to(place, copy=True) if isinstance(value, Tensor) else value for value in given]
                for place in ("cpu", device)
            ]
            PLAIN[name](*here)
            launch(name, *there)
            pairs = [(a, b.cpu()) for a, b in zip(here, there) if isinstance(a, Tensor) and isinstance(b, Tensor)]
            if not all(_agree(a, b, exactly=name != "momentum") for a, b in pairs):
                found.append(name)
    return found


def _agree(a: Tensor, b: Tensor, *, exactly: bool) -> bool:
    relative = 0.0 if exactly else 4 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=relative, atol=relative, equal_nan=True)
