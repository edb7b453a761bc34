"""The page "Which sharding?" holds what its commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import layout_table
from distmuon.cli import plan as cli

PAGE = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text()


NAMES = [name if name == "llama-1b" else pytest.param(name, marks=pytest.mark.slow) for name in layout_table.SHARDED]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_rows(name: str) -> None:
    """`python -m benchmarks.layout_table --shards` prints them."""
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    assert rows == [*layout_table.shard_rows(name)]


@pytest.mark.slow
def test_the_page_has_what_the_planner_says_of_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of the page, and the line of each output that says whether one Newton-Schulz for all pays."""
    shown = re.findall(r"\$ python -m distmuon plan (.*)\n(Newton-Schulz once.*)\n", PAGE)
    assert len(shown) == 2
    for arguments, line in shown:
        assert cli.main(arguments.split()) == 0
        assert line in capsys.readouterr().out.splitlines()
