"""`distmuon route MODEL`: which rule updates each parameter, as which matrices, with which factor, and why.

This module decides how routing is printed; `distmuon.route` decides the rules. Parameters whose names differ in numbers
only, and that are alike in everything else, share a line. A weight that routing refuses to decide has a line with the
rule that is proposed, and the routes to paste stand below. Status 1: there are such weights, or Muon updates nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from distmuon.cli.arguments import Parser
from distmuon.cli.models import HELP, find_model
from distmuon.layout.routing import ParamSpec, Route, UndecidedWeights, route
from distmuon.math.rules import lr_scale

_LABELS = {"muon": "Muon", "adamw": "AdamW"}


@dataclass(frozen=True, slots=True)
class Row:
    """Parameters that are routed alike."""

    parameter: str  # numbers in the name are "*" if there are several
    count: int
    module: str  # class of the module that holds it; "" if only names are known
    shape: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]  # of one parameter; empty for AdamW
    rule: str
    lr_factor: tuple[float, float]  # least and greatest over the matrices; an orthogonal update is multiplied by it
    why: str
    elements: int  # of all of them
    undecided: bool


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a model, the routes that decide what is undecided, and the specs behind the rows."""

    rows: tuple[Row, ...]
    proposed: tuple[Route, ...]
    specs: tuple[ParamSpec, ...]

    def elements(self, rule: str = "") -> int:
        return sum(row.elements for row in self.rows if rule in ("", row.rule))

    @property
    def paste(self) -> str:
        """The argument that decides every undecided weight as proposed."""
        return f"routes=[{', '.join(f'distmuon.Route({r.pattern!r}, {r.rule!r})' for r in self.proposed)}]"


def make_table(
    model: nn.Module | Sequence[ParamSpec],
    routes: Sequence[Route] | str | None = None,
    *,
    full: bool = False,
    adjust_lr_fn: str = "match_rms_adamw",
) -> Table:
    """Route `model`; undecided weights get the proposed rule and are marked. `full`: a row for each parameter."""
    modules: dict[str, str] = {}
    proposed: tuple[Route, ...] = ()
    if isinstance(model, nn.Module):
        modules = {name: type(module).__name__ for name, module in model.named_modules()}
        specs, proposed = _routed(model, routes)
    else:
        specs = _with_reasons(model)
    undecided = {f"route {r.pattern!r}" for r in proposed}
    alike: dict[tuple[Any, ...], list[ParamSpec]] = {}
    for spec in specs:
        pattern = spec.fqn if full else re.sub(r"(?<![^.])\d+(?![^.])", "*", spec.fqn)
        owner = modules.get(spec.fqn.rpartition(".")[0], "")
        alike.setdefault((pattern, owner, spec.shape, spec.rule, spec.matrices, spec.reason), []).append(spec)
    rows = []
    for (pattern, module, *_), members in alike.items():
        spec = members[0]
        matrices = tuple(shape for unit in spec.matrices for shape in unit.logical_shapes)
        factors = [lr_scale(m, n, adjust_lr_fn) for m, n in matrices] or [1.0]
        is_open = spec.reason in undecided
        rows.append(
            Row(
                parameter=pattern if len(members) > 1 else spec.fqn,
                count=len(members),
                module=module,
                shape=spec.shape,
                matrices=matrices,
                rule=spec.rule,
                lr_factor=(min(factors), max(factors)),
                why="neither module type nor name decides: say it" if is_open else spec.reason,
                elements=sum(member.numel for member in members),
                undecided=is_open,
            )
        )
    return Table(tuple(rows), proposed, tuple(specs))


def _routed(
    model: nn.Module | Sequence[tuple[str, nn.Parameter]], routes: Sequence[Route] | str | None
) -> tuple[list[ParamSpec], tuple[Route, ...]]:
    """The specs, and the routes that had to be added."""
    try:
        return [spec for spec, _ in route(model, routes)], ()
    except UndecidedWeights as error:
        given = [] if routes is None or isinstance(routes, str) else list(routes)
        return [spec for spec, _ in route(model, [*given, *error.routes])], error.routes


def _with_reasons(specs: Sequence[ParamSpec]) -> list[ParamSpec]:
    """The specs of a shipped table with the reasons that their names give."""
    with torch.device("meta"):
        pairs = [(spec.fqn, nn.Parameter(torch.empty(spec.shape))) for spec in specs]
    named, added = _routed(pairs, None)
    by_name = {f"route {r.pattern!r}" for r in added}
    why = [
        None if found.reason in by_name or found.rule != spec.rule else found.reason
        for spec, found in zip(specs, named)
    ]
    return [replace(spec, reason=text or "by its module in transformers") for spec, text in zip(specs, why)]


def main(argv: Sequence[str]) -> int:
    """Print the table of the model that the arguments name; return the exit status."""
    parser = Parser(
        prog="distmuon route",
        description="Which parameters Muon updates, as which matrices, and why. Makes no tensor and needs no GPU.",
        epilog="examples: distmuon route llama-1b; distmuon route path/to/config.json --full; distmuon route "
        "my_package.models:make_model --json. Exit status: 0; 1 if a weight is undecided or Muon updates none; 2 for "
        "bad input.",
    )
    parser.add_argument("model", help=HELP)
    parser.add_argument("--full", action="store_true", help="a line for each parameter, also where many are alike")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    given = parser.parse_args(argv)
    try:
        named = find_model(given.model)
        table = make_table(named.model, named.routes, full=given.full, adjust_lr_fn=named.adjust_lr_fn)
    except (ValueError, OSError, ImportError) as error:
        print(f"distmuon route: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if given.json:
        shares = {rule: table.elements(rule) / table.elements() for rule in _LABELS}
        rows = [asdict(row) for row in table.rows]
        found = {"model": named.name, "elements": table.elements(), "shares": shares, "rows": rows}
        print(json.dumps(found | {"routes": table.paste if table.proposed else None}, indent=2))
    else:
        print(text(named.name, table))
    return int(bool(table.proposed) or not table.elements("muon"))


def text(name: str, table: Table) -> str:
    """The table as text: shares, a line for each row, and what to paste."""
    return "\n".join(_lines(name, table))


def _lines(name: str, table: Table) -> Iterator[str]:
    total = table.elements()
    yield f"{name}: {sum(row.count for row in table.rows):,} trainable parameters, {total:,} elements"
    for rule, label in _LABELS.items():
        rows = [row for row in table.rows if row.rule == rule]
        matrices = sum(row.count * len(row.matrices) for row in rows)
        counts = f"{sum(row.count for row in rows):,} parameters" + (f", {matrices:,} matrices" if matrices else "")
        yield f"{label:<6}{table.elements(rule) / total:>7.1%} of the elements: {table.elements(rule):,} in {counts}"
    yield ""
    cells = [("parameter", "count", "module", "shape", "matrices", "rule", "lr x", "why"), *map(_cells, table.rows)]
    widths = [max(len(cell[column]) for cell in cells) for column in range(7)]
    for cell in cells:
        yield "  ".join([*(f"{text:<{width}}" for text, width in zip(cell, widths)), cell[7]])
    yield ""
    yield "lr x: an orthogonal update is multiplied by this and the learning rate, AdamW's update by the latter alone"
    undecided = sum(row.count for row in table.rows if row.undecided)
    if table.proposed:
        yield ""
        yield f"? {undecided} weights are undecided, and DistMuon refuses the model. Check the rules, then paste:"
        yield f"    DistMuon(model, {table.paste})"
    if not table.elements("muon"):
        yield ""
        yield 'Muon updates no parameter; DistMuon(model, routes="adamw") uses AdamW on purpose.'


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.lr_factor
    factor = f"{low:.2f}" if low == high else f"{low:.2f}-{high:.2f}"
    name = f"? {row.parameter}" if row.undecided else row.parameter
    shape = "x".join(map(str, row.shape)) or "scalar"
    return (name, str(row.count), row.module or "-", shape, _matrices(row), _LABELS[row.rule], factor, row.why)


def _matrices(row: Row) -> str:
    """The matrices of a parameter, equal neighbours counted: "2 of 1024x2048"."""
    groups: list[tuple[tuple[int, int], int]] = []
    for shape in row.matrices:
        if groups and groups[-1][0] == shape:
            groups[-1] = (shape, groups[-1][1] + 1)
        else:
            groups.append((shape, 1))
    texts = [f"{m}x{n}" if count == 1 else f"{count} of {m}x{n}" for (m, n), count in groups]
    return " + ".join(texts[:3]) + (" + ..." if len(texts) > 3 else "") or "-"
