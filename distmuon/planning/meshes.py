"""Cuts by FSDP2, HSDP and tensor parallelism: the boxes of all ranks, and what the cut itself moves and holds.

This module decides which weights tensor parallelism cuts, by name, and repeats what torch does: tensor parallelism cuts
first, then `fully_shard` cuts the rows that are left. It works on integers only; `counts.py` counts the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal, get_args

from distmuon.errors import problem
from distmuon.layout.boxes import Box
from distmuon.layout.given import rows_of
from distmuon.layout.routing import ParamSpec
from distmuon.options import one_of

Shard = Literal["zero1", "fsdp2", "hsdp"]
Cut = Literal["rows", "columns"]
Boxes = tuple[tuple[Box, ...], ...]  # of each parameter, by rank

# The modules that tensor parallelism cuts, by the last part of their names; all others are replicated. A weight stored
# (out, in) that is cut by rows is column-parallel: each rank computes some of the outputs. An embedding is cut by
# vocabulary.
TENSOR_PARALLEL: Mapping[Cut, tuple[str, ...]] = {
    "rows": (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj", "query_key_value", "Wqkv"),
        *("wq", "wk", "wv", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3"),
        *("embed_tokens", "tok_embeddings", "lm_head"),
    ),
    "columns": ("o_proj", "down_proj", "wo", "w2"),
}


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks in row-major order, (replicas, shards, tp): those of a tensor-parallel group are neighbours."""

    replicas: int
    shards: int
    tp: int

    @property
    def num_ranks(self) -> int:
        return self.replicas * self.shards * self.tp

    def coordinates(self) -> Iterator[tuple[int, int, int]]:
        """Yield (replica, shard, tensor-parallel rank) of each rank."""
        yield from product(range(self.replicas), range(self.shards), range(self.tp))


def mesh_of(shard: Shard, dp_size: int, replicas: int, tp: int) -> Mesh | None:
    """The mesh of `dp_size` data-parallel ranks times `tp`; None for ZeRO-1, where the optimizer cuts."""
    one_of("shard", shard, get_args(Shard))
    for name, value in (("replicas", replicas), ("tp", tp)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            needed = "a whole number from 1 on is needed"
            raise problem(name, found=f"found {value!r}", needed=needed, cure=f"correct {name}")
    if (replicas > 1) != (shard == "hsdp"):
        raise problem(
            "replicas",
            found=f"found {replicas} with shard {shard}",
            needed="hsdp needs at least 2, and the other shardings have no replicas",
            cure="set shard hsdp and replicas 2, or neither",
        )
    if shard == "zero1":
        if tp > 1:
            raise problem(
                "tp",
                found=f"found {tp} with shard zero1",
                needed="DistMuon takes tensor-parallel parameters as they are cut, with FSDP2's",
                cure="set shard fsdp2; with dp_size 1 that is tensor parallelism alone",
            )
        return None
    if dp_size % replicas:
        raise problem(
            "dp_size",
            found=f"found {dp_size} for {replicas} replicas",
            needed=f"a multiple of {replicas} is needed",
            cure="change dp_size or replicas",
        )
    return Mesh(replicas, dp_size // replicas, tp)


def cut_of(spec: ParamSpec) -> Cut | None:
    """How tensor parallelism cuts a parameter; None: every tensor-parallel rank holds all of it."""
    module = _module(spec)
    for cut, names in TENSOR_PARALLEL.items():
        if module in names and len(spec.shape) == 2:
            return cut
    return "rows" if module in TENSOR_PARALLEL["rows"] and len(spec.shape) == 1 else None  # a bias is cut like outputs


def _module(spec: ParamSpec) -> str:
    """The name of the module that holds a parameter, without the path to it."""
    return ("." + spec.fqn).split(".")[-2]


def cuts(specs: Iterable[ParamSpec]) -> dict[str, tuple[str, ...]]:
    """How tensor parallelism cuts this model: by kind of cut, the names of the modules."""
    found: dict[str, dict[str, None]] = {"rows": {}, "columns": {}, "replicated": {}}
    for spec in specs:
        found[cut_of(spec) or "replicated"][_module(spec)] = None
    return {kind: tuple(names) for kind, names in found.items()}


def boxes_of(specs: Sequence[ParamSpec], mesh: Mesh) -> Boxes:
    """The box of each parameter on each rank, as a DTensor of FSDP2 reports it."""
    found: dict[tuple[tuple[int, ...], Cut | None], tuple[Box, ...]] = {}
    for spec in specs:
        cut = cut_of(spec) if mesh.tp > 1 else None
        if (spec.shape, cut) not in found:
            _check(spec, cut, mesh)
            found[spec.shape, cut] = tuple(
                _box(spec.shape, cut, mesh, shard, tensor) for _, shard, tensor in mesh.coordinates()
            )
    return tuple(found[spec.shape, cut_of(spec) if mesh.tp > 1 else None] for spec in specs)


def _check(spec: ParamSpec, cut: Cut | None, mesh: Mesh) -> None:
    if not spec.shape:
        raise problem(
            spec.fqn,
            found="found a scalar",
            needed="fully_shard takes parameters of one dimension or more",
            cure="give it the shape (1,)",
        )
    if cut == "rows" and mesh.shards > 2 and spec.shape[0] % mesh.tp:
        raise problem(
            spec.fqn,
            found=f"found {spec.shape[0]} rows for tp {mesh.tp} and {mesh.shards} shards",
            needed=f"a multiple of {mesh.tp} rows is needed: of others torch's DTensor and FSDP2 do not place the same "
            "ones on a rank, and DistMuon refuses them",
            cure="pad the rows, or change tp",
        )


def _box(shape: tuple[int, ...], cut: Cut | None, mesh: Mesh, shard: int, tensor: int) -> Box:
    offsets, sizes = [0] * len(shape), [*shape]
    if cut is not None:
        dim = 0 if cut == "rows" else 1
        start, stop = rows_of(shape[dim], mesh.tp, tensor)
        offsets[dim], sizes[dim] = start, stop - start
    start, stop = rows_of(sizes[0], mesh.shards, shard)
    offsets[0], sizes[0] = offsets[0] + start, stop - start
    return tuple(offsets), tuple(sizes)


# ------------------------------------------------------------------------------------------- what FSDP2 itself does


@dataclass(frozen=True, slots=True)
class OwnWork:
    """What FSDP2 itself does in a step of one micro-batch, on the busiest rank.

    `fully_shard` holds each layer, and the model around the layers, with its defaults: after the forward it frees the
    parameters of the layers; the others stay, so that backward does not gather them.
    """

    sent_bytes: dict[str, int]  # around rings, by collective; messages have as many rows as the first rank holds
    unsharded_bytes: int  # estimate: whole parameters of two layers and of what is around them, and gradients of one


def own_work(specs: Sequence[ParamSpec], boxes: Boxes, mesh: Mesh, reduce_bytes: int) -> OwnWork:
    """What FSDP2 itself does. `reduce_bytes`: of an element in its reduction."""
    ranks = [_own_work(specs, [held[tensor] for held in boxes], mesh, reduce_bytes) for tensor in range(mesh.tp)]
    sent = {name: max(rank.sent_bytes[name] for rank in ranks) for name in ranks[0].sent_bytes}
    return OwnWork({name: n for name, n in sent.items() if n}, max(rank.unsharded_bytes for rank in ranks))


def _own_work(specs: Sequence[ParamSpec], first: Sequence[Box], mesh: Mesh, reduce_bytes: int) -> OwnWork:
    """Of a shard group whose first rank holds the boxes `first`."""
    parameters: dict[str, int] = {"": 0}  # of that rank, by layer; "": around the layers
    gradients: dict[str, int] = {"": 0}  # as they are reduced
    for spec, (_, sizes) in zip(specs, first):
        layer = _layer(spec)
        for found, itemsize in ((parameters, spec.dtype.itemsize), (gradients, reduce_bytes)):
            found[layer] = found.get(layer, 0) + prod(sizes) * itemsize
    ring, reduced = mesh.shards - 1, sum(gradients.values())
    sent = {
        "all_gather_forward": ring * sum(parameters.values()),
        "all_gather_backward": ring * (sum(parameters.values()) - parameters[""]),
        "reduce_scatter": ring * reduced,
        "all_reduce": 2 * (mesh.replicas - 1) * reduced // mesh.replicas,
    }
    layers = max((n for layer, n in parameters.items() if layer), default=0)
    computing = max(parameters[layer] + gradients[layer] for layer in parameters)
    return OwnWork(sent, mesh.shards * (parameters[""] + 2 * layers + computing))


def _layer(spec: ParamSpec) -> str:
    """The path to the numbered module that a parameter belongs to, such as "model.layers.3"; "" for the others."""
    parts = spec.fqn.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: number + 1])
