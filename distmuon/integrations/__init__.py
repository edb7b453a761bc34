"""DistMuon under other people's trainers: one module a trainer, docs/integrations.md the page.

    import distmuon.integrations.accelerate as distmuon_accelerate       # pip install distmuon[accelerate]

Decides how a trainer's own averaging, clipping and saving are led to the optimizer, and refuses, with the cure, what
would train wrongly. Knows no rule and no layout: all it does is call the optimizer's public methods.

[Note: whose parameters] A trainer may hold several models, some trained by a DistMuon and others by optimizers of
torch's own. Which of them a call means is told by the parameters it is given, never by what was prepared last.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from torch import Tensor, nn

from distmuon.errors import problem
from distmuon.optimizer import DistMuon
from distmuon.step.hooks import manager_of

# package: (extra, from, below), the versions the integrations were run with; setup.cfg installs them
TESTED = {
    "accelerate": ("accelerate", (1, 15), (2,)),
    "transformers": ("transformers", (5, 0), (6,)),
    "deepspeed": ("deepspeed", (0, 19, 8), (0, 20)),
    "lightning-fabric": ("fabric", (2, 6), (3,)),
    "lightning": ("lightning", (2, 6), (3,)),
}


def need(package: str, extra: str) -> ModuleType:
    """The imported `package`; `ImportError` with the line that installs it otherwise."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        text = problem(package, found="not installed", needed="it is used here", cure=f"pip install distmuon[{extra}]")
        raise ImportError(str(text)) from None


def managers_of(params: Iterable[Tensor]) -> list[DistMuon | None]:
    """The optimizers of ours that manage the trainable ones of `params`, each once; None among them for the others."""
    found: dict[int, DistMuon | None] = {}
    for param in params:
        manager = manager_of(param)
        if isinstance(manager, DistMuon):
            found[id(manager)] = manager
        elif param.requires_grad:
            found[0] = None
    return list(found.values())


def averaging_managers_of(params: Iterable[Tensor]) -> list[DistMuon]:
    """Those of `managers_of` that average the gradients, so that nobody else must; in one process as well."""
    managers = (each for each in managers_of(params) if each is not None)
    return [manager for manager in managers if manager.options.grad_reduction != "external"]


def reducing_managers_of(params: Iterable[Tensor]) -> list[DistMuon]:
    """Those of `managers_of` whose gradients leave `param.grad` during backward."""
    return [manager for manager in managers_of(params) if manager is not None and not manager.keeps_grads]


def reduced_by(what: str, params: Iterable[Tensor]) -> DistMuon | None:
    """The DistMuon that reduces the gradients of `params`; None where they stay in `param.grad`.

    Raises `ValueError` where one call would mean several optimizers, or a part of one: the norm of a reduced gradient
    is known of the whole alone. `what`: the call, for the message.
    """
    params = list(params)
    managers = managers_of(params)
    reducing = reducing_managers_of(params)
    if not reducing:
        return None
    if len(managers) > 1:
        others = "parameters of no DistMuon" if None in managers else f"those of {len(managers)} DistMuons"
        raise problem(
            what,
            found=f"one call for the parameters of a DistMuon together with {others}",
            needed="each optimizer's gradient has a norm of its own",
            cure="call it once for each optimizer's parameters, and freeze (requires_grad_(False)) what nobody trains",
        )
    given, all_of_it = {id(param) for param in params}, list(params_of(reducing[0]))
    if absent := [param for param in all_of_it if id(param) not in given]:
        raise problem(
            what,
            found=f"{len(all_of_it) - len(absent)} of the {len(all_of_it)} parameters of a DistMuon",
            needed="the reduced gradient's norm is that of all of them",
            cure="pass all parameters of the model",
        )
    return reducing[0]


def averaged_model(model: nn.Module) -> bool:
    """Whether DistMuon averages the gradients of `model`; `ValueError` where that is so of a part of them only."""
    params = [param for param in model.parameters() if param.requires_grad]
    ours = {id(param) for optimizer in averaging_managers_of(params) for param in params_of(optimizer)}
    num_others = sum(id(param) not in ours for param in params)
    if ours and num_others:
        raise problem(
            type(model).__name__,
            found=f"{num_others} of {len(params)} trainable parameters are not DistMuon's",
            needed="DDP would average all of them, and DistMuon some a second time",
            cure="give DistMuon the whole model (routes decide on AdamW), freeze the rest, or prepare the parts "
            "as models",
        )
    return bool(ours)


def params_of(optimizer: DistMuon) -> Iterable[Tensor]:
    """All parameters that `optimizer` trains."""
    return (param for group in optimizer.param_groups for param in group["params"])
