"""What people put around `step`: sharpness-aware steps, Lookahead, teachers and averages, logs and hooks of gradients.

`tests/distributed/test_user_loops.py` says what a loop finds before and after `step`, one act at a time. Here are the
classes that are passed around, whole, against the plain process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.integrations.users.common import (
    LR,
    RANKS,
    check,
    made,
    mean_over_ranks,
    noise,
    oracle,
    pull,
    rules_of,
    snapshot,
    ways,
    write,
)
from tests.reference import Gradients
from tests.training import Weights, digest

STEPS, WIDTH, ROWS = 5, 20, 6
WAYS = ["reduce", "external"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, WIDTH))


RULES = rules_of(network())


def batch(*seed: int) -> tuple[Tensor, Tensor]:
    return noise(ROWS, WIDTH, seed=(1, *seed)), noise(ROWS, WIDTH, seed=(2, *seed)).tanh()


def loss_of(called: nn.Module, raw: nn.Module, *seed: int) -> Tensor:
    x, y = batch(*seed)
    return (called(x) - y).square().mean() + pull(raw, RULES)


# ------------------------------------------------------------------------------------------------ sharpness-aware steps

RHO = 0.1


def climb(gradients: list[Tensor]) -> list[Tensor]:
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    return [gradient * (RHO / (norm + 1e-12)) for gradient in gradients]


class SAM:
    """The two half steps, around any optimizer. `back`: how the weights of before are put back."""

    def __init__(self, optimizer: Any, back: str = "copy_") -> None:
        self.optimizer, self.back = optimizer, back
        self.params = [param for group in optimizer.param_groups for param in group["params"]]

    @torch.no_grad()
    def first_step(self, gradients: list[Tensor] | None = None) -> None:
        self.before = [param.data.clone() for param in self.params]
        given = [param.grad for param in self.params] if gradients is None else gradients
        for param, way in zip(self.params, climb(given), strict=True):
            param.add_(way)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for param, before in zip(self.params, self.before, strict=True):
            if self.back == "copy_":
                param.data.copy_(before)
            else:
                param.data = before
        self.optimizer.step()
        self.optimizer.zero_grad()


def _sam(group: dist.ProcessGroup, way: str, back: str = "copy_") -> Weights:
    """`way`: "external", where gradients are averaged before both half steps; "local", where each rank climbs along its
    own gradient, which autograd hands out; "reduce", where it is looked for in `param.grad`."""
    model, rank = network(), dist.get_rank(group)
    called, optimizer = ways(model, group, "external" if way == "external" else "reduce")
    sam = SAM(optimizer, back)
    for step in range(STEPS):
        loss = loss_of(called, model, step, rank)
        if way == "local":
            sam.first_step(list(torch.autograd.grad(loss, sam.params)))
        else:
            loss.backward()
            sam.first_step()
        loss_of(called, model, step, rank).backward()
        sam.second_step()
    return snapshot(model)


def _sam_plain(way: str) -> Weights:
    reference = oracle(network())

    def climbed(ranks: list[int], step: int) -> Gradients:
        def loss(model: nn.Module, rank: int) -> Tensor:
            return loss_of(model, model, step, rank)

        rows = [[rank] for rank in ranks]
        first = reference.mean_gradients(loss, rows)
        with torch.no_grad():
            for fqn, move in zip(first, climb(list(first.values())), strict=True):
                reference.params[fqn].add_(move)
        second = reference.mean_gradients(loss, rows)
        write(reference, lambda _, weight: weight.clone())
        return second

    for step in range(STEPS):
        if way == "external":
            reference.apply(climbed(list(range(RANKS)), step))
        else:
            of_ranks = [climbed([rank], step) for rank in range(RANKS)]
            reference.apply({fqn: sum(grads[fqn] for grads in of_ranks) / RANKS for fqn in of_ranks[0]})  # type: ignore[misc]
    return reference.weights


@pytest.mark.parametrize("way", ["external", "local"])
def test_a_sharpness_aware_loop_is_the_plain_process(spawn, way: str) -> None:
    check(spawn(_sam, RANKS, way=way), _sam_plain(way), snapshot(network()))


def test_a_sharpness_aware_loop_that_looks_for_reduced_gradients_raises(spawn_raises) -> None:
    """Four of four gradients were None to it, and it climbed nowhere."""
    spawn_raises(_sam, RANKS, way="reduce", match='in the reduction over the ranks.*grad_reduction="external"')


@pytest.mark.parametrize("way", ["external", "local"])
def test_weights_put_back_as_other_tensors_raise_with_the_way_to_write_them(spawn_raises, way: str) -> None:
    """`param.data = before` is how the best known such class does it; `copy_` is what the test above does."""
    for message in spawn_raises(_sam, RANKS, way=way, back="data", match="its storage changed"):
        assert "param.data.copy_" in message


# ------------------------------------------------------------------------------------------------------------ Lookahead


class Lookahead:
    """Slow weights that every second step go half way to the fast ones, which then begin there."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.count = optimizer, 0
        self.param_groups = optimizer.param_groups
        self.slow = [param.detach().clone() for group in self.param_groups for param in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            fast = [param for group in self.param_groups for param in group["params"]]
            for slow, param in zip(self.slow, fast, strict=True):
                slow.add_(param.data - slow, alpha=0.5)
                param.data.copy_(slow)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def _lookahead(group: dist.ProcessGroup, way: str, closure: bool) -> Weights:
    model, rank = network(), dist.get_rank(group)
    called, inner = ways(model, group, way)
    optimizer = Lookahead(inner)
    for step in range(STEPS):

        def evaluated(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(called, model, step, rank)
            loss.backward()
            return loss

        if closure:
            assert isinstance(optimizer.step(evaluated), Tensor)
        else:
            evaluated()
            optimizer.step()
    return snapshot(model)


def _lookahead_plain() -> Weights:
    reference = oracle(network())
    slow = {fqn: weight.clone() for fqn, weight in reference.weights.items()}
    for step in range(STEPS):

        def loss(model: nn.Module, rank: int, step: int = step) -> Tensor:
            return loss_of(model, model, step, rank)

        reference.apply(mean_over_ranks(reference, loss))
        if step % 2:
            slow = {fqn: weight + 0.5 * (reference.weights[fqn] - weight) for fqn, weight in slow.items()}
            write(reference, lambda fqn, _, slow=slow: slow[fqn])  # type: ignore[misc]
    return reference.weights


@pytest.mark.parametrize(("way", "closure"), [("reduce", False), ("external", False), ("reduce", True)])
def test_lookahead_around_the_optimizer_is_the_plain_process(spawn, way: str, closure: bool) -> None:
    """What it wrote into parameters was lost for those still travelling."""
    check(spawn(_lookahead, RANKS, way=way, closure=closure), _lookahead_plain(), snapshot(network()))


# ------------------------------------------------------------------------------------------------ teachers and averages

KEEP = 0.8


@torch.no_grad()
def teach(teacher: nn.Module, student: nn.Module) -> None:
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, 1 - KEEP)


def lesson(called: nn.Module, raw: nn.Module, teacher: nn.Module, *seed: int) -> Tensor:
    """The student's own loss, and its distance from the teacher on inputs of another view."""
    with torch.no_grad():
        wanted = teacher(batch(*seed)[0] + 0.1 * noise(ROWS, WIDTH, seed=(3, *seed)))
    return loss_of(called, raw, *seed) + (called(batch(*seed)[0]) - wanted).square().mean()


def _taught(group: dist.ProcessGroup, way: str, where: str, swap: str = "") -> dict[str, Weights]:
    """`where` the teacher learns: in the "loop", or in a "hook" of the step, with all-gathers under the next forward.
    `swap`: who evaluates with the average's weights in the model, "all" or "rank 0"."""
    model, rank = network(), dist.get_rank(group)
    options = {"overlap": "forward"} if where == "hook" else {}
    called, optimizer = ways(model, group, way, **options)
    teacher = copy.deepcopy(model).requires_grad_(False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(KEEP), use_buffers=True)
    if where == "hook":
        optimizer.register_step_post_hook(lambda *_: teach(teacher, model))
    for step in range(STEPS):
        lesson(called, model, teacher, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        if where == "hook":
            optimizer.synchronize()
        else:
            teach(teacher, model)
        average.update_parameters(model)
        if swap == "all" or (swap and rank == 0):
            stored = [param.detach().cpu().clone() for param in model.parameters()]
            for param, mean in zip(model.parameters(), average.module.parameters(), strict=True):
                param.data.copy_(mean.data)
            with torch.no_grad():
                assert torch.equal(model(batch(step, 0)[0]), average(batch(step, 0)[0]))
            for param, before in zip(model.parameters(), stored, strict=True):
                param.data.copy_(before.data)
    copied = copy.deepcopy(model)
    return {
        "weights": snapshot(model),
        "copied": snapshot(copied),
        "teacher": {fqn: param.clone() for fqn, param in teacher.named_parameters()},
        "average": {fqn: param.detach().clone() for fqn, param in average.module.named_parameters()},
    }


def _taught_plain() -> dict[str, Weights]:
    reference = oracle(network())
    teacher, means = copy.deepcopy(reference.model), {}
    for step in range(STEPS):

        def loss(model: nn.Module, rank: int, step: int = step) -> Tensor:
            return lesson(model, model, teacher, step, rank)

        reference.apply(mean_over_ranks(reference, loss))
        teach(teacher, reference.model)
        now = {fqn: weight.clone() for fqn, weight in reference.weights.items()}
        means = {fqn: KEEP * means[fqn] + (1 - KEEP) * now[fqn] for fqn in now} if means else now
    weights, taught = reference.weights, {fqn: p.detach() for fqn, p in teacher.named_parameters()}
    return {"weights": weights, "copied": weights, "teacher": taught, "average": means}


@pytest.mark.parametrize(
    ("way", "where", "swap"),
    [
        ("reduce", "loop", ""),
        ("external", "loop", ""),
        ("reduce", "hook", ""),
        ("external", "hook", ""),
        ("reduce", "loop", "all"),
        ("reduce", "loop", "rank 0"),
        ("external", "loop", "all"),
    ],
)
def test_a_teacher_and_an_average_follow_the_weights_of_each_step(spawn, way: str, where: str, swap: str) -> None:
    """They followed weights that were still under way, on each rank others."""
    found, wanted, first = spawn(_taught, RANKS, way=way, where=where, swap=swap), _taught_plain(), snapshot(network())
    for what, weights in wanted.items():
        check([rank[what] for rank in found], weights, first)


# ------------------------------------------------------------------------------------------ logs and hooks of gradients


def _logged(group: dist.ProcessGroup, way: str) -> dict[str, Any]:
    """Norms by the tensor hooks that loggers set, which see this rank's gradient; one hook changes what it sees."""
    model, rank = network(), dist.get_rank(group)
    called, optimizer = ways(model, group, way)
    local: list[dict[str, float]] = []
    totals, after = [], []
    for fqn, param in model.named_parameters():
        param.register_hook(lambda grad, fqn=fqn: local[-1].__setitem__(fqn, float(grad.norm())))
    model[0].weight.register_hook(lambda grad: 0.5 * grad)
    for step in range(STEPS):
        local.append({})
        loss_of(called, model, step, rank).backward()
        if way == "external":
            after.append(float(torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])))
        optimizer.step()
        totals.append(optimizer.metrics()["grad_norm"])
        optimizer.zero_grad()
    return {"weights": snapshot(model), "local": local, "totals": totals, "after": after}


@pytest.mark.parametrize("way", WAYS)
def test_hooks_of_gradients_log_and_change_what_each_rank_has_made(spawn, way: str) -> None:
    found = spawn(_logged, RANKS, way=way)
    reference, local, totals = oracle(network()), [[{}] * STEPS for _ in range(RANKS)], []
    for step in range(STEPS):
        of_ranks = []
        for rank in range(RANKS):
            grads = reference.mean_gradients(lambda model, rank, s=step: loss_of(model, model, s, rank), [[rank]])
            local[rank][step] = {fqn: float(grad.norm()) for fqn, grad in grads.items()}
            of_ranks.append({fqn: grad * (0.5 if fqn == "0.weight" else 1.0) for fqn, grad in grads.items()})
        mean = {fqn: (of_ranks[0][fqn] + of_ranks[1][fqn]) / RANKS for fqn in of_ranks[0]}
        totals.append(float(reference.apply(mean)))
    check([rank["weights"] for rank in found], reference.weights, snapshot(network()))
    for rank, one in enumerate(found):
        assert one["totals"] == pytest.approx(totals, rel=1e-5)
        assert one["after"] == pytest.approx(totals if way == "external" else [], rel=1e-5)
        for logged, wanted in zip(one["local"], local[rank], strict=True):
            assert logged == pytest.approx(wanted, rel=1e-4)


def test_in_one_process_the_classes_are_those_of_torch_optim() -> None:
    """Lookahead and the sharpness-aware steps, with `param.grad` read as it stands, beside torch's AdamW."""

    def run(make: Callable[[nn.Module], Any], wrap: Any) -> str:
        model = network()
        optimizer = wrap(make(model))
        for step in range(STEPS):
            loss_of(model, model, step, 0).backward()
            if wrap is SAM:
                optimizer.first_step()
                loss_of(model, model, step, 0).backward()
                optimizer.second_step()
            else:
                optimizer.step()
                optimizer.zero_grad()
        return digest(snapshot(model))

    def adamw(model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    for wrap in (SAM, Lookahead):
        assert run(adamw, wrap) == run(lambda model: made(model, None, routes="adamw"), wrap)
