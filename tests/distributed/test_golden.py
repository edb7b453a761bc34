"""No bit and no collective has moved since tests/golden.json was written; `python -m tests.golden --write` does it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest

from tests.golden import FILE, PLAIN_KERNELS, differences


@pytest.mark.parametrize("part", ["--half", pytest.param("", marks=pytest.mark.slow)])
def test_every_kind_of_run_is_as_it_was(part: str) -> None:
    command = [sys.executable, "-m", "tests.golden", *part.split()]
    done = subprocess.run(
        command, env={**os.environ, **PLAIN_KERNELS}, capture_output=True, text=True, timeout=600, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("key", ["weights", "state", "bytes", "calls", "collectives"])
def test_whatever_moves_is_named(key: str) -> None:
    wanted = json.loads(FILE.read_text())
    found = copy.deepcopy(wanted)
    assert differences(found, wanted) == []
    found["runs"]["plain, dp 3"][key] = "moved"
    assert [text.partition(" moved")[0] for text in differences(found, wanted)] == [f"plain, dp 3: {key}"]


def test_where_the_arithmetic_differs_traffic_is_still_compared() -> None:
    wanted = json.loads(FILE.read_text())
    found = copy.deepcopy(wanted)
    found["probe"] = "of another processor"
    found["runs"]["plain, dp 2"].update(weights="moved", collectives="moved")
    assert len(differences(found, wanted)) == 1
