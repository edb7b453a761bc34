"""The conductor: builds the rooms below and conducts `step`. The algorithm of one bucket is `walk.BucketWalk.run`.

Decides order and time, nothing else: which rule is `routing`, where is `layout`, storage is `buffers`, bytes are
the movers', numbers are `rules` and `newton_schulz`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from distmuon import checkpoint, guards, planner, rules
from distmuon.buffers import Buffers
from distmuon.collectives import DataParallelGroup
from distmuon.config import AdjustLrFn, GradReduction, Hyperparameters, Options, Packing, Placement, check_groups
from distmuon.grad_reduce import ReducedGrads, make_source
from distmuon.hooks import Hooks
from distmuon.layout import Layout, make_layout
from distmuon.metrics import Metrics
from distmuon.param_gather import ParamGather
from distmuon.routing import Route, make_groups, route_params
from distmuon.walk import BucketWalk, pipeline


class DistMuon(torch.optim.Optimizer):
    r"""Muon for hidden matrices and AdamW for the rest, sharded over the data-parallel group (ZeRO-1).

    For each matrix ``W`` of logical shape (m, n), stored (out, in), with averaged gradient ``G``
    (arXiv 2502.16982, Algorithm 1)::

        M = mu*M + (1-mu)*G                          on this rank's shard
        U = (1-mu)*G + mu*M                          (Nesterov), M otherwise
        O = newton_schulz(U / ||U||)                 once per matrix in the group
        W = W - lr*(0.2*sqrt(max(m, n))*O + wd*W)    on the shard of the float32 master

    Args:
        params: the model (routed by `distmuon.route`), or an iterable of (fqn, parameter) pairs, or of dicts
            ``{"params": [(fqn, parameter), ...], "rule": "muon" | "adamw", **group entries}``.
        lr: learning rate of both rules: the scale matches AdamW's update RMS, so one serves both.
        weight_decay: decoupled, times lr, not times the scale.
        momentum, nesterov, ns_steps, ns_coefficients, adjust_lr_fn: as in `torch.optim.Muon`; coefficients by
            the name of a table in `newton_schulz.COEFFICIENTS` or as a triple.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: the AdamW part; None: the same as Muon's.
        routes: decisions that go before the defaults, first match wins; ``"adamw"``: no Muon, on purpose.
        process_group: the data-parallel group. None: the default group, or one rank without torch.distributed.
        bucket_mb: size of a bucket in MiB of float32 gradients. None: chosen from model and dp_size.
        packing: "balanced" (whole matrices where they fit) or "contiguous" (even cuts, Megatron's way).
        placement: "owner" (each matrix orthogonalized once) or "replicated" (by all that hold a piece).
        grad_reduction: "reduce_scatter" (here, under backward) or "external" (gradients arrive averaged).
        reduce_dtype: of the gradient buffers and their reduction. None: float32.
        momentum_dtype: of the momentum buffer.
        ns_dtype: of Newton-Schulz and of the exchange of matrix pieces. None: bfloat16.
        max_grad_norm: clip every step's averaged gradient to this global norm. None: only on `clip_grad_norm_`.
        overlap: reduce under backward, pipeline the buckets in `step`, gather parameters under the next forward.

    Buffers are built at the first forward in training, gradient, step or state call, on all ranks together: rank 0's
    parameters and module buffers are broadcast, then parameters live in flat storage and must not be moved. After
    backward ``param.grad`` is None: the gradient is in the reduction. Between `step` and the next forward parameters
    are in flight; call `synchronize` before reading or writing them by any other way than a forward.
    Raises `ValueError` naming thing, number and cure for whatever would train wrongly.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: str | tuple[float, float, float] = "jordan",
        adjust_lr_fn: AdjustLrFn = "match_rms_adamw",
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        routes: Sequence[Route] | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        bucket_mb: float | None = None,
        packing: Packing = "balanced",
        placement: Placement = "owner",
        grad_reduction: GradReduction = "reduce_scatter",
        reduce_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype = torch.float32,
        ns_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        overlap: bool = True,
    ) -> None:
        self.options = Options(
            packing=packing, placement=placement, grad_reduction=grad_reduction, bucket_mb=bucket_mb,
            reduce_dtype=reduce_dtype or torch.float32, momentum_dtype=momentum_dtype,
            ns_dtype=ns_dtype or torch.bfloat16, max_grad_norm=max_grad_norm, overlap=overlap,
        )  # fmt: skip
        start = Hyperparameters(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
            ns_coefficients=ns_coefficients, adjust_lr_fn=adjust_lr_fn, adamw_lr=adamw_lr, adamw_betas=adamw_betas,
            adamw_eps=adamw_eps, adamw_weight_decay=adamw_weight_decay,
        )  # fmt: skip
        params = guards.unwrap(params, grad_reduction)
        self._model, routed = (params if isinstance(params, nn.Module) else None), route_params(params, routes)
        self._frozen = [(n, p) for n, p in (self._model or nn.Module()).named_parameters() if not p.requires_grad]
        self._specs = tuple(spec for spec, _ in routed)
        self._params = [param for _, param in routed]
        groups, self._group_of = make_groups(routed, start)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        check_groups(self.param_groups)
        self.state.update((param, {}) for param in self._params)  # torch's helpers step an optimizer without any

        self._metrics = Metrics()
        self.group = DataParallelGroup(process_group, self._metrics.count)
        self.layout = self._make_layout()
        self._buffers: Buffers | None = None
        self._verdict: guards.Verdict | None = None
        self._grad_norm: Tensor | None = None
        self._skipped: Tensor | None = None
        self._sync = True
        self._gathers_in_forward = self._model is not None and overlap and self.group.dp_size > 1
        self._hooks = Hooks(self, self._params, self._model, self._gathers_in_forward)

    def release(self) -> None:
        """A newer optimizer manages these parameters: finish what is in flight and let go of them."""
        self.synchronize()
        self._hooks.remove()

    def _make_layout(self) -> Layout:
        """The layout of the parameters as they are: until buffers are built, engines may still move and cast them."""
        self.group.check_current()
        named = [(spec.fqn, param) for spec, param in zip(self._specs, self._params)]
        guards.check_parameters(self._model, named, [spec.shape for spec in self._specs])
        self._specs = tuple(replace(spec, dtype=param.dtype) for spec, param in zip(self._specs, self._params))
        o = self.options
        return make_layout(
            self._specs, self.group.dp_size, packing=o.packing, placement=o.placement, bucket_mb=o.bucket_mb
        )

    def _build(self, *, values_used: bool = False) -> None:
        """Check that the ranks agree, take rank 0's values, make the buffers. Collective, once.

        `values_used`: a forward has run already, so the ranks must hold the same values.
        """
        self.layout = self._make_layout()
        lines = [f"{s.fqn} {s.shape} {s.dtype} {s.rule}" for s in self._specs]
        guards.agree_on_plan(self.layout.fingerprint() + repr(self.options), lines, self.group)
        if values_used:
            guards.agree_on_values([spec.fqn for spec in self._specs], self._params, self.group)
        for tensor in self._params if self._model is None else [*self._model.parameters(), *self._model.buffers()]:
            self.group.broadcast(tensor.data)
        buffers = Buffers(self.layout, self._params, self.group.dp_rank, self.options)
        self._source = make_source(buffers, self.group, self.options)
        shared = (self.layout, self.group, self._group_of, self.options.ns_dtype, self._metrics)
        self._walks = [BucketWalk(bucket, *shared) for bucket in buffers.buckets]
        self._param_gather = ParamGather(buffers, self.group)
        self._skipped = torch.zeros((), dtype=torch.int64, device=self._params[0].device)
        self._buffers = buffers

    def _built(self, *, values_used: bool = False) -> Buffers:
        self._hooks.check_active()
        if self._buffers is None:
            with torch.inference_mode(False):
                self._build(values_used=values_used)
        assert self._buffers is not None
        return self._buffers

    def on_gradient(self, index: int) -> None:
        """Called by autograd when the gradient of parameter `index` is complete."""
        self._built(values_used=True)
        self._param_gather.check_arrived(self.layout.bucket_of[index], self._specs[index].fqn)
        self._source.accept(index, self._params[index], self._sync)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward only accumulates; wrap all micro-batches of a step but the last, as with DDP."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @torch.no_grad()
    def reduce_gradients(self, **_ignored: object) -> None:
        """Finish the reduction and agree on the verdict. Idempotent until `step`; `step` calls it."""
        if self._verdict is not None:
            return
        buffers = self._built()
        buffers.adopt()
        with self._metrics.stage("finish_reduce_scatter"):
            present = self._source.finish()
        if isinstance(self._source, ReducedGrads) and self._metrics.steps == 0:
            guards.agree_on_reduced([p.grad for p in self._params if p.grad is not None], self.group)
        if not all(present):
            self._make_layout()  # raises if the model holds other parameters by now
        with self._metrics.stage("guard"):
            self._verdict = guards.check([b.grad_shard for b in buffers.buckets], present, self.group)
        self._grad_norm = self._verdict.total_norm
        if self.options.max_grad_norm is not None:
            self.clip_grad_norm_(self.options.max_grad_norm)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` of the averaged gradient of the whole model; returns the norm before."""
        self.reduce_gradients()
        assert self._verdict is not None and self._buffers is not None
        norm = self._verdict.total_norm
        coefficient = rules.clip_coefficient(norm, max_norm, norm_type)
        for bucket in self._buffers.buckets:
            bucket.grad_shard.mul_(coefficient)
        self._verdict = replace(self._verdict, total_norm=norm * coefficient)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, also those already accumulated or reduced but not yet used by a step."""
        super().zero_grad(set_to_none)
        if self._buffers is not None:
            self._source.reset()
            self._verdict = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update on all ranks. `closure` re-evaluates the model and returns the loss."""
        loss = torch.enable_grad()(closure)() if closure is not None else None
        buffers = self._built()
        check_groups(self.param_groups)
        guards.check_held(self.param_groups, self._params)
        guards.check_frozen(self._frozen)
        self._param_gather.wait()
        self.reduce_gradients()
        verdict, self._verdict = self._verdict, None
        assert verdict is not None and self._skipped is not None

        numbers = [{**group, "lr": rules.scalar(group["lr"])} for group in self.param_groups]
        with torch.autocast(buffers.device.type, enabled=False):
            # Backward finishes the last layers first; the next forward needs the first ones first.
            walks = [walk.run(verdict, numbers, self._param_gather.start) for walk in reversed(self._walks)]
            pipeline(walks, self.options.overlap)

        self._skipped += ~verdict.ok
        self._source.reset()
        if not self._gathers_in_forward or self._optimizer_step_post_hooks or _global_optimizer_post_hooks:
            self.synchronize()
        self._metrics.close_step()
        return loss

    def on_forward(self) -> None:
        """Called by the model's forward. In training the first one builds; evaluation waits for all parameters."""
        if torch.is_grad_enabled():
            self._built()
        else:
            self.synchronize()

    def wait_for(self, params: Iterable[int]) -> None:
        """Called by a module's forward."""
        if self._buffers is not None and self._param_gather.any_in_flight:
            self._param_gather.wait({self.layout.bucket_of[index] for index in params})

    @property
    def _step_supports_amp_scaling(self) -> bool:
        raise guards.no_loss_scaling()

    def synchronize(self) -> None:
        """Wait for the parameter all-gathers that `step` left under way. Forwards do so by themselves."""
        if self._buffers is not None:
            self._param_gather.wait()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "layout"):
            raise guards.late_group()
        super().add_param_group(param_group)

    def full_state_dict(self) -> dict[str, Any]:
        """`state_dict`, of what is built here if need be."""
        self._built()
        return self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Whole state of every parameter, on the CPU of every rank, in torch.optim's format; empty before the first
        step or forward. Collective."""
        packed = super().state_dict()
        if self._buffers is None:
            return packed
        self.synchronize()
        return checkpoint.full_state_dict(self._buffers, self.group, self.param_groups, packed["param_groups"])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], on_route_change: str = "raise", **_ignored: object) -> None:
        """Load a full state saved at any dp_size. State keeps its own dtype; masters, if any, become the parameters.
        A parameter under another rule than then raises, or with "reset" begins with no state."""
        state_dict = checkpoint.routed(state_dict, self.param_groups, on_route_change)
        checkpoint.load_groups(state_dict["param_groups"], self.param_groups)
        if not checkpoint.is_empty(state_dict):
            gather = self.at_rest()
            checkpoint.load_full_state(gather.buffers, self.param_groups, state_dict)
            gather.publish()

    def at_rest(self) -> ParamGather:
        """For who reads or writes all state: nothing is in flight, foreign writes are taken over. Collective."""
        self._built()
        return self._param_gather.settled()

    def metrics(self) -> dict[str, Any]:
        """This rank's last step in numbers; ``grad_norm`` before clipping. Reads the device: not for the hot loop."""
        return {
            **self._metrics.last(),
            "skipped_steps": int(self._skipped) if self._skipped is not None else 0,
            "grad_norm": float(self._grad_norm) if self._grad_norm is not None else None,
            "lr": {group["rule"]: rules.scalar(group["lr"]) for group in reversed(self.param_groups)},
            "state_bytes": self._buffers.state_bytes if self._buffers is not None else 0,
        }

    def report(self, *, full: bool = False) -> str:
        """What went where, in a few lines; `full`: and one line a parameter with the reason."""
        text = planner.describe(self.layout, len(self._frozen))
        return f"{text}\n{planner.routing_table(self.layout)}" if full else text
