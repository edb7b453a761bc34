"""Properties beyond the examples of the neighbours: groups of 64 ranks and huge shapes, odd names, any cut of a saved
tensor into any other, and arguments of any type.

`test_layout.py` says what a layout is for few ranks and small shapes; they are asked again here of all others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from glob import escape
from math import inf, isfinite, isnan, nan, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distmuon
from distmuon.checkpoint.manifest import FileSum, Manifest, table_file
from distmuon.checkpoint.tensors import Part, Reader, write_parts
from distmuon.layout.boxes import Box, boxes, boxes_of_runs, runs_of, tiles_exactly
from distmuon.layout.layout import Layout, Segment, make_layout, ns_cost
from distmuon.layout.packing import _fill_level
from distmuon.layout.routing import Route, route
from distmuon.options import Options
from distmuon.step.storage import elements_of
from tests.standing import Standing, routes
from tests.unit import test_layout as small

ROOT = Path(__file__).parents[2]
FIXED = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# -------------------------------------------------------------------------------------------------- layout

SIDES = st.one_of(st.sampled_from([1, 2, 63, 64, 65, 1000, 4096, 28672, 131_072]), st.integers(1, 300))
BUCKETS = st.sampled_from([None, 1e-9, 1e-4, 0.01, 0.3, 7.0, 1e3, 1e12, inf])


@st.composite
def wide(draw: Any) -> Layout:
    """Any shapes, from one element to billions, none or some of them Muon's; 1 to 64 ranks; any bucket size."""
    entries = []
    for kind in draw(st.lists(st.sampled_from(["matrix", "stack", "fused", "sand", "number"]), min_size=1, max_size=9)):
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        rows, columns = draw(SIDES), draw(SIDES)
        if kind == "matrix":
            entries.append(("muon", (rows, columns), dtype, None))
        elif kind == "stack":
            entries.append(("muon", (draw(st.integers(1, 130)), min(rows, 300), columns), dtype, None))
        elif kind == "fused":
            entries.append(("muon", (rows + 5, columns), dtype, [5, rows]))
        else:
            entries.append(("adamw", (rows, columns) if kind == "sand" else (), dtype, None))
    packing, placement = draw(st.sampled_from(small.PACKINGS)), draw(st.sampled_from(small.PLACEMENTS))
    return make_layout(
        small.specs_of(*entries),
        draw(st.integers(1, 64)),
        packing=packing,
        placement=placement,
        bucket_mb=draw(BUCKETS),
    )


@settings(FIXED, max_examples=150)
@given(wide())
def test_the_properties_of_small_layouts_hold_for_all(layout: Layout) -> None:
    """One place an element, padding of less than a block, whole units, owners, the order of buckets, true views."""
    for test in (
        small.test_every_element_has_one_place,
        small.test_padding_is_alignment_only,
        small.test_segments_keep_within_matrices_and_owners_are_right,
        small.test_buckets_are_runs_in_the_order_of_backward,
        small.test_contiguous_start_is_true,
    ):
        test.hypothesis.inner_test(layout)  # type: ignore[attr-defined]


@settings(FIXED, max_examples=150)
@given(wide())
def test_straddlers_never_overload_an_owner(layout: Layout) -> None:
    """Each went to who had least or stayed below the mean: no rank's work exceeds that of its whole matrices, or the
    mean and one straddler."""
    work, whole, dearest = [0] * layout.dp_size, [0] * layout.dp_size, 0
    for placed in layout.matrices:
        cost = ns_cost(placed.unit)
        if len(placed.workers) != 1:
            return  # replicated: every holder works
        work[placed.workers[0]] += cost
        if placed.straddling:
            dearest = max(dearest, cost)
        else:
            whole[placed.workers[0]] += cost
    limit = Fraction(sum(work), layout.dp_size) + dearest
    assert all(done <= max(alone, limit) for done, alone in zip(work, whole, strict=True))


@settings(FIXED, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), min_size=1, max_size=64), st.data())
def test_straddlers_fill_up_the_lowest(ranks: list[tuple[int, int]], data: st.DataObject) -> None:
    """All is poured, none above its room, and who got some stands no more than a block above who had room left."""
    heights, room = [list(column) for column in zip(*ranks, strict=True)]
    amount = data.draw(st.integers(0, sum(room)))
    quota = _fill_level(heights, room, amount)
    assert sum(quota) == amount and all(0 <= q <= r for q, r in zip(quota, room, strict=True))
    ends = [h + q for h, q in zip(heights, quota, strict=True)]
    highest = max((end for end, q in zip(ends, quota, strict=True) if q), default=0)
    assert all(highest <= end + 1 for end, q, r in zip(ends, quota, room, strict=True) if q < r)


HASHED = """
from distmuon.layout.layout import make_layout
from distmuon.layout.routing import route
from tests.standing import Standing, routes
specs = [spec for spec, _ in route(Standing(), routes())]
print([make_layout(specs, n, bucket_mb=mb).fingerprint() for n in (2, 5) for mb in (None, 0.026)])
"""


def test_the_layout_does_not_depend_on_hashes() -> None:
    """A process with another seed for the hashes of strings, and so another order of sets, plans the same."""
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": str(ROOT)}
    there = subprocess.run([sys.executable, "-c", HASHED], env=environment, capture_output=True, check=True).stdout
    specs = [spec for spec, _ in route(Standing(), routes())]
    here = [make_layout(specs, n, bucket_mb=mb).fingerprint() for n in (2, 5) for mb in (None, 0.026)]
    assert there == f"{here}\n".encode()


# ------------------------------------------------------------------------------------------------- routing

NAMES = st.text("ab.[]*?!-\\ é_0'\"{\n", min_size=1, max_size=8)


@settings(FIXED, max_examples=300)
@given(st.data())
def test_the_first_match_decides_and_every_parameter_has_one_rule(data: st.DataObject) -> None:
    """Names with any characters; patterns whose meaning plain string methods tell."""
    names = data.draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    named, frozen, empty = [], set(), set()
    for name in names:
        shape = data.draw(st.sampled_from([(3, 5), (1, 1), (2, 4, 3), (0, 4)]))
        param = nn.Parameter(torch.empty(shape), requires_grad=data.draw(st.integers(0, 4)) > 0)
        frozen |= set() if param.requires_grad else {name}
        empty |= set() if param.numel() else {name}
        named.append((name, param))
    patterns: list[tuple[Route, Any]] = []
    for _ in range(data.draw(st.integers(0, 4))):
        part = data.draw(st.one_of(st.sampled_from(names), NAMES))
        how = data.draw(st.sampled_from(["is", "starts", "ends", "holds"]))
        pattern = {"is": "{}", "starts": "{}*", "ends": "*{}", "holds": "*{}*"}[how].format(escape(part))
        meaning = {
            "is": part.__eq__,
            "starts": lambda n, p=part: n.startswith(p),
            "ends": lambda n, p=part: n.endswith(p),
            "holds": lambda n, p=part: p in n,
        }[how]
        patterns.append((Route(pattern, data.draw(st.sampled_from(["muon", "adamw"]))), meaning))
    rest = Route("*", "adamw")
    given_routes = [chosen for chosen, _ in patterns] + [rest]
    first = {name: next((r for r, means in patterns if means(name)), rest) for name in names}
    unused = [chosen for chosen in given_routes if chosen not in first.values()]
    if unused and set(names) - frozen - empty:
        with pytest.raises(ValueError, match=re.escape(f"Route({unused[0].pattern!r}): matched no parameter")):
            route(named, given_routes)
        return
    routed = route(named, given_routes)
    assert [spec.fqn for spec, _ in routed] == [name for name in names if name not in frozen | empty]
    for spec, param in routed:
        assert param is dict(named)[spec.fqn] and spec.rule == first[spec.fqn].rule
        assert sum(matrix.numel for matrix in spec.matrices) == (spec.numel if spec.rule == "muon" else 0)


@settings(FIXED, max_examples=200)
@given(st.data())
def test_cut_into_logical_matrices_and_put_together_a_weight_is_itself(data: st.DataObject) -> None:
    count, dim = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 1))
    split = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    other = data.draw(st.integers(1, 6))
    shape = (sum(split), other) if dim == 0 else (other, sum(split))
    shape = (count, *shape) if count else shape
    ((spec, _),) = route([("w", nn.Parameter(torch.empty(shape)))], [Route("w", "muon", split=split, split_dim=dim)])
    whole = torch.arange(prod(shape)).view(shape)
    for number, piece in enumerate(whole.view(-1, *shape[-2:])):
        wanted = piece.split(split, dim)
        units = spec.matrices[number * len(split) : (number + 1) * len(split)] if dim == 0 else [spec.matrices[number]]
        cut = [
            part
            for unit in units
            for part in whole.view(-1)[unit.offset : unit.offset + unit.numel]
            .view(unit.rows, unit.columns)
            .split([n for _, n in unit.logical_shapes], 1)
        ]
        assert [part.tolist() for part in cut] == [part.tolist() for part in wanted]


def test_tied_weights_are_routed_once_and_frozen_ones_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    assert [spec.fqn for spec, _ in route(model)] == ["0.weight", "0.bias", "1.bias", "2.bias"]


# --------------------------------------------------------------------------------------------------- boxes

SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


def _cut(data: st.DataObject, numel: int) -> list[tuple[int, int]]:
    """(start, length) of pieces that tile a flat range, some of them empty."""
    at = sorted(data.draw(st.lists(st.integers(0, numel), max_size=5)))
    return [(start, stop - start) for start, stop in zip([0, *at], [*at, numel], strict=True)]


@settings(FIXED, max_examples=300)
@given(SHAPES, st.data())
def test_boxes_of_a_cut_make_up_the_tensor_and_no_others_do(shape: tuple[int, ...], data: st.DataObject) -> None:
    found = [box for start, length in _cut(data, prod(shape)) for box in boxes(shape, start, length)]
    assert tiles_exactly(shape, data.draw(st.permutations(found)))
    number = data.draw(st.integers(0, len(found) - 1))
    assert not tiles_exactly(shape, found[:number] + found[number + 1 :]), "a hole"
    assert not tiles_exactly(shape, [*found, found[number]]), "an overlap"
    if shape:
        offsets, sizes = found[number]
        dim = data.draw(st.integers(0, len(shape) - 1))
        for by in (-1, 1):
            moved = (*offsets[:dim], offsets[dim] + by, *offsets[dim + 1 :])
            assert not tiles_exactly(shape, [*found[:number], (moved, sizes), *found[number + 1 :]]), "moved"
            resized = (*sizes[:dim], sizes[dim] + by, *sizes[dim + 1 :])
            assert not tiles_exactly(shape, [*found[:number], (offsets, resized), *found[number + 1 :]]), "resized"


def _grid(data: st.DataObject, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that tile a tensor, cut along any dimensions."""
    found: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 4)) if shape else 0):
        number, dim = data.draw(st.integers(0, len(found) - 1)), data.draw(st.integers(0, len(shape) - 1))
        offsets, sizes = found.pop(number)
        at = data.draw(st.integers(0, sizes[dim]))
        halves = ((offsets[dim], at), (offsets[dim] + at, sizes[dim] - at))
        for offset, size in halves:
            if size:
                box = (*offsets[:dim], offset, *offsets[dim + 1 :]), (*sizes[:dim], size, *sizes[dim + 1 :])
                found.append(box)
    return found


def _inside(whole: Tensor, box: Box) -> Tensor:
    return whole[tuple(slice(offset, offset + size) for offset, size in zip(*box))].reshape(-1)


@settings(FIXED, max_examples=300)
@given(SHAPES, st.data())
def test_runs_of_a_box_are_its_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    """And boxes cut along any dimensions tile a tensor only if none is missing or there twice."""
    whole, grid = torch.arange(prod(shape)).view(shape), _grid(data, shape)
    assert tiles_exactly(shape, data.draw(st.permutations(grid)))
    assert not tiles_exactly(shape, grid[1:]) and not tiles_exactly(shape, [*grid, grid[0]])
    for box in grid:
        runs = runs_of(shape, box)
        taken = [elements_of(whole.view(-1), Segment(0, start, n, 0, 0, *how)).reshape(-1) for start, n, *how in runs]
        assert torch.equal(torch.cat(taken), _inside(whole, box))
        for (start, length, run, stride), elements in zip(runs, taken):
            again = [_inside(whole, part) for part in boxes_of_runs(shape, start, length, run, stride)]
            assert torch.equal(torch.cat(again), elements)


@settings(FIXED, max_examples=60)
@given(SHAPES, st.data())
def test_what_was_saved_as_one_grid_is_read_as_another(
    tmp_path_factory: Any, shape: tuple[int, ...], data: st.DataObject
) -> None:
    """Columns, as tensor parallelism cuts them, are boxes in the file and are read by rows, columns or elements."""
    whole = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    folder = tmp_path_factory.mktemp("grid")
    parts = []
    for box in _grid(data, shape):
        for start, length, run, stride in runs_of(shape, box):
            held = elements_of(whole.view(-1), Segment(0, start, length, 0, 0, run, stride)).reshape(-1)
            parts.append(Part(("model", "a"), shape, start, held.clone, (run, stride)))
    reader = _read_back(folder, [parts])
    for box in _grid(data, shape):
        for start, length, run, stride in runs_of(shape, box):
            wanted = elements_of(whole.view(-1), Segment(0, start, length, 0, 0, run, stride)).reshape(-1)
            assert torch.equal(reader.read("model.a", start, length, (run, stride)), wanted)
    for start, length in _cut(data, prod(shape)):
        assert torch.equal(reader.read("model.a", start, length), whole.view(-1)[start : start + length])


def _written(folder: Path, tensors: dict[str, tuple[Tensor, list[tuple[int, int]]]], dp_size: int) -> Reader:
    """As `dp_size` ranks would: piece after piece goes to the next rank."""
    by_rank = []
    for rank in range(dp_size):
        parts = [
            Part(
                ("model", name), tuple(whole.shape), start, lambda w=whole, s=start, n=length: w.reshape(-1)[s : s + n]
            )
            for name, (whole, pieces) in tensors.items()
            for number, (start, length) in enumerate(pieces)
            if number % dp_size == rank
        ]
        by_rank.append(parts)
    return _read_back(folder, by_rank)


def _read_back(folder: Path, by_rank: list[list[Part]]) -> Reader:
    """Write the parts of each rank, and open what was written."""
    files = {}
    for rank, parts in enumerate(by_rank):
        path = folder / f"__{rank}_0.distcp"
        files[path.name], table = write_parts(path, parts)
        text = json.dumps(table).encode()
        (folder / table_file(rank)).write_bytes(text)
        files[table_file(rank)] = FileSum(len(text), hashlib.sha256(text).hexdigest())
    return Reader(folder, Manifest(1, len(by_rank), {}, "", {}, files))


@pytest.mark.promise("Untrusted checkpoints and bad input", "Any cut of a tensor is read back in any other")
@settings(FIXED, max_examples=60)
@given(st.data())
def test_any_cut_of_a_tensor_is_read_back_in_any_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Written by 1 to 5 ranks, read in other pieces: the same bits, through the files, without a process group."""
    tensors = {}
    for number, shape in enumerate(data.draw(st.lists(SHAPES, min_size=1, max_size=3))):
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
        tensors[str(number)] = torch.arange(prod(shape)).view(shape).to(dtype), _cut(data, prod(shape))
    reader = _written(tmp_path_factory.mktemp("cut"), tensors, data.draw(st.integers(1, 5)))
    for name, (whole, _) in tensors.items():
        found = [reader.read(f"model.{name}", start, length) for start, length in _cut(data, whole.numel())]
        assert torch.equal(torch.cat(found), whole.reshape(-1)) and {t.dtype for t in found} == {whole.dtype}


# ------------------------------------------------------------------------------------- arguments of any type

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 5, 0.5, 1.0, 1e-300),
    *(1e308, nan, inf, -inf, 10**400, "", "0.1", "jordan", "muon", b"x"),
    *("forward", "contiguous", "replicated", "external", "updates", "float32", "original"),
    *((), (0.9,), (0.9, 0.95), [0.9, 0.95], (nan, 0.9), (0.9, 1.0), ("a", "b"), ("a", "b", "c"), (1, 2, 3)),
    *((3.4445, -4.775, 2.0315), (nan, nan, nan), (inf, 1, 1), (3.4445, nan, 2.0), (1e308, 1e308, 1e308), [[None] * 3]),
    *({"a": 1}, {0.9, 0.95}, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.quint8),
    *(torch.tensor(0.1), torch.tensor(nan), torch.tensor(inf), torch.tensor([0.1, 0.2]), torch.tensor(1 + 1j)),
    *(torch.tensor(0.1, device="meta"), object(), float, lambda: 0.1),
]
NUMBERS = ("lr", "weight_decay", "momentum", "adamw_lr", "adamw_eps", "adamw_weight_decay")
HYPERPARAMETERS = (*NUMBERS, "nesterov", "ns_steps", "ns_coefficients", "adjust_lr_fn", "adamw_betas")
FIXED_OPTIONS = tuple(Options.__dataclass_fields__)


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "An argument of any type or value is refused by its name, or training works with it",
)
@pytest.mark.filterwarnings("ignore:Newton-Schulz kernels")
@pytest.mark.parametrize("name", [*HYPERPARAMETERS, *FIXED_OPTIONS])
def test_any_value_of_an_argument_trains_or_is_refused_by_name(name: str) -> None:
    """Whatever is passed: a `ValueError` that names the argument, or a step that works. No NaN is ever accepted."""
    accepted = []
    for value in VALUES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        try:
            optimizer = distmuon.DistMuon(model, **{name: value})
        except ValueError as error:
            assert re.match(rf"(?s)[^;]*{name.removeprefix('adamw_')}.*: .+; .+; .+", str(error)), (value, error)
            continue
        accepted.append(value)
        assert not isinstance(value, float) or not isnan(value), value
        model(torch.randn(5, 4)).square().mean().backward()
        if name == "max_grad_norm" and value == inf:
            assert isfinite(float(optimizer.clip_grad_norm_(inf)))
        optimizer.step()
        finite = all(bool(param.isfinite().all()) for param in model.parameters())
        assert finite or value == 1e308, value
    assert accepted and len(accepted) < len(VALUES) / 2, accepted


@pytest.mark.parametrize("max_norm", [nan, -1.0, -inf])
def test_no_norm_turns_gradients_around(max_norm: float) -> None:
    """torch's own clipping would multiply by it."""
    model = nn.Linear(4, 6)
    optimizer = distmuon.DistMuon(model)
    model(torch.randn(5, 4)).sum().backward()
    with pytest.raises(ValueError, match=rf"max_norm: found {max_norm}; a positive number is needed"):
        optimizer.clip_grad_norm_(max_norm)
