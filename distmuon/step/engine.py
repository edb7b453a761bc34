"""The built rooms of one optimizer, and the order in which a step goes through them.

Decides when a bucket's walk begins, and that nothing is written before the guard has spoken. What a walk does is
`bucket.py`; arguments, param groups and everything that torch.optim users see is `optimizer.py`.

[Note: all-gathers come last] NCCL runs the collectives of a group one after another. An all-gather that starts as soon
as its bucket is updated keeps the pieces of the buckets after it waiting, and with them Newton-Schulz. Under the next
forward it disturbs nobody. So where forwards wait for parameters, all-gathers start once the last pieces have been
sent home (docs/planner.md: 8B at dp 64 69 ms instead of 83, by the estimate). With an `exchange_group` there is no
queue to hold up, and where `step` itself must wait for the parameters nothing is gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isinf
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.comm.group import DataParallelGroup
from distmuon.layout.layout import Layout
from distmuon.math import rules
from distmuon.options import Options
from distmuon.step.bucket import BucketWalk, Step, pipeline
from distmuon.step.grad_reduce import make_source
from distmuon.step.metrics import Metrics
from distmuon.step.param_gather import ParamGather
from distmuon.step.storage import Buffers

LATE_S = 300.0  # how much later than the first a rank may come to drop gradients


class Conductor:
    """`group_of`: by parameter, its param group."""

    def __init__(
        self,
        layout: Layout,
        params: Sequence[nn.Parameter],
        group: DataParallelGroup,
        exchange_group: DataParallelGroup,
        options: Options,
        group_of: Sequence[int],
        metrics: Metrics,
        gathers_last: bool,
    ) -> None:
        self._group, self._options, self._metrics = group, options, metrics
        self._gathers_last = gathers_last and options.sharding.param_gather == "parameters"
        self.buffers = Buffers(layout, params, group.dp_rank, options)
        self.source = make_source(self.buffers, group, options)
        self.param_gather = ParamGather(self.buffers, group)
        shared = (self.buffers, group_of, exchange_group, self.param_gather, metrics)
        self._walks = [BucketWalk(bucket, *shared) for bucket in self.buffers.buckets]
        device = self.buffers.device
        self._verdict: guards.Verdict | None = None
        self._clipped = False
        self._apart: _Copied | None = None
        self._stepped = False  # the last call was a step, or the first `forget` after it
        self.grad_norm: Tensor | None = None  # of the last step, before clipping
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def accept(self, index: int, param: nn.Parameter, sync: bool) -> None:
        """Autograd has finished the gradient of parameter `index`; `sync`: in the step's last micro-batch."""
        layout = self.buffers.layout
        self.param_gather.check_arrived(layout.bucket_of[index], layout.specs[index].fqn)
        self.source.accept(index, param, sync)
        if not self.source.finished:
            self._verdict = None  # gradients that were judged and not used by a step are dropped, or have grown

    def reduce(self, fingerprint: int) -> Sequence[bool] | None:
        """Finish the reduction and agree on the verdict: by parameter, whether it had a gradient here.

        None if that was done already in this step. `fingerprint`: see `guards.check`.
        """
        if self._verdict is not None and not self.source.changed:
            return None
        if self._verdict is not None:
            self.source.reset()  # the user has written gradients since they were read
        self.param_gather.wait()  # `adopt` reads staged parameters, and a forward need not have used them all
        self.buffers.adopt()
        with self._metrics.stage("finish_reduce_scatter"):
            present = self.source.finish()
        if self._options.grad_reduction == "external" and self._metrics.steps == 0:
            guards.agree_on_reduced([p.grad for p in self.buffers.params if p.grad is not None], self._group)
        with self._metrics.stage("guard"):
            shards = [bucket.grad_shard for bucket in self.buffers.buckets]
            squared = [piece.grad for bucket in self.buffers.buckets for piece in bucket.adamw]
            self._verdict = guards.check(shards, squared, present, self._group, fingerprint)
        self._clipped = False
        self.grad_norm = self._verdict.total_norm
        return present

    def ranks_went_apart(self) -> bool:
        """The last verdict found different hyperparameters, or optimizers, on the ranks; asked once a step, by all.

        On a GPU the answer is that of the verdict before: its step was skipped, and the host need not wait for this.
        """
        assert self._verdict is not None
        if self._verdict.known is not None:
            apart = bool(self._verdict.apart)
        else:
            before, self._apart = self._apart, _Copied(self._verdict.apart)
            apart = before is not None and before.read()
        if apart:
            self._verdict = self._apart = None
        return apart

    def clip(self, max_norm: float, norm_type: float) -> Tensor:
        """Scale the reduced gradients to `max_norm` at the most; returns their norm before."""
        assert self._verdict is not None
        norm = self._verdict.total_norm
        coefficient = rules.clip_coefficient(norm, max_norm, norm_type)
        self._clipped |= not isinf(max_norm)
        self._scale(coefficient)
        return norm

    def unscale(self, inverse_scale: Tensor) -> Tensor:
        """Undo the loss scale on the reduced gradients; returns 1.0 where some rank's are not finite, else 0.0."""
        if self._clipped:
            raise guards.clipped_before_unscaling()
        assert self._verdict is not None
        self._scale(inverse_scale)
        self.grad_norm = self._verdict.total_norm
        return (~self._verdict.ok).to(torch.float32)

    def _scale(self, coefficient: Tensor) -> None:
        assert self._verdict is not None
        coefficient = torch.where(self._verdict.ok, coefficient, 1.0)  # a NaN would stay in the padding for ever
        self.source.scale(coefficient)
        self._verdict = replace(self._verdict, total_norm=self._verdict.total_norm * coefficient)

    def update(self, numbers: Sequence[dict[str, Any]]) -> None:
        """The walks of all buckets, or what is left of them, by the hyperparameters `numbers`. Leaves the all-gathers
        under way."""
        verdict, self._verdict = self._verdict, None
        assert verdict is not None
        verdict = verdict.of_clipped()
        if verdict.known is not False:
            step = Step(numbers, verdict)
            step.exchanges_to_come = sum(walk.exchanges for walk in self._walks)
            if self._gathers_last and step.exchanges_to_come:
                self.param_gather.hold()
            with torch.autocast(self.buffers.device.type, enabled=False):
                # Backward finishes the last layers first; the next forward needs the first ones first.
                pipeline([walk.run(step) for walk in reversed(self._walks)], bool(self._options.overlap))
        self.skipped += ~verdict.ok
        self.source.reset()
        self._stepped = True

    def forget(self) -> None:
        """Drop the gradients of this step, accumulated or reduced.

        Right after a step this is local. Later some rank may have begun to reduce where another had no backward, so all
        ranks must come, and are told if one does not.
        """
        if self._may_have_begun and not self.source.finished and (self.source.begun or not self._stepped):
            named = self._group.roll.named
            where = f"zero_grad on {named([self._group.dp_rank])}"

            def warning(absent: Sequence[int]) -> str:
                return str(guards.forgot_alone(where, f"waits for {named(absent)}"))

            if missing := self._group.missing_ranks("zero_grad", warning, LATE_S):
                raise guards.forgot_alone(where, f"{named(list(missing))} did not call it")
            self.settle()
        self._stepped = False
        self.source.reset()
        self._verdict = None

    def settle(self) -> None:
        """Finish what a backward on any rank has begun to reduce, before collectives of another kind follow.

        Collective: a rank that had no backward would not know.
        """
        if self._may_have_begun and any(self._group.gather_objects(self.source.begun, stage="reductions under way")):
            self.source.finish()

    @property
    def _may_have_begun(self) -> bool:
        return bool(self._options.overlap) and not self._options.grads_stay(self._group.dp_size)


class _Copied:
    """A 0-dim bool on its way from a GPU to the host."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = torch.empty_like(flag, device="cpu", pin_memory=flag.is_cuda)
        self._flag.copy_(flag, non_blocking=True)
        self._arrived = torch.cuda.Event() if flag.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> bool:
        """Of a step ago it has long arrived: the host is held to a lead of one step, no device waits."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
