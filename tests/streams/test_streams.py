"""Streams, memory and host waits on a modelled GPU: nothing is found in DistMuon, and planted faults are.

What the model knows and does not know is said in `model.py`. `docs/gpu.md` quotes what is found here.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.comm.group import DataParallelGroup, _timeout_of
from distmuon.layout import layout
from distmuon.layout.layout import Layout
from launch.ranks import Ranks
from tests.streams.collectives import one_rank
from tests.streams.model import DEVICE, Fault, Gpu
from tests.streams.programs import (
    Program,
    calls,
    late_evaluation,
    run,
    states,
    two_backward_streams,
    two_forward_streams,
)

PROGRAMS = (calls, two_backward_streams, late_evaluation, two_forward_streams, states)
RELEASED: dict[str, Any] = {"release_grads": True}
SHORT: dict[str, Any] = {"reduce_dtype": torch.bfloat16}
LEVELS: dict[str, Any] = {**SHORT, "gpus_per_node": 2}  # with four ranks; two are one node
HOPS: dict[str, Any] = {"gpus_per_node": 2, "packing": "contiguous"}  # matrices cross nodes
FORWARD: dict[str, Any] = {"overlap": "forward"}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "serial": {"overlap": False},
    "forward": FORWARD,
    "released": RELEASED,
    "bfloat16 reduction": SHORT,
    "bfloat16 reduction, released": {**SHORT, **RELEASED},
    "bfloat16 reduction, serial": {**SHORT, "overlap": False},
    "two levels": LEVELS,
    "two levels, released": {**LEVELS, **RELEASED},
    "two hops": HOPS,
    "two hops, serial": {**HOPS, "overlap": False},
    "two hops, bfloat16 reduction": {**HOPS, **SHORT, **FORWARD},
    "two hops, exchange group": {**HOPS, "own_exchange_group": True, **FORWARD},
    "updates": {"param_gather": "updates", **FORWARD},
    "int8": {"momentum_dtype": torch.int8},
    "bfloat16": {"dtype": torch.bfloat16, **FORWARD},
    "remainder": {"dtype": torch.bfloat16, "master_format": "remainder"},
    "contiguous": {"packing": "contiguous", **FORWARD},
    "replicated": {"placement": "replicated", "packing": "contiguous"},
    "exchange group": {"own_exchange_group": True, **FORWARD},
    "clipped": {"max_grad_norm": 0.5, **RELEASED},
}
DAILY = [
    (calls, "default"),
    (calls, "bfloat16 reduction, released"),
    (calls, "updates"),
    (calls, "remainder"),
    (calls, "exchange group"),
    (two_backward_streams, "bfloat16 reduction"),
    (two_backward_streams, "released"),
    (two_backward_streams, "two levels"),
    (two_backward_streams, "two levels, released"),
    (late_evaluation, "forward"),
    (two_forward_streams, "forward"),
    (states, "remainder"),
    (calls, "two hops"),
    (late_evaluation, "two hops, exchange group"),
    (two_forward_streams, "two hops, bfloat16 reduction"),
]


@pytest.fixture(autouse=True)
def _second_hops_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two nodes all exchanges take two hops, though the matrices are small."""
    monkeypatch.setattr(layout, "_SECOND_HOP", -inf)


def _name(value: object) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", "")


@pytest.mark.parametrize(("program", "options"), DAILY, ids=_name)
def test_nothing_is_found(program: Callable[[Program], None], options: str) -> None:
    gpu, _ = run(program, 1, 4, **OPTIONS[options])
    assert not gpu.errors


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "dp_size"), [(0, 2), (3, 4)])
@pytest.mark.parametrize("program", PROGRAMS, ids=_name)
def test_nothing_is_found_under_any_option(program: Callable[[Program], None], rank: int, dp_size: int) -> None:
    found = {name: run(program, rank, dp_size, **options)[0].errors for name, options in OPTIONS.items()}
    assert not any(found.values()), found


FAULTS: list[tuple[Fault, Callable[[Program], None], dict[str, Any]]] = [
    (("group.py", "start_aside"), two_backward_streams, SHORT),  # no wait of the reduction's own stream
    (("group.py", "start_aside"), two_backward_streams, LEVELS),
    (("group.py", "start_aside"), late_evaluation, HOPS),  # no wait of the exchange's own stream
    (("matrix_exchange.py", "go_on"), late_evaluation, HOPS),  # that stream does not wait for the second hop
    (("matrix_exchange.py", "wait"), late_evaluation, HOPS),  # the step does not wait for that stream
    (("group.py", "go_between_nodes"), late_evaluation, LEVELS),  # that stream does not wait for the second level
    (("bucket.py", "finish_reduce"), late_evaluation, LEVELS),  # the step does not wait for that stream
    (("grad_buffer.py", "_open"), two_backward_streams, SHORT),  # a second stream of backward does not wait
    (("grad_buffer.py", "_open_sum"), two_backward_streams, SHORT),  # no record_stream of what a sum replaces
    (("grad_buffer.py", "close"), two_backward_streams, {}),  # the reduction does not wait for all that wrote
    (("grad_buffer.py", "_free_from_streams"), two_backward_streams, RELEASED),  # no wait before memory is released
    (("param_gather.py", "arrived"), late_evaluation, FORWARD),  # the step's stream does not follow the first
    (("param_gather.py", "follow"), two_forward_streams, FORWARD),  # nor does a third stream
    (("param_gather.py", "wait"), late_evaluation, FORWARD),
    (("bucket.py", "finish_reduce"), late_evaluation, {}),
    (("matrix_exchange.py", "wait"), late_evaluation, {}),
    (("verdict.py", "judge"), late_evaluation, {}),
    (("engine.py", "read"), late_evaluation, {}),  # the host reads a flag that may not have arrived
]


@pytest.mark.promise(
    "Planted faults", "a wait between two streams of a GPU, or a `record_stream`, that is left out (planted)"
)
@pytest.mark.parametrize(("fault", "program", "options"), FAULTS, ids=_name)
def test_a_wait_that_is_left_out_is_seen(
    fault: Fault, program: Callable[[Program], None], options: dict[str, Any]
) -> None:
    gpu, _ = run(program, 1, 4, fault=fault, **options)
    assert gpu.left_out_waits and gpu.errors
    kind = "freed too early" if fault[1] == "_open_sum" else ""
    assert all(kind in error for error in gpu.errors)


def test_a_pending_that_lets_go_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The works of the model hold no tensor, so what a collective sends must be held by its `Pending`."""
    make = DataParallelGroup._pending
    monkeypatch.setattr(DataParallelGroup, "_pending", lambda *args: make(*args[:3], (), *args[4:]))
    gpu, _ = run(late_evaluation, 1, 4)
    assert any("freed too early" in error and "_packed" in error for error in gpu.errors)


def test_a_gpu_without_kernels_takes_the_plain_forms() -> None:
    """Also in a step that is skipped; with kernels only last bits differ, and what follows where a bfloat16 parameter
    is rounded the other way."""
    ends: list[Tensor] = []

    def train(program: Program) -> None:
        calls(program)
        held = program.optimizer.full_state_dict()["state"]
        ends.append(torch.cat([state["master"].flatten() for state in held.values()]))

    for kernels in (True, False):
        gpu, _ = run(train, 0, 1, kernels=kernels, dtype=torch.bfloat16, ns_dtype=torch.float32)
        assert not gpu.errors
        assert gpu.launched == ({"absorb", "momentum", "weight"} if kernels else set())
    torch.testing.assert_close(ends[0], ends[1], rtol=0.0, atol=3e-3)


def _host_waits(**options: Any) -> tuple[list[str], int]:
    """Where the host waits over whole iterations once all is built, and how often it waits for an event in all.

    One iteration leaves parameters without a gradient.
    """
    found: list[str] = []

    def train(program: Program) -> None:
        for step in range(5):
            seen = len(program.gpu.host_waits)
            program.step(1 + step % 2, extra=step != 3, clip=0.5 if step > 2 else None)
            found.extend(program.gpu.host_waits[seen:] if step >= 2 else [])
        program.optimizer.synchronize()

    gpu, _ = run(train, 0, 4 if "gpus_per_node" in options else 2, **options)
    return found, gpu.event_waits


@pytest.mark.parametrize("options", ["default", "forward", "remainder", "two levels", "two hops"])
def test_the_host_never_waits_over_whole_iterations(options: str) -> None:
    """Except, once a step, for the flag that was sent in the step before."""
    assert _host_waits(**OPTIONS[options]) == ([], 4)


def test_a_host_wait_is_seen() -> None:
    """Telemetry reads the device."""
    waits, _ = _host_waits(telemetry_every=1)
    assert any("telemetry.py" in wait for wait in waits)


def test_the_recipe_puts_its_batches_on_the_device_without_a_wait() -> None:
    gpu = Gpu()
    with gpu.running():
        rows = torch.arange(6)
        there = Ranks(device=DEVICE).put(rows)
        assert there.is_cuda and not gpu.host_waits
        assert torch.equal(there.to("cpu"), rows)
        rows.to(DEVICE)
    assert len(gpu.host_waits) == 2, "the two that are pageable"


@pytest.mark.parametrize(
    ("dp_size", "options"),
    [(3, {"placement": "replicated", "packing": "contiguous"}), (4, LEVELS), (4, HOPS)],
    ids=["3", "levels", "hops"],
)
def test_all_ranks_start_the_same_collectives_with_matching_splits(dp_size: int, options: dict[str, Any]) -> None:
    logs = [run(late_evaluation, rank, dp_size, **options)[1].log for rank in range(dp_size)]
    exchanges = 0
    for entries in zip(*logs, strict=True):
        assert len({entry[:2] for entry in entries}) == 1
        if entries[0][0] != "all_to_all":
            assert len(set(entries)) == 1
            continue
        exchanges += 1
        sent, received = [entry[2] for entry in entries], [entry[3] for entry in entries]
        assert all(sent[a][b] == received[b][a] for a in range(dp_size) for b in range(dp_size))
    assert exchanges


def test_all_gathers_start_when_the_layout_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held back until the last bucket is done, they follow all exchanges; otherwise they lie between them."""

    def train(program: Program) -> None:
        program.step()
        program.optimizer.synchronize()

    orders = {}
    for held in (True, False):
        when = property(lambda made, held=held: [0 if held else n + 1 for n in range(len(made.buckets) - 1)] + [99])
        monkeypatch.setattr(Layout, "gathers_started", when)
        verbs = [entry[0] for entry in run(train, 1, 4, **FORWARD)[1].log]
        orders[held] = "all_to_all" in verbs[verbs.index("all_gather") :]
        assert verbs.count("all_gather") > 2
    assert orders == {True: False, False: True}


def test_agreements_on_nccl_wait_for_the_slowest_writer() -> None:
    """NCCL's usual limit is ten minutes; on gloo the group's own limit counts, however short."""
    for given, wanted in ((10, 30), (90, 90)):
        backend = SimpleNamespace(options=SimpleNamespace(_timeout=timedelta(minutes=given)))
        nccl: Any = SimpleNamespace(_device_types=["cuda"], _get_backend=lambda _, made=backend: made)
        assert _timeout_of(nccl) == timedelta(minutes=wanted)
    short = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timeout=timedelta(seconds=7))
    gloo: Any = SimpleNamespace(_device_types=["cpu"], _get_backend=lambda _: short)
    assert _timeout_of(gloo) == timedelta(seconds=7)


def test_wrong_layouts_and_splits_are_refused() -> None:
    gpu = Gpu()
    with one_rank(gpu, 1, 2):
        group = DataParallelGroup(None, lambda stage, size, far: None)
        whole = torch.zeros(8, device=DEVICE)
        group.start_reduce_scatter(whole[4:], whole, stage="test").wait()
        with pytest.raises(AssertionError, match="in place"):
            group.start_reduce_scatter(whole[:4], whole, stage="test")
        with pytest.raises(AssertionError, match="in place"):
            group.start_all_gather(whole, whole[2:6], stage="test")
        with pytest.raises(AssertionError, match="splits"):
            group.start_all_to_all(torch.zeros(3, device=DEVICE), whole, [1, 2], [3, 4], stage="test")
        with pytest.raises(AssertionError, match="serves no tensor of the CPU"):
            group.start_all_reduce(torch.zeros(2), stage="test")


def test_a_tensor_on_the_wrong_device_is_seen() -> None:
    gpu = Gpu()
    with gpu.running():
        here: Tensor = torch.zeros(4, device=DEVICE)
        here += torch.zeros(())  # a number of the host is an argument of the kernel
        assert not gpu.errors
        here += torch.zeros(4)
    assert gpu.errors and "placement" in gpu.errors[0]
