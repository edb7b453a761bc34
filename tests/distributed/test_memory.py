"""What ranks compare before rank 0's values are sent, how every kind of tensor is sent, strides on several ranks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from tests.training import digest, hand_gradients, make, state_tensors, train, weights
from tests.unit.test_memory import Mixed, Named, Sum, _in


class Carrier(nn.Module):
    """A linear layer that trains, and what the test gives it beside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _buffer(value: Tensor) -> Carrier:
    model = Carrier()
    model.register_buffer("cache", value)
    return model


def _frozen(value: Tensor) -> Carrier:
    model = Carrier()
    model.base = nn.Parameter(value, requires_grad=False)
    return model


def _step(model: nn.Module, optimizer: distmuon.DistMuon) -> None:
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.synchronize()


# ------------------------------------------------------------------------------------- what differs is named


def _none() -> Carrier:
    return Carrier()


UNLIKE: dict[str, tuple[Callable[[], Carrier], Callable[[], Carrier], str]] = {
    "length": (
        lambda: _buffer(torch.ones(9)),
        lambda: _buffer(torch.ones(6)),
        r"cache: rank 1 holds a buffer \(6,\) torch\.float32 on cpu, rank 0 a buffer \(9,\) .*broadcast_buffers=False",
    ),
    "dtype": (
        lambda: _buffer(torch.ones(4)),
        lambda: _buffer(torch.ones(4).int()),
        r"cache: rank 1 holds a buffer \(4,\) torch\.int32 on cpu, rank 0 a buffer \(4,\) torch\.float32 on cpu",
    ),
    "only on one": (
        lambda: _frozen(torch.ones(4)),
        _none,
        "base: rank 1 holds nothing of this name, rank 0 a parameter ",
    ),
    "only on another": (_none, lambda: _frozen(torch.ones(4)), "base: rank 1 holds a parameter .*, rank 0 nothing"),
    "elements of a sparse one": (
        lambda: _buffer(torch.eye(3).to_sparse()),
        lambda: _buffer(torch.eye(3).tril().relu_().sub_(1e-9).to_sparse()),
        r"cache: rank 1 holds .*torch\.sparse_coo with 9 elements.*, rank 0 .*with 3 elements \(coalesced\)",
    ),
    "sparse on one": (
        lambda: _buffer(torch.eye(3)),
        lambda: _buffer(torch.eye(3).to_sparse()),
        "cache: rank 1 holds .*sparse_coo",
    ),
    "expanded on one": (
        lambda: _buffer(torch.ones(1, 4).expand(3, 4)),
        lambda: _buffer(torch.ones(3, 4)),
        r"cache: rank 1 holds a buffer \(3, 4\) torch.*, rank 0 a buffer \(3, 4\) expanded from \(1, 4\)",
    ),
    "inside a subclass": (
        lambda: _frozen(Named(torch.ones(4), torch.ones(4))),
        lambda: _frozen(Named(torch.ones(4), torch.ones(4, dtype=torch.float64))),
        r"base: rank 1 holds a parameter .*Named.*second \(4,\) torch\.float64.*, rank 0 ",
    ),
}


def _unlike(group: dist.ProcessGroup, which: str) -> None:
    model = UNLIKE[which][dist.get_rank(group) > 0]()
    _step(model, distmuon.DistMuon(model, process_group=group))


@pytest.mark.parametrize("which", UNLIKE)
def test_what_ranks_hold_unlike_is_named_on_all(spawn_raises, which: str) -> None:
    """Buffers of two lengths aborted the process on gloo; a frozen tensor on one rank alone was waited for."""
    messages = spawn_raises(_unlike, 3, match=UNLIKE[which][2], which=which, timeout=30)
    assert len(set(messages)) == 1


def _changed_late(group: dist.ProcessGroup) -> None:
    model = Carrier()
    optimizer = distmuon.DistMuon(model, process_group=group)
    if dist.get_rank(group) == 1:
        model.double()
    _step(model, optimizer)


def test_a_model_that_one_rank_alone_has_changed(spawn_raises) -> None:
    """That rank raised, and the others waited for it."""
    messages = spawn_raises(
        _changed_late, 2, match=r"layer\.weight: the parameter is of dtype torch\.float64", timeout=20
    )
    assert len(set(messages)) == 1


# ------------------------------------------------------------------------------------- what is sent


def _values(rank: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))


def _grown_in_evaluation(values: Tensor) -> Tensor:
    with torch.inference_mode():
        return values.clone()


def _quiet(make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """torch warns once that a sparse layout is young."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "coo": lambda rank: _values(rank).to_sparse(),
    "not coalesced": lambda rank: _quiet(torch.sparse_coo_tensor, [[0, 0], [1, 1]], _values(rank)[0, :2], (3, 4)),
    "csr": lambda rank: _quiet(_values(rank).to_sparse_csr),
    "csc": lambda rank: _quiet(_values(rank).to_sparse_csc),
    "expanded": lambda rank: _values(rank)[:1].expand(3, 4),
    "channels last": lambda rank: _values(rank).view(3, 2, 2, 1).contiguous(memory_format=torch.channels_last),
    "transposed": lambda rank: _values(rank).t(),
    "slice": lambda rank: _values(rank)[:, ::2],
    "complex": lambda rank: torch.complex(_values(rank), _values(rank)),
    "conjugated": lambda rank: torch.complex(_values(rank), _values(rank)).conj(),
    "bool": lambda rank: _values(rank) > 0,
    "scalar": lambda rank: _values(rank)[0, 0],
    "float8": lambda rank: _values(rank).to(torch.float8_e4m3fn),
    "inference": lambda rank: _grown_in_evaluation(_values(rank)),
    "subclass": lambda rank: Named(_values(rank), _values(rank) * 2),
    "nested": lambda rank: torch.nested.nested_tensor([_values(rank), _values(rank)[:2]], layout=torch.jagged),
}


def _plain(value: Any) -> Tensor:
    if isinstance(value, Named):
        return torch.cat([value.first, value.second])
    if value.is_nested:
        return value.values()
    value = value.detach().resolve_conj()
    return (value if value.layout == torch.strided else value.to_dense()).to(torch.complex64)


def _sent(group: dist.ProcessGroup, kind: str, frozen: bool, values: bool) -> tuple[bool, str, int]:
    """(rank 0's values arrived, digest of the trained weights, warnings)."""
    warned: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = warned.append  # type: ignore[method-assign]
    logging.getLogger("distmuon").addHandler(handler)
    value = KINDS[kind](dist.get_rank(group))
    model = _frozen(value) if frozen else _buffer(value)
    optimizer = distmuon.DistMuon(model, process_group=group, broadcast_buffers=values)
    _step(model, optimizer)
    logging.getLogger("distmuon").removeHandler(handler)
    sender = 0 if values else dist.get_rank(group)
    right = torch.equal(_plain(model.base if frozen else model.cache), _plain(KINDS[kind](sender)))
    distmuon.verify_parameters(model, optimizer)
    return right, digest({"weight": model.layer.weight}), len(warned)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_0s_values_arrive_whatever_a_tensor_is(spawn, kind: str) -> None:
    """Sparse and expanded buffers and quantised weights raised torch's own errors, without a name."""
    frozen = KINDS[kind](0).is_floating_point() and kind != "inference"
    for is_frozen in (False, True) if frozen else (False,):
        found = spawn(_sent, 2, kind=kind, frozen=is_frozen, values=True, timeout=30)
        assert all(right and not warned for right, _, warned in found) and found[0][1] == found[1][1]


@pytest.mark.parametrize("kind", ["coo", "slice"])
def test_buffers_may_stay_each_ranks_own(spawn, kind: str) -> None:
    found = spawn(_sent, 2, kind=kind, frozen=False, values=False, timeout=30)
    assert all(right for right, _, _ in found) and found[0][1] == found[1][1]


def _other_lengths(group: dist.ProcessGroup) -> tuple[int, str]:
    model = _buffer(torch.ones(5 + dist.get_rank(group)))
    _step(model, distmuon.DistMuon(model, process_group=group, broadcast_buffers=False))
    return model.cache.numel(), digest({"weight": model.layer.weight})


def test_buffers_that_are_not_sent_are_not_compared(spawn) -> None:
    (one, weight), (other, same) = spawn(_other_lengths, 2)
    assert (one, other) == (5, 6) and weight == same


LEFT: dict[str, Callable[[int], Tensor]] = {
    "opaque": lambda rank: Sum(_values(rank), _values(rank)),
    "meta": lambda rank: torch.empty(3, 4, device="meta"),
    "windows": lambda rank: _values(rank).view(-1).unfold(0, 4, 2),
}


def _left(group: dist.ProcessGroup, kind: str, folder: str) -> tuple[bool, list[str]]:
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distmuon").addHandler(handler)
    value = LEFT[kind](dist.get_rank(group))
    model = _frozen(value)
    optimizer = distmuon.DistMuon(model, process_group=group)
    for _ in range(2):
        _step(model, optimizer)
    distmuon.save_checkpoint(Path(folder) / "step-1", model, optimizer)
    distmuon.load_checkpoint(folder, model, optimizer)
    logging.getLogger("distmuon").removeHandler(handler)
    if kind == "meta":
        return True, warned
    kept = model.base + 0
    return torch.equal(kept, LEFT[kind](dist.get_rank(group)) + 0), warned


@pytest.mark.parametrize("kind", LEFT)
def test_what_offers_no_memory_is_left_and_named_once(spawn, tmp_path: Path, kind: str) -> None:
    """A frozen quantised weight under two ranks was told as a lost rank; at one rank it could not be saved."""
    (kept, on_0), (other_kept, on_1) = spawn(_left, 2, kind=kind, folder=str(tmp_path), timeout=30)
    assert kept and other_kept and not on_1
    not_saved = ["not saved: base"] if kind != "windows" else []  # what overlaps can be read, and written alike
    assert [line.partition(";")[0] for line in on_0] == ["not sent from rank 0 to the others: base", *not_saved]


KEPT = ["coo", "csr", "expanded", "subclass", "transposed"]


def _saves(group: dist.ProcessGroup, kind: str, folder: str) -> bool:
    model = _buffer(KINDS[kind](0))
    optimizer = distmuon.DistMuon(model, process_group=group)
    _step(model, optimizer)
    distmuon.save_checkpoint(Path(folder) / "step-1", model, optimizer)
    fresh = _buffer(KINDS[kind](7))
    loader = distmuon.DistMuon(fresh, process_group=group)
    distmuon.load_checkpoint(folder, fresh, loader)
    return torch.equal(_plain(fresh.cache), _plain(model.cache)) and torch.equal(fresh.layer.weight, model.layer.weight)


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "Sparse and expanded tensors and tensor subclasses are saved too, as the plain tensors inside; a "
    "subclass that names none is named in the log as not saved",
)
@pytest.mark.parametrize("kind", KEPT)
def test_every_kind_comes_back_out_of_a_checkpoint(spawn, tmp_path: Path, kind: str) -> None:
    assert spawn(_saves, 2, kind=kind, folder=str(tmp_path), timeout=30) == [True, True]


# ------------------------------------------------------------------------------------- the first values


def _by_hand(group: dist.ProcessGroup, functional: bool, seed: int) -> str:
    torch.manual_seed(seed * dist.get_rank(group))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = distmuon.DistMuon(model, process_group=group)
    if functional:
        params = {fqn: param.detach() for fqn, param in model.named_parameters()}
        torch.func.functional_call(model, params, (torch.ones(3, 6),))
    for fqn, grad in hand_gradients(model, 0, dist.get_rank(group)).items():
        if functional or dist.get_rank(group) == 0:
            model.get_parameter(fqn).grad = grad
    optimizer.step()
    return digest(weights(model, optimizer))


@pytest.mark.parametrize("functional", [False, True])
def test_gradients_of_values_that_no_forward_of_ours_has_shared(spawn, spawn_raises, functional: bool) -> None:
    """Rank 0's values replaced the others' behind gradients that those had made, also where one rank alone had some."""
    assert len(set(spawn(_by_hand, 2, functional=functional, seed=0))) == 1
    match = r"0\.weight: rank 1 starts from other values .*call it once before anything else \(an ordinary forward"
    assert len(set(spawn_raises(_by_hand, 2, functional=functional, seed=1, match=match, timeout=20))) == 1


def _profiled_first(group: dist.ProcessGroup) -> str:
    """A count of FLOPs, say, before ranks that are seeded differently train."""
    torch.manual_seed(dist.get_rank(group))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = distmuon.DistMuon(model, process_group=group)
    torch.func.functional_call(model, {fqn: p.detach() for fqn, p in model.named_parameters()}, (torch.ones(3, 6),))
    _step(model, optimizer)
    return digest(weights(model, optimizer))


def test_a_functional_forward_before_the_first_ordinary_one(spawn) -> None:
    assert len(set(spawn(_profiled_first, 2))) == 1


# ------------------------------------------------------------------------------------- strides on several ranks

OPTIONS: list[dict[str, Any]] = [
    {},
    {"overlap": False},
    {"packing": "contiguous", "placement": "replicated"},
    {"param_gather": "updates"},
    {"grad_reduction": "external"},
]


def _formats(group: dist.ProcessGroup, form: str, folder: str, options: dict[str, Any]) -> tuple[str, str, bool, int]:
    """(digest of weights, of state, strides kept, boxes copied out by this rank)."""
    model = _in(form)
    before = {fqn: param.stride() for fqn, param in model.named_parameters()}
    optimizer = distmuon.DistMuon(model, process_group=group, lr=0.02, bucket_mb=1e-3, **options)
    external = options.get("grad_reduction") == "external"
    for step in range(3):
        for fqn, grad in hand_gradients(model, step, 0 if external else dist.get_rank(group)).items():
            model.get_parameter(fqn).grad = grad.to(memory_format=torch.preserve_format)
        optimizer.step()
        optimizer.zero_grad()
    found = digest(weights(model, optimizer)), digest(state_tensors(optimizer))
    if folder:
        distmuon.save_checkpoint(Path(folder) / form / "step-1", model, optimizer)
        other = "" if form else "channels last"
        fresh = _in(other)
        loader = distmuon.DistMuon(fresh, process_group=group)
        distmuon.load_checkpoint(Path(folder) / form, fresh, loader)
        assert (digest(weights(fresh, loader)), digest(state_tensors(loader))) == found
    kept = all(param.stride() == before[fqn] for fqn, param in model.named_parameters())
    buffers = optimizer._engine.storage
    return *found, kept, sum(len(b.staged) + len(b.staged_here) for b in buffers.buckets)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dp_size", [2, 3])
def test_strides_change_no_bit_on_any_number_of_ranks(spawn, tmp_path: Path, dp_size: int, options: Any) -> None:
    """Weights, state and checkpoints are those of a row-major model, cut wherever the layout cuts."""
    folder = "" if options else str(tmp_path / "a")
    by_form = {
        f: spawn(_formats, dp_size, form=f, folder=folder, options=options) for f in ("", "channels last", "transposed")
    }
    for form, found in by_form.items():
        assert all(kept for *_, kept, _ in found), form
        assert {(weight, state) for weight, state, *_ in found} == {by_form[""][0][:2]}, form
    assert by_form["channels last"][0][3] > by_form[""][0][3]


def _shared(group: dist.ProcessGroup) -> tuple[bool, str]:
    """Rank 0 alone has actors."""
    model, optimizer = make(group)
    if dist.get_rank(group) == 0:
        model.share_memory()
    mapped = [param.data for param in model.parameters()]
    train(group, model, optimizer, range(2))
    optimizer.synchronize()
    seen = all(torch.equal(old, param) for old, param in zip(mapped, model.parameters()))
    return seen, digest(weights(model, optimizer))


def test_one_rank_may_share_its_memory(spawn) -> None:
    (seen, weight), (_, same), (_, also) = spawn(_shared, 3)
    assert seen and weight == same == also


def test_mixed_has_what_it_says() -> None:
    assert {param.ndim for param in Mixed().parameters()} == {1, 2, 4, 5}
