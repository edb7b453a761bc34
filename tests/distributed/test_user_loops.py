"""What ordinary loops do around `backward` and `step`, and what they must find there.

Each test tells a loop that once trained on stale weights, clipped nothing, averaged the wrong model or stood still.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import distmuon
from distmuon.step import engine
from tests.distributed.test_in_flight import slow_peer
from tests.training import digest, state_tensors, weights

OPTIONS = {"lr": 0.05, "ns_dtype": torch.float32, "bucket_mb": 0.002}


class Net(nn.Module):
    """Three layers, a branch that a forward may leave out, and a method that reads a parameter of the root first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.up, self.mid, self.down = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 12)
        self.branch = nn.Linear(24, 24)

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        h = torch.tanh(self.up(x * self.scale.exp()))
        h = torch.tanh(self.mid(h)) + (self.branch(h) if branch else 0.0)
        return self.down(h)

    def embed(self, x: Tensor) -> Tensor:
        return self(x)


def _loss(model: nn.Module, step: int, rank: int, **options: Any) -> Tensor:
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(100 * step + rank))
    return model(x, **options).square().mean()


def _made(group: dist.ProcessGroup | None, **options: Any) -> tuple[Net, Any]:
    model = Net()
    return model, distmuon.DistMuon(model, process_group=group, **{**OPTIONS, **options})


def _step(model: nn.Module, optimizer: Any, step: int, rank: int) -> None:
    _loss(model, step, rank).backward()
    optimizer.step()
    optimizer.zero_grad()


# --------------------------------------------------------------------------------- 1: parameters are whole after step


def _clamp(model: nn.Module) -> None:
    for param in model.parameters():
        param.data.clamp_(-0.05, 0.05)


def _lookahead(slow: list[Tensor], model: nn.Module) -> None:
    for kept, param in zip(slow, model.parameters(), strict=True):
        kept.lerp_(param.detach(), 0.5)
        param.data.copy_(kept)


def _after_step(group: dist.ProcessGroup, act: str, slow: bool) -> str:
    """The digest of what a loop made of the weights that it found right after each step, peers late or not."""
    model, optimizer = _made(group)
    _step(model, optimizer, 0, dist.get_rank(group))
    kept = [param.detach().clone() for param in model.parameters()]
    average = AveragedModel(model, avg_fn=lambda mean, new, _count: torch.lerp(mean, new, 0.5))
    with slow_peer(group, 0.05 if slow else 0.0):
        for step in range(1, 4):
            _step(model, optimizer, step, dist.get_rank(group))
            if act == "average":
                average.update_parameters(model)
            elif act == "clamp":
                _clamp(model)
            elif act == "lookahead":
                _lookahead(kept, model)
            elif act == "copy":
                average.module = copy.deepcopy(model)
            elif act == "read":
                kept = [param.detach().clone() for param in model.parameters()]
            elif act == "functional":
                params = {name: param.detach() for name, param in model.named_parameters()}
                kept = [torch.func.functional_call(model, params, torch.ones(2, 12)).detach()]
    seen = {f"kept.{number}": value for number, value in enumerate(kept)}
    return digest({**seen, **dict(average.module.named_parameters()), **weights(model, optimizer)})


@pytest.mark.parametrize("act", ["average", "clamp", "lookahead", "copy", "read", "functional"])
def test_what_a_loop_reads_and_writes_right_after_step_is_the_step(spawn, act: str) -> None:
    """An average was 180 % off and differed by rank, a clamp was lost for what was still travelling."""
    prompt, late = (spawn(_after_step, 2, act=act, slow=slow) for slow in (False, True))
    assert len({*prompt, *late}) == 1


# ---------------------------------------------------------- 2: one process and external gradients are plain torch.optim


def _adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)


def _ours(model: nn.Module) -> Any:
    return distmuon.DistMuon(model, lr=0.05, routes="adamw")


def _clipped(model: Net, optimizer: Any) -> None:
    for step in range(4):
        (100 * _loss(model, step, 0)).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        optimizer.step()
        optimizer.zero_grad()


def _clipped_by_value(model: Net, optimizer: Any) -> None:
    for step in range(4):
        (100 * _loss(model, step, 0)).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        model.zero_grad()


def _several_backwards(model: Net, optimizer: Any) -> None:
    for step in range(4):
        for part in range(3):
            _loss(model, 10 * step + part, 0, branch=part == 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def _sharpness_aware(model: Net, optimizer: Any) -> None:
    for step in range(4):
        _loss(model, step, 0).backward()
        moved = [0.05 * param.grad / param.grad.norm() for param in model.parameters()]
        with torch.no_grad():
            for param, way in zip(model.parameters(), moved, strict=True):
                param.add_(way)
        model.zero_grad()
        _loss(model, step, 0).backward()
        with torch.no_grad():
            for param, way in zip(model.parameters(), moved, strict=True):
                param.sub_(way)
        optimizer.step()
        optimizer.zero_grad()


def _zeroed_by_the_module_at_the_start(model: Net, optimizer: Any) -> None:
    for step in range(4):
        model.zero_grad()
        _loss(model, step, 0).backward()
        _loss(model, step + 50, 0).backward()
        optimizer.step()
        _loss(model, step + 90, 0).backward()  # somebody else's, dropped by the next zero_grad


def _without_zero_grad(model: Net, optimizer: Any) -> None:
    for step in range(4):
        _loss(model, step, 0).backward()
        optimizer.step()


def _written_after_the_norm(model: Net, optimizer: Any) -> None:
    for step in range(4):
        _loss(model, step, 0).backward()
        if hasattr(optimizer, "reduce_gradients"):
            optimizer.reduce_gradients()
        for param in model.parameters():
            param.grad.mul_(0.5).add_(1e-3)
        optimizer.step()
        optimizer.zero_grad()


LOOPS = [
    _clipped,
    _clipped_by_value,
    _several_backwards,
    _sharpness_aware,
    _zeroed_by_the_module_at_the_start,
    _without_zero_grad,
    _written_after_the_norm,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__.strip("_"))
def test_in_one_process_any_loop_of_torch_optim_trains_alike(loop: Callable[[Net, Any], None]) -> None:
    """torch's clip returned 0 and clipped nothing, a second backward was refused, the module's zero_grad was lost."""
    ends = []
    for make in (_adamw, _ours):
        model = Net()
        loop(model, make(model))
        ends.append(torch.cat([param.detach().reshape(-1) for param in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-6), (ends[0] - ends[1]).abs().max()


def test_our_clip_scales_the_gradients_that_the_user_sees() -> None:
    model, optimizer = _made(None)
    (100 * _loss(model, 0, 0)).backward()
    before = torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])
    assert torch.allclose(optimizer.clip_grad_norm_(0.5), before)
    after = torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])
    assert torch.allclose(after, torch.tensor(0.5))
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == pytest.approx(float(before), rel=1e-5)


# ------------------------------------------------------------------- 3: a gradient in the reduction says where it is


USES: dict[str, Callable[[nn.Module], Any]] = {
    "clip_grad_norm_": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "clip_grad_norm_ foreach": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True),
    "clip_grad_value_": lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 1.0),
    "get_total_norm": lambda model: torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]),
    "norm": lambda model: model.up.weight.grad.norm(),
    "arithmetic": lambda model: 2.0 * model.up.weight.grad + 1.0,
    "in place": lambda model: model.up.weight.grad.mul_(0.5),
    "copy": lambda model: model.up.weight.grad.detach().clone(),
    "data": lambda model: model.up.weight.grad.data,
    "element": lambda model: model.up.weight.grad[0, 0].item(),
    "numpy": lambda model: model.up.weight.grad.numpy(),
    "isfinite": lambda model: torch.isfinite(model.up.weight.grad).all(),
    "histogram": lambda model: torch.histc(model.up.weight.grad),
    "all_reduce": lambda model: dist.all_reduce(model.up.weight.grad),
    "another optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1).step(),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1).step(),
    "zero_grad(set_to_none=False)": lambda model: model.zero_grad(set_to_none=False),
}


def _uses(group: dist.ProcessGroup) -> dict[str, str]:
    found = {}
    model, optimizer = _made(group)
    for step, (name, use) in enumerate(USES.items()):
        _loss(model, step, dist.get_rank(group)).backward()
        try:
            use(model)
            found[name] = "nothing raised"
        except ValueError as error:
            found[name] = str(error)
        except RuntimeError as error:
            found[name] = f"RuntimeError: {error}"
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_any_use_of_a_gradient_that_is_in_the_reduction_raises_with_the_cure(spawn) -> None:
    """torch's clip returned 0 and clipped nothing; logged norms were 0."""
    for found in spawn(_uses, 2):
        for name, said in found.items():
            assert "in the reduction over the ranks" in said and "optimizer.clip_grad_norm_" in said, (name, said)


def _known(group: dist.ProcessGroup) -> tuple[bool, list[bool], bool]:
    model, optimizer = _made(group)
    _loss(model, 0, dist.get_rank(group)).backward()
    grad = model.up.weight.grad
    facts = (grad.shape, grad.dtype, grad.device, grad.numel(), grad.is_sparse, grad.dim())
    known = facts == ((24, 12), torch.float32, torch.device("cpu"), 288, False, 2) and "up.weight" in repr(grad)
    model.zero_grad()
    gone = [param.grad is None for param in model.parameters()]
    optimizer.step()  # nothing is left to step with
    before = digest(weights(model, optimizer))
    _loss(model, 1, dist.get_rank(group)).backward()
    optimizer.zero_grad()
    _step(model, optimizer, 2, dist.get_rank(group))
    return known, gone, digest(weights(model, optimizer)) != before and all(p.grad is None for p in model.parameters())


def test_its_shape_may_be_asked_for_and_it_may_be_dropped(spawn) -> None:
    for known, gone, after in spawn(_known, 2):
        assert known and all(gone) and after


def _dropped(group: dist.ProcessGroup, way: str) -> tuple[str, str, list[str]]:
    """Two steps; in the second the branch's gradients are not wanted, said in torch.optim's ways."""
    model, optimizer = _made(group)
    rank = dist.get_rank(group)
    _step(model, optimizer, 0, rank)
    if way == "never made":
        for param in model.branch.parameters():
            param.requires_grad_(False)
        h = _loss(model, 1, rank)
        h.backward()
        for param in model.branch.parameters():
            param.requires_grad_(True)
    else:
        _loss(model, 1, rank).backward()
        for param in model.branch.parameters():
            param.grad = None
    optimizer.step()
    optimizer.zero_grad()
    skipped = [key for key, value in state_tensors(optimizer).items() if key.endswith("step") and int(value) == 1]
    return digest(weights(model, optimizer)), str(optimizer.metrics()["grad_norm"]), skipped


def test_a_gradient_set_to_none_after_backward_is_none(spawn) -> None:
    """It was in the reduction, and was used."""
    for never, none in zip(*(spawn(_dropped, 2, way=way) for way in ("never made", "set to None")), strict=True):
        assert never[0] == none[0] and never[2] == none[2] and "branch.bias.step" in never[2]
        assert float(never[1]) == pytest.approx(float(none[1]), rel=1e-6)


def _alternating(group: dist.ProcessGroup, way: str) -> str:
    """A loop that drops gradients through the module at the start, after a backward that was for somebody else."""
    model, optimizer = _made(group)
    rank = dist.get_rank(group)
    for step in range(3):
        if way == "foreign":
            model.zero_grad()
        _loss(model, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        if way == "foreign":
            _loss(model, 70 + step, rank).backward()  # a generator's loss through this model
    return digest(weights(model, optimizer))


def test_a_modules_zero_grad_reaches_what_is_in_the_reduction(spawn) -> None:
    assert spawn(_alternating, 2, way="plain") == spawn(_alternating, 2, way="foreign")


def _accumulated(group: dist.ProcessGroup, way: str) -> str:
    warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph")
    model, optimizer = _made(group)
    rank = dist.get_rank(group)
    for step in range(2):
        with optimizer.no_sync():
            if way == "dropped before":
                _loss(model, 80 + step, rank).backward()
                model.zero_grad()
            (0.5 * _loss(model, step, rank)).backward(create_graph=way == "with a graph")
        (0.5 * _loss(model, 40 + step, rank)).backward(create_graph=way == "with a graph")
        optimizer.step()
        optimizer.zero_grad()
    return digest(weights(model, optimizer))


@pytest.mark.parametrize("way", ["dropped before", "with a graph"])
def test_micro_batches_add_up_whatever_stands_in_grad(spawn, way: str) -> None:
    plain, other = (spawn(_accumulated, 2, way=each) for each in ("plain", way))
    assert plain == other


# ------------------------------------------------- 4: collectives of the user's, and ranks that had no backward


def _user_collective(group: dist.ProcessGroup, overlap: Any) -> tuple[list[float], str]:
    """Ranks use other branches, and average their loss between backward and step, on the optimizer's own group."""
    model, optimizer = _made(group, overlap=overlap)
    means, rank = [], dist.get_rank(group)
    for step in range(4):
        loss = _loss(model, step, rank, branch=(step + rank) % 2 == 0)
        loss.backward()
        shown = loss.detach().clone().view(1)
        dist.all_reduce(shown, group=group)
        rows = torch.full((optimizer.layout.dp_size, 8), float(rank))
        there = torch.empty_like(rows)
        dist.all_to_all_single(there, rows, group=group)
        assert torch.equal(there[:, 0], torch.arange(optimizer.layout.dp_size, dtype=torch.float32))
        means.append(float(shown))
        optimizer.step()
        optimizer.zero_grad()
    return means, digest(weights(model, optimizer))


@pytest.mark.parametrize("overlap", [True, "forward"])
def test_a_collective_of_the_users_between_backward_and_step_meets_its_own_kind(spawn, overlap: Any) -> None:
    """Ranks had started different numbers of reductions: the loss was averaged with a gradient, or all stood still."""
    found = spawn(_user_collective, 3, timeout=60, overlap=overlap)
    wanted = spawn(_user_collective, 3, timeout=60, overlap=False)
    assert all(rank == wanted[0] for rank in [*found, *wanted])


def _reentrant(group: dist.ProcessGroup, way: str) -> list[Any]:
    """All but the head inside two checkpoints; nothing outside tells the outer backward of gradients."""
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
    torch.manual_seed(0)

    def recomputed(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        found: Tensor = checkpoint(part, x, use_reentrant=True)
        return found

    parts = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]
    model = nn.Sequential(*parts)

    def both(x: Tensor) -> Tensor:
        return recomputed(nn.Sequential(*parts[1:3]), parts[0](x))

    optimizer = distmuon.DistMuon(model, process_group=group, **OPTIONS, routes=[distmuon.Route("*weight", "muon")])
    started = []
    for step in range(3):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step + 10 * dist.get_rank(group)))
        x.requires_grad_()
        out = model(x) if way == "plain" else parts[3](recomputed(both, x))
        out.square().mean().backward()
        started.append(optimizer._engine.source._next if optimizer._engine else -1)
        optimizer.step()
        optimizer.zero_grad()
    return [started, digest(weights(model, optimizer))]


def test_the_end_of_a_backward_inside_a_backward_is_not_the_end(spawn) -> None:
    """A reentrant checkpoint ends a backward of its own before the other layers have had theirs."""
    plain, nested = (spawn(_reentrant, 2, way=way) for way in ("plain", "nested"))
    assert plain == nested and plain[0][0][-1] > 1


ACTS = ["state_dict", "consolidate", "save", "load", "load_state_dict", "verify", "zero_grad", "step", "clip"]


def _without_backward(group: dist.ProcessGroup, act: str, lack: str, folder: str) -> list[Any]:
    """One rank has no backward, or none that reduces; then all do the same, and two more steps."""
    model, optimizer = _made(group, max_grad_norm=1.0)
    rank = dist.get_rank(group)
    _step(model, optimizer, 0, rank)
    saved = optimizer.state_dict()
    distmuon.save_checkpoint(f"{folder}/first", model, optimizer)
    if rank != 1:
        _loss(model, 1, rank).backward()
    elif lack == "no_sync":
        with optimizer.no_sync():
            _loss(model, 1, rank).backward()
    done: dict[str, Callable[[], Any]] = {
        "state_dict": optimizer.state_dict,
        "consolidate": optimizer.consolidate_state_dict,
        "save": lambda: distmuon.save_checkpoint(f"{folder}/second", model, optimizer),
        "load": lambda: distmuon.load_checkpoint(f"{folder}/first", model, optimizer),
        "load_state_dict": lambda: optimizer.load_state_dict(saved),
        "verify": lambda: distmuon.verify_parameters(model, optimizer),
        "zero_grad": optimizer.zero_grad,
        "step": optimizer.step,
        "clip": lambda: optimizer.clip_grad_norm_(1.0),
    }
    done[act]()
    if act not in ("zero_grad", "step"):
        optimizer.step()
    optimizer.zero_grad()
    for step in (2, 3):
        _step(model, optimizer, step, rank)
    return [digest(weights(model, optimizer)), digest(state_tensors(optimizer))]


@pytest.mark.parametrize("lack", ["no batch", "no_sync"])
@pytest.mark.parametrize("act", ACTS)
def test_a_rank_without_a_backward_does_not_stand_still(spawn, tmp_path, act: str, lack: str) -> None:
    """18 of these deadlocked: whether reductions were under way was judged by each rank for itself."""
    found = spawn(_without_backward, 3, timeout=40, act=act, lack=lack, folder=str(tmp_path))
    assert len({rank[0] for rank in found}) == len({rank[1] for rank in found}) == 1


def _zero_grad_alone(group: dist.ProcessGroup) -> str:
    model, optimizer = _made(group)
    rank = dist.get_rank(group)
    _step(model, optimizer, 0, rank)
    said = ""
    if rank == 0:
        with optimizer.no_sync():
            _loss(model, 7, rank).backward()  # a picture of the gradient, on one rank
        model.zero_grad()
        with optimizer.no_sync():
            _loss(model, 7, rank).backward()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "LATE_S", 1.0)
            try:
                optimizer.zero_grad()
            except ValueError as error:
                said = str(error)
        model.zero_grad()
    _step(model, optimizer, 1, rank)
    return said or digest(weights(model, optimizer))


def test_zero_grad_on_one_rank_alone_says_what_is_local(spawn) -> None:
    alone, other = spawn(_zero_grad_alone, 2)
    assert "rank 1 did not call it" in alone and "model.zero_grad()" in alone
    assert "zero_grad" not in other


# --------------------------------------------------------------------------- 5: who asks, and what must be equal


def _two_optimizers(group: dist.ProcessGroup, swapped: str) -> str:
    """Two models of equal shapes; rank 1 uses them in another order."""
    pairs = [_made(group) for _ in range(2)]
    rank = dist.get_rank(group)
    order = pairs[::-1] if swapped == "from the first on" and rank == 1 else pairs
    for step in range(2):
        for model, optimizer in order:
            _step(model, optimizer, step, rank)
    order = pairs[::-1] if rank == 1 else pairs
    if swapped == "step":
        for model, optimizer in order:
            _step(model, optimizer, 2, rank)
    elif swapped == "state_dict":
        for _, optimizer in order:
            optimizer.state_dict()
    return "no error"


@pytest.mark.parametrize(
    ("swapped", "match"),
    [
        ("from the first on", "must build their optimizers"),
        ("step", r"\[0\] asked for optimizer \d+, comparison of the plans; \[1\]"),
        ("state_dict", r"\[0\] asked for optimizer \d+, state_dict; \[1\]"),
    ],
)
def test_optimizers_used_in_another_order_are_told_apart(spawn_raises, swapped: str, match: str) -> None:
    """Two of equal shapes were averaged with each other, without a word."""
    messages = spawn_raises(_two_optimizers, 2, swapped=swapped, match=match, timeout=30)
    assert len(set(messages)) == 1


def _apart(group: dist.ProcessGroup, key: str, on_device: bool) -> list[Any]:
    model, optimizer = _made(group, param_gather="updates")
    rank = dist.get_rank(group)
    said: list[Any] = []
    muon = next(each for each in optimizer.param_groups if each["rule"] == "muon")
    with pytest.MonkeyPatch.context() as patch:
        if on_device:
            patch.setattr(distmuon.step.verdict, "read_on_host", lambda ok: None)
        _step(model, optimizer, 0, rank)
        if rank == 1:
            muon[key] *= 0.999
        before = digest(weights(model, optimizer)), digest(state_tensors(optimizer))
        for step in (1, 2):
            try:
                _step(model, optimizer, step, rank)
                said.append("no error")
            except ValueError as error:
                said.append(str(error))
                break
        if rank == 1:
            muon[key] = round(muon[key] / 0.999, 6)
        kept = before == (digest(weights(model, optimizer)), digest(state_tensors(optimizer)))
        optimizer.zero_grad()
        _step(model, optimizer, 3, rank)
    return [said, kept, digest(weights(model, optimizer))]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("key", ["lr", "weight_decay", "momentum"])
def test_hyperparameters_that_go_apart_stop_the_next_step_on_all_ranks(spawn, key: str, on_device: bool) -> None:
    """Replicas went apart for good. Where the host must not read the verdict, it skips the step and the next raises."""
    found = spawn(_apart, 2, key=key, on_device=on_device)
    assert found[0] == found[1]
    said, kept, _ = found[0]
    assert said[:-1] == ["no error"] * on_device and kept
    assert f".{key} = " in said[-1] and said[-1].startswith("rank 1: found param_groups["), said
