# No `from __future__ import annotations`: DDP compares the annotations of a communication hook as objects.
"""Plain `DistributedDataParallel`, kept for what it does in forward, relieved of the gradients.

Two ways. `DistMuon(ddp_model, grad_reduction="external")` lets DDP average (twice the traffic, no overlap with ours).
`silence` keeps the wrapper (buffer broadcasts, inputs to the device, `no_sync`) and lets distmuon reduce.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distmuon.errors import problem
from distmuon.optimizer import DistMuon


def silence(model: DistributedDataParallel, optimizer: DistMuon) -> DistributedDataParallel:
    """`model`, whose buckets are no longer reduced, and whose `no_sync` is the optimizer's as well.

    `optimizer` holds `model.module`. DDP keeps its buckets in memory (as many bytes as the gradients): without DDP
    there are none.
    """
    if optimizer.options.grad_reduction == "external":
        raise problem(
            "DistributedDataParallel", 'silenced with grad_reduction="external"', "somebody has to average",
            "drop one of the two",
        )  # fmt: skip
    model.register_comm_hook(_Silence(optimizer), _reduce_nothing)
    ddp_no_sync = model.no_sync

    @contextmanager
    def no_sync() -> Iterator[None]:
        with ddp_no_sync(), optimizer.no_sync():
            yield

    model.no_sync = no_sync  # type: ignore[method-assign,unused-ignore]
    return model


@dataclass
class _Silence:
    """DDP fills `param.grad` with its (zero) buckets at the end of backward. Afterwards they are dropped again."""

    optimizer: DistMuon

    def forget_after_backward(self) -> None:
        """Runs after DDP's own last callback, which is queued once the last bucket's hook has returned."""
        engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined,unused-ignore]
        engine.queue_callback(lambda: engine.queue_callback(self.forget))

    def forget(self) -> None:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                param.grad = None


def _reduce_nothing(
    state: _Silence,
    bucket: dist.GradBucket,  # type: ignore[name-defined,unused-ignore]
) -> torch.futures.Future[Tensor]:
    if bucket.is_last():
        state.forget_after_backward()
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
