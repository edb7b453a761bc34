"""The rule that updates each parameter, and the logical matrices that a parameter holds.

This module decides by the user's routes first (first match wins), then by identity (parameters of an embedding or the
output head), by module type, by number of dimensions, and last by a few well-known names of raw parameters. A weight
that none of these decides raises: Muon is never guessed. The module knows shapes and names only; no rank, no bucket.

[Note: logical matrices] Newton-Schulz and the update's scale see logical matrices, not storage:
  (m, n) linear weight            one m x n matrix
  (E, m, n) stack of experts      E matrices
  (out, in, *kernel) convolution  one out x (in * prod(kernel)) matrix
  heads=n                         n matrices of equal size, cut in the same way
  split=[q, k, v]                 a fused weight cut along its rows (`split_dim=0`), one matrix a part; in a stack each
                                  slice is cut. `split_dim=1` cuts columns, for weights stored (in, out).
A matrix of rows is a contiguous range of its parameter, and that range is the unit that the layout places. Column
blocks are not contiguous: they form one unit, which is cut only when it is orthogonalized (`Unit.column_split`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from distmuon.errors import problem
from distmuon.layout.ends import ends
from distmuon.layout.layers import Structure, Use, read_module, read_pairs
from distmuon.options import NORMUON, OPTIONAL, Hyperparameters, Rule, checked_routes
from distmuon.options import Route as Route

_SMALL = 256  # elements; in a smaller matrix Newton-Schulz has nothing to balance, and each launch costs time


@dataclass(frozen=True, slots=True)
class Unit:
    """A range of a parameter that is orthogonalized together: `rows` x `columns` elements from `offset` on."""

    offset: int
    rows: int
    columns: int
    column_split: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def logical_shapes(self) -> tuple[tuple[int, int], ...]:
        """(m, n) of each matrix that Newton-Schulz sees."""
        return tuple((self.rows, n) for n in self.column_split) or ((self.rows, self.columns),)


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """A trainable parameter as the layout sees it. AdamW parameters have no units in `matrices`."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rule: Rule
    matrices: tuple[Unit, ...]
    reason: str
    options: tuple[tuple[str, object], ...] = ()
    stays: bool = False  # whether it keeps its memory, see [Note: parameters that stay] in memory.py
    copies: int = 1  # how many ranks of the model-parallel group hold it
    group: int = 0  # the process group that it is cut over, by `group_number`
    stored_in_out: bool = False  # whether a row of its matrices is an input, and not a neuron

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def has_columns_for_neurons(self) -> bool:
        """Whether a row of its matrices is no neuron."""
        return self.stored_in_out or any(unit.column_split for unit in self.matrices)

    @property
    def common_name(self) -> str:
        """The name on which all ranks must agree; ranks outside a route's group hold others in its place."""
        return self.fqn if self.group == 0 else f"(a parameter of the route's process group {self.group})"


Routed = list[tuple[ParamSpec, nn.Parameter]]


class UndecidedWeights(ValueError):
    """Weights that neither module type nor name decides; `routes` are those that the message proposes."""

    def __init__(self, text: str, routes: Sequence[Route] = ()) -> None:
        super().__init__(text)
        self.routes = tuple(routes)


def route(model: nn.Module | Iterable[tuple[str, nn.Parameter]], routes: Sequence[Route] | str | None = None) -> Routed:
    """Route every trainable parameter of `model` in registration order; a tied parameter counts once.

    `routes="adamw"` gives every parameter to AdamW on purpose. (name, parameter) pairs are routed by name and shape
    alone. Raises `ValueError` for a route that matches no parameter, for a split that does not fit, and for weights
    that cannot be decided (it names all of them, and the routes to add).
    """
    named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    for fqn, param in named:
        if is_lazy(param):
            raise problem(
                fqn, found="a lazy parameter without a shape", needed="shapes are needed", cure="run a forward first"
            )
    is_module = isinstance(model, nn.Module)
    defaults = _Defaults(read_module(model) if isinstance(model, nn.Module) else read_pairs(named), is_module)
    return _route(named, checked_routes(routes), defaults)


def _route(named: Sequence[tuple[str, nn.Parameter]], routes: Sequence[Route], defaults: _Defaults) -> Routed:
    chosen = {fqn: next((r for r in routes if fnmatchcase(fqn, r.pattern)), None) for fqn, _ in named}
    trained = [(fqn, param) for fqn, param in named if param.requires_grad and param.numel()]
    decided = defaults.decide([fqn for fqn, _ in trained], chosen)
    undecided = [(fqn, tuple(param.shape)) for fqn, param in trained if chosen[fqn] is None and decided[fqn] is None]
    if undecided:
        raise _undecided(undecided, named, routes, defaults)
    routed = []
    for fqn, param in trained:
        stated = chosen[fqn]
        by = stated or decided[fqn]
        assert by is not None
        shape = tuple(param.shape)
        matrices = _matrices(fqn, shape, by, defaults.is_convolution(fqn)) if by.rule == "muon" else ()
        reason = f"route {stated.pattern!r}" if stated else by.pattern
        options = tuple(sorted(by.options.items()))
        spec = ParamSpec(
            fqn,
            shape,
            param.dtype,
            by.rule,
            matrices,
            reason,
            options,
            copies=by.copies,
            stored_in_out=defaults.is_stored_in_out(fqn),
        )
        routed.append((spec, param))
    used = set(chosen.values())
    for unused in (r for r in routes if routed and r not in used):
        needed = "every route must match a parameter"
        raise problem(
            f"Route({unused.pattern!r})", found="matched no parameter", needed=needed, cure="correct the pattern"
        )
    return routed


def process_groups(routes: Sequence[Route] | str | None) -> list[Any]:
    """The process groups of `routes`, each once, in order."""
    found = [r.process_group for r in checked_routes(routes) if r.process_group is not None]
    return list({id(group): group for group in found}.values())


def group_number(fqn: str, routes: Sequence[Route] | str | None) -> int:
    """0 for a parameter or buffer of the optimizer's process group, 1 for that of the first of `process_groups`."""
    found = next((r.process_group for r in checked_routes(routes) if fnmatchcase(fqn, r.pattern)), None)
    return 0 if found is None else 1 + [id(group) for group in process_groups(routes)].index(id(found))


def route_params(params: nn.Module | Iterable[Any], routes: Sequence[Route] | str | None) -> Routed:
    """Route the `params` of an optimizer: a module, (fqn, parameter) pairs, or group dicts of pairs.

    A dict states its rule: ``{"params": [(fqn, parameter), ...], "rule": "muon" | "adamw", **group entries}``; with
    `routes="adamw"` the rule may be absent. If a route matches the same parameters, its options override the entries.
    """
    if isinstance(params, nn.Module):
        return _with_groups(_with_muon(route(params, routes), routes), routes)
    pairs: list[tuple[str, nn.Parameter]] = []
    stated: dict[str, Route] = {}
    for entry in params if isinstance(params, Iterable) else (params,):
        if isinstance(entry, Mapping):
            held = entry.get("params")
            named: list[Any] = list(held) if isinstance(held, Iterable) else [held]
            options = {key: value for key, value in entry.items() if key not in ("params", "rule")}
            rule = entry.get("rule", "adamw" if routes == "adamw" else "unstated")
            stated |= {pair[0]: Route(escape(pair[0]), rule, options=options) for pair in named if _is_pair(pair)}
        else:
            named = [entry]
        if not all(_is_pair(pair) for pair in named):
            raise problem(
                "params",
                found="parameters without names",
                needed="routing needs modules or names",
                cure="pass the model itself, or dicts of named parameters with a rule",
            )
        pairs += named
    seen: set[object] = set()
    for fqn, param in pairs:
        if seen & {fqn, id(param)}:
            raise problem(
                fqn,
                found="its name or parameter was given before",
                needed="each name and each parameter may appear once",
                cure="leave the second out",
            )
        seen |= {fqn, id(param)}
    given = checked_routes(routes)
    merged = [_merged_route(fqn, dict_route, given) for fqn, dict_route in stated.items()]
    # The given routes follow the merged routes, so that a route that matches no parameter is still an error.
    routed = route(pairs, [*merged, *_without_merged(given, stated, pairs)])
    return _with_groups(_with_muon(routed, routes), routes)


def _merged_route(fqn: str, dict_route: Route, routes: Sequence[Route]) -> Route:
    """Merge the route that a dict states for the parameter `fqn` with the first of `routes` that matches."""
    found = next((r for r in routes if fnmatchcase(fqn, r.pattern)), None)
    if found is None:
        return dict_route
    if found.rule != dict_route.rule:
        raise problem(
            fqn,
            found=f"its dict says rule {dict_route.rule!r} and Route({found.pattern!r}) says {found.rule!r}",
            needed="a single rule is needed",
            cure="correct the dict's rule or the routes",
        )
    return replace(found, pattern=dict_route.pattern, options={**dict_route.options, **found.options})


def _without_merged(
    routes: Sequence[Route], stated: Mapping[str, Route], pairs: Sequence[tuple[str, nn.Parameter]]
) -> list[Route]:
    """`routes` without those that were merged into dicts and match no other parameter."""
    first = {fqn: next((r for r in routes if fnmatchcase(fqn, r.pattern)), None) for fqn, _ in pairs}
    merged = {first[fqn] for fqn in stated}
    return [r for r in routes if r not in merged or any(first[fqn] is r for fqn in first if fqn not in stated)]


def _with_muon(routed: Routed, routes: Sequence[Route] | str | None) -> Routed:
    """Return `routed` if Muon updates some parameter, or if every parameter was given to AdamW by name.

    Raises otherwise, with the reason for each parameter.
    """
    if not routed:
        raise problem(
            "params",
            found="no trainable parameter",
            needed="at least one is needed",
            cure="unfreeze some parameters",
        )
    on_purpose = routes == "adamw" or all(spec.reason.startswith("route ") for spec, _ in routed)
    if not on_purpose and not any(spec.rule == "muon" for spec, _ in routed):
        reasons = ", ".join(f"{spec.fqn} ({spec.reason})" for spec, _ in routed[:20])
        cure = 'pass routes="adamw" to use AdamW on purpose'
        heads = [spec.fqn for spec, _ in routed if spec.reason.startswith(("output head", "input"))]
        if heads:
            cure += f', or give Muon a matrix: routes=[distmuon.Route({escape(heads[-1])!r}, "muon")]'
        raise problem(
            "params",
            found=f"none of {len(routed)} trainable parameters is updated by Muon",
            needed=f"at least one matrix is needed, found {reasons}",
            cure=cure,
        )
    return routed


def _with_groups(routed: Routed, routes: Sequence[Route] | str | None) -> Routed:
    """Return `routed` with the number of each parameter's process group."""
    if not process_groups(routes):
        return routed
    return [(replace(spec, group=group_number(spec.fqn, routes)), param) for spec, param in routed]


def make_groups(
    routed: Sequence[tuple[ParamSpec, nn.Parameter]], start: Hyperparameters
) -> tuple[list[dict[str, Any]], list[int]]:
    """(param groups of named parameters, one for each rule and set of route options; group index of each parameter)."""
    groups: dict[str, dict[str, Any]] = {}
    for spec, param in routed:
        key = _group_key(spec)
        known = start.group(spec.rule)
        for option, _ in spec.options:
            if (option not in known and option not in OPTIONAL[spec.rule]) or option == "rule":
                raise problem(
                    spec.fqn,
                    found=f"option {option!r} in its route",
                    needed=f"one of {', '.join(dict.fromkeys([*[*known][1:], *OPTIONAL[spec.rule]]))} is needed",
                    cure="correct the route's options",
                )
        group = groups.setdefault(key, {**known, **dict(spec.options), "params": []})
        if group.get(NORMUON) is not None and spec.has_columns_for_neurons:
            raise problem(
                spec.fqn,
                found=f"its matrices are stored (in, out) or cut by columns, and {NORMUON} is {group[NORMUON]}",
                needed="NorMuon normalizes rows, which must be neurons",
                cure=f'pass Route({spec.fqn!r}, "muon", options={{"{NORMUON}": None}}) for plain Muon',
            )
        group["params"].append((spec.fqn, param))
    keys = list(groups)
    return list(groups.values()), [keys.index(_group_key(spec)) for spec, _ in routed]


def _group_key(spec: ParamSpec) -> str:
    """Key of the group that `spec` belongs to."""
    # repr() of a tensor rounds; compare exact values.
    values = [(name, value.tolist() if isinstance(value, torch.Tensor) else value) for name, value in spec.options]
    return repr((spec.rule, values))


def _is_pair(entry: object) -> bool:
    pair = isinstance(entry, tuple) and len(entry) == 2 and all(map(isinstance, entry, (str, torch.Tensor)))
    return pair and entry[1].is_leaf  # type: ignore[index]


class _Defaults:
    """Default rules, from the kinds of the model's parameters and from the ends of the model."""

    def __init__(self, structure: Structure, is_module: bool) -> None:
        self.is_module = is_module
        self.ends = ends(structure)
        self.uses: dict[str, list[Use]] = {}
        for use in structure.uses:
            self.uses.setdefault(use.fqn, []).append(use)

    def is_convolution(self, fqn: str) -> bool:
        """Whether `fqn` is stored (out, in, *kernel), as is assumed of a pair with more than 3 dimensions."""
        uses = self.uses[fqn]
        is_filter = any(use.kind in ("convolution", "depthwise") for use in uses)
        return is_filter or (not self.is_module and len(uses[0].shape) > 3)

    def is_stored_in_out(self, fqn: str) -> bool:
        """Whether a row of the matrices of `fqn` is an input, as in transformers' Conv1D and its transposed experts."""
        return any(
            use.kind == "stored (in, out)"
            or isinstance(use.owner, nn.modules.conv._ConvTransposeNd)
            or (len(use.shape) == 3 and bool(getattr(use.owner, "is_transposed", False)))
            for use in self.uses[fqn]
        )

    def decide(self, trained: Sequence[str], chosen: Mapping[str, Route | None]) -> dict[str, Route | None]:
        """Decide the rule of each `trained` parameter that the user has not `chosen`; None if it cannot be decided.

        A decision is a `Route` whose pattern is the reason. If a model's only matrices are small, a first convolution
        or a last layer, Muon updates them: a default that excludes a few of many matrices must not exclude them all.
        The last layer of a frozen model is always AdamW's.
        """
        left = [fqn for fqn in trained if chosen[fqn] is None]
        by_user = any(route is not None and route.rule == "muon" for route in chosen.values())
        matrices = {use.fqn for uses in self.uses.values() for use in uses if use.is_matrix}
        is_whole = matrices.issubset(trained)
        found: dict[str, Route | None] = {}
        for spared in ((), ("small",), ("small", "input"), ("small", "input", "output")):
            if "output" in spared and not is_whole:
                break
            found = {fqn: self._default(fqn, spared) for fqn in left}
            if by_user or any(route is None or route.rule == "muon" for route in found.values()):
                break
        return found

    def _default(self, fqn: str, spared: Sequence[str]) -> Route | None:
        uses = self.uses[fqn]
        use = next((use for use in uses if use.is_matrix), uses[0])
        if len(use.shape) < 2:
            return Route("fewer than 2 dimensions", "adamw")
        if use.is_vector:
            return Route("vector: one dimension only is larger than 1", "adamw")
        for other in uses:  # a weight that is tied to an embedding follows the embedding
            if other.kind in ("embedding", "vector", "normalization"):
                return Route(other.reason, "adamw")
        kept = []
        end = self.ends.get(fqn)
        if end is not None and (end.is_certain or end.side not in spared):
            return Route(f"{'output head' if end.side == 'output' else 'input'}: {end.reason}", "adamw")
        if end is not None:
            kept.append(end.reason)
        if use.kind == "depthwise":
            return Route(use.reason, "adamw")
        if prod(use.shape) < _SMALL:
            if "small" not in spared or use.kind == "unknown":
                return Route(f"fewer than {_SMALL} elements", "adamw")
            kept.append(f"fewer than {_SMALL} elements")
        found = _matrix_route(use)
        if found is None or not kept:
            return found
        return replace(found, pattern=f"{found.pattern} ({', '.join(kept)}; the model has no other matrix)")


def _matrix_route(use: Use) -> Route | None:
    """The Muon route of a weight that holds matrices, with the parts that it fuses; None if they are not known."""
    rows, columns = use.shape[-2:]
    if use.kind == "unknown":
        return None
    if use.kind == "attention" and use.name == "in_proj_weight":
        return Route(use.reason, "muon", [rows // 3] * 3)
    if use.kind == "linear" and use.name == "in_proj_weight" and rows == 3 * columns:
        return Route(use.reason, "muon", [columns] * 3)
    if use.kind == "stored (in, out)" and use.path[-1:] == ("c_attn",) and columns == 3 * rows:
        return Route("fused attention projection stored (in, out)", "muon", [rows] * 3, split_dim=1)
    if use.kind == "recurrent":
        hidden = getattr(use.owner, "hidden_size", rows)
        gates = 1 if use.name.startswith("weight_hr") else rows // hidden
        return Route(use.reason, "muon", [hidden] * gates if gates > 1 else None)
    if use.kind == "fused experts":
        return _fused_experts(use)
    return Route(use.reason, "muon")


def _fused_experts(use: Use) -> Route | None:
    """Split gate and up as halves of the rows, (E, 2I, H), or of the columns, (E, H, 2I), if it is known which.

    Rows are split if the sibling `down_proj` has shape (E, H, I). Columns may hold halves or alternate; in transformers
    the module's `is_transposed` and `is_concatenated` tell which.
    """
    down = getattr(use.owner, "down_proj", None)
    if not isinstance(down, nn.Parameter) or down.ndim != 3 or not getattr(use.owner, "is_concatenated", True):
        return None
    _, rows, columns = use.shape
    shape = tuple(down.shape[1:])
    is_transposed = getattr(use.owner, "is_transposed", None)
    if shape == (columns, rows // 2) and not is_transposed:
        return Route(use.reason, "muon", [rows // 2] * 2)
    if shape == (columns // 2, rows) and is_transposed:
        return Route(f"{use.reason}, stored (in, out)", "muon", [columns // 2] * 2, split_dim=1)
    return None


def _undecided(
    undecided: Sequence[tuple[str, tuple[int, ...]]],
    named: Sequence[tuple[str, nn.Parameter]],
    routes: Sequence[Route],
    defaults: _Defaults,
) -> ValueError:
    """Make the error for undecided weights, with routes that can be pasted into the call."""
    groups = _patterns(undecided, [fqn for fqn, _ in named])
    texts = []
    for pattern, members in groups.items():
        fqn, shape = members[0]
        texts.append(f"{fqn} {shape}" + (f" and {len(members) - 1} more of {pattern}" if len(members) > 1 else ""))
    added: list[Route] = []
    for pattern, members in groups.items():
        rule: Rule = "muon" if len(members[0][1]) == 2 else "adamw"
        added.append(Route(pattern, rule))
    if not _has_muon(named, [*routes, *added], defaults):
        added = [replace(r, rule="muon") if len(m[0][1]) == 3 else r for r, m in zip(added, groups.values())]
    given = ["..."] if routes else []
    lines = ", ".join(given + [f"distmuon.Route({r.pattern!r}, {r.rule!r})" for r in added])
    cure = f"check and add routes=[{lines}]"
    if not _has_muon(named, [*routes, *added], defaults):
        cure = 'reshape them to matrices, or pass routes="adamw" to use AdamW on purpose'
    text = problem(
        ", ".join(texts),
        found=f"{len(undecided)} weights that neither module type nor name decides",
        needed="each weight needs a rule",
        cure=cure if defaults.is_module else f"pass the model itself, whose modules tell more, or {cure}",
    )
    return UndecidedWeights(str(text), added)


def _has_muon(named: Sequence[tuple[str, nn.Parameter]], routes: Sequence[Route], defaults: _Defaults) -> bool:
    return any(spec.rule == "muon" for spec, _ in _route(named, routes, defaults))


def _patterns(
    undecided: Sequence[tuple[str, tuple[int, ...]]], names: Sequence[str]
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Group `undecided` by patterns that match no other parameter; "*" replaces numbers where several names match."""
    by_pattern: dict[tuple[str, int], list[tuple[str, tuple[int, ...]]]] = {}
    for fqn, shape in undecided:
        open_ = ".".join("*" if part.isdigit() else escape(part) for part in fqn.split("."))
        by_pattern.setdefault((open_, len(shape)), []).append((fqn, shape))
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for (pattern, _), members in by_pattern.items():
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if len(members) > 1 and matched == {fqn for fqn, _ in members}:
            found[pattern] = members
        else:
            found |= {escape(fqn): [(fqn, shape)] for fqn, shape in members}
    return found


def _matrices(fqn: str, shape: tuple[int, ...], chosen: Route, is_conv: bool) -> tuple[Unit, ...]:
    """Cut a Muon parameter into units, see [Note: logical matrices]."""
    if len(shape) < 2 or 0 in shape:
        needed = "a matrix is needed (2 dimensions or more)"
        raise problem(fqn, found=f"shape {shape} was routed to muon", needed=needed, cure='route it to "adamw"')
    if is_conv:
        shape = (shape[0], prod(shape[1:]))
    if len(shape) > 3:
        raise problem(
            fqn,
            found=f"shape {shape} with {len(shape)} dimensions outside a convolution",
            needed="(m, n) or (E, m, n) is needed",
            cure='reshape the parameter or route it to "adamw"',
        )
    rows, columns = shape[-2:]
    size = (rows, columns)[chosen.split_dim]
    if chosen.heads is not None and size % chosen.heads:
        raise problem(
            fqn,
            found=f"heads={chosen.heads} along dimension {chosen.split_dim} of {(rows, columns)}",
            needed=f"a number of equal parts of {size} is needed",
            cure="correct the route's heads, or pass the sizes as split",
        )
    split = tuple(chosen.split or ()) if chosen.heads is None else (size // chosen.heads,) * chosen.heads
    if split and (sum(split) != size or min(split) < 1):
        raise problem(
            fqn,
            found=f"split={list(split)} sums to {sum(split)} along dimension {chosen.split_dim} of {(rows, columns)}",
            needed=f"parts >= 1 that sum to {size} are needed",
            cure="correct the route's split",
        )
    heights, column_split = (split or (rows,), ()) if chosen.split_dim == 0 else ((rows,), split)
    matrices, offset = [], 0
    for _ in range(prod(shape[:-2])):
        for height in heights:
            matrices.append(Unit(offset, height, columns, column_split))
            offset += height * columns
    return tuple(matrices)
