"""What the distributed tests share: how a step is taken, what the oracle is told, and the one comparison of weights.

`train` and its neighbours run inside pool workers; `reference` and `errors` run in the test's own process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from distmuon.options import with_fields
from tests.reference import Reference
from tests.standing import (
    BUCKET_MB,
    SPLITS,
    STACKS,
    Batch,
    Standing,
    logical_matrices,
    loss_fn,
    make_batch,
    make_batches,
    routes,
    rules,
)

Weights = dict[str, Tensor]
EXACT: dict[str, Any] = {"lr": 0.02, "bucket_mb": BUCKET_MB, "ns_dtype": torch.float32}
REL_WEIGHTS, REL_UPDATE = 1e-6, 1e-5  # the promise of docs/design.md, section 1


def policies(**options: Any) -> dict[str, Any]:
    """`options` of tests as `plan` and the trainers take them: those of the two policies sorted into `Sharding` and
    `Precision` (dtypes under names that say so, for `momentum` is a hyperparameter, too)."""
    names = {f.name for f in fields(distmuon.Sharding)} | {f.metadata["argument"] for f in fields(distmuon.Precision)}
    given = {name: value for name, value in options.items() if name in names and value is not None}
    sharding, precision = with_fields(distmuon.Sharding(), distmuon.Precision(), given)
    others = {name: value for name, value in options.items() if name not in names}
    return {**others, "sharding": sharding, "precision": precision}


def make(group: dist.ProcessGroup | None, model: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    """(model, optimizer); options over those of the exact comparison."""
    model = Standing() if model is None else model
    given = {"routes": routes(), **EXACT, **options}
    return model, distmuon.DistMuon(model, process_group=group, **given)


def backward(model: nn.Module, optimizer: Any, micro_batches: Sequence[Batch]) -> None:
    """Gradients of the mean loss over the micro-batches; only the last one reduces."""
    for batch in micro_batches[:-1]:
        with optimizer.no_sync():
            (loss_fn(model, batch) / len(micro_batches)).backward()
    (loss_fn(model, micro_batches[-1]) / len(micro_batches)).backward()


def train(
    group: dist.ProcessGroup | None, model: nn.Module, optimizer: Any, steps: Sequence[int], num_micro: int = 1
) -> None:
    """The standing model's usual loop on this rank's data."""
    rank = 0 if group is None else dist.get_rank(group)
    for step in steps:
        backward(model, optimizer, [make_batch(step, rank, micro) for micro in range(num_micro)])
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module, optimizer: Any) -> Weights:
    """Copies of all parameters once nothing is in flight."""
    optimizer.synchronize()
    return {fqn.removeprefix("module."): param.detach().clone() for fqn, param in model.named_parameters()}


def state_tensors(optimizer: Any) -> dict[str, Tensor]:
    """The whole optimizer state as {"fqn.key": tensor}. Collective."""
    full = optimizer.full_state_dict()
    names = {
        number: fqn for g in full["param_groups"] for number, fqn in zip(g["params"], g["param_names"], strict=True)
    }
    return {f"{names[number]}.{key}": value for number, state in full["state"].items() for key, value in state.items()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Equal exactly if names, shapes and bits are."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def reference(model: nn.Module | None = None, **options: Any) -> Reference:
    """The oracle for the standing model with the exact comparison's options."""
    model = Standing() if model is None else model
    given = {"lr": EXACT["lr"], "splits": SPLITS, "stacks": STACKS, **options}
    return Reference(model, rules(model), **given)


def reference_weights(dp_size: int, steps: Sequence[int], num_micro: int = 1, **options: Any) -> Weights:
    """What the standing model's weights must be after `steps`."""
    oracle = reference(**options)
    for step in steps:
        oracle.step(loss_fn, make_batches(step, dp_size, num_micro))
    return oracle.weights


def errors(got: Weights, wanted: Weights, start: Mapping[str, Tensor]) -> tuple[tuple[float, str], tuple[float, str]]:
    """(worst ||W - W_ref|| / ||W_ref||, its fqn), (worst ||W - W_ref|| / ||W_ref - W_0||, its fqn)."""
    of_weights, of_updates = [], []
    for fqn, weight in wanted.items():
        difference = float((got[fqn].double() - weight.double()).norm())
        size, moved = float(weight.double().norm()), float((weight.double() - start[fqn].double()).norm())
        of_weights.append((difference / size if difference else 0.0, fqn))
        of_updates.append(((difference / moved if moved else math.inf) if difference else 0.0, fqn))
    return max(of_weights), max(of_updates)


def assert_equals_reference(
    got: Weights, wanted: Weights, start: Mapping[str, Tensor] | None = None, scale: float = 1.0
) -> tuple[float, float]:
    """The one comparison: both bounds of the promise, times `scale`; returns the two figures."""
    start = Standing().state_dict() if start is None else start
    of_weights, of_updates = errors(got, wanted, start)
    assert of_weights[0] <= scale * REL_WEIGHTS, f"relative to the weights: {of_weights}"
    assert of_updates[0] <= scale * REL_UPDATE, f"relative to the update: {of_updates}"
    return of_weights[0], of_updates[0]


def hand_gradients(model: nn.Module, step: int, rank: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Gradients that no forward made and no weight influences, well conditioned as those of the standing model."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    found = {}
    for fqn, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if param.requires_grad:
            pull = torch.zeros_like(noise)
            is_matrix = param.ndim > 1 and "embed" not in fqn
            for piece in logical_matrices(fqn, pull) if is_matrix else [pull]:
                (piece.diagonal() if is_matrix else piece).add_(6.0)
            found[fqn] = (noise + pull).to(dtype or param.dtype)
    return found


def mean_hand_gradients(model: nn.Module, step: int, dp_size: int) -> dict[str, Tensor]:
    """What `dp_size` ranks that got `hand_gradients` must agree on, in float32."""
    by_rank = [hand_gradients(model, step, rank) for rank in range(dp_size)]
    return {fqn: torch.stack([grads[fqn].float() for grads in by_rank]).sum(0) / dp_size for fqn in by_rank[0]}
