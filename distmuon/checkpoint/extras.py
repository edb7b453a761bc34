"""State of a run beside the trained parameters: frozen parameters and module buffers, RNG states, small state.

This module decides which of it a checkpoint keeps, and in which form: only values that `torch.load(weights_only=True)`
reads back. It knows no folder and no order of saving.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distmuon.checkpoint.archives import MAX_NESTING, check_small
from distmuon.checks import check_one_group, not_a_cut, unwrap
from distmuon.comm.agreement import bit_sums
from distmuon.errors import problem
from distmuon.step.dtensors import is_dtensor, reshard

_EXTRA = "_extra_state"
_LOG = logging.getLogger("distmuon")


def check_given(model: object, optimizer: object) -> None:
    """Raise unless `optimizer` is a DistMuon and `model` holds its parameters."""
    if isinstance(model, nn.Module):
        reshard(model)
    held = {id(param) for param in model.parameters()} if isinstance(model, nn.Module) else set()
    params = getattr(optimizer, "_params", None) if hasattr(optimizer, "quiesced") else None
    if params is None:
        raise problem(
            "optimizer",
            found=f"a {type(optimizer).__name__}",
            needed="a DistMuon is needed",
            cure="pass the optimizer that trains",
        )
    if not held.issuperset(map(id, params)):
        raise problem(
            "model",
            found=f"a {type(model).__name__} without some of the optimizer's parameters",
            needed="the model that the optimizer was made from is needed",
            cure="pass that model",
        )
    check_one_group(
        getattr(optimizer, "_specs", ()),
        "checkpoint",
        "call optimizer.state_dict() on all ranks, and save it beside the model's in a file of each rank",
    )


def check_path(path: object, *, new: bool) -> None:
    """Raise unless `path` can name a folder; the name of a `new` folder must not be empty."""
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path) or (new and not Path(path).name):
        raise problem(
            "path", found=f"found {path!r}", needed="a folder's name is needed", cure="write 'runs/a/step-100'"
        )


# ------------------------------------------------------------------------------- beside trained parameters


@dataclass(frozen=True, slots=True)
class UntrainedTensors:
    """Entries of a model's state dict beside the trained parameters, by fqn; tied tensors once.

    `plain`: dense tensors, views of the model's memory; those inside a tensor subclass are named "fqn.name".
    `non_dense`: sparse and quantised tensors. `extra`: modules with `get_extra_state`, and its result.
    `unknown`: entries without a parameter, buffer or extra state; a hook or an override of `state_dict` added them.
    `skipped`: tensors that have no values of their own on this rank (meta, DTensor, opaque subclasses); they are not
    saved. `cut`: DTensors that are sharded or replicated.
    """

    plain: dict[str, Tensor]
    non_dense: dict[str, Tensor]
    extra: dict[str, tuple[nn.Module, Any]]
    unknown: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    cut: Mapping[str, Tensor] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The names of all entries that are saved."""
        return [*self.plain, *self.non_dense, *self.extra, *self.cut]


def untrained_tensors(model: nn.Module, trained: Sequence[nn.Parameter]) -> UntrainedTensors:
    """Collect the tensors and extra states of `model` beside `trained`. Raises `ValueError` naming a lazy tensor."""
    model = unwrap(model, "external")
    for fqn, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):  # torch's own error would not name it
            raise _not_kept(fqn, "not initialized yet")
    trained_ids, state = {id(param) for param in trained}, model.state_dict()
    kept_addresses = {_address(value) for value in state.values() if isinstance(value, Tensor)} - {None}
    plain: dict[str, Tensor] = {}
    non_dense: dict[str, Tensor] = {}
    extra: dict[str, tuple[nn.Module, Any]] = {}
    skipped: list[str] = []
    cut: dict[str, Tensor] = {}
    for fqn, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in trained_ids and fqn in state and is_dtensor(tensor) and not not_a_cut(tensor):
            cut[fqn] = tensor
        elif id(tensor) not in trained_ids and (fqn in state or _address(tensor) in kept_addresses):
            try:
                parts = dict(plain_parts(fqn, tensor))
            except ValueError:  # a tensor that cannot be saved does not stop the save; it is logged
                skipped.append(fqn)
                continue
            for name, part in parts.items():
                (non_dense if is_non_dense(part) else plain)[name] = part
    for prefix, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            fqn = f"{prefix}.{_EXTRA}" if prefix else _EXTRA
            extra[fqn] = module, state[fqn] if fqn in state else module.get_extra_state()
    return UntrainedTensors(plain, non_dense, extra, tuple(_unknown(model, state)), tuple(skipped), cut)


def _unknown(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names, places = {fqn for fqn, _ in held}, {_address(tensor) for _, tensor in held}
    skipped = [fqn for fqn in state if fqn not in names and fqn.rpartition(".")[2] != _EXTRA]
    return [fqn for fqn in skipped if not isinstance(state[fqn], Tensor) or _address(state[fqn]) not in places]


def _address(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size] | None:
    """Identity of a tensor's memory, since modules and their state dict may name it differently; None: no memory."""
    try:
        return (tensor.data_ptr(), tensor.dtype, tensor.shape) if tensor.numel() else None
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, wrapped, not materialized
        return None


def plain_parts(fqn: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a checkpoint holds for a tensor of a model: itself, or the tensors inside a tensor subclass.

    `__tensor_flatten__` names the tensors inside a subclass; its other attributes belong to the model. Dense tensors
    come without their class and share memory; sparse and quantised tensors are the model's own objects.
    """
    kind = type(tensor)
    found = None
    if kind.__module__.startswith("torch.distributed"):
        found = f"a {kind.__name__}, of which this rank holds only a part"
    elif callable(getattr(kind, "__tensor_flatten__", None)):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from plain_parts(f"{fqn}.{name}", getattr(tensor, name))
        return
    elif kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        found = f"a {kind.__name__} whose values no __tensor_flatten__ names"
    elif tensor.is_meta:
        found = "on the meta device, without values"
    elif tensor.is_nested or tensor.is_mkldnn:
        found = "nested" if tensor.is_nested else "in mkldnn's layout"
    if found is not None:
        raise _not_kept(fqn, found)
    if is_non_dense(tensor):
        yield fqn, tensor
        return
    with torch._C.DisableTorchFunctionSubclass():
        yield fqn, tensor.detach().as_subclass(Tensor)


def _not_kept(fqn: str, found: str) -> ValueError:
    return problem(
        fqn,
        found=f"it is {found}",
        needed="a checkpoint holds tensors with values of their own",
        cure="register it with persistent=False, or make it a plain tensor",
    )


def is_non_dense(tensor: Tensor) -> bool:
    """Whether a tensor is sparse or quantised, that is, more than strided elements of one dtype."""
    return tensor.layout != torch.strided or tensor.is_quantized


def states_of(untrained: UntrainedTensors) -> dict[str, Any]:
    """{fqn: copy on the CPU} of non-dense tensors and extra states. Raises `ValueError` naming unsafe values."""
    states: dict[str, Any] = {fqn: _safe_copy(fqn, tensor) for fqn, tensor in untrained.non_dense.items()}
    for fqn, (module, state) in untrained.extra.items():
        if type(module).set_extra_state is nn.Module.set_extra_state:
            raise problem(
                fqn,
                found=f"a {type(module).__name__} has get_extra_state and no set_extra_state",
                needed="both are needed",
                cure="define set_extra_state",
            )
        states[fqn] = _safe_copy(fqn, state)
    return states


_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype)
_DEPTH = MAX_NESTING - 5  # the checkpoint adds containers around the state
_CONTAINERS = (list, tuple, dict, OrderedDict, torch.Size)


def _safe_copy(name: str, value: Any, depth: int = 0) -> Any:
    """Copy `value`, which must be loadable without executing anything; raise, naming the place, if it is not."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind in _CONTAINERS and depth < _DEPTH:
        if isinstance(value, dict):
            keys = [_safe_copy(f"{name}: a key", key, depth + 1) for key in value]
            return kind(zip(keys, [_safe_copy(f"{name}[{key!r}]", item, depth + 1) for key, item in value.items()]))
        return kind([_safe_copy(f"{name}[{number}]", item, depth + 1) for number, item in enumerate(value)])
    if isinstance(value, Tensor) and not callable(getattr(kind, "__tensor_flatten__", None)):
        ((_, tensor),) = plain_parts(name, value)
        tensor = tensor.detach().to("cpu", copy=True)
        return tensor if is_non_dense(tensor) else tensor.resolve_conj().resolve_neg().contiguous()
    raise problem(
        name,
        found=f"a {kind.__name__}" + (f" more than {_DEPTH} containers deep" if kind in _CONTAINERS else ""),
        needed="tensors, numbers, strings, bytes, None and dicts, lists and tuples of them can be loaded safely",
        cure="convert it before saving",
    )


def write_untrained(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, of the same shape, into `tensor`, which may be expanded (its elements share memory)."""
    if is_non_dense(tensor):
        if tensor.layout not in (torch.strided, torch.sparse_coo):
            tensor.resize_as_sparse_(value)  # it may have another number of elements
        tensor.copy_(value)
        return
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor, value = tensor.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    tensor.copy_(value)


def why_not_taken(tensor: Tensor, value: object) -> str | None:
    """Why `write_untrained` could not copy `value`, or would lose some of it; None if it can."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    needed, found = _form(tensor), _form(value)
    castable = not is_non_dense(tensor) and torch.can_cast(value.dtype, tensor.dtype)
    if needed[1:] != found[1:] or (needed != found and not castable):
        return f"{' '.join(map(str, found))}, not {' '.join(map(str, needed))}"
    if not is_non_dense(tensor):
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1 and not _is_repeated(value, dim):
                return f"different values along dimension {dim}, which is expanded here"
    return None


def _form(tensor: Tensor) -> list[Any]:
    """Properties that must match for a copy: first the dtype, which may differ if the cast loses nothing."""
    form = [tensor.dtype, tuple(tensor.shape), str(tensor.layout).removeprefix("torch.")]
    if tensor.is_quantized:
        form.append(tensor.qscheme())
    if tensor.layout in (torch.sparse_bsr, torch.sparse_bsc):
        form.append(f"in blocks of {tuple(tensor.values().shape[1:3])}")
    return form


def _is_repeated(value: Tensor, dim: int) -> bool:
    first = value.narrow(dim, 0, 1).expand_as(value)
    return torch.equal(bit_sums(first), bit_sums(value))


def compare(facts: Sequence[Mapping[str, object]]) -> tuple[list[str], set[str]]:
    """The names that all ranks hold, and those whose facts are the same on all ranks. `facts`: those of each rank."""
    shared = [name for name in facts[0] if all(name in other for other in facts)]
    return shared, {name for name in shared if all(other[name] == facts[0][name] for other in facts)}


def facts_of(untrained: UntrainedTensors, states: Mapping[str, Any]) -> dict[str, object]:
    """{fqn: dtype, shape and bit sums, or the sum of the bytes to write}. Waits for each device once."""
    facts: dict[str, object] = {}
    by_device: dict[torch.device, list[str]] = {}
    for fqn, tensor in untrained.plain.items():
        by_device.setdefault(tensor.device, []).append(fqn)
    for fqns in by_device.values():
        sums = torch.stack([bit_sums(untrained.plain[fqn]) for fqn in fqns]).tolist()
        for fqn, pair in zip(fqns, sums):
            facts[fqn] = (str(untrained.plain[fqn].dtype), tuple(untrained.plain[fqn].shape), *pair)
    ordered = {fqn: facts[fqn] for fqn in untrained.plain}
    return ordered | {fqn: hashlib.sha256(_saved_bytes(value)).hexdigest() for fqn, value in states.items()}


# ------------------------------------------------------------------------------------------- small state


def _saved_bytes(value: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(value, memory)
    return memory.getvalue()


def packed(**state: Any) -> bytes:
    """`state` as `torch.save` writes it. Raises, naming the entry, if only a full unpickler could load it."""
    for name, value in state.items():
        memory = io.BytesIO(_saved_bytes(value))
        try:
            check_small(memory)
            torch.load(memory, map_location="cpu", weights_only=True)
        except Exception as error:
            found = str(error).partition("\n")[0]
            raise problem(
                name,
                found=f"it holds a value that cannot be loaded safely ({found})",
                needed="numbers, strings, tensors and lists, tuples and dicts of them are needed",
                cure="convert it before saving",
            ) from error
    return _saved_bytes(state)


def unpacked(path: Path, *names: str) -> dict[str, Any]:
    """Load a file that `packed` made with at least `names`, executing nothing in it.

    Raises `ValueError` naming the file if it is anything else, or if it would need much more memory than it has bytes
    (`archives.check_small`).
    """
    try:
        with path.open("rb") as file, torch.sparse.check_sparse_tensor_invariants():
            check_small(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= set(names):
            raise TypeError(f"found {sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__}")
    except Exception as error:
        raise problem(
            str(path),
            found=f"it cannot be loaded safely ({str(error).partition(chr(10))[0]})",
            needed="a file that save_checkpoint wrote is needed",
            cure="load an earlier checkpoint",
        ) from error
    return state


# -------------------------------------------------------------------------------------- random generators


def rng_states(device: torch.device) -> dict[str, Any]:
    """The states of torch's generators on the CPU and on `device`, of Python's, and of NumPy's if it is imported."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state()
        if isinstance(state, tuple):
            kind, keys, *rest = state
            states["numpy"] = (kind, keys.tolist(), *rest)
        else:
            _LOG.warning("the state of numpy.random is not saved: its generator is not MT19937")
    return states


def restore_rng(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `rng_states` returned. Raises `ValueError`, before any is set, for impossible states.

    The libraries do not check positions, and a bad one would make them read outside their tables.
    """
    check_rng(states, device)
    torch.set_rng_state(states["cpu"])
    random.setstate(states["python"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if (numpy := sys.modules.get("numpy")) is not None and "numpy" in states:
        numpy.random.set_state(states["numpy"])


_STATE_WORDS = 624  # words of a Mersenne Twister, which all three generators on the CPU are
_TORCH_HEAD, _TORCH_NORMAL = struct.Struct("=QiiQ"), struct.Struct("=3dif")  # in at::CPUGeneratorImpl's state


def check_rng(states: Mapping[str, Any], device: torch.device) -> None:
    """Raise `ValueError`, naming the generator, for a state that it can never be in."""
    _require(isinstance(states, dict) and {"cpu", "python"} <= states.keys(), "generators", "no dict of states")
    _check_torch(states["cpu"], torch.get_rng_state())
    _check_python(states["python"])
    if "numpy" in states:
        _check_numpy(states["numpy"])
    if device.type == "cuda" and "cuda" in states:
        _check_bytes(states["cuda"], torch.cuda.get_rng_state(device), "torch's generator of the GPU")


def _check_python(state: Any) -> None:
    """Check a state of `random.getstate`: (version, words and position, the next normal number or None)."""
    name = "Python's generator"
    version, words_and_position, normal = _exactly(state, 3, name)
    _require(version == 3, name, f"version {version!r:.20}")
    *words, position = _exactly(words_and_position, _STATE_WORDS + 1, name)
    _check_words(words, position, name)
    _require(normal is None or _is_finite(normal), name, f"{normal!r:.40} as the next normal number")


def _check_numpy(state: Any) -> None:
    """Check a state of `numpy.random.get_state`: (kind, words, position, whether a normal number is left, it)."""
    name = "NumPy's generator"
    kind, words, position, has_normal, normal = _exactly(state, 5, name)
    _require(type(kind) is str and kind == "MT19937", name, f"kind {kind!r:.20}")
    _check_words(_exactly(words, _STATE_WORDS, name), position, name)
    _require(type(has_normal) is int and has_normal in (0, 1), name, f"has_gauss {has_normal!r:.20}")
    _require(_is_finite(normal), name, f"{normal!r:.40} as the next normal number")


def _check_torch(state: Any, current: Tensor) -> None:
    """Check torch's CPU generator: `left` counts down while `position` counts up, so their sum stays in the table."""
    name = "torch's generator"
    _check_bytes(state, current, name)
    data = bytes(state.tolist())
    _, left, seeded, position = _TORCH_HEAD.unpack_from(data)
    _require(
        seeded == 1 and 1 <= left <= _STATE_WORDS and position + left <= _STATE_WORDS + 1,
        name,
        f"position {position} of {left}",
    )
    normal = _TORCH_NORMAL.unpack_from(data, _TORCH_HEAD.size + 8 * _STATE_WORDS)[:3]
    _require(all(map(isfinite, normal)), name, f"{normal} as normal numbers")


def _check_bytes(state: Any, current: Tensor, name: str) -> None:
    fits = isinstance(state, Tensor) and state.dtype == torch.uint8 and state.shape == current.shape
    _require(fits and state.layout == torch.strided and not state.is_meta, name, f"no {tuple(current.shape)} bytes")


def _check_words(words: Sequence[Any], position: Any, name: str) -> None:
    fits = all(type(word) is int and 0 <= word < 1 << 32 for word in words)
    _require(fits and any(words), name, f"words that are not {_STATE_WORDS} of 32 bits, or all 0")
    _require(
        type(position) is int and 0 <= position <= _STATE_WORDS, name, f"position {position!r:.20} of {_STATE_WORDS}"
    )


def _exactly(value: Any, length: int, name: str) -> Sequence[Any]:
    _require(isinstance(value, (tuple, list)) and len(value) == length, name, f"no {length} entries")
    return list(value)


def _is_finite(value: object) -> bool:
    return type(value) is float and isfinite(value)


def _require(fits: bool, name: str, found: str) -> None:
    if not fits:
        raise ValueError(f"{name} cannot be in this state: {found}")


def versions() -> dict[str, str]:
    """The versions of the software that writes a checkpoint."""
    here = sys.modules["distmuon"]
    return {"distmuon": here.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
