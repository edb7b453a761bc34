"""The coefficients of each Newton-Schulz step, from a table or the user, and bounds on the singular values.

This module decides which coefficients are allowed: no singular value may change its sign or leave [0, 1.5]. It works on
numbers only; it knows no tensor, and not how a polynomial is evaluated. Bands, and how the digits were derived again:
docs/newton_schulz.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias

from distmuon.errors import problem

Triple: TypeAlias = tuple[float, float, float]
Coefficients: TypeAlias = str | Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Table:
    """The (a, b, c) of each step, for at least `fewest` steps. The last triple may repeat only if `repeats`."""

    triples: tuple[Triple, ...]
    fewest: int
    repeats: bool
    source: str


def _guarded(*triples: Triple) -> tuple[Triple, ...]:
    """Triples of p(s / 1.01), so that an input that is 1 % too large by rounding is in the range of p's design."""
    return tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in triples)


_JORDAN: Triple = (3.4445, -4.7750, 2.0315)
COEFFICIENTS: Mapping[str, Table] = MappingProxyType(
    {
        "jordan": Table(
            (_JORDAN,),
            fewest=1,
            repeats=True,
            source=(
                "Keller Jordan, kellerjordan.github.io/posts/muon: steepest at 0, any steps;"
                " the default of torch.optim.Muon"
            ),
        ),
        "polar_express": Table(
            (
                *_guarded(
                    (8.28721201814563, -23.595886519098837, 17.300387312530933),
                    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                ),
                (1.875, -1.25, 0.375),
            ),
            fewest=5,
            repeats=True,
            source=(
                "Polar Express, arXiv 2505.16932: minimax composition from 1e-3, with its own guard of 1.01 on all but"
                " the limit, which repeats"
            ),
        ),
        "you": Table(
            (
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            fewest=5,
            repeats=False,
            source=(
                "YouJiacheng, x.com/YouJiacheng/status/1905861218138804534 (modded-nanogpt): five steps tuned as one"
            ),
        ),
        "cans": Table(
            _guarded(
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            fewest=5,
            repeats=False,
            source=(
                "CANS, arXiv 2506.10935: Remez from 1e-3, digits as in NVIDIA-NeMo/Emerging-Optimizers; guarded here:"
                " an input 0.2 % above 1, which bfloat16 makes, diverges otherwise"
            ),
        ),
        "deepseek_v4": Table(
            (_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
            fewest=10,
            repeats=False,
            source="DeepSeek-V4 report, arXiv 2606.19348: eight fast steps, then two that settle at 1",
        ),
        "cubic": Table(
            _guarded(
                (3.3656576, -3.3420992, 0.0),
                (2.5744352, -1.4957376, 0.0),
                (2.5368962, -1.4312570, 0.0),
                (2.4418906, -1.2764040, 0.0),
                (2.2230472, -0.9630650, 0.0),
            ),
            fewest=5,
            repeats=False,
            source=(
                "cubic5, arXiv 2606.00371: relaxed band from 7e-3, two products a step instead of three, digits as in"
                " NVIDIA-NeMo/Emerging-Optimizers; guarded here: it is negative from 1.0035 otherwise"
            ),
        ),
    }
)


def coefficient_schedule(coefficients: Coefficients, steps: int) -> tuple[Triple, ...]:
    """The (a, b, c) of each step, from a table's name, a triple for all steps, or a triple for each step.

    Raises ValueError if the table does not support that many steps, or if the polynomial could send a singular value in
    [0, 1], or slightly above 1 by rounding, below 0 or above 1.5.
    """
    if isinstance(coefficients, str):
        return _cached_schedule(coefficients, steps)
    try:
        rows = [row if isinstance(row, Sequence) else (row,) for row in coefficients]
        rows = [[row[0] for row in rows]] if all(len(row) == 1 for row in rows) else rows
        triples = tuple(tuple(float(number) for number in row) for row in rows)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        needed = "a table's name, one (a, b, c) for all steps or one for each step is needed"
        raise problem(
            "ns_coefficients", found=f"{coefficients!r} found", needed=needed, cure="pass 'jordan', the usual table"
        ) from None
    return _cached_schedule(triples, steps)


@lru_cache(maxsize=256, typed=True)  # so that True and 2.0 do not hit the entries of 1 and 2
def _cached_schedule(coefficients: str | tuple[tuple[float, ...], ...], steps: int) -> tuple[Triple, ...]:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise problem(
            "ns_steps",
            found=f"{steps!r} found",
            needed="a whole number of at least 1 is needed",
            cure="pass 5, the usual number",
        )
    if not isinstance(coefficients, str):
        if {len(row) for row in coefficients} != {3} or len(coefficients) not in (1, steps):
            found = f"rows of {[len(row) for row in coefficients]} numbers found for {steps} steps"
            cure = f"give 1 or {steps} triples"
            raise problem(
                "ns_coefficients", found=found, needed="one (a, b, c) for all or one for each step is needed", cure=cure
            )
        triples = tuple((a, b, c) for a, b, c in coefficients) * (steps // len(coefficients))
    elif coefficients not in COEFFICIENTS:
        cure = f"take one of {[*COEFFICIENTS]}"
        raise problem("ns_coefficients", found=f"{coefficients!r} found", needed="a table is needed", cure=cure)
    else:
        table = COEFFICIENTS[coefficients]
        last = len(table.triples) - 1
        if steps < table.fewest or (steps > last + 1 and not table.repeats):
            served = f"{table.fewest} steps{' or more' if table.repeats else ' and no other number'}"
            raise problem(
                "ns_steps",
                found=f"{steps} found for ns_coefficients {coefficients!r}",
                needed=f"its source tuned {served}",
                cure="set ns_steps to that, take 'jordan' (any number), or pass an (a, b, c) for each step",
            )
        triples = tuple(table.triples[min(step, last)] for step in range(steps))
    checked_bounds(triples)
    return triples


@lru_cache(maxsize=256)
def checked_bounds(triples: tuple[Triple, ...]) -> tuple[float, ...]:
    """The largest possible singular value before each step, and after the last. Raises ValueError above 1.5.

    The bounds are exact, without a grid: p is continuous and p(0) = 0, so if it is not negative it maps [0, u] onto
    [0, max p], and the extrema of a quintic are known. Each step's input is taken as 2^-8 too large, which is two
    bfloat16 roundings.
    """
    tops = [1.0]
    for a, b, c in triples:
        end = tops[-1] * (1 + 2.0**-8)
        # With y = s^2, p(s)/s = a + b*y + c*y^2 has its extremum on [0, end^2] at `turn` or at an end.
        turn = min(max(-b / (2 * c), 0.0), end**2) if c else 0.0
        lowest = min(a, *(a + b * y + c * y * y for y in (turn, end**2)))
        if not lowest > 0:
            found = f"step {len(tops)}, {(a, b, c)}, multiplies some singular value of (0, {end:.4g}] by {lowest:.3g}"
            needed = "a positive factor is needed, or the sign changes"
            raise problem("ns_coefficients", found=found, needed=needed, cure="take a table's name instead")
        # p'(s) = a + 3*b*y + 5*c*y^2 is zero at `flat`.
        flat: tuple[float, ...] = ()
        if c:
            root = max(9 * b * b - 20 * a * c, 0.0) ** 0.5
            flat = ((-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c))
        elif b:
            flat = (-a / (3 * b),)
        extrema = (end, *(y**0.5 for y in flat if 0 < y < end**2))
        tops.append(min(max(a * s + b * s**3 + c * s**5 for s in extrema), 1e6))
    if not tops[-1] <= 1.5:
        raise problem(
            "ns_coefficients",
            found=f"singular values up to {tops[-1]:.4g} after {len(triples)} steps found",
            needed="at most 1.5 is needed",
            cure="add the steps that bring them back to 1, or take a table's name instead",
        )
    return tuple(tops)
