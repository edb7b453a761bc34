"""Starts a benchmark's own processes, in a network namespace where nobody else uses the loopback device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence


def namespace() -> tuple[list[str], str]:
    """(prefix of a command that runs it in a network namespace of its own, why there is none)."""
    for flags in ("-n", "-rn"):
        if shutil.which("unshare") and not subprocess.run(["unshare", flags, "true"], capture_output=True).returncode:
            return ["unshare", flags], ""
    return [], "the kernel does not let us make a network namespace (unshare -n)"


def run_ranks(command: Sequence[str], ranks: int, threads: int) -> int:
    """`command` once a rank, told its place as torchrun tells it; the first exit status that is not 0."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        environment["BENCH_RENDEZVOUS"] = f"file://{folder}/rendezvous"
        workers = []
        for rank in range(ranks):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            workers.append(subprocess.Popen([sys.executable, *command], env=own))
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):  # one failed: the others would wait for it
                for worker in workers:
                    worker.kill()
            time.sleep(0.2)
    return next((worker.returncode for worker in workers if worker.returncode), 0)
