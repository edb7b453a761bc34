"""Which rule updates which parameter, and which logical matrices a parameter holds.

Decides by the user's routes first (first match wins), then by identity (what an embedding or the output head holds),
by module type, by number of dimensions, and last by a few well-known names of raw parameters. A weight that none of
these decides raises: Muon is never guessed. Knows shapes and names only; no rank, no bucket.

[Note: logical matrices] Newton-Schulz and the update's scale see logical matrices, not storage:
  (m, n) linear weight            one m x n matrix
  (E, m, n) stack of experts      E matrices
  (out, in, *kernel) convolution  one out x (in * prod(kernel)) matrix
  split=[q, k, v]                 a fused weight cut along its rows (`split_dim=0`), one matrix a part; in a stack each
                                  slice is cut. `split_dim=1` cuts columns, for weights stored (in, out).
A matrix of rows is a contiguous range of its parameter, and that range is the unit the layout places. Column blocks
are not contiguous: they stay one unit and are told apart only when it is orthogonalized (`Matrix.column_split`).
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
from distmuon.layout.layers import Read, Use, read_module, read_pairs
from distmuon.options import Hyperparameters, Rule, checked_routes
from distmuon.options import Route as Route

_SMALL = 256  # elements; Newton-Schulz has nothing to balance in a smaller matrix, and costs a launch


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit that travels whole: `rows` x `columns` elements from `offset` on in its parameter."""

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
    """One trainable parameter as the layout sees it. AdamW parameters have no matrices."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rule: Rule
    matrices: tuple[Unit, ...]
    reason: str
    options: tuple[tuple[str, object], ...] = ()
    stays: bool = False  # in its own memory, see [Note: parameters that stay] in memory.py

    @property
    def numel(self) -> int:
        return prod(self.shape)


Routed = list[tuple[ParamSpec, nn.Parameter]]


def route(model: nn.Module | Iterable[tuple[str, nn.Parameter]], routes: Sequence[Route] | str | None = None) -> Routed:
    """Route every trainable parameter of `model`, tied ones once, in registration order.

    `routes="adamw"` gives every parameter to AdamW on purpose. Of (name, parameter) pairs only names and shapes are
    known. Raises `ValueError` for a route that matches nothing, a split that does not fit, and for weights that nothing
    decides (all of them named, with the routes to add).
    """
    named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    for fqn, param in named:
        if is_lazy(param):
            raise problem(
                fqn, found="a lazy parameter without a shape", needed="shapes are needed", cure="run one forward first"
            )
    is_module = isinstance(model, nn.Module)
    plan = _Plan(read_module(model) if isinstance(model, nn.Module) else read_pairs(named), is_module)
    return _route(named, checked_routes(routes), plan)


def _route(named: Sequence[tuple[str, nn.Parameter]], routes: Sequence[Route], plan: _Plan) -> Routed:
    chosen = {fqn: next((r for r in routes if fnmatchcase(fqn, r.pattern)), None) for fqn, _ in named}
    trained = [(fqn, param) for fqn, param in named if param.requires_grad and param.numel()]
    decided = plan.decide([fqn for fqn, _ in trained], chosen)
    undecided = [(fqn, tuple(param.shape)) for fqn, param in trained if chosen[fqn] is None and decided[fqn] is None]
    if undecided:
        raise _undecided(undecided, named, routes, plan)
    routed = []
    for fqn, param in trained:
        stated = chosen[fqn]
        by = stated or decided[fqn]
        assert by is not None
        shape = tuple(param.shape)
        matrices = _matrices(fqn, shape, by, plan.is_convolution(fqn)) if by.rule == "muon" else ()
        reason = f"route {stated.pattern!r}" if stated else by.pattern
        spec = ParamSpec(fqn, shape, param.dtype, by.rule, matrices, reason, tuple(sorted(by.options.items())))
        routed.append((spec, param))
    used = set(chosen.values())
    for unused in (r for r in routes if routed and r not in used):
        needed = "every route must decide one"
        raise problem(
            f"Route({unused.pattern!r})", found="matched no parameter", needed=needed, cure="correct the pattern"
        )
    return routed


def route_params(params: nn.Module | Iterable[Any], routes: Sequence[Route] | str | None) -> Routed:
    """`route` for everything an optimizer may be given: a module, (fqn, parameter) pairs, or group dicts of pairs.

    A dict says its rule itself: ``{"params": [(fqn, parameter), ...], "rule": "muon" | "adamw", **group entries}``;
    with `routes="adamw"` it need not. Its entries hold beside a route for the same parameters, whose own go first.
    """
    if isinstance(params, nn.Module):
        return _with_muon(route(params, routes), routes)
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
                needed="each is needed once",
                cure="leave the second out",
            )
        seen |= {fqn, id(param)}
    given = checked_routes(routes)
    both = [_both(fqn, own, given) for fqn, own in stated.items()]
    # The routes themselves stay behind what they were merged with, so that one that matches nothing is still an error.
    return _with_muon(route(pairs, [*both, *_used_by_dicts(given, stated, pairs)]), routes)


def _both(fqn: str, own: Route, routes: Sequence[Route]) -> Route:
    """What a dict and the first route that matches say together of the parameter `fqn`."""
    found = next((r for r in routes if fnmatchcase(fqn, r.pattern)), None)
    if found is None:
        return own
    if found.rule != own.rule:
        raise problem(
            fqn,
            found=f"its dict says rule {own.rule!r} and Route({found.pattern!r}) says {found.rule!r}",
            needed="one rule is needed",
            cure="correct the dict's rule or the routes",
        )
    return replace(found, pattern=own.pattern, options={**own.options, **found.options})


def _used_by_dicts(
    routes: Sequence[Route], stated: Mapping[str, Route], pairs: Sequence[tuple[str, nn.Parameter]]
) -> list[Route]:
    """`routes` without those that were merged into dicts and decide nothing else."""
    first = {fqn: next((r for r in routes if fnmatchcase(fqn, r.pattern)), None) for fqn, _ in pairs}
    merged = {first[fqn] for fqn in stated}
    return [r for r in routes if r not in merged or any(first[fqn] is r for fqn in first if fqn not in stated)]


def _with_muon(routed: Routed, routes: Sequence[Route] | str | None) -> Routed:
    """`routed`, if some parameter is Muon's or none was meant to be: every one of them was given to AdamW by name.

    Raises otherwise, with the reason of each.
    """
    if not routed:
        raise problem("params", found="no trainable parameter", needed="one at least is needed", cure="unfreeze some")
    on_purpose = routes == "adamw" or all(spec.reason.startswith("route ") for spec, _ in routed)
    if not on_purpose and not any(spec.rule == "muon" for spec, _ in routed):
        reasons = ", ".join(f"{spec.fqn} ({spec.reason})" for spec, _ in routed[:20])
        cure = 'say routes="adamw" to use AdamW on purpose'
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


def make_groups(
    routed: Sequence[tuple[ParamSpec, nn.Parameter]], start: Hyperparameters
) -> tuple[list[dict[str, Any]], list[int]]:
    """(param groups with named parameters, one a rule and set of route options; per parameter its group's number)."""
    groups: dict[str, dict[str, Any]] = {}
    for spec, param in routed:
        key = _group_key(spec)
        known = start.group(spec.rule)
        for option, _ in spec.options:
            if option not in known or option == "rule":
                raise problem(
                    spec.fqn,
                    found=f"option {option!r} in its route",
                    needed=f"one of {', '.join([*known][1:])} is needed",
                    cure="correct the route's options",
                )
        group = groups.setdefault(key, {**known, **dict(spec.options), "params": []})
        group["params"].append((spec.fqn, param))
    keys = list(groups)
    return list(groups.values()), [keys.index(_group_key(spec)) for spec, _ in routed]


def _group_key(spec: ParamSpec) -> str:
    """Parameters with the same one share a group. Tensors print rounded."""
    numbers = [(name, value.tolist() if isinstance(value, torch.Tensor) else value) for name, value in spec.options]
    return repr((spec.rule, numbers))


def _is_pair(entry: object) -> bool:
    pair = isinstance(entry, tuple) and len(entry) == 2 and all(map(isinstance, entry, (str, torch.Tensor)))
    return pair and entry[1].is_leaf  # type: ignore[index]


class _Plan:
    """What is decided without the user, from what the model's parameters are and where it begins and ends."""

    def __init__(self, read: Read, is_module: bool) -> None:
        self.is_module = is_module
        self.ends = ends(read)
        self.uses: dict[str, list[Use]] = {}
        for use in read.uses:
            self.uses.setdefault(use.fqn, []).append(use)

    def is_convolution(self, fqn: str) -> bool:
        """Whether `fqn` is stored (out, in, *kernel); of a pair with more than 3 dimensions nothing else is known."""
        uses = self.uses[fqn]
        is_filter = any(use.kind in ("convolution", "depthwise") for use in uses)
        return is_filter or (not self.is_module and len(uses[0].shape) > 3)

    def decide(self, trained: Sequence[str], chosen: Mapping[str, Route | None]) -> dict[str, Route | None]:
        """The rule of each of `trained` that the user has not `chosen`, as a `Route` whose pattern is the reason; None
        where nothing decides.

        A model whose only matrices are small, or a first convolution, or a last layer keeps these for Muon: a rule that
        is to spare a few of many matrices must not take them all. The last layer of a frozen model stays AdamW's.
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
        for place in uses:  # what is tied to an embedding follows it
            if place.kind in ("embedding", "vector", "normalization"):
                return Route(place.reason, "adamw")
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
    """Muon for what is a matrix or several, with the parts it fuses."""
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
    """Gate and up as halves of the rows, (E, 2I, H), or of the columns, (E, H, 2I), if it is known which.

    The sibling `down_proj` shows the rows, whose shape (E, H, I) it has then. Columns may hold halves or alternate; in
    transformers the module says which by `is_transposed` and `is_concatenated`.
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
    plan: _Plan,
) -> ValueError:
    """The error for weights that nothing decides, with routes that are accepted when they are pasted."""
    groups = _patterns(undecided, [fqn for fqn, _ in named])
    texts = []
    for pattern, members in groups.items():
        fqn, shape = members[0]
        texts.append(f"{fqn} {shape}" + (f" and {len(members) - 1} more of {pattern}" if len(members) > 1 else ""))
    added: list[Route] = []
    for pattern, members in groups.items():
        rule: Rule = "muon" if len(members[0][1]) == 2 else "adamw"
        added.append(Route(pattern, rule))
    if not _has_muon(named, [*routes, *added], plan):
        added = [replace(r, rule="muon") if len(m[0][1]) == 3 else r for r, m in zip(added, groups.values())]
    given = ["..."] if routes else []
    lines = ", ".join(given + [f"distmuon.Route({r.pattern!r}, {r.rule!r})" for r in added])
    cure = f"check and add routes=[{lines}]"
    if not _has_muon(named, [*routes, *added], plan):
        cure = 'reshape them to matrices, or say routes="adamw" to use AdamW on purpose'
    return problem(
        ", ".join(texts),
        found=f"{len(undecided)} weights that neither module type nor name decides",
        needed="each needs a rule",
        cure=cure if plan.is_module else f"pass the model itself, whose modules say more, or {cure}",
    )


def _has_muon(named: Sequence[tuple[str, nn.Parameter]], routes: Sequence[Route], plan: _Plan) -> bool:
    return any(spec.rule == "muon" for spec, _ in _route(named, routes, plan))


def _patterns(
    undecided: Sequence[tuple[str, tuple[int, ...]]], names: Sequence[str]
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """`undecided` by patterns that match them and no other parameter; numbers are left open where several are alike."""
    alike: dict[tuple[str, int], list[tuple[str, tuple[int, ...]]]] = {}
    for fqn, shape in undecided:
        open_ = ".".join("*" if part.isdigit() else escape(part) for part in fqn.split("."))
        alike.setdefault((open_, len(shape)), []).append((fqn, shape))
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for (pattern, _), members in alike.items():
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
    split = tuple(chosen.split or ())
    if split and (sum(split) != (rows, columns)[chosen.split_dim] or min(split) < 1):
        raise problem(
            fqn,
            found=f"split={list(split)} sums to {sum(split)} along dimension {chosen.split_dim} of {(rows, columns)}",
            needed=f"parts >= 1 that sum to {(rows, columns)[chosen.split_dim]} are needed",
            cure="correct the route's split",
        )
    heights, column_split = (split or (rows,), ()) if chosen.split_dim == 0 else ((rows,), split)
    matrices, offset = [], 0
    for _ in range(prod(shape[:-2])):
        for height in heights:
            matrices.append(Unit(offset, height, columns, column_split))
            offset += height * columns
    return tuple(matrices)
