"""The tables of docs/reliability.md, made of the marks on tests.

    python -m tests.promises       # rewrites what stands between `<!-- made: SECTION -->` and `<!-- end -->`

A row is a mark on each test that proves it, in any test file:

    @pytest.mark.promise("Crashes", "A read-only folder is reported")

Rows keep the order that they have on the page; new ones come last in their section. A test marked slow is said to
run by night. The marks are read from the syntax tree, so nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
TABLE = re.compile(r"(<!-- made: (?P<section>[^>]+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
Rows = dict[str, list[str]]  # text of a promise -> the tests that prove it


def marked(source: str, file: str) -> Iterator[tuple[str, str, str]]:
    """(section, text, test) of each mark in `source`, which is `file`."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = [mark for mark in node.decorator_list if ast.unparse(mark).startswith("pytest.mark.")]
        slow = any(ast.unparse(mark) == "pytest.mark.slow" for mark in marks)
        test = f"`{file}::{node.name}`{' (slow)' if slow else ''}"
        for mark in marks:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.promise":
                section, text = (ast.literal_eval(argument) for argument in mark.args)
                yield section, text, test


def promises(root: Path = ROOT) -> dict[str, Rows]:
    """By section, its rows in the order of files and lines."""
    found: dict[str, Rows] = {}
    for file in sorted((root / "tests").rglob("test_*.py")):
        source = file.read_text()
        if "pytest.mark.promise(" in source:
            for section, text, test in marked(source, file.relative_to(root).as_posix()):
                found.setdefault(section, {}).setdefault(text, []).append(test)
    return found


def rewritten(page: str, found: dict[str, Rows]) -> str:
    """`page` with its tables made anew. Raises ValueError for a section that the page does not have."""
    missing = found.keys() - {match["section"] for match in TABLE.finditer(page)}
    if missing:
        raise ValueError(f"docs/reliability.md has no table for {sorted(missing)}")

    def table(match: re.Match[str]) -> str:
        rows, before = found.get(match["section"], {}), match["table"]
        places = {text: before.find(f"| {text} |") for text in rows}
        ordered = sorted(rows, key=lambda text: (places[text] < 0, places[text]))
        lines = [f"| {text} | {', '.join(rows[text])} |" for text in ordered]
        return match[1] + "\n".join([*before.splitlines()[:2], *lines]) + "\n" + match[4]

    return TABLE.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(), promises()))
