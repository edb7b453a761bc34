"""A training run as the README has it, in which one rank fails at one step; run by test_lost_ranks.py.

    python -m tests.distributed.lost_run FAULT [--plain]

FAULT: what the last rank does in the forward of step 3. `raise`; `kill`: SIGKILL to itself; `linger`: raises, and its
process stays for a minute; `kill-0`: SIGKILL to rank 0, which holds the store; `stop-0`: SIGSTOP to rank 0.
`--plain`: without `distmuon.shared_fate`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

import distmuon

LIMIT_S = 8.0


class Model(nn.Module):
    """Two hidden matrices; in the forward of step 3 the last rank meets its fault."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        if self.step == 3 and dist.get_rank() == dist.get_world_size() - 1:
            print(f"fault at {time.time()}", flush=True)
            meet_fault(sys.argv[1])
        return self.layers(x).square().mean()


def meet_fault(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault in ("kill-0", "stop-0"):
        os.kill(int(_get_default_store().get("pid of 0")), signal.SIGKILL if fault == "kill-0" else signal.SIGSTOP)
        time.sleep(0.5)
        return
    raise ValueError("no batch 3 in the data")


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT_S))
    if dist.get_rank() == 0:
        _get_default_store().set("pid of 0", str(os.getpid()))
    model = Model()
    optimizer = distmuon.DistMuon(model, lr=0.01)
    try:
        with nullcontext() if "--plain" in sys.argv else distmuon.shared_fate():
            for step in range(1000):
                torch.manual_seed(1000 * step + dist.get_rank())
                loss = model(torch.randn(4, 8))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(0.01)
    finally:
        if sys.argv[1] == "linger" and dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(60)


if __name__ == "__main__":
    main()
