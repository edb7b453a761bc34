"""The slowest lawful backend: a collective that reads and writes its tensors only when it is waited for.

NCCL may read a buffer long after the call that started it has returned; gloo on one machine hardly ever does, so a
buffer that is freed, overwritten or used too early goes unnoticed there. Here every asynchronous collective keeps weak
references alone, fills what it will write with NaN at once, and runs in `wait`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from distmuon.comm import group as collectives


class _Place:
    """A tensor by its address: keeps nothing alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._dtype, self._start = tensor.dtype, tensor.storage_offset()
        self._size, self._stride = tensor.size(), tensor.stride()

    def tensor(self) -> Tensor:
        if self._storage.expired():
            raise RuntimeError("a buffer was freed while its collective was in flight")
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return torch.empty(0, dtype=self._dtype).set_(storage, self._start, self._size, self._stride)


class LateWork:
    """Runs `call(*tensors)`, blocking, in the first `wait`."""

    def __init__(self, call: Callable[..., object], tensors: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        self._call: Callable[..., object] | None = call
        self._places = [_Place(tensor) for tensor in tensors]
        for tensor in written:
            tensor.detach().view(torch.uint8).fill_(255)  # NaN in every floating dtype

    def wait(self, timeout: object = None) -> None:
        """What it raises, it raises again: who waits in steps must not lose it."""
        if self._call is not None:
            self._call(*[place.tensor() for place in self._places])
            self._call = None


class _LateDist:
    """torch.distributed as `group.py` sees it."""

    started = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_to_all_single(self, output: Tensor, input: Tensor, *counts: Any, group: Any, async_op: bool) -> LateWork:
        self.started += 1
        run: Callable[..., object] = lambda o, i: dist.all_to_all_single(o, i, *counts, group=group)  # noqa: E731
        return LateWork(run, (output, input), (output,))

    def broadcast(self, tensor: Tensor, *source: Any, async_op: bool = False, **rest: Any) -> Any:
        if not async_op:
            return dist.broadcast(tensor, *source, **rest)
        self.started += 1
        mine = dist.get_group_rank(rest["group"], dist.get_rank()) == rest["group_src"]
        return LateWork(lambda t: dist.broadcast(t, **rest), (tensor,), () if mine else (tensor,))

    def all_reduce(self, tensor: Tensor, op: Any, *, group: Any, async_op: bool) -> LateWork:
        self.started += 1
        return LateWork(lambda t: dist.all_reduce(t, op, group=group), (tensor,), ())


@contextmanager
def late_collectives() -> Iterator[_LateDist]:
    """Inside, all asynchronous collectives of distmuon on gloo are late."""
    late = _LateDist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "dist", late)
        yield late
