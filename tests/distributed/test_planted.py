"""Faults that other implementations have had, planted in this one: each is seen, and seen by a wide margin.

`docs/reliability.md` lists every planted fault and its test; here are those that no other file plants. A fault is made
by exchanging one function of the library inside the workers; the same run without it must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distmuon
from distmuon.comm import group as collectives
from distmuon.step import bucket, engine, matrix_exchange, verdict
from tests.distributed.late import late_collectives
from tests.standing import Standing, loss_fn, make_batch, make_batches, num_logical_matrices
from tests.training import (
    REL_UPDATE,
    Weights,
    assert_equals_reference,
    digest,
    errors,
    make,
    reference,
    state_tensors,
    train,
    weights,
)

STEPS, NUM_MICRO, MAX_NORM, POISONED = 3, 2, 3.0, 1

# ------------------------------------------------------------------------------- faults in the mathematics


@contextmanager
def _newton_schulz_on_a_slice(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The exchange is left out: a rank orthogonalizes the slice it holds, the rest of the matrix is zeros to it."""
    start = collectives.DataParallelGroup.start_all_to_all

    def no_exchange(self: Any, output: Tensor, *rest: Any, stage: str, label: str) -> collectives.Pending:
        if stage != "dp_gather":
            return start(self, output, *rest, stage=stage, label=label)
        return collectives.Pending(output.zero_())

    patch.setattr(collectives.DataParallelGroup, "start_all_to_all", no_exchange)
    yield


@contextmanager
def _clip_after_newton_schulz(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The coefficient reaches AdamW's gradients and the polar factors, not the gradients that momentum averages."""
    coefficients, orthogonalize = [1.0], bucket.orthogonalize

    def scale(self: Any, coefficient: Tensor) -> None:
        coefficients[0] = float(coefficient)
        for storage in self.storage.buckets:
            for piece in storage.adamw:
                piece.grad.mul_(coefficient)
        self._verdict = replace(self._verdict, total_norm=self._verdict.total_norm * coefficient)

    patch.setattr(engine.Engine, "_scale", scale)
    patch.setattr(bucket, "orthogonalize", lambda block, **how: orthogonalize(block, **how) * coefficients[0])
    yield


@contextmanager
def _newton_schulz_per_micro_batch(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each micro-batch is reduced, orthogonalized and applied by itself, all within what counts as one step."""

    @contextmanager
    def no_sync(self: Any) -> Iterator[None]:
        yield
        self.reduce_gradients()
        self._engine.update(self._check_step())
        self.synchronize()

    patch.setattr(distmuon.DistMuon, "no_sync", no_sync)
    yield


Plant = Callable[[pytest.MonkeyPatch], Any]
FAULTS: dict[str, tuple[Plant, dict[str, Any]]] = {
    "Newton-Schulz on a slice": (_newton_schulz_on_a_slice, {}),
    "Newton-Schulz on a slice, replicated": (_newton_schulz_on_a_slice, {"placement": "replicated"}),
    "clip after Newton-Schulz": (_clip_after_newton_schulz, {"max_grad_norm": MAX_NORM}),
    "Newton-Schulz per micro-batch": (_newton_schulz_per_micro_batch, {}),
}


def _trained(group: dist.ProcessGroup, fault: str, planted: bool) -> tuple[Weights, int]:
    """(weights, matrices orthogonalized in the last step)."""
    plant, options = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch, plant(patch) if planted else nullcontext():
        model, optimizer = make(group, **options)
        train(group, model, optimizer, range(STEPS), NUM_MICRO)
        return weights(model, optimizer), optimizer.metrics()["ns_matrices"]


@pytest.mark.promise("Planted faults", "Newton-Schulz on a slice (planted)")
@pytest.mark.promise("Planted faults", "clip after Newton-Schulz (planted)")
@pytest.mark.promise(
    "Planted faults",
    'Newton-Schulz once a micro-batch (planted); `metrics()["ns_matrices"]` tells it too',
)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_mathematics_are_seen(spawn, fault: str) -> None:
    """The unplanted run equals the oracle; the planted one is off by a thousand times the tolerance. A second
    Newton-Schulz shows in `metrics()["ns_matrices"]` as well."""
    oracle = reference(max_norm=FAULTS[fault][1].get("max_grad_norm"))
    norms = [float(oracle.step(loss_fn, make_batches(step, 3, NUM_MICRO))) for step in range(STEPS)]
    assert min(norms) > 1.1 * MAX_NORM, "or else nothing is clipped"
    right, wrong = (spawn(_trained, 3, fault=fault, planted=planted) for planted in (False, True))
    assert_equals_reference(right[0][0], oracle.weights)
    off, fqn = errors(wrong[0][0], oracle.weights, Standing().state_dict())[1]
    print(f"\n{fault}: {off:.2g} of the update ({fqn})")
    assert off > 1000 * REL_UPDATE
    matrices = num_logical_matrices(Standing())
    if FAULTS[fault][1].get("placement") != "replicated":
        assert sum(count for _, count in right) == matrices
        assert sum(count for _, count in wrong) == matrices * (NUM_MICRO if "micro" in fault else 1)


# --------------------------------------------------------------------------------------- one rank is odd


def _without_a_common_verdict(what: str) -> Callable[..., verdict.Verdict]:
    """`verdict.judge` as if this rank were alone in "verdict" or in "presence"."""
    judge = verdict.judge

    def alone(grad_shards: Any, adamw_grads: Any, present: Any, group: Any, *rest: Any, **more: Any) -> verdict.Verdict:
        judged = judge(grad_shards, adamw_grads, present, group, *rest, **more)
        if what == "presence":
            return replace(judged, present=list(present))
        mine = torch.stack([torch.isfinite(shard).all() for shard in grad_shards]).all()
        return replace(judged, ok=mine, ok_on_host=None)  # as on a GPU, where a rank that skips still exchanges

    return alone


def _odd_rank(group: dist.ProcessGroup, odd: str, planted: bool) -> tuple[Weights, int]:
    """In step `POISONED` the last rank has an infinite gradient ("verdict") or none at all for the picture's weights
    ("presence"): (weights, skipped steps)."""
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    with pytest.MonkeyPatch.context() as patch:
        if planted:
            patch.setattr(verdict, "judge", _without_a_common_verdict(odd))
        model, optimizer = make(group)
        for step in range(STEPS):
            is_odd = rank == last and step == POISONED
            loss = loss_fn(model, make_batch(step, rank, 0, image=not (is_odd and odd == "presence")))
            if is_odd and odd == "verdict":
                loss = loss + model.up.weight[0, 0] * torch.inf
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model, optimizer), optimizer.metrics()["skipped_steps"]


@pytest.mark.promise("Planted faults", "infinite gradient on one rank, with each rank judging for itself (planted)")
@pytest.mark.promise("Planted faults", "no gradient on one rank, with each rank judging for itself (planted)")
@pytest.mark.parametrize("odd", ["verdict", "presence"])
def test_verdict_and_presence_are_those_of_all_ranks(spawn, odd: str) -> None:
    """An infinite or a missing gradient on one rank; judged by each rank for itself, the weights go wrong."""
    oracle = reference()
    for step in range(STEPS):
        batches = [
            [make_batch(step, rank, 0, image=odd == "verdict" or (rank, step) != (2, POISONED))] for rank in range(3)
        ]
        if odd == "presence" or step != POISONED:
            oracle.step(loss_fn, batches)
    right, wrong = (spawn(_odd_rank, 3, odd=odd, planted=planted) for planted in (False, True))
    for ends, skipped in right:
        assert_equals_reference(ends, oracle.weights)
        assert skipped == (odd == "verdict")
    off, _ = errors(wrong[0][0], oracle.weights, Standing().state_dict())[1]
    assert not off <= 1000 * REL_UPDATE  # NaN is off, too
    assert odd == "presence" or len({skipped for _, skipped in wrong}) == 2, "some ranks skip, others do not"


# ----------------------------------------------------------------------------------- buffers in flight


OPTIONS: list[dict[str, Any]] = [
    {},
    {"overlap": False},
    {"overlap": "forward", "release_grads": True},
    {"param_gather": "updates"},
    {"packing": "contiguous", "placement": "replicated", "release_grads": True},
]


def _late(group: dist.ProcessGroup, cases: list[dict[str, Any]], fault: str = "") -> list[tuple[str, str, int]]:
    """For each of the options the digests of weights and state after late collectives, and how many those were."""
    found = []
    for options in cases:
        with late_collectives() as late, pytest.MonkeyPatch.context() as patch:
            if fault:
                BUFFER_FAULTS[fault](patch)
            model, optimizer = make(group, **options)
            train(group, model, optimizer, range(STEPS), NUM_MICRO)
            found.append((digest(weights(model, optimizer)), digest(state_tensors(optimizer)), late.started))
    return found


def _on_time(group: dist.ProcessGroup, cases: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = []
    for options in cases:
        model, optimizer = make(group, **options)
        train(group, model, optimizer, range(STEPS), NUM_MICRO)
        found.append((digest(weights(model, optimizer)), digest(state_tensors(optimizer))))
    return found


@pytest.mark.promise(
    "Planted faults",
    "a buffer freed, overwritten, reused or read while its collective is in flight (planted): every "
    "collective runs as late as it may, in `wait`",
)
def test_collectives_as_late_as_may_be_change_no_bit(spawn) -> None:
    """Every buffer lives and rests until its collective was waited for, and nobody reads a result before."""
    late, on_time = spawn(_late, 3, cases=OPTIONS), spawn(_on_time, 3, cases=OPTIONS)
    for rank in range(3):
        for options, mine, wanted in zip(OPTIONS, late[rank], on_time[rank], strict=True):
            assert mine[:2] == wanted, options
            assert mine[2] > 10 * STEPS, "or else nothing was late"


def _drop_what_pending_holds(patch: pytest.MonkeyPatch) -> None:
    pending = collectives.Pending

    def forgetful(result: Tensor, works: Any = (), holds: Any = (), *rest: Any, **named: Any) -> collectives.Pending:
        return pending(result, works, (), *rest, **named)

    patch.setattr(collectives, "Pending", forgetful)


def _overwrite_what_is_sent(patch: pytest.MonkeyPatch) -> None:
    start = collectives.DataParallelGroup.start_all_to_all

    def reused(self: Any, output: Tensor, input: Tensor, *rest: Any, **named: Any) -> collectives.Pending:
        pending = start(self, output, input, *rest, **named)
        input.fill_(0.5)  # as if the next bucket's pieces came into the same memory
        return pending

    patch.setattr(collectives.DataParallelGroup, "start_all_to_all", reused)


def _read_before_it_arrived(patch: pytest.MonkeyPatch) -> None:
    send = matrix_exchange.MatrixExchange._send

    def early(self: Any, *given: Any) -> collectives.Pending:
        pending = send(self, *given)
        pending.holds += (pending.result,)
        pending.result = pending.result.clone()
        return pending

    patch.setattr(matrix_exchange.MatrixExchange, "_send", early)


def _release_before_it_was_sent(patch: pytest.MonkeyPatch) -> None:
    finish = bucket.Bucket.finish_reduce

    def eager(self: Any) -> None:
        if self.grads is bucket.Grads.REDUCING:
            self.storage.grad_buffer.flat.zero_()
        finish(self)

    patch.setattr(bucket.Bucket, "finish_reduce", eager)


BUFFER_FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "freed": _drop_what_pending_holds,
    "overwritten": _overwrite_what_is_sent,
    "read early": _read_before_it_arrived,
    "gradients reused": _release_before_it_was_sent,
}


def _fault_is_seen(group: dist.ProcessGroup, fault: str) -> tuple[bool, str]:
    """(whether the bits stay right, what was raised). In a group of two of its own: an error closes its connections."""
    own = dist.new_group([0, 1])
    if dist.get_rank(group) > 1:
        return False, ""
    wanted = _on_time(own, [{}])[0]
    try:
        return _late(own, [{}], fault)[0][:2] == wanted, ""
    except RuntimeError as error:
        return False, f"{error} {error.__cause__}"


@pytest.mark.promise(
    "Planted faults",
    "a buffer freed, overwritten, reused or read while its collective is in flight (planted): every "
    "collective runs as late as it may, in `wait`",
)
@pytest.mark.parametrize("fault", BUFFER_FAULTS)
def test_a_buffer_freed_or_used_too_early_is_seen(spawn, fault: str) -> None:
    for right, raised in spawn(_fault_is_seen, 4, fault=fault)[:2]:
        assert not right
        assert ("freed while its collective was in flight" in raised) == (fault == "freed")


# ------------------------------------------------------------------------------- momentum's dtype on load


def _kept_dtypes(optimizer: Any) -> dict[str, tuple[torch.dtype, int]]:
    return {
        f"{piece.segment}.{key}": (value.dtype, value.numel())
        for bucket in optimizer._engine.storage.buckets
        for piece in bucket.muon + bucket.adamw
        for key, value in piece.state.items()
    }


def _loaded_into(group: dist.ProcessGroup, folder: str, dtype: torch.dtype, way: str, planted: bool) -> Any:
    """State saved in float32 is loaded where momentum is kept in `dtype`: (dtypes stay, bytes stay)."""
    source, source_optimizer = make(group)
    train(group, source, source_optimizer, [0])
    model, optimizer = make(group, momentum_dtype=dtype)
    train(group, model, optimizer, [5])
    before, held = _kept_dtypes(optimizer), optimizer.metrics()["state_bytes"]
    with pytest.MonkeyPatch.context() as patch:
        if planted:
            _adopts_the_saved_dtype(patch)
        if way == "plain":
            optimizer.load_state_dict(source_optimizer.state_dict())
        else:
            distmuon.save_checkpoint(folder, source, source_optimizer)
            distmuon.load_checkpoint(folder, model, optimizer)
    return _kept_dtypes(optimizer) == before, optimizer.metrics()["state_bytes"] == held


def _adopts_the_saved_dtype(patch: pytest.MonkeyPatch) -> None:
    from distmuon.checkpoint import tensors as sharded

    def write(bucket: Any, piece: Any, key: str, value: Tensor) -> None:
        if key == "master":
            bucket.write_master(piece, value)
        else:
            piece.state[key] = value.clone()

    patch.setattr(sharded, "write_value", write)


@pytest.mark.promise("Planted faults", "momentum's dtype changed by a load (planted)")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("way", ["plain", "checkpoint"])
def test_a_load_keeps_the_dtype_of_momentum(spawn, tmp_path: Path, way: str, dtype: torch.dtype) -> None:
    """Loading float32 momentum must not turn a bfloat16 or int8 one into float32, as torch.optim's loaders may."""
    assert spawn(_loaded_into, 2, folder=str(tmp_path / "1"), dtype=dtype, way=way, planted=False) == [(True, True)] * 2
    if way == "checkpoint":
        wrong = spawn(_loaded_into, 2, folder=str(tmp_path / "2"), dtype=dtype, way=way, planted=True)
        assert not any(same for same, _ in wrong)
