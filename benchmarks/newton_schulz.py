"""Newton-Schulz against torch.optim.Muon's own iteration, and the evidence for the coefficients.

    python -m benchmarks.newton_schulz [--threads 2] [--seconds 5] [--only float32]    times and errors, as a table
    python -m benchmarks.newton_schulz --derive                                        coefficients by our own Remez
    python -m benchmarks.newton_schulz --bands                                         singular values out, by dtype

Peer and distmuon take turns, call by call, so that what else the machine does hits both; the ratio is the median of the
ratios of neighbours, with quartiles; `best` is the ratio of the two fastest calls. Blocks of calls during which other
processes took more than --others of the machine are thrown away (two threads that wait for a third measure the third).
Errors are relative Frobenius distances to the same polynomial run in float64 on the same input, a Gaussian matrix.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as torch_muon

from distmuon.math.coefficients import COEFFICIENTS, Triple, coefficient_schedule
from distmuon.math.newton_schulz import choose_form, orthogonalize, processor_of

JORDAN: Triple = (3.4445, -4.7750, 2.0315)
STEPS = 5
TARGETS = {  # (dtype, B, m, n) -> at most this share of the peer's time
    ("float32", 1, 1024, 4096): 0.5,
    ("float32", 1, 1024, 1024): 0.8,
    ("bfloat16", 1, 1024, 4096): 0.8,
    ("bfloat16", 1, 1024, 1024): 0.92,
    ("bfloat16", 12, 256, 1024): 0.75,
}
OTHERS = [
    (1, 4096, 1024),
    (1, 768, 3072),
    (1, 512, 2048),
    (1, 512, 512),
    (1, 384, 1536),
    (1, 256, 1024),
    (1, 1024, 256),
    (1, 256, 256),
    (1, 128, 512),
    (1, 128, 128),
    (1, 64, 64),
    (12, 512, 512),
    (32, 64, 256),
]


def plain(matrix: Tensor) -> Tensor:
    """torch.optim.Muon's iteration, three products a step, in the dtype of a (m, n) matrix."""
    a, b, c = JORDAN
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


def peer(stack: Tensor, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """In bfloat16 torch's own function; in float32, which that function cannot do, the same formula."""
    if dtype == torch.bfloat16:
        return lambda: [torch_muon(matrix, JORDAN, STEPS, 1e-7) for matrix in stack]
    return lambda: [plain(matrix) for matrix in stack]


def others() -> float:
    """Processor seconds that all other processes have taken so far; 0 where the system does not say."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, *interrupts = (int(field) for field in file.readline().split()[1:9])
    except OSError:
        return 0.0
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:2])


def take_turns(
    theirs: Callable[[], object], ours: Callable[[], object], arguments: argparse.Namespace
) -> tuple[list[tuple[float, float]], int]:
    """Seconds of each, pair by pair, from undisturbed blocks of about half a second; and how many blocks there were."""
    pairs: list[tuple[float, float]] = []
    blocks, quiet, began = 0, 0.0, time.perf_counter()
    while quiet < arguments.seconds and time.perf_counter() - began < arguments.patience:
        block: list[tuple[float, float]] = []
        start, before = time.perf_counter(), others()
        while time.perf_counter() - start < 0.5:
            first = time.perf_counter()
            theirs()
            second = time.perf_counter()
            ours()
            block.append((second - first, time.perf_counter() - second))
        seconds, blocks = time.perf_counter() - start, blocks + 1
        if others() - before <= arguments.others * seconds * (os.cpu_count() or 1):
            pairs += block
            quiet += seconds
    return pairs, blocks


def compare(dtype: torch.dtype, shape: tuple[int, int, int], arguments: argparse.Namespace) -> str:
    """One row of the table."""
    stack = torch.randn(shape)
    theirs = peer(stack, dtype)

    def ours() -> Tensor:
        return orthogonalize(stack, steps=STEPS, coefficients="jordan", dtype=dtype)

    wanted = plain(stack[0].double())
    errors = [float((result.double() - wanted).norm() / wanted.norm()) for result in (theirs()[0], ours()[0])]
    pairs, blocks = take_turns(theirs, ours, arguments)
    name, how = (
        str(dtype).removeprefix("torch."),
        choose_form(*shape[1:], (JORDAN,) * STEPS, dtype, processor_of(torch.device("cpu"))),
    )
    words = "stacked" if how.stacked else f"panels {how.gram_panels}/{how.square_panels}"
    words += f", Gram {how.segments}" if max(how.segments) > 1 else ""
    words += f", in {str(how.dtype).removeprefix('torch.')}" if how.dtype != dtype else ""
    count, m, n = shape
    row = f"| {name} | {count} x {m} x {n} | {TARGETS.get((name, *shape), 1.0)} "
    if len(pairs) < 5:
        return row + f"| no quiet moment in {blocks} blocks | | | {errors[0]:.1e} | {errors[1]:.1e} | {words} | |"
    low, median, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    best = min(b for _, b in pairs) / min(a for a, _ in pairs)
    return row + (
        f"| **{median:.3f}** ({low:.3f}-{high:.3f}) | {best:.3f} | {1e3 * statistics.median(a for a, _ in pairs):.2f}"
        f" | {errors[0]:.1e} | {errors[1]:.1e} | {words} | {len(pairs)} |"
    )


def minimax(low: float, high: float) -> Triple:
    """The odd quintic nearest to 1 on [low, high]: Remez exchange on four points."""
    points = np.array([low, 0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high, high])
    for _ in range(200):
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        inner = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))  # where p' = 0
        if np.allclose(points[1:3], inner, rtol=0, atol=1e-15):
            break
        points[1:3] = inner
    return float(a), float(b), float(c)


def composition(low: float, steps: int, cushion: float) -> Iterator[Triple]:
    """Greedy minimax composition. Each quintic serves what the last one left, [low, 2 - low], but never an interval
    with low / high below `cushion`; there it is scaled so that what comes out is centred on 1 again."""
    high = 1.0
    for _ in range(steps):
        a, b, c = minimax(max(low, cushion * high), high)
        ends = [a * s + b * s**3 + c * s**5 for s in (low, high)]
        scale = 2 / sum(ends) if cushion * high > low else 1.0
        yield a * scale, b * scale, c * scale
        low, high = ends[0] * scale, 2 - ends[0] * scale


def relaxed_cubics(low: float, steps: int, top: float = 1.3) -> Iterator[Triple]:
    """Cubics with p(low) = p(high) and the maximum `top` between: a*s - a/q * s^3, q = low^2 + low*high + high^2."""
    high = 1.0
    for _ in range(steps):
        q = low * low + low * high + high * high
        a = 1.5 * top * math.sqrt(3 / q)
        yield a, -a / q, 0.0
        low, high = a * low - a / q * low**3, top


def fitted(make: Callable[[float], list[Triple]], small: float, large: float, wanted: float) -> list[Triple]:
    """Bisection for the one number a source leaves open, so that the first coefficient is the published one."""
    for _ in range(80):
        middle = math.sqrt(small * large)
        small, large = (middle, large) if make(middle)[0][0] > wanted else (small, middle)
    print(f"  (open number: {middle:.10g})")
    return make(middle)


def derive() -> None:
    """Three tables from their definition, beside the module's digits (without their guard of 1.01)."""
    made: dict[str, Callable[[float], list[Triple]]] = {
        "polar_express": lambda wanted: fitted(lambda x: list(composition(1e-3, 7, x)), 0.02, 0.03, wanted),
        "cans": lambda wanted: fitted(lambda x: list(composition(x, 5, 0.0)), 1e-4, 1e-2, wanted),
        "cubic": lambda wanted: list(relaxed_cubics(7e-3, 5)),
    }
    for name, make in made.items():
        print(name)
        published = [(a * 1.01, b * 1.01**3, c * 1.01**5) for a, b, c in COEFFICIENTS[name].triples]
        for ours, theirs in zip(make(published[0][0]), published):
            print("  derived", *(f"{x:+.7f}" for x in ours), "  published", *(f"{x:+.7f}" for x in theirs))


def bands() -> None:
    """Singular values out for conditions up to 10, 100 and 1000, k <= 256, and the exact polynomial's."""
    print("| table | condition | exact | float32 | float16 | bfloat16 |\n|---|---|---|---|---|---|")
    for name, table in COEFFICIENTS.items():
        steps = max(STEPS, table.fewest)
        for condition in (10, 100, 1000):
            cells = []
            for dtype in (None, torch.float32, torch.float16, torch.bfloat16):
                out: list[float] = []
                torch.manual_seed(0)
                for m, n in ((96, 96), (80, 256), (256, 80), (256, 600)):
                    count = min(m, n)
                    for values in (
                        torch.logspace(0, -math.log10(condition), count),
                        torch.linspace(1, 1 / condition, count),
                        torch.tensor([1.0] + [1 / condition] * (count - 1)),
                        torch.tensor([1.0] * (count // 4) + [1 / condition] * (count - count // 4)),
                    ):
                        u, v = (torch.linalg.qr(torch.randn(size, count, dtype=torch.float64))[0] for size in (m, n))
                        if dtype is None:
                            s = values.double() / values.double().norm()
                            for a, b, c in coefficient_schedule(name, steps):
                                s = a * s + b * s**3 + c * s**5
                        else:
                            matrix = (u * values.double() @ v.mT).float().unsqueeze(0)
                            result = orthogonalize(matrix, steps=steps, coefficients=name, dtype=dtype)
                            s = torch.linalg.svdvals(result[0].double())
                        out += [float(s.min()), float(s.max())]
                cells.append(f"{min(out):.3f}-{max(out):.3f}")
            print(f"| {name} {steps} | {condition} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="of undisturbed measuring, each row")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for them, each row")
    parser.add_argument("--others", type=float, default=0.05, help="share of the machine that others may take")
    parser.add_argument("--only", default="", help="rows whose 'dtype B x m x n' contains this")
    parser.add_argument("--derive", action="store_true")
    parser.add_argument("--bands", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.derive or arguments.bands:
        return derive() if arguments.derive else bands()
    cases = [(dtype, shape) for dtype, *shape in TARGETS]
    cases += [(dtype, [*shape]) for dtype in ("bfloat16", "float32") for shape in OTHERS]
    print(f"torch {torch.__version__}, {arguments.threads} threads, load average {os.getloadavg()[0]:.1f}\n")
    print("| dtype | B x m x n | target | ratio (quartiles) | best | peer ms | peer error | our error | form | pairs |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for dtype, (count, m, n) in cases:
        if arguments.only in f"{dtype} {count} x {m} x {n}":
            print(compare(getattr(torch, dtype), (count, m, n), arguments), flush=True)
    print(f"\nload average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
