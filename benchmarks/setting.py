"""What every row of `benchmarks.step` shares: the model, its batches and gradients, the rule's hyperparameters.

The rule: torch.optim.Muon's moving average with Nesterov, five steps of Keller Jordan's quintic in bfloat16, the scale
0.2*sqrt(max(m, n)) and decay by the plain lr for hidden matrices; AdamW with the same lr and decay for the rest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.config import ModelConfig
from launch.models import build_model, next_token_loss


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes and hyperparameters of one run. `batch`: windows of `seq_len` tokens a rank and step."""

    d_model: int = 512
    layers: int = 4
    vocabulary: int = 1024
    batch: int = 2
    seq_len: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    @property
    def adamw(self) -> dict[str, Any]:
        """Keyword arguments of torch.optim.AdamW; its fused kernel, as distmuon uses it."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay, "fused": True}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Given(torch.autograd.Function):
    """A node whose backward hands over a gradient that is there already. `chain` only orders the nodes."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, param: Tensor, slot: list[Tensor]) -> Tensor:
        ctx.slot = slot
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.slot.pop(), None


class Trainee(nn.Module):
    """The model, and a second forward whose backward computes nothing: it hands over given gradients, last layer first.

    So every system gets gradients by its own path (autograd hooks, DDP's reducer, an engine's backward) with no
    compute in front of it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, given: dict[str, Tensor] | None = None) -> Tensor:
        if given is None:
            return next_token_loss(self.model, tokens)
        chain = torch.zeros((), device=tokens.device, requires_grad=True)
        for fqn, param in self.named_parameters():
            chain = _Given.apply(chain, param, [given.pop(fqn)])  # type: ignore[no-untyped-call]
        return chain


def make_trainee(setting: Setting, device: torch.device) -> Trainee:
    """A GPT-3-style decoder (transformers' OPT: separate q, k, v; learned positions; tied head), always the same."""
    sizes = {
        "hidden_size": setting.d_model,
        "word_embed_proj_dim": setting.d_model,
        "ffn_dim": 4 * setting.d_model,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": max(1, setting.d_model // 64),
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
    }
    torch.manual_seed(0)
    model = build_model(ModelConfig(arch="opt", config=sizes, seq_len=setting.seq_len), setting.vocabulary)
    return Trainee(model).to(device)


def rules(trainee: nn.Module, all_adamw: bool = False) -> dict[str, str]:
    """{fqn: rule}: every matrix but the two embeddings is Muon's."""
    return {
        fqn: "adamw" if all_adamw or param.ndim != 2 or "embed" in fqn else "muon"
        for fqn, param in trainee.named_parameters()
    }


def split(trainee: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for AdamW), in registration order."""
    params, of = dict(trainee.named_parameters()), rules(trainee)
    muon = [params[fqn] for fqn, rule in of.items() if rule == "muon"]
    return muon, [params[fqn] for fqn, rule in of.items() if rule == "adamw"]


def shape_groups(setting: Setting, matrices: list[nn.Parameter], own_scale: str, scaled_decay: bool) -> Iterator[Any]:
    """One param group a shape, with the lr and decay that turn a system's own scale into the common rule.

    `own_scale`: "aspect" for sqrt(max(1, m/n)), "rms" for 0.2*sqrt(max(m, n)). `scaled_decay`: the system multiplies
    its decay by its scale as well.
    """
    for shape in dict.fromkeys(tuple(param.shape) for param in matrices):
        m, n = shape
        wanted = 0.2 * math.sqrt(max(m, n))
        own = wanted if own_scale == "rms" else math.sqrt(max(1.0, m / n))
        lr = setting.lr * wanted / own
        decay = setting.weight_decay * setting.lr / (lr * own if scaled_decay else lr)
        yield {"params": [p for p in matrices if tuple(p.shape) == shape], "lr": lr, "weight_decay": decay}


def make_batch(setting: Setting, step: int, rank: int, device: torch.device) -> Tensor:
    """(batch, seq_len + 1) random tokens, the same for the same numbers."""
    generator = torch.Generator().manual_seed(1009 * step + rank)
    shape = (setting.batch, setting.seq_len + 1)
    return torch.randint(setting.vocabulary, shape, generator=generator).to(device)


def make_gradients(trainee: nn.Module, rank: int) -> dict[str, Tensor]:
    """Seeded noise in the shape of every parameter; another on every rank."""
    device = next(trainee.parameters()).device
    generator = torch.Generator(device).manual_seed(1 + rank)
    return {
        fqn: torch.randn(p.shape, generator=generator, device=device, dtype=p.dtype).mul_(1e-2)
        for fqn, p in trainee.named_parameters()
    }


def oracle_weights(
    trainee: Trainee, setting: Setting, steps: int, *, all_adamw: bool, ns_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights after `steps` of tests/reference.py: one process, whole matrices, mean gradient of all ranks' batches."""
    from tests.reference import Reference

    oracle = Reference(
        trainee,
        rules(trainee, all_adamw),
        ns_dtype=ns_dtype,
        lr=setting.lr,
        weight_decay=setting.weight_decay,
        momentum=setting.momentum,
        adamw_betas=setting.betas,
        adamw_eps=setting.eps,
    )
    device = next(trainee.parameters()).device
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for step in range(steps):
        batches = [[make_batch(setting, step, rank, device)] for rank in range(ranks)]
        oracle.step(lambda model, tokens: model(tokens), batches)
    return oracle.weights


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, float]:
    """Frobenius norms over all parameters: ||W - W_ref|| relative to ||W_ref|| and to the update ||W_ref - W_0||."""

    def norm(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
        return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))

    error = norm((got[fqn], wanted[fqn]) for fqn in wanted)
    size = norm((wanted[fqn], torch.zeros(())) for fqn in wanted)
    moved = norm((wanted[fqn], start[fqn]) for fqn in wanted)
    return {"weights": error / size, "update": error / moved}


def copied(trainee: Trainee) -> Trainee:
    """A fresh copy for one row."""
    return copy.deepcopy(trainee)
