"""The life of a bucket, which is arXiv 2502.16982, Algorithm 1, from top to bottom.

This module decides what happens to a bucket's gradient, momentum and parameters, and in which order. It knows no other
bucket: the engine decides when each line runs. Four interfaces hide the variants:

    where the shard lives             `BucketStorage`  storage.py
    whether and how state is written  `Decision`       verdict.py
    in which format state is kept     the codecs       math/codecs.py
    what travels back                 `Transport`      param_gather.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor

from distmuon.comm.group import DataParallelGroup, Pending
from distmuon.layout.layout import Layout, Segment
from distmuon.math import fused, rules
from distmuon.math.codecs import UpdateCodec
from distmuon.math.newton_schulz import orthogonalize
from distmuon.options import CAUTIOUS, NORMUON
from distmuon.step.matrix_exchange import MatrixExchange, StackKey
from distmuon.step.metrics import Metrics
from distmuon.step.param_gather import Transport
from distmuon.step.row_moments import RowMoments
from distmuon.step.storage import BucketStorage, Masters, ShardPiece, elements_of
from distmuon.step.telemetry import Telemetry
from distmuon.step.verdict import Decision

# When `Bucket.update` yields, pieces are on their way to the owners of their matrices, or back to their holders.
Stage = Literal["to_owners", "to_holders"]


class Grads(Enum):
    """COLLECTING -> REDUCING -> REDUCED, and back when the step is over or its gradients are dropped."""

    COLLECTING = "autograd delivers gradients"
    REDUCING = "the reduce-scatter is in flight"
    REDUCED = "the shard holds the mean over ranks"


@dataclass(frozen=True, slots=True)
class Step:
    """The values that all buckets of a step share. `param_groups`: the groups, with lr as numbers.

    `decisions`: by parameter, how new values are written; None leaves the parameter alone. `row_factors`: by parameter,
    what each row of the new weight is multiplied by, (rows,) float32. `telemetry`: takes what is measured in this step,
    if anything is.
    """

    param_groups: Sequence[dict[str, Any]]
    decisions: Sequence[Decision | None]
    row_factors: Mapping[int, Tensor]
    telemetry: Telemetry | None = None


class Bucket:
    """A bucket, from its gradients to its updated parameters. `group_of`: the param group of each parameter."""

    def __init__(
        self,
        storage: BucketStorage,
        exchange: MatrixExchange,
        transport: Transport,
        layout: Layout,
        group_of: Sequence[int],
        ns_dtype: torch.dtype,
        update_codec: UpdateCodec,
        dp_group: DataParallelGroup,
        metrics: Metrics,
        row_moments: RowMoments,
    ) -> None:
        self.storage = storage
        self.exchange = exchange
        self.transport = transport
        self.index, self.params = storage.spec.index, storage.spec.params
        self.grads = Grads.COLLECTING
        self._reduction: Pending | None = None
        self._group_of = group_of
        self._ns_dtype = ns_dtype
        self._update_codec = update_codec
        self._dp_group = dp_group
        self._metrics = metrics
        self._layout = layout
        self._row_moments = row_moments
        self._fused = fused.ready(exchange.device)

    # ------------------------------------------------------------------ line 1: G = mean over ranks, this rank's shard

    @torch.no_grad()
    def collect(self, param: int, grad: Tensor, *, first: bool, several: bool) -> None:
        """Write or add a gradient of parameter `param`; `first` and `several`: see `GradBuffer.add`."""
        assert self.storage.reduction is not None
        buffer, spans = self.storage.reduction.buffer, self.storage.reduction.spans[param]
        buffer.add(spans, grad.reshape(-1), first=first, several=several or not first)

    @torch.no_grad()
    def start_reduce(self, absent: Sequence[int]) -> None:
        """Start the reduce-scatter; the parameters in `absent` had no gradient on this rank and count as zeros."""
        reduction, label = self.storage.reduction, self.storage.label
        assert reduction is not None and self.grads is Grads.COLLECTING
        for param in absent:
            reduction.buffer.zero(reduction.spans[param])
        flat = reduction.buffer.close()
        kept = reduction.buffer.arrivals(self._dp_group.room_for(flat.numel(), flat.dtype))
        start = self._dp_group.start_reduce_scatter
        with torch.profiler.record_function(f"distmuon::reduce_scatter/{self.index}"):
            self._reduction = start(reduction.shard, flat, stage="reduce_scatter", label=label, kept=kept)
        self.grads = Grads.REDUCING

    def finish_reduce(self) -> None:
        """Wait for the reduce-scatter, if it is in flight."""
        if self._reduction is not None and self.grads is Grads.REDUCING:
            assert self.storage.reduction is not None
            self._reduction.wait()
            self._reduction = None
            self.storage.reduction.buffer.reduced()
            self.grads = Grads.REDUCED

    def drop_grads(self) -> None:
        """Drop the gradients; a reduction in flight must end before its buffer is written again."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
        if self.storage.reduction is not None:
            self.storage.reduction.buffer.drop()
        self.grads = Grads.COLLECTING

    # --------------------------------------------------------------------------------- lines 2 to 6, one bucket's step

    def update(self, step: Step) -> Iterator[Stage]:
        """Run the step. At each `yield` this bucket's pieces travel and another bucket may compute."""
        stage = self._metrics.stage
        with stage("momentum", self.index):
            stacks = self.exchange.new_stacks()
            places = self.exchange.places(stacks)
            pieces = zip(self.storage.muon, places)
            updates = [self._update_momentum(piece, step, place) for piece, place in pieces]  # 2  M and U, on the shard
        with stage("start_dp_gather", self.index):
            gathering = self.exchange.start_gather(updates, stacks, places)
            del updates, places
        yield "to_owners"
        with stage("dp_gather", self.index):
            stacks = gathering.wait()  # 3  U, whole on its owner
        with stage("newton_schulz", self.index):
            self._row_moments.begin()
            polar = {key: self._orthogonalize(key, stack, step) for key, stack in stacks.items()}  # 4  O, once
        with stage("start_scatter", self.index):
            scattering = self.exchange.start_scatter(polar)
            self._row_moments.start_sum()
            del gathering, stacks
        yield "to_holders"
        with stage("scatter", self.index):
            polar_pieces = scattering.wait()  # 5  O, back on the shard
            del scattering, polar
        with stage("apply", self.index), self.storage.masters() as masters:
            # 6  W <- W - lr*(scale*O + wd*W), and AdamW for the rest; on exit parameters are rounded from the masters
            self.transport.apply(masters, polar_pieces, lambda *piece: self._apply_muon(step, *piece))
            self._adamw(masters, step)
            self._row_moments.finish(step.decisions)

    def _update_momentum(self, piece: ShardPiece, step: Step, place: Tensor | None = None) -> Tensor:
        """Write a piece's new momentum, if its parameter had a gradient; return its update U, (length,).

        U is computed in `place` if that is (length,), and else is new memory.
        """
        segment, codec = piece.segment, self.storage.momentum
        decision, param_group = step.decisions[segment.param], step.param_groups[self._group_of[segment.param]]
        old = codec.decode(piece.state)
        in_place = decision is not None and codec.in_place and (decision.found_inf is None or self._fused)
        new, update = rules.muon_momentum(
            piece.grad,
            old,
            momentum=param_group["momentum"],
            nesterov=param_group["nesterov"],
            out=old if in_place else None,
            unless=decision.found_inf if decision is not None and in_place else None,
            update_out=place if place is not None and place.dim() == 1 else None,
        )
        if decision is not None and not in_place:
            runs = (segment.run, segment.stride)
            for key, value in codec.encode_step(new, segment.param_offset, piece.state, runs).items():
                decision.write(piece.state[key], value)
        return update

    def _orthogonalize(self, key: StackKey, stack: Tensor, step: Step) -> Tensor:
        """Orthogonalize updates (B, m, n), with each column block as a separate matrix if the unit has blocks."""
        param_group = step.param_groups[key.group]
        blocks = torch.split(stack, list(key.column_split), dim=2) if key.column_split else (stack,)
        self._metrics.ns_matrices += len(blocks) * stack.size(0)
        steps, coefficients = param_group["ns_steps"], param_group["ns_coefficients"]
        polar = [orthogonalize(x, steps=steps, coefficients=coefficients, dtype=self._ns_dtype) for x in blocks]
        if (beta2 := param_group.get(NORMUON)) is not None:
            polar = [self._row_moments.normalize(self.exchange.units[key], polar[0], beta2)]
        if step.telemetry is not None:
            for number, placed in enumerate(self.exchange.units[key]):
                if placed.workers[0] == self._dp_group.dp_rank:
                    step.telemetry.polar_factor(placed, stack[number], [x[number] for x in polar])
        if key.column_split:
            # `_apply_muon` uses the scale of the first block, so the other blocks get their ratio to it here.
            scales = [rules.lr_scale(key.rows, n, param_group["adjust_lr_fn"]) for n in key.column_split]
            polar = [torch.cat([x.mul(scale / scales[0]) for x, scale in zip(polar, scales)], dim=2)]
        # Pieces that stay are rounded like pieces that travel, so that the result does not depend on the cut.
        return self._update_codec.rounded(polar[0])

    def _apply_muon(self, step: Step, segment: Segment, weight: Tensor, polar: Tensor) -> None:
        """Compute line 6 on the elements of `segment`, in place; a parameter without a gradient is left alone."""
        decision = step.decisions[segment.param]
        if decision is None:
            return
        param_group = step.param_groups[self._group_of[segment.param]]
        # Matrices of a parameter may differ in scale; a segment has the scale of its unit's first column block.
        rows, columns = self._layout.unit_of(segment).logical_shapes[0]
        cautious, factors = param_group.get(CAUTIOUS, False), step.row_factors.get(segment.param)
        new = rules.muon_weight(
            weight,
            polar,
            lr=param_group["lr"],
            weight_decay=param_group["weight_decay"],
            scale=rules.lr_scale(rows, columns, param_group["adjust_lr_fn"]),
            cautious=cautious,
            out=decision.scratch(weight),
            unless=decision.found_inf if self._fused and factors is None and not cautious else None,
        )
        if factors is not None:
            new = self._scaled(new, segment, factors)
        decision.write(weight, new)

    def _adamw(self, masters: Masters, step: Step) -> None:
        together: dict[tuple[int, Decision], list[ShardPiece]] = {}
        for piece in self.storage.adamw:
            decision = step.decisions[piece.segment.param]
            if decision is not None:
                together.setdefault((self._group_of[piece.segment.param], decision), []).append(piece)
        for (number, decision), pieces in together.items():
            param_group = step.param_groups[number]
            cautious = param_group.get(CAUTIOUS, False)
            if cautious:
                self._decay_cautiously(pieces, masters, param_group, decision)
            rules.adamw_step(
                [masters(piece) for piece in pieces],
                [piece.grad for piece in pieces],
                [piece.state for piece in pieces],
                decision.found_inf,
                lr=param_group["lr"],
                weight_decay=0.0 if cautious else param_group["weight_decay"],
                betas=param_group["betas"],
                eps=param_group["eps"],
            )
            for piece in pieces if step.row_factors else ():
                factors = step.row_factors.get(piece.segment.param)
                if factors is not None:
                    master = masters(piece)
                    decision.write(master, self._scaled(master, piece.segment, factors))

    def _decay_cautiously(
        self, pieces: Sequence[ShardPiece], masters: Masters, param_group: dict[str, Any], decision: Decision
    ) -> None:
        for piece in pieces:
            master = masters(piece)
            mean = torch.lerp(piece.state["exp_avg"], piece.grad, 1.0 - param_group["betas"][0])  # as AdamW's will be
            lr, weight_decay = param_group["lr"], param_group["weight_decay"]
            decision.write(master, master * rules.cautious_decay(master, mean, lr=lr, weight_decay=weight_decay))

    def _scaled(self, weight: Tensor, segment: Segment, factors: Tensor) -> Tensor:
        """`weight`, the elements of `segment`, each times the factor of its row."""
        row_size = self._layout.specs[segment.param].numel // factors.numel()
        of_elements = factors.repeat_interleave(row_size)
        return weight * elements_of(of_elements, segment).reshape(weight.shape)

    # ---------------------------------------------------------------------------------- line 7: W whole, on all ranks

    def start_param_gather(self) -> None:
        """Start the all-gather of the updated shard."""
        with self._metrics.stage("start_all_gather", self.index):
            self.transport.start()

    def wait_params(self) -> None:
        """Wait for the all-gather, if it is in flight; then parameters may be read."""
        self.transport.wait()
