"""What trainers ask of an optimizer beyond a step: its state, which one rank alone may fetch, loss scaling, norms and
skips to report.

Decides nothing about the algorithm. `DistMuon` inherits it; the integrations and the trainers themselves call it.

[Note: who may ask for the state] `state_dict` gathers the shards, so all ranks must call it. A trainer that lets one
rank save calls `consolidate_state_dict` on all ranks first; from then to the next step or load `state_dict` answers
from what was gathered, on the ranks that keep it, without talking to others. A rank that asks alone without it is told
so: before anything is gathered the ranks meet in the group's store, which no collective waits for (roll_call.py).

[Note: asked for its state to load into it] torch's `get_state_dict` and `set_state_dict` step an optimizer without
state once, with gradients of zero and lr 0, for its state to be there. That step of an optimizer that has not been
built builds it and counts as none: no momentum, no AdamW step, no metrics. A plain `state_dict` builds nothing, for
engines that move and cast the model afterwards (accelerate) call it, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distmuon import checkpoint, guards, holdings
from distmuon.agreement import agree_on_bits, together
from distmuon.collectives import MEETING_S, DataParallelGroup
from distmuon.conductor import Conductor
from distmuon.config import Options, check_groups, hyperparameters
from distmuon.hooks import Hooks
from distmuon.layout import Layout
from distmuon.local_state import LocalState
from distmuon.param_gather import ParamGather
from distmuon.routing import ParamSpec


class TrainerFace(torch.optim.Optimizer):
    """Base of `DistMuon`; the annotated attributes are its own."""

    group: DataParallelGroup
    layout: Layout
    _model: nn.Module | None
    _specs: tuple[ParamSpec, ...]
    _params: list[nn.Parameter]
    _frozen: list[tuple[str, nn.Parameter]]
    options: Options
    loss_scaling = False  # set by `distmuon.GradScaler`
    _conductor: Conductor | None
    _sync: bool
    engine_is_led = False  # set by `distmuon.integrations.deepspeed`
    _consolidated: dict[int, dict[str, Tensor]] | None = None  # {}: kept on another rank, `_consolidated_on`
    _consolidated_on = -1
    _local_state: LocalState  # once built
    _hooks: Hooks

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(not issubclass(base, torch.optim.Optimizer) for base in cls.__mro__[:-1]):
            _lead_to_the_wrapped(cls)

    if TYPE_CHECKING:  # what `DistMuon` defines

        def _built(self, *, values_used: bool = False, to_train: bool = True) -> Conductor: ...
        def _has_gradients(self) -> bool: ...
        def _reduce(self) -> bool: ...
        def reduce_gradients(self, **_ignored: object) -> None: ...
        def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor: ...
        def synchronize(self) -> None: ...

    def full_state_dict(self) -> dict[str, Any]:
        """`state_dict`, of what is built here if need be."""
        if self._conductor is None:
            self._meet("full_state_dict")
        self._built(to_train=False)
        return self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Whole state of every parameter, on the CPU of every rank, in torch.optim's format; empty before the first
        step or forward. Collective, or on one rank alone after `consolidate_state_dict`.

        What users have put into `optimizer.state` is in it, this rank's own. Raises `ValueError` on a rank that asks
        alone, within half a minute.
        """
        state = self._packed_state()
        for hook in self._optimizer_state_dict_post_hooks.values():
            state = given if (given := hook(self, state)) is not None else state
        return state

    def _packed_state(self) -> dict[str, Any]:
        post_hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            packed = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = post_hooks
        if self._conductor is None:
            return packed
        if self._consolidated is not None and not self._consolidated:
            raise guards.kept_elsewhere(self.group.dp_rank, self._consolidated_on)
        state = self._consolidated if self._consolidated is not None else self._gathered("state_dict")
        buffers, groups = self._conductor.buffers, self.param_groups
        extra = checkpoint.numbered(buffers, groups, self._local_state.extra_of(self.state))
        whole: dict[Any, Any] = {number: {**entry, **extra[number]} for number, entry in state.items()}
        whole.update(checkpoint.entries_beside(packed))
        return {"state": whole, "param_groups": packed["param_groups"]}

    def _gathered(self, what: str, keep: bool = True, limit_s: float | None = None) -> dict[int, dict[str, Tensor]]:
        """The whole state by torch.optim's numbers where `keep`. Collective, in `what`."""
        assert self._conductor is not None
        self._meet(what, limit_s)
        self.group.gather_objects(None, stage="state_dict")  # all came, and must ask for the same optimizer's
        full = checkpoint.gather_full_state(self.at_rest().buffers, self.group, keep)
        return checkpoint.numbered(self._conductor.buffers, self.param_groups, full)

    def _meet(self, what: str, limit_s: float | None = None) -> None:
        """Return once all ranks ask for a state; raise where that does not happen, see the first note above."""
        limit, named = MEETING_S if limit_s is None else limit_s, self.group.roll.named
        where = f"{what} on {named([self.group.dp_rank])}"

        def warning(absent: Sequence[int]) -> str:
            return guards.waits_for(where, limit, named(absent))

        missing = self.group.missing_ranks("state_dict", warning, limit)
        if missing:
            standing = {named([rank]): place for rank, place in missing.items() if place}
            raise guards.asked_alone(where, limit, named(list(missing)), standing)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], on_route_change: str = "raise", **_ignored: object) -> None:
        """Load a full state saved at any dp_size. State keeps its own dtype; masters, if any, become the parameters.
        A parameter under another rule than then raises, or with "reset" begins with no state. Collective; what raises,
        raises on all ranks and before anything is changed."""

        def check() -> tuple[dict[str, Any], bool]:
            state = state_dict
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                state = given if (given := hook(self, state)) is not None else state
            checkpoint.check_form(state)
            taken = checkpoint.routed(state, self.param_groups, on_route_change)
            checkpoint.load_groups(taken["param_groups"], [dict(group) for group in self.param_groups])
            return taken, checkpoint.is_empty(taken)

        self.group.begin("load_state_dict")
        taken, empty = together(self.group, check, stage="load_state_dict")
        if len(set(emptiness := self.group.gather_objects(empty, stage="load_state_dict"))) > 1:
            raise guards.loaded_unlike([rank for rank, is_empty in enumerate(emptiness) if is_empty])
        if not empty or self._conductor is not None:  # the state of before the first step is none
            gather = self.at_rest(to_write=True)
            states, beside = together(
                self.group, lambda: checkpoint.states_of(gather.buffers, self.param_groups, taken)
            )
            checkpoint.load_full_state(gather.buffers, states)
            gather.publish()
            self._local_state.load_extra(self.state, beside)
        for key in checkpoint.entries_beside(torch.optim.Optimizer.state_dict(self)):
            del self.state[key]
        self.state.update(checkpoint.entries_beside(taken))
        checkpoint.load_groups(taken["param_groups"], self.param_groups)
        for done in self._optimizer_load_state_dict_post_hooks.values():
            done(self)

    def verify_options(self, also: str = "") -> None:
        """Raise on all ranks, naming the first difference, unless all have the same options and hyperparameters now: a
        scheduler fed with each rank's own loss sets another lr on each. Collective."""
        together(self.group, lambda: check_groups(self.param_groups), stage="comparison of the plans")
        items = [f"{field.name} = {getattr(self.options, field.name)}" for field in fields(self.options)]
        items += hyperparameters(self.param_groups)
        guards.agree_on_plan(repr(items) + also, items, self.group)

    def check_parameters(self) -> None:
        """Raise if parameters are not, or no longer, what the layout was made for."""
        guards.check_parameters(self._model, self._named(), [spec.shape for spec in self._specs])

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(spec.fqn, param) for spec, param in zip(self._specs, self._params)]

    def verify_bits(self) -> None:
        """Compare parameters as this step's forwards used them: an update and its all-gather heal or spread a bit."""
        named, _ = holdings.plain([*self._named(), *self._frozen])
        self._built().source.finish()  # on all ranks, also one that had no backward
        agree_on_bits(list(named), list(named.values()), self.group, stage="verify")

    def at_rest(self, *, to_write: bool = False) -> ParamGather:
        """For who reads or writes all state: nothing is in flight, foreign writes are taken over. Collective."""
        conductor = self._built(to_train=False)
        conductor.settle()
        self._local_state.take_back(self.state)
        if to_write:
            self._consolidated = None
        return conductor.param_gather.settled()

    def consolidate_state_dict(self, to: int | None = None, *, timeout_s: float | None = None) -> None:
        """Gather the whole state on the CPU of rank `to` of the group (None: of every rank), for later calls of
        `state_dict` there, on that rank alone. Collective.

        It is kept to the next step or load: as many bytes as all ranks' state together. The first rank waits
        `timeout_s` for the last one (None: 25 s), and then all that came raise `ValueError`: give more where one rank
        validates or writes files before it comes.
        """
        size = self.group.dp_size
        if to is not None and (isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < size):
            raise guards.not_a_rank(to, size)
        self._consolidated = None
        if self._conductor is None:
            return
        keeps = to is None or to == self.group.dp_rank
        state = self._gathered("consolidate_state_dict", keeps, timeout_s)
        self._consolidated, self._consolidated_on = (state if keeps else {}), to if to is not None else -1

    def _asked_for_state(self) -> bool:
        """torch asks an optimizer that has not been built for its state, see the second note above. Reads the device.

        Never true once a backward has run, for that has built.
        """
        grads = [param.grad for param in self._params]
        if self._conductor is not None or any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        return all(grad is not None and not bool(grad.any()) for grad in grads)

    def _build_if_asked(self) -> bool:
        """Build, if all ranks are asked for their state; whether they are."""
        asked = self._asked_for_state()
        if asked:
            self._meet("the first step of torch's state_dict helpers")
        self._built(values_used=not asked and self._has_gradients(), to_train=not asked)
        if any(float(group["lr"]) != 0.0 for group in self.param_groups):  # the same on all ranks: building compares
            return False
        return all(self.group.gather_objects(asked, stage="state_dict"))

    def __getstate__(self) -> dict[str, Any]:
        raise guards.not_copied()

    def set_requires_gradient_sync(self, requires: bool) -> None:
        """Whether the following backwards end an optimizer step; `no_sync` for callers that hold no context open.

        With False for every backward the reduction starts in `reduce_gradients`, with no overlap.
        """
        self._sync = requires

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "layout"):
            raise guards.late_group()
        super().add_param_group(param_group)

    @torch.no_grad()
    def unscale_grads(self, inverse_scale: Tensor) -> Tensor:
        """For `distmuon.GradScaler`: reduce, undo the loss scale, clip. 1.0 if any rank's gradient was not finite."""
        self._reduce()
        found_inf = self._built().unscale(inverse_scale)
        if self.options.max_grad_norm is not None:
            self.clip_grad_norm_(self.options.max_grad_norm)
        return found_inf

    @property
    def keeps_grads(self) -> bool:
        """Whether `param.grad` stays where autograd put it, as with torch's own optimizers: somebody else averages, or
        nobody has to."""
        return self.options.grads_stay(self.group.dp_size)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` unscales by itself, which it does not. torch.amp.GradScaler asks this, and Lightning before it
        clips. Where the gradients have left `param.grad`, whoever asks would look for them in vain and must not go on;
        our own scaler has announced itself."""
        if not self.loss_scaling and self._conductor is not None and self._conductor.source.holds_grads:
            raise guards.no_loss_scaling()
        return False

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """DeepSpeed asks at the last micro-batch which gradients it must average: none, that is done here."""
        if not self.engine_is_led:
            raise guards.unled_engine()
        self.reduce_gradients()
        return [], {}

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """DeepSpeed's name for `set_requires_gradient_sync`; its engine calls it when it is told the boundary."""
        self.set_requires_gradient_sync(is_boundary)

    @property
    def _global_grad_norm(self) -> Tensor | None:
        """DeepSpeed's name for the norm of the last averaged gradient before clipping; 0-dim, on the device."""
        return self._conductor.grad_norm if self._conductor is not None else None

    @property
    def overflow(self) -> bool:
        """DeepSpeed's name for a last step that was skipped. Reads the device."""
        norm = self._global_grad_norm
        return norm is not None and not bool(torch.isfinite(norm))


def _lead_to_the_wrapped(cls: type[TrainerFace]) -> None:
    """See [Note: wrappers that borrow the class]."""
    for name in dir(cls):
        owner = next(base for base in cls.__mro__ if name in vars(base))
        found = vars(owner)[name]
        if not issubclass(owner, torch.optim.Optimizer):
            continue
        if isinstance(found, property) and found.fset is None:
            setattr(cls, name, property(_led(name, found.fget)))
        elif isinstance(found, FunctionType) and not name.startswith("_"):
            setattr(cls, name, _led(name, found))


def _led(name: str, method: Callable[..., Any] | None) -> Callable[..., Any]:
    """`method`, run on the optimizer that its caller wraps, if it wraps one."""
    assert method is not None

    @wraps(method)
    def led(caller: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = getattr(caller, "_hooks", None)  # none while a subclass is being made
        optimizer = caller if hooks is None else hooks.listener
        if optimizer is caller:
            return method(caller, *args, **kwargs)
        found = getattr(optimizer, name)  # the instance's, which schedulers replace
        return found(*args, **kwargs) if callable(found) else found

    return led


def arrived(optimizer: TrainerFace, *_: object) -> None:
    """A step hook: parameters are there."""
    optimizer.synchronize()
