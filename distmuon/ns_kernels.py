"""Whether Newton-Schulz may run in the kernels of the package gram-newton-schulz, and if not, why not, in one line.

Decides once for a device, dtype and polynomial: the package is there, the GPU is one that its kernels are made for, and
on a few matrices they come no less near to the polynomial than our own iteration does. It knows no rank and no
parameter. The package computes in float16; its symmetric products (quack, for Hopper and later) halve the work.

Read from gram-newton-schulz 0.1.6 and run through its class on a CPU, where it uses torch's products in place of its
kernels (tests/unit/test_ns_kernels.py). The kernels themselves have not been run here: hence off unless asked for, and
the check. Nothing is compiled: the package's default, CUDA graphs, would own the memory of its results.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from distmuon.coefficients import Triple, resolve
from distmuon.config import Options
from distmuon.newton_schulz import Form, evaluate, form, orthogonalize

Kernel: TypeAlias = Callable[[Tensor], Tensor]  # (B, m, n), float32, each of Frobenius norm 1 -> polar factors

_CAPABILITY = (9, 0)  # Hopper
_SHAPES = ((2, 96, 160), (2, 256, 256), (1, 256, 1024), (1, 1024, 256), (1, 384, 640))  # kernels from k = 256 on
_MARGIN = 1.1  # times the error of our own standard form in the dtype asked for


@dataclass(frozen=True, slots=True)
class Decision:
    """`kernel`: what `orthogonalize` takes, or None. `line`: which it is and why, for the optimizer's report."""

    kernel: Kernel | None
    line: str


@lru_cache(maxsize=64)
def decide(wanted: bool, device: torch.device, dtype: torch.dtype, triples: tuple[Triple, ...]) -> Decision:
    """The kernel for this polynomial, or the reason why torch's products are used. Warns if it was wanted in vain.

    The first call for a device, dtype and polynomial waits for the device; later ones look the answer up.
    """
    if not wanted:
        return Decision(None, "Newton-Schulz kernels: torch (ns_kernels is off)")
    kernel, reason = None, obstacle(device, dtype)
    if reason is None:
        try:
            kernel = load(triples)
        except ImportError as error:
            reason = f"gram-newton-schulz is not installed: {error}"
    if kernel is not None:
        reason = fault(kernel, device, dtype, triples)
    if reason is not None:
        line = f"Newton-Schulz kernels: torch ({reason})"
        warnings.warn(line, stacklevel=2)
        return Decision(None, line)
    return Decision(kernel, "Newton-Schulz kernels: gram-newton-schulz (float16, checked against our own)")


def summary(
    options: Options, device: torch.device, groups: Iterable[Mapping[str, Any]], *, reasons: bool = True
) -> str:
    """The line of each polynomial among the Muon param groups; without reasons: what all ranks must agree on."""
    polynomials = [resolve(group["ns_coefficients"], group["ns_steps"]) for group in groups if group["rule"] == "muon"]
    lines = [decide(options.ns_kernels, device, options.ns_dtype, triples).line for triples in polynomials]
    if not reasons:
        return "\n".join(line.partition(" (")[0] for line in lines)
    return "\n".join(dict.fromkeys(lines)) or "Newton-Schulz kernels: none (no Muon parameters)"


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """What speaks against the kernels before the package is looked at."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"ns_dtype {dtype} asks for more than their float16"
    if device.type != "cuda":
        return f"they need a GPU, the parameters are on {device.type}"
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        return f"they need CUDA capability 9.0 (Hopper), this one has {found[0]}.{found[1]}"
    return None


def load(triples: tuple[Triple, ...], kernels: bool = True) -> Kernel:
    """The package's iteration for this polynomial, restarted where ours is in float16. Raises ImportError.

    `kernels=False`: the same class with torch's products, on any device; `fault` holds its interface against ours.
    """
    package = importlib.import_module("gram_newton_schulz")
    segments = form(512, 2048, triples, torch.float16, "cuda").segments
    made: Kernel = package.GramNewtonSchulz(
        ns_use_kernels=kernels,
        ns_coefficients=[list(triple) for triple in triples],
        gram_newton_schulz_reset_iterations=list(accumulate(segments))[:-1],
        compile_kwargs=None,
    )
    return made


def fault(kernel: Kernel, device: torch.device, dtype: torch.dtype, triples: tuple[Triple, ...]) -> str | None:
    """Where the kernel comes out further from the polynomial than our standard form in `dtype`; None if nowhere.

    Gaussian matrices and graded ones, wide, tall and square, and zeros, which must stay zeros. Waits for the device.
    """
    generator, steps = torch.Generator().manual_seed(0), len(triples)
    for shape in _SHAPES:
        gaussian = torch.randn(shape, generator=generator)
        graded = gaussian * torch.logspace(0, -2, shape[1]).unsqueeze(1)
        for name, matrices in (("Gaussian", gaussian), ("graded", graded), ("zero", torch.zeros(shape))):
            matrices = matrices.to(device)
            wanted = orthogonalize(matrices, steps=steps, coefficients=triples, dtype=torch.float64)
            ours = evaluate(matrices, triples, Form((1,) * steps, dtype))
            try:
                theirs = orthogonalize(matrices, steps=steps, coefficients=triples, dtype=dtype, kernel=kernel)
                errors = [float((result.double() - wanted).norm()) for result in (theirs, ours)]
            except Exception as error:  # whatever a foreign kernel raises is a reason not to use it
                return f"cross-check: {name} {shape} raised {type(error).__name__}: {error}"
            if not errors[0] <= _MARGIN * errors[1]:
                scale = float(wanted.norm()) or 1.0
                return (
                    f"cross-check: {name} {shape} is off by {errors[0] / scale:.1e},"
                    f" our own iteration in {dtype} by {errors[1] / scale:.1e}"
                )
    return None
