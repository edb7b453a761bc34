"""Image classifiers trained as the large image-model scripts do it.

Mixed inputs and soft targets, three ways to clip, a scheduler that is told each update, an average of the model right
after the step, batch statistics averaged at the end of an epoch, parameter groups made of names, checkpoints by rank 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import one_hot, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import distmuon
from tests.integrations.users.common import (
    DECAY,
    LR,
    RANKS,
    Rules,
    check,
    generator,
    made,
    mean_over_ranks,
    noise,
    oracle,
    pull,
    rules_of,
    set_lr,
    snapshot,
    ways,
)
from tests.reference import Reference
from tests.training import REL_WEIGHTS, Weights, digest

CLASSES, SIZE, BATCH = 10, 8, 6
EPOCHS, UPDATES, WARM_UP = 2, 3, 2
NORM, VALUE, FACTOR = 1.0, 0.9, 0.3
EMA = 0.8


class ConvNet(nn.Module):
    """A stem, a block with a way around it, batch normalization after each convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn1(self.stem(x)))
        x = torch.tanh(self.bn2(self.conv2(x)))
        x = x + torch.tanh(self.bn3(self.conv3(x)))
        return self.head(x.mean((2, 3)))


class ViT(nn.Module):
    """One block over four patches; raw parameters for the class token, positions and the scale of a branch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(3, 32, 4, stride=4)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, 32))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 5, 32))
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)
        self.gamma = nn.Parameter(torch.full((32,), 0.5))
        self.head = nn.Linear(32, CLASSES)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.gamma * self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


def mixed_batch(*seed: int) -> tuple[Tensor, Tensor]:
    """Images mixed with their mirror in the batch, and soft targets mixed alike."""
    chance = generator((77, *seed))
    images, labels = noise(BATCH, 3, SIZE, SIZE, seed=seed), torch.randint(CLASSES, (BATCH,), generator=chance)
    share = float(torch.rand((), generator=chance))
    targets = one_hot(labels, CLASSES).float() * 0.9 + 0.1 / CLASSES
    return images.mul(share).add(images.flip(0), alpha=1 - share), share * targets + (1 - share) * targets.flip(0)


def soft_target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


# ---------------------------------------------------------------------------------------------- what such scripts hold


class Scheduler:
    """Cosine with a warm-up, told the number of updates; a group's `lr_scale` is its own."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @staticmethod
    def share(update: int) -> float:
        if update < WARM_UP:
            return (update + 1) / (WARM_UP + 1)
        return 0.55 + 0.45 * math.cos(math.pi * (update - WARM_UP) / (EPOCHS * UPDATES - WARM_UP))

    def step_update(self, update: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.share(update) * group.get("lr_scale", 1.0)


class ModelEma:
    """A copy of the model, whose parameters and buffers follow."""

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).eval()
        for param in self.module.parameters():
            param.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        for mean, new in zip(self.module.state_dict().values(), inner.state_dict().values(), strict=True):
            mean.copy_(EMA * mean + (1 - EMA) * new)


def unitwise_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=tuple(range(1 if x.ndim > 1 else 0, x.ndim)), keepdim=True)


@torch.no_grad()
def adaptive_clip_(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Each unit's gradient is at most `FACTOR` of the unit's own norm."""
    for param, grad in pairs:
        most, norm = unitwise_norm(param).clamp(min=1e-2) * FACTOR, unitwise_norm(grad)
        grad.copy_(torch.where(norm < most, grad, grad * (most / norm.clamp(min=1e-6))))


def dispatch_clip(model: nn.Module, optimizer: Any, mode: str, way: str) -> None:
    if mode == "norm" and way == "reduce":
        optimizer.clip_grad_norm_(NORM)
    elif mode == "norm":
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
    elif mode == "value":
        torch.nn.utils.clip_grad_value_(model.parameters(), VALUE)
    elif mode == "agc":
        adaptive_clip_((param, param.grad) for param in model.parameters() if param.grad is not None)


@torch.no_grad()
def distribute_bn(model: nn.Module, group: dist.ProcessGroup) -> None:
    """The ranks' batch statistics become their mean."""
    for name, buffer in model.named_buffers():
        if "running" in name:
            dist.all_reduce(buffer, group=group)
            buffer.div_(RANKS)


# ------------------------------------------------------------------------------------------------ the convolutional one

CONV_ROUTES = [
    distmuon.Route("bn*", "adamw", options={"weight_decay": 0.0}),
    distmuon.Route("head.bias", "adamw", options={"weight_decay": 0.0}),
]


def _conv(group: dist.ProcessGroup, way: str, mode: str, folder: str, resume: bool = False) -> dict[str, Weights]:
    """This rank's weights, averages and batch statistics after two epochs; `resume`: after the first, from its file."""
    rank, path = dist.get_rank(group), Path(folder, "last.pt")
    model = ConvNet().to(memory_format=torch.channels_last)
    rules = rules_of(model, CONV_ROUTES)
    called, optimizer = ways(model, group, way, routes=CONV_ROUTES)
    first = 0
    if resume:
        saved = torch.load(path)
        first = saved["epoch"] + 1
        model.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
    average = ModelEma(model)
    if resume:
        average.module.load_state_dict(saved["state_dict_ema"])
    scheduler = Scheduler(optimizer)
    for epoch in range(first, EPOCHS):
        called.train()
        for index in range(UPDATES):
            update = epoch * UPDATES + index
            scheduler.step_update(update)
            images, targets = mixed_batch(update, rank)
            loss = soft_target_loss(called(images.to(memory_format=torch.channels_last)), targets)
            optimizer.zero_grad()
            (loss + pull(model, rules)).backward()
            dispatch_clip(called, optimizer, mode, way)
            optimizer.step()
            average.update(called)
        distribute_bn(model, group)
        if epoch == 0 and not resume:
            optimizer.consolidate_state_dict()
            if rank == 0:
                torch.save(
                    {
                        "epoch": epoch,
                        "state_dict": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "state_dict_ema": average.module.state_dict(),
                    },
                    path,
                )
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    means = {name: tensor.clone() for name, tensor in average.module.state_dict().items() if "tracked" not in name}
    return {"weights": snapshot(model), "means": means, "statistics": statistics}


def _conv_and_resumed(group: dist.ProcessGroup, way: str, mode: str, folder: str) -> tuple[dict[str, Weights], bool]:
    whole = _conv(group, way, mode, folder)
    dist.barrier(group)
    resumed = _conv(group, way, mode, folder, resume=True)
    # the average of rank 1 had begun the second epoch with that rank's own batch statistics
    kept = ("weights", "means", "statistics") if dist.get_rank(group) == 0 else ("weights", "statistics")
    return whole, all(digest(whole[key]) == digest(resumed[key]) for key in kept)


def clipped(reference: Reference, grads: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
    """`grads` as `dispatch_clip` leaves them; asserts that some are changed."""
    before = {fqn: grad.clone() for fqn, grad in grads.items()}
    if mode == "norm":
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        grads = {fqn: grad * (NORM / (norm + 1e-6)).clamp(max=1.0) for fqn, grad in grads.items()}
    elif mode == "value":
        grads = {fqn: grad.clamp(-VALUE, VALUE) for fqn, grad in grads.items()}
    elif mode == "agc":
        adaptive_clip_((reference.weights[fqn], grad) for fqn, grad in grads.items())
    assert any(not torch.equal(grads[fqn], before[fqn]) for fqn in grads) == (mode != "none")
    return grads


def _conv_plain(way: str, mode: str) -> tuple[Weights, list[Weights], Weights]:
    """(weights, averages by rank, batch statistics): each rank has its own, DDP gives rank 0's to each forward."""
    reference, rules = oracle(ConvNet(), CONV_ROUTES), rules_of(ConvNet(), CONV_ROUTES)
    model = reference.model
    buffers = [{name: b.clone() for name, b in model.named_buffers()} for _ in range(RANKS)]
    averages = [ModelEma(model) for _ in range(RANKS)]
    for update in range(EPOCHS * UPDATES):
        set_lr(reference, LR * Scheduler.share(update))
        found: list[dict[str, Tensor]] = []
        before = [buffers[0 if way == "external" else rank] for rank in range(RANKS)]

        def loss(
            model: nn.Module, rank: int, update: int = update, before: list[Any] = before, found: list[Any] = found
        ) -> Tensor:
            model.load_state_dict(before[rank], strict=False)
            images, targets = mixed_batch(update, rank)
            value = soft_target_loss(model(images), targets) + pull(model, rules)
            found.append({name: b.clone() for name, b in model.named_buffers()})
            return value

        reference.apply(clipped(reference, mean_over_ranks(reference, loss), mode))
        buffers = found
        for rank, average in enumerate(averages):
            model.load_state_dict(buffers[rank], strict=False)
            average.update(model)
        if update % UPDATES == UPDATES - 1:
            means = {n: (buffers[0][n] + buffers[1][n]) / 2 for n in buffers[0] if "running" in n}
            buffers = [{**own, **means} for own in buffers]
    means = [{n: t for n, t in a.module.state_dict().items() if "tracked" not in n} for a in averages]
    return reference.weights, means, {n: b for n, b in buffers[0].items() if "running" in n}


@pytest.mark.parametrize(
    ("way", "mode"), [("reduce", "norm"), ("external", "norm"), ("external", "value"), ("external", "agc")]
)
def test_a_timm_like_run_is_the_plain_process_and_resumes_bit_for_bit(spawn, tmp_path, way: str, mode: str) -> None:
    """An average taken right after the step was stale, and torch's clips returned 0."""
    found = spawn(_conv_and_resumed, RANKS, way=way, mode=mode, folder=str(tmp_path))
    weights, means, statistics = _conv_plain(way, mode)
    check([whole["weights"] for whole, _ in found], weights, snapshot(ConvNet()))
    for rank, (whole, resumed) in enumerate(found):
        for got, wanted in ((whole["means"], means[rank]), (whole["statistics"], statistics)):
            assert got.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert (got[name] - tensor).norm() <= 10 * REL_WEIGHTS * tensor.norm(), (rank, name)
        assert resumed, f"rank {rank} went on elsewhere"


@pytest.mark.parametrize("mode", ["value", "agc"])
def test_a_clip_that_reads_what_is_in_the_reduction_raises_with_the_way_that_works(
    spawn_raises, tmp_path, mode: str
) -> None:
    """The cure in the message, external gradients, is the test above."""
    spawn_raises(_conv, RANKS, way="reduce", mode=mode, folder=str(tmp_path), match='grad_reduction="external"')


# -------------------------------------------------------------------------------------------------------- the other one

HALVED = 0.5  # the lr_scale of what is not decayed
ACCUMULATE = 2


def param_groups(model: ViT) -> list[dict[str, Any]]:
    """Dicts of named parameters with a rule, as the names and dimensions say."""
    hidden, decayed, spared = [], [], []
    for name, param in model.named_parameters():
        if param.ndim < 2 or name in model.no_weight_decay():
            spared.append((name, param))
        elif name.startswith(("patch_embed", "head")):
            decayed.append((name, param))
        else:
            hidden.append((name, param))
    return [
        {"params": hidden, "rule": "muon", "weight_decay": DECAY},
        {"params": decayed, "rule": "adamw", "weight_decay": DECAY},
        {"params": spared, "rule": "adamw", "weight_decay": 0.0},
    ]


def vit_rules(model: ViT) -> Rules:
    return {name: group["rule"] for group in param_groups(model) for name, _ in group["params"]}


def _vit(group: dist.ProcessGroup, way: str) -> Weights:
    model = ViT()
    rules, rank = vit_rules(model), dist.get_rank(group)
    external = "external" if way == "external" else "reduce_scatter"
    optimizer = made(param_groups(model), group, grad_reduction=external)
    called: Any = DistributedDataParallel(model, process_group=group) if way == "external" else model
    optimizer.param_groups[-1]["lr_scale"] = HALVED
    scheduler = Scheduler(optimizer)
    no_sync: Callable[[], Any] = called.no_sync if hasattr(called, "no_sync") else optimizer.no_sync
    for update in range(EPOCHS * UPDATES):
        scheduler.step_update(update)
        for micro in range(ACCUMULATE):
            images, targets = mixed_batch(update, rank, micro)
            with nullcontext() if micro == ACCUMULATE - 1 else no_sync():
                ((soft_target_loss(called(images), targets) + pull(model, rules)) / ACCUMULATE).backward()
        dispatch_clip(called, optimizer, "norm", way)
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model)


@pytest.mark.parametrize("way", ["reduce", "external"])
def test_groups_of_named_parameters_with_decays_of_their_own(spawn, way: str) -> None:
    """No module is given: nothing but the dicts says what a parameter is."""
    model = ViT()
    rules = vit_rules(model)
    reference = Reference(model, rules, weight_decay=DECAY, max_norm=NORM)
    for update in range(EPOCHS * UPDATES):
        lr = LR * Scheduler.share(update)
        set_lr(reference, lr)
        spared = [name for name, _ in param_groups(model)[-1]["params"]]
        reference.own = {name: {"weight_decay": 0.0, "lr": HALVED * lr} for name in spared}

        def loss(model: nn.Module, seed: tuple[int, ...]) -> Tensor:
            images, targets = mixed_batch(*seed)
            return soft_target_loss(model(images), targets) + pull(model, rules)

        rows = [[(update, rank, micro) for micro in range(ACCUMULATE)] for rank in range(RANKS)]
        reference.step(loss, rows)
    check(spawn(_vit, RANKS, way=way), reference.weights, snapshot(model))
