"""`DistMuon`, a torch.optim.Optimizer: arguments, param groups, hooks, state, metrics.

This module decides what a user may call and when buffers are built. It knows no collective and no formula:
`step/engine.py` orders a step, `step/bucket.py` is the algorithm of a bucket, `layout/routing.py` gives parameters
their rule, and `layout/layout.py` gives elements their place.

[Note: state_dict on a single rank] `state_dict` gathers the shards, so all ranks must call it. A trainer that lets a
single rank save calls `consolidate_state_dict` on all ranks first; until the next step or load, `state_dict` then
returns the gathered state, on the ranks that keep it, without communication. A rank that calls it alone without this
gets an error: before anything is gathered the ranks meet in the group's store, where no collective waits
(lost_ranks.py).

[Note: the step of torch's state helpers] torch's `get_state_dict` and `set_state_dict` step an optimizer without state
once, with zero gradients and lr 0, to create its state. If the optimizer has not been built, this step only builds it:
no momentum, no AdamW step, no metrics. A plain `state_dict` builds nothing, since engines that move and cast the model
afterwards (accelerate) also call it.

[Note: given shards] If FSDP2 or DTensor's parallelism has cut the parameters, its hooks gather, reduce and scatter, and
DistMuon registers none. Gradients arrive averaged in `param.grad`, as shards. All ranks of the parameters' meshes tell
their boxes when the optimizer is made. State is made at the first step, or on this rank alone when state is loaded; all
ranks compare their plans, and replicas their values, before the first step. No values are sent.

[Note: parameters that some ranks hold] With experts in plain tensors, some ranks of the data-parallel group hold other
parameters than the rest. `Route(process_group=)` names the ranks that hold the same ones, and these groups tile the
optimizer's group. Each bucket belongs to a group: its reduce-scatter, exchange and all-gather run there, and its
averaged gradient is the mean over the ranks of that group. Every rank must hold equally many such parameters, of the
same shapes in the same order: then all ranks have the same layout except for names, and start all collectives in the
same order. Hyperparameters and the verdict, with norm, clip and skip, are those of the optimizer's group.

[Note: wrappers that subclass] Fabric and Lightning make their wrappers as subclasses of the wrapped optimizer's class,
without its `__init__`; they forward only attributes that they do not find. DistMuon's methods would run on the wrapper
and write into it. So in a class with bases other than optimizers, every public method of DistMuon is delegated to the
optimizer whose hooks the wrapper holds.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from distmuon import checks
from distmuon import state_dict as full_state
from distmuon.comm import nodes
from distmuon.comm.agreement import agree_on_bits, agree_on_plan, in_each_group, raise_together
from distmuon.comm.group import MEETING_S, DataParallelGroup
from distmuon.errors import problem
from distmuon.layout import memory, report
from distmuon.layout.layout import Layout, join, make_layout
from distmuon.layout.routing import Route, group_number, make_groups, process_groups, route_params
from distmuon.math import rules
from distmuon.options import (
    NORMUON,
    AdjustLrFn,
    GradReduction,
    Hyperparameters,
    Options,
    Precision,
    Sharding,
    check_groups,
    hyperparameters,
    with_fields,
)
from distmuon.step import cut, initial_values
from distmuon.step.dtensors import local_of
from distmuon.step.engine import Engine
from distmuon.step.hooks import Hooks
from distmuon.step.local_state import LocalState
from distmuon.step.metrics import Metrics


class DistMuon(torch.optim.Optimizer):
    r"""Muon for hidden matrices and AdamW for the rest, sharded over the data-parallel group (ZeRO-1).

    For each matrix ``W`` of logical shape (m, n), stored (out, in), with averaged gradient ``G``
    (arXiv 2502.16982, Algorithm 1)::

        1  G = mean of the ranks' gradients             by reduce-scatter, this rank's shard
        2  M = mu*M + (1-mu)*G                          on the shard
           U = (1-mu)*G + mu*M                          with Nesterov, M otherwise
        4  O = newton_schulz(U / ||U||)                 once per matrix, between a gather (3) and a scatter (5)
        6  W = W - lr*(0.2*sqrt(max(m, n))*O + wd*W)    on the shard of the float32 master
        7  send W to all ranks                          by all-gather

    Args:
        params: the model (routed by `distmuon.route`), or an iterable of (fqn, parameter) pairs, or of dicts
            ``{"params": [(fqn, parameter), ...], "rule": "muon" | "adamw", **group entries}``.
        lr: learning rate of both rules: Muon's scale matches AdamW's update RMS, so both can share it.
        weight_decay: decoupled; multiplied by lr, not by the scale.
        momentum, nesterov, ns_steps, ns_coefficients, adjust_lr_fn: as in `torch.optim.Muon`; the coefficients are
            the name of a table in `coefficients.COEFFICIENTS` or a triple.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: hyperparameters of AdamW; None: the same as Muon's.
        cautious_weight_decay: decay an element only where the update shrinks it, too (arXiv 2510.12402); both rules.
        normuon_beta2: NorMuon (arXiv 2510.05491): divide each row of the polar factor by the root of a moving average,
            with this coefficient (0.95 in the paper), of its mean square; its norm stays. None: plain Muon.
        routes: decisions that override the defaults, first match wins; ``"adamw"``: no Muon, on purpose.
        sharding: a `distmuon.Sharding`: how parameters are cut over the ranks, which tensors travel, and when.
        precision: a `distmuon.Precision`: the dtypes in which tensors are kept, computed and sent.
        process_group: the data-parallel group. None: the default group, or a single rank without torch.distributed;
            under FSDP2 the mesh's group.
        exchange_group: a second group of the same ranks for the exchange of matrix pieces, so that on NCCL it does not
            queue behind all-gathers. None: process_group.
        model_parallel_group: the ranks that hold the other parts of the model, one rank of each (stages of a pipeline;
            tensor parallelism with plain tensors). The gradient norm, and with it clipping, and skipped steps are then
            those of the whole model. DTensors need none.
        grad_reduction: "reduce_scatter" (by DistMuon, under backward) or "external" (gradients arrive averaged).
        max_grad_norm: clip every step's averaged gradient to this global norm. None: only on `clip_grad_norm_`.
        verify_every: compare the bits of all parameters across ranks in every n-th step, before it writes; 0: never.
        telemetry_every: measure every n-th step, see `telemetry`; 0: none. Such a step gathers the weights of matrices
            to their owners, and takes eigenvalues of three k x k matrices for each.
        broadcast_buffers: send rank 0's module buffers to all ranks once, when DistMuon's buffers are built; unlike
            DDP, later forwards send none. False: each rank keeps its module buffers, and they are not compared.
        fields: a field of either policy by itself: ``overlap=False``, ``ns_dtype=torch.float32``
            (`distmuon.options.with_fields`).

    Buffers are built at the first forward in training, gradient, step or state call, on all ranks together: rank 0's
    parameters and module buffers are broadcast; then parameters live in flat storage and must not be moved. After
    backward the gradient is in the reduction, and the placeholder in ``param.grad`` raises when it is used. In a single
    process, and with ``grad_reduction="external"``, gradients stay in ``param.grad``, as with any torch optimizer.
    If `torch.distributed.fsdp.fully_shard` has cut the model, nothing moves and nothing is broadcast: lines 2 to 6 run
    on its shards, and gradients and state are DTensors.
    Raises `ValueError` with the cure for any setup that would train wrongly.
    """

    loss_scaling = False  # set by `distmuon.GradScaler`
    managed_by_integration = False  # set by `distmuon.integrations.deepspeed`
    _consolidated: dict[int, dict[str, Tensor]] | None = None  # {}: kept on rank `_consolidated_on`
    _consolidated_on = -1
    _local_state: LocalState  # set when buffers are built
    _agreed = False  # all ranks have compared their plans
    _sync = True  # False under `no_sync`
    _per_node: int | None = None  # ranks of a node by the launchers of all ranks; None: not compared yet

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
        cautious_weight_decay: bool = False,
        normuon_beta2: float | None = None,
        routes: Sequence[Route] | str | None = None,
        sharding: Sharding | None = None,
        precision: Precision | None = None,
        process_group: dist.ProcessGroup | None = None,
        exchange_group: dist.ProcessGroup | None = None,
        model_parallel_group: dist.ProcessGroup | None = None,
        grad_reduction: GradReduction = "reduce_scatter",
        max_grad_norm: float | None = None,
        verify_every: int = 0,
        telemetry_every: int = 0,
        broadcast_buffers: bool = True,
        **fields: Any,
    ) -> None:
        sharding = Sharding() if sharding is None else sharding
        precision = Precision() if precision is None else precision
        sharding, precision = with_fields(sharding, precision, fields)
        self.options = Options(
            sharding=sharding,
            precision=precision,
            grad_reduction=grad_reduction,
            max_grad_norm=max_grad_norm,
            verify_every=verify_every,
            telemetry_every=telemetry_every,
            broadcast_buffers=broadcast_buffers,
        )
        start = Hyperparameters(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            ns_coefficients=ns_coefficients,
            adjust_lr_fn=adjust_lr_fn,
            adamw_lr=adamw_lr,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            adamw_weight_decay=adamw_weight_decay,
            cautious_weight_decay=cautious_weight_decay,
            normuon_beta2=normuon_beta2,
        )
        params = checks.listed(checks.unwrap(params, grad_reduction))
        self._model = params if isinstance(params, nn.Module) else None
        routed = route_params(params, routes)
        self._frozen = checks.frozen(params)
        self._specs = tuple(spec for spec, _ in routed)
        self._params = [param for _, param in routed]
        self._routes = routes
        self._is_cut = checks.is_cut(params, self._named())
        if self._is_cut:  # see [Note: given shards]
            checks.check_options_when_cut(self.options, self._specs)
            process_group = cut.group_of_meshes(self._params, process_group)
            self.options = replace(self.options, grad_reduction="external")
        groups, self._group_by_param = make_groups(routed, start)
        for group in groups:  # schedulers write into tensors, group by group
            group.update((key, value.clone()) for key, value in group.items() if isinstance(value, Tensor))
        # CyclicLR and OneCycleLR look in the defaults for the entry that they cycle in all groups, betas first.
        has_muon = any(group["rule"] == "muon" for group in groups)
        cycled = {"momentum": momentum} if has_muon else {"betas": adamw_betas}
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, **cycled})
        check_groups(self.param_groups)
        self._normuon = frozenset(n for n, group in enumerate(self.param_groups) if group.get(NORMUON) is not None)
        self._members = checks.group_members(self.param_groups)

        self._metrics = Metrics()
        self.group = DataParallelGroup(process_group, self._metrics.count)
        self._exchange_group = self.group
        if exchange_group is not None:
            self._exchange_group = DataParallelGroup(exchange_group, self._metrics.count)
            self._exchange_group.check_same_ranks(self.group)
            self._exchange_group.roll = self.group.roll
            self._exchange_group.tells_place = False  # it counts its collectives separately
        self._groups = [self.group, *_groups_inside(self.group, routes)]  # by `ParamSpec.group`
        self.model_parallel_group = model_parallel_group
        self._model_group: DataParallelGroup | None = None
        if model_parallel_group is not None:
            self._model_group = DataParallelGroup(model_parallel_group, self._metrics.count)
            self._model_group.tells_place = False
        checks.check_fragments(routed)
        checks.check_copies(self._specs, self._model_group.dp_size if self._model_group is not None else 1)
        self._boxes = cut.gather_boxes(self._specs, self._params, self.group) if self._is_cut else None
        self.layout = self._make_layout()
        self._engine: Engine | None = None
        gathers_in_forward = self.options.sharding.overlap == "forward"
        if gathers_in_forward and self._model is None:
            raise problem(
                "sharding.overlap",
                found='found "forward" with (name, parameter) pairs',
                needed="the modules that use the parameters must wait for them",
                cure="pass the model itself, or Sharding(overlap=True)",
            )
        self._gathers_in_forward = gathers_in_forward and self.group.dp_size > 1
        self._hooks = Hooks(self, self._params, self._model, self._gathers_in_forward, silent=self._is_cut)
        self.register_step_pre_hook(_wait_params)  # before the user's hooks, which may read parameters

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(not issubclass(base, torch.optim.Optimizer) for base in cls.__mro__[:-1]):
            _delegate_to_wrapped(cls)

    # --------------------------------------------------------------------------------------------------- construction

    def release(self) -> None:
        """Finish collectives in flight and release the parameters, since a newer optimizer manages them."""
        self.synchronize()
        self._hooks.remove()

    def _make_layout(self) -> Layout:
        """Make the layout of the parameters as they are now; engines may move and cast them until buffers are built."""
        self.group.check_current()
        self.check_parameters()
        stays = [False] * len(self._params)
        if not self._is_cut:
            checks.check_memory(self._named())
            stays = memory.stays(self._params, self._model)
        current = zip(self._specs, self._params, stays)
        self._specs = tuple(replace(spec, dtype=param.dtype, stays=kept) for spec, param, kept in current)
        self.options.check_dtypes([(spec.fqn, spec.dtype) for spec in self._specs])
        sharding = self.options.sharding
        for group in dict.fromkeys((*self._groups, self._exchange_group)):
            launched = nodes.launched_per_node() if self._per_node is None else self._per_node
            group.node_size = nodes.node_size(group, sharding.gpus_per_node, launched) or group.dp_size
        self._layouts = [
            make_layout(
                [spec for spec in self._specs if spec.group == number],
                group.dp_size,
                packing=sharding.packing,
                placement=sharding.placement,
                bucket_mb=sharding.bucket_mb,
                given=self._boxes,
                node_size=group.node_size,
            )
            for number, group in enumerate(self._groups)
        ]
        return join(self._specs, self._layouts)

    def _build(self, *, values_used: bool, to_train: bool) -> None:
        """Check that the ranks agree, send rank 0's values, make the buffers. Collective; called once.

        `values_used`: whether a forward has run, so that the ranks must hold the same values. `to_train`: whether
        training starts with these values, not with those of a checkpoint.
        """
        self._agree()
        held = initial_values.held(self._named(), self._model, buffers=self.options.broadcast_buffers)
        used = any(self.group.gather_objects(values_used, stage="comparison of the plans"))

        def send(number: int, group: DataParallelGroup) -> None:
            sent = [holding for holding in held if group_number(holding.name, self._routes) == number]
            initial_values.agree_on(sent, group)
            fqns = [self._specs[index].fqn for index in self.layout.members(number)]
            params = [self._params[index] for index in self.layout.members(number)]
            if used:
                initial_values.agree_on_values(fqns, params, group)
            initial_values.send(sent, group, self._params[0].device)
            if to_train:
                initial_values.check_finite(initial_values.not_finite(fqns, params))

        in_each_group(self._groups, send, stage="comparison of the first values")
        self._make_engine()

    def _agree(self) -> None:
        """Raise on all ranks unless all made the same layout with the same options. Collective, once."""
        self.group.take_number()
        if self.options.sharding.gpus_per_node is None:
            self._per_node = nodes.agreed_per_node(self.group)
        self.layout = raise_together(self.group, self._make_layout, stage="comparison of the plans")
        lines = [f"{s.common_name} {s.shape} {s.dtype} {s.rule}" for s in self._specs]
        agree_on_plan(repr(lines), lines, self.group)
        self.verify_options(also=self.layout.fingerprint())
        for number, group in enumerate(self._groups[1:], 1):
            group.check_partition(self.group)
            fqns = [self._specs[index].fqn for index in self.layout.members(number)]
            raise_together(self.group, partial(agree_on_plan, repr(fqns), fqns, group), stage="comparison of the plans")
        self._agreed = True

    def _make_engine(self) -> None:
        self._engine = Engine(
            self.layout,
            self._params,
            self._groups,
            [self._exchange_group, *self._groups[1:]],
            self.options,
            self._group_by_param,
            self._metrics,
            gathers_in_forward=self._gathers_in_forward,
            normuon=[index for index, number in enumerate(self._group_by_param) if number in self._normuon],
            model_group=self._model_group,
        )
        self._local_state = LocalState(self._engine.storage)
        self._local_state.show(self.state)
        # If the optimizer is garbage-collected right after `step`, the model must be left with its final weights.
        weakref.finalize(self, self._engine.wait_quietly).atexit = False

    def _built(self, *, values_used: bool = False, to_train: bool = True) -> Engine:
        self._hooks.check_active(self)
        if self._is_cut and not self._agreed:
            self._agree_on_shards(to_train=to_train)
        if self._engine is None:
            with torch.inference_mode(False):
                self._build(values_used=values_used, to_train=to_train)
            assert self._engine is not None
        return self._engine

    def _agree_on_shards(self, *, to_train: bool) -> None:
        """The plan of all ranks, and this rank's state if there is none yet. Collective, once."""
        made = self.layout if self._engine is not None else None
        self._agree()
        if made is not None and made != self.layout:
            raise problem(
                "model",
                found="its parameters changed between the first call for the optimizer's state and the first step",
                needed="parameters keep dtype, device and placement once there is state",
                cure="cast, move and shard the model first, then make DistMuon",
            )
        if to_train:
            rows = [(fqn, local_of(param)) for fqn, param in self._named()]
            held = [(fqn, local) for fqn, local in rows if local.numel()]
            broken = initial_values.not_finite([fqn for fqn, _ in held], [local for _, local in held])
            where = f" on rank {self.group.dp_rank}"
            stage = "comparison of the first values"
            raise_together(self.group, lambda: initial_values.check_finite(broken, where), stage=stage)
            assert self._boxes is not None
            cut.check_replicas(self._specs, self._boxes, self._params, self.group)
        self._built_here()

    def _built_here(self) -> Engine:
        """This rank's state of the shards that it was given; asks no other rank. See [Note: given shards]."""
        self._hooks.check_active(self)
        if self._engine is None:
            with torch.inference_mode(False):
                self.layout = self._make_layout()
                self._make_engine()
        assert self._engine is not None
        return self._engine

    def verify_options(self, also: str = "") -> None:
        """Raise on all ranks, naming the first difference, unless options and hyperparameters are equal. Collective.

        A scheduler that gets each rank's local loss, for example, sets a different lr on each rank.
        """
        raise_together(self.group, lambda: check_groups(self.param_groups), stage="comparison of the plans")
        items = self.options.items() + hyperparameters(self.param_groups)
        agree_on_plan(repr(items) + also, items, self.group)

    def check_parameters(self) -> None:
        """Raise unless the parameters are those for which the layout was made."""
        shapes = [spec.shape for spec in self._specs]
        if self._boxes is not None:
            made = [held[self.group.dp_rank] for held in self._boxes]
            checks.check_shards(self._model, self._named(), shapes, made)
        else:
            checks.check_parameters(self._model, self._named(), shapes)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(spec.fqn, param) for spec, param in zip(self._specs, self._params)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "layout"):
            raise problem(
                "add_param_group",
                found="called after construction",
                needed="the layout is fixed by all parameters together",
                cure="make a new DistMuon with all parameters",
            )
        super().add_param_group(param_group)

    # -------------------------------------------------------------------------------------------------------- a step

    def on_gradient(self, index: int) -> None:
        """Called by autograd when the gradient of parameter `index` is complete."""
        self._built(values_used=True).collect(index, self._sync)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward only accumulate in the block; wrap all micro-batches of a step but the last, as with DDP."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def set_requires_gradient_sync(self, requires: bool) -> None:
        """Say whether the next backward is the last of a step, for callers that cannot use the `no_sync` block.

        With False for every backward the reduction starts in `reduce_gradients`, without overlap.
        """
        self._sync = requires

    @property
    def keeps_grads(self) -> bool:
        """Whether gradients stay in `param.grad`, as with torch's optimizers, since DistMuon does not average them."""
        return self.options.grads_stay(self.group.dp_size)

    @torch.no_grad()
    def reduce_gradients(self, **_ignored: object) -> None:
        """Finish the reduction and agree on the verdict. Idempotent until `step`, which calls it."""
        if self._reduce() and self.options.max_grad_norm is not None:
            self._built().clip(self.options.max_grad_norm, 2.0)

    def _reduce(self) -> bool:
        """Finish the reduction; return whether this call did so, and not an earlier call."""
        engine = self._built(values_used=self._has_gradients())
        present = engine.reduce(self._fingerprint())
        if present is None:
            return False
        if engine.ranks_disagree():
            self.verify_options()
            raise problem(
                "step",
                found="the ranks' hyperparameters differed, and are equal now",
                needed="they must be equal in every step",
                cure="let schedulers depend only on the step",
            )
        if not all(present):
            self.check_parameters()  # the model may hold other parameters by now
        return True

    def _fingerprint(self) -> int:
        """A hash, 16 bits, of the values that must be equal on all ranks in every step."""
        check_groups(self.param_groups)
        checks.check_normuon(self.param_groups, self._normuon)
        text = repr((self.group.number, hyperparameters(self.param_groups)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big")

    def _has_gradients(self) -> bool:
        """Whether there are gradients before buffers are built; they come from values that may differ by rank."""
        return self._engine is None and any(param.grad is not None for param in self._params)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the averaged gradient of all parameters like `torch.nn.utils.clip_grad_norm_`.

        Returns the norm before this call; `max_grad_norm`, if given, has been applied before.
        """
        self.reduce_gradients()
        return self._built().clip(max_norm, norm_type)

    @torch.no_grad()
    def unscale_grads(self, inverse_scale: Tensor) -> Tensor:
        """Reduce, undo the loss scale, clip; for `distmuon.GradScaler`. Returns 1.0 if a gradient was not finite."""
        self._reduce()
        found_inf = self._built().unscale(inverse_scale)
        if self.options.max_grad_norm is not None:
            self.clip_grad_norm_(self.options.max_grad_norm)
        return found_inf

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, also those that were accumulated or reduced but not yet used by a step."""
        self._hooks.check_self(self)
        if self._engine is not None:
            self._engine.forget()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters on all ranks. `closure` re-evaluates the model and returns the loss."""
        loss = torch.enable_grad()(closure)() if closure is not None else None
        if self._engine is None and self._build_for_state_helper():
            return loss
        engine = self._built(values_used=self._has_gradients())
        hyperparameters_now = self._check_step()
        self._consolidated = None
        self.reduce_gradients()
        engine.update(hyperparameters_now, measure=self._is_due(self.options.telemetry_every))
        if not self._gathers_in_forward or self._optimizer_step_post_hooks or _global_optimizer_post_hooks:
            self.synchronize()
        self._metrics.close_step()
        for group in (*self._groups, self._exchange_group):
            group.step = self._metrics.steps + 1
        return loss

    def scale_rows(self, factors: Mapping[str, Tensor]) -> None:
        """Multiply rows of parameters, by name, by `factors` once, after the update of the next step.

        Each tensor is (rows,), float32, on the parameters' device, the same on all ranks. Masters are scaled in the
        step, before all-gathers, so nothing more travels. A skipped step drops the factors, a parameter without a
        gradient is left alone. Raises `ValueError` for an unknown name and for another number of rows.
        """
        index_of = {spec.fqn: index for index, spec in enumerate(self._specs)}
        for fqn, given in factors.items():
            spec = self._specs[index_of[fqn]] if fqn in index_of else None
            rows = spec.shape[:1] if spec is not None and spec.shape else None
            if rows is None or given.shape != rows:
                raise problem(
                    f"scale_rows[{fqn!r}]",
                    found="no trainable parameter of this optimizer" if rows is None else f"{tuple(given.shape)}",
                    needed=f"a factor for each of {rows[0]} rows is needed" if rows else "a parameter's name is needed",
                    cure="see optimizer.report(full=True)",
                )
        engine = self._built()
        engine.row_factors.update((index_of[fqn], given.float()) for fqn, given in factors.items())

    def _check_step(self) -> list[dict[str, Any]]:
        """Make all checks before a step; return its hyperparameters, with lr as a number."""
        check_groups(self.param_groups)
        found = [{**group, "lr": rules.scalar(group["lr"])} for group in self.param_groups]
        self._local_state.take_back(self.state)
        checks.check_members(self.param_groups, self._members)
        checks.check_frozen(self._frozen)
        if self._is_due(self.options.verify_every):
            with self._metrics.stage("verify"):
                self.verify_bits()
        return found

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self._metrics.steps + 1) % every == 0

    def verify_bits(self) -> None:
        """Compare the bits of parameters before the update, which would repair or spread a flipped bit. Collective."""
        self._built().finish_reductions()  # on all ranks, even without a backward

        def compare(number: int, group: DataParallelGroup) -> None:
            held = [pair for pair in (*self._named(), *self._frozen) if group_number(pair[0], self._routes) == number]
            named, _ = initial_values.plain(held)
            agree_on_bits(list(named), list(named.values()), group, stage="verify")

        in_each_group(self._groups, compare, stage="verify")

    def synchronize(self) -> None:
        """Wait for the all-gathers of parameters that `step` left in flight. Forwards do so themselves."""
        if self._engine is not None:
            self._engine.wait_params()

    # ----------------------------------------------------------------------------------------- called by module hooks

    def on_forward(self) -> None:
        """Called before the model's forward: build buffers in the first ordinary training forward.

        A forward without gradients waits for all parameters.
        """
        if not torch.is_grad_enabled():
            self.synchronize()
            return
        if not self.keeps_grads:
            checks.check_wrapper(self._params)
        if self._engine is not None or self._model is None or checks.is_ordinary(self._model, self._params):
            self._built()

    def wait_for(self, params: Iterable[int]) -> None:
        """Called before a module's forward: wait for the parameters that it uses."""
        if self._engine is not None and self._engine.must_wait:
            self._engine.wait_params({self.layout.bucket_of[index] for index in params})

    def on_load(self) -> None:
        """Called before a module's state is loaded: wait for all parameters."""
        self.synchronize()
        self._consolidated = None

    # ------------------------------------------------------------------------------------------------------- reports

    def metrics(self) -> dict[str, Any]:
        """Counters and times of this rank's last step; ``grad_norm`` is before clipping. Waits for the device."""
        built = self._engine
        return {
            **self._metrics.last(),
            "skipped_steps": int(built.skipped) if built is not None else 0,
            "grad_norm": float(built.grad_norm) if built is not None and built.grad_norm is not None else None,
            "lr": {group["rule"]: rules.scalar(group["lr"]) for group in reversed(self.param_groups)},
            "state_bytes": built.storage.state_bytes if built is not None else 0,
        }

    def not_finite(self) -> list[str]:
        """Names of the parameters whose averaged gradient was not finite in the step just taken; [] if all were.

        For a step that was skipped (`overflow`). Call it right after `step`, before `zero_grad` and the next backward.
        Waits for the device. Collective.
        """
        return self._engine.not_finite() if self._engine is not None else []

    def telemetry(self) -> dict[str, dict[str, Any]] | None:
        """What the last step did to each parameter, by name, the same on all ranks; None unless it was measured.

        Every ``telemetry_every``-th step is, unless it was skipped. Numbers of a parameter:

        - ``rule``, ``shape``
        - ``update_rms``: of what lr multiplies, without weight decay: ``0.2*sqrt(max(m, n))*O``, or AdamW's quotient.
        - ``weight_rms``, before the step; ``update_to_weight``: lr * update_rms / weight_rms, None for a zero weight.
        - Muon's, means over the logical matrices: ``update_singular_values`` and ``weight_singular_values``, of O and
          W: the smallest, the quartiles, the largest; ``residual``: ``||O O^T - I||_F / sqrt(k)``, k the short side;
          ``momentum_entropy``, ``update_entropy``, ``weight_entropy``: SVD entropy in [0, 1] of U, O, W
          (`math/spectra.py`).
        """
        return self._engine.telemetry if self._engine is not None else None

    def report(self, *, full: bool = False) -> str:
        """Summary of routing and layout in a few lines; `full` adds a line for each parameter, with the reason."""
        text = report.describe(self.layout, len(self._frozen), self._layouts)
        return f"{text}\n{report.routing_table(self.layout)}" if full else text

    # --------------------------------------------------------------------------------------------------------- state

    def full_state_dict(self) -> dict[str, Any]:
        """Like `state_dict`, but builds the buffers first if needed. Under FSDP2 too the full state. Collective."""
        if self._engine is None and not self._is_cut:
            self._meet("full_state_dict")
        self._built(to_train=False)
        return self._whole_state(self._packed()) if self._is_cut else self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Gather the full state of every parameter on the CPU of every rank, in torch.optim's format.

        Under FSDP2: this rank's shards instead, as DTensors, without communication.

        The state is empty before the first step or forward. Collective, except after `consolidate_state_dict`. Entries
        that the user has added to `optimizer.state` on this rank are included. Raises `ValueError`, within half a
        minute, on a rank that calls it alone.
        """
        state = self._packed_state()
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    def _packed(self) -> dict[str, Any]:
        """What stands in `optimizer.state`, as torch.optim packs it, before users' hooks."""
        post_hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            return super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = post_hooks

    def _packed_state(self) -> dict[str, Any]:
        packed = self._packed()
        if self._engine is None or self._is_cut:
            return packed
        if self._consolidated is not None and not self._consolidated:
            raise problem(
                f"state_dict on rank {self.group.dp_rank}",
                found=f"the state was consolidated on rank {self._consolidated_on} alone",
                needed="a rank that calls it alone needs the consolidated state",
                cure="call it on that rank, or call optimizer.consolidate_state_dict() on all ranks to keep it on all",
            )
        return self._whole_state(packed)

    def _whole_state(self, packed: dict[str, Any]) -> dict[str, Any]:
        """Every parameter's whole state in the place of this rank's part of it. Collective, unless consolidated."""
        state = self._consolidated if self._consolidated is not None else self._gathered("state_dict")
        assert self._engine is not None
        storage, groups = self._engine.storage, self.param_groups
        extra = full_state.numbered(storage, groups, self._local_state.extra_of(self.state))
        entries: dict[Any, Any] = {number: {**entry, **extra[number]} for number, entry in state.items()}
        entries.update(full_state.entries_beside(packed))
        return {"state": entries, "param_groups": packed["param_groups"]}

    def _gathered(self, what: str, keep: bool = True, limit_s: float | None = None) -> dict[int, dict[str, Tensor]]:
        """Gather the full state by torch.optim's numbers, on ranks with `keep`. Collective; `what` names the call."""
        assert self._engine is not None
        self._meet(what, limit_s)
        self.group.gather_objects(None, stage="state_dict")  # raises unless all ranks mean the same optimizer
        full = full_state.gather_full_state(self.quiesced().storage, self._groups, keep)
        return full_state.numbered(self._engine.storage, self.param_groups, full)

    def _meet(self, what: str, limit_s: float | None = None) -> None:
        """Wait until all ranks call for the state; raise if they do not. See [Note: state_dict on a single rank]."""
        limit = MEETING_S if limit_s is None else limit_s
        named = self.group.roll.named
        where = f"{what} on {named([self.group.dp_rank])}"
        needed = "the state is spread over the ranks, so all must call it"
        cure = (
            "call optimizer.consolidate_state_dict() on all ranks first, then a single rank may call state_dict; "
            "or call distmuon.save_checkpoint on all ranks"
        )

        def warning(absent: Sequence[int]) -> str:
            found = f"waits for {named(absent)}, for at most {limit:g} s"
            return str(problem(where, found=found, needed=needed, cure=cure))

        missing = self.group.missing_ranks("state_dict", warning, limit)
        if missing:
            standing = {named([rank]): place for rank, place in missing.items() if place}
            found = [f"{named(list(missing))} did not call it" + ("" if standing else f" within {limit:g} s")]
            found += [f"{r} stands at {place}, which waits for this rank" for r, place in list(standing.items())[:3]]
            raise problem(where, found="; ".join(found), needed=needed, cure=cure)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], on_route_change: str = "raise", **_ignored: object) -> None:
        """Load a full state saved at any dp_size. Collective.

        State keeps this optimizer's dtypes; saved masters become the parameters. A parameter that was saved under
        another rule raises, or with "reset" starts without state. Errors are raised on all ranks, before anything is
        changed. Under FSDP2 a rank loads alone: full tensors, or DTensors with the parameters' placement.
        """

        def check() -> tuple[dict[str, Any], bool]:
            state = state_dict
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                changed = hook(self, state)
                state = state if changed is None else changed
            full_state.check_form(state)
            rerouted = full_state.routed(state, self.param_groups, on_route_change)
            full_state.load_groups(rerouted["param_groups"], [dict(group) for group in self.param_groups])
            return rerouted, full_state.is_empty(rerouted)

        if self._is_cut:
            self._load_shards(*check())
            return
        self.group.begin("load_state_dict")
        checked, empty = raise_together(self.group, check, stage="load_state_dict")
        emptiness = self.group.gather_objects(empty, stage="load_state_dict")
        if len(set(emptiness)) > 1:
            raise problem(
                "load_state_dict",
                found=f"the state of ranks {[rank for rank, is_empty in enumerate(emptiness) if is_empty]} is empty, "
                "that of other ranks is not",
                needed="every rank needs the full state",
                cure="read the same file on every rank",
            )
        if not empty or self._engine is not None:  # an empty state was saved before the first step
            engine = self.quiesced(to_write=True)
            states, beside = raise_together(
                self.group, lambda: full_state.states_of(engine.storage, self.param_groups, checked)
            )
            full_state.load_full_state(engine.storage, states)
            engine.gather_all()
            self._local_state.load_extra(self.state, beside)
        self._finish_load(checked)

    def _load_shards(self, taken: dict[str, Any], empty: bool) -> None:
        """`load_state_dict` under FSDP2."""
        if not empty or self._engine is not None:
            engine = self._built_here()
            self._local_state.take_back(self.state)
            engine.storage.absorb_external_writes()
            states, beside = full_state.states_of(engine.storage, self.param_groups, taken)
            self._local_state.load(states)
            self._local_state.load_extra(self.state, beside)
        self._finish_load(taken)

    def _finish_load(self, taken: dict[str, Any]) -> None:
        """The parts of a state that are no parameter's."""
        for key in full_state.entries_beside(torch.optim.Optimizer.state_dict(self)):
            del self.state[key]
        self.state.update(full_state.entries_beside(taken))
        full_state.load_groups(taken["param_groups"], self.param_groups)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def quiesced(self, *, to_write: bool = False) -> Engine:
        """Quiesce and return the engine, so that all state can be read or written. Collective.

        Waits for collectives in flight and absorbs external writes to parameters.
        """
        engine = self._built(to_train=False)
        engine.finish_begun_reductions()
        self._local_state.take_back(self.state)
        if to_write:
            self._consolidated = None
        engine.wait_params()
        engine.storage.absorb_external_writes()
        return engine

    def consolidate_state_dict(self, to: int | None = None, *, timeout_s: float | None = None) -> None:
        """Gather the full state on the CPU of rank `to` of the group (None: of every rank). Collective.

        Later calls of `state_dict` on that rank then need no other rank. The state is kept until the next step or load
        and takes as many bytes as all ranks' state together. The first rank waits `timeout_s` for the last rank (None:
        25 s); then all ranks that came raise `ValueError`. Pass more if a rank validates or writes files before it
        comes.
        """
        size = self.group.dp_size
        if to is not None and (isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < size):
            raise problem(
                "consolidate_state_dict",
                found=f"found to={to!r}",
                needed=f"a rank of the group, 0 to {size - 1}, or None is needed",
                cure="pass None to keep the state on all ranks",
            )
        if self._is_cut:
            raise problem(
                "consolidate_state_dict",
                found="called under FSDP2",
                needed="state_dict() has this rank's shards there and asks no other rank",
                cure="call full_state_dict() on all ranks, or torch.distributed.checkpoint.state_dict's "
                "get_optimizer_state_dict",
            )
        if to is not None:
            cure = "pass to=None, and save the state of each rank"
            checks.check_one_group(self._specs, f"consolidate_state_dict(to={to})", cure)
        self._consolidated = None
        if self._engine is None:
            return
        keeps = to is None or to == self.group.dp_rank
        state = self._gathered("consolidate_state_dict", keeps, timeout_s)
        self._consolidated = state if keeps else {}
        self._consolidated_on = to if to is not None else -1

    def _is_state_helper_step(self) -> bool:
        """Whether this is the step that torch's state helpers take to create state. Waits for the device.

        It is false after any backward, since a backward builds. See [Note: the step of torch's state helpers].
        """
        grads = [None if param.grad is None else local_of(param.grad) for param in self._params]
        if self._engine is not None or any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        return all(grad is not None and not bool(grad.any()) for grad in grads)

    def _build_for_state_helper(self) -> bool:
        """Build; return whether this is, on all ranks, the step of torch's state helpers, which ends here."""
        is_helper_step = self._is_state_helper_step()
        if is_helper_step and not self._is_cut:
            self._meet("the first step of torch's state_dict helpers")
        self._built(values_used=not is_helper_step and self._has_gradients(), to_train=not is_helper_step)
        if any(float(group["lr"]) != 0.0 for group in self.param_groups):  # building has compared lr between ranks
            return False
        return all(self.group.gather_objects(is_helper_step, stage="state_dict"))

    def __getstate__(self) -> dict[str, Any]:
        raise problem(
            "DistMuon",
            found="copied or pickled as an object (or with a scheduler that holds it)",
            needed="a parameter has a single optimizer, with hooks and buffers",
            cure="use state_dict() or distmuon.save_checkpoint",
        )

    # ----------------------------------------------------------------- attributes for torch's GradScaler and DeepSpeed

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` itself unscales gradients; it does not.

        torch.amp.GradScaler reads this, and Lightning before it clips. If the gradients have left `param.grad`, both
        would miss them, so this raises, except for `distmuon.GradScaler`, which sets `loss_scaling`.
        """
        if not self.loss_scaling and self._engine is not None and self._engine.holds_grads:
            raise problem(
                "GradScaler",
                found="torch's scaler, or a trainer's clip, looks for gradients in param.grad, but distmuon has taken "
                "them already",
                needed="the scaler and the clip must use the reduced gradients",
                cure="use distmuon.GradScaler with float16 (bfloat16 needs none) and optimizer.clip_grad_norm_; under "
                'a trainer that itself averages, as Lightning\'s does, pass grad_reduction="external"',
            )
        return False

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Reduce; tell DeepSpeed, which asks at the last micro-batch, that it has no gradients to average."""
        if not self.managed_by_integration:
            raise problem(
                "DeepSpeed",
                found="an engine that the integration does not manage",
                needed="its clipping and accumulation must reach DistMuon",
                cure="call distmuon.integrations.deepspeed.register() before deepspeed.initialize",
            )
        self.reduce_gradients()
        return [], {}

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """DeepSpeed's name for `set_requires_gradient_sync`."""
        self.set_requires_gradient_sync(is_boundary)

    @property
    def _global_grad_norm(self) -> Tensor | None:
        """DeepSpeed's name for the norm of the last averaged gradient before clipping, 0-dim, on the device."""
        return self._engine.grad_norm if self._engine is not None else None

    @property
    def overflow(self) -> bool:
        """DeepSpeed's name for whether the last step was skipped. Waits for the device."""
        return self._engine is not None and self._engine.last_ok is not None and not bool(self._engine.last_ok)


def _groups_inside(group: DataParallelGroup, routes: Sequence[Route] | str | None) -> list[DataParallelGroup]:
    """The groups of the routes; see [Note: parameters that some ranks hold]."""
    found = [DataParallelGroup(process_group, group.count) for process_group in process_groups(routes)]
    for inner in found:
        inner.check_inside(group)
        inner.tells_place = False  # it counts its collectives separately
    return found


def _delegate_to_wrapped(cls: type[DistMuon]) -> None:
    """Delegate the public methods of `cls` to the wrapped optimizer; see [Note: wrappers that subclass]."""
    for name in dir(cls):
        definer = next(base for base in cls.__mro__ if name in vars(base))
        found = vars(definer)[name]
        if not issubclass(definer, torch.optim.Optimizer):
            continue
        if isinstance(found, property) and found.fset is None:
            setattr(cls, name, property(_delegated(name, found.fget)))
        elif isinstance(found, FunctionType) and not name.startswith("_"):
            setattr(cls, name, _delegated(name, found))


def _delegated(name: str, method: Callable[..., Any] | None) -> Callable[..., Any]:
    """Make a method that runs `method` on the optimizer that its caller wraps, or on the caller itself."""
    assert method is not None

    @wraps(method)
    def delegated(caller: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = getattr(caller, "_hooks", None)  # none while a subclass is being made
        optimizer = caller if hooks is None else hooks.listener
        if optimizer is caller:
            return method(caller, *args, **kwargs)
        found = getattr(optimizer, name)  # from the instance, since schedulers replace methods there
        return found(*args, **kwargs) if callable(found) else found

    return delegated


def _wait_params(optimizer: DistMuon, *_: object) -> None:
    """Wait for parameters, as a step hook."""
    optimizer.synchronize()
