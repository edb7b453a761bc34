"""The oracle is itself held against torch.optim.Muon and torch.optim.AdamW.

torch's Muon always iterates in bfloat16: it calls `grad.bfloat16()` once. Where that call is replaced by a plain copy,
torch's own code runs unchanged in the dtype of the parameter, so that the comparison can be made in float32 and float64
as well as to bfloat16 rounding.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.reference import Reference, newton_schulz

SHAPES = {"tall": (91, 37), "wide": (37, 91), "square": (63, 63), "row": (1, 29), "column": (29, 1)}
STEPS = 6


class _Matrices(nn.Module):
    """One parameter a shape and one vector; `loss` makes their gradients random and different at every step."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.matrices = nn.ParameterDict({k: nn.Parameter(torch.randn(s, dtype=dtype)) for k, s in SHAPES.items()})
        self.vector = nn.Parameter(torch.randn(47, dtype=dtype))


def _loss(model: _Matrices, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for param in model.parameters():
        probe = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        terms.append((torch.tanh(param * 0.3) * probe).sum())
    return torch.stack(terms).sum()


def _rules(model: nn.Module) -> dict[str, str]:
    return {fqn: "muon" if param.ndim == 2 else "adamw" for fqn, param in model.named_parameters()}


def _worst_difference(dtype: torch.dtype, ns_dtype: torch.dtype, nesterov: bool, adjust_lr_fn: str) -> float:
    """Worst ||W - W_torch|| / ||W_torch - W_0|| over parameters after several steps with torch's optimizers."""
    start, theirs = _Matrices(dtype), _Matrices(dtype)
    hyper = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov}
    ours = Reference(
        start, _rules(start), dtype=dtype, ns_dtype=ns_dtype, adamw_lr=3e-3, adamw_weight_decay=0.05, **hyper
    )
    muon = torch.optim.Muon(theirs.matrices.values(), **hyper)
    adamw = torch.optim.AdamW([theirs.vector], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    for step in range(STEPS):
        muon.zero_grad()
        adamw.zero_grad()
        _loss(theirs, step).backward()
        muon.step()
        adamw.step()
        ours.step(_loss, [[step]])
    first, last = start.state_dict(), theirs.state_dict()
    return max(float((ours.weights[fqn] - end).norm() / (end - first[fqn]).norm()) for fqn, end in last.items())


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_reference_equals_torch(monkeypatch, nesterov: bool, adjust_lr_fn: str) -> None:
    assert _worst_difference(torch.float32, torch.bfloat16, nesterov, adjust_lr_fn) < 4e-2  # bf16 rounding, twice
    for dtype, bound in ((torch.float32, 5e-6), (torch.float64, 5e-14)):
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
        assert _worst_difference(dtype, dtype, nesterov, adjust_lr_fn) < bound
        monkeypatch.undo()


def test_newton_schulz_reaches_the_polar_factor_band() -> None:
    for shape in SHAPES.values():
        matrix = torch.randn(shape, dtype=torch.float64)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        keep = s > 0.05 * s.norm()  # five steps lift these into the band; smaller ones are still on their way
        reached = (
            torch.linalg.multi_dot([u.mT, newton_schulz(matrix, 5), v.mT])
            if min(shape) > 1
            else u.mT @ newton_schulz(matrix, 5) @ v.mT
        )
        diagonal = reached.diagonal()[keep]
        assert diagonal.min() > 0.6 and diagonal.max() < 1.3
        assert (reached - torch.diag(reached.diagonal())).norm() < 1e-10


def test_mean_over_ranks_and_micro_batches() -> None:
    model = _Matrices(torch.float64)
    ours = Reference(model, _rules(model), dtype=torch.float64)
    grads = ours.mean_gradients(_loss, [[1, 2], [3, 4], [5, 6]])
    (sum(_loss(model, seed) for seed in range(1, 7)) / 6).backward()
    for fqn, param in model.named_parameters():
        torch.testing.assert_close(grads[fqn], param.grad, rtol=1e-13, atol=1e-13)


def test_fused_and_stacked_weights_are_separate_matrices() -> None:
    """A split weight, an expert stack and a convolution equal the same matrices kept apart (columns: transposed)."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.rows, self.columns = nn.Parameter(torch.randn(11, 6)), nn.Parameter(torch.randn(6, 11))
            self.stack, self.conv = nn.Parameter(torch.randn(3, 5, 6)), nn.Parameter(torch.randn(5, 2, 3))

    class Apart(nn.Module):
        def __init__(self, fused: Fused) -> None:
            super().__init__()
            parts = [*fused.rows.split([7, 4]), *fused.columns.split([7, 4], 1), *fused.stack, fused.conv.flatten(1)]
            self.parts = nn.ParameterList([nn.Parameter(part.detach().clone()) for part in parts])

    fused = Fused()
    apart = Apart(fused)
    splits = {"rows": ([7, 4], 0), "columns": ([7, 4], 1)}
    one = Reference(
        fused, dict.fromkeys(dict(fused.named_parameters()), "muon"), splits=splits, stacks=["stack"], lr=0.1
    )
    many = Reference(apart, dict.fromkeys(dict(apart.named_parameters()), "muon"), lr=0.1)
    for _ in range(2):
        grads = {fqn: torch.randn_like(weight) for fqn, weight in one.weights.items()}
        parts = [
            *grads["rows"].split([7, 4]),
            *grads["columns"].split([7, 4], 1),
            *grads["stack"],
            grads["conv"].flatten(1),
        ]
        one.apply(grads)
        many.apply({f"parts.{i}": part for i, part in enumerate(parts)})
    weights = one.weights
    ends = [
        *weights["rows"].split([7, 4]),
        *weights["columns"].split([7, 4], 1),
        *weights["stack"],
        weights["conv"].flatten(1),
    ]
    for end, part in zip(ends, many.weights.values(), strict=True):
        torch.testing.assert_close(end, part, rtol=1e-6, atol=1e-6)


def test_clip_skip_and_missing_gradients() -> None:
    model = _Matrices(torch.float64)
    free = Reference(model, _rules(model), dtype=torch.float64)
    clipped = Reference(model, _rules(model), dtype=torch.float64, max_norm=0.5)
    grads = free.mean_gradients(_loss, [[1]])
    params = [nn.Parameter(grad.clone()) for grad in grads.values()]
    for param in params:
        param.grad = param.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
    torch.testing.assert_close(clipped.apply(dict(grads)), norm, rtol=1e-12, atol=0)
    free.apply({fqn: param.grad for fqn, param in zip(grads, params, strict=True)})
    before = {fqn: weight.clone() for fqn, weight in free.weights.items()}
    for fqn in before:
        torch.testing.assert_close(clipped.weights[fqn], before[fqn], rtol=1e-12, atol=1e-12)
    free.apply({**grads, "vector": torch.full_like(grads["vector"], torch.inf)})
    assert free.skipped_steps == 1 and all(torch.equal(free.weights[fqn], before[fqn]) for fqn in before)
    assert free.state["vector"]["step"] == 1
    del grads["vector"]
    free.apply(grads)
    assert torch.equal(free.weights["vector"], before["vector"]) and free.state["vector"]["step"] == 1
    assert not torch.equal(free.weights["matrices.tall"], before["matrices.tall"])


def test_numbers_of_a_parameters_own_are_those_of_a_run_with_them_for_all() -> None:
    model = _Matrices(torch.float64)
    common = Reference(model, _rules(model), dtype=torch.float64, lr=0.3, weight_decay=0.2)
    own = Reference(model, _rules(model), dtype=torch.float64)
    own.own = {fqn: {"lr": 0.3, "weight_decay": 0.2} for fqn in ("matrices.tall", "vector")}
    for seed in range(2):
        grads = common.mean_gradients(_loss, [[seed]])
        common.apply(grads)
        own.apply(grads)
    for fqn, weight in common.weights.items():
        assert torch.equal(weight, own.weights[fqn]) == (fqn in own.own), fqn
