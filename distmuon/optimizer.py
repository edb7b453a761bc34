"""`DistMuon`, the face that torch.optim's users know: arguments, param groups, hooks, state, metrics.

Decides what may be asked for and when the rooms are built. The order of a step is `conductor.py`, the algorithm of one
bucket `walk.py`; which rule is `routing`, where is `layout`, storage is `buffers`, bytes are the movers'.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from distmuon import guards, holdings, memory, ns_kernels, planner, rules
from distmuon.agreement import together
from distmuon.collectives import DataParallelGroup
from distmuon.conductor import Conductor
from distmuon.config import (
    AdjustLrFn,
    GradReduction,
    Hyperparameters,
    MasterFormat,
    Options,
    Overlap,
    Packing,
    ParamGather,
    Placement,
    check_groups,
    hyperparameters,
)  # fmt: skip
from distmuon.errors import problem
from distmuon.hooks import Hooks
from distmuon.layout import Layout, make_layout
from distmuon.local_state import LocalState
from distmuon.metrics import Metrics
from distmuon.routing import Route, make_groups, route_params
from distmuon.trainer_face import TrainerFace, arrived


class DistMuon(TrainerFace):
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
            the name of a table in `coefficients.COEFFICIENTS` or as a triple.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: the AdamW part; None: the same as Muon's.
        routes: decisions that go before the defaults, first match wins; ``"adamw"``: no Muon, on purpose.
        process_group: the data-parallel group. None: the default group, or one rank without torch.distributed.
        bucket_mb: size of a bucket in MiB of float32 gradients. None: chosen; `distmuon.plan` compares ("auto").
        packing: "balanced" (whole matrices where they fit) or "contiguous" (even cuts, Megatron's way).
        placement: "owner" (each matrix orthogonalized once) or "replicated" (by all that hold a piece).
        grad_reduction: "reduce_scatter" (here, under backward) or "external" (gradients arrive averaged).
        reduce_dtype: of the gradient buffers and what their reduction sends; sums are float32. None: float32.
        release_grads: hold two buckets of gradients at the most during the last backward, none between steps.
        param_gather: "parameters", or "updates": send polar factors in `exchange_dtype` and let every rank apply them
            (parameters must be float32; three quarters of AdamW's traffic in bfloat16).
        master_format: "float32", or "remainder": the 16 bits that a bfloat16 parameter lacks, lossless.
        momentum_dtype: of the momentum buffer: float32, bfloat16 or int8 (blocks of 256 with a scale each).
        ns_dtype, ns_kernels: of Newton-Schulz, None: bfloat16; `ns_kernels.decide`.
        exchange_dtype: of what the exchange of matrix pieces sends. None: ns_dtype.
        exchange_group: a second group of the same ranks for that exchange, so that on NCCL it does not queue behind
            all-gathers. None: process_group.
        max_grad_norm: clip every step's averaged gradient to this global norm. None: only on `clip_grad_norm_`.
        overlap: reduce under backward and pipeline the buckets in `step`, which ends when parameters have arrived.
            "forward": all-gathers run under the next forward, whose modules wait for them; whoever else reads or
            writes parameters after `step` must call `synchronize` first. False: one bucket after the other.
        verify_every: compare the bits of all parameters across ranks before every such step writes; 0: never.
        broadcast_buffers: give all ranks rank 0's module buffers when ours are built, once; later forwards send none,
            unlike DDP's. False: each rank keeps its own, which are not compared either.

    Buffers are built at the first forward in training, gradient, step or state call, on all ranks together: rank 0's
    parameters and module buffers are broadcast, then parameters live in flat storage and must not be moved. After
    backward the gradient is in the reduction, and what stands in ``param.grad`` raises when it is used; in one process,
    and with ``grad_reduction="external"``, gradients stay where autograd puts them, as with any torch optimizer.
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
        release_grads: bool = False,
        param_gather: ParamGather = "parameters",
        master_format: MasterFormat = "float32",
        momentum_dtype: torch.dtype = torch.float32,
        ns_dtype: torch.dtype | None = None,
        exchange_dtype: torch.dtype | None = None,
        exchange_group: dist.ProcessGroup | None = None,
        max_grad_norm: float | None = None,
        overlap: Overlap = True,
        ns_kernels: bool = False,
        verify_every: int = 0,
        broadcast_buffers: bool = True,
    ) -> None:
        ns_dtype = torch.bfloat16 if ns_dtype is None else ns_dtype
        reduce_dtype = torch.float32 if reduce_dtype is None else reduce_dtype
        self.options = Options(
            packing=packing, placement=placement, grad_reduction=grad_reduction, param_gather=param_gather,
            bucket_mb=bucket_mb, reduce_dtype=reduce_dtype, release_grads=release_grads,
            master_format=master_format, momentum_dtype=momentum_dtype, ns_dtype=ns_dtype,
            exchange_dtype=exchange_dtype, max_grad_norm=max_grad_norm, overlap=overlap,
            ns_kernels=ns_kernels, verify_every=verify_every, broadcast_buffers=broadcast_buffers,
        )  # fmt: skip
        start = Hyperparameters(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
            ns_coefficients=ns_coefficients, adjust_lr_fn=adjust_lr_fn, adamw_lr=adamw_lr, adamw_betas=adamw_betas,
            adamw_eps=adamw_eps, adamw_weight_decay=adamw_weight_decay,
        )  # fmt: skip
        params = guards.listed(guards.unwrap(params, grad_reduction))
        self._model, routed = (params if isinstance(params, nn.Module) else None), route_params(params, routes)
        self._frozen = guards.frozen(params)
        self._specs = tuple(spec for spec, _ in routed)
        self._params = [param for _, param in routed]
        groups, self._group_of = make_groups(routed, start)
        for group in groups:  # schedulers write into tensors, group by group
            group.update((key, value.clone()) for key, value in group.items() if isinstance(value, Tensor))
        # CyclicLR and OneCycleLR look here for what to cycle in all groups: beta1 goes before momentum.
        has_muon = any(group["rule"] == "muon" for group in groups)
        cycled = {"momentum": momentum} if has_muon else {"betas": adamw_betas}
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, **cycled})
        check_groups(self.param_groups)
        self._held = guards.held_by(self.param_groups)

        self._metrics = Metrics()
        self.group = DataParallelGroup(process_group, self._metrics.count)
        self._exchange_group = self.group
        if exchange_group is not None:
            self._exchange_group = DataParallelGroup(exchange_group, self._metrics.count)
            self._exchange_group.check_same_ranks(self.group)
            self._exchange_group.roll = self.group.roll
            self._exchange_group.leaves_word = False  # its collectives are counted apart from the other's
        self.layout = self._make_layout()
        self._conductor: Conductor | None = None
        self._sync = True
        if overlap == "forward" and self._model is None:
            raise problem(
                "overlap", 'found "forward" with parameters by name', "the modules that use them must wait for them",
                "pass the model itself, or overlap=True",
            )  # fmt: skip
        self._gathers_in_forward = overlap == "forward" and self.group.dp_size > 1
        self._hooks = Hooks(self, self._params, self._model, self._gathers_in_forward)
        self.register_step_pre_hook(arrived)  # before the user's own, which may read parameters

    def release(self) -> None:
        """A newer optimizer manages these parameters: finish what is in flight and let go of them."""
        self.synchronize()
        self._hooks.remove()

    def _make_layout(self) -> Layout:
        """The layout of the parameters as they are: until buffers are built, engines may still move and cast them."""
        self.group.check_current()
        self.check_parameters()
        guards.check_memory(self._named())
        stays = memory.stays(self._params, self._model)
        now = zip(self._specs, self._params, stays)
        self._specs = tuple(replace(spec, dtype=param.dtype, stays=kept) for spec, param, kept in now)
        o = self.options
        o.check_dtypes([(spec.fqn, spec.dtype) for spec in self._specs])
        return make_layout(
            self._specs, self.group.dp_size, packing=o.packing, placement=o.placement, bucket_mb=o.bucket_mb
        )

    def _build(self, *, values_used: bool, to_train: bool) -> None:
        """Check that the ranks agree, take rank 0's values, make the buffers. Collective, once.

        `values_used`: a forward has run already, so the ranks must hold the same values. `to_train`: with these values,
        and not with those of a checkpoint.
        """
        self.group.take_number()
        self.layout = together(self.group, self._make_layout, stage="comparison of the plans")
        lines = [f"{s.fqn} {s.shape} {s.dtype} {s.rule}" for s in self._specs]
        guards.agree_on_plan(repr(lines), lines, self.group)
        kernels = ns_kernels.summary(self.options, self._params[0].device, self.param_groups, reasons=False)
        self.verify_options(also=self.layout.fingerprint() + kernels)
        held = holdings.held(self._named(), self._model, buffers=self.options.broadcast_buffers)
        holdings.agree_on(held, self.group)
        if any(self.group.gather_objects(values_used, stage="comparison of the plans")):
            guards.agree_on_values([spec.fqn for spec in self._specs], self._params, self.group)
        holdings.send(held, self.group, self._params[0].device)
        if to_train:
            guards.check_finite(guards.not_finite([spec.fqn for spec in self._specs], self._params))
        self._conductor = Conductor(
            self.layout, self._params, self.group, self._exchange_group, self.options, self._group_of,
            self._metrics,
            self._gathers_in_forward and self._exchange_group.process_group is self.group.process_group,
        )  # fmt: skip
        self._local_state = LocalState(self._conductor.buffers)
        self._local_state.show(self.state)
        # Whoever drops the optimizer after its last step keeps a model whose parameters are still under way.
        weakref.finalize(self, self._conductor.param_gather.wait_quietly).atexit = False

    def _built(self, *, values_used: bool = False, to_train: bool = True) -> Conductor:
        self._hooks.check_active(self)
        if self._conductor is None:
            with torch.inference_mode(False):
                self._build(values_used=values_used, to_train=to_train)
            assert self._conductor is not None
        return self._conductor

    def _hyperparameters(self) -> list[dict[str, Any]]:
        """The param groups' entries as they are now, checked, all numbers."""
        check_groups(self.param_groups)
        return [{**group, "lr": rules.scalar(group["lr"])} for group in self.param_groups]

    def on_gradient(self, index: int) -> None:
        """Called by autograd when the gradient of parameter `index` is complete."""
        self._built(values_used=True).accept(index, self._params[index], self._sync)

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
        if self._reduce() and self.options.max_grad_norm is not None:
            self.clip_grad_norm_(self.options.max_grad_norm)

    def _reduce(self) -> bool:
        """Whether this call has reduced, and not one before it."""
        conductor = self._built(values_used=self._has_gradients())
        present = conductor.reduce(self._fingerprint())
        if present is None:
            return False
        if conductor.ranks_went_apart():
            self.verify_options()
            raise problem(
                "step", "the ranks' hyperparameters differed, and are equal now", "they must be equal in every step",
                "let schedulers depend on the step alone",
            )  # fmt: skip
        if not all(present):
            self.check_parameters()  # the model may hold others by now
        return True

    def _fingerprint(self) -> int:
        """16 bits of what must be equal on all ranks in every step."""
        check_groups(self.param_groups)
        text = repr((self.group.number, hyperparameters(self.param_groups)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big")

    def _has_gradients(self) -> bool:
        """Before anything is built: gradients that no forward of ours has made, of values that are this rank's own."""
        return self._conductor is None and any(param.grad is not None for param in self._params)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` of the averaged gradient of the whole model; returns the norm before this
        call (`max_grad_norm`, if given, has clipped before it)."""
        self.reduce_gradients()
        return self._built().clip(max_norm, norm_type)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, also those already accumulated or reduced but not yet used by a step."""
        self._hooks.check_self(self)
        if self._conductor is not None:
            self._conductor.forget()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update on all ranks. `closure` re-evaluates the model and returns the loss."""
        loss = torch.enable_grad()(closure)() if closure is not None else None
        if self._conductor is None and self._build_if_asked():
            return loss
        conductor = self._built(values_used=self._has_gradients())
        numbers = self._hyperparameters()
        self._local_state.take_back(self.state)
        guards.check_held(self.param_groups, self._held)
        guards.check_frozen(self._frozen)
        if self.options.verify_every and (self._metrics.steps + 1) % self.options.verify_every == 0:
            with self._metrics.stage("verify"):
                self.verify_bits()
        self._consolidated = None
        self.reduce_gradients()
        conductor.update(numbers)
        if not self._gathers_in_forward or self._optimizer_step_post_hooks or _global_optimizer_post_hooks:
            self.synchronize()
        self._metrics.close_step()
        self.group.step = self._exchange_group.step = self._metrics.steps + 1
        return loss

    def on_forward(self) -> None:
        """Called by the model's forward. In training the first ordinary one builds; evaluation waits for all
        parameters."""
        if not torch.is_grad_enabled():
            self.synchronize()
            return
        if not self.keeps_grads:
            guards.check_wrapper(self._params)
        if self._conductor is not None or self._model is None or guards.is_ordinary(self._model, self._params):
            self._built()

    def wait_for(self, params: Iterable[int]) -> None:
        """Called by a module's forward."""
        if self._conductor is not None and self._conductor.param_gather.any_in_flight:
            self._conductor.param_gather.wait({self.layout.bucket_of[index] for index in params})

    def on_load(self) -> None:
        """Called before a module's state is loaded."""
        self.synchronize()
        self._consolidated = None

    def synchronize(self) -> None:
        """Wait for the parameter all-gathers that `step` left under way. Forwards do so by themselves."""
        if self._conductor is not None:
            self._conductor.param_gather.wait()

    def metrics(self) -> dict[str, Any]:
        """This rank's last step in numbers; ``grad_norm`` before clipping. Reads the device: not for the hot loop."""
        built = self._conductor
        return {
            **self._metrics.last(),
            "skipped_steps": int(built.skipped) if built is not None else 0,
            "grad_norm": float(built.grad_norm) if built is not None and built.grad_norm is not None else None,
            "lr": {group["rule"]: rules.scalar(group["lr"]) for group in reversed(self.param_groups)},
            "state_bytes": built.buffers.state_bytes if built is not None else 0,
        }

    def report(self, *, full: bool = False) -> str:
        """What went where, in a few lines; `full`: and one line a parameter with the reason."""
        kernels = ns_kernels.summary(self.options, self._params[0].device, self.param_groups)
        text = f"{planner.describe(self.layout, len(self._frozen))}\n{kernels}"
        return f"{text}\n{planner.routing_table(self.layout)}" if full else text
