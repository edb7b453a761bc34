"""The first part of docs/coming_from.md: each block makes an optimizer that updates as the one in its comment does.

The rules of other projects are written here as plain loops over tensors, with Newton-Schulz in float32; torch's own
optimizers are used as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distmuon

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text()
STEPS = 3
Update = Callable[[str, Tensor, Tensor, int], None]


class Model(nn.Module):
    """A square, a wide and a tall hidden matrix, beside parameters of AdamW's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.blocks = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 60), nn.Linear(60, 24)])
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, 40)


def blocks(heading: str) -> list[str]:
    """The Python blocks under a heading of the page."""
    (section,) = re.findall(rf"^### {re.escape(heading)}$(.*?)^##", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def made_by(block: str, model: nn.Module, **precision: Any) -> distmuon.DistMuon:
    """The optimizer that the block makes; `precision` is added to its call."""
    library = SimpleNamespace(**{**vars(distmuon), "DistMuon": partial(distmuon.DistMuon, **precision)})
    names: dict[str, Any] = {"distmuon": library, "model": model}
    exec(block, names)
    assert isinstance(names["optimizer"], distmuon.DistMuon)
    return names["optimizer"]


def gradients(model: nn.Module) -> Iterator[None]:
    """The same gradients for every copy of the model, step by step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        yield


@torch.no_grad()
def distance(model: nn.Module, other: nn.Module, start: nn.Module) -> float:
    """The largest difference of a parameter, relative to how far it has moved."""
    rows = zip(model.parameters(), other.parameters(), start.parameters())
    return max(float((a - b).norm() / (b - c).norm()) for a, b, c in rows)


def copies() -> tuple[Model, Model, Model]:
    models = [Model() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return models[0], models[1], models[2]


def is_hidden(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith("weight")


def polar(matrix: Tensor) -> Tensor:
    """Five quintic steps with Jordan's triple, in float32."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found = wide / wide.norm()
    for _ in range(5):
        gram = found @ found.T
        found = 3.4445 * found + (-4.7750 * gram + 2.0315 * gram @ gram) @ found
    return found.T if matrix.shape[0] > matrix.shape[1] else found


def keller_jordan(lr: float, decay: float, adam_lr: float, adam_decay: float) -> Update:
    """The rule of KellerJordan/Muon's MuonWithAuxAdam, which DeepSpeed's Muon has too."""
    averages: dict[str, list[Tensor]] = {}

    def update(name: str, weight: Tensor, grad: Tensor, step: int) -> None:
        zeros = [torch.zeros_like(weight), torch.zeros_like(weight)]
        first, second = averages.setdefault(name, zeros)
        if is_hidden(name):
            first.mul_(0.95).add_(grad, alpha=0.05)
            change = polar(0.05 * grad + 0.95 * first) * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            weight.mul_(1 - lr * decay).sub_(lr * change)
            return
        first.mul_(0.9).add_(grad, alpha=0.1)
        second.mul_(0.95).add_(grad * grad, alpha=0.05)
        quotient = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-10)
        weight.mul_(1 - adam_lr * adam_decay).sub_(adam_lr * quotient)

    return update


def moonlight(lr: float, decay: float) -> Update:
    """The rule of Moonlight's example: momentum as a sum, AdamW's scale."""
    sums: dict[str, Tensor] = {}
    adam = keller_jordan(lr, decay, lr, decay)

    def update(name: str, weight: Tensor, grad: Tensor, step: int) -> None:
        if not is_hidden(name):
            adam(name, weight, grad, step)
            return
        total = sums.setdefault(name, torch.zeros_like(weight)).mul_(0.95).add_(grad)
        weight.mul_(1 - lr * decay).sub_(lr * 0.2 * max(weight.shape) ** 0.5 * polar(grad + 0.95 * total))

    return update


def follow(update: Update, model: nn.Module) -> None:
    for step, _ in enumerate(gradients(model), start=1):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                assert weight.grad is not None
                update(name, weight, weight.grad.clone(), step)


def train(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for _ in gradients(model):
        optimizer.step()


@pytest.mark.parametrize(
    ("heading", "rule"),
    [
        ("KellerJordan's Muon", keller_jordan(0.02, 0.01, 3e-4, 0.0)),
        ("Moonlight", moonlight(1e-3, 0.1)),
        ("DeepSpeed's Muon", keller_jordan(0.02, 0.01, 3e-4, 0.01)),
    ],
)
def test_the_block_has_the_rule_of_the_other_project(heading: str, rule: Update) -> None:
    model, other, start = copies()
    (block,) = blocks(heading)
    train(made_by(block, model, ns_dtype=torch.float32), model)
    follow(rule, other)
    assert distance(model, other, start) < 1e-4


def test_the_block_of_torchs_muon() -> None:
    """torch iterates in bfloat16, and so does distmuon by default, in other products: hence the tolerance."""
    (block,) = blocks("torch.optim.Muon")
    for scale, tolerance in (("original", 3e-2), ("match_rms_adamw", 3e-2)):
        model, other, start = copies()
        train(made_by(block.replace('"original"', f'"{scale}"'), model), model)
        hidden = [parameter for name, parameter in other.named_parameters() if is_hidden(name)]
        rest = [parameter for name, parameter in other.named_parameters() if not is_hidden(name)]
        theirs = torch.optim.Muon(hidden, lr=1e-3, adjust_lr_fn=scale)
        adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        for _ in gradients(other):
            theirs.step()
            adamw.step()
        assert distance(model, other, start) < tolerance


def test_the_blocks_of_adamw() -> None:
    """The part that stays with AdamW, and the baseline, are torch's AdamW; the decay of vectors can be switched off."""
    plain, undecayed = blocks("AdamW")
    for block, decay in (
        (plain, 0.1),
        (undecayed, 0.0),
        ('optimizer = distmuon.DistMuon(model, lr=4e-4, routes="adamw")', 0.1),
    ):
        model, other, start = copies()
        train(made_by(block, model), model)
        groups = [
            {"params": [p for p in other.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in other.parameters() if p.ndim < 2], "weight_decay": decay},
        ]
        train(torch.optim.AdamW(groups, lr=4e-4, betas=(0.9, 0.95)), other)
        if 'routes="adamw"' not in block:  # the hidden matrices are Muon's
            for name, parameter in (*model.named_parameters(), *other.named_parameters()):
                if is_hidden(name):
                    parameter.data.copy_(dict(start.named_parameters())[name].data + 1)
        assert distance(model, other, start) < 1e-5


def test_the_block_of_nanogpt_decays_matrices_alone() -> None:
    (block,) = blocks("nanoGPT")
    model = Model()
    for group in made_by(block, model).param_groups:
        for name in group["param_names"]:
            assert group["weight_decay"] == (0.1 if dict(model.named_parameters())[name].ndim >= 2 else 0.0)
            assert group["lr"] == 6e-4


def test_the_table_of_rates() -> None:
    """0.02 of the original scale, and what weight decay is multiplied by, for n inputs."""
    rows = [
        line.strip("|\n ").split(" | ")
        for line in PAGE.splitlines()
        if re.match(r"\| (inputs n|0\.02|weight decay is)", line)
    ]
    sizes, rates, factors = ([float(cell.replace(",", "")) for cell in row[1:]] for row in rows)
    for n, rate, factor in zip(sizes, rates, factors):
        for m in (n / 2, n, 4 * n):
            scale = 0.2 * max(m, n) ** 0.5 / max(1.0, m / n) ** 0.5
            assert rate == pytest.approx(0.02 / scale, rel=5e-3) and factor == pytest.approx(scale, rel=5e-3)
