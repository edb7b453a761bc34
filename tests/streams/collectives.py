"""torch.distributed on one rank of a modelled GPU: each collective on its group's stream, checked as NCCL demands it.

The other ranks do not exist. What they would send is whatever makes the ranks agree: an all-reduce multiplies by the
number of ranks, and all other receive buffers keep or repeat this rank's values. The works hold no tensor: `Pending`
must, until it has been waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from distmuon.comm import group as collectives
from tests.streams.model import Event, Gpu


class Work:
    """Stands for dist.Work on NCCL: `wait` orders the current stream, and the host runs on."""

    def __init__(self, gpu: Gpu, done: Event) -> None:
        self._gpu = gpu
        self._done = done

    def wait(self, timeout: object = None) -> None:
        self._done.wait()


class ModelDist:
    """torch.distributed as `comm/group.py` sees it. `log`: each collective, to be compared between ranks."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.log: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def get_backend(self, group: Any = None) -> str:
        return "nccl"

    def reduce_scatter_single(self, output: Tensor, input: Tensor, *, group: Any, async_op: bool) -> Work:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        assert async_op and output.dtype == input.dtype
        assert input.numel() == size * output.numel()
        _check_in_place(output, input, rank)
        chosen = input.view(size, -1)[rank]
        effect = lambda: output.copy_(chosen)  # noqa: E731
        return self._start("reduce_scatter", group, [input], [output], effect, (input.numel(), input.dtype))

    def all_gather_single(self, output: Tensor, input: Tensor, *, group: Any, async_op: bool) -> Work:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        assert async_op and output.dtype == input.dtype and output.numel() == size * input.numel()
        _check_in_place(input, output, rank)
        slices = output.view(size, -1)
        in_place = slices[rank].data_ptr() == input.data_ptr()
        effect = (lambda: None) if in_place else (lambda: slices.copy_(input.view(1, -1).expand_as(slices)))
        return self._start("all_gather", group, [input], [output], effect, (output.numel(), output.dtype))

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        receive_counts: list[int] | None = None,
        send_counts: list[int] | None = None,
        *,
        group: Any,
        async_op: bool,
    ) -> Work:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        assert async_op and output.dtype == input.dtype
        assert output.is_contiguous() and input.is_contiguous() and output.dim() == input.dim() == 1
        assert not _overlap(output, input)
        received = receive_counts if receive_counts is not None else [output.numel() // size] * size
        sent = send_counts if send_counts is not None else [input.numel() // size] * size
        assert len(received) == len(sent) == size
        assert sum(received) == output.numel() and sum(sent) == input.numel(), "splits must cover the tensors"
        assert received[rank] == sent[rank]
        effect = lambda: output.fill_(0.5)  # noqa: E731
        detail = (tuple(sent), tuple(received), input.dtype)
        return self._start("all_to_all", group, [input], [output], effect, detail)

    def all_reduce(self, tensor: Tensor, op: Any, *, group: Any, async_op: bool) -> Work:
        assert async_op and tensor.is_contiguous()
        factor = dist.get_world_size(group) if op == dist.ReduceOp.SUM else 1
        effect = lambda: tensor.mul_(factor)  # noqa: E731
        return self._start("all_reduce", group, [tensor], [tensor], effect, (tensor.numel(), tensor.dtype))

    def broadcast(self, tensor: Tensor, source: int, *, group: Any) -> None:
        assert tensor.is_contiguous()
        self._start("broadcast", group, [tensor], [tensor], lambda: None, (tensor.numel(), tensor.dtype)).wait()

    def _start(
        self, verb: str, group: Any, reads: list[Tensor], writes: list[Tensor], effect: Any, detail: tuple[Any, ...]
    ) -> Work:
        for tensor in reads + writes:
            assert self._gpu.is_on_device(tensor), f"{verb}: NCCL serves no tensor of the CPU"
        self.log.append((verb, "" if group is None else dist.get_process_group_ranks(group), *detail))
        return Work(self._gpu, self._gpu.collective(verb, group, reads, writes, effect))


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def _check_in_place(part: Tensor, whole: Tensor, rank: int) -> None:
    """A rank's part of a buffer is its slice of the whole, or other memory; both are contiguous."""
    assert part.is_contiguous() and whole.is_contiguous()
    if part.untyped_storage()._cdata == whole.untyped_storage()._cdata:
        start = whole.storage_offset() + rank * part.numel()
        assert part.storage_offset() == start, "in place only as this rank's slice of the buffer"


@contextmanager
def one_rank(gpu: Gpu, rank: int, dp_size: int) -> Iterator[ModelDist]:
    """Inside, this process is `rank` of a default group of `dp_size` ranks, on a modelled GPU with NCCL."""
    dist.init_process_group("fake", rank=rank, world_size=dp_size, store=FakeStore())
    try:
        with pytest.MonkeyPatch.context() as patch, gpu.running():
            modelled = ModelDist(gpu)
            patch.setattr(collectives, "dist", modelled)
            patch.setattr(collectives.DataParallelGroup, "_gather_bytes", lambda self, text: [text] * self.dp_size)
            patch.setattr(collectives.DataParallelGroup, "missing_ranks", lambda *_, **__: {})
            patch.setattr(collectives.RollCall, "announce_waiting", lambda *_: None)
            yield modelled
    finally:
        dist.destroy_process_group()
