"""The tables of docs/reliability.md are those that the marks on tests make."""

from __future__ import annotations

import pytest

from tests.promises import PAGE, TABLE, marked, promises, rewritten

SECTION = """<!-- made: Crashes -->
| promise | test |
|---|---|
| one | `a` |
| two | `b` |
<!-- end -->
"""


def test_the_page_is_what_the_marks_say() -> None:
    """`python -m tests.promises` writes it."""
    page = PAGE.read_text()
    assert rewritten(page, promises()) == page
    assert sum(len(rows) for rows in promises().values()) >= 80


def test_every_table_of_the_page_is_made() -> None:
    """A promise that stands on the page alone names no test."""
    rest = TABLE.sub("", PAGE.read_text())
    assert "tests/" in PAGE.read_text() and "| promise |" not in rest and "::test_" not in rest


def test_rows_keep_their_order_and_follow_their_tests() -> None:
    found = {"Crashes": {"new": ["`c`"], "two": ["`b`"], "one": ["`a`", "`d`"]}}
    lines = rewritten(SECTION, found).splitlines()
    assert lines[3:6] == ["| one | `a`, `d` |", "| two | `b` |", "| new | `c` |"]
    assert "two" not in rewritten(SECTION, {"Crashes": {"one": ["`a`"]}}), "without a test there is no promise"


def test_a_mark_for_a_table_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no table for \['Weather'\]"):
        rewritten(SECTION, {"Weather": {"sunny": ["`a`"]}})


def test_slow_tests_are_said_to_be_slow() -> None:
    source = """
@pytest.mark.slow
@pytest.mark.promise("Crashes", "it ends" " well")
def test_a(): ...

@pytest.mark.promise("Crashes", "it ends well")
def test_b(): ...
"""
    assert list(marked(source, "t.py")) == [
        ("Crashes", "it ends well", "`t.py::test_a` (slow)"),
        ("Crashes", "it ends well", "`t.py::test_b`"),
    ]
