"""Forked ranks are as ranks that start apart: arguments, environment, hashes, status; and one that fails ends all."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests import forks

PROGRAM = """
import os, sys, time, warnings
import torch.distributed as dist

assert __name__ == "__main__" and sys.modules["__main__"].PROGRAM == "this"
rank = os.environ["RANK"]
if sys.argv[1] == "fail":
    sys.exit(f"planted on rank {rank}") if rank == "1" else time.sleep(60)
if sys.argv[1] == "raise":
    raise ValueError("planted")
if sys.argv[1] == "warn":
    warnings.warn("planted warning")
dist.init_process_group("gloo")
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, hash("a name"))
if rank == "0":
    print("hashes", *everyone)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "planted_program.py").write_text(f"PROGRAM = 'this'\n{PROGRAM}")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "planted_program"


def test_ranks_meet_and_neighbours_hash_strings_differently(program: str) -> None:
    """An order that is taken from a set must differ between ranks, or else no test sees that one was."""
    done = forks.torchrun(program, "run", nproc=3)
    assert done.returncode == 0, done.stdout
    first, second, third = done.stdout.split("hashes ")[1].split()
    assert first != second != third


@pytest.mark.parametrize(
    ("how", "text"), [("fail", "planted on rank 1"), ("raise", "ValueError: planted"), ("warn", "planted warning")]
)
def test_a_rank_that_fails_ends_all_with_its_status_and_words(program: str, how: str, text: str) -> None:
    began = time.monotonic()
    done = forks.torchrun(program, how, nproc=2, environment={"PYTHONWARNINGS": "error"})
    assert done.returncode == 1 and time.monotonic() - began < 50
    assert text in done.stdout and ("Traceback" in done.stdout) == (how != "fail")


def test_a_run_past_its_limit_is_killed(program: str) -> None:
    done = forks.torchrun(program, "fail", nproc=1, timeout=0.5)
    assert done.returncode == -9


def _leave(status: int) -> None:
    raise SystemExit(status)


def test_a_status_comes_back() -> None:
    forked = forks.start(_leave, 7)
    forked.join(30.0)
    assert forked.exitcode == 7 and not forked.is_alive()
