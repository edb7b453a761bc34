"""What the loops of this folder share: data, the oracle of a routed model, the comparison.

A loop runs on two ranks and knows its rank's data alone. Beside it stands the same training in one process, where
`tests/reference.py` steps on the mean of both ranks' gradients. `pull` in a loss keeps rounding small enough to
compare, see `tests/standing.py`; everything else in a loop is as it is in scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distmuon
from tests.reference import Gradients, Reference
from tests.training import Weights, assert_equals_reference, digest

RANKS = 2
LR, DECAY = 0.02, 0.1
EXACT: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "ns_dtype": torch.float32, "bucket_mb": 0.004}
Rules = dict[str, str]


def noise(*shape: int, seed: Sequence[int]) -> Tensor:
    """Normal numbers, the same for the same `seed`, such as (step, rank, micro-batch)."""
    return torch.randn(*shape, generator=generator(seed))


def generator(seed: Sequence[int]) -> torch.Generator:
    return torch.Generator().manual_seed(sum((number + 1) * 1009**place for place, number in enumerate(seed)))


def rules_of(model: nn.Module, routes: Sequence[distmuon.Route] | str | None = None) -> Rules:
    """{fqn: rule}, as the model is routed: what is right there is the routing's own test."""
    return {spec.fqn: spec.rule for spec, _ in distmuon.route(model, routes)}


def pull(model: nn.Module, rules: Rules) -> Tensor:
    """A sum whose gradient is 1 on every AdamW element, and of full rank on every Muon matrix and on equal parts of it.

    `model`: as it was routed, no wrapper. What is frozen at the moment is left out.
    """
    total = torch.zeros(())
    for fqn, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if rules[fqn] == "adamw":
            total = total + param.sum()
            continue
        matrix = param.flatten(1)
        m, n = matrix.shape
        total = total + (matrix * ((torch.arange(m)[:, None] - torch.arange(n)) % min(m, n) == 0)).sum()
    return total


def oracle(model: nn.Module, routes: Sequence[distmuon.Route] | str | None = None, **options: Any) -> Reference:
    """The plain reference of `model` under the numbers of `EXACT`, with the rules, splits and options of its routes."""
    routed = distmuon.route(model, routes)
    splits = {spec.fqn: ([matrix.rows for matrix in spec.matrices], 0) for spec, _ in routed if len(spec.matrices) > 1}
    made = Reference(model, rules_of(model, routes), **{"lr": LR, "weight_decay": DECAY, "splits": splits, **options})
    made.own = {spec.fqn: dict(spec.options) for spec, _ in routed if spec.options}  # type: ignore[arg-type]
    return made


def mean_over_ranks(reference: Reference, loss: Callable[[nn.Module, int], Tensor]) -> Gradients:
    """The mean of the ranks' gradients of `loss(model, rank)`, which is all that a rank's backwards add up to."""
    return reference.mean_gradients(loss, [[rank] for rank in range(RANKS)])


def set_lr(reference: Reference, lr: float) -> None:
    reference.lr = reference.adamw_lr = lr


@torch.no_grad()
def write(reference: Reference, change: Callable[[str, Tensor], Tensor]) -> None:
    """Give each weight the value `change(fqn, weight)`, as a loop does that writes parameters between steps."""
    for fqn, weight in reference.weights.items():
        weight.copy_(change(fqn, weight))
        reference.params[fqn].copy_(weight)


def snapshot(model: nn.Module) -> Weights:
    """Copies of the trainable parameters, read as any script reads them."""
    return {fqn: param.detach().clone() for fqn, param in model.named_parameters() if param.requires_grad}


def made(model: Any, group: dist.ProcessGroup | None, **options: Any) -> distmuon.DistMuon:
    return distmuon.DistMuon(model, process_group=group, **{**EXACT, **options})


def ways(model: nn.Module, group: dist.ProcessGroup, way: str, **options: Any) -> tuple[nn.Module, distmuon.DistMuon]:
    """(what to call, optimizer); "external": the model in DDP, which averages; "reduce": without DDP."""
    if way == "external":
        called = DistributedDataParallel(model, process_group=group)
        return called, made(called, group, grad_reduction="external", **options)
    return model, made(model, group, **options)


def check(ranks: Sequence[Weights], wanted: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
    """All ranks hold the same bits, and those are the reference's weights as docs/design.md, section 1, promises."""
    assert len({digest(weights) for weights in ranks}) == 1, "the ranks have gone apart"
    assert_equals_reference(ranks[0], dict(wanted), start)
