"""Whose memory a tensor lies in, and in which order its elements lie there.

Decides which parameters may move into flat buffers, which stay where they are, and which tensors are plain memory at
all. Knows no rank and no bucket.

[Note: parameters that stay] A parameter moves into its bucket's flat buffer, so that the all-gather writes it. Its
place then changes once, and nobody must depend on the old one. Somebody does, or may, where

    its strides are not row-major        channels_last and transposed weights: kernels are chosen by the strides
    its memory is shared (CPU)           `model.share_memory()`: other processes have mapped it
    its storage is larger than it        a view of a tensor that somebody else holds (cuDNN's flat RNN weights)
    a buffer, a frozen parameter or a    the module itself holds a second name for the memory
    tensor attribute lies in it

Such a parameter keeps its memory and its strides, and is copied out of the flat buffer after each all-gather
(*staged*). In the flat buffer, in gradients, state and checkpoints its elements are in row-major order like all others.
What no fact on a tensor tells is a second name of the same size outside of the model (`p.data` in a list, a NumPy
array): files are loaded into such memory, too, and must not be held twice for it.
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
    """`buffer` is a flat parameter buffer: what lies in it is no foreign memory."""
    for key, known in list(_flat.items()):
        if known.expired():
            del _flat[key]
    storage = StorageWeakRef(buffer.untyped_storage())
    _flat[storage.cdata] = storage


def is_in_flat(tensor: Tensor) -> bool:
    """Whether `tensor` (plain memory) lies in a flat parameter buffer, of whichever optimizer."""
    return tensor.untyped_storage()._cdata in _flat


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is strided memory that any kernel may read and write: its elements lie in its own storage, and
    no `__torch_dispatch__` stands between. A subclass in Python alone (`nn.Parameter`'s) is plain."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return False
    if tensor.is_meta or not tensor.numel():
        return True
    end = (tensor.storage_offset() + _span(tensor)) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= end and tensor.data_ptr() != 0


def is_dense(tensor: Tensor) -> bool:
    """Whether each element has a place of its own and no gaps lie between, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def written_once(tensor: Tensor) -> Tensor | None:
    """The part of `tensor` (a view) that holds each element in memory once: one row of what was expanded.

    None for memory that overlaps in another way (sliding windows), which cannot be written as a whole.
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


def of(tensor: Tensor) -> Interval:
    """The addresses between which a plain tensor lies."""
    start = tensor.data_ptr()
    return start, start + _span(tensor) * tensor.element_size()


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The numbers of two dense tensors that share memory, in order; None if there are none."""
    reached, holder = 0, 0
    for start, end, number in sorted((*of(tensor), number) for number, tensor in enumerate(tensors)):
        if start < reached:
            return min(holder, number), max(holder, number)
        reached, holder = end, number
    return None


def stays(params: Sequence[nn.Parameter], model: nn.Module | None) -> list[bool]:
    """By parameter (dense), whether it must keep its memory; see [Note: parameters that stay]."""
    known = {id(param) for param in params}
    others = _merged(of(tensor) for tensor in _held_by(model) if id(tensor) not in known)
    return [_stays(param, others) for param in params]


def _stays(param: nn.Parameter, others: Sequence[Interval]) -> bool:
    if not is_plain(param):
        return False  # refused where it is trained
    if not param.is_contiguous():
        return True
    if param.is_meta:
        return param.untyped_storage().nbytes() > param.nbytes
    if param.device.type == "cpu" and param.untyped_storage().is_shared():  # on CUDA it always says so
        return True
    if not is_in_flat(param) and param.untyped_storage().nbytes() > param.nbytes:
        return True
    start, end = of(param)
    last = bisect_right(others, start, key=lambda interval: interval[1])  # the first that ends behind `start`
    return last < len(others) and others[last][0] < end


def _held_by(model: nn.Module | None) -> Iterator[Tensor]:
    """Plain tensors with memory that the model's modules hold: parameters, buffers, attributes."""
    for module in model.modules() if model is not None else ():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and is_plain(tensor) and not tensor.is_meta and tensor.numel():
                yield tensor


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Sorted and apart."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _span(tensor: Tensor) -> int:
    """Elements from the first in memory to the last, both counted; no stride is negative."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape)) if tensor.numel() else 0
