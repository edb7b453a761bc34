"""List the errors that no test provokes. Nightly: `python -m tests.raises` (arguments go to pytest).

The suite runs under coverage.py, whose settings (pyproject.toml) follow every process that a test starts. A site is a
`raise` of distmuon or launch, or an error that is made for a caller to raise. Status 1 if a site was not reached.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).parents[1]
PACKAGES = ("distmuon", "launch")


def sites(tree: ast.AST) -> Iterator[ast.Raise | ast.Call]:
    """Each raise of an error made there, and each error made outside of a raise.

    A bare `raise` and a `raise error` hand on what another line made.
    """
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Raise) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node
        elif isinstance(node, ast.Call) and id(node) not in inside:
            name = ast.unparse(node.func).split(".")[-1]
            if name == "problem" or name.endswith("Error"):
                yield node


def unreached(data: CoverageData) -> Iterator[str]:
    """`file:line: text` of each site that `data` has not seen executed."""
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        source, executed = path.read_text(), set(data.lines(str(path)) or ())
        for site in sites(ast.parse(source)):
            if executed.isdisjoint(range(site.lineno, (site.end_lineno or site.lineno) + 1)):
                text = " ".join((ast.get_source_segment(source, site) or "").split())
                yield f"{path.relative_to(ROOT)}:{site.lineno}: {text[:160]}"


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "coverage")
        environment = {**os.environ, "COVERAGE_FILE": str(file)}
        command = [sys.executable, "-m", "coverage"]
        tests = subprocess.run([*command, "run", "-m", "pytest", *arguments], cwd=ROOT, env=environment, check=False)
        subprocess.run([*command, "combine", "--quiet"], cwd=ROOT, env=environment, check=True)
        data = CoverageData(str(file))
        data.read()
        missing = list(unreached(data))
    print(*missing, f"{len(missing)} errors were not provoked", sep="\n")
    return tests.returncode or bool(missing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
