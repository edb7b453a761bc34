"""The tensors behind a `Layout`: flat parameter and gradient buffers of each bucket, and this rank's shard state.

Decides storage only; every view is cut here and padding never leaves. A parameter that lies contiguously in its
bucket becomes a view of the flat buffer, so that the all-gather writes straight into it. Any other is staged: it
keeps its own storage and is copied out after the all-gather (`stage_out`).

[Note: who else writes parameters] `load_state_dict`, an EMA swap or `p.data` may write parameters between steps. Before
a step `adopt` compares this rank's part of each parameter with what the optimizer left there: an element that differs
is taken over into the master; one that does not keeps its full precision. A parameter that got new storage raises.

[Note: written while in flight] What is written between `step` and the arrival of the all-gather would be overwritten,
on some ranks. `sent` and `arrived` frame that time: a parameter whose `_version` moved inside it raises. `arrived`
then moves the version itself, so that autograd refuses a graph that saved the weight before it had arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distmuon.config import Options
from distmuon.errors import problem
from distmuon.layout import Bucket, Layout, Segment


@dataclass(slots=True)
class ShardPiece:
    """One of this rank's segments: views of the shard, and its optimizer state (keys as in torch.optim)."""

    segment: Segment
    master: Tensor  # (length,) float32
    grad: Tensor  # (length,) reduce dtype: the averaged gradient once reduced
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class BucketBuffers:
    """`param_flat` (dp_size * shard_size,), its shard, the gradients likewise, and the pieces by rule.

    `grad_flat` is the whole bucket where this optimizer reduces, and only the shard where somebody else has.
    """

    bucket: Bucket
    param_flat: Tensor
    param_shard: Tensor
    grad_flat: Tensor
    grad_shard: Tensor
    master_shard: Tensor
    muon: list[ShardPiece]
    adamw: list[ShardPiece]
    staged: list[tuple[Tensor, Tensor]]  # (flat segment, the parameter's own elements)
    staged_here: list[tuple[Tensor, Tensor]]  # those in this rank's shard

    @property
    def has_master(self) -> bool:
        """The master is a tensor of its own, not the parameter's shard itself."""
        return self.master_shard.dtype != self.param_shard.dtype

    def publish_master(self) -> None:
        """Round the updated master shard into the parameter shard, before the all-gather."""
        if self.has_master:
            self.param_shard.copy_(self.master_shard)

    def stage_out(self) -> None:
        """Copy parameters that are no views out of the gathered buffer."""
        for flat, own in self.staged + self.staged_here:
            own.copy_(flat)


class Buffers:
    """Built once, at the first use. Moves the parameters into flat storage; values do not change."""

    def __init__(self, layout: Layout, params: Sequence[nn.Parameter], dp_rank: int, options: Options) -> None:
        self.layout = layout
        self.params = params
        self.dp_rank = dp_rank
        self.momentum_dtype = options.momentum_dtype
        self.device = params[0].device
        self.buckets = [self._build(bucket, options) for bucket in layout.buckets]
        self._addresses = [param.data_ptr() for param in params]
        self._versions = [param._version for param in params]

    def _build(self, bucket: Bucket, options: Options) -> BucketBuffers:
        size, dp_size = bucket.shard_size, self.layout.dp_size
        device = self.params[bucket.params[0]].device
        own = slice(self.dp_rank * size, (self.dp_rank + 1) * size)
        param_flat = torch.zeros(dp_size * size, dtype=bucket.dtype, device=device)
        reduces = options.grad_reduction == "reduce_scatter"
        grad_flat = torch.zeros((dp_size if reduces else 1) * size, dtype=options.reduce_dtype, device=device)
        grad_shard = grad_flat[own] if reduces else grad_flat
        staged: list[tuple[Tensor, Tensor]] = []
        staged_here: list[tuple[Tensor, Tensor]] = []
        for index in bucket.params:
            for segment, flat, elements in self._move_in(index, param_flat, size):
                (staged_here if segment.rank == self.dp_rank else staged).append((flat, elements))
        param_shard = param_flat[own]
        master_shard = param_shard if bucket.dtype == options.master_dtype else param_shard.to(options.master_dtype)

        mine = [segment for segment in bucket.segments if segment.rank == self.dp_rank]
        pieces = [ShardPiece(s, self._cut(master_shard, s), self._cut(grad_shard, s)) for s in mine]
        rules = [self.layout.specs[s.param].rule for s in mine]
        muon = [piece for piece, rule in zip(pieces, rules) if rule == "muon"]
        adamw = [piece for piece, rule in zip(pieces, rules) if rule == "adamw"]
        _allocate_state(muon, "momentum_buffer", options.momentum_dtype, device)
        _allocate_state(adamw, "exp_avg", torch.float32, device)
        _allocate_state(adamw, "exp_avg_sq", torch.float32, device)
        for piece in adamw:
            piece.state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        return BucketBuffers(
            bucket, param_flat, param_shard, grad_flat, grad_shard, master_shard, muon, adamw, staged, staged_here
        )

    @staticmethod
    def _cut(shard: Tensor, segment: Segment) -> Tensor:
        return shard[segment.shard_offset : segment.shard_offset + segment.length]

    @torch.no_grad()
    def _move_in(self, index: int, param_flat: Tensor, shard_size: int) -> list[tuple[Segment, Tensor, Tensor]]:
        """Copy parameter `index` into the flat buffer and make it a view; returns (segment, flat, own) if it cannot."""
        param = self.params[index]
        elements = param.detach().reshape(-1)
        pairs = []
        for segment in self.layout.segments_of[index]:
            start = segment.rank * shard_size + segment.shard_offset
            flat = param_flat[start : start + segment.length]
            flat.copy_(elements[segment.param_offset : segment.param_offset + segment.length])
            pairs.append((flat, segment))
        start_or_none = self.layout.contiguous_start(index)
        if start_or_none is not None:
            param.data = param_flat[start_or_none : start_or_none + param.numel()].view(param.shape)
            return []
        param.data = param.data.contiguous()
        own = param.data.view(-1)
        return [(s, flat, own[s.param_offset : s.param_offset + s.length]) for flat, s in pairs]

    def grad_places(self, index: int) -> list[tuple[Tensor, int]]:
        """Where parameter `index`'s gradient goes in its bucket's flat buffer: (flat view, offset in the parameter)."""
        bucket = self.buckets[self.layout.bucket_of[index]]
        start = self.layout.contiguous_start(index)
        if start is not None:
            return [(bucket.grad_flat[start : start + self.params[index].numel()], 0)]
        size = bucket.bucket.shard_size
        places = []
        for s in self.layout.segments_of[index]:
            at = s.rank * size + s.shard_offset
            places.append((bucket.grad_flat[at : at + s.length], s.param_offset))
        return places

    @torch.no_grad()
    def adopt(self) -> None:
        """Before a step: refuse moved parameters, take over foreign writes; see [Note: who else writes parameters]."""
        for index, param in enumerate(self.params):
            if param.data_ptr() != self._addresses[index] or param.dtype != self.layout.specs[index].dtype:
                raise problem(
                    self.layout.specs[index].fqn,
                    f"its storage changed since distmuon's buffers were built (now {param.dtype} on {param.device})",
                    "parameters must stay where they are once training has begun",
                    "move and cast the model before the first forward, or make a new DistMuon afterwards",
                )
        for bucket in self.buckets:
            for flat, own in bucket.staged_here:
                flat.copy_(own)
            if bucket.has_master:
                current, master = bucket.param_shard, bucket.master_shard
                torch.where(current == master.to(current.dtype), master, current.to(master.dtype), out=master)

    def sent(self, index: int) -> None:
        """Bucket `index` goes on its way; see [Note: written while in flight]."""
        for param in self.buckets[index].bucket.params:
            self._versions[param] = self.params[param]._version

    def arrived(self, index: int) -> None:
        """Bucket `index` has arrived: autograd must see that its parameters changed."""
        for number in self.buckets[index].bucket.params:
            param = self.params[number]
            if param._version != self._versions[number]:
                raise problem(
                    self.layout.specs[number].fqn, "it was written while its all-gather was in flight",
                    "parameters may be read and written once they have arrived",
                    "call optimizer.synchronize() before writing parameters, or pass overlap=False",
                )  # fmt: skip
            torch.autograd.graph.increment_version(param)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank: masters that are not the parameter itself, momentum, moments."""
        total = 0
        for bucket in self.buckets:
            if bucket.has_master:
                total += sum(p.master.numel() * p.master.element_size() for p in bucket.muon + bucket.adamw)
            for piece in bucket.muon + bucket.adamw:
                total += sum(t.numel() * t.element_size() for t in piece.state.values() if t.ndim)
        return total


def _allocate_state(pieces: Sequence[ShardPiece], key: str, dtype: torch.dtype, device: torch.device) -> None:
    """Zeros for all `pieces` in one tensor; each piece holds its view as `state[key]`."""
    flat = torch.zeros(sum(piece.segment.length for piece in pieces), dtype=dtype, device=device)
    for piece, view in zip(pieces, torch.split(flat, [piece.segment.length for piece in pieces])):
        piece.state[key] = view
