"""What the contracts are tried on: small optimizers of either rule and of both, with each hyperparameter in turn.

Parameters are bare tensors under made-up names; each says its rule, so no test hangs on default routing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distmuon

Shapes = tuple[tuple[int, ...], ...]
MATRICES: Shapes = ((10, 5), (4, 12))
MIXED: Shapes = ((10, 5), (10,), (6, 6), (3,))
ANY: Shapes = ((10, 5), (10,), ())
EXACT_LR = 2.0**-7  # the same number in float32 and float64


@dataclass(frozen=True)
class Given:
    """An optimizer to be made: matrices go to Muon and the rest to AdamW, or all to AdamW."""

    shapes: Shapes
    only_adamw: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def params(self, seed: int = 0, **kind: Any) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(seed)
        return [nn.Parameter(torch.randn(shape, generator=generator).to(**kind)) for shape in self.shapes]

    def make(self, params: Sequence[Tensor], **kwargs: Any) -> distmuon.DistMuon:
        return make(params, only_adamw=self.only_adamw, **{**self.kwargs, **kwargs})


def named(params: Sequence[Tensor], first: int = 0) -> list[tuple[str, Tensor]]:
    return [(f"p{first + number}", param) for number, param in enumerate(params)]


def groups(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """One group a rule: matrices to Muon, the rest to AdamW."""
    found: dict[str, list[Any]] = {"muon": [], "adamw": []}
    for name, param in named(params):
        found["muon" if param.ndim > 1 else "adamw"].append((name, param))
    return [{"params": held, "rule": rule} for rule, held in found.items() if held]


def make(params: Sequence[Tensor], *, only_adamw: bool = False, **kwargs: Any) -> distmuon.DistMuon:
    if only_adamw:
        return distmuon.DistMuon(named(params), routes="adamw", **kwargs)
    return distmuon.DistMuon(groups(params), **kwargs)


def gradients(params: Sequence[Tensor], step: int) -> None:
    """Each parameter gets a gradient that depends on `step` and on its place alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], first: int, last: int) -> None:
    """The steps `first` to `last`."""
    for step in range(first, last):
        gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()


def copies(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Bit for bit."""
    assert len(ours) == len(theirs)
    for number, (one, other) in enumerate(zip(ours, theirs)):
        assert torch.equal(one, other), f"parameter {number} differs by {float((one - other).abs().max()):.3g}"


def assert_state_equal(ours: Any, theirs: Any, where: str = "state") -> None:
    """Two state dicts, bit for bit."""
    if isinstance(ours, Tensor):
        assert isinstance(theirs, Tensor) and torch.equal(ours, theirs), where
    elif isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_state_equal(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs)):
            assert_state_equal(one, other, f"{where}[{number}]")
    else:
        assert ours == theirs, where


CORE = {
    "muon": Given(MATRICES),
    "adamw": Given(ANY, only_adamw=True),
    "both": Given(MIXED),
}
_TURNS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "lr": (("muon", "adamw", "both"), {"lr": 0.01}),
    "tensor lr": (("muon", "adamw", "both"), {"lr": torch.tensor(0.001)}),
    "adamw_lr": (("both",), {"lr": 0.01, "adamw_lr": 0.003}),
    "no decay": (("muon", "adamw", "both"), {"weight_decay": 0.0}),
    "decay": (("muon", "adamw", "both"), {"weight_decay": 0.2}),
    "momentum": (("muon", "both"), {"momentum": 0.8}),
    "no momentum": (("muon",), {"momentum": 0.0}),
    "plain momentum": (("muon",), {"nesterov": False}),
    "ns_steps": (("muon",), {"ns_steps": 6}),
    "ns_coefficients": (("muon",), {"ns_coefficients": (3.4, -4.7, 2.0)}),
    "float32 Newton-Schulz": (("muon", "both"), {"precision": distmuon.Precision(newton_schulz=torch.float32)}),
    "scale": (("muon",), {"adjust_lr_fn": "original"}),
    "betas": (("adamw", "both"), {"adamw_betas": (0.8, 0.99)}),
    "eps": (("adamw",), {"adamw_eps": 1e-6}),
    "int8": (("both",), {"precision": distmuon.Precision(momentum=torch.int8)}),
    "one after the other": (("both",), {"sharding": distmuon.Sharding(overlap=False)}),
    "external": (("both",), {"grad_reduction": "external"}),
}
GIVEN = {
    **CORE,
    **{
        f"{rule}, {turn}": Given(CORE[rule].shapes, CORE[rule].only_adamw, kwargs)
        for turn, (rules, kwargs) in _TURNS.items()
        for rule in rules
    },
}
every_rule = pytest.mark.parametrize("given", [pytest.param(each, id=name) for name, each in CORE.items()])
every_input = pytest.mark.parametrize(
    "given",
    [pytest.param(each, id=name, marks=() if name in CORE else pytest.mark.slow) for name, each in GIVEN.items()],
)
