"""The built rooms of one optimizer, and the order in which a step goes through them.

Decides when a bucket's walk begins, and that nothing is written before the guard has spoken. What a walk does is
`walk.py`; arguments, param groups and everything that torch.optim users see is `optimizer.py`.

[Note: early walks] With overlap="backward" the walk of bucket k-1 begins inside backward, as soon as the reduction of
bucket k has started (on all ranks, in the same order). By then its own gradient shard has had the time of one bucket to
arrive. It goes on to its polar factors, which it holds, together with its new momentum, until the verdict; the
parameters, moments and buffers of a step that is skipped or forgotten are never touched. The order of arithmetic inside
a bucket is that of a walk in `step`, so the bits are the same. What travels, in order:

      reduce k | gather k-1 | scatter k-2 | reduce k+1 | gather k | scatter k-1 | ...

On CUDA early walks compute on a stream of their own beside backward's. It waits for backward's stream before each
stage, and backward's waits for it once, before the verdict. So whatever one stream frees, the other has finished with
before it gets the memory again.

[Note: all-gathers come last] NCCL runs the collectives of a group one after another. An all-gather that starts as soon
as its bucket is updated keeps the pieces of the buckets after it waiting, and with them Newton-Schulz. Under the next
forward it disturbs nobody. So where forwards wait for parameters, all-gathers start once the last pieces have been
sent home (docs/planner.md: 8B at dp 64 69 ms instead of 83, by the estimate). With an `exchange_group` there is no
queue to hold up, and where `step` itself must wait for the parameters nothing is gained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import isinf
from typing import Any

import torch
from torch import Tensor, nn

from distmuon import guards, rules
from distmuon.buffers import Buffers
from distmuon.collectives import DataParallelGroup
from distmuon.config import Options
from distmuon.errors import problem
from distmuon.grad_reduce import make_source
from distmuon.layout import Layout
from distmuon.metrics import Metrics
from distmuon.param_gather import ParamGather
from distmuon.walk import BucketWalk, Step, pipeline

_USED_EARLY = ("momentum", "nesterov", "ns_steps", "ns_coefficients", "adjust_lr_fn")


class Conductor:
    """`hyperparameters()`: the param groups' entries now, all numbers; `group_of`: by parameter, its param group."""

    def __init__(
        self,
        layout: Layout,
        params: Sequence[nn.Parameter],
        group: DataParallelGroup,
        exchange_group: DataParallelGroup,
        options: Options,
        group_of: Sequence[int],
        hyperparameters: Callable[[], list[dict[str, Any]]],
        metrics: Metrics,
        gathers_last: bool,
    ) -> None:
        self._group, self._options, self._metrics = group, options, metrics
        self._hyperparameters = hyperparameters
        self._gathers_last = gathers_last and options.param_gather == "parameters"
        self.buffers = Buffers(layout, params, group.dp_rank, options)
        self.source = make_source(self.buffers, group, options, self._on_reduce_started)
        self.param_gather = ParamGather(self.buffers, group)
        shared = (self.buffers, group_of, exchange_group, self.param_gather, metrics)
        self._walks = [BucketWalk(bucket, *shared) for bucket in self.buffers.buckets]
        device = self.buffers.device
        self._verdict: guards.Verdict | None = None
        self._step: Step | None = None  # of the early walks
        self._early: list[Iterator[None]] = []
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and options.overlap == "backward":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.grad_norm: Tensor | None = None  # of the last step, before clipping
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def accept(self, index: int, param: nn.Parameter, sync: bool) -> None:
        """Autograd has finished the gradient of parameter `index`; `sync`: in the step's last micro-batch."""
        layout = self.buffers.layout
        if self._options.grad_reduction == "external" and self._verdict is not None:
            self.forget()  # a step was left out: what was read of its gradients is stale
        self.param_gather.check_arrived(layout.bucket_of[index], layout.specs[index].fqn)
        self.source.accept(index, param, sync)

    def reduce(self) -> Sequence[bool] | None:
        """Finish the reduction and agree on the verdict: by parameter, whether it had a gradient here.

        None if that was done already in this step.
        """
        if self._verdict is not None:
            return None
        self.param_gather.wait()  # `adopt` reads staged parameters, and a forward need not have used them all
        self.buffers.adopt()
        with self._metrics.stage("finish_reduce_scatter"):
            present = self.source.finish()
        self._finish_early()
        if self._options.grad_reduction == "external" and self._metrics.steps == 0:
            guards.agree_on_reduced([p.grad for p in self.buffers.params if p.grad is not None], self._group)
        with self._metrics.stage("guard"):
            shards = [bucket.grad_shard for bucket in self.buffers.buckets]
            self._verdict = guards.check(shards, present, self._group)
        self.grad_norm = self._verdict.total_norm
        return present

    def clip(self, max_norm: float, norm_type: float) -> Tensor:
        """Scale the reduced gradients to `max_norm` at the most; returns their norm before."""
        assert self._verdict is not None
        norm = self._verdict.total_norm
        coefficient = rules.clip_coefficient(norm, max_norm, norm_type)
        if self._early and not isinf(max_norm):
            raise problem(
                "clip_grad_norm_", f'found max_norm={max_norm} with overlap="backward"',
                "updates that may begin before the norm is known are needed", "pass overlap=True to DistMuon",
            )  # fmt: skip
        self._scale(coefficient)
        return norm

    def unscale(self, inverse_scale: Tensor) -> Tensor:
        """Undo the loss scale on the reduced gradients; returns 1.0 where some rank's are not finite, else 0.0."""
        if self._early:
            raise problem(
                "GradScaler", 'found overlap="backward", whose updates have begun from scaled gradients',
                "updates that may wait for the scale are needed", "pass overlap=True to DistMuon",
            )  # fmt: skip
        assert self._verdict is not None
        self._scale(inverse_scale)
        self.grad_norm = self._verdict.total_norm
        return (~self._verdict.ok).to(torch.float32)

    def _scale(self, coefficient: Tensor) -> None:
        assert self._verdict is not None
        # NaN times the padding's zeros would stay in the padding, and every later step would be skipped.
        coefficient = torch.where(self._verdict.ok, coefficient, 1.0)
        for bucket in self.buffers.buckets:
            bucket.grad_shard.mul_(coefficient)
        self._verdict = replace(self._verdict, total_norm=self._verdict.total_norm * coefficient)

    def update(self, numbers: Sequence[dict[str, Any]]) -> None:
        """The walks of all buckets, or what is left of them, by the hyperparameters `numbers`. Leaves the all-gathers
        under way."""
        verdict, self._verdict = self._verdict, None
        assert verdict is not None
        step, walks = self._step or Step(numbers), self._early
        _check_unchanged(step.param_groups, numbers)
        step.param_groups, step.verdict = numbers, verdict
        if verdict.known is not False:
            with torch.autocast(self.buffers.device.type, enabled=False):
                # Backward finishes the last layers first; the next forward needs the first ones first.
                if not walks:
                    walks = [walk.run(step) for walk in self._walks]
                    step.exchanges_to_come = sum(walk.exchanges for walk in self._walks)
                    if self._gathers_last and step.exchanges_to_come:
                        self.param_gather.hold()
                pipeline(walks[::-1], bool(self._options.overlap))
        self._step, self._early = None, []
        self.skipped += ~verdict.ok
        self.source.reset()

    def forget(self) -> None:
        """Drop the gradients of this step, accumulated or reduced, and what was computed from them."""
        self.settle()  # what travels must arrive before its buffers go
        self.source.reset()
        self._step, self._early, self._verdict = None, [], None

    def settle(self) -> None:
        """Finish what a backward has begun to reduce, on all ranks alike, before collectives of another kind follow.

        Ranks may differ in the parameters that had a gradient, and so in the reductions that have started.
        """
        if self._options.overlap and self.source.synced:
            self.source.finish()
            self._finish_early()

    @property
    def has_begun(self) -> bool:
        """Early walks have made updates from the state as it was."""
        return bool(self._early)

    def _on_reduce_started(self, index: int) -> None:
        """See [Note: early walks]."""
        if self._options.overlap == "backward":
            if self._step is None:
                self._step = Step(self._hyperparameters())
            if index:
                self._begin_early(index - 1)

    @torch.no_grad()
    def _begin_early(self, index: int) -> None:
        assert self._step is not None
        with self._beside_backward():
            self.source.wait(index)
            self._early.append(self._walks[index].run(self._step))
            self._advance_early(3)

    def _advance_early(self, newest: int) -> None:
        """One stage of each of the newest walks, the newest first: its bytes travel while the others compute."""
        for walk in self._early[: -newest - 1 : -1]:
            next(walk)

    def _finish_early(self) -> None:
        """Bring all early walks to their polar factors, if they have begun."""
        if self._step is None or len(self._early) == len(self._walks):
            return
        self._begin_early(len(self._walks) - 1)
        with torch.no_grad(), self._beside_backward():
            self._advance_early(2)
            self._advance_early(1)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    @contextmanager
    def _beside_backward(self) -> Iterator[None]:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        aside = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with aside, torch.autocast(self.buffers.device.type, enabled=False):
            yield


def _check_unchanged(early: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> None:
    """Raise if a hyperparameter that early walks have used was changed between backward and `step`."""
    for number, (before, after) in enumerate(zip(early, now)):
        for key in _USED_EARLY:
            if before.get(key) != after.get(key):
                raise problem(
                    f"param_groups[{number}].{key}", f"changed from {before[key]} to {after[key]} after backward",
                    'with overlap="backward" updates have begun with the old value', "change it after step()",
                )  # fmt: skip
