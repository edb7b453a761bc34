"""The training recipe on the command line: where its programs and configs lie, and how one of them is run.

This module decides nothing about training. In a clone the recipe is the folders `launch` and `configs` beside the
library; in an installed package both lie under `distmuon/_recipe`, because `launch` is no name to take in everybody's
site-packages. Either folder comes first on the import path of the program and of the processes that it starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from distmuon.errors import problem
from distmuon.integrations import install_line

_PACKAGE = Path(__file__).parents[1]


def root() -> Path:
    """The folder that holds `launch` and `configs`."""
    for folder in (_PACKAGE / "_recipe", _PACKAGE.parent):
        if (folder / "launch" / "pretrain.py").is_file():
            return folder
    raise problem(
        "recipe",
        found=f"found no launch/pretrain.py in {_PACKAGE / '_recipe'} or {_PACKAGE.parent}",
        needed="the training recipe is needed",
        cure="install distmuon from its wheel, or run in a clone",
    )


def shipped_configs() -> dict[str, Path]:
    """{name: file} of the configs that come with the recipe; empty without the recipe."""
    try:
        folder = root() / "configs"
    except ValueError:
        return {}
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path | None:
    """The file that `name` names: a path to a YAML file, or a shipped config with or without .yaml; else None."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    return shipped_configs().get(name.removesuffix(".yaml"))


def module(name: str) -> ModuleType:
    """Import `launch.<name>`; raise one error with its cure if the program or a package that it needs is absent."""
    folder = str(root())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    inherited = os.environ.get("PYTHONPATH", "")
    if folder not in inherited.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (folder, inherited) if part)
    try:
        return import_module(f"launch.{name}")
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if missing.partition(".")[0] in ("launch", "distmuon"):
            where = getattr(sys.modules.get("launch"), "__path__", [folder])
            found, cure = f"found no {missing} in {', '.join(where)}", "install the whole package, or update the clone"
        else:
            found, cure = f"found no package {missing}", install_line("recipes")
        raise problem(name, found=found, needed="the training recipe needs it", cure=cure) from error


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the program `launch.<name>` in this process, as `python -m launch.<name>` would; return its status."""
    try:
        program: Any = module(name)
        run_program = module("failures").run_program
    except ValueError as error:
        print(f"distmuon {error}", file=sys.stderr)
        return 1
    sys.argv = [f"distmuon {name}", *_with_shipped(arguments)]
    try:
        run_program(program.main)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
            return 1
        return int(stopped.code or 0)
    return 0


def _with_shipped(arguments: Sequence[str]) -> list[str]:
    """`arguments` with the files of shipped configs in place of their names after `--config`."""
    found: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag == "--config" and equals:
            argument = f"{flag}={find_config(value) or value}"
        elif found and found[-1] == "--config":
            argument = str(find_config(argument) or argument)
        found.append(argument)
    return found
