"""Telemetry says what one process would measure with `torch.linalg.svdvals`, whatever the cut, and changes nothing.

The expected numbers come from the oracle's weights before and after a step, never from distmuon's formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.math import spectra
from tests.distributed.test_meshes import (
    LR,
    MUON,
    SHAPES,
    _give,
    _gradients,
    _line,
    _locals,
    _make,
    _oracle,
    experts_and_fsdp2,
    hsdp,
    row_parallel,
    tensor_parallel_and_fsdp2,
)

STEPS = 4
DECAY = 0.1
MOMENTUM = 0.95


def fsdp2(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    torch.distributed.fsdp.fully_shard(model, mesh=_line(group))


def _matrices(name: str, whole: Tensor) -> list[Tensor]:
    """The logical matrices of the zoo's parameter."""
    if name == "fused":
        return list(whole.split(8, 0))
    if name == "wide":
        return list(whole.split([7, 5], 1))
    return list(whole) if name == "moe.experts" else [whole.flatten(1)]


def _entropy(matrix: Tensor) -> float:
    share = torch.linalg.svdvals(matrix.double()).square()
    share = share / share.sum()
    return float(-(share * share.log()).sum() / math.log(len(share)))


def _quantiles(matrix: Tensor) -> Tensor:
    values = torch.linalg.svdvals(matrix.double())
    return torch.stack([values.quantile(q) for q in (0.0, 0.25, 0.5, 0.75, 1.0)])


def _expected(missing: str = "") -> dict[str, dict[str, Any]]:
    """The record of the last step."""
    oracle = _oracle()
    for step in range(STEPS):
        before = {name: weight.clone() for name, weight in oracle.weights.items()}
        grads = {name: grad for name, grad in _gradients(step).items() if name != missing}
        oracle.apply(grads)
    expected: dict[str, dict[str, Any]] = {}
    for name, old in before.items():
        update = (old * (1 - LR * DECAY) - oracle.weights[name]) / LR
        rms, size = float(update.double().square().mean().sqrt()), float(old.double().square().mean().sqrt())
        numbers = {"update_rms": rms, "weight_rms": size, "update_to_weight": LR * rms / size}
        expected[name] = {"rule": "muon" if name in MUON else "adamw", "shape": list(SHAPES[name]), **numbers}
        if name not in MUON or name == missing:
            continue
        momentum = (1 - MOMENTUM) * grads[name] + MOMENTUM * oracle.state[name]["momentum_buffer"]
        polar = [part / (0.2 * math.sqrt(max(part.shape))) for part in _matrices(name, update)]

        def mean(values: list[Any]) -> Any:
            return sum(values) / len(values)

        expected[name] |= {
            "residual": mean(
                [float((torch.linalg.svdvals(o.double()).square() - 1).square().mean().sqrt()) for o in polar]
            ),
            "momentum_entropy": mean([_entropy(part) for part in _matrices(name, momentum)]),
            "update_entropy": mean([_entropy(o) for o in polar]),
            "weight_entropy": mean([_entropy(part) for part in _matrices(name, old)]),
            "update_singular_values": mean([_quantiles(o) for o in polar]).tolist(),
            "weight_singular_values": mean([_quantiles(part) for part in _matrices(name, old)]).tolist(),
        }
    return expected


def _run(group: dist.ProcessGroup, cut: Callable[..., None] | None, every: int = STEPS, **options: Any) -> Any:
    external = {} if cut is not None else {"grad_reduction": "external", "process_group": group}
    model, optimizer = _make(group, cut, telemetry_every=every, **external, **options)
    records, sent = [], []
    for step in range(STEPS):
        _give(model, _gradients(step))
        optimizer.step()
        records.append(optimizer.telemetry())
        sent.append(optimizer.metrics()["bytes"])
    return records, sent, _locals(model)


@pytest.mark.parametrize(
    ("cut", "size", "options"),
    [
        (None, 1, {}),
        (None, 2, {}),
        (None, 4, {}),
        (None, 3, {"packing": "contiguous"}),
        (None, 3, {"packing": "contiguous", "placement": "replicated"}),
        (None, 2, {"overlap": "forward"}),
        (None, 2, {"param_gather": "updates"}),
        (fsdp2, 2, {}),
        (fsdp2, 4, {}),
        (hsdp, 4, {}),
        (row_parallel, 2, {}),
        (tensor_parallel_and_fsdp2, 4, {}),
        (experts_and_fsdp2, 4, {}),
    ],
)
def test_every_cut_measures_what_one_process_would(spawn, cut: Any, size: int, options: dict[str, Any]) -> None:
    expected = _expected()
    for records, sent, _ in spawn(_run, size, cut=cut, **options):
        assert records[:-1] == [None] * (STEPS - 1)
        assert set(records[-1]) == set(expected)
        for name, wanted in expected.items():
            assert list(records[-1][name]) == list(wanted), name
            for key, value in wanted.items():
                exact = key in ("rule", "shape")
                assert records[-1][name][key] == (value if exact else pytest.approx(value, rel=2e-4, abs=2e-5)), (
                    name,
                    key,
                )
        # Weights travel as the momentum does, and in no other step.
        assert [step.get("telemetry", 0) for step in sent[:-1]] == [0] * (STEPS - 1)
        assert sent[-1].get("telemetry", 0) == sent[-1].get("dp_gather", 0)


@pytest.mark.parametrize("cut", [None, fsdp2])
def test_telemetry_changes_no_bit(spawn, cut: Any) -> None:
    with_it = spawn(_run, 2, cut=cut, every=1)
    without = spawn(_run, 2, cut=cut, every=0)
    for (records, _, weights), (none, _, plain) in zip(with_it, without):
        assert None not in records
        assert none == [None] * STEPS
        assert all(torch.equal(weights[name][1], plain[name][1]) for name in plain)
    assert with_it[0][0] == with_it[1][0], "all ranks have the same record"


def _skipped(group: dist.ProcessGroup) -> Any:
    model, optimizer = _make(group, None, telemetry_every=1, grad_reduction="external", process_group=group)
    found = []
    for broken in (False, True, False):
        grads = _gradients(0)
        if broken:
            grads["bias"][2] = float("nan")
        _give(model, grads)
        optimizer.step()
        found.append(optimizer.telemetry() is not None)
    return found


def test_a_skipped_step_leaves_no_telemetry(spawn) -> None:
    assert spawn(_skipped, 2) == [[True, False, True]] * 2


def _without_gradient(group: dist.ProcessGroup, missing: str) -> Any:
    model, optimizer = _make(group, None, telemetry_every=STEPS, grad_reduction="external", process_group=group)
    for step in range(STEPS):
        _give(model, _gradients(step))
        model.get_parameter(missing).grad = None
        optimizer.step()
    return optimizer.telemetry()


@pytest.mark.parametrize("missing", ["tall", "table"])
def test_a_parameter_without_a_gradient_has_no_update(spawn, missing: str) -> None:
    for record in spawn(_without_gradient, 2, missing=missing):
        assert record.get(missing, {"update_rms": 0.0})["update_rms"] == 0.0
        expected = _expected(missing)
        assert record["fused"]["update_rms"] == pytest.approx(expected["fused"]["update_rms"], rel=1e-4)


def _broken(group: dist.ProcessGroup, cut: Any, options: dict[str, Any]) -> Any:
    """The gradient of one rank is broken, in two parameters; the reduction and the cut spread it."""
    model, optimizer = _make(group, cut, **options, **({} if cut is not None else {"process_group": group}))
    found = []
    for broken in ({}, {"tall": float("nan"), "bias": float("inf")}, {}):
        if cut is None and options.get("grad_reduction") != "external":
            loss = torch.zeros(())
            for name, param in model.named_parameters():
                grad = _gradients(0)[name]
                if group.rank() == group.size() - 1 and name in broken:
                    grad.view(-1)[-1] = broken[name]
                loss = loss + (param * grad).sum()
            loss.backward()
        else:
            grads = _gradients(0)
            for name, value in broken.items():
                grads[name].view(-1)[-1] = value
            _give(model, grads)
        optimizer.step()
        found.append((optimizer.overflow, optimizer.not_finite()))
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize(
    ("cut", "size", "options"),
    [
        (None, 1, {}),
        (None, 2, {}),
        (None, 3, {"release_grads": True, "packing": "contiguous"}),
        (None, 2, {"max_grad_norm": 1.0, "reduce_dtype": torch.bfloat16}),
        (None, 2, {"grad_reduction": "external"}),
        (fsdp2, 2, {}),
        (tensor_parallel_and_fsdp2, 4, {}),
    ],
)
def test_gradients_that_are_not_finite_have_a_name(spawn, cut: Any, size: int, options: dict[str, Any]) -> None:
    for found in spawn(_broken, size, cut=cut, options=options):
        assert found[0] == found[2] == (False, [])
        skipped, names = found[1]
        assert skipped
        assert sorted(names) == ["bias", "tall"]


@pytest.mark.parametrize(
    ("matrix", "entropy", "residual"),
    [
        (torch.eye(4, 6), 1.0, 0.0),
        (torch.ones(3, 5), 0.0, None),
        (torch.zeros(3, 5), 0.0, 1.0),
        (torch.ones(1, 7) / math.sqrt(7), 0.0, 0.0),
        (2 * torch.eye(3), 1.0, 3.0),
    ],
)
def test_the_entropy_of_known_matrices(matrix: Tensor, entropy: float, residual: float | None) -> None:
    values = spectra.singular_values(matrix)
    assert float(spectra.svd_entropy(values)) == pytest.approx(entropy, abs=1e-7)
    if residual is not None:
        assert float(spectra.orthogonality_residual(values)) == pytest.approx(residual, abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4)])
def test_singular_values_are_those_of_an_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    wanted = torch.linalg.svdvals(matrix.double()).flip(0)
    torch.testing.assert_close(spectra.singular_values(matrix), wanted, rtol=1e-7, atol=1e-7)
