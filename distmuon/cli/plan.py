"""`distmuon plan MODEL --dp 8,64,512` prints whether training fits, what Muon costs, and all figures behind it.

This module decides how numbers are printed. The numbers are those of `distmuon.plan` and `planning/verdict.py`, and the
flags come from their signatures and from the fields of `Sharding` and `Precision`. Bad input gives a line on stderr and
exit status 2; with `--hbm`, a model that does not fit gives 1.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

from torch import nn

from distmuon.cli.arguments import import_jsonargparse
from distmuon.cli.models import HELP, Named, find_model
from distmuon.errors import problem
from distmuon.layout.routing import route
from distmuon.options import Precision, Sharding
from distmuon.planning.plan import STAGES, Given, Plan, plan
from distmuon.planning.step_time import Order, hardware_row
from distmuon.planning.verdict import MFU, Verdict, active_elements, judge

Row = tuple[str, list[str]]  # label, a cell for each way

_ORDERS: dict[Order, str] = {  # labels
    "one_group": "one group",
    "exchange_group": "exchange group",
    "gathers_wait": "gathers wait",
}


TOKENS = 1 << 20  # of a step, where neither the command line nor a recipe says

_PARTS = ("parameters", "staged", "gradients", "master", "momentum", "moments", "transient")


def main(argv: Sequence[str]) -> int:
    """Print the plans for the arguments; return the exit status."""
    try:
        given, named = _parse(argv)
        ranks, as_json = given.pop("ranks"), given.pop("json")
        plot = given.pop("plot")
        has_limit = given.pop("has_limit")
        dp_sizes, judged = given.pop("dp"), given.pop("judged")
        path = None if plot is None else _writable(Path(plot))
        plans = [plan(named.model, dp_size=dp_size, **given) for dp_size in dp_sizes]
        verdicts = [judge(found, **judged) for found in plans]
        hardware = given["hardware"] or "no hardware"
        if path is not None:
            from distmuon.cli.plot import draw

            draw(plans, verdicts, f"{named.name}, {hardware}", path)
    except (ArgumentError, ValueError, OSError, ImportError) as error:
        print(f"distmuon plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if as_json:
        found = [
            {"model": named.name, **p.to_dict(ranks=ranks), "verdict": v.to_dict()} for p, v in zip(plans, verdicts)
        ]
        print(json.dumps(found, indent=2))
    else:
        texts = [_text(p, v, named.name, hardware, judged["mfu"], ranks) for p, v in zip(plans, verdicts)]
        print("\n\n".join(texts))
    return int(has_limit and any(verdict.fits is False for verdict in verdicts))


def _parse(argv: Sequence[str]) -> tuple[dict[str, Any], Named]:
    """The arguments of `plan` and `judge` with those that only this command has, and the model.

    What a recipe's YAML says stands in for the defaults, so that flags win over it.
    """
    parser = _parser()
    named = find_model(parser.parse_args(argv).model)
    defaults = dict(named.options)
    for name in ("sharding", "precision"):
        if name in defaults:
            policy = vars(defaults.pop(name))
            defaults |= {f"{name}.{key}": value for key, value in policy.items()}
    parser.set_defaults(defaults)
    given = vars(parser.instantiate(parser.parse_args(argv)))
    if given["routes"] is None:
        given["routes"] = named.routes
    given["dp"] = _dp_sizes(given["dp"])
    del given["model"]
    hbm = given.pop("hbm")
    tokens = given.pop("tokens")
    experts = given.pop("experts_per_token")
    hardware = given["hardware"]
    given["judged"] = {
        "hardware": None if hardware is None else hardware_row(hardware),
        "tokens": tokens if tokens is not None else named.tokens or TOKENS,
        "hbm": None if hbm is None else 1e9 * hbm,
        "mfu": given.pop("mfu"),
        "active_elements": _active(named, named.experts_per_token if experts is None else experts, given["routes"]),
    }
    given["has_limit"] = hbm is not None
    return given, named


def _active(named: Named, experts_per_token: int | None, routes: Any) -> int | None:
    if experts_per_token is None:
        return None
    if experts_per_token < 1:
        raise problem(
            "--experts_per_token",
            found=f"found {experts_per_token}",
            needed="a positive number is needed",
            cure="correct it",
        )
    muon = None if routes == "adamw" else routes  # the baseline uses as many experts
    model = named.model
    specs = [spec for spec, _ in route(model, muon)] if isinstance(model, nn.Module) else model
    return active_elements(specs, experts_per_token)


def _parser() -> Any:
    """Make the parser: the arguments of `distmuon.plan`, and those that only the command line has."""
    parser = import_jsonargparse().ArgumentParser(
        prog="distmuon plan",
        description="Whether training fits, what Muon costs of a step beside AdamW, and the bytes, memory and time "
        "behind it. Bytes and counts are exact, times are an estimate. Example: distmuon plan llama-8b --dp 8,64 "
        "--hbm 80 --tokens 4000000. Exit status: 0; 1 if a plan does not fit in --hbm; 2 for bad input.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("model", help=HELP)
    parser.add_argument("--dp", required=True, metavar="N[,N...]", help="data-parallel ranks, such as 8,64,512")
    parser.add_argument("--hbm", type=float, metavar="GB", help="memory of a GPU; null: that of the hardware")
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"tokens of a step, on all ranks together; null: the recipe's, or {TOKENS:,}",
    )
    parser.add_argument(
        "--mfu", type=float, default=MFU, help="share of the peak that forward and backward are assumed to reach"
    )
    parser.add_argument(
        "--experts_per_token",
        type=int,
        metavar="N",
        help="experts that a token uses, of each stack; null: those of the table or config, else all",
    )
    parser.add_argument("--ranks", action="store_true", help="also every single rank")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    parser.add_argument(
        "--plot", metavar="PNG", help="draw traffic, memory, balance and time over dp (needs matplotlib)"
    )
    parser.add_class_arguments(Sharding, "sharding")
    parser.add_class_arguments(Precision, "precision")
    parser.add_function_arguments(plan, skip={"model", "dp_size", "sharding", "precision"})
    return parser


def _dp_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise problem(
            "--dp", found=f"found {text!r}", needed="whole numbers are needed", cure="write 8 or 8,64,512"
        ) from None


def _writable(path: Path) -> Path:
    """`path`, if a picture can be written there."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise problem(
            "--plot",
            found=f"found {path}, {'a folder' if path.is_dir() else 'whose folder does not exist'}",
            needed="a file in an existing folder is needed",
            cure="make the folder, or name another file",
        )
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise problem(
            "--plot", found=f"found {path}", needed="a .png, .svg or .pdf is needed", cure="change the file's ending"
        )
    return path


def _text(found: Plan, verdict: Verdict, model: str, hardware: str, mfu: float, ranks: bool) -> str:
    given = found.given
    title = f"{model}, dp_size {found.dp_size}: {found.num_elements:,} parameters, {found.num_matrices:,} matrices"
    answers = [fill(line, 110, subsequent_indent=" " * 9) for line in _verdict_text(found, verdict, mfu)]
    lines = [f"{title}; {hardware}", *answers, ""]
    shape = f"{found.num_buckets} bucket{'s' * (found.num_buckets > 1)}, the largest {found.largest_bucket:.1%}"
    lines += [shape + (f"; staged {found.staged:.1%}" if given is None else "")]
    lines += _cut_text(given) if given else []
    lines += [f"bucket_mb auto: {found.why}"] if found.why else []
    ways = (found, *found.others)
    lines.append(f"{'':34}" + "".join(f"{way.way:>16}" for way in ways))
    rows = [*_traffic(ways), *_memory(ways), *_work(ways)]
    lines += [f"{label:34}" + "".join(f"{cell:>16}" for cell in cells) for label, cells in rows]
    for number, rank in enumerate(found.ranks if ranks else ()):
        sent = ", ".join(f"{stage} {n}" for stage, n in rank.sent_bytes.items())
        lines.append(
            f"rank {number}: sends {sent or 'nothing'}; holds {rank.state_bytes} of state; "
            f"{rank.ns_matrices} matrices, {rank.ns_flops} FLOPs"
        )
    return "\n".join(lines)


def _verdict_text(found: Plan, verdict: Verdict, mfu: float) -> Iterator[str]:
    """Yield the answers: memory, time, traffic, and, if there is any, the way that would be faster."""
    held = asdict(verdict.held)
    largest = sorted(_PARTS, key=lambda part: -held[part])[:3]
    parts = f"the fullest rank holds {_bytes(verdict.held.total)}, most of it "
    parts += ", ".join(f"{part} {_bytes(held[part])}" for part in largest if held[part])
    if verdict.hbm is None:
        yield f"memory   {parts}; --hbm GB says whether it fits"
    else:
        rest = _bytes(round(abs(verdict.hbm - verdict.held.total)))
        answer = f"{'fits' if verdict.fits else 'does not fit'} in {verdict.hbm / 1e9:g} GB"
        tail = f"{rest} are left for activations" if verdict.fits else f"{rest} too many"
        yield f"memory   {answer}: {parts}; {tail}"
    if verdict.overhead is not None and verdict.model_s and verdict.optimizer_s and verdict.adamw_s:
        yield (
            f"time     Muon makes a step {verdict.overhead:+.1%} longer than AdamW (estimate): optimizer "
            f"{_ms(verdict.optimizer_s)}, AdamW's {_ms(verdict.adamw_s)}, forward and backward {_ms(verdict.model_s)} "
            f"(6 x {verdict.active_elements:,} parameters x {verdict.tokens_per_rank:,.0f} tokens a rank, "
            f"{verdict.tokens:,} a step, at {mfu:.0%} of the peak)"
        )
    else:
        yield "time     not estimated: hardware and the comparison with AdamW are needed"
    own = "" if found.given is None else ", FSDP2's own included"
    ratio = f", {verdict.traffic:.4f} of AdamW's" if verdict.traffic is not None else ""
    yield f"traffic  {_bytes(verdict.sent)} a step from the busiest rank{own}{ratio}"
    faster = next((way for way in found.others if way.way == verdict.faster), None)
    if faster is not None and faster.time and verdict.optimizer_s:
        yield (
            f"faster   by this estimate: {faster.way}, {_ms(faster.time.step_s)} instead of {_ms(verdict.optimizer_s)}"
            f"; its fullest rank holds {_bytes(faster.fullest.total)}"
        )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def _traffic(ways: Sequence[Plan]) -> Iterator[Row]:
    """Yield the rows of bytes sent: by the optimizer, then, if FSDP2 has cut the model, by FSDP2."""
    given = ways[0].given
    for stage in STAGES if given is None else ("guard", "dp_gather", "scatter"):
        yield f"sent, {stage}", [_bytes(way.stage_bytes(stage)) for way in ways]
    yield "sent, busiest rank", [_bytes(way.sent) for way in ways]
    if given is not None:
        for collective, n in given.fsdp2.sent_bytes.items():
            yield f"sent by FSDP2, {collective}", [_bytes(n)] * len(ways)
        return
    adamw = next((way.sent for way in ways if way.way == "adamw"), 0)
    if adamw:
        yield "  relative to AdamW's own ZeRO-1", [f"{way.sent / adamw:.4f}" for way in ways]


def _memory(ways: Sequence[Plan]) -> Iterator[Row]:
    """Yield the rows of bytes held."""
    given = ways[0].given
    for name in ("parameters", "staged", "gradients", "master", "momentum", "moments", "transient"):
        if given is None or name != "staged":
            yield f"held, {name}", [_bytes(getattr(way.fullest, name)) for way in ways]
    yield "held, fullest rank", [_bytes(way.fullest.total) for way in ways]
    if given is not None:
        yield "held by FSDP2 meanwhile, about", [_bytes(given.fsdp2.unsharded_bytes)] * len(ways)
    if any(way.fullest.accumulation for way in ways):
        yield "  more while accumulating", [_bytes(way.fullest.accumulation) for way in ways]
    if any(way.fullest.arrivals for way in ways):
        yield "  more on a CPU, for what arrives", [_bytes(way.fullest.arrivals) for way in ways]


def _work(ways: Sequence[Plan]) -> Iterator[Row]:
    """Yield the rows of balance, Newton-Schulz and estimated times."""
    is_given = ways[0].given is not None
    yield "straddlers", [f"{way.straddlers:,}" for way in ways]
    if not is_given:
        yield "padding", [f"{way.padding:.3%}" for way in ways]
    yield "state, max/mean", [f"{way.state_balance:.3f}" for way in ways]
    yield "Newton-Schulz, max/mean", [f"{way.ns_balance:.3f}" for way in ways]
    yield (
        "Newton-Schulz, busiest, TFLOP",
        [f"{max(rank.ns_flops for rank in way.ranks) / 1e12:.3f}" for way in ways],
    )
    times = [way.time for way in ways if way.time]
    if not times:
        return
    yield "estimated ms: step", [f"{1e3 * time.step_s:.2f}" for time in times]
    yield "  Newton-Schulz, slowest rank", [f"{1e3 * time.newton_schulz_s:.2f}" for time in times]
    yield "  elementwise, slowest rank", [f"{1e3 * time.elementwise_s:.2f}" for time in times]
    yield "  exposed communication", [f"{1e3 * time.exposed_s:.2f}" for time in times]
    if is_given:
        return
    yield "  all-gathers left to hide", [f"{1e3 * time.left_s:.2f}" for time in times]
    for order, label in _ORDERS.items() if len(ways[0].orders) > 1 else ():
        at = [way.orders[order] for way in ways]
        yield f"step + left, {label}", [f"{1e3 * time.step_s:.2f} + {1e3 * time.left_s:.2f}" for time in at]


def _cut_text(given: Given) -> list[str]:
    """The mesh, what tensor parallelism cuts, and whether one Newton-Schulz for all replicas pays."""
    mesh = given.mesh
    lines = [f"FSDP2: {mesh.replicas} replicas x {mesh.shards} shards x tp {mesh.tp} = {mesh.num_ranks} ranks"]
    for kind, modules in given.tensor_parallel.items():
        cut = "replicated" if kind == "replicated" else f"cut by {kind}"
        lines.append(f"tp {mesh.tp}, {cut}: {', '.join(modules) or 'nothing'}")
    return [*lines, f"Newton-Schulz once for all replicas {given.once}"] if given.once else lines


def _bytes(n: int) -> str:
    """Text for `n` bytes in decimal units, as vendors of networks and memory count."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.3f} {unit}"
    return f"{n} B"
