"""The first values of parameters and module buffers: ranks compare their form, then rank 0 sends its values.

This module decides which tensors travel, and in which form; it knows no bucket and no rule. A tensor that is not plain
memory travels as the plain tensors it is made of: a sparse tensor as indices and values, a wrapper subclass (quantised
weights) as the tensors that its `__tensor_flatten__` names. Other tensors, and tensors on the meta device or cut over
ranks, keep each rank's values and are named once in the log.
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
    """A tensor of the module. `text` must be equal on all ranks; `parts` are sent (None: the tensor is skipped)."""

    name: str
    text: str
    parts: tuple[Tensor, ...] | None


def parts_of(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """{name: plain tensor} for the tensors that hold the values of `tensor`, which may be itself.

    None if no plain tensors hold its values, or if their memory cannot be written as a whole.
    """
    if tensor.is_meta:
        return None
    if memory.is_plain(tensor):
        return {name: tensor} if memory.written_once(tensor) is not None else None
    inner: dict[str, Tensor] = {}
    if type(tensor).__module__.startswith("torch.distributed"):  # a DTensor, of which each rank has a part
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
    """(the plain tensors that hold the values of `named`, the names of tensors without such)."""
    found: dict[str, Tensor] = {}
    skipped: list[str] = []
    for name, tensor in named:
        parts = parts_of(name, tensor)
        if parts is None:
            skipped.append(name)
        else:
            found.update(parts)
    return found, skipped


def log_skipped(skipped: Sequence[str], done: str) -> None:
    """Warn that the tensors `skipped` are not `done`."""
    if skipped:
        why = "each rank must hold all their values, in plain memory or in tensors that __tensor_flatten__ names"
        _LOG.warning("not %s: %s; %s", done, ", ".join(skipped), why)


def held(named_params: Named, model: nn.Module | None, *, buffers: bool) -> list[Holding]:
    """The tensors that rank 0 sends: parameters of `model` (None: `named_params`), and with `buffers` its buffers."""
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
    """Describe the form of a tensor, which must be equal for equal bytes to have the same meaning."""
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
    """Raise the same `ValueError` on all ranks, naming the first difference, unless all forms are equal. Blocking.

    A collective over tensors of different lengths aborts the process on gloo, and elsewhere writes past the shorter.
    """
    stage = "comparison of the tensors to send"
    local = {holding.name: holding.text for holding in holdings}
    digest = hashlib.sha256(repr(local).encode()).hexdigest()
    if len(set(group.gather_objects(digest, stage=stage))) == 1:
        return
    texts_by_rank = group.gather_objects(local, stage=stage)
    for rank, texts in enumerate(texts_by_rank):
        for name in {**texts_by_rank[0], **texts}:
            first = texts_by_rank[0].get(name, "nothing of this name")
            text = texts.get(name, "nothing of this name")
            if text != first:
                raise problem(
                    name,
                    found=f"rank {rank} holds {text}, rank 0 {first}",
                    needed="all ranks must hold tensors of the same form before rank 0's values are sent",
                    cure="make the same model on all ranks, and let no rank alone change it before the first forward "
                    "in training; with broadcast_buffers=False each rank keeps its buffers",
                )
    raise problem(
        "model",
        found="ranks hold the same tensors in another order",
        needed="all ranks must register them in the same order",
        cure="make the same model on all ranks",
    )


def send(holdings: Sequence[Holding], group: DataParallelGroup, via: torch.device) -> None:
    """Send rank 0's values to all ranks, in place, after `agree_on`. Blocking.

    `via`: the device of the trained parameters, which the group serves; other tensors may be elsewhere.
    """
    if group.dp_size == 1:
        return
    if group.dp_rank == 0:
        log_skipped([holding.name for holding in holdings if holding.parts is None], "sent from rank 0 to the others")
    for holding in holdings:
        for part in holding.parts or ():
            group.broadcast(part.data, via)  # hidden from autograd: a backward may be running


def not_finite(fqns: Sequence[str], params: Sequence[Tensor]) -> list[str]:
    """The names of `params` that hold NaN or inf. Waits for the device once."""
    if not params:
        return []
    largest = torch.stack([torch.linalg.vector_norm(p.detach(), ord=float("inf")) for p in params])
    return [fqn for fqn, finite in zip(fqns, torch.isfinite(largest).tolist()) if not finite]


def check_finite(broken: Sequence[str], where: str = "") -> None:
    """Raise if there are `broken` weights: every gradient would be NaN, and every step would be skipped."""
    if broken:
        raise problem(
            ", ".join(broken[:5]),
            found=f"{len(broken)} parameters hold NaN or inf{where} before the first step",
            needed="finite values are needed to start with",
            cure="initialize the model, or load its weights, before training",
        )


def agree_on_values(fqns: Sequence[str], params: Sequence[nn.Parameter], group: DataParallelGroup) -> None:
    """Raise on all ranks, naming the first difference, unless all ranks hold the same values. Blocking; called once.

    It serves a start in the middle of a step, after a forward has used each rank's values.
    """
    held = [p.detach() for p in params]  # on a GPU float64 is in registers only, and the host waits once
    found = [torch.stack([p.sum(dtype=torch.float64), torch.linalg.vector_norm(p, dtype=torch.float64)]) for p in held]
    local_sums: list[list[float]] = torch.stack(found).tolist() if found else []
    sums_by_rank = group.gather_objects(local_sums, stage="comparison of the first values")
    for rank, sums in enumerate(sums_by_rank):
        check_finite([fqn for fqn, pair in zip(fqns, sums) if not isfinite(pair[1])], f" on rank {rank}")
    for number, fqn in enumerate(fqns):
        for rank, sums in enumerate(sums_by_rank):
            if sums[number] != sums_by_rank[0][number]:
                raise problem(
                    fqn,
                    found=f"rank {rank} starts from other values than rank 0, and a forward has used them already",
                    needed="all ranks must start from the same values",
                    cure="pass the model itself and call it once before anything else (an ordinary forward with "
                    "gradients takes rank 0's values), or seed all ranks equally",
                )


def agree_on_reduced(grads: Sequence[Tensor], group: DataParallelGroup) -> None:
    """Raise on all ranks unless their gradients are equal, as `grad_reduction="external"` promises.

    Compares the sums of squares. Blocking; called once, at the first step.
    """
    total = float(
        sum((torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads), torch.zeros(()))
    )
    totals = group.gather_objects(total, stage="comparison of the first gradients")
    if max(totals) - min(totals) > 1e-5 * max(map(abs, totals)):
        raise problem(
            'grad_reduction="external"',
            found=f"the ranks' gradients differ (squared norms from {min(totals):.6g} to {max(totals):.6g})",
            needed="gradients must arrive averaged over the ranks",
            cure='wrap the model in DDP, or let distmuon reduce: grad_reduction="reduce_scatter"',
        )
