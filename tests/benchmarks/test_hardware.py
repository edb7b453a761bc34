"""The row of a machine, and the ratio of measured and estimated steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_one_command_prints_a_row_that_python_reads() -> None:
    command = [sys.executable, "-m", "benchmarks.hardware", "--rounds", "2", "--width", "64"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (row,) = re.findall(r"^Hardware\(.*\)$", run.stdout, re.MULTILINE)
    names = "from distmuon.planning.step_time import ON_CPU, Hardware"
    subprocess.run([sys.executable, "-c", f"{names}; assert {row}.nvlink > 0"], check=True, timeout=120)
    assert re.search(r"^step, measured / estimated: \d", run.stdout, re.MULTILINE)
