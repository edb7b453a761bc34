"""Which refusals does the test suite never execute? Nightly: `python -m tests.raises` (arguments go to pytest).

Every `raise` of distmuon and launch, and every error made to be raised by a caller, notes itself in a file when it is
reached, in each process that a test starts: coverage.py loses pool workers, which leave by os._exit. A module is
rewritten while it is imported; nothing is written to the caches of bytecode. Children that are given a PYTHONPATH of
their own are not seen. Status 1 if something beyond ALLOWED was not reached.
"""

from __future__ import annotations

import ast
import builtins
import importlib.machinery
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT, PACKAGES, FILE = Path(__file__).parents[1], ("distmuon", "launch"), "DISTMUON_RAISES"
ALLOWED = ("raise",)  # what only hands on an error that another line made


def sites(tree: ast.AST) -> Iterator[ast.Raise | ast.Call]:
    """Each raise, and each error made outside of one."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Raise) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            yield node
        elif isinstance(node, ast.Call) and id(node) not in inside:
            name = ast.unparse(node.func).split(".")[-1]
            if name == "problem" or name.endswith("Error"):
                yield node


class _Marked(ast.NodeTransformer):
    """`raise X` -> note it, raise X; `problem(...)` -> note it or problem(...)."""

    def __init__(self, path: str, tree: ast.AST) -> None:
        self.path, self.wanted = Path(path).relative_to(ROOT).as_posix(), {id(node) for node in sites(tree)}

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        if id(node) not in self.wanted:
            return node
        place = ast.Constant(f"{self.path}:{getattr(node, 'lineno', 0)}")
        note = ast.Call(ast.Name("_reached", ast.Load()), [place], [])
        return [ast.Expr(note), node] if isinstance(node, ast.Raise) else ast.BoolOp(ast.Or(), [note, node])


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path))
        return compile(ast.fix_missing_locations(_Marked(path, tree).visit(tree)), path, "exec", dont_inherit=True)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name.split(".")[0] in PACKAGES else None
        if spec is not None and spec.origin is not None and Path(spec.origin).is_relative_to(ROOT):
            spec.loader = _Loader(name, spec.origin)
        return spec


def watch() -> None:
    """In each new interpreter, by its sitecustomize."""

    def reached(place: str) -> None:
        with open(os.environ[FILE], "ab", buffering=0) as file:  # one write, so ranks do not mix
            file.write(f"{place}\n".encode())

    vars(builtins)["_reached"] = reached
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text("import tests.raises\ntests.raises.watch()\n")
        (notes := Path(folder, "reached")).touch()
        paths = os.pathsep.join(filter(None, (folder, str(ROOT), os.environ.get("PYTHONPATH", ""))))
        environment = {**os.environ, "PYTHONPATH": paths, FILE: str(notes)}
        status = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment).returncode
        reached = set(notes.read_text().split())
    missing, num_sites = [], 0
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        source, name = path.read_text(), path.relative_to(ROOT).as_posix()
        for node in sites(ast.parse(source)):
            num_sites += 1
            text = " ".join((ast.get_source_segment(source, node) or "").split())
            if f"{name}:{node.lineno}" not in reached and text not in ALLOWED:
                missing.append(f"{name}:{node.lineno}: {text[:160]}")
    print("\n".join(missing), f"{len(missing)} of {num_sites} refusals were not reached", sep="\n")
    return status or bool(missing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
