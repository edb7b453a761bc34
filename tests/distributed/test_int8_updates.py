"""Updates that travel in int8: the values of one process that rounds whole matrices, whatever the cut."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distmuon
from distmuon.math.newton_schulz import orthogonalize
from distmuon.planning.plan import plan
from tests.distributed.test_options import _ends
from tests.standing import Standing, logical_matrices, rules
from tests.training import EXACT, Weights, digest, errors, hand_gradients, make, policies, weights

INT8: dict[str, Any] = {"param_gather": "updates", "updates_dtype": torch.int8}
PLAIN: dict[str, Any] = {"param_gather": "updates"}
STEPS, DECAY, MU = 4, 0.1, 0.95


def by_hand(polar: Tensor, wire: torch.dtype) -> Tensor:
    """Round a whole matrix, block after block and in Python's numbers where they are few."""
    flat = polar.float().reshape(-1).tolist()
    found = []
    for low in range(0, len(flat), 256):
        block = flat[low : low + 256]
        largest = max(map(abs, block))
        if not math.isfinite(sum(block)):
            found += [math.nan] * len(block)
            continue
        power = math.floor((math.frexp(largest)[1] - 1) / 2) if largest else -50
        scale = 4.0 ** max(power, -50)
        for value in block:
            root = torch.tensor(64 * math.sqrt(abs(value) / scale))  # in float32, or one in 100,000 codes would differ
            code = min(127, round(root.item()))
            found.append(math.copysign(scale * (code / 64) ** 2, value))
    return torch.tensor(found, dtype=torch.float64).to(wire).view(polar.shape)


def _gradients(step: int) -> Weights:
    """The same on every rank, few bits, and threes, so that their mean over one to four ranks is exact.

    Columns, and rows, differ by powers of two, or else all blocks would have the same scale.
    """
    generator = torch.Generator().manual_seed(step)
    found = {}
    for fqn, grad in hand_gradients(Standing(), step, 0).items():
        found[fqn] = 3 * (8 * grad).round()
        for dim in range(grad.ndim):
            sizes = [size if d == dim else 1 for d, size in enumerate(grad.shape)]
            found[fqn] *= torch.randint(-4, 5, sizes, generator=generator).float().exp2()
    return found


@cache
def _loop(ns_dtype: torch.dtype, wire: torch.dtype) -> Weights:
    """The oracle: Muon in one process, one matrix after another."""
    params = dict(Standing().named_parameters())
    muon = [fqn for fqn, rule in rules(Standing()).items() if rule == "muon"]
    kept = {fqn: params[fqn].detach().clone() for fqn in muon}
    momentum = {fqn: torch.zeros_like(kept[fqn]) for fqn in muon}
    for step in range(STEPS):
        grads = _gradients(step)
        for fqn in muon:
            momentum[fqn] = torch.lerp(momentum[fqn], grads[fqn], 1 - MU)
            update = torch.lerp(grads[fqn], momentum[fqn], MU)
            for weight, u in zip(logical_matrices(fqn, kept[fqn]), logical_matrices(fqn, update)):
                polar = orthogonalize(u[None].to(wire), steps=5, coefficients="jordan", dtype=ns_dtype)[0]
                rounded = by_hand(polar, wire).float()
                scale = 0.2 * math.sqrt(max(weight.shape))
                weight.copy_(weight * (1 - EXACT["lr"] * DECAY) + rounded * (-EXACT["lr"] * scale))
    return kept


def _train(group: dist.ProcessGroup | None, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        for fqn, grad in _gradients(step).items():
            model.get_parameter(fqn).grad = grad
        optimizer.step()
        optimizer.zero_grad()


def _trained(group: dist.ProcessGroup | None, cases: list[dict[str, Any]]) -> list[Weights]:
    found = []
    for case in cases:
        model, optimizer = make(group, Standing(), **{**INT8, **case})
        _train(group, model, optimizer, range(STEPS))
        found.append(weights(model, optimizer))
    return found


def _digest(found: Weights) -> str:
    """Of the parameters under Muon."""
    return digest({fqn: found[fqn] for fqn, rule in rules(Standing()).items() if rule == "muon"})


WAYS = [
    {"packing": packing, "placement": placement}
    for packing, placement in itertools.product(("balanced", "contiguous"), ("owner", "replicated"))
]


@pytest.mark.parametrize(
    ("dp_size", "ns_dtype", "wire"),
    [
        (1, torch.float32, torch.bfloat16),
        (2, torch.bfloat16, torch.bfloat16),
        (3, torch.float32, torch.bfloat16),
        (4, torch.float32, torch.float32),
    ],
)
def test_weights_are_those_of_one_process(spawn, dp_size: int, ns_dtype: torch.dtype, wire: torch.dtype) -> None:
    """On every rank, with pieces that are cut by rows and inside them; matrices have few whole blocks here."""
    wanted = _digest(_loop(ns_dtype, wire))
    cases = [{"ns_dtype": ns_dtype, "exchange_dtype": wire, **way} for way in WAYS]
    for found in spawn(_trained, dp_size, timeout=150, cases=cases):
        assert [_digest(case) for case in found] == [wanted] * len(WAYS)


def test_what_changes_no_bit_changes_none_of_theirs(spawn) -> None:
    """Overlap, released gradients and an exchange group, over a skipped step and a forgotten backward."""
    others = [{"overlap": "forward"}, {"overlap": False, "release_grads": True}, {"own_exchange_group": True}]
    by_rank = spawn(_ends, 3, cases=[PLAIN, INT8, *({**INT8, **other} for other in others)])
    assert all(ends == by_rank[0] for ends in by_rank)
    plain, *ends = by_rank[0]
    assert len(set(ends)) == 1 and ends[0] != plain


VARIANTS: list[dict[str, Any]] = [
    {},
    {"normuon_beta2": 0.95},
    {"cautious_weight_decay": True},
    {"momentum_dtype": torch.int8},
    {"telemetry_every": 1},
]


def test_their_error_under_each_variant_of_the_rule(spawn) -> None:
    """Against updates in bfloat16, of the worst parameter, relative to what four steps moved it. Elements that are
    rounded to zero decay under cautious weight decay."""
    cases = [{"ns_dtype": None, **variant, **form} for variant in VARIANTS for form in ({}, {"updates_dtype": None})]
    found = spawn(_trained, 3, timeout=150, cases=cases)
    assert all(_digest(a) == _digest(b) for rank in found for a, b in zip(rank, found[0]))
    for variant, got, wanted in zip(VARIANTS, found[0][::2], found[0][1::2]):
        _, (worst, fqn) = errors(got, wanted, Standing().state_dict())
        print(f"\n{variant}: {worst:.2%} of the update ({fqn})")
        assert 0.001 < worst < 0.02


def _resumed(group: dist.ProcessGroup, folder: str, steps: range) -> Weights:
    model, optimizer = make(group, Standing(), **INT8)
    if steps.start:
        distmuon.load_checkpoint(folder, model, optimizer)
    _train(group, model, optimizer, steps)
    distmuon.save_checkpoint(Path(folder) / str(steps.stop), model, optimizer)
    return weights(model, optimizer)


def test_a_run_goes_on_at_another_number_of_ranks(spawn, tmp_path: Path) -> None:
    """With the bits of the unbroken loop, since checkpoints do not know in which format updates travelled."""
    spawn(_resumed, 3, folder=str(tmp_path), steps=range(2))
    wanted = _digest(_loop(torch.float32, torch.float32))
    assert {_digest(found) for found in spawn(_resumed, 2, folder=str(tmp_path), steps=range(2, STEPS))} == {wanted}


def _odd(group: dist.ProcessGroup, option: dict[str, Any]) -> tuple[Weights, Weights]:
    """Weights after a step with NaN in one momentum, and no gradient but zeros for `square.weight`; and before it."""
    model, optimizer = make(group, Standing(), **option)
    _train(group, model, optimizer, range(1))
    before = weights(model, optimizer)
    for value in joined(optimizer.state[model.down.weight].get("momentum_buffer", ())):
        value.view(-1)[:1] = math.nan
    for state in (optimizer.state[model.square.weight], optimizer.state[model.up.weight]):
        for value in joined(state.get("momentum_buffer", ())):
            value.zero_()
    for fqn, grad in _gradients(1).items():
        model.get_parameter(fqn).grad = grad
    model.square.weight.grad.zero_()
    model.up.weight.grad[1::2] = 0.0
    optimizer.step()
    return before, weights(model, optimizer)


def joined(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_zeros_and_nans_arrive_as_in_the_dtype_of_the_exchange(spawn) -> None:
    """A matrix or a row without an update decays and no more, with the same bits; NaN in a momentum is not hidden."""
    plain, int8 = (spawn(_odd, 3, option={"packing": "contiguous", **option}) for option in (PLAIN, INT8))
    assert _digest(int8[0][1]) == _digest(int8[1][1]) == _digest(int8[2][1])
    (_, found), (_, wanted) = int8[0], plain[0]
    assert not found["down.weight"].isfinite().any() and not wanted["down.weight"].isfinite().any()
    for fqn, value in found.items():
        assert torch.equal(value.isfinite(), wanted[fqn].isfinite()), fqn
    before = int8[0][0]
    decayed = 1 - EXACT["lr"] * DECAY
    assert torch.equal(found["square.weight"], before["square.weight"] * decayed)
    assert torch.equal(found["up.weight"][1::2], before["up.weight"][1::2] * decayed)
    assert not torch.equal(found["up.weight"][::2], before["up.weight"][::2] * decayed)


@pytest.mark.parametrize(("reduce", "most"), [(torch.float32, 5.1), (torch.bfloat16, 3.1)])
def test_five_bytes_an_element_and_three(reduce: torch.dtype, most: float) -> None:
    """All that the busiest rank of eight sends, over 7/8 of the elements; 3 % of them are AdamW's, in float32."""
    found = plan("llama-70b", dp_size=8, param_dtype=torch.float32, **policies(**INT8, reduce_dtype=reduce))
    adamw = next(other for other in found.others if other.way == "adamw")
    elements = adamw.stage_bytes("all_gather") / 4
    assert most - 0.01 < found.sent / elements < most
