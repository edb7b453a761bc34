"""The standing model: small, real, and awkward on purpose (docs/design.md, "Tests").

What is awkward: odd sizes, a (1, n) and an (n, 1) matrix, a matrix larger than two shards of its bucket, an embedding
tied to the head, a frozen weight, an (E, m, n) stack of experts, a fused QKV weight of uneven parts, two kinds of
convolution, a 0-dimensional parameter.
What is not: no gradient is exactly zero or of lower rank than its matrix for a structural reason. Norms start with
random scales (a plain LayerNorm makes every row of its output sum to zero) and have a way around them (their gradients
sum to zero as well), gates are sigmoids (softmax gradients sum to zero), no activation dies, there is no key bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

WIDTH, VOCABULARY, EXPERTS, HEAD = 40, 211, 3, 10
PULL = 1.0
BUCKET_MB = 0.026  # an eighth of the model: several buckets, and matrices larger than a shard

SPLITS = {"attention.qkv.weight": ([WIDTH, HEAD, HEAD], 0)}  # four query heads share one key and one value head
STACKS = ("experts_up", "experts_down")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. `image` None: the image branch is not run and its parameters get no gradient."""

    tokens: Tensor
    targets: Tensor
    values: Tensor
    image: Tensor | None


def snake(x: Tensor) -> Tensor:
    """x + sin(x)**2: smooth, far from linear, and no unit is ever dead."""
    return x + torch.sin(x).square()


class Attention(nn.Module):
    """Four query heads over one shared key and value head, from one fused weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * HEAD, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([WIDTH, HEAD, HEAD], dim=-1)
        q = q.unflatten(-1, (-1, HEAD)).transpose(1, 2)
        k, v = (t.unsqueeze(1).expand_as(q) for t in (k, v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        whole: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return whole


class Standing(nn.Module):
    """Tokens, an image and a value to regress in; one loss out (`loss_fn`)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.picture = nn.Conv2d(2, 13, 3)
        self.picture_out = nn.Linear(13, WIDTH)
        self.norm_in = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.convolution = nn.Conv1d(WIDTH, 37, 3, padding=1)
        self.widen = nn.Linear(37, 91)
        self.narrow = nn.Linear(91, WIDTH, bias=False)
        self.norm_mlp = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 171)
        self.down = nn.Linear(171, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts_up = nn.Parameter(torch.empty(EXPERTS, 24, WIDTH))
        self.experts_down = nn.Parameter(torch.empty(EXPERTS, WIDTH, 24))
        self.norm_out = nn.LayerNorm(WIDTH)
        self.tower = nn.Linear(WIDTH, 63)
        self.square = nn.Linear(63, 63)
        self.gauge = nn.Linear(63, 1)
        self.spread = nn.Linear(1, 29, bias=False)
        self.temperature = nn.Parameter(torch.tensor(1.3))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        for fqn, param in self.named_parameters():
            if param.ndim == 1:
                nn.init.normal_(param, 1.0 if "norm" in fqn and "weight" in fqn else 0.0, 0.3)
            elif param.ndim > 1:
                fan_in = param.shape[-1] if fqn in STACKS else param[0].numel()
                nn.init.normal_(param, std=0.15 if "embed" in fqn else 1.2 * fan_in**-0.5)

    def forward(self, tokens: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(tokens)
        x = x + self.frozen(x)
        if image is not None:
            patches = snake(self.picture(image.to(x.dtype))).flatten(2).mT  # one for each token
            x = x + self.picture_out(patches)
        x = self.norm_in(x)
        x = x + self.attention(x)
        local = snake(self.convolution(x.mT).mT)
        x = x + self.narrow(snake(self.widen(local)))
        x = x + self.down(snake(self.up(self.norm_mlp(x))))
        gates = torch.sigmoid(self.router(x)).unsqueeze(-1)
        hidden = snake(torch.einsum("bsd,emd->bsem", x, self.experts_up))
        x = x + (gates * torch.einsum("bsem,edm->bsed", hidden, self.experts_down)).sum(-2)
        x = self.norm_out(x)
        gauge = self.gauge(snake(self.square(snake(self.tower(x)))))
        return self.head(x) * self.temperature, gauge.squeeze(-1), self.spread(gauge)


def logical_matrices(fqn: str, param: Tensor) -> list[Tensor]:
    """The matrices that Newton-Schulz sees in a Muon parameter, as views."""
    slices = list(param) if fqn in STACKS else [param.flatten(1)]
    sizes, dim = SPLITS.get(fqn, ([slices[0].shape[0]], 0))
    return [part for piece in slices for part in piece.split(sizes, dim)]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the micro-batch, and a pull on each matrix's diagonal and on every other weight whose branch is run.

    The pull keeps rounding small enough to compare. Newton-Schulz magnifies it up to 485 times (3.4445**5) in the
    directions of small singular values, and AdamW divides by gradients that may be close to zero; without the pull two
    orders of one sum end as far apart after five steps as the tolerance of the parity tests.
    """
    logits, gauge, spread = model(batch.tokens, batch.image)
    regression = (gauge.float() - batch.values).square().mean()
    harmonics = (torch.sin(spread.float()) - batch.values.unsqueeze(-1)).square().mean()
    pull = torch.zeros(())
    for fqn, param in model.named_parameters():
        if param.requires_grad and (batch.image is not None or "picture" not in fqn):
            is_matrix = param.ndim > 1 and "embed" not in fqn
            pieces = logical_matrices(fqn.removeprefix("module."), param) if is_matrix else [param]
            pull = pull + sum((piece.diagonal() if is_matrix else piece).float().sum() for piece in pieces)
    likelihood = cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())
    loss: Tensor = likelihood + regression + harmonics + PULL * pull
    return loss


def make_batch(*seed: int, image: bool = True) -> Batch:
    """Random data that is the same for the same numbers, such as (step, rank, micro-batch)."""
    generator = torch.Generator().manual_seed(sum((s + 1) * 1009**i for i, s in enumerate(seed)))
    tokens = torch.randint(VOCABULARY, (6, 16), generator=generator)
    targets = torch.randint(VOCABULARY, (6, 16), generator=generator)
    values = torch.randn(6, 16, generator=generator)
    pixels = torch.randn(6, 2, 6, 6, generator=generator)
    return Batch(tokens, targets, values, pixels if image else None)


def make_batches(step: int, dp_size: int, num_micro: int = 1) -> list[list[Batch]]:
    """`[rank][micro]` of one step."""
    return [[make_batch(step, rank, micro) for micro in range(num_micro)] for rank in range(dp_size)]


def rules(model: nn.Module) -> dict[str, str]:
    """What default routing and `routes()` must come to, decided by hand: {fqn: rule} of the trainable parameters."""
    vectors = {fqn for fqn, param in model.named_parameters() if param.ndim < 2}
    adamw = vectors | {"embed.weight"}
    return {fqn: "adamw" if fqn in adamw else "muon" for fqn, p in model.named_parameters() if p.requires_grad}


def num_logical_matrices(model: Standing) -> int:
    """How many matrices Newton-Schulz sees in one step."""
    params = dict(model.named_parameters())
    return sum(len(logical_matrices(fqn, params[fqn])) for fqn, rule in rules(model).items() if rule == "muon")


def routes() -> tuple[Any, ...]:
    """What this model must declare: the fused weight, the stacks of raw parameters, and what would be left to AdamW
    as too small, a vector or an input, though it is here for Muon to meet awkward shapes."""
    import distmuon

    sizes, dim = SPLITS["attention.qkv.weight"]
    return (
        distmuon.Route("attention.qkv.weight", "muon", split=sizes, split_dim=dim),
        distmuon.Route("experts_*", "muon"),
        *(distmuon.Route(f"{name}.weight", "muon") for name in ("picture", "router", "gauge", "spread")),
    )
