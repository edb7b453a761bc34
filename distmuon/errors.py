"""The one form of every error a user sees: where, what was found, what is needed, what to do.

This module decides only the wording. Whether all ranks raise together is decided by who calls it
(`guards.agree_on_plan` makes a finding on one rank the error of all).
"""

from __future__ import annotations

from collections.abc import Sequence


def problem(where: str, found: str, needed: str, remedy: str) -> ValueError:
    """Make (not raise) the `ValueError` ``"<where>: <found>; <needed>; <remedy>"``.

    `where` is a parameter's fqn, an argument or a rank; numbers belong into `found`.
    """
    return ValueError(f"{where}: {found}; {needed}; {remedy}")


def names(paths: Sequence[object], most: int = 5) -> str:
    """The first few of a long list, for messages."""
    shown = ", ".join(map(str, paths[:most]))
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
