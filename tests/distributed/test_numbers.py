"""Numbers over many micro-batches and steps, and at the ends of float32: sums, moving averages, large gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from distmuon.planning.plan import plan
from distmuon.step import verdict
from distmuon.step.grad_buffer import GradBuffer
from tests.training import digest, hand_gradients, make, policies, state_tensors, train, weights

# ------------------------------------------------------------------------------------------------------- micro-batches


def _small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 40, bias=False), nn.Linear(40, 48, bias=False), nn.LayerNorm(48))


def _backward(model: nn.Module, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A backward whose gradients, all positive and of `dtype`, are returned: sums of them grow."""
    generator = torch.Generator().manual_seed(seed)
    grads = {fqn: torch.rand(p.shape, generator=generator).to(dtype).float() for fqn, p in model.named_parameters()}
    sum((param * grads[fqn]).sum() for fqn, param in model.named_parameters()).backward()
    return grads


def _sums(group: dist.ProcessGroup, **given: Any) -> dict[str, Any]:
    """`_accumulated`, and whether any bucket ever had a sum."""
    opened, original = [], GradBuffer._open_flat

    def watching(self: GradBuffer) -> Tensor:
        opened.append(self.sum is not None)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradBuffer, "_open_flat", watching)
        return {**_accumulated(group, **given), "sums": any(opened)}


def _accumulated(
    group: dist.ProcessGroup, options: dict[str, Any], micro_batches: int, in_no_sync: bool
) -> dict[str, Any]:
    """The worst relative error of an element of the averaged gradient, and what was held on the way."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    model = _small()
    routes = [distmuon.Route("0.weight", "muon"), distmuon.Route("1.weight", "muon")]
    optimizer = distmuon.DistMuon(model, process_group=group, bucket_mb=0.001, routes=routes, **options)
    exact = {fqn: torch.zeros(p.shape, dtype=torch.float64) for fqn, p in model.named_parameters()}
    dtype, held = options.get("reduce_dtype", torch.float32), 0
    for step in range(2):
        for total in exact.values():
            total.zero_()
        for micro in range(micro_batches):
            alone = in_no_sync and micro < micro_batches - 1
            with optimizer.no_sync() if alone else nullcontext():
                optimizer.synchronize()  # what a forward would do
                mine = _backward(model, (step * micro_batches + micro) * size + rank, dtype)
            for fqn, grad in mine.items():
                exact[fqn] += grad
            buckets = optimizer._engine.storage.buckets
            if alone:
                grads = [(bucket.grad_buffer.sum, bucket.grad_buffer.flat, bucket.grad_shard) for bucket in buckets]
                places = [place for of_bucket in grads for place in of_bucket]
                storages = [place.untyped_storage() for place in places if place is not None]
                held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        optimizer.reduce_gradients()
        for total in exact.values():
            dist.all_reduce(total.div_(size), group=group)
        worst = 0.0
        for bucket in buckets:
            for piece in bucket.muon + bucket.adamw:
                spec, start = optimizer.layout.specs[piece.segment.param], piece.segment.param_offset
                wanted = exact[spec.fqn].view(-1)[start : start + piece.segment.length]
                worst = max(worst, float(((piece.grad - wanted) / wanted).abs().max()))
        optimizer.step()
        optimizer.zero_grad()
    left = sum(bucket.grad_buffer.sum is not None for bucket in buckets)
    return {"error": worst, "left": left, "held": held, "buckets": len(buckets)}


ACCUMULATING: list[tuple[dict[str, Any], bool]] = [
    ({"reduce_dtype": torch.bfloat16}, True),
    ({"reduce_dtype": torch.bfloat16, "overlap": False}, False),  # each backward may be the last
    ({"reduce_dtype": torch.float16}, True),
    ({"reduce_dtype": torch.bfloat16, "release_grads": True}, True),
    ({"release_grads": True}, True),
    ({}, True),
]


@pytest.mark.promise(
    "Faults while training",
    "Micro-batches add up in float32 whatever `Precision.reduce`; a forgotten micro-batch leaves nothing",
)
@pytest.mark.parametrize("dp_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("options", "in_no_sync"), ACCUMULATING, ids=str)
def test_micro_batches_add_up_in_float32(spawn, options: dict[str, Any], in_no_sync: bool, dp_size: int) -> None:
    """In 16 bits a gradient of 2,048 micro-batches was 60 % too small: what one adds is less than half of the sum's
    last place. Now it is rounded once. The memory is what the plan says, and none of it is left after the step."""
    given = {"options": options, "micro_batches": 600, "in_no_sync": in_no_sync}
    by_rank = spawn(_sums, dp_size, timeout=150, **given)
    ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(options.get("reduce_dtype", torch.float32), 1e-5)
    routes = [distmuon.Route("0.weight", "muon"), distmuon.Route("1.weight", "muon")]
    planned = plan(
        _small(), **policies(dp_size=dp_size, bucket_mb=0.001, routes=routes, compare=False, **options)
    ).ranks
    for rank, found in enumerate(by_rank):
        assert found["error"] <= 1.01 * ulp + 1e-6 and found["left"] == 0 and found["buckets"] > 1, found
        assert found["sums"] == ("reduce_dtype" in options)
        if in_no_sync:
            assert found["held"] == planned[rank].held.gradients + planned[rank].held.accumulation, found


@pytest.mark.parametrize("options", [{"reduce_dtype": torch.bfloat16}, {"release_grads": True}], ids=str)
def test_a_step_of_one_micro_batch_has_no_sum(spawn, options: dict[str, Any]) -> None:
    for found in spawn(_sums, 2, options=options, micro_batches=1, in_no_sync=True):
        assert not found["sums"] and found["error"] < 2**-7


def _forgotten(group: dist.ProcessGroup, options: dict[str, Any]) -> tuple[str, int]:
    """Digest after two steps, before each of which two micro-batches were forgotten (or none, without "forgets"), and
    how many sums were left."""
    model, optimizer = make(group, **{key: value for key, value in options.items() if key != "forgets"})
    left = 0
    for step in range(2):
        if options.get("forgets"):
            optimizer.synchronize()
            with optimizer.no_sync():
                _backward(model, 99, torch.float32)
                _backward(model, 98, torch.float32)
            optimizer.zero_grad()
            left += sum(bucket.grad_buffer.sum is not None for bucket in optimizer._engine.storage.buckets)
        train(group, model, optimizer, range(step, step + 1), num_micro=2)
        left += sum(bucket.grad_buffer.sum is not None for bucket in optimizer._engine.storage.buckets)
    return digest(weights(model, optimizer)), left


@pytest.mark.promise(
    "Faults while training",
    "Micro-batches add up in float32 whatever `Precision.reduce`; a forgotten micro-batch leaves nothing",
)
@pytest.mark.parametrize("release", [False, True])
def test_a_forgotten_sum_leaves_nothing(spawn, release: bool) -> None:
    options = {"reduce_dtype": torch.bfloat16, "release_grads": release}
    plain, forgets = (spawn(_forgotten, 2, options={**options, "forgets": each}) for each in (False, True))
    assert plain == forgets and all(left == 0 for _, left in plain)


# ------------------------------------------------------------------------------------------------- momentum's rounding


def _by_hand(optimizer: Any, model: nn.Module, step: int) -> None:
    for fqn, grad in hand_gradients(model, step, 0).items():
        model.get_parameter(fqn).grad = grad
    optimizer.step()
    optimizer.zero_grad()


def _momentum(group: dist.ProcessGroup, options: list[dict[str, Any]], skips: bool = False) -> list[tuple[str, str]]:
    """For each (digest of momentum, of weights) after eight steps with the same gradients on all ranks."""
    found = []
    for given in options:
        given = dict(given)
        with pytest.MonkeyPatch.context() as patch:
            if given.pop("verdict_on_device", False):
                patch.setattr(verdict, "read_on_host", lambda ok: None)
            model, optimizer = make(group, **given)
            for step in range(8):
                if skips and step in (0, 3):
                    next(model.parameters()).grad = torch.full_like(next(model.parameters()), torch.inf)
                    optimizer.step()
                    optimizer.zero_grad()
                _by_hand(optimizer, model, step)
            state = state_tensors(optimizer)
        assert optimizer.metrics()["skipped_steps"] == 2 * skips
        momentum = {key: value for key, value in state.items() if key.endswith("momentum_buffer")}
        steps = {float(value) for key, value in state.items() if key.endswith(".step")}
        assert momentum and steps == {8.0}
        found.append((digest(momentum), digest(weights(model, optimizer))))
    return found


@pytest.mark.slow
@pytest.mark.promise(
    "Faults while training",
    "Momentum in 16 or 8 bits does not stall. A skipped step changes none of its bits, nor does a "
    "restart, nor, for bfloat16, another cut",
)
def test_rounded_momentum_is_the_same_whatever_the_cut(spawn) -> None:
    """bfloat16 momentum has the same bits at 1, 2 and 4 ranks, whichever way the shards are cut and walked."""
    ways = [
        {"packing": packing, "momentum_dtype": torch.bfloat16, **more}
        for packing in ("balanced", "contiguous")
        for more in ({}, {"overlap": False}, {"verdict_on_device": True}, {"param_gather": "updates"})
    ]
    ends = [momentum for size in (1, 2, 4) for found in spawn(_momentum, size, options=ways) for momentum, _ in found]
    assert len(set(ends)) == 1


@pytest.mark.promise(
    "Faults while training",
    "Momentum in 16 or 8 bits does not stall. A skipped step changes none of its bits, nor does a "
    "restart, nor, for bfloat16, another cut",
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_a_skipped_step_does_not_move_the_dice(spawn, dtype: torch.dtype) -> None:
    """Steps that were skipped change no bit, neither then nor later."""
    ways = [{"momentum_dtype": dtype}, {"momentum_dtype": dtype, "verdict_on_device": True}]
    plain, skipping = (spawn(_momentum, 3, options=ways, skips=skips) for skips in (False, True))
    for ends in zip(*plain, *skipping):
        assert len(set(ends)) == 1
    (on_host, _), (on_device, _) = plain[0]
    assert on_host == on_device, "the momentum has the same bits wherever the verdict is"


def _resumed(group: dist.ProcessGroup, folder: str, dtype: torch.dtype, how: str) -> tuple[str, str]:
    """(digest of a run of 6 steps, of one that was saved and loaded after 3)."""
    ends = []
    for interrupted in (False, True):
        model, optimizer = make(group, momentum_dtype=dtype)
        train(group, model, optimizer, range(3))
        if interrupted and how == "folder":
            distmuon.save_checkpoint(folder, model, optimizer)
            model, optimizer = make(group, momentum_dtype=dtype)
            distmuon.load_checkpoint(folder, model, optimizer)
        elif interrupted:
            values, state = weights(model, optimizer), optimizer.state_dict()
            model, optimizer = make(group, momentum_dtype=dtype)
            model.load_state_dict(values, strict=False)
            optimizer.load_state_dict(state)
        train(group, model, optimizer, range(3, 6))
        ends.append(digest({**weights(model, optimizer), **state_tensors(optimizer)}))
    return ends[0], ends[1]


@pytest.mark.promise(
    "Faults while training",
    "Momentum in 16 or 8 bits does not stall. A skipped step changes none of its bits, nor does a "
    "restart, nor, for bfloat16, another cut",
)
@pytest.mark.parametrize("how", ["folder", "state dict"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_a_resumed_run_throws_the_same_dice(spawn, tmp_path, dtype: torch.dtype, how: str) -> None:
    for straight, resumed in spawn(_resumed, 3, folder=str(tmp_path / "step"), dtype=dtype, how=how):
        assert straight == resumed


def _without_steps(group: dist.ProcessGroup, dtype: torch.dtype) -> bool:
    """A state saved from float32 momentum, or by an earlier version, has no ``step``; float32 loads one that has."""
    model, optimizer = make(group, momentum_dtype=dtype)
    train(group, model, optimizer, range(2))
    state = optimizer.full_state_dict()
    muon = [entry for entry in state["state"].values() if "momentum_buffer" in entry]
    assert all(float(entry["step"]) == 2.0 for entry in muon)
    _, plain_optimizer = make(group)
    plain_optimizer.load_state_dict(state)
    assert not any(
        "step" in entry for entry in plain_optimizer.full_state_dict()["state"].values() if "momentum_buffer" in entry
    )
    for other in (optimizer, plain_optimizer):  # a count alone is no state: momentum would begin at zero, in silence
        alone = {n: {"step": e["step"]} for n, e in state["state"].items() if "momentum_buffer" in e}
        with pytest.raises(ValueError, match=r"its state has \['step'\]"):
            other.load_state_dict({**state, "state": alone})
    for entry in muon:
        del entry["step"]
    optimizer.load_state_dict(state)
    anew = state_tensors(optimizer)
    steps = {float(value) for key, value in anew.items() if key.endswith(".step")}
    same = all(
        torch.equal(anew[key], value) for key, value in state_tensors(plain_optimizer).items() if "momentum" in key
    )
    return same and steps == {0.0, 2.0}  # AdamW's were there


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_states_with_and_without_steps_load(spawn, dtype: torch.dtype) -> None:
    assert all(spawn(_without_steps, 2, dtype=dtype))


# ----------------------------------------------------------------------------------------------------- large gradients


def _large(group: dist.ProcessGroup, fqn: str, size: float, options: dict[str, Any]) -> dict[str, Any]:
    """One usual step, one in which `fqn` has a gradient of that size on the last rank only, and one more usual step."""
    given = dict(options)
    with pytest.MonkeyPatch.context() as patch:
        if given.pop("verdict_on_device", False):
            patch.setattr(verdict, "read_on_host", lambda ok: None)
            patch.setattr(verdict, "squares_on_cpu", verdict.squares_on_device)
        clip, rank, last = given.pop("clip", None), dist.get_rank(group), dist.get_world_size(group) - 1
        model, optimizer = make(group, **given)
        train(group, model, optimizer, range(1))
        before = weights(model, optimizer)
        grads = {name: grad for name, grad in hand_gradients(model, 1, rank).items()}
        if rank == last:
            grads[fqn].view(-1)[:2] = size  # in the shard of one rank
        for name, grad in grads.items():
            model.get_parameter(name).grad = grad
        mean = {}
        for name, grad in grads.items():
            total = grad.double()
            dist.all_reduce(total, group=group)
            mean[name] = total / (last + 1)
        wanted = float(sum(total.square().sum() for total in mean.values()) ** 0.5)
        norm = float(optimizer.clip_grad_norm_(clip or float("inf")))
        optimizer.step()
        optimizer.zero_grad()
        after = weights(model, optimizer)
        skipped = optimizer.metrics()["skipped_steps"]
        train(group, model, optimizer, range(2, 3))
        state = state_tensors(optimizer)
    return {
        "norm": norm / wanted,
        "skipped": skipped,
        "moved": {name for name in before if not torch.equal(before[name], after[name])},
        "finite": all(bool(value.isfinite().all()) for value in (*state.values(), *weights(model, optimizer).values())),
        "later": optimizer.metrics()["skipped_steps"] - skipped,
    }


@pytest.mark.promise(
    "Faults while training",
    "A step whose gradients are finite is taken, up to the limits of "
    "[docs/options.md](options.md#the-ends-of-float32), and its norm is right. A step that would "
    "write a value that is not finite is skipped by all ranks",
)
@pytest.mark.parametrize("options", [{}, {"verdict_on_device": True}, {"momentum_dtype": torch.int8}], ids=str)
@pytest.mark.parametrize(
    ("fqn", "size", "clip", "skipped"),
    [
        ("up.weight", 1e30, None, 0),  # Muon's: any scale will do
        ("up.weight", 1e36, 1.0, 0),
        ("up.weight", 3e38, None, 1),  # the norm leaves float32
        ("up.weight", float("nan"), 1.0, 1),
        ("embed.weight", 1e18, None, 0),  # AdamW's: float32 must hold the square
        ("embed.weight", 1e30, None, 1),
        ("embed.weight", 1e30, 1e25, 1),
        ("embed.weight", 1e30, 1.0, 0),
    ],
)
def test_a_step_of_finite_gradients_is_taken(
    spawn, fqn: str, size: float, clip: float | None, skipped: int, options: dict[str, Any]
) -> None:
    """Elements from 1.8e19 on made the norm inf, since their squares leave float32, and the step was skipped. Now it is
    taken wherever all that it writes is finite. It is skipped by all ranks though one alone has such elements."""
    for found in spawn(_large, 2, fqn=fqn, size=size, options={**options, "clip": clip}):
        assert found["finite"] and found["skipped"] == skipped and found["later"] == 0, found
        assert (fqn in found["moved"]) != bool(skipped) and bool(found["moved"]) != bool(skipped)
        if size < 1e37:
            assert found["norm"] == pytest.approx(1.0, rel=1e-5)
