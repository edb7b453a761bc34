"""The memory of tensors: which storage a tensor lies in, and in which order its elements lie there.

This module decides which parameters may move into flat buffers, which keep their memory, and which tensors are plain
memory at all. It knows no rank and no bucket.

[Note: parameters that stay] A parameter moves into its bucket's flat buffer, so that the all-gather writes it. Its
address then changes once, so no other code may depend on the old address. Other code does, or may, depend on it if

    its strides are not row-major        channels_last and transposed weights: kernels are chosen by the strides
    its memory is shared (CPU)           `model.share_memory()`: other processes have mapped it
    its storage is larger than it        it is a view of another tensor (cuDNN's flat RNN weights)
    a buffer, a frozen parameter or a    the module itself holds a second reference to the memory
    tensor attribute lies in it

Such a parameter keeps its memory and its strides, and is copied out of the flat buffer after each all-gather
(it is *staged*). In the flat buffer, in gradients, state and checkpoints its elements are in row-major order like all
others. A second reference of the same size outside the model (`p.data` in a list, a NumPy array) cannot be detected:
parameters that were loaded from a file look the same, and they must not be held twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Interval = tuple[int, int]  # addresses: start, end

_flat: dict[int, StorageWeakRef] = {}  # the storages of flat parameter buffers; a weak reference keeps the key unique


def note_flat(buffer: Tensor) -> None:
    """Register `buffer` as a flat parameter buffer, whose memory belongs to no other code."""
    for key, known in list(_flat.items()):
        if known.expired():
            del _flat[key]
    storage = StorageWeakRef(buffer.untyped_storage())
    _flat[storage.cdata] = storage


def is_in_flat(tensor: Tensor) -> bool:
    """Whether `tensor` (plain memory) lies in a flat parameter buffer of any optimizer."""
    return tensor.untyped_storage()._cdata in _flat


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is strided memory that any kernel may read and write.

    Its elements must lie in its own storage, and its class must not override `__torch_dispatch__`; a subclass that only
    adds Python methods, like `nn.Parameter`, is plain.
    """
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return False
    if tensor.is_meta or not tensor.numel():
        return True
    end = (tensor.storage_offset() + _span(tensor)) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= end and tensor.data_ptr() != 0


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory without overlap or gap, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def written_once(tensor: Tensor) -> Tensor | None:
    """The view of `tensor` that holds each element in memory once: expanded dimensions are cut to one entry.

    None if the memory overlaps in another way (sliding windows), since it cannot be written as a whole.
    """
    for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    reached = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride <= reached:
            return None
        reached += stride * (size - 1)
    return tensor


def addresses_of(tensor: Tensor) -> Interval:
    """The start and end addresses of a plain tensor."""
    start = tensor.data_ptr()
    return start, start + _span(tensor) * tensor.element_size()


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The indices of two dense tensors that share memory, in order; None if none do."""
    reached, holder = 0, 0
    for start, end, number in sorted((*addresses_of(tensor), number) for number, tensor in enumerate(tensors)):
        if start < reached:
            return min(holder, number), max(holder, number)
        reached, holder = end, number
    return None


def stays(params: Sequence[nn.Parameter], model: nn.Module | None) -> list[bool]:
    """By parameter (dense), whether it must keep its memory; see [Note: parameters that stay]."""
    known = {id(param) for param in params}
    held = _merged(addresses_of(tensor) for tensor in _held_by(model) if id(tensor) not in known)
    return [_stays(param, held) for param in params]


def _stays(param: nn.Parameter, held: Sequence[Interval]) -> bool:
    if not is_plain(param):
        return False  # checks.py refuses to train it
    if not param.is_contiguous():
        return True
    if param.is_meta:
        return param.untyped_storage().nbytes() > param.nbytes
    if param.device.type == "cpu" and param.untyped_storage().is_shared():  # always true on CUDA
        return True
    if not is_in_flat(param) and param.untyped_storage().nbytes() > param.nbytes:
        return True
    start, end = addresses_of(param)
    last = bisect_right(held, start, key=lambda interval: interval[1])  # the first interval that ends after `start`
    return last < len(held) and held[last][0] < end


def _held_by(model: nn.Module | None) -> Iterator[Tensor]:
    """Plain tensors with memory that the model's modules hold: parameters, buffers, attributes."""
    for module in model.modules() if model is not None else ():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and is_plain(tensor) and not tensor.is_meta and tensor.numel():
                yield tensor


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of `intervals`, as sorted intervals that do not overlap."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _span(tensor: Tensor) -> int:
    """The number of elements of storage from the first element to the last; no stride is negative."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape)) if tensor.numel() else 0
