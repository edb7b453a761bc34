"""The user's options: those fixed for the life of an optimizer, the initial entries of its param groups, and routes.

This module decides which values are legal; it allocates no tensor. Every hyperparameter that a scheduler may change
(lr, weight decay, momentum, betas, ...) is a param-group entry instead, and is read again at every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard, get_args

import torch

from distmuon.errors import problem
from distmuon.math.codecs import UpdateCodec, update_codec
from distmuon.math.coefficients import coefficient_schedule

Rule = Literal["muon", "adamw"]
Packing = Literal["balanced", "contiguous"]
Placement = Literal["owner", "replicated"]
GradReduction = Literal["reduce_scatter", "external"]
ParamGather = Literal["parameters", "updates"]
Overlap = Literal[False, True, "forward"]
GpusPerNode = int | Literal["all"] | None
MasterFormat = Literal["float32", "remainder"]
AdjustLrFn = Literal["match_rms_adamw", "original"]


@dataclass(frozen=True, kw_only=True)  # without slots: jsonargparse reads `vars` of a default
class Precision:
    """The dtype in which each tensor is kept, computed or sent: a torch dtype or its name ("bfloat16")."""

    reduce: torch.dtype = field(default=torch.float32, metadata={"argument": "reduce_dtype"})
    """Dtype of gradient buffers and of their reduction: float32, bfloat16 or float16. Sums are float32."""
    momentum: torch.dtype = field(default=torch.float32, metadata={"argument": "momentum_dtype"})
    """Dtype of Muon's momentum buffer: float32, bfloat16 or int8 (blocks of 256 elements with a scale)."""
    newton_schulz: torch.dtype = field(default=torch.bfloat16, metadata={"argument": "ns_dtype"})
    """Dtype of the Newton-Schulz iteration: bfloat16, float32 or float64."""
    exchange: torch.dtype | None = field(default=None, metadata={"argument": "exchange_dtype"})
    """Wire dtype: pieces of updates and polar factors are sent and rounded in it, also those that stay on their rank
    (`Bucket._orthogonalize`). bfloat16, float32 or float64; None: `newton_schulz`. float16 is not allowed, since small
    updates would vanish in it. A further dtype goes into `_DTYPES`, and all senders and the planner follow, for they
    read `wire`. It must be a floating-point dtype that torch promotes and the backend sends: pieces travel without
    scales."""
    updates: torch.dtype | None = field(default=None, metadata={"argument": "updates_dtype"})
    """Dtype of the polar factors that `Sharding(param_gather="updates")` sends to all ranks: int8 (blocks of 256
    elements with a scale); None: `exchange`. They are rounded to it on any number of ranks, also on one."""
    master: MasterFormat = field(default="float32", metadata={"argument": "master_format"})
    """Format of a bfloat16 parameter's master: "float32", or "remainder", the 16 bits that the parameter lacks. Both
    give the same float32 master."""

    def __post_init__(self) -> None:
        for name, allowed in _DTYPES.items():
            object.__setattr__(self, name, as_dtype(getattr(self, name)))
            one_of(f"precision.{name}", getattr(self, name), allowed)
        one_of("precision.master", self.master, get_args(MasterFormat))

    @property
    def wire(self) -> torch.dtype:
        """The dtype in which pieces travel: `exchange`, or `newton_schulz` if that is None."""
        return self.newton_schulz if self.exchange is None else self.exchange

    @property
    def update_codec(self) -> UpdateCodec:
        """The format in which polar factors are rounded, and sent to all ranks if updates travel."""
        return update_codec(self.updates, self.wire, self.newton_schulz)


_DTYPES: dict[str, tuple[torch.dtype | None, ...]] = {
    "reduce": (torch.float32, torch.bfloat16, torch.float16),
    "momentum": (torch.float32, torch.bfloat16, torch.int8),
    "newton_schulz": (torch.bfloat16, torch.float32, torch.float64),
    "exchange": (None, torch.bfloat16, torch.float32, torch.float64),
    "updates": (None, torch.int8),
}


def as_dtype(given: object) -> object:
    """Return the dtype with a name like "bfloat16"; return anything else as it is."""
    found = getattr(torch, given, None) if isinstance(given, str) else None
    return found if isinstance(found, torch.dtype) else given


@dataclass(frozen=True, kw_only=True)  # without slots: jsonargparse reads `vars` of a default
class Sharding:
    """The cut of parameters over the ranks, and the tensors that travel and when. No field changes the update rule."""

    packing: Packing = "balanced"
    """"balanced": matrices lie whole on a rank if they fit. "contiguous": even cuts, as in Megatron."""
    placement: Placement = "owner"
    """"owner": a single rank orthogonalizes each matrix. "replicated": all ranks that hold a piece of it do."""
    bucket_mb: float | None = None
    """Size of a bucket in MiB of float32 gradients. None: chosen from the model's size (`distmuon.plan` compares)."""
    param_gather: ParamGather = "parameters"
    """The tensors that the all-gather sends: "parameters", or "updates": polar factors in `Precision.updates`, which
    every rank applies (float32 parameters only; three quarters of AdamW's traffic in bfloat16, five eighths in
    int8)."""
    release_grads: bool = False
    """Hold at most two buckets of gradients during the last backward, and none between steps."""
    overlap: Overlap = True
    """True: reduce under backward, and pipeline the buckets in `step`, which ends when all parameters have arrived.
    "forward": all-gathers run under the next forward, whose modules wait for them; other code that reads or writes
    parameters must call `DistMuon.synchronize` first. False: bucket after bucket."""
    gpus_per_node: GpusPerNode = None
    """Ranks of a node, in the numbering of the default process group; matrices then keep inside nodes, so that pieces
    of cut matrices hardly ever leave one. None: as the launcher's environment says (LOCAL_WORLD_SIZE, or
    SLURM_NTASKS_PER_NODE), if all ranks agree; if they do not, or if it says nothing, nodes do not matter. "all": all
    ranks share a node, and nodes do not matter. 1: every rank has a node to itself, with the same layout."""

    def __post_init__(self) -> None:
        one_of("sharding.packing", self.packing, get_args(Packing))
        one_of("sharding.placement", self.placement, get_args(Placement))
        one_of("sharding.param_gather", self.param_gather, get_args(ParamGather))
        one_of("sharding.overlap", self.overlap, get_args(Overlap))
        one_of("sharding.release_grads", self.release_grads, (False, True))
        positive("sharding.bucket_mb", self.bucket_mb, most=2.0**40)
        if self.gpus_per_node not in (None, "all") and (type(self.gpus_per_node) is not int or self.gpus_per_node < 1):
            raise problem(
                "sharding.gpus_per_node",
                found=f"found {self.gpus_per_node!r}",
                needed='a whole number from 1, "all" or None is needed',
                cure="correct sharding.gpus_per_node",
            )


def with_fields(sharding: Sharding, precision: Precision, given: Mapping[str, Any]) -> tuple[Sharding, Precision]:
    """The policies with the fields that were `given` as arguments of `DistMuon`: fields of `Sharding` by their names,
    those of `Precision` by names that say so (``momentum_dtype``, since ``momentum`` is a hyperparameter).

    Raises TypeError for any other argument, as a call does.
    """
    of_sharding = {f.name for f in fields(Sharding)}
    of_precision = {f.metadata["argument"]: f.name for f in fields(Precision)}
    for name in given:
        if name not in of_sharding and name not in of_precision:
            raise TypeError(
                f"DistMuon got an unexpected argument {name!r}; beside its own arguments it takes the fields of "
                f"Sharding ({', '.join(sorted(of_sharding))}) and Precision ({', '.join(of_precision)})"
            )
    cut = {name: value for name, value in given.items() if name in of_sharding}
    kept = {of_precision[name]: value for name, value in given.items() if name in of_precision and value is not None}
    return replace(sharding, **cut) if cut else sharding, replace(precision, **kept) if kept else precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options that are fixed for the life of an optimizer; `DistMuon` documents those that are not policies."""

    sharding: Sharding = field(default_factory=Sharding)
    precision: Precision = field(default_factory=Precision)
    grad_reduction: GradReduction = "reduce_scatter"
    max_grad_norm: float | None = None
    verify_every: int = 0
    telemetry_every: int = 0
    broadcast_buffers: bool = True

    def __post_init__(self) -> None:
        for name, policy in (("sharding", Sharding), ("precision", Precision)):
            if not isinstance(getattr(self, name), policy):
                found = f"found {getattr(self, name)!r}"
                raise problem(
                    name,
                    found=found,
                    needed=f"a distmuon.{policy.__name__} is needed",
                    cure=f"{name}={policy.__name__}(...)",
                )
        one_of("grad_reduction", self.grad_reduction, get_args(GradReduction))
        one_of("broadcast_buffers", self.broadcast_buffers, (False, True))
        positive("max_grad_norm", self.max_grad_norm)
        for name in ("verify_every", "telemetry_every"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise problem(
                    name, found=f"found {value!r}", needed="a number of steps is needed", cure="pass 0 for never"
                )
        if self.sharding.release_grads and self.grad_reduction == "external":
            raise problem(
                "sharding.release_grads",
                found='found True with grad_reduction="external"',
                needed="only distmuon's own gradient buffers can be released",
                cure="let zero_grad(set_to_none=True) free the gradients",
            )
        if self.precision.updates is not None and self.sharding.param_gather != "updates":
            raise problem(
                "precision.updates",
                found=f'found {self.precision.updates} with param_gather="{self.sharding.param_gather}"',
                needed="updates must travel, or else this would round them and save nothing",
                cure='pass Sharding(param_gather="updates"), or leave precision.updates out',
            )

    def check_dtypes(self, params: Sequence[tuple[str, torch.dtype]]) -> None:
        """Raise for an option of storage or traffic that cannot work with `params`: (fqn, dtype)."""
        for fqn, dtype in params:
            if self.sharding.param_gather == "updates" and dtype != torch.float32:
                raise problem(
                    fqn,
                    found=f'the parameter is {dtype} with param_gather="updates"',
                    needed="float32 parameters are needed, since replicas hold no masters",
                    cure='pass Sharding(param_gather="parameters")',
                )
        if self.precision.master == "remainder" and all(dtype != torch.bfloat16 for _, dtype in params):
            raise problem(
                "precision.master",
                found=f'found "remainder" with parameters of {params[0][1]}',
                needed="bfloat16 parameters are needed, since it keeps the 16 bits that they lack",
                cure='pass Precision(master="float32")',
            )

    def grads_stay(self, dp_size: int) -> bool:
        """Whether gradients stay in `param.grad`, because they arrive averaged or because there is a single rank."""
        return self.grad_reduction == "external" or dp_size == 1

    def items(self) -> list[str]:
        """A text for each option, on which all ranks must agree."""
        policies: dict[str, Sharding | Precision] = {"sharding": self.sharding, "precision": self.precision}
        found = [f"{f.name} = {getattr(self, f.name)}" for f in fields(self) if f.name not in policies]
        for name, policy in policies.items():
            found += [f"{name}.{f.name} = {getattr(policy, f.name)}" for f in fields(policy)]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """Initial values of the param groups, from the constructor; None for AdamW means Muon's value."""

    lr: float | torch.Tensor
    weight_decay: float
    momentum: float
    nesterov: bool
    ns_steps: int
    ns_coefficients: str | tuple[float, float, float]
    adjust_lr_fn: AdjustLrFn
    adamw_lr: float | torch.Tensor | None
    adamw_betas: tuple[float, float]
    adamw_eps: float
    adamw_weight_decay: float | None
    cautious_weight_decay: bool
    normuon_beta2: float | None

    def group(self, rule: Rule) -> dict[str, object]:
        """The entries of a new param group. Both rules have `momentum`: schedulers that cycle it read every group."""
        cautious = {CAUTIOUS: self.cautious_weight_decay} if self.cautious_weight_decay is not False else {}
        if rule == "muon":
            return {
                "rule": rule,
                "lr": self.lr,
                "weight_decay": self.weight_decay,
                "momentum": self.momentum,
                "nesterov": self.nesterov,
                "ns_steps": self.ns_steps,
                "ns_coefficients": self.ns_coefficients,
                "adjust_lr_fn": self.adjust_lr_fn,
                **cautious,
                **({} if self.normuon_beta2 is None else {NORMUON: self.normuon_beta2}),
            }
        return {
            "rule": rule,
            "lr": self.lr if self.adamw_lr is None else self.adamw_lr,
            "weight_decay": self.weight_decay if self.adamw_weight_decay is None else self.adamw_weight_decay,
            "momentum": self.momentum,
            "betas": self.adamw_betas,
            "eps": self.adamw_eps,
            **cautious,
        }


CAUTIOUS = "cautious_weight_decay"
"""The entry of a param group whose decay is cautious; other groups need not have it."""
NORMUON = "normuon_beta2"
"""The entry of a param group of Muon whose updates are normalized by rows; other groups need not have it."""
OPTIONAL: dict[object, tuple[str, ...]] = {"muon": (CAUTIOUS, NORMUON), "adamw": (CAUTIOUS,)}
"""The entries that a group of a rule may have beside those that it must have."""
_KEYS: dict[object, tuple[str, ...]] = {
    "muon": ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "ns_coefficients", "adjust_lr_fn"),
    "adamw": ("lr", "weight_decay", "betas", "eps"),
}


def hyperparameters(param_groups: Sequence[dict[str, Any]]) -> list[str]:
    """A text for each hyperparameter, on which ranks must agree; entries of users and schedulers are left out."""
    return [
        f"param_groups[{number}].{key} = {_plain(group[key])}"
        for number, group in enumerate(param_groups)
        for key in ("rule", *_KEYS[group["rule"]], *(key for key in OPTIONAL[group["rule"]] if key in group))
    ]


def _plain(value: object) -> object:
    # repr() of a tensor rounds; compare exact values.
    return value.tolist() if isinstance(value, torch.Tensor) else value


def check_groups(param_groups: Sequence[dict[str, Any]]) -> None:
    """Raise for the first hyperparameter with an illegal value."""
    for number, group in enumerate(param_groups):
        _check_group(f"param_groups[{number}]", group)


def _check_group(name: str, group: dict[str, Any]) -> None:

    def bound(key: str, value: object, below: float = float("inf")) -> None:
        if isinstance(value, torch.Tensor) and key == "lr":  # torch.optim also takes lr as a tensor
            if value.numel() != 1:
                raise problem(
                    f"{name}.{key}",
                    found=f"a tensor of {value.numel()} elements",
                    needed="a single element is needed",
                    cure="pass a number",
                )
            if value.device.type != "cpu" or value.is_complex():
                found = f"a tensor of {value.dtype} on {value.device}"
                raise problem(
                    f"{name}.{key}", found=found, needed="a real number on the CPU is needed", cure="move it there"
                )
            value = value.item()
        if not is_number(value) or not 0.0 <= value < below:
            needed = "a number >= 0 is needed" if below == float("inf") else f"a number in [0, {below}) is needed"
            raise problem(f"{name}.{key}", found=f"found {value!r}", needed=needed, cure=f"correct {key}")

    one_of(f"{name}.rule", group.get("rule"), ("muon", "adamw"))
    missing = [key for key in _KEYS[group["rule"]] if key not in group]
    if missing:
        raise problem(
            f"{name}.{missing[0]}",
            found="missing",
            needed="a group needs all hyperparameters of its rule",
            cure=f"put {missing[0]} back",
        )
    bound("lr", group["lr"])
    bound("weight_decay", group["weight_decay"])
    one_of(f"{name}.{CAUTIOUS}", group.get(CAUTIOUS, False), (False, True))
    if group["rule"] == "muon":
        bound("momentum", group["momentum"], 1.0)
        if group.get(NORMUON) is not None:
            bound(NORMUON, group[NORMUON], 1.0)
        one_of(f"{name}.nesterov", group["nesterov"], (False, True))
        one_of(f"{name}.adjust_lr_fn", group["adjust_lr_fn"], get_args(AdjustLrFn))
        steps = group["ns_steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < 100:
            raise problem(
                f"{name}.ns_steps",
                found=f"found {steps!r}",
                needed="1 to 99 steps are needed",
                cure="pass 5, the usual number",
            )
        coefficient_schedule(group["ns_coefficients"], steps)
        return
    bound("eps", group["eps"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise problem(
            f"{name}.betas", found=f"found {betas!r}", needed="two numbers are needed", cure="pass (beta1, beta2)"
        )
    for beta in betas:
        bound("betas", beta, 1.0)


def positive(name: str, value: object, most: float = float("inf")) -> None:
    """Raise unless `value` is None or a number above 0, and at most `most`."""
    if value is not None and not (is_number(value) and 0 < value <= most):
        raise problem(
            name, found=f"found {value!r}", needed="a positive number is needed", cure="correct it, or pass None"
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number that a float can hold, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's numbers are `Real`
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise unless `value` is in `allowed` and has the same type: 0 is not False."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in allowed):
        raise problem(
            name,
            found=f"found {value!r}",
            needed=f"one of {', '.join(map(str, allowed))} is needed",
            cure=f"correct {name}",
        )


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A user's decision that `rule` updates all parameters whose fqn matches `pattern` (shell-style).

    `split`: sizes of the logical matrices fused along `split_dim` of the (out, in) weight; their sum must be its size.
    `heads`: that many equal parts instead (Muon head by head; `integrations.heads.head_routes` makes such routes).
    `options`: param-group entries for these parameters, such as ``{"lr": 1e-4, "weight_decay": 0.0}``. `copies`: how
    many ranks of `model_parallel_group` hold the same parameter (a norm under tensor parallelism with plain tensors, an
    embedding tied over two stages of a pipeline); the gradient norm counts it once. `process_group`: the ranks that
    hold these parameters, where other ranks of the data-parallel group hold other parameters in their place (experts in
    plain tensors); gradients are averaged, matrices shared out and parameters gathered over these ranks.
    """

    pattern: str
    rule: Rule
    split: Sequence[int] | None = None
    split_dim: int = 0
    options: Mapping[str, object] = field(default_factory=dict)
    copies: int = 1
    process_group: Any = None
    heads: int | None = None

    def __post_init__(self) -> None:
        split = () if self.split is None else self.split
        options = self.options
        is_legal = isinstance(self.pattern, str) and isinstance(split, (list, tuple)) and isinstance(options, Mapping)
        if (
            not is_legal
            or not all(isinstance(part, Integral) for part in split)
            or not all(isinstance(k, str) for k in options)
        ):
            needed = "a string as pattern, whole numbers as split and a dict as options are needed"
            raise problem("Route", found=f"found {self}", needed=needed, cure="correct it")
        if self.heads is not None and (type(self.heads) is not int or self.heads < 1 or self.split is not None):
            raise problem(
                f"Route({self.pattern!r}).heads",
                found=f"found {self.heads!r}" + (" beside split" if self.split is not None else ""),
                needed="a number of equal parts, 1 or more, is needed, or their sizes",
                cure="pass heads or split",
            )
        if isinstance(self.copies, bool) or not isinstance(self.copies, int) or self.copies < 1:
            raise problem(
                f"Route({self.pattern!r}).copies",
                found=f"found {self.copies!r}",
                needed="the number of ranks that hold the parameter, 1 or more, is needed",
                cure="correct it",
            )
        one_of(f"Route({self.pattern!r}).rule", self.rule, ("muon", "adamw"))
        one_of(f"Route({self.pattern!r}).split_dim", self.split_dim, (0, 1))


def checked_routes(routes: Sequence[Route] | str | None) -> tuple[Route, ...]:
    """Return `routes` as a tuple, after a check; "adamw" gives the route of all parameters to AdamW."""
    if isinstance(routes, str):
        one_of("routes", routes, ("adamw",))
        return (Route("*", "adamw"),)
    if routes is None:
        return ()
    given = tuple(routes) if isinstance(routes, Iterable) else (routes,)
    if not all(isinstance(entry, Route) for entry in given):
        raise problem(
            "routes",
            found=f"found {routes!r}",
            needed='a list of distmuon.Route or "adamw" is needed',
            cure="correct it",
        )
    return given
