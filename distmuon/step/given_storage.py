"""The tensors of one bucket where others have put them: this rank's box of each parameter and of its gradient.

Decides storage only, and moves nothing: pieces are views of the local tensors of the parameters and of `param.grad`.
State has the parameter's local shape, and `optimizer.state` shows it as DTensors of the parameter's mesh and placement,
as torch.optim's optimizers have it under FSDP2; a plain parameter, a replica on each rank, has plain state.

[Note: local tensors] FSDP2 may put another local tensor under a parameter between steps (`model.to`, `to_empty`), and
puts a new one under `param.grad` in each backward. So parameters are looked up before each step and each reading of
state, and gradients when the step begins; after it the gradients' memory is let go.

[Note: ranks without elements] A parameter whose rows do not go round leaves some ranks none. They hold a piece of no
elements: its state is there for whoever reads the keys, and its ``step`` counts as on the other ranks, because
torch.distributed.checkpoint saves that of any rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.errors import names, problem
from distmuon.layout.layout import BucketSpec, Layout, Segment
from distmuon.math.codecs import master_codec, momentum_codec
from distmuon.options import Options
from distmuon.step.dtensors import is_dtensor, is_placed_like, like, local_of
from distmuon.step.storage import Masters, Reduction, ShardPiece, joined, runs_of, state_keys


class GivenStorage:
    """One bucket's tensors on this rank, in the memory of whoever has cut them."""

    reduction: Reduction | None = None

    def __init__(
        self, spec: BucketSpec, layout: Layout, params: Sequence[nn.Parameter], dp_rank: int, options: Options
    ) -> None:
        self.spec = spec
        self._layout, self._params = layout, params
        self.label = f"bucket {spec.index} ({names([layout.specs[index].fqn for index in spec.params], 3)})"
        self.momentum = momentum_codec(options.precision.momentum)
        self._master_codec = master_codec(spec.dtype, options.precision.master)
        self._starts: dict[int, int] = {}  # where a parameter begins among the elements that this rank holds
        for segment in spec.segments:
            if segment.rank == dp_rank:
                self._starts.setdefault(segment.param, segment.shard_offset)
        self._device = params[spec.params[0]].device
        self._no_grad = torch.empty(0, device=self._device)
        self._copies: list[Tensor] = []  # of gradients that are not float32 in row-major order
        self._look_up()
        self._kept = {index: self._master_codec.make(elements) for index, elements in self._elements.items()}
        self._make_pieces(dp_rank)

    def _look_up(self) -> None:
        """See [Note: local tensors]."""
        self._elements = {index: local_of(self._params[index]).detach().view(-1) for index in self.spec.params}

    def _make_pieces(self, dp_rank: int) -> None:
        segments = [segment for segment in self.spec.segments if segment.rank == dp_rank]
        held = runs_of(segments, self._layout, self.momentum.block)
        here = {segment.param for segment in held}
        for index in self.spec.params:
            if index not in here:  # see [Note: ranks without elements]
                held.append(Segment(index, self._layout.specs[index].numel, 0, dp_rank, 0))
        pieces = [ShardPiece(segment, self._no_grad) for segment in held]
        self.muon = [piece for piece in pieces if self._layout.specs[piece.segment.param].rule == "muon"]
        self.adamw = [piece for piece in pieces if self._layout.specs[piece.segment.param].rule == "adamw"]
        for index in self.spec.params:
            length = self._elements[index].numel()
            entries = self.momentum.entries(length)
            if self._layout.specs[index].rule == "adamw":
                entries = {key: (length, torch.float32) for key in ("exp_avg", "exp_avg_sq")}
            flat = {key: torch.zeros(n, dtype=dtype, device=self._device) for key, (n, dtype) in entries.items()}
            for piece in (piece for piece in pieces if piece.segment.param == index):
                piece.state = {key: self._cut(piece, tensor) for key, tensor in flat.items()}
                if "step" in state_keys(self._layout.specs[index].rule, self.momentum):
                    piece.state["step"] = torch.zeros((), dtype=torch.float32, device=self._device)

    def _cut(self, piece: ShardPiece, elements: Tensor) -> Tensor:
        """The piece's elements of what is as long as the parameter's local tensor, a view."""
        if not piece.segment.length:
            return elements[:0]
        start = piece.segment.shard_offset - self._starts[piece.segment.param]
        return elements[start : start + piece.segment.length]

    # --------------------------------------------------------------------------------------------------- gradients

    def averaged(self, *, replicas: bool = False) -> list[Tensor]:
        pieces = [piece for piece in self.muon + self.adamw if piece.grad.numel()]
        return [piece.grad for piece in pieces if (piece.segment.replica > 0) is replicas]

    def given_grads(self) -> list[Tensor]:
        """Both the DTensors and their memory: who writes one does not always count at the other."""
        grads = [grad for index in self.spec.params if (grad := self._params[index].grad) is not None]
        return [*grads, *(local_of(grad) for grad in grads)]

    def read_grads(self) -> None:
        found: dict[int, Tensor] = {}
        self._copies = []
        for index in self.spec.params:
            grad = self._params[index].grad
            if grad is None:
                found[index] = torch.zeros_like(self._elements[index], dtype=torch.float32)
                continue
            local = self._checked(index, grad)
            found[index] = local.contiguous().view(-1).float()
            if found[index].data_ptr() != local.data_ptr():
                self._copies.append(found[index])
        for piece in self.muon + self.adamw:
            piece.grad = self._cut(piece, found[piece.segment.param])

    def _checked(self, index: int, grad: Tensor) -> Tensor:
        local, expected = local_of(grad), local_of(self._params[index])
        if is_dtensor(grad) and is_placed_like(grad, self._params[index]):
            return local
        if not is_dtensor(grad) and not is_dtensor(self._params[index]) and local.shape == expected.shape:
            return local
        placed = f" placed {getattr(grad, 'placements', None)}" if is_dtensor(grad) else ""
        raise problem(
            self._layout.specs[index].fqn,
            found=f"its gradient is a {type(grad).__name__}{placed} of local shape {tuple(local.shape)}",
            needed=f"the gradient's elements on this rank, {tuple(expected.shape)}, placed like the parameter's, are "
            "needed",
            cure="leave param.grad as FSDP2 and DTensor make it, or put distribute_tensor(grad, param.device_mesh, "
            "param.placements) there",
        )

    def let_go_of_grads(self) -> None:
        self._copies = []
        for piece in self.muon + self.adamw:
            piece.grad = self._no_grad

    @torch.no_grad()
    def scale_grads(self, coefficient: Tensor) -> None:
        for index in self.spec.params:
            grad = self._params[index].grad
            if grad is not None:
                local_of(grad).mul_(coefficient)
        for copy in self._copies:
            copy.mul_(coefficient)

    # ----------------------------------------------------------------------------------------------------- masters

    @property
    def has_master(self) -> bool:
        return any(kept is not None for kept in self._kept.values())

    @contextmanager
    def masters(self) -> Iterator[Masters]:
        pieces = self.muon + self.adamw
        decoded = {piece.segment: self.master_of(piece) for piece in pieces}
        yield lambda piece: decoded[piece.segment]
        for piece in pieces:
            self._master_codec.encode(decoded[piece.segment], self.param_of(piece), self.kept_of(piece))

    def decoded_masters(self) -> Tensor:
        shard = torch.zeros(self.spec.shard_size, dtype=torch.float32, device=self._device)
        for piece in self.muon + self.adamw:
            piece.cut(shard).copy_(self.master_of(piece))
        return shard

    def param_of(self, piece: ShardPiece) -> Tensor:
        return self._cut(piece, self._elements[piece.segment.param])

    def kept_of(self, piece: ShardPiece) -> Tensor | None:
        kept = self._kept[piece.segment.param]
        return None if kept is None else self._cut(piece, kept)

    def master_of(self, piece: ShardPiece) -> Tensor:
        return self._master_codec.decode(self.param_of(piece), self.kept_of(piece))

    def write_master(self, piece: ShardPiece, value: Tensor) -> None:
        self._master_codec.encode(value, self.param_of(piece), self.kept_of(piece))

    # ------------------------------------------------------------------------------------------- what others may write

    def check_in_place(self, index: int) -> None:
        local, known = local_of(self._params[index]), self._elements[index]
        as_it_was = local.dtype == known.dtype and local.device == known.device and local.is_contiguous()
        if not as_it_was or local.numel() != known.numel():
            raise problem(
                self._layout.specs[index].fqn,
                found=f"its local tensor is {tuple(local.shape)} {local.dtype} on {local.device} now, and had "
                f"{known.numel()} elements of {known.dtype} on {known.device} when distmuon's state was made",
                needed="parameters keep dtype, device and placement once training has begun",
                cure="cast, move and shard the model first, then make DistMuon",
            )

    def absorb_external_writes(self) -> None:
        self._look_up()
        for index, elements in self._elements.items():
            self._master_codec.absorb(elements, self._kept[index])

    # ---------------------------------------------------------------------------------------------- what is shown

    def shown(self, index: int, views: Sequence[Tensor]) -> Any:
        """`views` of the pieces' state as a tensor of the parameter's kind."""
        local = joined(views)
        assert isinstance(local, Tensor)
        return like(self._params[index], local)

    def as_shown(self, index: int, value: Tensor) -> Tensor | None:
        if not is_dtensor(value):
            return value
        return local_of(value) if is_placed_like(value, self._params[index]) else None

    @property
    def state_bytes(self) -> int:
        pieces = self.muon + self.adamw
        masters = sum(piece.segment.length * self._master_codec.bytes_per_element for piece in pieces)
        tensors = [tensor for piece in pieces for tensor in piece.state.values() if tensor.ndim]
        return masters + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
