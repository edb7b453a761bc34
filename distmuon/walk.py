"""The algorithm of one bucket, one line a stage (`BucketWalk.run`), and the pipeline that interleaves the buckets.

Decides the order of momentum, exchange, Newton-Schulz and update. When a step begins, whether it counts and what
follows it is the optimizer's business; how each line is done is the business of the rooms below.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from distmuon import rules
from distmuon.buffers import BucketBuffers, ShardPiece
from distmuon.coefficients import resolve
from distmuon.collectives import DataParallelGroup
from distmuon.config import Options
from distmuon.guards import Verdict
from distmuon.layout import Layout
from distmuon.matrix_gather import MatrixGather, StackKey
from distmuon.metrics import Metrics
from distmuon.newton_schulz import orthogonalize
from distmuon.ns_kernels import decide


class BucketWalk:
    """One bucket's way through a step. `group_of`: by parameter, its index in the param groups."""

    def __init__(
        self,
        bucket: BucketBuffers,
        layout: Layout,
        group: DataParallelGroup,
        group_of: Sequence[int],
        options: Options,
        metrics: Metrics,
    ) -> None:
        self._bucket, self._metrics, self._ns_dtype = bucket, metrics, options.ns_dtype
        self._ns_kernels = options.ns_kernels
        self._group_of = group_of
        self._param_groups: Sequence[dict[str, Any]] = ()
        self._shapes = [layout.unit_of(piece.segment).logical_shapes[0] for piece in bucket.muon]
        matrices = [matrix for matrix in layout.matrices if matrix.bucket == bucket.bucket.index]
        self._exchange = MatrixGather(
            matrices, bucket.muon, group_of, group, options.ns_dtype, bucket.param_flat.device
        )

    def run(
        self, verdict: Verdict, param_groups: Sequence[dict[str, Any]], start_all_gather: Callable[[int], None]
    ) -> Iterator[None]:
        """Lines 2 to 7 of the walk. At each `yield` this bucket's bytes travel and another bucket may compute.

        `param_groups`: this step's hyperparameters, all numbers.
        """
        self._param_groups = param_groups
        bucket, index, stage = self._bucket, self._bucket.bucket.index, self._metrics.stage
        with stage("momentum", index):
            updates = [self._momentum(piece, verdict) for piece in bucket.muon]
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
        yield
        with stage("scatter", index):
            polar_pieces = finish_scatter()
        with stage("apply", index):
            for piece, polar, shape in zip(bucket.muon, polar_pieces, self._shapes):
                self._apply(piece, polar, shape, verdict)
            del finish_scatter, polar_factors, polar_pieces
            self._adamw(bucket.adamw, verdict)
        with stage("start_all_gather", index):
            start_all_gather(index)

    def _momentum(self, piece: ShardPiece, verdict: Verdict) -> Tensor:
        group, buffer = self._group(piece.segment.param), piece.state["momentum_buffer"]
        mu, nesterov = group["momentum"], group["nesterov"]
        new_buffer, update = rules.muon_momentum(piece.grad, buffer, momentum=mu, nesterov=nesterov)
        if verdict.present[piece.segment.param]:
            rules.commit(verdict.ok, buffer, new_buffer)
        return update

    def _orthogonalize(self, key: StackKey, stack: Tensor) -> Tensor:
        """(B, m, n) updates -> polar factors, of each column block by itself where the matrices have some."""
        group = self._param_groups[key.group]
        blocks = torch.split(stack, list(key.column_split), dim=2) if key.column_split else (stack,)
        self._metrics.ns_matrices += len(blocks) * stack.size(0)
        steps, coefficients, dtype = group["ns_steps"], group["ns_coefficients"], self._ns_dtype
        kernel = decide(self._ns_kernels, stack.device, dtype, resolve(coefficients, steps)).kernel
        polar = [
            orthogonalize(block, steps=steps, coefficients=coefficients, dtype=dtype, kernel=kernel) for block in blocks
        ]
        if not key.column_split:
            return polar[0].contiguous()
        # One piece has one scale, that of the first block; the others' ratio to it goes in here.
        scales = [rules.lr_scale(key.rows, n, group["adjust_lr_fn"]) for n in key.column_split]
        return torch.cat([block.mul(scale / scales[0]) for block, scale in zip(polar, scales)], dim=2)

    def _apply(self, piece: ShardPiece, polar: Tensor, shape: tuple[int, int], verdict: Verdict) -> None:
        if not verdict.present[piece.segment.param]:
            return
        group = self._group(piece.segment.param)
        scale = rules.lr_scale(*shape, group["adjust_lr_fn"])
        lr, decay = group["lr"], group["weight_decay"]
        new = rules.muon_weight(piece.master, polar, lr=lr, weight_decay=decay, scale=scale)
        rules.commit(verdict.ok, piece.master, new)

    def _adamw(self, pieces: Sequence[ShardPiece], verdict: Verdict) -> None:
        for number, group in enumerate(self._param_groups):
            mine = [p for p in pieces if self._group_of[p.segment.param] == number and verdict.present[p.segment.param]]
            if not mine:
                continue
            rules.adamw_step(
                [piece.master for piece in mine],
                [piece.grad for piece in mine],
                [piece.state for piece in mine],
                verdict.ok,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                betas=group["betas"],
                eps=group["eps"],
            )

    def _group(self, index: int) -> dict[str, Any]:
        return self._param_groups[self._group_of[index]]


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
