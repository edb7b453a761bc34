"""A small GPT trained as the many single-file GPT trainers do it.

Schedule written into the param groups by hand, a flag of DDP's for accumulation, evaluation every few steps, one file
that rank 0 writes with torch.save, and a resume from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import distmuon
from distmuon.integrations.ddp import silence
from tests.integrations.test_compile import fresh_dynamo
from tests.integrations.users.common import (
    DECAY,
    LR,
    RANKS,
    Rules,
    check,
    generator,
    made,
    oracle,
    pull,
    rules_of,
    set_lr,
    snapshot,
)
from tests.training import Weights, digest

VOCABULARY, BLOCK, WIDTH, HEADS, LAYERS = 37, 12, 32, 2, 2
ITERATIONS, WARM_UP, EVERY, ACCUMULATE, CLIP = 6, 2, 3, 2, 1.0
ROUTES = [
    distmuon.Route("*attn.weight", "muon", split=[WIDTH] * 3),
    distmuon.Route("*ln_*", "adamw", options={"weight_decay": 0.0}),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.c_out = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.c_attn(self.ln_1(x)).split(WIDTH, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        x = x + self.c_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.c_out(nn.functional.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """Tokens and targets in, (logits, loss) out; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight
        for fqn, param in self.named_parameters():
            if param.ndim > 1:
                nn.init.normal_(param, std=0.02 if "w" in fqn.split(".")[0] else 1.0 / param.shape[1] ** 0.5)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten())


def get_batch(*seed: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(VOCABULARY, (4, BLOCK + 1), generator=generator(seed))
    return rows[:, :-1], rows[:, 1:]


def get_lr(iteration: int) -> float:
    if iteration < WARM_UP:
        return LR * (iteration + 1) / (WARM_UP + 1)
    done = (iteration - WARM_UP) / (ITERATIONS - WARM_UP)
    return 0.1 * LR + 0.45 * LR * (1.0 + math.cos(math.pi * done))


@torch.no_grad()
def estimate_loss(model: nn.Module) -> float:
    model.eval()
    losses = [float(model(*get_batch(900, number))[1]) for number in range(2)]
    model.train()
    return sum(losses) / len(losses)


def _wrapped(model: Any, optimizer: Any, group: dist.ProcessGroup, way: str) -> Any:
    """The model as the loop calls it."""
    if "compiled" in way:
        model = torch.compile(model, backend="eager")
    if way.startswith("external") or "silenced" in way:
        model = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view="views" in way)
    return silence(model, optimizer) if "silenced" in way else model


def _accumulate(model: Any, optimizer: Any, way: str, iteration: int, rank: int, extra_loss: Callable[[], Any]) -> None:
    """The micro-batches of one step; only the last one reduces."""
    is_ddp = isinstance(model, DistributedDataParallel)
    for micro in range(ACCUMULATE):
        last = micro == ACCUMULATE - 1
        with model.no_sync() if "no_sync" in way and not last else nullcontext():
            if is_ddp and "no_sync" not in way:
                model.require_backward_grad_sync = last
            elif not is_ddp:
                optimizer.set_requires_gradient_sync(last)
            _, loss = model(*get_batch(iteration, rank, micro))
            ((loss + extra_loss()) / ACCUMULATE).backward()


def _train(group: dist.ProcessGroup, way: str, folder: str, until: int, resume: bool = False) -> tuple[Weights, Any]:
    """`way`: who averages, and "compiled" or not. Returns (weights, {iteration: validation loss}) of this rank."""
    rank, path, losses = dist.get_rank(group), Path(folder, "ckpt.pt"), {}
    model: Any = GPT()
    start = 0
    if resume:
        saved = torch.load(path, map_location="cpu")
        model.load_state_dict({key.removeprefix("_orig_mod."): value for key, value in saved["model"].items()})
        start = saved["iter_num"]
    raw, rules = model, rules_of(model, ROUTES)
    external = way.startswith("external")
    optimizer = made(model, group, routes=ROUTES, grad_reduction="external" if external else "reduce_scatter")
    if resume:
        optimizer.load_state_dict(saved["optimizer"])
        saved = None
    model = _wrapped(model, optimizer, group, way)
    is_ddp = isinstance(model, DistributedDataParallel)

    for iteration in range(start, until + 1):
        for param_group in optimizer.param_groups:
            param_group["lr"] = get_lr(iteration)
        if iteration % EVERY == 0 and (not is_ddp or rank == 0):
            losses[iteration] = estimate_loss(model)  # rank 0 alone evaluates what is wrapped, as the scripts do
        if iteration == EVERY and not resume:
            optimizer.consolidate_state_dict()
            if rank == 0:
                inner = model.module if is_ddp else model
                found = {"model": inner.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": iteration}
                torch.save(found, path)
        if iteration == until:
            break
        _accumulate(model, optimizer, way, iteration, rank, lambda: pull(raw, rules))
        if external:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        else:
            optimizer.clip_grad_norm_(CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return snapshot(raw), losses


def _whole_and_resumed(group: dist.ProcessGroup, way: str, folder: str) -> dict[str, Any]:
    if "compiled" in way:
        fresh_dynamo()
    whole, losses = _train(group, way, folder, ITERATIONS)
    dist.barrier(group)
    resumed, again = _train(group, way, folder, ITERATIONS, resume=True)
    return {"weights": whole, "losses": losses, "resumed": digest(resumed) == digest(whole), "again": again}


def _micro_loss(rules: Rules, iteration: int, rank: int, micro: int) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(*get_batch(iteration, rank, micro))[1] + pull(model, rules)


@pytest.fixture(scope="module")
def plain() -> tuple[Weights, dict[int, float]]:
    """One process: each iteration is a step on the mean over all micro-batches of both ranks."""
    reference, rules, losses = oracle(GPT(), ROUTES, max_norm=CLIP), rules_of(GPT(), ROUTES), {}
    for iteration in range(ITERATIONS + 1):
        if iteration % EVERY == 0:
            losses[iteration] = estimate_loss(reference.model)
        if iteration < ITERATIONS:
            set_lr(reference, get_lr(iteration))
            rows = [[_micro_loss(rules, iteration, rank, m) for m in range(ACCUMULATE)] for rank in range(RANKS)]
            assert reference.step(lambda model, of_batch: of_batch(model), rows) > CLIP, "nothing was clipped"
    return reference.weights, losses


slow = pytest.mark.slow
WAYS = [
    "external",
    "external, views",
    "reduce",
    "silenced",
    "silenced, no_sync",
    "silenced, no_sync, views",
    "reduce, compiled",
    pytest.param("external, compiled", marks=slow),
]


@pytest.mark.parametrize("way", WAYS)
def test_a_nanogpt_like_run_is_the_plain_process_and_resumes_bit_for_bit(
    spawn, tmp_path, plain: tuple[Weights, dict[int, float]], way: str
) -> None:
    """Three lines of such a script change where DDP stays ("external"), six without it ("reduce")."""
    found = spawn(_whole_and_resumed, RANKS, timeout=180, way=way, folder=str(tmp_path))
    wanted, losses = plain
    check([rank["weights"] for rank in found], wanted, snapshot(GPT()))
    for rank, one in enumerate(found):
        assert one["resumed"], f"rank {rank} went on elsewhere"
        evaluates = rank == 0 or "reduce" in way
        assert one["losses"] == pytest.approx(losses if evaluates else {}, rel=1e-5)
        assert one["again"] == {at: loss for at, loss in one["losses"].items() if at >= EVERY}


def _alone(group: dist.ProcessGroup, way: str, folder: str) -> str:
    return digest(_train(group, way, folder, 2)[0])


def test_in_one_process_a_silenced_wrapper_leaves_gradients_where_they_are(spawn, tmp_path) -> None:
    """They were dropped when backward ended, and nothing trained."""
    ways = ("reduce", "silenced, no_sync", "silenced, no_sync, views")
    assert len({spawn(_alone, 1, way=way, folder=str(tmp_path))[0] for way in ways}) == 1


def _forgotten(group: dist.ProcessGroup, what: str) -> None:
    """The diff half made: DDP is gone, and one line of its time is left in the loop."""
    model = GPT()
    optimizer = made(model, group, routes=ROUTES)
    for micro in range(ACCUMULATE):
        if what == "the flag":
            model.require_backward_grad_sync = micro == ACCUMULATE - 1
        else:
            optimizer.set_requires_gradient_sync(micro == ACCUMULATE - 1)
        model(*get_batch(0, dist.get_rank(group), micro))[1].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)


@pytest.mark.parametrize(("what", "match"), [("the flag", "optimizer.no_sync"), ("the clip", "optimizer.clip_grad_no")])
def test_a_line_that_was_left_as_it_was_raises_with_the_one_to_write(spawn_raises, what: str, match: str) -> None:
    """The flag on a model that is no DDP is a word in the wind; torch's clip clipped nothing."""
    spawn_raises(_forgotten, RANKS, what=what, match=match)


def test_the_decay_that_norms_are_spared_is_none_of_their_own() -> None:
    optimizer = made(GPT(), None, routes=ROUTES)
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {name for name, decay in decays.items() if decay != DECAY} == {n for n in decays if "ln_" in n}
