"""The options of traffic, memory and overlap: which of them change no bit, and how much the others change."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distmuon
from distmuon.comm import group as collectives
from distmuon.math import rules
from distmuon.step import param_gather, verdict
from distmuon.step.flat_storage import FlatStorage
from distmuon.step.grad_buffer import GradBuffer
from tests.distributed.test_parity import _model, _train_by_hand, _wanted_by_hand
from tests.standing import Standing, loss_fn, make_batch, make_batches
from tests.training import (
    Weights,
    assert_equals_reference,
    backward,
    digest,
    errors,
    make,
    reference,
    state_tensors,
    train,
    weights,
)

WAYS = list(itertools.product(("balanced", "contiguous"), ("owner", "replicated")))


def _steps(group: dist.ProcessGroup, optimizer: Any, model: Any, num_micro: int) -> None:
    """Four steps: one is skipped (an infinite gradient on one rank), one backward is forgotten before its step."""
    rank, bad = dist.get_rank(group), list(model.parameters())[-1]
    for step in range(4):
        batches = [make_batch(step, rank, micro) for micro in range(num_micro)]
        if step == 1:
            backward(model, optimizer, batches)
            optimizer.zero_grad()
        handle = None
        if step == 2 and rank == dist.get_world_size(group) - 1:
            handle = bad.register_hook(lambda grad: grad * float("inf"))
        backward(model, optimizer, batches)
        if handle is not None:
            handle.remove()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.metrics()["skipped_steps"] == 1


def _ends(group: dist.ProcessGroup, cases: list[dict[str, Any]], num_micro: int = 1) -> list[tuple[str, str]]:
    """For each case the digests of parameters and of state, which is whole and so the same on all ranks."""
    found = []
    for case in cases:
        options = dict(case)
        if options.pop("own_exchange_group", False):
            options["exchange_group"] = group  # another `DataParallelGroup`; NCCL would get a second communicator
        with pytest.MonkeyPatch.context() as patch:
            if options.pop("verdict_on_device", False):
                patch.setattr(verdict, "read_on_host", lambda ok: None)
            model, optimizer = make(group, Standing(), **options)
            _steps(group, optimizer, model, num_micro)
        found.append((digest(weights(model, optimizer)), digest(state_tensors(optimizer))))
    return found


ON_DEVICE: list[dict[str, Any]] = [  # as on a GPU, where the host must not read the verdict: kernels of one pass
    {"verdict_on_device": True},
    {"verdict_on_device": True, "overlap": "forward", "param_gather": "updates"},
]
SAME_BITS: list[dict[str, Any]] = [
    {"overlap": "forward"},
    {"release_grads": True},
    {"param_gather": "updates"},
    {"own_exchange_group": True},
    {"overlap": "forward", "release_grads": True, "param_gather": "updates", "own_exchange_group": True},
    {"overlap": False, "release_grads": True, "param_gather": "updates"},
]


@pytest.mark.promise(
    "Faults while training",
    "A non-finite gradient on one rank: all ranks skip, and no bit of state changes, with the options"
    " that change no bit too",
)
@pytest.mark.parametrize(
    ("dp_size", "num_micro"),
    [
        (1, 1),
        (2, 3),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(3, 1, marks=pytest.mark.slow),  # by day the golden digests hold these bits
        pytest.param(4, 1, marks=pytest.mark.slow),
    ],
)
def test_options_that_change_no_bit(spawn, dp_size: int, num_micro: int) -> None:
    """Parameters and state equal the plain way's, bit by bit, on all ranks, over a skipped step and a forgotten one."""
    cases = [{}, *SAME_BITS, *ON_DEVICE]
    for packing, placement in WAYS if dp_size == 3 else (WAYS[0], WAYS[-1]):
        given = [{"packing": packing, "placement": placement, **case} for case in cases]
        by_rank = spawn(_ends, dp_size, timeout=150, cases=given, num_micro=num_micro)
        for case, ends in zip(cases, zip(*by_rank)):
            plain = by_rank[0][len(cases) - len(ON_DEVICE)] if case in ON_DEVICE else by_rank[0][0]
            assert set(ends) == {plain}, (packing, placement, case)


def _on_device(group: dist.ProcessGroup, ns_dtype: torch.dtype) -> Weights:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "read_on_host", lambda ok: None)
        model, optimizer = make(group, packing="contiguous", ns_dtype=ns_dtype)
        train(group, model, optimizer, range(5))
        return weights(model, optimizer)


@pytest.mark.parametrize("ns_dtype", [torch.float32, torch.bfloat16])
def test_kernels_under_a_verdict_on_the_device_equal_the_oracle(spawn, ns_dtype: torch.dtype) -> None:
    """They round otherwise than those of a CPU; in bfloat16 the update has another scale, too."""
    oracle = reference(ns_dtype=ns_dtype)
    for step in range(5):
        oracle.step(loss_fn, make_batches(step, 2, 1))
    for ends in spawn(_on_device, 2, ns_dtype=ns_dtype):
        if ns_dtype == torch.float32:
            assert_equals_reference(ends, oracle.weights)
        else:
            assert errors(ends, oracle.weights, Standing().state_dict())[1][0] < 0.06


def test_updates_travel_in_the_exchange_dtype_without_changing_a_bit(spawn) -> None:
    """With bfloat16 Newton-Schulz a rank's own polar factors have the bits that the others receive."""
    given = [
        {"ns_dtype": ns, "exchange_dtype": travels, "param_gather": gather}
        for ns, travels in ((None, None), (None, torch.float32), (torch.float32, torch.bfloat16))
        for gather in ("parameters", "updates")
    ]
    by_rank = spawn(_ends, 3, cases=given)
    assert all(ends == by_rank[0] for ends in by_rank)
    found = by_rank[0]
    assert found[0] == found[1] and found[2] == found[3] and found[4] == found[5]
    assert len(set(found)) > 1, "or else the dtypes changed nothing"


@pytest.mark.parametrize("dp_size", [2, 3, 4])
def test_what_travels_does_not_depend_on_the_cut(spawn, dp_size: int) -> None:
    """A matrix that never leaves its owner is rounded like one that does: float32 Newton-Schulz, bfloat16 exchange."""
    one = spawn(_train_by_hand, dp_size, dtypes="float32", cases=[{"exchange_dtype": torch.bfloat16}])[0][0][0]
    oracle = _wanted_by_hand("float32", dp_size)
    for fqn in ("up.weight", "experts_up"):
        moved = (one[fqn] - oracle.weights[fqn]).norm() / (oracle.weights[fqn] - Standing().state_dict()[fqn]).norm()
        assert 1e-4 < moved < 0.02, (fqn, moved)


# ------------------------------------------------------------------------------------------- what has an error band


def _bits_twice(group: dist.ProcessGroup, options: dict[str, Any]) -> list[str]:
    return [ends[0] for ends in _ends(group, [options, options])]


LOSSY: list[tuple[str, dict[str, Any], float]] = [
    ("bfloat16 reduction", {"reduce_dtype": torch.bfloat16}, 0.003),
    ("bfloat16 exchange", {"exchange_dtype": torch.bfloat16}, 0.02),
    ("bfloat16 momentum", {"momentum_dtype": torch.bfloat16}, 0.003),
    ("int8 momentum", {"momentum_dtype": torch.int8}, 0.012),
    ("int8 updates", {"param_gather": "updates", "updates_dtype": torch.int8}, 0.018),
]


@pytest.mark.parametrize(("options", "band"), [case[1:] for case in LOSSY], ids=[case[0] for case in LOSSY])
def test_error_bands(spawn, options: dict[str, Any], band: float) -> None:
    """Relative to the accumulated update after five steps, worst parameter; the same bits on all ranks, and twice."""
    oracle = _wanted_by_hand("float32", 3)
    ((_, masters),) = spawn(_train_by_hand, 3, dtypes="float32", cases=[options])[0]
    (_, _), (worst, fqn) = errors(masters, oracle.weights, Standing().state_dict())
    print(f"\n{options}: {worst:.1e} of the update ({fqn})")
    assert 1e-5 < worst <= band
    assert len({bits for found in spawn(_bits_twice, 3, options=options) for bits in found}) == 1


def _reduced(group: dist.ProcessGroup, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sum in float32 of what each rank rounded, exact sum of the same) of one shard."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    ours = torch.randn(size * 4096, generator=torch.Generator().manual_seed(rank)).to(dtype)
    shard = torch.empty(4096)
    dp_group = collectives.DataParallelGroup(group, lambda *_: None)
    dp_group.start_reduce_scatter(shard, ours, stage="reduce_scatter").wait()
    everyone = [torch.randn(size * 4096, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(size)]
    return shard, torch.stack([t.double().view(size, -1)[rank] for t in everyone]).mean(0)


def test_a_bfloat16_reduction_is_summed_in_float32(spawn) -> None:
    """A sum in bfloat16 would be wrong by 2e-3."""
    for shard, exact in spawn(_reduced, 4, dtype=torch.bfloat16):
        assert (shard.double() - exact).norm() / exact.norm() < 1e-7


# ------------------------------------------------------------------------------------------------- masters in 16 bits


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("dtypes", ["bfloat16", "mixed"])
def test_remainders_keep_every_bit_of_the_masters(spawn, dtypes: str, dp_size: int) -> None:
    """Gradients by hand, so that no rounding of a parameter comes back: masters are bit-equal after eight steps."""
    cases = [{}, {"master_format": "remainder"}, {"master_format": "remainder", "overlap": "forward"}]
    for (plain_ends, plain), *others in spawn(_train_by_hand, dp_size, dtypes=dtypes, cases=cases, num_steps=8):
        for ends, masters in others:
            assert digest(masters) == digest(plain)
            unequal = sum(int((ends[fqn] != plain_ends[fqn]).sum()) for fqn in ends)
            assert unequal <= 20, "only halves round differently, one in 131,072"


def _state_bytes(group: dist.ProcessGroup, options: dict[str, Any]) -> int:
    model, optimizer = make(group, _model("bfloat16"), **options)
    train(group, model, optimizer, range(2))
    muon = sum(p.segment.length for b in optimizer._engine.storage.buckets for p in b.muon)
    adamw = sum(p.segment.length for b in optimizer._engine.storage.buckets for p in b.adamw)
    saved = 2 * (muon + adamw)
    return optimizer.metrics()["state_bytes"] + (saved if options else 0)


def test_remainders_halve_the_masters(spawn) -> None:
    assert spawn(_state_bytes, 2, options={}) == spawn(_state_bytes, 2, options={"master_format": "remainder"})


def _write_between(group: dist.ProcessGroup, how: str) -> tuple[float, bool]:
    model, optimizer = make(group, _model("bfloat16"), master_format="remainder", weight_decay=0.0, lr=0.0)
    train(group, model, optimizer, range(1))
    optimizer.synchronize()
    wanted = torch.full_like(model.up.weight, 0.3)
    with torch.no_grad():
        (model.up.weight if how == "in place" else model.up.weight.data).copy_(wanted)
    train(group, model, optimizer, range(1))
    optimizer.synchronize()
    master = state_tensors(optimizer)["up.weight.master"]
    return float((master / wanted.float() - 1).abs().max()), torch.equal(model.up.weight, wanted)


@pytest.mark.parametrize("how", ["in place", "data"])
def test_a_foreign_write_stays(spawn, how: str) -> None:
    """Its master is one that rounds to what was written."""
    for worst, stayed in spawn(_write_between, 2, how=how):
        assert stayed and worst < 2**-8


# ---------------------------------------------------------------------------------------------------- memory and order


def _open_buffers(group: dist.ProcessGroup) -> tuple[int, int, int]:
    """(buckets, most flat gradient buffers at once, those left after a step), with `release_grads`."""
    model, optimizer = make(group, release_grads=True)
    train(group, model, optimizer, range(1))
    buckets, most = optimizer._engine.storage.buckets, 0
    original = GradBuffer._open_flat

    def counting(self: GradBuffer) -> Tensor:
        nonlocal most
        flat = original(self)
        most = max(most, sum(bucket.grad_buffer.flat is not None for bucket in buckets))
        return flat

    GradBuffer._open_flat = counting  # type: ignore[method-assign]
    try:
        train(group, model, optimizer, range(1, 2))
    finally:
        GradBuffer._open_flat = original  # type: ignore[method-assign]
    return len(buckets), most, sum(bucket.grad_buffer.flat is not None for bucket in buckets)


def test_released_gradients_hold_two_buckets_at_the_most(spawn) -> None:
    for buckets, most, left in spawn(_open_buffers, 2):
        assert buckets > 4 and most <= 3 and left == 0  # the standing model's tied embedding opens its bucket early


def _kept(group: dist.ProcessGroup, **options: Any) -> list[int | None]:
    """The addresses at which the slices of a bucket arrive in two steps; None: in new memory."""
    model, optimizer = make(group, bucket_mb=None, **options)
    found, start = [], optimizer.group.start_reduce_scatter

    def noting(*tensors: Tensor, kept: Tensor | None, **more: Any) -> collectives.Pending:
        found.append(None if kept is None else kept.data_ptr())
        return start(*tensors, kept=kept, **more)

    optimizer.group.start_reduce_scatter = noting
    train(group, model, optimizer, range(2))
    return found


@pytest.mark.parametrize(
    ("dp_size", "options"),
    [(2, {}), (4, {"reduce_dtype": torch.bfloat16, "gpus_per_node": 2})],
    ids=["one level", "two levels"],
)
def test_slices_arrive_in_the_same_memory_in_every_step(spawn, dp_size: int, options: dict[str, Any]) -> None:
    runs = [spawn(_kept, dp_size, release_grads=released, **options) for released in (False, True)]
    for kept, released in zip(*runs):
        half = len(kept) // 2
        assert None not in kept and kept[:half] == kept[half:] and len(set(kept)) == half
        assert set(released) == {None}


class _Watch:
    """What starts and what is waited for, in order, as "stage+bucket" and "stage-bucket"."""

    def __init__(self, group: collectives.DataParallelGroup) -> None:
        self.events: list[str] = []
        self._starts: dict[str, int] = {}
        for verb in ("start_reduce_scatter", "start_all_to_all", "start_all_gather"):
            setattr(group, verb, self._watched(getattr(group, verb)))

    def _watched(self, start: Callable[..., collectives.Pending]) -> Callable[..., collectives.Pending]:
        def started(*tensors: Any, stage: str, **more: Any) -> collectives.Pending:
            number = self._starts[stage] = self._starts.get(stage, -1) + 1
            self.events.append(f"{stage}+{number}")
            return _Watched(start(*tensors, stage=stage, **more), self.events, f"{stage}-{number}")

        return started


class _Watched(collectives.Pending):
    def __init__(self, pending: collectives.Pending, events: list[str], name: str) -> None:
        super().__init__(pending.result, pending.works, pending.holds, pending.then, pending.lost)
        self._events, self._name = events, name

    def wait(self) -> Tensor:
        if self.works:
            self._events.append(self._name)
        return super().wait()


def _events(group: dist.ProcessGroup, overlap: Any) -> tuple[list[str], list[str], int]:
    """(events of backward, events of step, buckets); contiguous packing, so that every bucket exchanges."""
    model, optimizer = make(group, packing="contiguous", overlap=overlap)
    train(group, model, optimizer, range(2))
    optimizer.synchronize()
    watch = _Watch(optimizer.group)
    loss_fn(model, make_batch(2, dist.get_rank(group), 0)).backward()
    in_backward = list(watch.events)
    optimizer.step()
    return in_backward, watch.events[len(in_backward) :], len(optimizer.layout.buckets)


def _position(events: list[str]) -> dict[str, int]:
    return {event: number for number, event in enumerate(events)}


def test_the_order_of_starts_and_waits(spawn) -> None:
    """Reductions start under backward; pieces of the next bucket travel while one is orthogonalized, and no all-gather
    is waited for in the step. Numbers count the collectives of a stage: walks begin with the last bucket."""
    found = spawn(_events, 2, overlap="forward")
    assert all(rank[:2] == found[0][:2] for rank in found), "ranks must issue the same collectives"
    in_backward, in_step, buckets = found[0]
    started = [event for event in in_backward if "+" in event]
    assert started == [f"reduce_scatter+{k}" for k in range(buckets)] and not any("-" in e for e in in_backward)
    at = _position(in_step)
    exchanges = sum(event.startswith("dp_gather+") for event in in_step)
    assert exchanges > 4
    pairs = range(exchanges - 1)
    travel = [k for k in pairs if at[f"dp_gather+{k + 1}"] < at[f"dp_gather-{k}"] < at[f"scatter+{k}"]]
    return_ = [k for k in pairs if at[f"scatter+{k + 1}"] < at[f"scatter-{k}"]]  # Newton-Schulz of k + 1 lies between
    assert min(len(travel), len(return_)) >= exchanges - 2  # one bucket without matrices walks between two others
    gathers = [event for event in in_step if event.startswith("all_gather")]
    assert gathers == [f"all_gather+{k}" for k in range(buckets)]
    first = at["all_gather+0"]
    assert at[f"scatter+{exchanges - 1}"] < first < at[f"scatter-{exchanges - 1}"], "nothing queues behind them"


def _gather_order(group: dist.ProcessGroup, own_group: bool) -> tuple[list[int], list[str]]:
    """Buckets in the order of their all-gathers, and what starts in the step."""
    options = {"exchange_group": group} if own_group else {}
    model, optimizer = make(group, packing="contiguous", overlap="forward", **options)
    train(group, model, optimizer, range(1))
    optimizer.synchronize()
    watch, order = _Watch(optimizer.group), []
    sent = FlatStorage.note_sent
    loss_fn(model, make_batch(2, dist.get_rank(group), 0)).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlatStorage, "note_sent", lambda self: (order.append(self.spec.index), sent(self))[1])
        optimizer.step()
    return order, [event for event in watch.events if event[-2] == "+" and not event.startswith("reduce")]


def test_all_gathers_start_in_the_order_of_the_next_forward(spawn) -> None:
    """Held back or not. With an exchange group of its own nothing is held back: all-gathers start at once."""
    for own_group in (False, True):
        (order, starts), other = spawn(_gather_order, 2, own_group=own_group)
        assert order == sorted(order, reverse=True) and (order, starts) == other
        early = [event for event in starts[: starts.index("all_gather+0") + 1] if "all_gather" not in event]
        assert (early == []) == own_group  # the exchange group's own starts are not watched


def _labels(group: dist.ProcessGroup) -> set[str]:
    model, optimizer = make(group)
    train(group, model, optimizer, range(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(group, model, optimizer, range(1, 2))
    return {event.key for event in profile.key_averages() if event.key.startswith("distmuon::")} | {
        str(len(optimizer.layout.buckets))
    }


def test_a_trace_shows_every_stage_of_every_bucket(spawn) -> None:
    labels = spawn(_labels, 2)[0]
    buckets = next(int(label) for label in labels if label.isdigit())
    per_bucket = ("reduce_scatter", "momentum", "start_dp_gather", "dp_gather", "newton_schulz", "start_scatter")
    per_bucket += ("scatter", "apply", "start_all_gather", "all_gather")
    wanted = {f"distmuon::{stage}/{k}" for stage in per_bucket for k in range(buckets)}
    assert wanted <= labels, wanted - labels


# ------------------------------------------------------------------------------------------------------- refusals


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"overlap": "backward"}, "float32", "overlap"),
    ({"release_grads": True, "grad_reduction": "external"}, "float32", "release_grads"),
    ({"param_gather": "updates"}, "mixed", r"embed.*bfloat16"),
    ({"param_gather": "gradients"}, "float32", "param_gather"),
    ({"master_format": "remainder"}, "float32", r"precision\.master"),
    ({"master_format": "int4"}, "float32", r"precision\.master"),
    ({"exchange_dtype": torch.float16}, "float32", r"precision\.exchange"),
    ({"momentum_dtype": torch.float16}, "float32", r"precision\.momentum"),
    ({"updates_dtype": torch.bfloat16, "param_gather": "updates"}, "float32", r"precision\.updates"),
    (
        {"updates_dtype": torch.int8},
        "float32",
        r"precision\.updates: .*updates must travel",
    ),
    ({"updates_dtype": torch.int8, "param_gather": "updates"}, "mixed", r"embed.*bfloat16"),
]


@pytest.mark.parametrize(("options", "dtypes", "message"), REFUSED)
def test_options_that_cannot_mean_what_they_say_raise(options: dict[str, Any], dtypes: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(None, _model(dtypes), **options)


def _other_ranks(group: dist.ProcessGroup) -> None:
    distmuon.DistMuon(torch.nn.Linear(8, 8), process_group=group, exchange_group=dist.group.WORLD)


def test_an_exchange_group_of_other_ranks_raises(spawn_raises) -> None:
    spawn_raises(_other_ranks, 2, match="exchange_group")


# ------------------------------------------------------------------------------------------------- planted faults


def _with_fault(group: dist.ProcessGroup, fault: str) -> bool:
    """Whether the bits still equal the plain way's, with a fault in the option's code."""
    option = {"param_gather": "updates"} if fault.startswith("updates") else {"verdict_on_device": True}
    plain = _ends(group, [option])
    with pytest.MonkeyPatch.context() as patch:
        if fault == "momentum kept before the verdict":
            original = rules.muon_momentum

            def eager(grad: Tensor, buffer: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
                new, update = original(grad, buffer, **rest)
                return buffer.copy_(new), update

            patch.setattr(rules, "muon_momentum", eager)
        elif fault == "updates of absent ranks forgotten":
            patch.setattr(param_gather.Updates, "_take", lambda *_: None)
        try:
            return _ends(group, [option]) == plain
        except (AssertionError, IndexError, StopIteration, RuntimeError, ValueError):
            return False


@pytest.mark.parametrize(
    "fault",
    [
        "momentum kept before the verdict",
        "updates of absent ranks forgotten",
    ],
)
def test_the_comparison_sees_planted_faults(spawn, fault: str) -> None:
    assert not any(spawn(_with_fault, 2, fault=fault))


# --------------------------------------------------------------------------------------------------- checkpoints


def _saved_and_loaded(
    group: dist.ProcessGroup, folder: str, dtypes: str, before: dict[str, Any], after: dict[str, Any]
) -> dict[str, bool]:
    """Three steps with the options `before`, a checkpoint, and what an optimizer with `after` makes of it."""
    model, optimizer = make(group, _model(dtypes), **before)
    train(group, model, optimizer, range(3))
    saved, values = state_tensors(optimizer), weights(model, optimizer)
    distmuon.save_checkpoint(folder, model, optimizer)
    other_model, other = make(group, _model(dtypes), **after)
    distmuon.load_checkpoint(folder, other_model, other)
    loaded, other_values = state_tensors(other), weights(other_model, other)
    plain, plain_optimizer = make(group, _model(dtypes), **after)
    plain.load_state_dict(values, strict=False)
    plain_optimizer.load_state_dict(optimizer.full_state_dict())
    for each, its in ((other_model, other), (plain, plain_optimizer)):
        train(group, each, its, range(3, 4))
    return {
        "state": digest({key: saved.get(key, torch.tensor(0.0)) for key in loaded}) == digest(loaded),
        "masters": all(torch.equal(value, loaded[key]) for key, value in saved.items() if key.endswith(".master")),
        "weights": digest(values) == digest(other_values),
        "plain": digest(weights(other_model, other)) == digest(weights(plain, plain_optimizer)),
    }


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "Checkpoints hold values, not formats: int8 momentum and 16-bit remainders load into float32 and back",
)
@pytest.mark.parametrize(
    ("dtypes", "before", "after", "same"),
    [
        ("float32", {"momentum_dtype": torch.int8}, {"momentum_dtype": torch.int8, "overlap": "forward"}, True),
        ("float32", {"momentum_dtype": torch.int8}, {"param_gather": "updates"}, True),
        ("bfloat16", {"master_format": "remainder"}, {"master_format": "remainder"}, True),
        ("bfloat16", {}, {"master_format": "remainder", "momentum_dtype": torch.int8}, False),
        ("bfloat16", {"master_format": "remainder"}, {"release_grads": True}, True),
    ],
)
def test_checkpoints_hold_values_not_formats(
    spawn, tmp_path, dtypes: str, before: dict[str, Any], after: dict[str, Any], same: bool
) -> None:
    """Bit-equal state where the new format can hold it; masters always; and the plain state dict says the same."""
    for found in spawn(_saved_and_loaded, 3, folder=str(tmp_path / "step"), dtypes=dtypes, before=before, after=after):
        halves = dtypes == "bfloat16" and before.get("master_format") != after.get("master_format")
        wanted = {"state": same, "masters": True, "weights": True, "plain": True}
        assert found == {**wanted, "weights": found["weights"] if halves else True}, found
