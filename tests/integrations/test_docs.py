"""docs/integrations.md tells the truth about the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integrations import matrix

FEATURE = next(iter(matrix.FEATURES))
ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "integrations.md").read_text()))
    files = [*(ROOT / "tests" / "integrations").glob("test_*.py"), *(ROOT / "tests" / "distributed").glob("test_*.py")]
    written = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    assert len(named) >= 10 and not named - written, named - written


def test_the_made_tables_are_what_the_marks_and_the_results_say() -> None:
    """`python -m tests.integrations.matrix` writes them."""
    page = matrix.PAGE.read_text()
    assert set(re.findall(r"<!-- made: ([\w-]+) -->", page)) == set(matrix.MADE)
    assert matrix.made(page) == page


@pytest.mark.parametrize(
    ("planted", "match"),
    [
        (pytest.mark.refuses(FEATURE, "Fabric", use="tea"), "supported and refused"),
        (pytest.mark.supports("a misspelt feature", "Fabric"), "misspelt"),
        (pytest.mark.supports(FEATURE, "fabric"), "'fabric'"),
        (pytest.mark.supports(FEATURE), "names no trainer"),
    ],
)
def test_a_mark_that_makes_no_sense_is_refused(
    planted: pytest.MarkDecorator, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def test_planted() -> None: ...

    tests = [*matrix.marked_tests(), planted(test_planted)]
    monkeypatch.setattr(matrix, "marked_tests", lambda: iter(tests))
    with pytest.raises(AssertionError, match=match):
        matrix.support_table()


def test_the_page_shows_every_integration_and_its_extra() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text() + (ROOT / "docs" / "telemetry.md").read_text()
    extras = (ROOT / "setup.cfg").read_text()
    for file in (ROOT / "distmuon" / "integrations").glob("[a-z]*.py"):
        assert {"grad_scaler": "distmuon.GradScaler"}.get(file.stem, f"distmuon.integrations.{file.stem}") in page
        if "need(" in file.read_text():  # the others need nothing but torch
            assert f'pip install -e ".[{file.stem}]"' in page and f"\n{file.stem} =\n" in extras
