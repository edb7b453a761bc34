"""Restarts, and agents that come and go: ranks of one attempt find each other, and leaving is not taken for the end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch import pretrain, resume
from launch.logs import read_records
from launch.ranks import store_of_the_living
from launch.resume import StopRequest
from tests.launch.test_pretrain import ROOT, SHORT, TINY
from tests.launch.test_resume import workers_of


def meet(shared: dist.Store, world_size: int, late: int, timeout: float = 10.0) -> list[dist.Store]:
    """The store of each rank of one attempt, one of which is late."""

    def rank(number: int) -> dist.Store:
        time.sleep(0.1 if number == late else 0.0)
        return store_of_the_living(shared, number, world_size, timedelta(seconds=timeout))

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(rank, range(world_size)))


@pytest.mark.promise(
    "Restarts and preemption",
    "The ranks of one attempt meet even though torchrun's store still holds the addresses of the "
    "attempt before; a rank that does not come within 5 minutes is named",
)
def test_no_attempt_sees_the_keys_of_another() -> None:
    """Each rank leaves its address, as gloo does; in the next attempts, whoever is late, no old one may be found."""
    shared = dist.HashStore()
    shared.set_timeout(timedelta(seconds=10))
    for attempt, (world_size, late) in enumerate([(3, 0), (3, 0), (3, 2), (2, 1), (4, 3), (1, 0)]):
        stores = meet(shared, world_size, late)
        assert not any(store.check([f"address/{rank}"]) for store in stores for rank in range(4))
        for rank, store in enumerate(stores):
            store.set(f"address/{rank}", str(attempt))
        assert [store.get(f"address/{world_size - 1}") for store in stores] == [str(attempt).encode()] * world_size


@pytest.mark.promise(
    "Restarts and preemption",
    "The ranks of one attempt meet even though torchrun's store still holds the addresses of the "
    "attempt before; a rank that does not come within 5 minutes is named",
)
def test_who_does_not_come_is_named() -> None:
    shared, soon = dist.HashStore(), timedelta(seconds=0.5)
    with pytest.raises(TimeoutError, match=r"rank 2: found no sign of rank 0 for 0\.5 s"):
        store_of_the_living(shared, 2, 4, soon)
    # Rank 2 has asked and is gone, rank 1 is there.
    early = threading.Thread(target=store_of_the_living, args=(shared, 1, 4))
    early.start()
    with pytest.raises(TimeoutError, match=r"rank 0: found no sign of ranks \[2, 3\] for 0\.5 s"):
        store_of_the_living(shared, 0, 4, soon)
    early.join()


def environment(monkeypatch: pytest.MonkeyPatch, agents: int, restarts: int, most: int) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(agents))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(most))


@pytest.mark.promise(
    "Restarts and preemption",
    "A rank that stops because another rank was asked to is not taken for finished",
)
def test_a_rank_that_was_not_asked_to_stop_waits_for_its_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its status 0 would tell its agent that the run is over, though only an agent had joined or left."""
    monkeypatch.setattr(resume, "NEWCOMER_SECONDS", 0.3)
    stop = StopRequest()
    environment(monkeypatch, agents=1, restarts=0, most=3)
    stop.leave()
    environment(monkeypatch, agents=4, restarts=2, most=3)
    begin = time.monotonic()
    with pytest.raises(SystemExit, match="another rank was asked"):
        stop.leave()
    assert time.monotonic() - begin >= 0.3
    environment(monkeypatch, agents=4, restarts=3, most=3)  # nobody would start it again
    stop.leave()
    environment(monkeypatch, agents=4, restarts=0, most=3)
    with stop.listening(active=True):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        stop.leave()


RUN = [*TINY, *SHORT, "--optimizer.precision.newton_schulz=float32", "--train.global_batch=12", "--train.micro_batch=1"]
RUN += ["--train.steps=48", "--train.eval_every=16"]
# Who could still come is awaited for 10 s instead of 30. A lost agent is noticed after 15 s, as by default: with 6 s,
# on a machine with 16 processes a core, torchrun took a slow agent for a lost one and gave the round up.
CONF = "last_call_timeout=10,join_timeout=300"


class Machines:
    """Agents with one worker each, all of one run, as if each had a machine of its own. The first hosts the store."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self._arguments = folder, arguments
        self.agents: list[subprocess.Popen[bytes]] = []
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            self._port = listener.getsockname()[1]

    def start_agent(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=3:4", "--nproc_per_node=1"]
        command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{self._port}", "--rdzv_id=elastic"]
        command += [f"--rdzv_conf={CONF},is_host={int(not self.agents)}", "--local_addr=localhost", "--max-restarts=5"]
        command += ["-m", "launch.pretrain", "--config=configs/quickstart.yaml", *RUN]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else torchrun never tells a newcomer where to go
        with (self.folder / f"agent-{len(self.agents)}.txt").open("wb") as output:
            agent = subprocess.Popen(
                [*command, f"--log.dir={self.folder}", *self._arguments],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.agents.append(agent)
        return agent

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("agent-*.txt")))

    def wait(self, reached: Callable[[], bool], what: str, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"{what}: not after {seconds:g} s\n{self.output()}"
            time.sleep(0.01)

    def starts(self) -> list[dict[str, Any]]:
        return [record for record in self.records() if record["kind"] == "run"]

    def world_sizes(self) -> list[int]:
        """Of the starts so far; one that only waited for a slow agent counts with its neighbour."""
        sizes = [record["world_size"] for record in self.starts()]
        return [size for number, size in enumerate(sizes) if number == 0 or size != sizes[number - 1]]

    def records(self) -> list[dict[str, Any]]:
        return read_records(self.folder / "metrics.jsonl") if (self.folder / "metrics.jsonl").exists() else []

    def last_step(self) -> int:
        return max([record["step"] for record in self.records() if record["kind"] == "train"], default=0)

    def close(self) -> None:
        for agent in self.agents:
            for process in (agent.pid, *workers_of(agent)):
                if agent.poll() is None:
                    os.kill(process, signal.SIGKILL)
            agent.wait()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path, "--checkpoint.every=4")
    yield machines
    machines.close()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same run by one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    pretrain.main(["--config", str(ROOT / "configs/quickstart.yaml"), *RUN, f"--log.dir={folder}"])
    return read_records(folder / "metrics.jsonl")


def is_asked_to_stop(pid: int) -> bool:
    """Whether a SIGTERM waits for this process, which is held by SIGSTOP."""
    pending = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    assert pending is not None
    return bool(int(pending[1], 16) >> (signal.SIGTERM - 1) & 1)


def assert_every_step_once_and_the_same_loss(run: list[dict[str, Any]], unbroken: list[dict[str, Any]]) -> None:
    losses, wanted = ([r for r in records if r["kind"] in ("train", "val")] for records in (run, unbroken))
    assert [(r["kind"], r["step"]) for r in losses] == [(r["kind"], r["step"]) for r in wanted]
    worst = max(abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in zip(losses, wanted))
    print(
        f"losses differ by {worst:.1e} at most, relative; the last by "
        f"{abs(run[-1]['val_loss'] / unbroken[-1]['val_loss'] - 1):.1e}"
    )
    assert worst < 1e-5
    assert run[-1]["kind"] == "summary" and run[-1]["steps"] == 48


@pytest.mark.promise(
    "Restarts and preemption",
    "World 4 -> 3 -> 4 under `--nnodes=3:4`, an agent killed or preempted and another agent joining: "
    "every step is recorded once, losses are a single process's within 1e-5, and joining costs no "
    "step",
)
@pytest.mark.slow
@pytest.mark.parametrize("leaves", ["killed", "preempted"])
def test_agents_leave_and_join(leaves: str, machines: Machines, unbroken: list[dict[str, Any]]) -> None:
    """World 4 -> 3 -> 4: an agent and its worker are killed, or torchrun is sent SIGTERM; later another one joins."""
    for _ in range(4):
        machines.start_agent()
    machines.wait(lambda: machines.last_step() >= 6, "four ranks train")
    lost, begin = machines.agents[-1], time.monotonic()
    if leaves == "killed":
        for process in (lost.pid, *workers_of(lost)):
            os.kill(process, signal.SIGKILL)
    else:
        lost.terminate()
    machines.wait(lambda: machines.world_sizes() == [4, 3], "three ranks start again")
    print(f"4 -> 3 took {time.monotonic() - begin:.0f} s, resumed from {machines.starts()[-1]['resumed_from']}")
    at_three = machines.starts()[-1]["resumed_from"] + 3
    machines.wait(lambda: machines.last_step() >= at_three, "three ranks train")
    held, begin = workers_of(machines.agents[1])[0], time.monotonic()
    os.kill(held, signal.SIGSTOP)  # or the run might be over before another agent is there
    machines.start_agent()
    machines.wait(lambda: is_asked_to_stop(held), "an agent notices the newcomer")
    os.kill(held, signal.SIGCONT)
    machines.wait(lambda: machines.world_sizes() == [4, 3, 4], "four ranks start again")
    print(f"3 -> 4 took {time.monotonic() - begin:.0f} s, resumed from {machines.starts()[-1]['resumed_from']}")
    machines.wait(lambda: None not in [agent.poll() for agent in machines.agents], "all agents end")
    status = -signal.SIGKILL if leaves == "killed" else 1
    assert [agent.returncode for agent in machines.agents] == [0, 0, 0, status, 0], machines.output()
    assert "forcefully exiting" not in machines.output()
    starts = machines.starts()
    assert starts[-1]["resumed_from"] >= at_three, "the newcomer cost steps, though all were asked in time"
    assert_every_step_once_and_the_same_loss(machines.records(), unbroken)
