"""The site: it builds without a warning, shows every page and every public name, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distmuon

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="pip install distmuon[docs]")
    folder = tmp_path_factory.mktemp("site")
    # --quiet would hide warnings from --strict, too
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    """A page that is not, a link or an anchor that leads nowhere, is a warning of mkdocs, and so an error."""
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists() and f'href="{page.stem}.html"' in home


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    reference = (site / "api.html").read_text()
    missing = [name for name in distmuon.__all__ if f'id="distmuon.{name}"' not in reference]
    assert not missing
    for method in ("step", "clip_grad_norm_", "metrics"):
        assert f'id="distmuon.DistMuon.{method}"' in reference


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Neither scripts nor fonts, pictures, frames or styles; links to click are no loads."""
    loads = re.compile(r"""<(?:(?:script|img|iframe|source)[^>]*\ssrc|link[^>]*href)=["']?(?:https?:)?//""")
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not loads.search(page.read_text()), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"""(?:url\(|@import )["']?(?:https?:)?//""", style.read_text()), style.name


def test_no_list_or_table_is_left_as_text(site: Path) -> None:
    """The site's Markdown wants four spaces before what belongs to an item of a list, where forges take two."""
    raw = re.compile(r"<(?:p|li)>(?:(?!</?(?:p|li|ul|ol|table)>).)*?\n\s*(?:\||- |\d+\. |```)", re.DOTALL)
    for page in site.glob("*.html"):
        shown = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", page.read_text(), flags=re.DOTALL)
        assert (found := raw.search(shown)) is None, (page.name, found[0])


def test_the_search_finds_what_a_reader_types(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text()
    for word in ("NaN", "out of memory", "straddler", "clip_grad_norm_", "PyTorchJob"):
        assert word in index
