"""Experts on other ranks, in plain tensors: `Route(process_group=)` names the ranks that hold the same ones.

Four ranks train replicas of the dense parameters; the eight experts live on a part of the ranks each. The oracle holds
all of them: dense gradients are means over four ranks, those of an expert over the ranks that hold it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import distmuon
from distmuon.planning.counts import guard_bytes, sent_bytes
from tests.reference import Reference
from tests.standing import snake
from tests.training import Weights, assert_equals_reference, weights

NUM_EXPERTS, WIDTH, HIDDEN, WORDS = 8, 24, 17, 50
STEPS = 4
EXACT: dict[str, Any] = {"lr": 0.02, "bucket_mb": 0.004, "ns_dtype": torch.float32}
# By (step, rank) what a rank does not use; -1: it has no backward. Expert 7 has no gradient in step 1, expert 0 has one
# on one of its two ranks, and ranks 1 and 3 use no expert in step 2, nor has rank 3 a backward.
UNUSED = {(1, 1): {7}, (1, 3): {7}, (1, 0): {0}, (2, 1): set(range(NUM_EXPERTS)), (2, 3): {-1}}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(snake(self.up(x)))
        return out


class Moe(nn.Module):
    """`names` {name here: number of the expert}; each value depends on the number only."""

    def __init__(self, names: dict[str, int]) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.numbers = names
        self.experts = nn.ModuleDict({name: Expert() for name in names})
        self.head = nn.Linear(WIDTH, WORDS)
        with torch.no_grad():
            for fqn, param in self.named_parameters():
                generator = torch.Generator().manual_seed(zlib.crc32(self.global_name(fqn).encode()))
                param.copy_(torch.randn(param.shape, generator=generator) * (0.3 if param.ndim == 1 else WIDTH**-0.5))

    def global_name(self, fqn: str) -> str:
        first, *rest = fqn.split(".")
        return ".".join([first, str(self.numbers[rest[0]]), *rest[1:]]) if first == "experts" else fqn

    def forward(self, tokens: Tensor, used: set[int]) -> Tensor:
        x = self.embed(tokens)
        x = x + snake(self.mix(x))
        for name, number in self.numbers.items():
            if number in used:
                x = x + self.experts[name](x)
        logits: Tensor = self.head(x)
        return logits


def _held(rank: int, rows: int) -> range:
    """The experts of a rank if each expert is on `rows` of the four ranks."""
    count = NUM_EXPERTS * rows // 4
    first = rank % (4 // rows) * count
    return range(first, first + count)


def _loss(model: Moe, step: int, rank: int, used: set[int]) -> Tensor:
    """With a pull on diagonals and vectors, which keeps rounding small enough to compare; see tests/standing.py."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(WORDS, (2, 6, 16), generator=generator)
    loss = cross_entropy(model(tokens[0], used).flatten(0, 1), tokens[1].flatten())
    for fqn, param in model.named_parameters():
        name = model.global_name(fqn)
        if not name.startswith("experts") or int(name.split(".")[1]) in used:
            loss = loss + (param.diagonal() if param.ndim > 1 and "embed" not in fqn else param).sum()
    return loss


def _used(step: int, rank: int, rows: int) -> set[int] | None:
    unused = UNUSED.get((step, rank), set())
    return None if -1 in unused else set(_held(rank, rows)) - unused


def _oracle(**options: Any) -> Reference:
    model = Moe({str(number): number for number in range(NUM_EXPERTS)})
    is_muon = {fqn: p.ndim > 1 and "embed" not in fqn and "head" not in fqn for fqn, p in model.named_parameters()}
    return Reference(model, {fqn: "muon" if muon else "adamw" for fqn, muon in is_muon.items()}, lr=0.02, **options)


def _mean(oracle: Reference, step: int, rows: int) -> Weights:
    """The gradient that all ranks together must find: a mean over the ranks that hold the parameter."""
    total: Weights = {}
    for rank in range(4):
        used = _used(step, rank, rows)
        if used is None:
            continue
        loss = _loss(oracle.model, step, rank, used)  # type: ignore[arg-type]
        grads = torch.autograd.grad(loss, list(oracle.params.values()), allow_unused=True)
        for fqn, grad in zip(oracle.params, grads, strict=True):
            if grad is not None:
                total[fqn] = total.get(fqn, torch.zeros_like(grad)) + grad / (rows if "experts" in fqn else 4)
    return total


def _expected(rows: int, **options: Any) -> tuple[Weights, list[float]]:
    oracle = _oracle(**options)
    norms = [float(oracle.apply(_mean(oracle, step, rows))) for step in range(STEPS)]
    return oracle.weights, norms


def _expert_group(rows: int) -> dist.ProcessGroup:
    """Of the ranks r with equal r % (4 // rows)."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(rows, 4 // rows), mesh_dim_names=("replica", "expert"))
    return mesh.get_group("replica")


def _routes(group: dist.ProcessGroup | None) -> list[distmuon.Route]:
    return [
        distmuon.Route("experts.*.weight", "muon", process_group=group),
        distmuon.Route("experts.*.bias", "adamw", process_group=group),
    ]


def _make(
    group: dist.ProcessGroup, experts: dist.ProcessGroup, rows: int, *, same_names: bool = True, **options: Any
) -> tuple[Moe, Any]:
    held = _held(group.rank(), rows)
    model = Moe({f"e{number - held.start if same_names else number}": number for number in held})
    given = {"process_group": group, "routes": _routes(experts), **EXACT, **options}
    return model, distmuon.DistMuon(model, **given)


def _backward(model: Moe, step: int, rank: int, rows: int) -> None:
    used = _used(step, rank, rows)
    if used is not None:
        _loss(model, step, rank, used).backward()


def _spoil(model: Moe, rank: int, rows: int) -> None:
    """Other first values than those of the first rank that holds a parameter, which must replace them."""
    with torch.no_grad():
        for fqn, param in model.named_parameters():
            if rank >= (4 // rows if "experts" in fqn else 1):
                param.add_(1.0)


def _globally(model: Moe, optimizer: Any) -> Weights:
    return {model.global_name(fqn): value for fqn, value in weights(model, optimizer).items()}


# ----------------------------------------------------------------------------------------------------------- numbers

OPTIONS: list[dict[str, Any]] = [
    {"same_names": False, "verify_every": 1},
    {"overlap": False},
    {"overlap": "forward", "packing": "contiguous"},
    {"param_gather": "updates", "placement": "replicated", "exchange_dtype": torch.float32},
]


def _hooks_run(group: dist.ProcessGroup, rows: int, options: list[dict[str, Any]]) -> list[tuple[Weights, list[Any]]]:
    experts, found = _expert_group(rows), []
    for given in options:
        model, optimizer = _make(group, experts, rows, **given)
        _spoil(model, group.rank(), rows)
        metrics = []
        for step in range(STEPS):
            _backward(model, step, group.rank(), rows)
            optimizer.step()
            metrics.append(optimizer.metrics())
            optimizer.zero_grad()
        found.append((_globally(model, optimizer), metrics))
    return found


def _check(found: list[Weights], wanted: Weights) -> None:
    """Each rank's weights against the oracle's, and all replicas bit-equal."""
    start = _oracle().model.state_dict()
    for held in found:
        here = {name: value for name, value in wanted.items() if name in held}
        assert len(here) == len(held)
        assert_equals_reference(held, here, start)
    for name in wanted:
        first, *others = (held[name] for held in found if name in held)
        assert all(torch.equal(first, other) for other in others), name


@pytest.mark.parametrize("rows", [2, 1])
def test_the_result_is_the_oracles(spawn, rows: int) -> None:
    """On two ranks an expert, and on one, where its state is not cut at all."""
    options = OPTIONS if rows == 2 else OPTIONS[2:]
    found = spawn(_hooks_run, 4, rows=rows, options=options)
    wanted, norms = _expected(rows)
    for number, given in enumerate(options):
        _check([ranks[number][0] for ranks in found], wanted)
        for ranks in found:
            assert [m["grad_norm"] for m in ranks[number][1]] == pytest.approx(norms, rel=1e-6)
        if given.get("placement") != "replicated":
            for step in range(STEPS):
                assert sum(ranks[number][1][step]["ns_matrices"] for ranks in found) == 1 + 2 * NUM_EXPERTS


def _by_hand_run(group: dist.ProcessGroup, external: bool) -> Weights:
    """Gradients in `param.grad` before `step`, of this rank, or averaged by others."""
    options = {"grad_reduction": "external"} if external else {}
    model, optimizer = _make(group, _expert_group(2), 2, max_grad_norm=3.0, **options)
    oracle = _oracle(max_norm=3.0)
    for step in range(STEPS):
        averaged = _mean(oracle, step, 2)
        oracle.apply(averaged)
        optimizer.synchronize()
        used = _used(step, group.rank(), 2)
        if used is not None:
            params = dict(model.named_parameters())
            grads = torch.autograd.grad(
                _loss(model, step, group.rank(), used), list(params.values()), allow_unused=True
            )
            for (fqn, param), grad in zip(params.items(), grads, strict=True):
                param.grad = averaged.get(model.global_name(fqn)) if external else grad
        elif external:
            for fqn, param in model.named_parameters():
                param.grad = averaged.get(model.global_name(fqn))
        optimizer.step()
        optimizer.zero_grad()
    return _globally(model, optimizer)


@pytest.mark.parametrize("external", [False, True])
def test_gradients_by_hand_are_clipped_to_the_norm_of_all(spawn, external: bool) -> None:
    _check(spawn(_by_hand_run, 4, external=external), _expected(2, max_norm=3.0)[0])


def _stages_run(group: dist.ProcessGroup) -> float:
    """Two stages of a pipeline, each of two ranks with experts of their own; each gradient element is 1."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2, 1), mesh_dim_names=("stage", "data", "replica"))
    groups: Any = {"model_parallel_group": mesh.get_group("stage"), "grad_reduction": "external"}
    model, optimizer = _make(mesh.get_group("data"), mesh.get_group("replica"), 1, **groups)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return float(optimizer.metrics()["grad_norm"])


def test_the_norm_counts_the_experts_of_all_stages(spawn) -> None:
    sizes = {fqn: param.numel() for fqn, param in Moe({"0": 0, "1": 1}).named_parameters()}
    experts = sum(size for fqn, size in sizes.items() if "experts" in fqn)
    whole = 2 * (sum(sizes.values()) - experts) + 4 * experts
    assert spawn(_stages_run, 4) == pytest.approx([whole**0.5] * 4, rel=1e-6)


def _skip_run(group: dist.ProcessGroup) -> tuple[bool, int]:
    model, optimizer = _make(group, _expert_group(2), 2)
    _backward(model, 0, group.rank(), 2)
    optimizer.step()
    optimizer.zero_grad()
    before = weights(model, optimizer)
    if group.rank() == 3:
        model.experts["e2"].up.bias.register_hook(lambda grad: grad * float("nan"))
    _backward(model, 3, group.rank(), 2)
    optimizer.step()
    after = weights(model, optimizer)
    return all(torch.equal(before[fqn], after[fqn]) for fqn in before), optimizer.metrics()["skipped_steps"]


def test_an_experts_nan_skips_the_step_of_all(spawn) -> None:
    assert spawn(_skip_run, 4) == [(True, 1)] * 4


# ------------------------------------------------------------------------------------------------------------- bytes


def _bytes_run(group: dist.ProcessGroup) -> tuple[dict[str, int], dict[str, int], str]:
    experts = _expert_group(2)
    model, optimizer = _make(group, experts, 2)
    for step in (0, 3):
        _backward(model, step, group.rank(), 2)
        optimizer.step()
        optimizer.zero_grad()
    planned: dict[str, int] = {}
    for part, rank in zip(optimizer._layouts, (group.rank(), experts.rank()), strict=True):
        for stage, sent in sent_bytes(part, optimizer.options, rank).items():
            planned[stage] = planned.get(stage, 0) + sent
    of_experts = len(optimizer.layout.members(1))
    planned["guard"] = guard_bytes(optimizer.layout) + of_experts * torch.float64.itemsize
    return optimizer.metrics()["bytes"], planned, optimizer.report()


def test_bytes_are_those_of_the_plans_of_both_groups(spawn) -> None:
    for sent, planned, report in spawn(_bytes_run, 4):
        assert sent == planned and sent["dp_gather"]
        assert "layout: dp_size 4" in report and "layout: dp_size 2" in report


# ------------------------------------------------------------------------------------------------------------- state


def _state_run(group: dist.ProcessGroup) -> tuple[Weights, Weights, list[float]]:
    """Two steps, a save and a load into other values, two more steps beside the run that went on."""
    experts, rank = _expert_group(2), group.rank()
    model, optimizer = _make(group, experts, 2, momentum_dtype=torch.bfloat16)
    for step in (0, 1):
        _backward(model, step, rank, 2)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.consolidate_state_dict()
    state = optimizer.state_dict()
    other, again = _make(group, experts, 2, momentum_dtype=torch.bfloat16)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(state)
    for step in (2, 3):
        for each, stepped in ((model, optimizer), (other, again)):
            _backward(each, step, rank, 2)
            stepped.step()
            stepped.zero_grad()
    names = [name for g in state["param_groups"] for name in g["param_names"]]
    counts = [float(state["state"][n]["step"]) for n, name in enumerate(names) if name.endswith("e3.up.bias")]
    return weights(model, optimizer), weights(other, again), counts


def test_the_state_goes_round_on_each_rank(spawn) -> None:
    for rank, (kept, loaded, counts) in enumerate(spawn(_state_run, 4)):
        assert all(torch.equal(kept[fqn], loaded[fqn]) for fqn in kept)
        assert counts == [1.0 if rank % 2 else 2.0]  # expert 7 had no gradient in step 1, expert 3 had one


# ---------------------------------------------------------------------------------------------------------- refusals


def _flipped(group: dist.ProcessGroup, tmp: str) -> None:
    model, optimizer = _make(group, _expert_group(2), 2, verify_every=2)
    for step in (0, 3):
        _backward(model, step, group.rank(), 2)
        optimizer.step()
        optimizer.zero_grad()
        if group.rank() == 2:
            model.experts["e1"].down.weight.data[0, 0] += 1


def _other_shapes(group: dist.ProcessGroup, tmp: str) -> None:
    model = Moe({"e0": 0})
    if group.rank() % 2:
        model.experts["e0"].down = nn.Linear(HIDDEN, WIDTH)
    _step(model, group, _expert_group(2))


def _other_names(group: dist.ProcessGroup, tmp: str) -> None:
    _step(Moe({f"e{group.rank()}": 0}), group, _expert_group(2))


def _other_group(group: dist.ProcessGroup, tmp: str) -> None:
    pairs = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("a", "b"))
    _step(Moe({"e0": 0}), group, pairs.get_group("b" if group.rank() == 2 else "a"))


def _outside(group: dist.ProcessGroup, tmp: str) -> None:
    pairs = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("a", "b"))
    _step(Moe({"e0": 0}), pairs.get_group("b"), pairs.get_group("a"))


def _step(model: Moe, group: dist.ProcessGroup, experts: Any) -> None:
    optimizer = distmuon.DistMuon(model, process_group=group, routes=_routes(experts), **EXACT)
    _loss(model, 0, group.rank(), {0}).backward()
    optimizer.step()


def _no_group(group: dist.ProcessGroup, tmp: str) -> None:
    _step(Moe({"e0": 0}), group, dist.GroupMember.NON_GROUP_MEMBER)


def _save(group: dist.ProcessGroup, tmp: str) -> None:
    model, optimizer = _make(group, _expert_group(2), 2)
    distmuon.save_checkpoint(Path(tmp) / "step-1", model, optimizer)


def _consolidate(group: dist.ProcessGroup, tmp: str) -> None:
    _, optimizer = _make(group, _expert_group(2), 2)
    optimizer.consolidate_state_dict(to=0)


def _dtensors(group: dist.ProcessGroup, tmp: str) -> None:
    model = Moe({"e0": 0})
    experts = _expert_group(2)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    distmuon.DistMuon(model, routes=_routes(experts), **EXACT)


def _plan(group: dist.ProcessGroup, tmp: str) -> None:
    distmuon.plan(Moe({"e0": 0}), dp_size=4, routes=_routes(_expert_group(2)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_flipped, r"experts\.e1\.down\.weight: its bits on ranks"),
        (_other_shapes, r"rank 1: found .*process group 1"),
        (_other_names, r"rank 1: found experts\.e2\.up\.weight, on rank 0 experts\.e0|experts\.e3"),
        (_other_group, r"Route\(process_group=\): rank 0 names the ranks \[0, 2\], and rank 2 of them names \[2, 3\]"),
        (_outside, r"Route\(process_group=\): its ranks are \[., .\], and \[.\] are not in process_group"),
        (_no_group, r"process_group: found .*; a group that this rank is in"),
        (_save, r"checkpoint: experts\.e0\.\S+ has a route with a process_group"),
        (_consolidate, r"consolidate_state_dict\(to=0\): experts\.e0\.\S+ has a route with a process_group"),
        (_dtensors, r"DTensors: experts\.e0\.\S+ has a route with a process_group"),
        (_plan, r"plan: experts\.e0\.\S+ has a route with a process_group"),
    ],
)
def test_what_cannot_be_served_is_refused_on_all_ranks(
    spawn_raises, tmp_path: Path, make: Callable[..., None], match: str
) -> None:
    spawn_raises(make, 4, match=match, tmp=str(tmp_path))
