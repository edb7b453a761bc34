"""`python -m distmuon plan MODEL --dp 8,64,512` prints the traffic, memory and time that training would need.

This module decides only how numbers are printed and how a model is named. The numbers are those of `distmuon.plan`, and
the flags come from its signature and from the fields of `Sharding` and `Precision`. Bad input gives a line on stderr
and exit status 2. transformers and matplotlib are imported only if a config or a plot is requested.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distmuon.cli.arguments import import_jsonargparse
from distmuon.errors import problem
from distmuon.layout.routing import ParamSpec
from distmuon.options import Precision, Sharding
from distmuon.planning.plan import STAGES, Given, Plan, plan
from distmuon.planning.shapes import TABLES, shape_table
from distmuon.planning.step_time import Order

Row = tuple[str, list[str]]  # label, a cell for each way

_ORDERS: dict[Order, str] = {  # labels
    "one_group": "one group",
    "exchange_group": "exchange group",
    "gathers_last": "gathers last",
}


def main(argv: Sequence[str]) -> int:
    """Print the plans for the arguments; return the exit status."""
    try:
        parser = _parser()
        given = vars(parser.instantiate(parser.parse_args(argv)))
        name = given.pop("model")
        ranks = given.pop("ranks")
        plot = given.pop("plot")
        as_json = given.pop("json")
        dp_sizes = _dp_sizes(given.pop("dp"))
        model = _model(name)
        plans = [plan(model, dp_size=dp_size, **given) for dp_size in dp_sizes]
        if plot is not None:
            _draw(plans, name, Path(plot))
    except (ArgumentError, ValueError, OSError, ImportError) as error:
        print(f"distmuon plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps([found.to_dict(ranks=ranks) for found in plans], indent=2))
    else:
        print("\n\n".join(_text(found, name, ranks) for found in plans))
    return 0


def _parser() -> Any:
    """Make the parser: the arguments of `distmuon.plan`, and those that only the command line has."""
    parser = import_jsonargparse().ArgumentParser(
        prog="python -m distmuon plan", description="The traffic, memory and time of a step.", exit_on_error=False
    )
    tables = f"one of {', '.join(TABLES)} (or the beginning of one)"
    parser.add_argument(
        "model", help=f"{tables}; a Hugging Face config.json or its folder; a model_type of transformers"
    )
    parser.add_argument("--dp", required=True, metavar="N[,N...]", help="data-parallel ranks, such as 8,64,512")
    parser.add_class_arguments(Sharding, "sharding")
    parser.add_class_arguments(Precision, "precision")
    parser.add_function_arguments(plan, skip={"model", "dp_size", "sharding", "precision"})
    parser.add_argument("--ranks", action="store_true", help="also every single rank")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    parser.add_argument("--plot", metavar="PNG", help="draw traffic, balance and time over dp (needs matplotlib)")
    return parser


def _dp_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise problem(
            "--dp", found=f"found {text!r}", needed="whole numbers are needed", cure="write 8 or 8,64,512"
        ) from None


def _model(name: str) -> nn.Module | tuple[ParamSpec, ...]:
    """A shape table, or a causal language model on the meta device. Never uses the network."""
    try:
        return shape_table(name)
    except KeyError:
        pass
    needed = f"one of {', '.join(TABLES)}, a config.json or a model_type is needed"
    try:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise problem(
            "model", found=f"found {name!r}", needed=needed, cure="pip install transformers for the last two"
        ) from None
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            entries = json.loads(path.read_text())
        except ValueError as error:
            raise problem(
                str(path), found=f"no JSON ({error})", needed="a config.json is needed", cure="correct the file"
            ) from error
        model_type = entries.get("model_type") if isinstance(entries, dict) else None
        if model_type not in CONFIG_MAPPING:
            known = "a model_type that transformers knows is needed"
            raise problem(
                str(path),
                found=f"its model_type is {model_type!r}",
                needed=known,
                cure="correct it or update transformers",
            )
    elif name in CONFIG_MAPPING:
        entries = {"model_type": name}
    else:
        raise problem("model", found=f"found {name!r}", needed=needed, cure="correct the name or the path")
    build: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build(AutoConfig.for_model(**entries))
    except Exception as error:  # a model's code may raise anything for bad values
        found = f"transformers makes no causal language model of it ({type(error).__name__}: {error})"
        raise problem(
            name, found=found.partition("\n")[0][:300], needed="a model's config is needed", cure="correct it"
        ) from error
    return model


def _text(found: Plan, model: str, ranks: bool) -> str:
    given = found.given
    title = f"{model}, dp_size {found.dp_size}: {found.num_elements:,} parameters, {found.num_matrices:,} matrices"
    shape = f"{found.num_buckets} buckets, the largest {found.largest_bucket:.1%}"
    lines = [f"{title}; {shape}" + (f"; staged {found.staged:.1%}" if given is None else "")]
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


def _draw(plans: Sequence[Plan], model: str, path: Path) -> None:
    """Plot traffic, balance and time over dp_size, in three panels."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise problem(
            "--plot", found="matplotlib is not installed", needed="it draws the plot", cure="pip install matplotlib"
        ) from None
    figure: Any
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    sizes = [found.dp_size for found in plans]
    for number, way in enumerate(["distmuon", *(other.way for other in plans[0].others)]):
        series = [(found, *found.others)[number] for found in plans]
        axes[0].plot(sizes, [planned.sent / 1e9 for planned in series], "o-", label=way)
        axes[1].plot(sizes, [planned.ns_balance for planned in series], "o-", label=way)
        times = [planned.time for planned in series if planned.time]
        if len(times) == len(series):
            axes[2].plot(sizes, [1e3 * time.step_s for time in times], "o-", label=way)
    titles = ("sent by the busiest rank, GB", "Newton-Schulz, max/mean", "estimated step, ms")
    for axis, title in zip(axes, titles):
        axis.set_xscale("log", base=2)
        axis.set_title(title)
        axis.set_xlabel("dp_size")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(model)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
