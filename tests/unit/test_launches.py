"""Launches, memory traffic and host synchronisations of a step on a GPU, counted without one.

The engine runs on fake tensors of device "cuda" with the shipped tables of shapes at full size, and a group whose
collectives do nothing. Counted are the operators that reach the dispatcher, views left out: an operator is a launch,
and moves the bytes that it reads and writes, each once. Not seen are kernels inside an operator: copies inside
`addmm`, several launches of a multi-tensor kernel. Traffic is by element of Muon on the first rank, without that of the
products of Newton-Schulz.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distmuon.comm.group import DataParallelGroup, Pending
from distmuon.layout.layout import make_layout
from distmuon.math.codecs import Int8Updates
from distmuon.options import Options, Precision
from distmuon.planning.shapes import shape_table
from distmuon.planning.step_time import INT8
from distmuon.step.engine import Engine
from distmuon.step.metrics import Metrics
from tests.operators import NAMESPACE, kernels_as_operators

_aten = torch.ops.aten
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "promote_types"}
_WAITS = {"nonzero", "equal"}
_GROUP = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
PARAM_GROUPS = [
    {
        **_GROUP,
        "rule": "muon",
        "nesterov": True,
        "ns_steps": 5,
        "ns_coefficients": "jordan",
        "adjust_lr_fn": "match_rms_adamw",
    },
    {**_GROUP, "rule": "adamw", "betas": (0.9, 0.95), "eps": 1e-8},
]


@dataclass
class Counts:
    """By stage of the step."""

    launches: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    num_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    waits: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stage: str = "other"


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:  # fake tensors have no values
            self._counts.waits[self._counts.stage] += args[0].device.type == "cuda"
            return args[0].dtype != torch.bool
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").removesuffix(".out")
        if _waits(name, args, kwargs, result):
            self._counts.waits[self._counts.stage] += 1
        if func.namespace not in ("aten", NAMESPACE) or func.is_view or name in _NO_KERNEL:
            return result
        read, written = _traffic(func, args, kwargs, result)
        if any(tensor.device.type == "cuda" for tensor in (*read, *written)):
            stage = "products" if name in _PRODUCTS else self._counts.stage
            self._counts.launches[stage] += 1
            self._counts.num_bytes[stage] += sum(_num_bytes(tensor) for tensor in (*read, *written))
        return result


def _traffic(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operator reads, and those that it writes."""
    read, written = [], []
    for number, argument in enumerate(func._schema.arguments):
        given = args[number] if number < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        overwritten = argument.is_out or argument.name in _OVERWRITES.get(func._schema.name, ())
        if not overwritten:
            read += tensors
        if (
            argument.alias_info is not None
            and argument.alias_info.is_write
            and argument.name != _SELDOM_WRITTEN.get(func._schema.name)
        ):
            written += tensors
    if not written:
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return read, written


_OVERWRITES = {
    **{f"aten::{name}": ("self",) for name in ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")},
    f"{NAMESPACE}::momentum": ("update",),
    f"{NAMESPACE}::join": ("master",),
    f"{NAMESPACE}::split": ("param", "remainder"),
}
# AdamW's gradients only with a grad_scale, masters in a comparison only where parameters were written by others.
_SELDOM_WRITTEN = {"aten::_fused_adamw_": "grads", f"{NAMESPACE}::absorb": "master"}


def _num_bytes(tensor: Tensor) -> int:
    """Of the memory behind a tensor, without its expanded dimensions."""
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        distinct *= size if stride else 1
    return distinct * tensor.element_size() if tensor.numel() else 0


def _waits(name: str, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether the host waits for the device: it reads a value, or copies between the two, and not behind its back."""
    if name in _WAITS:
        return True
    if name not in ("copy_", "_to_copy"):
        return False
    ends = {args[1].device.type if name == "copy_" else args[0].device.type, result.device.type}
    return len(ends) > 1 and not (kwargs.get("non_blocking") or (name == "copy_" and True in args[2:]))


_AS_OPERATORS = {
    Tensor.tolist: lambda x: [x.reshape(-1)[0].item()] * x.numel(),
    Tensor.data_ptr: lambda x: x.storage_offset() * x.element_size(),
    Tensor.copy_: _aten.copy_.default,
    Tensor.__invert__: _aten.bitwise_not.default,
    Tensor.contiguous: lambda x: (
        x if x.is_contiguous() else _aten.clone.default(x, memory_format=torch.contiguous_format)
    ),
}


class _WithoutDevice(TorchFunctionMode):
    """What torch without CUDA refuses on fake tensors of CUDA: pinned memory, and calls that ask for a device guard."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if func in _AS_OPERATORS:
            return _AS_OPERATORS[func](*args, **kwargs)
        if func is Tensor.__getitem__:
            return _item(*args)
        if func is Tensor.__setitem__:
            target = _item(*args[:2])
            return _aten.copy_.default(target, args[2]) if isinstance(args[2], Tensor) else target.fill_(args[2])
        return func(*args, **kwargs)


def _item(tensor: Tensor, index: Any) -> Tensor:
    for dim, part in reversed(list(enumerate(index if isinstance(index, tuple) else (index,)))):
        if isinstance(part, slice):
            start, stop, step = part.indices(tensor.size(dim))
            tensor = _aten.slice.Tensor(tensor, dim, start, stop, step)
        else:
            tensor = _aten.select.int(tensor, dim, part)
    return tensor


class _Stream:
    device = torch.device("cuda", 0)

    def wait_stream(self, other: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass


class _Event:
    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Idle(DataParallelGroup):
    """A group of `dp_size` ranks whose collectives only count."""

    def __init__(self, dp_size: int, counts: Counts) -> None:
        super().__init__(None, lambda *_: None)
        self.dp_size, self._seen = dp_size, counts

    def _started(self, result: Tensor) -> Pending:
        self._seen.launches["collectives"] += 1
        return Pending(result)

    def start_reduce_scatter(self, output: Tensor, input: Tensor, **_: Any) -> Pending:
        return self._started(output)

    def start_all_gather(self, output: Tensor, input: Tensor, **_: Any) -> Pending:
        return self._started(output)

    def start_all_to_all(self, output: Tensor, input: Tensor, *_: Any, **__: Any) -> Pending:
        return self._started(output)

    def start_all_reduce(self, tensor: Tensor, **_: Any) -> Pending:
        return self._started(tensor)


class _Stages(Metrics):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    @contextmanager
    def stage(self, name: str, bucket: int | None = None) -> Iterator[None]:
        before, self._counts.stage = self._counts.stage, name
        yield
        self._counts.stage = before


class Found(NamedTuple):
    launches: int  # without the products of Newton-Schulz and the collectives
    products: int
    collectives: int
    bytes_per_muon_element: float  # without products, the gradients' way in, staged parameters' way out, and AdamW
    waits: int  # of the host for the device
    launches_by_stage: dict[str, int]


def count(
    model: str,
    dp_size: int,
    *,
    missing: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    options: Options | None = None,
    kernels: bool = True,
) -> Found:
    """Count the second step of the first rank; `missing`: so many parameters have no gradient on it.

    `kernels`: whether the device has those of math/fused.py.
    """
    specs = shape_table(model, dtype)
    layout = make_layout(specs, dp_size)
    counts, options = Counts(), options or Options()
    with ExitStack() as modes, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        patch.setattr(torch.cuda, "Event", _Event)
        modes.enter_context(kernels_as_operators(kernels))
        stream = _Stream()
        modes.enter_context(torch.no_grad())
        modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        modes.enter_context(_WithoutDevice())
        params = [nn.Parameter(torch.empty(spec.shape, dtype=dtype, device="cuda")) for spec in specs]
        groups = [_Idle(dp_size, counts)]
        group_of = [0 if spec.rule == "muon" else 1 for spec in specs]
        metrics = _Stages(counts)
        engine = Engine(layout, params, groups, groups, options, group_of, metrics, gathers_in_forward=False)
        modes.enter_context(_Counting(counts))
        for _ in range(2):
            for counted in (counts.launches, counts.num_bytes, counts.waits):
                counted.clear()  # the second step counts
            counts.stage = "gradients in"
            for index in reversed(range(missing, len(params))):
                params[index].grad = torch.empty_like(params[index])
                engine.collect(index, True)
            counts.stage = "adopt"
            engine.reduce(7)
            engine.ranks_disagree()
            counts.stage = "update"
            engine.update(PARAM_GROUPS)
            counts.stage = "parameters out"
            engine.wait_params()
    elements, adamw = (
        sum(piece.segment.length for storage in engine.storage.buckets for piece in getattr(storage, rule))
        for rule in ("muon", "adamw")
    )
    products, collectives = counts.launches.pop("products"), counts.launches.pop("collectives")
    each_of_adamw = ADAMW_BYTES + (0 if dtype == torch.float32 else ROUNDING + COMPARISON[kernels])
    moved = sum(num for stage, num in counts.num_bytes.items() if stage not in _NOT_OF_MUON) - adamw * each_of_adamw
    launches, waits = sum(counts.launches.values()), sum(counts.waits.values())
    return Found(launches, products, collectives, moved / elements, waits, dict(counts.launches))


_NOT_OF_MUON = ("gradients in", "parameters out", "products")
# An element of AdamW: its kernel, norm and largest element of the gradient.
ADAMW_BYTES = 28 + 4 + 4
# Of a parameter of 16 bits: rounding it from its master; comparing the two, with kernels and without.
ROUNDING, COMPARISON = 6, {True: 6, False: 22}


@pytest.mark.parametrize(
    ("model", "dp_size", "launches", "num_bytes"),
    [
        ("llama-8b", 64, 630, 51.0),  # of the launches 377 and 143 are gradients in and parameters out
        pytest.param("llama-8b", 8, 620, 46.5, marks=pytest.mark.slow),
        pytest.param("qwen3", 8, 1_450, 46.1, marks=pytest.mark.slow),
    ],
)
def test_launches_and_bytes_of_a_step(model: str, dp_size: int, launches: int, num_bytes: float) -> None:
    """Of Qwen3 23,314 launches and 169 bytes were counted when every expert had kernels of its own."""
    found = count(model, dp_size)
    print(f"\n{model}, dp {dp_size}: {found}")
    assert found.launches <= launches and found.bytes_per_muon_element <= num_bytes and found.waits == 0


def test_the_host_does_not_wait_where_gradients_are_missing() -> None:
    """It read twice from the device in such a step."""
    without, missing = count("gpt2", 8), count("gpt2", 8, missing=2)
    assert without.waits == missing.waits == 0
    assert missing.launches <= without.launches + 20


def test_float32_parameters_have_no_master_to_compare() -> None:
    assert count("gpt2", 8, dtype=torch.float32).bytes_per_muon_element < count("gpt2", 8).bytes_per_muon_element - 11


def test_the_coding_of_updates_in_int8() -> None:
    """As the planner prices it; 224 launches."""
    codec, counts, size = Int8Updates(torch.bfloat16), Counts(), (4, 1024, 4096)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _WithoutDevice(), _Counting(counts):
        polar = torch.empty(size, dtype=torch.bfloat16, device="cuda")
        sent = torch.empty(codec.bytes(polar.numel()), dtype=torch.uint8, device="cuda")
        counts.stage = "rounded"
        codec.rounded(polar)
        counts.stage = "sent"
        codec.encode(codec.room(sent), sent)
        counts.stage = "arrived"
        codec.decode(sent)
    assert {stage: round(n / polar.numel()) for stage, n in counts.num_bytes.items()} == INT8._asdict()


def test_without_kernels_a_step_moves_more() -> None:
    """docs/gpu.md has the figure. There, too, the host does not wait."""
    found = count("llama-8b", 64, kernels=False)
    assert 120 < found.bytes_per_muon_element < 129 and found.waits == 0


def test_remainders_are_split_where_they_lie() -> None:
    """175 bytes, when the halves of a master were shifted out of it."""
    assert count("llama-8b", 64, options=Options(precision=Precision(master="remainder"))).bytes_per_muon_element < 56
