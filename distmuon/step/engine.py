"""The order in which an optimizer's buckets run, and the verdict that they share.

This module decides when a bucket reduces, updates and gathers, and that nothing is written before the verdict. It knows
no formula: `bucket.py` defines what a bucket does, and `optimizer.py` has the interface of torch.optim.

[Note: when all-gathers start] By default a bucket's all-gather starts as soon as the bucket is updated, since `step`
waits for all of them: a later start would gain nothing. NCCL runs the collectives of a group one after another, so such
an all-gather delays the pieces of later buckets, and with them Newton-Schulz. With `overlap="forward"` it can run under
the next forward instead. There it waits until exchanges hardly wait for it (`start_gathers` in layout/layout.py; by the
estimate of docs/planner.md, Moonlight at dp 64: 28 ms of step and 95 left to the forward, not 72 and 41). An
`exchange_group` has a queue of its own, so nothing needs to be held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from math import isinf
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.comm.agreement import in_each_group
from distmuon.comm.group import DataParallelGroup
from distmuon.errors import problem
from distmuon.layout.layout import Layout
from distmuon.math import rules
from distmuon.options import Options
from distmuon.step import cut, initial_values, verdict
from distmuon.step.bucket import Bucket, Stage, Step
from distmuon.step.dtensors import local_of
from distmuon.step.flat_storage import FlatStorage
from distmuon.step.given_storage import GivenStorage
from distmuon.step.grad_reduce import make_source
from distmuon.step.matrix_exchange import MatrixExchange
from distmuon.step.metrics import Metrics
from distmuon.step.param_gather import Nothing, Parameters, Transport, Updates
from distmuon.step.row_moments import RowMoments
from distmuon.step.storage import BucketStorage, Storage
from distmuon.step.telemetry import Telemetry

LATE_S = 300.0  # how much later than the first rank the last may come to drop gradients


class Engine:
    """Runs the buckets of an optimizer.

    `groups`: the process groups of buckets, by number; the others lie inside the first, where the verdict is reached.
    `exchange_groups`: the same ranks, for pieces of matrices. `group_of`: the param group of each parameter.
    `gathers_in_forward`: `step` returns before parameters have arrived. `model_group`: the ranks that hold the other
    parts of the model.
    """

    def __init__(
        self,
        layout: Layout,
        params: Sequence[nn.Parameter],
        groups: Sequence[DataParallelGroup],
        exchange_groups: Sequence[DataParallelGroup],
        options: Options,
        group_of: Sequence[int],
        metrics: Metrics,
        *,
        gathers_in_forward: bool,
        normuon: Collection[int] = (),
        model_group: DataParallelGroup | None = None,
    ) -> None:
        self._groups = groups
        self._group = group = groups[0]
        self._model_group = model_group
        self._options = options
        self._metrics = metrics
        self._group_of = group_of
        # See [Note: when all-gathers start]. At most two messages of updates may be in flight, so none is deferred.
        one_queue = exchange_groups[0].process_group is group.process_group
        waits = gathers_in_forward and one_queue and options.sharding.param_gather == "parameters"
        self._gathers_started = layout.gathers_started if waits else range(1, len(layout.buckets) + 1)
        kind = GivenStorage if layout.given else FlatStorage
        storages = [kind(spec, layout, params, groups[spec.group].dp_rank, options) for spec in layout.buckets]
        self.storage = Storage(layout, params, group.dp_rank, options, storages, normuon)
        self.buckets = [self._make_bucket(storage, exchange_groups, group_of) for storage in self.storage.buckets]
        self.source = make_source(self.buckets, self.storage, group)
        pieces = [piece for storage in storages for piece in storage.muon + storage.adamw if not piece.segment.replica]
        copies = [(layout.specs[piece.segment.param].copies, piece) for piece in pieces]
        self._copied = [(number, piece) for number, piece in copies if number > 1]
        self._in_flight: dict[int, Bucket] = {}  # buckets whose all-gather has started, in order
        self._has_streams = self.storage.device.type == "cuda"
        self._verdict: verdict.Verdict | None = None
        self._clipped = False
        self._disagreement: _Copied | None = None
        self._stepped = False  # whether the last call was a step
        self.grad_norm: Tensor | None = None  # of the last step, before clipping
        self.last_ok: Tensor | None = None  # the last step counted; 0-dim bool on the device
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.storage.device)
        self.telemetry: dict[str, dict[str, Any]] | None = None  # of the last step, by parameter
        self.row_factors: dict[int, Tensor] = {}  # of the next step, see `Step`

    def _make_bucket(
        self, storage: BucketStorage, exchange_groups: Sequence[DataParallelGroup], group_of: Sequence[int]
    ) -> Bucket:
        layout, wire = self.storage.layout, self._options.precision.wire
        units = [placed for placed in layout.matrices if placed.bucket == storage.spec.index]
        exchange = MatrixExchange(
            units,
            [piece.segment for piece in storage.muon],
            group_of,
            exchange_groups[storage.spec.group],
            wire,
            self.storage.device,
            storage.label,
            layout.relays_of(storage.spec.index),
        )
        ns_dtype, codec = self._options.precision.newton_schulz, self._options.precision.update_codec
        transport = self._transport(storage)
        group, moments = self._groups[storage.spec.group], self.storage.row_moments
        row_moments = RowMoments(
            {index: moments[index] for index in storage.spec.params if index in moments},
            exchange_groups[storage.spec.group],
        )
        return Bucket(
            storage, exchange, transport, layout, group_of, ns_dtype, codec, group, self._metrics, row_moments
        )

    def _transport(self, storage: BucketStorage) -> Transport:
        if not isinstance(storage, FlatStorage):
            return Nothing(storage, self.storage.params)
        group = self._groups[storage.spec.group]
        if self._options.sharding.param_gather == "updates" and group.dp_size > 1:
            return Updates(storage, group, self.storage.layout, self._options.precision.update_codec)
        return Parameters(storage, group)

    # -------------------------------------------------------------------------------------------------- gradients

    def collect(self, index: int, sync: bool) -> None:
        """Accept the complete gradient of parameter `index`; `sync`: this is the step's last micro-batch."""
        layout = self.storage.layout
        if layout.bucket_of[index] in self._in_flight:
            raise problem(
                layout.specs[index].fqn,
                found="it was used in forward before its all-gather was waited for",
                needed="parameters are waited for in the forward of the module that holds them",
                cure="call optimizer.synchronize() before the forward, or pass Sharding(overlap=True)",
            )
        self.source.accept(index, sync)
        if not self.source.finished:
            self._verdict = None  # it judged gradients that were dropped or have changed since

    def reduce(self, fingerprint: int) -> Sequence[bool] | None:
        """Finish the reduction and agree on the verdict; return whether each parameter had a gradient on this rank.

        Returns None if this was done before in this step. `fingerprint`: see `verdict.judge`.
        """
        if self._verdict is not None and not self.source.changed:
            return None
        if self._verdict is not None:
            self.source.reset()  # the user has written gradients since they were read
        self.wait_params()  # parameters are read below, and the forward may not have waited for all of them
        self.storage.absorb_external_writes()
        with self._metrics.stage("finish_reduce_scatter"):
            present = self.source.finish()
        if self._metrics.steps == 0:
            self._check_promises()
        with self._metrics.stage("guard"):
            self._verdict = self._judge(present, fingerprint)
        self._clipped = False
        self.grad_norm = self._verdict.total_norm
        return present

    def _judge(self, present: Sequence[bool], fingerprint: int) -> verdict.Verdict:
        buckets = self.storage.buckets
        shards = [grad for storage in buckets for grad in storage.averaged()]
        copies: dict[int, list[Tensor]] = {}
        for number, piece in self._copied:
            if piece.grad.numel():
                copies.setdefault(number, []).append(piece.grad)
        return verdict.judge(
            shards or [torch.zeros(1, device=self.storage.device)],  # a rank without any element
            [piece.grad for storage in buckets for piece in storage.adamw if piece.grad.numel()],
            present,
            self._group,
            fingerprint,
            replicas=[grad for storage in buckets for grad in storage.averaged(replicas=True)],
            model_group=self._model_group,
            copies=copies,
            elsewhere=[(group, self.storage.layout.members(n)) for n, group in enumerate(self._groups) if n],
        )

    def _check_promises(self) -> None:
        """Compare the first gradients where others have promised to average them. Collective."""
        layout, params = self.storage.layout, self.storage.params
        if layout.given:
            cut.check_replicated_grads(layout.specs, layout.given, params, self._group)
        elif self._options.grad_reduction == "external":

            def compare(number: int, group: DataParallelGroup) -> None:
                grads = [grad for index in layout.members(number) if (grad := params[index].grad) is not None]
                initial_values.agree_on_reduced(grads, group)

            in_each_group(self._groups, compare, stage="comparison of the first gradients")

    def ranks_disagree(self) -> bool:
        """Whether hyperparameters or optimizers differed between ranks. Called once a step, on all ranks.

        On a GPU the answer is about the previous verdict, whose step was skipped, so that the host need not wait.
        """
        assert self._verdict is not None
        if self._verdict.ok_on_host is not None:
            disagree = bool(self._verdict.disagree)
        else:
            before, self._disagreement = self._disagreement, _Copied(self._verdict.disagree)
            disagree = before is not None and before.read()
        if disagree:
            self._verdict = self._disagreement = None
        return disagree

    def clip(self, max_norm: float, norm_type: float) -> Tensor:
        """Scale the reduced gradients so that their norm is at most `max_norm`; return the norm before."""
        assert self._verdict is not None
        norm = self._verdict.total_norm
        coefficient = rules.clip_coefficient(norm, max_norm, norm_type)
        self._clipped |= not isinf(max_norm)
        self._scale(coefficient)
        return norm

    def unscale(self, inverse_scale: Tensor) -> Tensor:
        """Undo the loss scale of the reduced gradients; return 1.0 if any is not finite on any rank, else 0.0."""
        if self._clipped:
            raise problem(
                "GradScaler",
                found="gradients were clipped while they had the loss scale",
                needed="unscaling must come before clipping",
                cure="call scaler.unscale_ before clip_grad_norm_ (and, with max_grad_norm, before reduce_gradients)",
            )
        assert self._verdict is not None
        self._scale(inverse_scale)
        self.grad_norm = self._verdict.total_norm
        return (~self._verdict.ok).to(torch.float32)

    def _scale(self, coefficient: Tensor) -> None:
        assert self._verdict is not None
        coefficient = torch.where(self._verdict.ok, coefficient, 1.0)  # a NaN would stay in the padding forever
        self.source.scale(coefficient)
        self._verdict = replace(self._verdict, total_norm=self._verdict.total_norm * coefficient)

    @property
    def holds_grads(self) -> bool:
        """Whether gradients of this step have left `param.grad`."""
        return self.source.holds_grads

    def forget(self) -> None:
        """Drop the gradients of this step, accumulated or reduced.

        Right after a step this is local. Later a rank may have begun to reduce while another had no backward, so all
        ranks must call this; it raises if a rank does not.
        """
        if self._may_have_begun and not self.source.finished and (self.source.begun or not self._stepped):
            self._meet_to_forget()
            self.finish_begun_reductions()
        self._stepped = False
        self.source.reset()
        self._verdict = None

    def _meet_to_forget(self) -> None:
        named = self._group.roll.named
        where = f"zero_grad on {named([self._group.dp_rank])}"
        needed = "between backward and step, and in a second call, it drops gradients that all ranks began to reduce"
        cure = "call it on all ranks; model.zero_grad() drops gradients that only this rank accumulated under no_sync"

        def warning(absent: Sequence[int]) -> str:
            return str(problem(where, found=f"waits for {named(absent)}", needed=needed, cure=cure))

        missing = self._group.missing_ranks("zero_grad", warning, LATE_S)
        if missing:
            raise problem(where, found=f"{named(list(missing))} did not call it", needed=needed, cure=cure)

    def finish_begun_reductions(self) -> None:
        """Finish reductions that a backward on any rank has begun, before other collectives follow.

        Collective, since a rank without a backward does not know of them.
        """
        if self._may_have_begun and any(self._group.gather_objects(self.source.begun, stage="reductions under way")):
            self.source.finish()

    def finish_reductions(self) -> None:
        """Finish this step's reductions on all ranks, even on a rank without a backward. Collective."""
        self.source.finish()

    @property
    def _may_have_begun(self) -> bool:
        return bool(self._options.sharding.overlap) and not self._options.grads_stay(self._group.dp_size)

    # ----------------------------------------------------------------------------------------------------- update

    def update(self, param_groups: Sequence[dict[str, Any]], *, measure: bool = False) -> None:
        """Update all buckets; all-gathers may stay in flight. `param_groups`: the step's groups, with lr as numbers.

        `measure`: leave telemetry of this step in `self.telemetry`, None if it was skipped; waits for the device.
        """
        judged, self._verdict = self._verdict, None
        assert judged is not None
        judged = judged.final()
        self.telemetry = None
        if not judged.known_to_skip:  # on a GPU no host knows; there every write is masked, see `OnDevice`
            with torch.autocast(self.storage.device.type, enabled=False):
                telemetry = self._measured_weights(param_groups, judged) if measure else None
                self._update_buckets(Step(param_groups, judged.decisions(), self.row_factors, telemetry))
                if telemetry is not None:
                    self._finish_telemetry(telemetry, judged)
        self.row_factors = {}
        self.skipped += ~judged.ok
        self.last_ok = judged.ok
        self.source.reset()
        self._stepped = True

    def _measured_weights(self, param_groups: Sequence[dict[str, Any]], judged: verdict.Verdict) -> Telemetry:
        """Telemetry of the step to come that knows the weights before it."""
        present, device = judged.present_on_host(), self.storage.device
        telemetry = Telemetry(self.storage.layout, param_groups, self._group_of, present, device)
        with self._metrics.stage("telemetry"):
            for bucket in self.buckets:
                telemetry.weights(bucket.storage, bucket.exchange, self._groups[bucket.storage.spec.group].dp_rank)
        return telemetry

    def _finish_telemetry(self, telemetry: Telemetry, judged: verdict.Verdict) -> None:
        with self._metrics.stage("telemetry"):
            for bucket in self.buckets:
                telemetry.adamw_updates(bucket.storage)
            record = telemetry.record(self._groups)
        self.telemetry = record if bool(judged.ok) else None

    def _update_buckets(self, step: Step) -> None:
        # Backward finishes the last layers first, but the next forward needs the first layers first.
        buckets = self.buckets[::-1]
        started = 0  # see [Note: when all-gathers start]
        for done in in_pipeline(buckets, step, bool(self._options.sharding.overlap)):
            target = self._gathers_started[done - 1]
            for bucket in buckets[started:target]:
                self._start_param_gather(bucket)
            started = target

    def not_finite(self) -> list[str]:
        """The parameters of which the last averaged gradient, where it still is, has elements that are not finite."""
        found: set[int] = set()
        for storage in self.storage.buckets:
            if storage.reduction is not None:
                held = [(piece.segment.param, piece.grad) for piece in storage.muon + storage.adamw]
            else:
                grads = [(index, self.storage.params[index].grad) for index in storage.spec.params]
                held = [(index, local_of(grad)) for index, grad in grads if grad is not None]
            found |= {index for index, grad in held if not bool(grad.isfinite().all())}
        names = [self.storage.layout.specs[index].fqn for index in sorted(found)]
        by_rank = self._group.gather_objects(names, stage="gradients that are not finite")
        return list(dict.fromkeys(name for names in by_rank for name in names))

    # ------------------------------------------------------------------------------------------------- parameters

    def _start_param_gather(self, bucket: Bucket) -> None:
        if bucket.transport.has_message:  # a message has memory of its own, so at most two are in flight
            self.wait_params(list(self._in_flight)[:-1])
        self._in_flight[bucket.index] = bucket
        bucket.start_param_gather()

    @property
    def must_wait(self) -> bool:
        """Whether the current stream may have to wait for parameters: on a GPU another stream may have waited."""
        return bool(self._in_flight) or self._has_streams

    def wait_params(self, indices: Iterable[int] | None = None) -> None:
        """Wait for the all-gathers of the buckets `indices` (None: all); cheap if nothing is in flight."""
        if not self.must_wait:
            return
        all_indices = range(len(self.buckets)) if self._has_streams else self._in_flight
        for index in sorted(all_indices if indices is None else indices):
            if self._in_flight.pop(index, None) is not None or self._has_streams:
                self.buckets[index].wait_params()

    def wait_quietly(self) -> None:
        """Best-effort wait for finalizers, which must not raise; peers may already be gone."""
        with suppress(RuntimeError, ValueError):
            self.wait_params()

    def gather_all(self) -> None:
        """Send the parameters to all ranks after masters have been written. Blocking."""
        flat = [storage for storage in self.storage.buckets if isinstance(storage, FlatStorage)]
        transports = [Parameters(storage, self._groups[storage.spec.group], "state_dict") for storage in flat]
        for transport in transports:
            transport.start()
        for transport in transports:
            transport.wait()


def in_pipeline(buckets: Sequence[Bucket], step: Step, overlap: bool) -> Iterator[int]:
    """Update the buckets, which are done in their order; yield the number of those that are done.

    With `overlap`, a bucket's bytes travel while its neighbours compute:

    bucket k     | momentum, start gather |
    bucket k - 1 |                        | Newton-Schulz, start scatter |
    bucket k - 2 |                                                       | apply, start all-gather |
    """
    waiting = iter([bucket.update(step) for bucket in buckets])
    running: deque[Iterator[Stage]] = deque()
    done = 0
    while True:
        if overlap or not running:
            running.extendleft(islice(waiting, 1))
        if not running:
            return
        for life in tuple(running):
            if next(life, None) is None:
                running.remove(life)
                done += 1
                yield done


class _Copied:
    """A 0-dim bool that is being copied from a GPU to the host."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = torch.empty_like(flag, device="cpu", pin_memory=flag.is_cuda)
        self._flag.copy_(flag, non_blocking=True)
        self._arrived = torch.cuda.Event() if flag.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> bool:
        """The value. A copy from the previous step has arrived long ago; the host may lead by one step only."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
