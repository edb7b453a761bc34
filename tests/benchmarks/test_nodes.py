"""`benchmarks.nodes`: its tree of broadcasts, and a small run of it where the kernel allows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import nodes


@pytest.mark.parametrize("dp_size", [2, 3, 4, 6, 8])
def test_a_broadcast_reaches_every_rank_once_from_one_that_has_the_values(dp_size: int) -> None:
    for root in range(dp_size):
        reached = {root}
        for sender, receiver in nodes.tree(root, dp_size):
            assert sender in reached and receiver not in reached
            reached.add(receiver)
        assert reached == {*range(dp_size)}


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_links_carry_what_is_planned_and_nodes_that_are_known_spare_them(reduce: str) -> None:
    """The kernel's counters within 2 %, in both ways; matrices leave their node only where they must, and of gradients
    in 16 bits half as much as if every rank sent to every other."""
    if why_not := nodes.missing():
        pytest.skip(why_not)
    command = ["--rates", "1gbit", "--rounds", "2", "--d-model", "256", "--minutes", "4", "--json"]
    command += ["--reduce", reduce]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.nodes", *command],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    ways = json.loads(run.stdout)["1gbit"]
    for row in ways.values():
        for sent, planned in zip(row["sent"], row["planned"], strict=True):
            assert 1.0 <= sent / planned < 1.02
    assert ways["nodes known"]["exchange"] < ways["nodes not known"]["exchange"]
    assert sum(ways["nodes known"]["sent"]) < sum(ways["nodes not known"]["sent"])
