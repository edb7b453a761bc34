"""The algorithm of one bucket, one line a stage (`BucketWalk.run`), and the pipeline that interleaves the buckets.

Decides the order of momentum, exchange, Newton-Schulz and update. When a step begins, whether it counts and what
follows it is the optimizer's business; how each line is done is the business of the rooms below.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from distmuon.checks import Verdict
from distmuon.comm.group import DataParallelGroup
from distmuon.math import rules
from distmuon.math.coefficients import resolve
from distmuon.math.newton_schulz import orthogonalize
from distmuon.math.ns_kernels import decide
from distmuon.step.matrix_exchange import MatrixGather, StackKey
from distmuon.step.metrics import Metrics
from distmuon.step.param_gather import ParamGather, Updates
from distmuon.step.storage import BucketBuffers, Buffers, ShardPiece


@dataclass(slots=True)
class Step:
    """What all walks of one step share. `param_groups`: its hyperparameters, all numbers."""

    param_groups: Sequence[dict[str, Any]]
    verdict: Verdict
    exchanges_to_come: int = 0  # walks that have not sent their polar factors yet; after the last all-gathers may start


class BucketWalk:
    """One bucket's way through a step. `group_of`: by parameter, its index in the param groups."""

    def __init__(
        self,
        bucket: BucketBuffers,
        buffers: Buffers,
        group_of: Sequence[int],
        exchange_group: DataParallelGroup,
        param_gather: ParamGather,
        metrics: Metrics,
    ) -> None:
        layout, options = buffers.layout, buffers.options
        self._bucket, self._param_gather, self._metrics = bucket, param_gather, metrics
        self._group_of, self._ns_dtype, self._ns_kernels = group_of, options.precision.newton_schulz, options.ns_kernels
        self._step: Step
        # A segment has one scale, that of its matrix's first column block; matrices of one parameter may differ in it.
        # Of this rank's segments; of all where every rank applies what travels.
        segments = bucket.bucket.segments if param_gather.updates_travel else [piece.segment for piece in bucket.muon]
        of_muon = [segment for segment in segments if layout.specs[segment.param].rule == "muon"]
        self._shapes = {segment: layout.unit_of(segment).logical_shapes[0] for segment in of_muon}
        matrices = [matrix for matrix in layout.matrices if matrix.bucket == bucket.bucket.index]
        device = bucket.param_flat.device
        self._exchange = MatrixGather(
            matrices, bucket.muon, group_of, exchange_group, options.precision.wire, device, bucket.about
        )

    @property
    def exchanges(self) -> bool:
        """Pieces of this bucket's matrices travel."""
        return self._exchange.exchanges

    def run(self, step: Step) -> Iterator[None]:
        """Lines 2 to 7 of the walk. At each `yield` this bucket's bytes travel and another bucket may compute."""
        self._step = step
        bucket, index, stage = self._bucket, self._bucket.bucket.index, self._metrics.stage
        with stage("momentum", index):
            updates = self._momentum()
        with stage("start_dp_gather", index):
            finish_gather = self._exchange.start_gather(updates)
            del updates
        yield
        with stage("dp_gather", index):
            stacks = finish_gather()
        with stage("newton_schulz", index):
            polar_factors = {key: self._orthogonalize(key, stack) for key, stack in stacks.items()}
        with stage("start_scatter", index):
            finish_scatter = self._exchange.start_scatter(polar_factors)
            del finish_gather, stacks
            step.exchanges_to_come -= self.exchanges
            if not step.exchanges_to_come:
                self._param_gather.let_go()
        yield
        with stage("scatter", index):
            polar_pieces = finish_scatter()
            del finish_scatter, polar_factors
        travel, group_updates = self._param_gather.updates_travel, self._updates(step.verdict)
        with stage("apply", index), bucket.masters() as masters:
            if not travel:
                for piece, polar in zip(bucket.muon, polar_pieces):
                    group_updates.apply(piece.segment, piece.cut(masters), polar)
            self._adamw(masters, step.verdict)
        with stage("start_all_gather", index):
            if travel:
                self._param_gather.start_updates(index, group_updates, polar_pieces)
            else:
                self._param_gather.start(index)

    def _momentum(self) -> list[Tensor]:
        """The updates, one 1-D tensor a muon piece; the new momentum is kept where the verdict allows it."""
        updates, verdict = [], self._step.verdict
        for piece in self._bucket.muon:
            group, old = self._group(piece.segment.param), piece.momentum()
            in_place = verdict.known and verdict.present[piece.segment.param]
            out = old if in_place and old.dtype == torch.float32 else None  # out of int8: a transient, kept below
            mu, nesterov = group["momentum"], group["nesterov"]
            new, update = rules.muon_momentum(piece.grad, old, momentum=mu, nesterov=nesterov, out=out)
            if new is not piece.state["momentum_buffer"]:
                self._keep(piece, new, verdict)
            updates.append(update)
        return updates

    @staticmethod
    def _keep(piece: ShardPiece, momentum: Tensor, verdict: Verdict) -> None:
        if verdict.present[piece.segment.param]:
            for key, value in piece.stepped(momentum).items():
                rules.commit(verdict.ok, piece.state[key], value)

    def _orthogonalize(self, key: StackKey, stack: Tensor) -> Tensor:
        """(B, m, n) updates -> polar factors, of each column block by itself where the matrices have some."""
        group = self._step.param_groups[key.group]
        blocks = torch.split(stack, list(key.column_split), dim=2) if key.column_split else (stack,)
        self._metrics.ns_matrices += len(blocks) * stack.size(0)
        steps, coefficients, dtype = group["ns_steps"], group["ns_coefficients"], self._ns_dtype
        kernel = decide(self._ns_kernels, stack.device, dtype, resolve(coefficients, steps)).kernel
        polar = [
            orthogonalize(block, steps=steps, coefficients=coefficients, dtype=dtype, kernel=kernel) for block in blocks
        ]
        if key.column_split:
            # One piece has one scale, that of the first block; the others' ratio to it goes in here.
            scales = [rules.lr_scale(key.rows, n, group["adjust_lr_fn"]) for n in key.column_split]
            polar = [torch.cat([block.mul(scale / scales[0]) for block, scale in zip(polar, scales)], dim=2)]
        # What stays here is rounded like what travels, so that the cut does not show in the result.
        narrower = self._exchange.dtype.itemsize < dtype.itemsize
        return polar[0].to(self._exchange.dtype if narrower else dtype).contiguous()

    def _updates(self, verdict: Verdict) -> Updates:
        factors = {}
        for segment, shape in self._shapes.items():
            if verdict.present[segment.param]:
                group = self._group(segment.param)
                factors[segment] = group["lr"], group["weight_decay"], rules.lr_scale(*shape, group["adjust_lr_fn"])
        return Updates(factors, verdict)

    def _adamw(self, masters: Tensor, verdict: Verdict) -> None:
        for number, group in enumerate(self._step.param_groups):
            mine = [p for p in self._bucket.adamw if self._group_of[p.segment.param] == number]
            mine = [p for p in mine if verdict.present[p.segment.param]]
            if not mine:
                continue
            rules.adamw_step(
                [piece.cut(masters) for piece in mine],
                [piece.grad for piece in mine],
                [piece.state for piece in mine],
                verdict.ok,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                betas=group["betas"],
                eps=group["eps"],
            )

    def _group(self, param: int) -> dict[str, Any]:
        return self._step.param_groups[self._group_of[param]]


def pipeline(walks: Sequence[Iterator[None]], overlap: bool) -> None:
    """Run the walks. With `overlap`, one walk's bytes travel while its neighbours compute:

    walk k     | momentum, start gather |
    walk k - 1 |                        | Newton-Schulz, start scatter |
    walk k - 2 |                                                       | apply, start all-gather |
    """
    if not overlap:
        for walk in walks:
            deque(walk, maxlen=0)
        return
    running: deque[Iterator[None]] = deque()
    waiting = iter(walks)
    while True:
        running.extendleft(islice(waiting, 1))
        if not running:
            return
        done = object()
        running = deque(walk for walk in tuple(running) if next(walk, done) is not done)
