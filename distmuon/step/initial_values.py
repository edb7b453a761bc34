"""What a module holds, as plain memory: all that ranks compare before rank 0's values are sent, and how it is sent.

Decides which tensors travel and as what. A tensor that is no plain memory travels as the plain ones it is made of: a
sparse one as indices and values, a wrapper subclass (quantised weights) as what its `__tensor_flatten__` names. What
offers neither (and what lies on the meta device, or is cut up over ranks already) is left as each rank has it, and is
named once in the log.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distmuon.comm.group import DataParallelGroup
from distmuon.errors import problem
from distmuon.layout import memory

_LOG = logging.getLogger("distmuon")
Named = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Holding:
    """One tensor of the module: its `text` must be the same on all ranks; `parts` are sent, None: it is left."""

    name: str
    text: str
    parts: tuple[Tensor, ...] | None


def parts_of(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """`tensor` as the plain tensors that hold its values, by name (`name` itself where it is plain); None for one that
    offers none, or whose memory cannot be written as a whole."""
    if tensor.is_meta:
        return None
    if memory.is_plain(tensor):
        return {name: tensor} if memory.written_once(tensor) is not None else None
    inner: dict[str, Tensor] = {}
    if type(tensor).__module__.startswith("torch.distributed"):  # a DTensor: each rank has a part of its own
        return None
    if is_traceable_wrapper_subclass(tensor):
        inner = {key: getattr(tensor, key) for key in tensor.__tensor_flatten__()[0]}
    elif tensor.layout == torch.sparse_coo:
        inner = {"indices": tensor._indices(), "values": tensor._values()}
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        inner = {"crow_indices": tensor.crow_indices(), "col_indices": tensor.col_indices(), "values": tensor.values()}
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        inner = {"ccol_indices": tensor.ccol_indices(), "row_indices": tensor.row_indices(), "values": tensor.values()}
    found: dict[str, Tensor] = {}
    for key, part in inner.items():
        parts = parts_of(f"{name}.{key}", part)
        if parts is None:
            return None
        found.update(parts)
    return found or None


def plain(named: Named) -> tuple[dict[str, Tensor], list[str]]:
    """(the plain tensors that make up `named`, the names of those that offer none)."""
    found: dict[str, Tensor] = {}
    left: list[str] = []
    for name, tensor in named:
        parts = parts_of(name, tensor)
        if parts is None:
            left.append(name)
        else:
            found.update(parts)
    return found, left


def log_left(left: Sequence[str], done: str) -> None:
    """Where everybody can see it: the tensors `left` are not `done`."""
    if left:
        why = "their values do not lie in memory of their own on each rank, and they name no tensors that hold them"
        _LOG.warning("not %s: %s; %s", done, ", ".join(left), why)


def held(named_params: Named, model: nn.Module | None, *, buffers: bool) -> list[Holding]:
    """What rank 0 sends: all parameters of `model` (None: `named_params`), and its module buffers if asked for."""
    params = named_params if model is None else model.named_parameters()
    found = [_holding(name, "a parameter", param) for name, param in params]
    if model is not None and buffers:
        found += [_holding(name, "a buffer", buffer) for name, buffer in model.named_buffers()]
    return found


def _holding(name: str, kind: str, tensor: Tensor) -> Holding:
    parts = parts_of(name, tensor)
    sent = [memory.written_once(part) for part in (parts or {}).values()]
    whole = None if parts is None else tuple(part for part in sent if part is not None)
    return Holding(name, f"{kind} {_text(tensor.detach())}", whole)


def _text(tensor: Tensor) -> str:
    """What must be alike for the same bytes to mean the same."""
    parts = parts_of("", tensor)
    if parts is None or not memory.is_plain(tensor):
        inner = [f"{name.removeprefix('.')} {_text(part)}" for name, part in (parts or {}).items()]
        of = f" of {tensor.layout}" if type(tensor) in (Tensor, nn.Parameter) else f" {type(tensor).__name__}"
        if tensor.layout == torch.sparse_coo:
            of += f" with {tensor._nnz()} elements{' (coalesced)' if tensor.is_coalesced() else ''}"
        shape = "" if tensor.is_nested else f" {tuple(tensor.shape)}"
        return f"{shape} {tensor.dtype}{of}, on {tensor.device.type} ({', '.join(inner)})".strip()
    sent = memory.written_once(tensor)
    expanded = "" if sent is None or sent.shape == tensor.shape else f" expanded from {tuple(sent.shape)}"
    return f"{tuple(tensor.shape)}{expanded} {tensor.dtype} on {tensor.device.type}"


def agree_on(holdings: Sequence[Holding], group: DataParallelGroup) -> None:
    """Raise the same `ValueError` on all ranks, naming the first difference, unless all hold the same. Blocking.

    A collective over tensors of two lengths aborts the process on gloo, and writes past the shorter one elsewhere.
    """
    stage = "comparison of the tensors to send"
    mine = {holding.name: holding.text for holding in holdings}
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    if len(set(group.gather_objects(digest, stage=stage))) == 1:
        return
    everyone = group.gather_objects(mine, stage=stage)
    for rank, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            ours, other = (texts.get(name, "nothing of this name") for texts in (everyone[0], theirs))
            if ours != other:
                raise problem(
                    name,
                    found=f"rank {rank} holds {other}, rank 0 {ours}",
                    needed="all ranks must hold tensors of the same form before rank 0's values are sent",
                    cure="make the model alike on all ranks, and let no rank change it alone before the first "
                    "forward in "
                    "training; buffers that may differ stay each rank's own with broadcast_buffers=False",
                )
    raise problem(
        "model",
        found="ranks hold the same tensors in another order",
        needed="all ranks must register them in the same order",
        cure="make the model alike on all ranks",
    )


def send(holdings: Sequence[Holding], group: DataParallelGroup, via: torch.device) -> None:
    """Rank 0's values to all ranks, in place. Blocking; the ranks have agreed on what they hold.

    `via`: the device of what is trained, which the group serves; the rest may lie elsewhere.
    """
    if group.dp_size == 1:
        return
    if group.dp_rank == 0:
        log_left([holding.name for holding in holdings if holding.parts is None], "sent from rank 0 to the others")
    for holding in holdings:
        for part in holding.parts or ():
            group.broadcast(part.data, via)  # not seen by autograd: a backward may be under way


def not_finite(fqns: Sequence[str], params: Sequence[nn.Parameter]) -> list[str]:
    """The names of `params` that hold NaN or inf. Reads the device once."""
    if not params:
        return []
    largest = torch.stack([torch.linalg.vector_norm(p.detach(), ord=float("inf")) for p in params])
    return [fqn for fqn, finite in zip(fqns, torch.isfinite(largest).tolist()) if not finite]


def check_finite(broken: Sequence[str], where: str = "") -> None:
    """Raise if training would start from weights that are `broken`: every gradient would be NaN, every step skipped."""
    if broken:
        raise problem(
            ", ".join(broken[:5]),
            found=f"{len(broken)} parameters hold NaN or inf{where} before the first step",
            needed="finite values are needed to start from",
            cure="initialize the model, or load its weights, before training",
        )


def agree_on_values(fqns: Sequence[str], params: Sequence[nn.Parameter], group: DataParallelGroup) -> None:
    """Raise on all ranks, naming the first difference, unless all hold the same values. Blocking, once.

    For a start in the middle of a step, when rank 0's values can no longer be taken before the forward has used them.
    """
    sums = [[float(p.detach().double().sum()), float(p.detach().double().square().sum())] for p in params]
    everyone = group.gather_objects(sums, stage="comparison of the first values")
    for rank, theirs in enumerate(everyone):
        check_finite([fqn for fqn, of_each in zip(fqns, theirs) if not isfinite(of_each[1])], f" on rank {rank}")
    for number, fqn in enumerate(fqns):
        for rank, theirs in enumerate(everyone):
            if theirs[number] != everyone[0][number]:
                raise problem(
                    fqn,
                    found=f"rank {rank} starts from other values than rank 0, and a forward has used them already",
                    needed="all ranks must start from the same values",
                    cure="pass the model itself and call it once before anything else (an ordinary forward with "
                    "gradients "
                    "takes rank 0's values), or seed all ranks alike",
                )


def agree_on_reduced(grads: Sequence[Tensor], group: DataParallelGroup) -> None:
    """Raise on all ranks unless their gradients are the same: `grad_reduction="external"` promises averaged ones.

    Compares the sums of squares; blocking, once, at the first step.
    """
    total = float(
        sum((torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads), torch.zeros(()))
    )
    totals = group.gather_objects(total, stage="comparison of the first gradients")
    if max(totals) - min(totals) > 1e-5 * max(map(abs, totals)):
        raise problem(
            'grad_reduction="external"',
            found=f"the ranks' gradients differ (squared norms from {min(totals):.6g} to {max(totals):.6g})",
            needed="gradients already averaged over the ranks are needed",
            cure='wrap the model in DDP, or let distmuon reduce: grad_reduction="reduce_scatter"',
        )
