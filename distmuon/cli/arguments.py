"""Command-line arguments from signatures and dataclasses, by jsonargparse, which the extra `recipes` installs.

The command line of the planner and the config of the recipe are made from the library's classes, so no option is
declared twice. This module decides how a dtype is written, by its name in torch ("bfloat16"); it knows no option.
"""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import torch

from distmuon.integrations import need
from distmuon.options import as_dtype


class Parser(argparse.ArgumentParser):
    """argparse's parser, for commands that must work without jsonargparse: no abbreviations, errors in one line."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists the arguments\n")


def import_jsonargparse() -> Any:
    """Import jsonargparse, set up to read and print dtypes by name and to show each field's text in --help."""
    jsonargparse: Any = need("jsonargparse", "recipes")
    jsonargparse.typing.register_type(torch.dtype, dtype_name, _dtype, fail_already_registered=False)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return jsonargparse


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in torch."""
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = as_dtype(name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"found {name!r}; the name of a torch dtype is needed")
    return found
