"""Plain `DistributedDataParallel`, kept for what it does in forward, relieved of the gradients.

Two ways. `DistMuon(ddp_model, grad_reduction="external")` lets DDP average (twice the traffic, no overlap with ours).
`silence` keeps the wrapper (buffer broadcasts, inputs to the device, `no_sync`) and lets distmuon reduce.

[Note: the flag] DDP averages in the backward of a forward that found `require_backward_grad_sync` True. `no_sync`
clears it for its block; many loops write it themselves, a micro-batch at a time, and never call `no_sync`. So the flag
is read in each forward, where DDP reads it. `no_sync` around the backward alone counts too: DDP would average once more
than needed there, to the same end, while a second reduction of ours is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.parallel import DistributedDataParallel

from distmuon.checks import SILENCED
from distmuon.errors import problem
from distmuon.integrations import params_of
from distmuon.optimizer import DistMuon


def silence(model: DistributedDataParallel, optimizer: DistMuon) -> DistributedDataParallel:
    """`model`, whose buckets are no longer reduced, and whose `no_sync` and `require_backward_grad_sync` are the
    optimizer's as well; see [Note: the flag].

    `optimizer` holds `model.module`. DDP keeps its buckets in memory (as many bytes as the gradients): without DDP
    there are none. Raises `ValueError` for grad_reduction="external", for parameters that are not all the optimizer's,
    and for arguments in another order.
    """
    if not isinstance(model, DistributedDataParallel) or not isinstance(optimizer, DistMuon):
        raise problem(
            "silence",
            found=f"({type(model).__name__}, {type(optimizer).__name__})",
            needed="the wrapped model and its optimizer are needed, in this order",
            cure="call silence(DistributedDataParallel(model), optimizer)",
        )
    if optimizer.options.grad_reduction == "external":
        raise problem(
            "DistributedDataParallel",
            found='silenced with grad_reduction="external"',
            needed="somebody has to average",
            cure="drop one of the two",
        )
    reduced, trained = {id(p) for p in params_of(optimizer)}, [p for p in model.parameters() if p.requires_grad]
    if num_others := sum(id(param) not in reduced for param in trained):
        raise problem(
            "silence",
            found=f"{num_others} of the wrapper's {len(trained)} trainable parameters are not the optimizer's",
            needed="somebody has to average them",
            cure="silence the wrapper of what this optimizer trains, and that alone",
        )
    if model.static_graph:
        raise problem(
            "DistributedDataParallel",
            found="silenced with static_graph=True",
            needed="a reduction that may be left out is needed",
            cure="leave static_graph out: it tunes DDP's own reduction",
        )
    setattr(model, SILENCED, True)
    flag = _Flag(optimizer)
    model.register_forward_pre_hook(torch.compiler.disable(flag.before))
    model.register_forward_hook(torch.compiler.disable(flag.after), always_call=True)
    ddp_no_sync = model.no_sync

    @contextmanager
    def no_sync() -> Iterator[None]:
        try:
            with ddp_no_sync(), optimizer.no_sync():
                yield
        finally:
            flag.repeat()

    model.no_sync = no_sync  # type: ignore[method-assign,unused-ignore]
    return model


class _Flag:
    """`require_backward_grad_sync`, told to the optimizer and cleared while DDP's own forward runs.

    So DDP prepares no reduction for the backward that follows, and reads and writes no `param.grad` in it.
    """

    def __init__(self, optimizer: DistMuon) -> None:
        self._optimizer = optimizer
        self._last = self._found = True

    def before(self, model: DistributedDataParallel, _args: object) -> None:
        """Told when it changes, so that `optimizer.no_sync` around forwards that leave it alone counts as well."""
        self._found = bool(model.require_backward_grad_sync)
        if torch.is_grad_enabled() and self._found != self._last:
            self._last = self._found
            self._optimizer.set_requires_gradient_sync(self._found)
        model.require_backward_grad_sync = False

    def after(self, model: DistributedDataParallel, _args: object, _output: object) -> None:
        """DDP sends its module buffers in the forward that follows one whose gradients are reduced."""
        model.require_backward_grad_sync = self._found
        if torch.is_grad_enabled():
            model.require_forward_param_sync = self._found

    def repeat(self) -> None:
        """The block of `no_sync` has ended and the forward before this has not: its backward is still to come."""
        if not self._last:
            self._optimizer.set_requires_gradient_sync(False)
