"""DistMuon under other people's trainers: one module a trainer, docs/integrations.md the page.

    import distmuon.integrations.accelerate as distmuon_accelerate       # pip install distmuon[accelerate]

Decides how a trainer's own averaging, clipping and saving are led to the optimizer, and refuses, with the cure, what
would train wrongly. Knows no rule and no layout: all it does is call the optimizer's public methods.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from distmuon.errors import problem


def need(package: str, extra: str) -> ModuleType:
    """The imported `package`; `ImportError` with the line that installs it otherwise."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        text = problem(package, "not installed", "this integration needs it", f"pip install distmuon[{extra}]")
        raise ImportError(str(text)) from None
