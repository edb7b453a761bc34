"""Where the shard lives: what a bucket, the verdict, state and checkpoints ask of this rank's part of the parameters.

Decides the seam only. `FlatStorage` (flat_storage.py) cuts the parameters itself and moves them into flat memory;
`GivenStorage` (given_storage.py) takes the shards that others have cut, where they are. A bucket cannot tell the two
apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distmuon.layout.layout import BucketSpec, Layout, Segment
from distmuon.math.codecs import MomentumCodec, momentum_codec
from distmuon.options import Options
from distmuon.step.grad_buffer import GradBuffer, Span

ROW_MOMENT = "row_exp_avg_sq"
"""The key of NorMuon's moments in the state of a parameter, (rows,) float32, whole on every rank."""
UNCUT = frozenset({"step", ROW_MOMENT})
"""The keys of state that is not cut with its parameter."""


def state_keys(rule: str, momentum: MomentumCodec) -> tuple[str, ...]:
    """The keys of a parameter's state under `rule`, without ``master``, which some parameters have in addition."""
    return ("exp_avg", "exp_avg_sq", "step") if rule == "adamw" else momentum.keys


@dataclass(slots=True)
class ShardPiece:
    """A segment of this rank, or a run of them, see `runs_of`: a view of the gradient shard, and its optimizer state
    (keys as in torch.optim).

    The codec decides the format of momentum: int8 also has scales, ``momentum_scale``, and formats of fewer than 32
    bits count their roundings, ``step``; see [Note: dither] in math/codecs.py.
    """

    segment: Segment
    grad: Tensor  # (length,) float32: the averaged gradient once reduced
    state: dict[str, Tensor] = field(default_factory=dict)

    def cut(self, shard: Tensor) -> Tensor:
        """This piece's elements of a (shard_size,) tensor, a view."""
        return shard[self.segment.shard_offset : self.segment.shard_offset + self.segment.length]


def runs_of(segments: Sequence[Segment], layout: Layout, block: int) -> list[Segment]:
    """`segments` of a rank, in order, with neighbours joined: whole matrices of one shape, one after another in their
    parameter and in the shard (experts in a stack). So a line of the algorithm runs once for all of them.

    Matrices that several ranks hold stay apart, since another of them may be the worker. `block`: a matrix whose
    elements it does not divide stays apart.
    """
    found: list[Segment] = []
    held_once = {p for p in {s.param for s in segments} if not any(s.replica for s in layout.segments_of[p])}
    for segment in segments:
        last = found[-1] if found and segment.param in held_once else None
        if last is not None and _continues(last, segment, layout, block):
            found[-1] = replace(last, length=last.length + segment.length)
        else:
            found.append(segment)
    return found


def _continues(last: Segment, segment: Segment, layout: Layout, block: int) -> bool:
    if (last.param, last.rank) != (segment.param, segment.rank) or segment.stride or last.stride:
        return False
    if layout.specs[segment.param].rule != "muon":
        return False
    first, unit = layout.unit_of(last), layout.unit_of(segment)
    alike = (first.rows, first.columns, first.column_split) == (unit.rows, unit.columns, unit.column_split)
    whole = segment.length == unit.numel and last.param_offset == first.offset and not last.length % unit.numel
    neighbours = segment.param_offset - last.param_offset == segment.shard_offset - last.shard_offset == last.length
    return alike and whole and neighbours and not unit.numel % block


Masters = Callable[[ShardPiece], Tensor]  # (length,) float32: the master of a piece, to read and write


@dataclass(frozen=True, slots=True)
class Reduction:
    """The memory of a reduce-scatter: `buffer` holds each parameter at its `spans`, `shard` (shard_size,) float32
    takes this rank's mean."""

    buffer: GradBuffer
    spans: dict[int, list[Span]]
    shard: Tensor


def elements_of(flat: Tensor, segment: Segment, base: int = 0) -> Tensor:
    """The elements of `segment` in `flat`, which holds its parameter from element `base` on. A view: (length,), or
    (runs, run) if the segment is columns of a matrix."""
    start = segment.param_offset - base
    if not segment.stride:
        return flat[start : start + segment.length]
    runs = segment.length // segment.run
    return flat.as_strided((runs, segment.run), (segment.stride, 1), flat.storage_offset() + start)


class BucketStorage(Protocol):
    """One bucket's tensors on this rank. `muon` and `adamw`: its pieces by rule."""

    spec: BucketSpec
    label: str
    momentum: MomentumCodec
    muon: list[ShardPiece]
    adamw: list[ShardPiece]
    reduction: Reduction | None
    """None where gradients stay in `param.grad`, averaged."""

    def averaged(self, *, replicas: bool = False) -> list[Tensor]:
        """The averaged gradient of this rank's shard, flat, each element once.

        Elements that several ranks hold are those of the first of them; with `replicas` the others' instead.
        """

    def given_grads(self) -> list[Tensor]:
        """The memory of what stands in `param.grad`: the tensors whose versions say that somebody wrote."""

    def read_grads(self) -> None:
        """The pieces' gradients from what stands in `param.grad`, averaged; None counts as zeros."""

    def let_go_of_grads(self) -> None:
        """The step is over: hold no memory of what `read_grads` found."""

    def scale_grads(self, coefficient: Tensor) -> None:
        """Multiply the averaged gradients by a 0-dim tensor, also where the user sees them."""

    @property
    def has_master(self) -> bool:
        """Whether masters are kept beside the parameters."""

    def masters(self) -> AbstractContextManager[Masters]:
        """Give access to the masters by piece; at the end the parameters are rounded from them."""

    def decoded_masters(self) -> Tensor:
        """The masters (shard_size,) float32, each piece at its `shard_offset`, for reading only."""

    def param_of(self, piece: ShardPiece) -> Tensor:
        """(length,): the parameter's elements, a view."""

    def master_of(self, piece: ShardPiece) -> Tensor:
        """The master of a piece, (length,) float32; a view if it is kept as float32."""

    def kept_of(self, piece: ShardPiece) -> Tensor | None:
        """(length,): what the master codec keeps beside the parameter, a view."""

    def write_master(self, piece: ShardPiece, value: Tensor) -> None:
        """Write `value`, (length,) of any dtype and device, to the master of a piece; round its parameter from it."""

    def check_in_place(self, index: int) -> None:
        """Raise if parameter `index` no longer lies where it was put, or has another dtype."""

    def absorb_external_writes(self) -> None:
        """Write externally changed elements into the masters; see [Note: external writes] in flat_storage.py."""

    def shown(self, index: int, views: Sequence[Tensor]) -> Any:
        """What `optimizer.state` has of parameter `index` for one key: the same memory as `views`, in order."""

    def as_shown(self, index: int, value: Tensor) -> Tensor | None:
        """The plain elements of what a user has put in the place of something `shown`; None for what cannot be it."""

    @property
    def state_bytes(self) -> int:
        """The bytes of optimizer state on this rank: masters that are not the parameter itself, momentum, moments."""


def joined(views: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """The views as one tensor if they follow one another in memory, else as they are."""
    first, end = views[0], views[0].data_ptr()
    for view in views:
        if view.data_ptr() != end:
            return tuple(views)
        end += view.nbytes
    return first.as_strided((sum(view.numel() for view in views),), (1,), first.storage_offset())


class Storage:
    """The storage of all buckets, and what `optimizer.state` has of it."""

    def __init__(
        self,
        layout: Layout,
        params: Sequence[nn.Parameter],
        dp_rank: int,
        options: Options,
        buckets: Sequence[BucketStorage],
        normuon: Collection[int] = (),
    ) -> None:
        """`normuon`: the parameters whose updates are normalized by rows."""
        self.layout = layout
        self.params = params
        self.dp_rank = dp_rank
        self.options = options
        self.device = params[0].device
        self.momentum = momentum_codec(options.precision.momentum)
        self.buckets = list(buckets)
        rows = {index: sum(unit.rows for unit in layout.specs[index].matrices) for index in sorted(normuon)}
        self.row_moments = {
            index: torch.zeros(size, dtype=torch.float32, device=self.device) for index, size in rows.items()
        }
        """By parameter, see row_moments.py."""

    def keys_of(self, index: int) -> tuple[str, ...]:
        """The keys of the state of parameter `index`, without ``master``."""
        of_rule = state_keys(self.layout.specs[index].rule, self.momentum)
        return (*of_rule, ROW_MOMENT) if index in self.row_moments else of_rule

    @torch.no_grad()
    def absorb_external_writes(self) -> None:
        """Refuse moved parameters and write external changes into the masters."""
        for bucket in self.buckets:
            for index in bucket.spec.params:
                bucket.check_in_place(index)
        for bucket in self.buckets:
            bucket.absorb_external_writes()

    @property
    def state_bytes(self) -> int:
        """The bytes of optimizer state on this rank."""
        rows = sum(moment.nbytes for moment in self.row_moments.values())
        return rows + sum(bucket.state_bytes for bucket in self.buckets)
