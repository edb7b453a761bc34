"""Plain `DistributedDataParallel`: the wrapper stays for its work in forward, and distmuon reduces the gradients.

With `DistMuon(ddp_model, grad_reduction="external")` DDP averages (twice the traffic, and no overlap with distmuon's
collectives). `silence` keeps the wrapper (buffer broadcasts, inputs to the device, `no_sync`) and lets distmuon reduce.
This module decides when a backward reduces; it knows no bucket.

[Note: the flag] DDP averages in the backward of a forward that found `require_backward_grad_sync` True. `no_sync`
clears the flag for its block; many loops write it themselves for every micro-batch, and never call `no_sync`. So the
flag is read in each forward, as DDP does. `no_sync` around only the backward counts, too: there DDP would average once
more than needed, with the same result, but distmuon refuses a second reduction.
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
    """Stop DDP's reduction of `model`, and let its `no_sync` and `require_backward_grad_sync` control the optimizer.

    `optimizer` trains `model.module`; see [Note: the flag]. Returns `model`. DDP keeps its buckets in memory (as many
    bytes as the gradients). Raises `ValueError` for grad_reduction="external", for trainable parameters that are not
    the optimizer's, and for arguments in another order.
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
            needed="DDP or distmuon must average the gradients",
            cure='leave out silence or grad_reduction="external"',
        )
    reduced = {id(p) for p in params_of(optimizer)}
    trained = [p for p in model.parameters() if p.requires_grad]
    if num_foreign := sum(id(param) not in reduced for param in trained):
        raise problem(
            "silence",
            found=f"{num_foreign} of the wrapper's {len(trained)} trainable parameters are not the optimizer's",
            needed="the gradients of all trainable parameters must be averaged",
            cure="silence only a wrapper whose trainable parameters are all this optimizer's",
        )
    if model.static_graph:
        raise problem(
            "DistributedDataParallel",
            found="silenced with static_graph=True",
            needed="DDP's reduction must be optional",
            cure="leave static_graph out: it only tunes DDP's reduction",
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
    """Passes `require_backward_grad_sync` on to the optimizer, and clears it while DDP's forward runs.

    So DDP prepares no reduction for the next backward, and neither reads nor writes `param.grad` in it.
    """

    def __init__(self, optimizer: DistMuon) -> None:
        self._optimizer = optimizer
        self._last = self._found = True

    def before(self, model: DistributedDataParallel, _args: object) -> None:
        """Pass the flag on only if it has changed, so that `optimizer.no_sync` works for loops that never write it."""
        self._found = bool(model.require_backward_grad_sync)
        if torch.is_grad_enabled() and self._found != self._last:
            self._last = self._found
            self._optimizer.set_requires_gradient_sync(self._found)
        model.require_backward_grad_sync = False

    def after(self, model: DistributedDataParallel, _args: object, _output: object) -> None:
        """Restore the flags. DDP sends module buffers in the forward after a forward whose gradients are reduced."""
        model.require_backward_grad_sync = self._found
        if torch.is_grad_enabled():
            model.require_forward_param_sync = self._found

    def repeat(self) -> None:
        """Pass the flag on again after a block of `no_sync`, if the backward of a forward without sync is to come."""
        if not self._last:
            self._optimizer.set_requires_gradient_sync(False)
