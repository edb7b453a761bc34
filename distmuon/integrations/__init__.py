"""DistMuon under third-party trainers: one module for each trainer. docs/integrations.md is the user's page.

    import distmuon.integrations.accelerate as distmuon_accelerate       # pip install distmuon[accelerate]

These modules decide how a trainer's averaging, clipping and saving are passed to the optimizer, and refuse setups that
would train wrongly. They know no rule and no layout: they call the optimizer's public methods.

[Note: call targets] A trainer may hold several models, some trained by a DistMuon and others by torch's optimizers. The
parameters that a call gets decide which optimizer it means, never the order of preparation.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from torch import Tensor, nn

from distmuon.errors import problem
from distmuon.optimizer import DistMuon
from distmuon.step.dtensors import is_dtensor
from distmuon.step.hooks import manager_of

# package: (extra, lowest version, first version above) that the integrations were tested with; setup.cfg installs them
TESTED = {
    "accelerate": ("accelerate", (1, 15), (2,)),
    "transformers": ("transformers", (5, 0), (6,)),
    "deepspeed": ("deepspeed", (0, 19, 8), (0, 20)),
    "lightning-fabric": ("fabric", (2, 6), (3,)),
    "lightning": ("lightning", (2, 6), (3,)),
}


def need(package: str, extra: str) -> ModuleType:
    """Import `package`; raise an `ImportError` with the line that installs it if it is absent."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        text = problem(package, found="not installed", needed="it is needed", cure=install_line(extra))
        raise ImportError(str(text)) from None


def install_line(extra: str) -> str:
    """The line that installs the packages of `extra`. distmuon is on no index; pip takes the one that is installed."""
    return f'pip install "distmuon[{extra}]"'


def managers_of(params: Iterable[Tensor]) -> list[DistMuon | None]:
    """The DistMuons that manage `params`, without duplicates; None among them if other parameters are trainable."""
    found: dict[int, DistMuon | None] = {}
    for param in params:
        manager = manager_of(param)
        if isinstance(manager, DistMuon):
            found[id(manager)] = manager
        elif param.requires_grad:
            found[0] = None
    return list(found.values())


def averaging_managers_of(params: Iterable[Tensor]) -> list[DistMuon]:
    """The managers of `params` that average their gradients, so that the trainer must not; in one process as well."""
    managers = (manager for manager in managers_of(params) if manager is not None)
    return [manager for manager in managers if manager.options.grad_reduction != "external"]


def reducing_managers_of(params: Iterable[Tensor]) -> list[DistMuon]:
    """The managers of `params` whose gradients leave `param.grad` during backward."""
    return [manager for manager in managers_of(params) if manager is not None and not manager.keeps_grads]


def reduced_by(what: str, params: Iterable[Tensor]) -> DistMuon | None:
    """The DistMuon that reduces the gradients of `params`; None if they stay in `param.grad`.

    Raises `ValueError` if `params` belong to several optimizers, or are a part of an optimizer's parameters: the norm
    of a reduced gradient is known only for all of them. `what` names the call in the message.
    """
    params = list(params)
    managers = managers_of(params)
    reducing = reducing_managers_of(params)
    if not reducing:
        return None
    if len(managers) > 1:
        kinds = "a DistMuon and of none" if None in managers else f"{len(managers)} DistMuons"
        raise problem(
            what,
            found=f"one call for parameters of {kinds}",
            needed="the gradients of different optimizers have separate norms",
            cure="call it once for each optimizer's parameters, and freeze (requires_grad_(False)) untrained ones",
        )
    given = {id(param) for param in params}
    managed = list(params_of(reducing[0]))
    if absent := [param for param in managed if id(param) not in given]:
        raise problem(
            what,
            found=f"{len(managed) - len(absent)} of the {len(managed)} parameters of a DistMuon",
            needed="the reduced gradient's norm is that of all of them",
            cure="pass all parameters of the model",
        )
    return reducing[0]


def averaged_model(model: nn.Module) -> bool:
    """Whether DistMuon averages the gradients of `model`. Raises `ValueError` if it averages only some of them."""
    params = [param for param in model.parameters() if param.requires_grad]
    averaged = {id(param) for optimizer in averaging_managers_of(params) for param in params_of(optimizer)}
    num_foreign = sum(id(param) not in averaged for param in params)
    if averaged and num_foreign:
        raise problem(
            type(model).__name__,
            found=f"{num_foreign} of {len(params)} trainable parameters are not DistMuon's",
            needed="DDP would average all of them, and DistMuon some of them again",
            cure="give DistMuon the whole model (routes decide on AdamW), freeze the rest, or prepare the parts "
            "as separate models",
        )
    return bool(averaged)


def params_of(optimizer: DistMuon) -> Iterable[Tensor]:
    """All parameters that `optimizer` trains."""
    return (param for group in optimizer.param_groups for param in group["params"])


def is_cut(optimizer: DistMuon) -> bool:
    """Whether FSDP2 has cut the parameters of `optimizer`."""
    return any(map(is_dtensor, params_of(optimizer)))
