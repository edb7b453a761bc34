"""The tensors behind a `Layout`: flat parameter and gradient buffers of each bucket, and this rank's shard state.

Decides storage only; every view is cut here and padding never leaves. A parameter that lies contiguously in its
bucket becomes a view of the flat buffer, so that the all-gather writes straight into it. Any other is staged: it
keeps its own storage and is copied out after the all-gather (`stage_out`). So does one that must stay where it is, with
its own strides (memory.py, [Note: parameters that stay]). Flat buffers hold all elements in row-major order.

[Note: who else writes parameters] `load_state_dict`, an EMA swap or `p.data` may write parameters between steps. Before
a step `adopt` compares this rank's part of each parameter with what the optimizer left there: an element that differs
is taken over into the master; one that does not keeps its full precision. A parameter that got new storage raises.
Masters kept as remainders need no comparison: what was written and the remainder make a master that rounds to it.

[Note: written while in flight] What is written between `step` and the arrival of the all-gather would be overwritten,
on some ranks. `sent` and `arrived` frame that time: a parameter whose `_version` moved inside it raises. `arrived`
then moves the version itself, so that autograd refuses a graph that saved the weight before it had arrived.

[Note: sums] A sum of thousands of micro-batches in 16 bits stops growing: each addend is below half of its last place.
So where the gradient buffers have 16 bits, and only while several backwards add up, a bucket has a float32 `grad_sum`
in place of its `grad_flat`, from its first gradient that is not the last of its parameter until its reduction starts.
A step of one micro-batch never has any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from distmuon.errors import names, problem
from distmuon.layout import memory
from distmuon.layout.boxes import boxes
from distmuon.layout.layout import Bucket, Layout, Segment
from distmuon.math import codecs
from distmuon.options import Options


def state_keys(rule: str, momentum_dtype: torch.dtype) -> tuple[str, ...]:
    """The keys of a parameter's state under `rule`; ``master`` may come beside them."""
    if rule == "adamw":
        return ("exp_avg", "exp_avg_sq", "step")
    return ("momentum_buffer",) if momentum_dtype == torch.float32 else ("momentum_buffer", "step")


@dataclass(slots=True)
class ShardPiece:
    """One of this rank's segments: a view of the gradient shard, and its optimizer state (keys as in torch.optim).

    An int8 ``momentum_buffer`` has its scales beside it, ``momentum_scale``; see `codecs.quantize`. One of fewer than
    32 bits counts the times that it was rounded in ``step``; see [Note: dither] in codecs.py.
    """

    segment: Segment
    grad: Tensor  # (length,) float32: the averaged gradient once reduced
    state: dict[str, Tensor] = field(default_factory=dict)

    def cut(self, shard: Tensor) -> Tensor:
        """This piece's elements of a (shard_size,) tensor, a view."""
        return shard[self.segment.shard_offset : self.segment.shard_offset + self.segment.length]

    def momentum(self) -> Tensor:
        """(length,) as it is kept, or float32 out of int8."""
        buffer = self.state["momentum_buffer"]
        return codecs.dequantize(buffer, self.state["momentum_scale"]) if buffer.dtype == torch.int8 else buffer

    def encoded(self, momentum: Tensor) -> dict[str, Tensor]:
        """(length,) float32, which somebody wrote or saved, as the entries of `state` that keep it: the nearest."""
        if self.state["momentum_buffer"].dtype != torch.int8:
            return {"momentum_buffer": momentum}
        return dict(zip(("momentum_buffer", "momentum_scale"), codecs.quantize(momentum)))

    def stepped(self, momentum: Tensor) -> dict[str, Tensor]:
        """(length,) float32, which a step made, as the entries of `state` that keep it: right on average."""
        dtype, start = self.state["momentum_buffer"].dtype, self.segment.param_offset
        if dtype == torch.float32:
            return {"momentum_buffer": momentum}
        step = self.state["step"]
        if dtype == torch.bfloat16:
            kept = {"momentum_buffer": codecs.bfloat16_dithered(momentum, start, step)}
        else:
            codes, scales = codecs.quantize_dithered(momentum, start, step)
            kept = {"momentum_buffer": codes, "momentum_scale": scales}
        return {**kept, "step": step + 1}


@dataclass(slots=True)
class BucketBuffers:
    """`param_flat` (dp_size * shard_size,), its shard, the gradients likewise, and the pieces by rule."""

    bucket: Bucket
    about: str  # for messages: its number and its first parameters
    param_flat: Tensor
    param_shard: Tensor
    grad_flat: Tensor | None  # (dp_size * shard_size,), reduce dtype; None: in param.grad, or released
    grad_shard: Tensor  # (shard_size,) float32; the slice of grad_flat where that stays and is float32
    master_shard: Tensor | None  # (shard_size,) float32; the parameter shard itself if that is float32
    remainder: Tensor | None  # (shard_size,) int16, instead of a master_shard; see `codecs.split`
    muon: list[ShardPiece]
    adamw: list[ShardPiece]
    staged: list[tuple[Tensor, Tensor]]  # (part of the flat buffer, the parameter's own elements), of one shape
    staged_here: list[tuple[Tensor, Tensor]]  # those in this rank's shard
    grad_sum: Tensor | None = None  # float32, as grad_flat: several backwards add up here; see [Note: sums]

    @property
    def has_master(self) -> bool:
        """Masters are kept beside the parameters."""
        return self.param_shard.dtype != torch.float32

    @contextmanager
    def masters(self) -> Iterator[Tensor]:
        """The masters (shard_size,) float32, to read and write; at the end the parameter shard is rounded from them."""
        if self.remainder is not None:
            master = codecs.join(self.param_shard, self.remainder)
            yield master
            parameters, remainder = codecs.split(master)
            self.remainder.copy_(remainder)
            self.param_shard.copy_(parameters)
        else:
            assert self.master_shard is not None
            yield self.master_shard
            if self.has_master:
                self.param_shard.copy_(self.master_shard)

    def master_of(self, piece: ShardPiece) -> Tensor:
        """(length,) float32: the master of one piece, a view where it is kept as such."""
        if self.remainder is not None:
            return codecs.join(piece.cut(self.param_shard), piece.cut(self.remainder))
        assert self.master_shard is not None
        return piece.cut(self.master_shard)

    def write_master(self, piece: ShardPiece, value: Tensor) -> None:
        """(length,) any dtype and device: the new master of one piece, and its parameter rounded from it."""
        if self.remainder is not None:
            parameters, remainder = codecs.split(value.to(self.remainder.device, torch.float32))
            piece.cut(self.remainder).copy_(remainder)
            piece.cut(self.param_shard).copy_(parameters)
        else:
            self.master_of(piece).copy_(value)
            piece.cut(self.param_shard).copy_(self.master_of(piece))

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
        self.options = options
        self.device = params[0].device
        self.buckets = [self._build(bucket) for bucket in layout.buckets]
        self._homes = [param.data for param in params]  # where they live now; follows a storage that moves as a whole
        self._versions = [param._version for param in params]

    def _build(self, bucket: Bucket) -> BucketBuffers:
        size, options, device = bucket.shard_size, self.options, self.params[bucket.params[0]].device
        own = slice(self.dp_rank * size, (self.dp_rank + 1) * size)
        param_flat = torch.zeros(self.layout.dp_size * size, dtype=bucket.dtype, device=device)
        memory.note_flat(param_flat)
        staged: list[tuple[Tensor, Tensor]] = []
        staged_here: list[tuple[Tensor, Tensor]] = []
        for index in bucket.params:
            for segment, flat, elements in self._move_in(index, param_flat, size):
                (staged_here if segment.rank == self.dp_rank else staged).append((flat, elements))
        param_shard = param_flat[own]

        stays = not options.grads_stay(self.layout.dp_size) and not options.sharding.release_grads
        grad_flat = torch.zeros_like(param_flat, dtype=options.precision.reduce) if stays else None
        if grad_flat is not None and grad_flat.dtype == torch.float32:
            grad_shard = grad_flat[own]
        else:
            grad_shard = torch.zeros_like(param_shard, dtype=torch.float32)

        in_16_bits = options.precision.master_bytes(bucket.dtype) == 2
        remainder = torch.zeros_like(param_shard, dtype=torch.int16) if in_16_bits else None
        master_shard = None if remainder is not None else param_shard.float()  # float32: itself
        pieces = [ShardPiece(segment, grad_shard) for segment in bucket.segments if segment.rank == self.dp_rank]
        for piece in pieces:
            piece.grad = piece.cut(grad_shard)
        rules = [self.layout.specs[piece.segment.param].rule for piece in pieces]
        muon = [piece for piece, rule in zip(pieces, rules) if rule == "muon"]
        adamw = [piece for piece, rule in zip(pieces, rules) if rule == "adamw"]
        lengths = [piece.segment.length for piece in muon]
        _allocate_state(muon, "momentum_buffer", lengths, options.precision.momentum, device)
        if options.precision.momentum == torch.int8:
            _allocate_state(muon, "momentum_scale", [codecs.num_blocks(n) for n in lengths], torch.float32, device)
        for key in ("exp_avg", "exp_avg_sq"):
            _allocate_state(adamw, key, [piece.segment.length for piece in adamw], torch.float32, device)
        for piece in adamw if options.precision.momentum == torch.float32 else muon + adamw:
            piece.state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        about = f"bucket {bucket.index} ({names([self.layout.specs[index].fqn for index in bucket.params], 3)})"
        return BucketBuffers(
            bucket, about, param_flat, param_shard, grad_flat, grad_shard, master_shard, remainder, muon, adamw,
            staged, staged_here,
        )  # fmt: skip

    @torch.no_grad()
    def _move_in(self, index: int, param_flat: Tensor, shard_size: int) -> list[tuple[Segment, Tensor, Tensor]]:
        """Copy parameter `index` into the flat buffer and make it a view; returns (segment, flat, own) if it cannot."""
        param = self.params[index]
        elements = param.detach().reshape(-1)
        pairs: list[tuple[Segment, Tensor]] = []
        for segment in self.layout.segments_of[index]:
            start = segment.rank * shard_size + segment.shard_offset
            flat = param_flat[start : start + segment.length]
            flat.copy_(elements[segment.param_offset : segment.param_offset + segment.length])
            pairs.append((segment, flat))
        if not self.layout.is_staged(index):
            start_or_none = self.layout.contiguous_start(index)
            assert start_or_none is not None
            # The strides of dimensions of size 1 address nothing, but kernels and users may look at them.
            param.data = param_flat.as_strided(param.shape, param.stride(), start_or_none)
            return []
        if not self.layout.specs[index].stays and memory.is_in_flat(param):
            param.data = param.data.clone()  # out of an older optimizer's buffer, which can then be freed
        return [(s, *pair) for s, flat in pairs for pair in _alike(flat, param.data, s.param_offset)]

    def grad_places(self, index: int) -> list[tuple[int, int, int]]:
        """Where parameter `index`'s gradient goes: (start in the flat buffer, offset in the parameter, length)."""
        start = self.layout.contiguous_start(index)
        if start is not None:
            return [(start, 0, self.params[index].numel())]
        size = self.layout.buckets[self.layout.bucket_of[index]].shard_size
        segments = self.layout.segments_of[index]
        return [(s.rank * size + s.shard_offset, s.param_offset, s.length) for s in segments]

    def open_grads(self, index: int, *, several: bool = False) -> Tensor:
        """Where the gradients of bucket `index` go, flat; made anew (zeros) if it was released.

        `several`: what comes now is one of several addends, so that from here on they go to the bucket's `grad_sum`.
        """
        bucket = self.buckets[index]
        if several and self.lacks_sum(index):
            begun, bucket.grad_flat = bucket.grad_flat, None
            made = torch.zeros_like(bucket.param_flat, dtype=torch.float32) if begun is None else begun.float()
            bucket.grad_sum = made
        if bucket.grad_sum is not None:
            return bucket.grad_sum
        if bucket.grad_flat is None:
            bucket.grad_flat = torch.zeros_like(bucket.param_flat, dtype=self.options.precision.reduce)
        return bucket.grad_flat

    def lacks_sum(self, index: int) -> bool:
        """Bucket `index` would need a sum to add up in float32, and has none."""
        return self.options.precision.reduce != torch.float32 and self.buckets[index].grad_sum is None

    def close_sum(self, index: int) -> Tensor:
        """The flat gradient buffer of bucket `index`, in the reduce dtype; its sum, if it has one, rounded into it."""
        bucket = self.buckets[index]
        total, bucket.grad_sum = bucket.grad_sum, None
        flat = self.open_grads(index)
        return flat if total is None else flat.copy_(total)

    def release_grads(self, index: int) -> None:
        """Bucket `index` is reduced, or its gradients are dropped: let go of its sum, and with `release_grads` of all
        but its shard."""
        self.buckets[index].grad_sum = None
        if self.options.sharding.release_grads:
            self.buckets[index].grad_flat = None

    def check_in_place(self, index: int) -> None:
        """Raise if parameter `index` no longer lies where it was put, or has another dtype."""
        param = self.params[index]
        if param.data_ptr() != self._homes[index].data_ptr() or param.dtype != self.layout.specs[index].dtype:
            raise problem(
                self.layout.specs[index].fqn,
                f"its storage changed since distmuon's buffers were built (now {param.dtype} on {param.device})",
                "parameters must stay where they are once training has begun",
                "move and cast the model before the first forward, or make a new DistMuon afterwards; "
                "write values with param.data.copy_(values), not param.data = values",
            )

    @torch.no_grad()
    def adopt(self) -> None:
        """Before a step: refuse moved parameters, take over foreign writes; see [Note: who else writes parameters]."""
        for index in range(len(self.params)):
            self.check_in_place(index)
        for bucket in self.buckets:
            # Only our shard is ours to send; where updates travel, every replica of a parameter counts.
            for flat, own in bucket.staged_here + bucket.staged * (self.options.sharding.param_gather == "updates"):
                flat.copy_(own)
            if bucket.has_master and bucket.master_shard is not None:
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
            pieces = bucket.muon + bucket.adamw
            kept = [t for t in (bucket.master_shard, bucket.remainder) if t is not None and bucket.has_master]
            total += sum(piece.segment.length * t.element_size() for piece in pieces for t in kept)
            total += sum(t.numel() * t.element_size() for piece in pieces for t in piece.state.values() if t.ndim)
        return total


def _alike(flat: Tensor, own: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(part of `flat`, the same elements of `own`) as views of one shape.

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
    pieces: Sequence[ShardPiece], key: str, lengths: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Zeros for all `pieces` in one tensor, parameter by parameter; each piece holds its view as `state[key]`."""
    ordered = sorted(zip(pieces, lengths), key=lambda pair: (pair[0].segment.param, pair[0].segment.param_offset))
    flat = torch.zeros(sum(lengths), dtype=dtype, device=device)
    for (piece, _), view in zip(ordered, torch.split(flat, [length for _, length in ordered])):
        piece.state[key] = view
