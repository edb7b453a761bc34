"""docs/reliability.md names a test for every promise; this reads the page and looks for them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`( \(slow\))?")


def promises(page: str) -> list[str]:
    """The rows of the page's tables, without heads and rules."""
    rows = [line for line in page.splitlines() if line.startswith("|")]
    return [row for row in rows if not re.match(r"\|(-+\||\s*(promise|fault) )", row)]


@cache
def functions_of(file: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def broken(row: str, root: Path) -> list[str]:
    """What is wrong with the tests that a row names."""
    found = TESTS.findall(row)
    wrong = [] if found else ["names no test"]
    for file, name, slow in found:
        functions = functions_of(root / file)
        if name not in functions:
            wrong.append(f"{file} has no {name}")
        elif bool(slow) != any("slow" in ast.unparse(mark) for mark in functions[name].decorator_list):
            wrong.append(f"{name} is{'' if slow else ' not'} said to be slow")
    return wrong


def test_every_promise_names_a_test_that_exists() -> None:
    rows = promises((ROOT / "docs" / "reliability.md").read_text())
    assert len(rows) > 25
    assert {row: wrong for row in rows if (wrong := broken(row, ROOT))} == {}


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("| it holds | trust us |", "names no test"),
        ("| it holds | `tests/unit/test_promises.py::test_of_nothing` |", "has no test_of_nothing"),
        (
            "| it holds | `tests/unit/test_promises.py::test_every_promise_names_a_test_that_exists` (slow) |",
            "is said to be slow",
        ),
    ],
)
def test_an_empty_promise_is_seen(row: str, wrong: str) -> None:
    assert any(wrong in text for text in broken(row, ROOT))
    assert promises(f"| promise | test |\n|---|---|\n{row}") == [row]
