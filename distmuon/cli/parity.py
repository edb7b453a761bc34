"""Two steps of training on two gloo processes, and the same in one process: the weights must agree.

`doctor` runs it to see that processes can be started, that they find each other, and that the collectives work. Each
process is `python -m distmuon.cli.parity RANK FOLDER`; they meet through a file, so no port is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon.optimizer import DistMuon

RANKS, STEPS, TOLERANCE = 2, 2, 1e-6


def compare(seconds: float = 120.0) -> float:
    """The largest difference of a weight between two ranks and one process; raise RuntimeError if a rank fails.

    Both average the same two gradients, so that they should agree to the bit.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "distmuon.cli.parity"]
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        errors: list[str] = []
        with ExitStack() as stack:
            ranks = [
                stack.enter_context(
                    subprocess.Popen(
                        [*command, str(rank), folder],
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        text=True,
                        env=environment,
                    )
                )
                for rank in range(RANKS)
            ]
            try:
                errors += [rank.communicate(timeout=seconds)[1] for rank in ranks]
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"no answer within {seconds:.0f} s") from None
            finally:
                for rank in ranks:
                    rank.kill()
        for rank, error in zip(ranks, errors):
            if rank.returncode:
                raise RuntimeError(error.strip().rpartition("\n")[2] or f"exit status {rank.returncode}")
        found = [torch.load(Path(folder, f"{number}.pt"), weights_only=True) for number in range(RANKS)]
    wanted = train(range(RANKS))
    return max(float((a - b).abs().max()) for weights in found for a, b in zip(weights, wanted))


def train(shares: range) -> list[Tensor]:
    """Train on the `shares` of the batch that this process has; return the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 24))
    optimizer = DistMuon(model, lr=1e-2)
    for step in range(STEPS):
        for number, share in enumerate(shares, start=1):
            optimizer.set_requires_gradient_sync(number == len(shares))
            batch = torch.randn(8, 24, generator=torch.Generator().manual_seed(10 * step + share))
            (model(batch).square().mean() / len(shares)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


def main(rank: int, folder: Path) -> None:
    """One of the two processes."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    torch.save(train(range(rank, rank + 1)), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
