"""docs/integrations.md tells the truth about the tests."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "integrations.md").read_text()))
    files = [*(ROOT / "tests" / "integrations").glob("test_*.py"), *(ROOT / "tests" / "distributed").glob("test_*.py")]
    written = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    assert len(named) >= 10 and not named - written, named - written


def test_the_page_shows_every_integration_and_its_extra() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    extras = (ROOT / "setup.cfg").read_text()
    for file in (ROOT / "distmuon" / "integrations").glob("[a-z]*.py"):
        assert f"distmuon.integrations.{file.stem}" in page
        if file.stem != "ddp":
            assert f"distmuon[{file.stem}]" in page and f"\n{file.stem} =\n" in extras
