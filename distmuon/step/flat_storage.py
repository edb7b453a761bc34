"""The tensors of one bucket in flat memory of our own: parameter and gradient buffers, and this rank's shard state.

This module decides storage only; it cuts every view, and padding is not visible outside. It knows no collective and no
formula. A parameter that is contiguous in its bucket becomes a view of the flat buffer, so that the all-gather writes
directly into it. Any other parameter is staged: it keeps its storage and is copied out after the all-gather
(`stage_out`). So is a parameter that must keep its memory and its strides (layout/memory.py,
[Note: parameters that stay]). Flat buffers hold all elements in row-major order.

[Note: external writes] `load_state_dict`, an EMA swap or `p.data` may write parameters between steps. Before a step
`absorb_external_writes` compares this rank's part of each parameter with the values that the optimizer left there: an
element that differs is written into the master; any other element keeps its full precision. A parameter with new
storage raises.

[Note: written while in flight] A value written between `step` and the arrival of the all-gather would be overwritten on
some ranks. `note_sent` and `note_arrived` delimit that time: a parameter whose `_version` changed in it raises.
`note_arrived` then increments the version, so that autograd refuses a graph that saved the weight before it arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.errors import names, problem
from distmuon.layout import memory
from distmuon.layout.boxes import boxes
from distmuon.layout.layout import BucketSpec, Layout, Segment
from distmuon.math.codecs import master_codec, momentum_codec
from distmuon.options import Options
from distmuon.step.grad_buffer import GradBuffer, Span
from distmuon.step.storage import Masters, Reduction, ShardPiece, joined, runs_of, state_keys


class FlatStorage:
    """A bucket's tensors on this rank, in distmuon's flat memory.

    `param_flat` (dp_size * shard_size,) has `param_shard` as this rank's slice. `kept_master` (shard_size,) is what the
    master codec keeps beside it. `grad_buffer` is None if gradients stay in `param.grad`. `grad_shard` (shard_size,)
    is float32, a slice of that buffer if it is float32 and stays. `muon` and `adamw` are this rank's pieces by rule.
    """

    def __init__(
        self, spec: BucketSpec, layout: Layout, params: Sequence[nn.Parameter], dp_rank: int, options: Options
    ) -> None:
        self.spec = spec
        self._layout = layout
        self._params = params
        self._options = options
        self.label = f"bucket {spec.index} ({names([layout.specs[index].fqn for index in spec.params], 3)})"
        device, numel = params[spec.params[0]].device, spec.dp_size * spec.shard_size
        own = slice(dp_rank * spec.shard_size, (dp_rank + 1) * spec.shard_size)
        self._move_params_in(numel, device, dp_rank)
        self.param_shard = self.param_flat[own]
        self._make_grads(numel, device, own)
        self.momentum = momentum_codec(options.precision.momentum)
        self._master_codec = master_codec(spec.dtype, options.precision.master)
        self.kept_master = self._master_codec.make(self.param_shard)
        self._make_pieces(dp_rank, device)
        self._homes = {i: params[i].data for i in spec.params}  # sees a move of the whole storage, too
        self._versions = {i: params[i]._version for i in spec.params}
        spans = {i: self._spans(i) for i in spec.params}
        buffer = self.grad_buffer
        self.reduction = None if buffer is None else Reduction(buffer, spans, self.grad_shard)

    # ------------------------------------------------------------------------------------------------- construction

    def _move_params_in(self, numel: int, device: torch.device, dp_rank: int) -> None:
        """Make the flat parameter buffer, and the (flat, own) parts of staged parameters.

        `staged` has the parts that lie in other ranks' shards, `staged_here` those in this rank's shard.
        """
        self.param_flat = torch.zeros(numel, dtype=self.spec.dtype, device=device)
        memory.note_flat(self.param_flat)
        self.staged: list[tuple[Tensor, Tensor]] = []
        self.staged_here: list[tuple[Tensor, Tensor]] = []
        for index in self.spec.params:
            for segment, flat, elements in self._move_in(index):
                (self.staged_here if segment.rank == dp_rank else self.staged).append((flat, elements))

    @torch.no_grad()
    def _move_in(self, index: int) -> list[tuple[Segment, Tensor, Tensor]]:
        """Copy parameter `index` into the flat buffer and make it a view; if staged, return (segment, flat, own)."""
        param, layout = self._params[index], self._layout
        elements = param.detach().reshape(-1)
        pairs: list[tuple[Segment, Tensor]] = []
        for segment in layout.segments_of[index]:
            start = segment.rank * self.spec.shard_size + segment.shard_offset
            flat = self.param_flat[start : start + segment.length]
            flat.copy_(elements[segment.param_offset : segment.param_offset + segment.length])
            pairs.append((segment, flat))
        if not layout.is_staged(index):
            start_or_none = layout.contiguous_start(index)
            assert start_or_none is not None
            # The strides of dimensions of size 1 have no effect, but kernels and users may read them.
            param.data = self.param_flat.as_strided(param.shape, param.stride(), start_or_none)
            return []
        if not layout.specs[index].stays and memory.is_in_flat(param):
            param.data = param.data.clone()  # leaves an older optimizer's buffer, which can then be freed
        return [(s, *pair) for s, flat in pairs for pair in _matching_views(flat, param.data, s.param_offset)]

    def _make_grads(self, numel: int, device: torch.device, own: slice) -> None:
        released, dtype = self._options.sharding.release_grads, self._options.precision.reduce
        self.grad_buffer = (
            None
            if self._options.grads_stay(self._layout.dp_size)
            else GradBuffer(numel, self.spec.dp_size, dtype, device, released=released)
        )
        flat = self.grad_buffer.flat if self.grad_buffer is not None else None
        in_flat = flat is not None and flat.dtype == torch.float32
        self.grad_shard = (
            flat[own] if flat is not None and in_flat else torch.zeros_like(self.param_shard, dtype=torch.float32)
        )

    def _make_pieces(self, dp_rank: int, device: torch.device) -> None:
        segments = [segment for segment in self.spec.segments if segment.rank == dp_rank]
        pieces = [ShardPiece(run, self.grad_shard) for run in runs_of(segments, self._layout, self.momentum.block)]
        for piece in pieces:
            piece.grad = piece.cut(self.grad_shard)
        self.muon = [piece for piece in pieces if self._layout.specs[piece.segment.param].rule == "muon"]
        self.adamw = [piece for piece in pieces if self._layout.specs[piece.segment.param].rule == "adamw"]
        for key in self.momentum.entries(0):
            entries = [self.momentum.entries(piece.segment.length)[key] for piece in self.muon]
            _allocate_state(self.muon, key, entries, device)
        for key in ("exp_avg", "exp_avg_sq"):
            _allocate_state(self.adamw, key, [(piece.segment.length, torch.float32) for piece in self.adamw], device)
        for piece in self.muon + self.adamw:
            if "step" in state_keys(self._layout.specs[piece.segment.param].rule, self.momentum):
                piece.state["step"] = torch.zeros((), dtype=torch.float32, device=device)

    def _spans(self, index: int) -> list[Span]:
        """The places of parameter `index`'s gradient in the flat buffer."""
        start = self._layout.contiguous_start(index)
        if start is not None:
            return [Span(start, 0, self._params[index].numel())]
        size = self.spec.shard_size
        segments = self._layout.segments_of[index]
        return [Span(s.rank * size + s.shard_offset, s.param_offset, s.length) for s in segments]

    # --------------------------------------------------------------------------------------------------- gradients

    def averaged(self, *, replicas: bool = False) -> list[Tensor]:
        return [] if replicas else [self.grad_shard]

    def given_grads(self) -> list[Tensor]:
        return [grad for index in self.spec.params if (grad := self._params[index].grad) is not None]

    def read_grads(self) -> None:
        for piece in self.muon + self.adamw:
            grad, offset = self._params[piece.segment.param].grad, piece.segment.param_offset
            if grad is None:
                piece.grad.zero_()
            else:
                piece.grad.copy_(grad.reshape(-1)[offset : offset + piece.segment.length])

    def let_go_of_grads(self) -> None:
        """What was read is a copy."""

    def scale_grads(self, coefficient: Tensor) -> None:
        self.grad_shard.mul_(coefficient)
        for grad in self.given_grads() if self.grad_buffer is None else ():
            grad.mul_(coefficient)

    # ----------------------------------------------------------------------------------------------------- masters

    @property
    def has_master(self) -> bool:
        return self.kept_master is not None

    @contextmanager
    def masters(self) -> Iterator[Masters]:
        master = self._master_codec.decode(self.param_shard, self.kept_master)
        yield lambda piece: piece.cut(master)
        self._master_codec.encode(master, self.param_shard, self.kept_master)

    def decoded_masters(self) -> Tensor:
        return self._master_codec.decode(self.param_shard, self.kept_master)

    def param_of(self, piece: ShardPiece) -> Tensor:
        return piece.cut(self.param_shard)

    def master_of(self, piece: ShardPiece) -> Tensor:
        return self._master_codec.decode(self.param_of(piece), self.kept_of(piece))

    def write_master(self, piece: ShardPiece, value: Tensor) -> None:
        self._master_codec.encode(value, self.param_of(piece), self.kept_of(piece))

    def kept_of(self, piece: ShardPiece) -> Tensor | None:
        return None if self.kept_master is None else piece.cut(self.kept_master)

    # ------------------------------------------------------------------------------------------- what others may write

    def check_in_place(self, index: int) -> None:
        param = self._params[index]
        if param.data_ptr() != self._homes[index].data_ptr() or param.dtype != self._layout.specs[index].dtype:
            raise problem(
                self._layout.specs[index].fqn,
                found=f"its storage changed since distmuon's buffers were built (now {param.dtype} on {param.device})",
                needed="parameters must stay where they are once training has begun",
                cure="move and cast the model before the first forward, or make a new DistMuon afterwards; "
                "write values with param.data.copy_(values), not param.data = values",
            )

    def absorb_external_writes(self) -> None:
        # A rank sends only its shard; but if updates travel, every replica of a parameter counts.
        sends_updates = self._options.sharding.param_gather == "updates"
        for flat, own in self.staged_here + (self.staged if sends_updates else []):
            flat.copy_(own)
        self._master_codec.absorb(self.param_shard, self.kept_master)

    def shown(self, index: int, views: Sequence[Tensor]) -> Any:
        """One tensor where the views lie in a run, of the parameter's shape where they are all of it."""
        value, param = joined(views), self._params[index]
        whole = sum(view.numel() for view in views) == param.numel()
        return value.view(param.shape) if whole and isinstance(value, Tensor) else value

    def as_shown(self, index: int, value: Tensor) -> Tensor | None:
        return value

    def stage_out(self) -> None:
        """Copy staged parameters out of the gathered buffer."""
        for flat, own in self.staged + self.staged_here:
            own.copy_(flat)

    def note_sent(self) -> None:
        """Note the parameters' versions before the all-gather; see [Note: written while in flight]."""
        self._versions = {index: self._params[index]._version for index in self.spec.params}

    def note_arrived(self) -> None:
        """Raise if parameters were written while in flight; then let autograd see that they changed."""
        for index in self.spec.params:
            param = self._params[index]
            if param._version != self._versions[index]:
                raise problem(
                    self._layout.specs[index].fqn,
                    found="it was written while its all-gather was in flight",
                    needed="parameters may be read and written once they have arrived",
                    cure="call optimizer.synchronize() before writing parameters, or pass Sharding(overlap=True)",
                )
            torch.autograd.graph.increment_version(param)

    @property
    def state_bytes(self) -> int:
        per_element = self._master_codec.bytes_per_element
        masters = sum(piece.segment.length * per_element for piece in self.muon + self.adamw)
        tensors = [t for piece in self.muon + self.adamw for t in piece.state.values() if t.ndim]
        return masters + sum(t.numel() * t.element_size() for t in tensors)


def _matching_views(flat: Tensor, own: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (part of `flat`, the same elements of `own`) as views of equal shape.

    `flat`, (length,), holds the elements of `own` from `start` on, in row-major order.
    """
    if own.is_contiguous():
        yield flat, own.view(-1)[start : start + flat.numel()]
        return
    done = 0
    for offsets, sizes in boxes(own.shape, start, flat.numel()):
        elements = flat[done : done + prod(sizes)].view(sizes)
        yield elements, own[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))]
        done += elements.numel()


def _allocate_state(
    pieces: Sequence[ShardPiece], key: str, entries: Sequence[tuple[int, torch.dtype]], device: torch.device
) -> None:
    """Allocate zeros for all `pieces` in one tensor, ordered by parameter; each piece gets its view as `state[key]`."""
    ordered = sorted(zip(pieces, entries), key=lambda pair: (pair[0].segment.param, pair[0].segment.param_offset))
    lengths = [length for _, (length, _) in ordered]
    dtype = entries[0][1] if entries else torch.float32
    flat = torch.zeros(sum(lengths), dtype=dtype, device=device)
    for (piece, _), view in zip(ordered, torch.split(flat, lengths)):
        piece.state[key] = view
