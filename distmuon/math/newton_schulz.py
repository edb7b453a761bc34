"""Newton-Schulz: the (nearly) polar factors of a stack of matrices.

This module decides how each step's odd polynomial is evaluated: in which form, dtype and blocks. It decides from
shapes, dtype and coefficients, never from values, so nothing in it waits for a device. It knows no rank, no parameter.
Error bands, measurements, and rejected variants: docs/newton_schulz.md.

Shapes: B matrices, m rows, n columns; inside, k is the short side and l the long side. A step maps each singular value
s of X (k, l), initially in [0, 1], to a*s + b*s^3 + c*s^5:
    G = X X^T       P = b*G + c*G^2       X <- a*X + P X

[Note: segments]  A segment of several steps reads or writes X only twice. In between, all matrices are k x k and
symmetric:
    Q <- (a*I + P) Q       G <- (a*I + P) G (a*I + P)       and, after its last step,    X <- Q X
Segments of a single step are the standard form; longer segments are the Gram form, restarted (G is computed again from
X) between segments: a rounding error of G at a small singular value grows up to (a*u)^2 times in a step whose input
reaches u. `_GROWTH` bounds the product of these factors. In the first segment P is small compared with a*I, so Q's
multiple of I is stored separately and not rounded; in bfloat16 the first two steps in one segment are then at least as
exact as two segments. This does not hold for later steps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, lru_cache
from math import inf, isqrt

import torch
from torch import Tensor

from distmuon.errors import problem
from distmuon.math.coefficients import Coefficients, Triple, checked_bounds, coefficient_schedule


def flops(m: int, n: int, steps: int) -> int:
    """The FLOPs of the standard form for an (m, n) matrix, steps * (4*k*k*l + 2*k^3); owners are balanced by them."""
    return steps * (4 * min(m, n) * m * n + 2 * min(m, n) ** 3)


@dataclass(frozen=True, slots=True)
class Form:
    """A way to evaluate the polynomials; see `choose_form`."""

    segments: tuple[int, ...]  # steps from one G = X X^T to the next: see [Note: segments]
    dtype: torch.dtype  # dtype of the products
    stacked: bool = True  # batched products of the stack, not matrix by matrix
    gram_panels: int = 1  # column panels in which the upper triangle of G = X X^T is computed, then mirrored
    square_panels: int = 1  # the same for symmetric products of k x k matrices
    on_gpu: bool = False  # normalization in two reads; in the standard form tall matrices are not transposed


# Bounds of [Note: segments] for the first segment and for later segments. Other dtypes keep the standard form.
_GROWTH = {torch.float32: (250.0, 250.0), torch.float16: (70.0, 70.0), torch.bfloat16: (17.0, 0.0)}
# Multiply-adds that a segment of two steps must save at least, since it adds calls.
_SAVED = {torch.bfloat16: 2e7}
# On a CPU, products of at most so many multiply-adds run in float32: calling the bfloat16 kernel takes longer.
_TINY = 2**19
# The smallest k of the Gram form, and the smallest width of a panel. p panels save (p-1)/2p of a product, at p calls.
_LEAST = 128
# bfloat16 on a CPU: from this k on there are at least two panels: batched products take 1.2 times a loop's time there.
_PAIR = 384
# Panels also cost copies: p = sqrt(the product's multiply-adds / these).
_PANEL_WORK = {torch.bfloat16: 5e7, torch.float32: 1.1e7}
# From this k on a stack of a single matrix is multiplied as a matrix: the same bits, and 2 us less for each call.
_ALONE = 32
# Matrices of at most so many elements have their norm computed in float64.
_SMALL = 2**16
# Matrices of fewer elements are transposed as a stack.
_TILED = 60 * 60
# X is updated in place in panels of about so many columns, whose old values stay in cache.
_COLUMNS = 1024


def processor_of(device: torch.device) -> str:
    """The processor argument of `choose_form`: the device's type, "amx" for a CPU with bfloat16 matrix tiles, or
    "no_bfloat16" for a CPU without fast products in bfloat16."""
    if device.type != "cpu":
        return device.type
    if not (torch.backends.mkldnn.enabled and _multiplies_bfloat16()):
        return "no_bfloat16"
    return "amx" if _multiplies_tiles() else "cpu"


@cache
def _multiplies_tiles() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices by AMX, which its environment variable may forbid."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    return torch.cpu._is_amx_tile_supported() and (allowed in ("ALL", "DEFAULT") or "AMX" in allowed)


@cache
def _multiplies_bfloat16() -> bool:
    """Whether torch lets oneDNN multiply bfloat16 matrices: on x86 with AVX-512 or AVX-NE-CONVERT. Its own loops take 8
    to 60 times as long as products in float32 (AMD Zen 3)."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache(maxsize=4096)
def choose_form(m: int, n: int, triples: tuple[Triple, ...], dtype: torch.dtype, processor: str) -> Form:
    """Choose the cheapest safe form to evaluate `triples` on (m, n) matrices, by the thresholds above (see the docs).

    `processor`: see `processor_of`.

    dtype     the given dtype; on a CPU float32 for float16, whose products are 70 times slower, for tiny products, and
              for bfloat16 where the processor has no fast products in it
    segments  longer than 1 for l >= 1.5 k, where products of k x k matrices are cheap, if `_GROWTH` allows it;
              not in bfloat16 on other devices than CPUs, where it has not been measured
    panels    only on a CPU, for products large enough to gain from computing one triangle; bfloat16 products on matrix
              tiles are so fast that copying a triangle takes longer than computing it
    stacked   unless there are panels: a single such matrix uses all cores, and panels of a stack would be copied
    """
    short, long = min(m, n), max(m, n)
    on_cpu = processor in ("cpu", "amx", "no_bfloat16")
    if on_cpu and (dtype == torch.float16 or processor == "no_bfloat16" or short * short * long <= _TINY):
        dtype = torch.promote_types(dtype, torch.float32)
    gram = 2 * long >= 3 * short >= 3 * _LEAST and short * short * (2 * long - 3 * short) >= _SAVED.get(dtype, 0.0)
    gram = gram and (dtype != torch.bfloat16 or on_cpu)
    segments = [1]
    growth = 1.0
    bounds = _GROWTH.get(dtype, (0.0, 0.0))
    for (a, _, _), top in zip(triples[:-1], checked_bounds(triples)):
        growth *= (a * top) ** 2
        if gram and growth <= bounds[len(segments) > 1]:
            segments[-1] += 1
        else:
            segments, growth = [*segments, 1], 1.0
    has_panels = processor == "cpu" or (on_cpu and dtype != torch.bfloat16)
    work = _PANEL_WORK.get(dtype, inf) if has_panels else inf
    least = 2 if has_panels and dtype == torch.bfloat16 and short >= _PAIR else 1
    panels = [max(least, min(short // _LEAST, isqrt(int(short * short * length / work)))) for length in (long, short)]
    return Form(tuple(segments), dtype, panels[0] == 1, panels[0], panels[1], on_gpu=not on_cpu)


def orthogonalize(
    matrices: Tensor, *, steps: int, coefficients: Coefficients, dtype: torch.dtype | None = None
) -> Tensor:
    """Orthogonalize (B, m, n) matrices: each U S V^T becomes U p(S / |S|) V^T, in `dtype` (None: bfloat16).

    The input is never written; the result is new memory, contiguous. The input's scale, 1e-20 to 1e20, does not matter;
    a matrix of zeros gives zeros. A matrix gives the same bits in a stack as alone (k >= 16 in float32 and bfloat16;
    for smaller k a library may use another kernel for batches, and the last bit may differ).
    Raises ValueError like `coefficient_schedule`, and for input that is not a floating-point stack.
    """
    if matrices.dim() != 3 or not matrices.is_floating_point():
        found = f"{tuple(matrices.shape)} of {matrices.dtype} found"
        cure = "add a dimension to a single matrix, flatten a kernel to (out, in)"
        raise problem("matrices", found=found, needed="a floating-point stack (B, m, n) is needed", cure=cure)
    dtype = torch.bfloat16 if dtype is None else dtype
    triples = coefficient_schedule(coefficients, steps)
    form = choose_form(matrices.size(1), matrices.size(2), triples, dtype, processor_of(matrices.device))
    return evaluate(matrices.detach(), triples, form).to(dtype)


def evaluate(matrices: Tensor, triples: tuple[Triple, ...], form: Form) -> Tensor:
    """Evaluate `triples` on (B, m, n) matrices by `form`; the result is in form.dtype."""
    if matrices.numel() == 0:
        return matrices.new_empty(matrices.shape, dtype=form.dtype)
    wide = torch.promote_types(form.dtype, torch.float32)
    unit = _normalized_on_gpu(matrices, wide, form.dtype) if form.on_gpu else _normalized(matrices, wide)
    whole = form.on_gpu and max(form.segments) == 1  # a GPU multiplies either layout equally fast
    tall = unit.size(1) > unit.size(2) and not whole  # then the contiguous transpose is used below
    x = unit.to(form.dtype)
    del unit
    x = _transposed(x) if tall else x  # (B, k, l)
    if form.stacked:
        alone = x.size(0) == 1 and x.size(1) >= _ALONE
        x = x[0] if alone else x
        x = _standard(x, triples) if max(form.segments) == 1 else _segmented(x, torch.empty_like(x), triples, form)
        x = x.unsqueeze(0) if alone else x
    else:
        old = x.new_empty(x.size(1), -(-x.size(2) // -(-x.size(2) // _COLUMNS)))
        for matrix in x:  # (k, l), in place
            _segmented(matrix, old, triples, form)
    return _transposed(x) if tall else x


def _transposed(x: Tensor) -> Tensor:
    """The transposes of a contiguous stack, contiguous.

    On a CPU matrix by matrix: for two dimensions torch has a kernel by tiles, for three only one that jumps from row to
    row and takes two to three times as long.
    """
    if x.device.type != "cpu" or x.size(1) * x.size(2) < _TILED:
        return x.mT.contiguous()
    out = x.new_empty(x.mT.shape)
    for place, matrix in zip(out, x):
        place.copy_(matrix.mT)
    return out


def _normalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """X over its Frobenius norm, contiguous, in new memory.

    For small matrices the number of calls counts: their norm is computed in float64, where squares of float32 cannot
    overflow. For large matrices the number of passes counts: X is divided by max|X|, so that squares cannot overflow,
    and the norm is computed by rows, since a float32 sum over a large matrix stagnates (1e-4 off at 1024 x 4096).
    """
    vector_norm = torch.linalg.vector_norm
    if matrices.size(1) * matrices.size(2) <= _SMALL:
        norm = vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=torch.float64).clamp_(min=2.0**-126)
        return torch.div(matrices, norm.to(dtype)).contiguous()
    wide = matrices.to(dtype)
    peak = torch.maximum(wide.amax((1, 2), True), wide.amin((1, 2), True).neg_()).clamp_(min=2.0**-126)
    unit = torch.div(wide, peak, out=None if wide is matrices else wide)
    norm = vector_norm(vector_norm(unit, dim=2, keepdim=True), dim=1, keepdim=True)
    return unit.div_(norm.clamp_(min=1.0)).contiguous()  # only zeros have a norm below 1


def _normalized_on_gpu(matrices: Tensor, wide: torch.dtype, dtype: torch.dtype) -> Tensor:
    """X over its Frobenius norm, contiguous, in new memory of `dtype`. Computed in `wide`.

    Norms have float64 in registers only, where the multi-tensor kernel computes them: a reduction over dimensions would
    first make a float64 copy, which for small matrices costs less than a call with many tensors.
    """
    if matrices.size(1) * matrices.size(2) <= _SMALL:
        norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=torch.float64)
    else:
        norms = list(torch._foreach_norm(list(matrices.unbind()), 2.0, dtype=torch.float64))
        norm = torch.stack(norms, out=torch.empty(len(norms), dtype=wide, device=matrices.device)).view(-1, 1, 1)
    unit = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    return torch.div(matrices, norm.clamp_(min=2.0**-126).to(wide), out=unit)


def _standard(x: Tensor, triples: tuple[Triple, ...]) -> Tensor:
    """The formula in its standard form, with three products a step. x is (k, l) or (B, k, l), or transposed."""
    multiply, accumulate = (torch.mm, torch.addmm) if x.dim() == 2 else (torch.bmm, torch.baddbmm)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in triples:
        gram = multiply(x.mT, x) if tall else multiply(x, x.mT)
        p, alpha = (accumulate(gram, gram, gram, beta=b, alpha=c), 1.0) if c else (gram, b)
        x = accumulate(x, x, p, beta=a, alpha=alpha) if tall else accumulate(x, p, x, beta=a, alpha=alpha)
    return x


def _segmented(x: Tensor, spare: Tensor, triples: tuple[Triple, ...], form: Form) -> Tensor:
    """Evaluate by segments, see [Note: segments]; x and spare, (k, l) or (B, k, l), are overwritten.

    If the form is not stacked, x is (k, l) and is updated in place, by panels.
    """
    buffers = x.new_empty(5, *x.shape[:-1], x.size(-2))  # k x k each, in one allocation
    gram, square, factor, half, other = buffers
    panels, remaining = form.square_panels, iter(triples)
    apart = 0.0  # Q = factor + apart * I
    for index, length in enumerate(form.segments):
        _symmetric(x, x.mT, gram, form.gram_panels, gram, 0.0, 1.0)
        for number in range(1, length + 1):
            a, b, c = next(remaining)
            p, scale = (square, 1.0) if c else (gram, b)  # P = scale * p
            if c:
                _symmetric(gram, gram, square, panels, gram, b, c)
            if length == 1:
                x, spare = _advance(x, spare, p, a, scale, form.stacked)
            elif number == 1:
                apart = 0.0 if index else a
                torch.mul(p, scale, out=factor).diagonal(dim1=-2, dim2=-1).add_(a - apart)
            else:
                whole = half.copy_(factor) if apart else factor
                whole.diagonal(dim1=-2, dim2=-1).add_(apart)
                _symmetric(p, whole, other, panels, factor, a, scale)
                factor, other = other, factor
                apart = apart * a
            if number < length:
                _symmetric(p, gram, half, panels, gram, a, scale)
                _symmetric(p, half, other, panels, half, a, scale)
                gram, other = other, gram
        if length > 1:
            x, spare = _advance(x, spare, factor, apart, 1.0, form.stacked)
    return x


def _advance(x: Tensor, spare: Tensor, p: Tensor, beta: float, alpha: float, whole: bool) -> tuple[Tensor, Tensor]:
    """Compute X <- beta*X + alpha * p X; return the new X and the new spare.

    If not `whole`, X is updated in place, in panels as wide as spare.
    """
    if whole:
        _product(p, x, spare, x, beta, alpha)
        return spare, x
    for low in range(0, x.size(1), spare.size(1)):
        panel = x[:, low : low + spare.size(1)]
        _product(p, spare[:, : panel.size(1)].copy_(panel), panel, panel, beta, alpha)
    return x, spare


def _symmetric(left: Tensor, right: Tensor, out: Tensor, panels: int, base: Tensor, beta: float, alpha: float) -> None:
    """Compute out = beta*base + alpha * left right, which is symmetric; left is (k, j), right is (j, k).

    They may be stacks if panels is 1.
    """
    if panels == 1:
        return _product(left, right, out, base, beta, alpha)
    columns = 32 * -(-out.size(0) // (32 * panels))
    for low in range(0, out.size(0), columns):
        high = min(low + columns, out.size(0))
        _product(left[:high], right[:, low:high], out[:high, low:high], base[:high, low:high], beta, alpha)
        if low:  # through a contiguous copy: a strided transpose takes twice as long
            out[low:high, :low] = out[:low, low:high].contiguous().mT


def _product(left: Tensor, right: Tensor, out: Tensor, base: Tensor, beta: float, alpha: float) -> None:
    """Compute out = beta*base + alpha * left right, for matrices or stacks; base is not read if beta is 0."""
    if beta == 0.0:
        (torch.mm if out.dim() == 2 else torch.bmm)(left, right, out=out)
    else:
        (torch.addmm if out.dim() == 2 else torch.baddbmm)(base, left, right, beta=beta, alpha=alpha, out=out)
