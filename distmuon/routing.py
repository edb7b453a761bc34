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
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from distmuon.config import Hyperparameters, Rule, checked_routes
from distmuon.config import Route as Route
from distmuon.errors import problem

_HEAD_NAMES = frozenset({"lm_head", "head", "classifier", "score", "embed_out", "output", "unembed", "fc"})
# Raw parameters of well-known models, (pattern, rule, number of equal parts their rows fuse).
_KNOWN_NAMES: tuple[tuple[str, Rule, int], ...] = (
    ("*.lora_[AB].*", "adamw", 1),  # peft: adapters are fine-tuned, where Muon's case is weak
    ("*.lora_embedding_[AB].*", "adamw", 1),
    ("*.lora_magnitude_vector.*", "adamw", 1),  # DoRA; (1, out, 1, 1) for a convolution
    ("*.trainable_tokens_delta.*", "adamw", 1),
    ("*.experts.gate_up_proj", "muon", 2),  # transformers: (E, 2I, H), gate and up fused
    ("*.experts.down_proj", "muon", 1),
    ("*.mlp.gate.weight", "muon", 1),  # routers: Moonlight trains them with Muon (arXiv 2502.16982, section 3.4)
    ("*.router.weight", "muon", 1),
)


@dataclass(frozen=True, slots=True)
class Matrix:
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
    matrices: tuple[Matrix, ...]
    reason: str
    options: tuple[tuple[str, object], ...] = ()
    stays: bool = False  # in its own memory, see [Note: parameters that stay] in memory.py

    @property
    def numel(self) -> int:
        return prod(self.shape)


Routed = list[tuple[ParamSpec, nn.Parameter]]


def route(model: nn.Module | Iterable[tuple[str, nn.Parameter]], routes: Sequence[Route] | str | None = None) -> Routed:
    """Route every trainable parameter of `model`, tied ones once, in registration order.

    `routes="adamw"` gives every parameter to AdamW on purpose. Raises `ValueError` for a route that matches nothing, a
    split that does not fit, and for weights that no rule decides (all of them named).
    """
    routes = checked_routes(routes)
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    owners = _owners(model) if isinstance(model, nn.Module) else {}
    heads = _head_weights(model) if isinstance(model, nn.Module) else set()

    routed, undecided = [], []
    used: set[Route | None] = set()
    for fqn, param in named:
        if is_lazy(param):
            raise problem(fqn, "a lazy parameter without a shape", "shapes are needed", "run one forward first")
        chosen = next((r for r in routes if fnmatchcase(fqn, r.pattern)), None)
        used.add(chosen)
        if not param.requires_grad or not param.numel():
            continue
        if chosen is None:
            chosen = _default_route(fqn, param, owners.get(id(param), []), id(param) in heads)
        if chosen is None:
            undecided.append(f"{fqn} {tuple(param.shape)}")
            continue
        is_conv = any(isinstance(m, nn.modules.conv._ConvNd) for m in owners.get(id(param), []))
        matrices = _matrices(fqn, tuple(param.shape), chosen, is_conv) if chosen.rule == "muon" else ()
        reason = f"route {chosen.pattern!r}" if chosen in routes else chosen.pattern
        options = tuple(sorted(chosen.options.items()))
        spec = ParamSpec(fqn, tuple(param.shape), param.dtype, chosen.rule, matrices, reason, options)
        routed.append((spec, param))
    if undecided:
        raise problem(
            ", ".join(undecided), f"{len(undecided)} weights that neither module type nor name decides",
            "each needs a rule", 'add routes=[distmuon.Route(pattern, "muon" or "adamw")] for them',
        )  # fmt: skip
    for unused in (r for r in routes if routed and r not in used):
        needed = "every route must decide one"
        raise problem(f"Route({unused.pattern!r})", "matched no parameter", needed, "correct the pattern")
    return routed


def route_params(params: nn.Module | Iterable[Any], routes: Sequence[Route] | str | None) -> Routed:
    """`route` for everything an optimizer may be given: a module, (fqn, parameter) pairs, or group dicts of pairs.

    A dict says its rule itself: ``{"params": [(fqn, parameter), ...], "rule": "muon" | "adamw", **group entries}``.
    """
    if isinstance(params, nn.Module):
        return _with_muon(route(params, routes), routes)
    pairs, stated = [], []
    for entry in params if isinstance(params, Iterable) else (params,):
        if isinstance(entry, Mapping):
            held = entry.get("params")
            named: list[Any] = list(held) if isinstance(held, Iterable) else [held]
            options = {key: value for key, value in entry.items() if key not in ("params", "rule")}
            rule = entry.get("rule", "unstated")
            stated += [Route(escape(pair[0]), rule, options=options) for pair in named if _is_pair(pair)]
        else:
            named = [entry]
        if not all(_is_pair(pair) for pair in named):
            raise problem(
                "params", "parameters without names", "routing needs modules or names",
                "pass the model itself, model.named_parameters(), or dicts of named parameters with a rule",
            )  # fmt: skip
        pairs += named
    seen: set[object] = set()
    for fqn, param in pairs:
        if seen & {fqn, id(param)}:
            raise problem(fqn, "its name or parameter was given before", "each is needed once", "leave the second out")
        seen |= {fqn, id(param)}
    return _with_muon(route(pairs, routes if isinstance(routes, str) else [*checked_routes(routes), *stated]), routes)


def _with_muon(routed: Routed, routes: Sequence[Route] | str | None) -> Routed:
    """`routed`, if some parameter is Muon's or none was meant to be; else raises with the reason of each."""
    if not routed:
        raise problem("params", "no trainable parameter", "one at least is needed", "unfreeze some")
    if routes != "adamw" and not any(spec.rule == "muon" for spec, _ in routed):
        reasons = ", ".join(f"{spec.fqn} ({spec.reason})" for spec, _ in routed[:20])
        raise problem(
            "params", f"none of {len(routed)} trainable parameters is updated by Muon",
            f"at least one matrix is needed, found {reasons}",
            'correct the routes, or say routes="adamw" to use AdamW on purpose',
        )  # fmt: skip
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
                    spec.fqn, f"option {option!r} in its route", f"one of {', '.join([*known][1:])} is needed",
                    "correct the route's options",
                )  # fmt: skip
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


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """id(parameter) -> the modules that hold it (several where it is tied)."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append(module)
    return owners


def _head_weights(model: nn.Module) -> set[int]:
    """ids of output-head weights: what the model itself names as its head, else linear layers outside the repeated
    blocks: those called like one, and the last if it maps to the vocabulary of the largest embedding. A head may be
    wrapped: peft trains a copy of it, `modules_to_save`."""
    own_head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(own_head, nn.Module):
        return {id(p) for p in own_head.parameters() if p.ndim > 1}
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=None)
    heads = set()
    last = None
    for name, module in model.named_modules():
        parts = name.split(".modules_to_save.")[0].split(".")
        if not isinstance(module, nn.Linear) or any(part.isdigit() for part in parts):
            continue
        last = module
        if parts[-1] in _HEAD_NAMES:
            heads.add(id(module.weight))
    if last is not None and last.out_features == vocabulary:
        heads.add(id(last.weight))
    return heads


def _default_route(fqn: str, param: nn.Parameter, owners: list[nn.Module], is_head: bool) -> Route | None:
    """The decision without the user, as a `Route` whose pattern is the reason; None where nothing decides."""
    if param.ndim < 2:
        return Route("fewer than 2 dimensions", "adamw")
    if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in owners):
        return Route("embedding (or tied to one)", "adamw")
    if is_head:
        return Route("output head", "adamw")
    if any(isinstance(m, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) for m in owners):
        return Route("normalization", "adamw")
    for pattern, rule, parts in _KNOWN_NAMES:
        if fnmatchcase(f".{fqn}", pattern):
            if parts > 1 and not _fuses_rows(param, owners):
                return None
            split = [param.shape[-2] // parts] * parts if parts > 1 else None
            return Route(f"known name {pattern}", rule, split)
    for module in owners:
        if isinstance(module, nn.modules.conv._ConvNd):
            if param.shape[1] == 1:
                return Route("depthwise convolution", "adamw")
            return Route("convolution", "muon")
        if isinstance(module, nn.Linear):
            return Route("linear", "muon")
        if isinstance(module, nn.MultiheadAttention):
            return Route("attention projection", "muon", [param.shape[0] // 3] * 3 if "in_proj" in fqn else None)
        if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
            width = param.shape[0]
            if fqn.endswith(".c_attn.weight") and param.shape[1] == 3 * width:  # GPT-2: q, k and v fused
                return Route("fused attention projection stored (in, out)", "muon", [width] * 3, split_dim=1)
            return Route("linear stored (in, out)", "muon")
    return None


def _fuses_rows(gate_up: nn.Parameter, owners: list[nn.Module]) -> bool:
    """Whether gate and up lie in the rows, (E, 2I, H), as the sibling `down_proj` (E, H, I) shows; some models store
    the transpose, or interleave the two."""
    down = getattr(owners[0], "down_proj", None) if owners else None
    if not isinstance(down, nn.Parameter) or gate_up.ndim != 3:
        return False
    count, rows, columns = gate_up.shape
    return tuple(down.shape) == (count, columns, rows // 2)


def _matrices(fqn: str, shape: tuple[int, ...], chosen: Route, is_conv: bool) -> tuple[Matrix, ...]:
    """Cut a Muon parameter into units, see [Note: logical matrices]."""
    if len(shape) < 2 or 0 in shape:
        needed = "a matrix is needed (2 dimensions or more)"
        raise problem(fqn, f"shape {shape} was routed to muon", needed, 'route it to "adamw"')
    if is_conv:
        shape = (shape[0], prod(shape[1:]))
    if len(shape) > 3:
        raise problem(
            fqn, f"shape {shape} with {len(shape)} dimensions outside a convolution", "(m, n) or (E, m, n) is needed",
            'reshape the parameter or route it to "adamw"',
        )  # fmt: skip
    rows, columns = shape[-2:]
    split = tuple(chosen.split or ())
    if split and (sum(split) != (rows, columns)[chosen.split_dim] or min(split) < 1):
        raise problem(
            fqn, f"split={list(split)} sums to {sum(split)} along dimension {chosen.split_dim} of {(rows, columns)}",
            f"parts >= 1 that sum to {(rows, columns)[chosen.split_dim]} are needed", "correct the route's split",
        )  # fmt: skip
    heights, column_split = (split or (rows,), ()) if chosen.split_dim == 0 else ((rows,), split)
    matrices, offset = [], 0
    for _ in range(prod(shape[:-2])):
        for height in heights:
            matrices.append(Matrix(offset, height, columns, column_split))
            offset += height * columns
    return tuple(matrices)
