"""Which parameter was first not finite, when a step has been skipped.

A skipped step changes no parameter, so its backward can be repeated: slowly, and only once a run. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import distmuon
from launch.models import next_token_loss
from launch.parallel import reduce_in_backward
from launch.ranks import Ranks

Finding = tuple[int, str]
"""(how early it happens in a step, text)."""


def first_not_finite(model: nn.Module, optimizer: distmuon.DistMuon, batches: Sequence[Tensor], ranks: Ranks) -> str:
    """What was first not finite in the step on `batches`, which has just been skipped, as a text. Collective.

    First a parameter; then the loss; then the gradients, in the order of backward.
    """
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # dropout must go on as if nothing had been repeated
        mine = _not_finite(model, optimizer, batches)
    found = [(*finding, rank) for rank, finding in enumerate(ranks.gather(mine)) if finding is not None]
    if not found:
        return "each gradient by itself is finite; their sum or its norm was not"
    _, text, rank = min(found)
    return f"{text} (rank {rank})"


def _not_finite(model: nn.Module, optimizer: distmuon.DistMuon, batches: Sequence[Tensor]) -> Finding | None:
    for name, param in model.named_parameters():
        if not _is_finite(param.detach()):
            return 0, f"parameter {name} itself is not finite"
    finding: Finding | None = None
    for tokens in batches:
        with _order_of_use(model) as used:
            loss = next_token_loss(model, tokens)
        backward = used[::-1]
        grads = _grads(model, optimizer, loss, backward)
        if finding is not None:
            continue  # under FSDP2 all ranks must take part in all backwards
        for order, (name, grad) in enumerate(zip(backward, grads), start=1):
            if grad is not None and not _is_finite(grad):
                finding = order, f"first the gradient of {name}, of a loss of {loss.item():.6g}"
                break
    optimizer.zero_grad()
    return finding


@contextmanager
def _order_of_use(model: nn.Module) -> Iterator[list[str]]:
    """The parameters in the order in which their modules are called inside; those that no module calls come first."""
    names_of: dict[nn.Module, list[str]] = {}
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        names_of.setdefault(model.get_submodule(name.rpartition(".")[0]), []).append(name)
    called: dict[str, None] = {}
    used: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.update(dict.fromkeys(names_of[module])))
        for module in names_of
    ]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()
        used += [*(name for name in names if name not in called), *called]


def _grads(
    model: nn.Module, optimizer: distmuon.DistMuon, loss: Tensor, names: Sequence[str]
) -> Sequence[Tensor | None]:
    """This rank's gradients of `loss`; under FSDP2 its shard of the mean over ranks, of all losses so far."""
    if isinstance(model, FSDPModule):
        reduce_in_backward(model, optimizer, True)
        loss.backward()
        return [model.get_parameter(name).grad for name in names]
    params = [model.get_parameter(name) for name in names]
    return torch.autograd.grad(loss, params, allow_unused=True)  # nothing reaches the optimizer


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())
