"""What a checkpoint keeps beside trained parameters: each rank's own where ranks differ, whatever kind of tensor or
state it is, and a refusal by name for what it cannot keep."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import distmuon
from distmuon.checkpoint.archives import MAX_NESTING
from distmuon.comm.agreement import bit_sums
from tests.training import digest


class _Counting(nn.Module):
    """Extra state: one entry that all ranks share, one of each rank's own."""

    def __init__(self, whose: str) -> None:
        super().__init__()
        self.whose, self.seen = whose, OrderedDict[str, Any](steps=0, sizes=[torch.zeros(2)])

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


class _Own(nn.Module):
    """Everything that may differ by rank, and its neighbours that do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.still = nn.Parameter(torch.ones(5), requires_grad=False)
        self.mine, self.everyones = _Counting("mine"), _Counting("everyone's")
        self.register_buffer("uses", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(4, dtype=torch.bool))
        self.register_buffer("alike", torch.arange(7.0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.first(x))))

    def touch(self, rank: int) -> None:
        """The counts and masks of ranks 0 and 1 have the same plain and weighted sums."""
        self.uses.copy_(torch.tensor([[1, 0, 1], [0, 2, 0], [5, 5, 5]][rank % 3]))
        self.mask.copy_(torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]][rank % 3], dtype=torch.bool))
        self.scratch.fill_(rank)
        if rank == 1:
            self.frozen.data[3] = 7.0
        self.mine.seen = OrderedDict(steps=rank, sizes=[torch.full((2,), float(rank)), None, b"x", (1, "a", True)])
        self.everyones.seen = OrderedDict(steps=9, sizes=[torch.ones(3)])

    def held(self) -> str:
        extra = repr(self.mine.seen), repr(self.everyones.seen)
        return digest({name: t for name, t in self.state_dict().items() if isinstance(t, Tensor)}) + repr(extra)


def _save(group: dist.ProcessGroup, folder: str, asynchronous: bool) -> str:
    model, rank = _Own(), dist.get_rank(group)
    optimizer = distmuon.DistMuon(model, lr=0.02, process_group=group)
    for step in range(2):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + rank)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    model.touch(rank)
    saving = distmuon.save_checkpoint(folder, model, optimizer, asynchronous=asynchronous)
    held = model.held()
    model.touch(rank + 1)
    model.norm.reset_running_stats()
    saving.wait()
    return held


def _load(group: dist.ProcessGroup | None, folder: str) -> tuple[str, list[float]]:
    model = _Own()
    distmuon.load_checkpoint(folder, model, distmuon.DistMuon(model, lr=0.02, process_group=group))
    return model.held(), model.scratch.tolist()


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "Tensors beside trained parameters may differ by rank (BatchNorm's statistics, codebooks, frozen "
    "tensors that a script wrote). At the same number of ranks every rank gets its tensors back bit "
    "for bit; at another number all get rank 0's, never a mixture. Tensors that are alike are stored "
    "once",
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_rank_gets_its_own_back_and_another_number_rank_0s(spawn, tmp_path: Path, asynchronous: bool) -> None:
    """Buffers were dealt out over the ranks: the mean of one beside the variance of another came back."""
    saved = spawn(_save, 3, folder=str(tmp_path / "step-2"), asynchronous=asynchronous)
    assert len(set(saved)) == 3
    assert spawn(_load, 3, folder=str(tmp_path)) == [(held, [0.0, 0.0]) for held in saved]
    assert spawn(_load, 2, folder=str(tmp_path)) == [(saved[0], [0.0, 0.0])] * 2
    assert spawn(_load, 1, folder=str(tmp_path)) == [(saved[0], [0.0, 0.0])]


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "Tensors beside trained parameters may differ by rank (BatchNorm's statistics, codebooks, frozen "
    "tensors that a script wrote). At the same number of ranks every rank gets its tensors back bit "
    "for bit; at another number all get rank 0's, never a mixture. Tensors that are alike are stored "
    "once",
)
def test_only_what_differs_is_stored_by_rank(spawn, tmp_path: Path) -> None:
    spawn(_save, 3, folder=str(tmp_path / "step-2"), asynchronous=False)
    tables = [json.loads((tmp_path / "step-2" / f"rank-{r:05d}.json").read_text())["tensors"] for r in range(3)]
    of_rank = {name for table in tables for name in table if name.startswith("rank.")}
    differing = {"norm.running_mean", "norm.running_var", "uses", "mask"}
    assert of_rank == {*(f"rank.{r}.{fqn}" for r in (1, 2) for fqn in differing | {"frozen"})}
    for fqn in (*differing, "frozen", "still", "alike", "norm.num_batches_tracked"):
        assert sum(f"model.{fqn}" in table for table in tables) == 1, fqn
    own = [torch.load(tmp_path / "step-2" / f"rank-{r:05d}.pt", weights_only=True)["modules"] for r in range(3)]
    assert [list(states) for states in own] == [[], ["mine._extra_state"], ["mine._extra_state"]]
    shared = torch.load(tmp_path / "step-2" / "shared.pt", weights_only=True)["modules"]
    assert list(shared) == ["mine._extra_state", "everyones._extra_state"]


def _unlike_sets(group: dist.ProcessGroup, folder: str) -> list[tuple[float, list[int]]]:
    """A buffer that grew on one rank, and one that only rank 0 or only rank 1 has."""
    found = []
    for save in (True, False):
        model, rank = nn.Linear(6, 4), dist.get_rank(group)
        optimizer = distmuon.DistMuon(model, process_group=group)
        optimizer.full_state_dict()
        model.register_buffer("codes", torch.full((2 + rank,), float(rank) if save else -1.0))
        model.register_buffer(f"only_{rank}", torch.full((2,), 10.0 + rank if save else -1.0))
        if save:
            distmuon.save_checkpoint(f"{folder}/step-1", model, optimizer)
        else:
            distmuon.load_checkpoint(folder, model, optimizer)
            found.append((float(model.get_buffer(f"only_{rank}")[0]), model.codes.tolist()))
    return found


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "Tensors beside trained parameters may differ by rank (BatchNorm's statistics, codebooks, frozen "
    "tensors that a script wrote). At the same number of ranks every rank gets its tensors back bit "
    "for bit; at another number all get rank 0's, never a mixture. Tensors that are alike are stored "
    "once",
)
def test_ranks_may_hold_buffers_of_other_lengths_and_names(spawn, tmp_path: Path) -> None:
    assert spawn(_unlike_sets, 2, folder=str(tmp_path)) == [[(10.0, [0.0, 0.0])], [(11.0, [1.0, 1.0, 1.0])]]
    model = nn.Linear(6, 4)
    model.register_buffer("codes", torch.zeros(2))
    with pytest.raises(ValueError, match=r"only_0: 1 tensors of the checkpoint are not in this model"):
        distmuon.load_checkpoint(tmp_path, model, distmuon.DistMuon(model))


# -------------------------------------------------------------------------------- tensors of every kind


def _kinds() -> dict[str, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(4, 4)
    whole = {
        "sparse": (x * (x > 0)).to_sparse(),
        "rows": (x * (x > 0)).to_sparse_csr(),
        "uncoalesced": torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (4, 4), check_invariants=True),
        "expanded": torch.randn(3, 1).expand(3, 5),
        "strided": torch.randn(4, 6).t()[::2],
        "scalar": torch.tensor(2.5),
        "waves": torch.randn(3, dtype=torch.complex64),
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "flags": torch.tensor([True, False, True]),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "empty": torch.zeros(3, 0),
        "bf16": torch.randn(3).bfloat16(),
        "nan": torch.tensor([float("nan"), -0.0]),
        "unsigned": torch.tensor([1, 65535]).to(torch.uint16),
        "stepped": torch.arange(9.0)[::2],
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    whole["quantised"] = torch.quantize_per_tensor(torch.randn(6), 0.1, 3, torch.qint8)
    return whole


def _bits(tensor: Tensor) -> Any:
    if tensor.layout != torch.strided:
        return tensor.layout, tensor.dtype, tensor.to_dense().tolist()
    if tensor.is_quantized:
        return tensor.dtype, tensor.q_scale(), tensor.q_zero_point(), tensor.int_repr().tolist()
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), bit_sums(tensor).tolist()


def _with(tensors: dict[str, Tensor]) -> tuple[nn.Module, distmuon.DistMuon]:
    model = nn.Linear(6, 4)
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    return model, distmuon.DistMuon(model)


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "Sparse, expanded, quantised, complex, bool, fp8, 0-dim and empty buffers come back. A frozen "
    "tensor subclass is saved by the tensors that its `__tensor_flatten__` names. A tensor that has "
    "no values here (meta, DTensor) is named in the log as not saved, and keeps what it has at a load",
)
@pytest.mark.filterwarnings("ignore:.*(quantize|Sparse CSR|TypedStorage)")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_buffers_of_every_kind_come_back(tmp_path: Path, asynchronous: bool) -> None:
    """Sparse, quantised and expanded ones ended in torch's own words."""
    kinds = _kinds()
    model, optimizer = _with(kinds)
    distmuon.save_checkpoint(tmp_path / "step-1", model, optimizer, asynchronous=asynchronous).wait()
    blank = {}
    for name, tensor in kinds.items():
        other = tensor.clone() if name != "expanded" else torch.zeros(3, 1).expand(3, 5)
        if name in ("sparse", "uncoalesced"):
            other = torch.eye(4).to_sparse()
        elif name == "rows":
            other = torch.eye(4).to_sparse_csr()
        elif name == "quantised":
            other = torch.quantize_per_tensor(torch.zeros(6), 0.7, 1, torch.qint8)
        elif name != "expanded":
            other.zero_()
        blank[name] = other
    again, loader = _with(blank)
    held = dict(again.named_buffers())
    distmuon.load_checkpoint(tmp_path, again, loader)
    for name, tensor in kinds.items():
        loaded = again.get_buffer(name)
        assert loaded is held[name], f"{name}: others may hold it"
        if name == "conjugated":
            assert torch.equal(loaded, tensor)
        else:
            assert _bits(loaded)[:2] == _bits(tensor)[:2] and _bits(loaded)[-1] == _bits(tensor)[-1], name


class _Halves(Tensor):
    """A tensor that keeps its values in two others, as NF4 and int8 weights do."""

    low: Tensor
    high: Tensor

    @staticmethod
    def __new__(cls, low: Tensor, high: Tensor) -> _Halves:
        return Tensor._make_wrapper_subclass(cls, (2 * len(low),), dtype=torch.float32)  # type: ignore[return-value]

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["low", "high"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].low, args[0].high)
        whole = pytree.tree_map_only(_Halves, lambda t: torch.cat([t.low.float(), t.high.float()]), args)
        return func(*whole, **(kwargs or {}))


class _Closed(_Halves):
    """One that does not say where its values are."""

    __tensor_flatten__ = None  # type: ignore[assignment]


def _quantised(low: int, kind: type = _Halves) -> tuple[nn.Module, distmuon.DistMuon]:
    model = nn.Linear(6, 4)
    halves = kind(torch.full((3,), low, dtype=torch.int8), torch.full((3,), 2.0 * low))
    model.register_parameter("base", nn.Parameter(halves, requires_grad=False))
    return model, distmuon.DistMuon(model)


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "Sparse, expanded, quantised, complex, bool, fp8, 0-dim and empty buffers come back. A frozen "
    "tensor subclass is saved by the tensors that its `__tensor_flatten__` names. A tensor that has "
    "no values here (meta, DTensor) is named in the log as not saved, and keeps what it has at a load",
)
def test_a_frozen_tensor_subclass_is_saved_by_the_tensors_in_it_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    distmuon.save_checkpoint(tmp_path / "step-1", *_quantised(5))
    model, optimizer = _quantised(1)
    distmuon.load_checkpoint(tmp_path, model, optimizer)
    assert model.base.low.tolist() == [5, 5, 5] and model.base.high.tolist() == [10.0] * 3
    assert type(model.base.data) is _Halves
    assert "not saved" not in caplog.text
    distmuon.save_checkpoint(tmp_path / "step-2", *_quantised(5, _Closed))
    assert "not saved: base; each rank must hold" in caplog.text
    model, optimizer = _quantised(1, _Closed)
    distmuon.load_checkpoint(tmp_path, model, optimizer)
    assert model.base.low.tolist() == [1, 1, 1], "it keeps what it has"


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "Sparse, expanded, quantised, complex, bool, fp8, 0-dim and empty buffers come back. A frozen "
    "tensor subclass is saved by the tensors that its `__tensor_flatten__` names. A tensor that has "
    "no values here (meta, DTensor) is named in the log as not saved, and keeps what it has at a load",
)
def test_a_buffer_without_values_is_named_as_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = _with({"odd": torch.zeros(3, device="meta"), "even": torch.ones(2)})
    distmuon.save_checkpoint(tmp_path / "step-1", model, optimizer)
    assert "not saved: odd; each rank must hold" in caplog.text
    again, loader = _with({"odd": torch.zeros(3, device="meta"), "even": torch.zeros(2)})
    distmuon.load_checkpoint(tmp_path, again, loader)
    assert again.even.tolist() == [1.0, 1.0]


def test_a_buffer_that_is_not_initialized_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = nn.Linear(6, 4)
    optimizer = distmuon.DistMuon(model)
    optimizer.full_state_dict()
    model.register_buffer("odd", nn.parameter.UninitializedBuffer())
    with pytest.raises(ValueError, match=r"odd: it is not initialized yet"):
        distmuon.save_checkpoint(tmp_path / "step-1", model, optimizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*(quantize|Sparse CSR|TypedStorage)")
@pytest.mark.parametrize(
    ("ours", "theirs", "match"),
    [
        (
            torch.zeros(3, dtype=torch.int64),
            torch.ones(3),
            r"x: the checkpoint holds torch.float32 \(3,\) strided, not",
        ),
        (torch.zeros(3), torch.ones(3, dtype=torch.complex64), r"x: the checkpoint holds torch.complex64"),
        (torch.eye(3).to_sparse(), torch.eye(4).to_sparse(), r"x: the checkpoint holds torch.float32 \(4, 4\) sparse"),
        (torch.eye(3).to_sparse(), torch.eye(3), r"step-1: it holds no state of x;"),
        (torch.zeros(1).expand(3), torch.arange(3.0), r"x: the checkpoint holds different values along dimension 0"),
    ],
    ids=["float into int", "complex into real", "shape", "dense into sparse", "into expanded"],
)
def test_a_value_that_would_be_cut_is_refused_by_name(tmp_path: Path, ours: Tensor, theirs: Tensor, match: str) -> None:
    distmuon.save_checkpoint(tmp_path / "step-1", *_with({"x": theirs}))
    model, optimizer = _with({"x": ours})
    before = _bits(model.x), digest(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=match):
        distmuon.load_checkpoint(tmp_path, model, optimizer)
    assert (_bits(model.x), digest(dict(model.named_parameters()))) == before


# ------------------------------------------------------------------------------------------ extra state


def _counting(state: Any) -> tuple[nn.Module, distmuon.DistMuon]:
    model = nn.Sequential(nn.Linear(6, 4), _Counting("mine"))
    model[1].seen = state
    return model, distmuon.DistMuon(model)


def _nested(depth: int) -> Any:
    inner: Any = 1
    for _ in range(depth):
        inner = [inner]
    return inner


GOOD: list[Any] = [
    *(None, 3, "a", b"\0x", 1.5, 2j, True, torch.ones(2), [], {}, (1, [2, {"a": (3,)}]), {1: 2, (1, "a"): None}),
    *(torch.float16, torch.Size([2, 3]), OrderedDict(a=1), _nested(MAX_NESTING - 10)),
]


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "The value that a module returns from `get_extra_state` comes back by the same rule, if it is "
    "made of tensors, numbers, strings, bytes, None and dicts, lists and tuples; any other is refused"
    " by its place in the state, on all ranks, before anything is written",
)
@pytest.mark.parametrize("state", GOOD, ids=[f"{type(v).__name__}-{i}" for i, v in enumerate(GOOD)])
def test_extra_state_of_safe_types_comes_back(tmp_path: Path, state: Any) -> None:
    distmuon.save_checkpoint(tmp_path / "step-1", *_counting(state))
    model, optimizer = _counting("other")
    distmuon.load_checkpoint(tmp_path, model, optimizer)
    assert type(model[1].seen) is type(state) and repr(model[1].seen) == repr(state)


class _Odd:
    pass


BAD: list[tuple[Any, str]] = [
    (_Odd(), r"1\._extra_state: a _Odd;"),
    ({"amax": [1, {2}]}, r"1\._extra_state\['amax'\]\[1\]: a set;"),
    ({_Odd: 1}, r"1\._extra_state: a key: a type;"),
    (print, r"1\._extra_state: a builtin_function_or_method;"),
    (torch.zeros(2, device="meta"), r"1\._extra_state: it is on the meta device"),
    (_nested(MAX_NESTING), r"1\._extra_state\[0\].*: a list more than \d+ containers deep;"),
]


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "The value that a module returns from `get_extra_state` comes back by the same rule, if it is "
    "made of tensors, numbers, strings, bytes, None and dicts, lists and tuples; any other is refused"
    " by its place in the state, on all ranks, before anything is written",
)
@pytest.mark.parametrize(("state", "match"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_extra_state_of_other_types_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, state: Any, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        distmuon.save_checkpoint(tmp_path / "step-1", *_counting(state))
    assert list(tmp_path.iterdir()) == []


def _refused_on_one(group: dist.ProcessGroup, folder: str) -> str:
    model = nn.Sequential(nn.Linear(6, 4), _Counting("mine"))
    optimizer = distmuon.DistMuon(model, process_group=group)
    if dist.get_rank(group) == 1:
        model[1].seen = _Odd()
    with pytest.raises(ValueError) as raised:
        distmuon.save_checkpoint(f"{folder}/step-1", model, optimizer)
    return str(raised.value)


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "The value that a module returns from `get_extra_state` comes back by the same rule, if it is "
    "made of tensors, numbers, strings, bytes, None and dicts, lists and tuples; any other is refused"
    " by its place in the state, on all ranks, before anything is written",
)
def test_what_one_rank_cannot_save_is_refused_on_all_before_anything_is_written(spawn, tmp_path: Path) -> None:
    for message in spawn(_refused_on_one, 2, folder=str(tmp_path)):
        assert message.startswith("1._extra_state: a _Odd;")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise(
    "State survives, at any number of ranks",
    "A module that refuses its state stops the load, and all modules keep what they had",
)
def test_a_module_that_refuses_its_state_stops_the_load_and_all_keep_theirs(tmp_path: Path) -> None:
    class Refusing(_Counting):
        def set_extra_state(self, state: Any) -> None:
            if state == "saved":
                raise RuntimeError("not mine")
            self.seen = state

    model = nn.Sequential(nn.Linear(6, 4), _Counting("a"), _Counting("b"))
    model[1].seen = model[2].seen = "saved"
    distmuon.save_checkpoint(tmp_path / "step-1", model, distmuon.DistMuon(model))
    again = nn.Sequential(nn.Linear(6, 4), _Counting("a"), Refusing("b"))
    again[1].seen, again[2].seen = "mine", "mine"
    before = digest(again.state_dict() and dict(again.named_parameters()))
    with pytest.raises(ValueError, match=r"2\._extra_state: its module refused it \(RuntimeError: not mine\)"):
        distmuon.load_checkpoint(tmp_path, again, distmuon.DistMuon(again))
    assert (again[1].seen, again[2].seen) == ("mine", "mine") and digest(dict(again.named_parameters())) == before


def test_extra_state_is_set_after_the_tensors_it_may_read(tmp_path: Path) -> None:
    class Derived(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(value))
            self.inverse = 1 / value

        def get_extra_state(self) -> Any:
            return "derived"

        def set_extra_state(self, state: Any) -> None:
            self.inverse = 1 / float(self.scale)

    model = nn.Sequential(nn.Linear(6, 4), Derived(4.0))
    distmuon.save_checkpoint(tmp_path / "step-1", model, distmuon.DistMuon(model))
    again = nn.Sequential(nn.Linear(6, 4), Derived(1.0))
    distmuon.load_checkpoint(tmp_path, again, distmuon.DistMuon(again))
    assert again[1].inverse == 0.25


def test_a_model_with_other_modules_of_extra_state_is_refused(tmp_path: Path) -> None:
    class Half(nn.Module):
        def get_extra_state(self) -> Any:
            return 1

    distmuon.save_checkpoint(tmp_path / "step-1", *_counting(1))
    plain = nn.Sequential(nn.Linear(6, 4), nn.Identity())
    with pytest.raises(ValueError, match=r"step-1: it holds states of 1\._extra_state, which this model lacks"):
        distmuon.load_checkpoint(tmp_path, plain, distmuon.DistMuon(plain))
    more = nn.Sequential(nn.Linear(6, 4), _Counting("a"), _Counting("b"))
    with pytest.raises(ValueError, match=r"step-1: it holds no state of 2\._extra_state"):
        distmuon.load_checkpoint(tmp_path, more, distmuon.DistMuon(more))
    half = nn.Sequential(nn.Linear(6, 4), Half())
    with pytest.raises(ValueError, match=r"1\._extra_state: a Half has no set_extra_state; the module must"):
        distmuon.load_checkpoint(tmp_path, half, distmuon.DistMuon(half))
    with pytest.raises(ValueError, match=r"1\._extra_state: a Half has get_extra_state and no set_extra_state"):
        distmuon.save_checkpoint(tmp_path / "step-2", half, distmuon.DistMuon(half))


def test_a_checkpoint_of_before_extra_state_leaves_it_alone_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.distributed.test_checkpoint_faults import _seal

    distmuon.save_checkpoint(tmp_path / "step-1", *_counting("saved"))
    for name in ("shared.pt", "rank-00000.pt"):
        state = torch.load(tmp_path / "step-1" / name, weights_only=True)
        del state["modules"]
        torch.save(state, tmp_path / "step-1" / name)
    _seal(tmp_path / "step-1")
    model, optimizer = _counting("mine")
    distmuon.load_checkpoint(tmp_path, model, optimizer)
    assert model[1].seen == "mine"
    assert re.search(r"holds no state of 1\._extra_state, which keep their values", caplog.text)


def test_what_a_hook_puts_into_the_state_dict_is_said_not_to_be_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    model.register_state_dict_post_hook(lambda module, state, prefix, local: state.update(secret=torch.ones(2)))
    with caplog.at_level(logging.WARNING):
        distmuon.save_checkpoint(tmp_path / "step-1", model, distmuon.DistMuon(model))
    assert "not saved: secret; no parameter, buffer or get_extra_state of the model holds it" in caplog.text
    distmuon.load_checkpoint(tmp_path, model, distmuon.DistMuon(model))


def test_a_buffer_that_the_state_dict_calls_by_another_name_is_saved(tmp_path: Path) -> None:
    """torch's wrapper for checkpointed activations leaves its own name out of the state dict's."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), checkpoint_wrapper(nn.BatchNorm1d(8)), nn.Linear(8, 4))

    model = made()
    with torch.no_grad():
        model(torch.randn(9, 6) + 3)
    distmuon.save_checkpoint(tmp_path / "step-1", model, distmuon.DistMuon(model))
    again = made()
    distmuon.load_checkpoint(tmp_path, again, distmuon.DistMuon(again))
    assert digest(dict(again.named_buffers())) == digest(dict(model.named_buffers()))


# ------------------------------------------------------------------------------------------- sums of bits


def test_sums_tell_apart_counts_and_masks_of_one_total() -> None:
    """Both sums of [1, 0, 1] and [0, 2, 0] were the same, so one rank's counts would have been taken for all ranks'."""
    every = [torch.tensor(row) for row in itertools.product(range(3), repeat=7)]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert len({tuple(bit_sums(row.to(dtype)).tolist()) for row in every}) == len(every)


def test_sums_depend_on_the_elements_alone() -> None:
    """Not on where they lie, or how they are strided; one bit changes the first."""
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.complex64):
        whole = torch.randn(3, 1001).to(dtype)
        moved = torch.empty(3 * 1001 + 3, dtype=dtype)[3:].view(3, 1001).copy_(whole)
        assert torch.equal(bit_sums(whole), bit_sums(moved))
        assert torch.equal(bit_sums(whole), bit_sums(whole.t().contiguous().t()))
    bits = torch.randn(300_000).view(torch.int32)
    first = bit_sums(bits)[0]
    for place, bit in ((0, 0), (299_999, 31), (131_072, 7)):
        changed = bits.clone()
        changed[place] ^= torch.tensor(1, dtype=torch.int32) << bit
        assert bit_sums(changed)[0] != first
