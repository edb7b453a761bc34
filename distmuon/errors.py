"""The form of every error that a user sees: where, what was found, what is needed, what to do.

This module decides only the form. Whether all ranks raise together is the caller's decision: `comm/agreement.py` turns
an error on any rank into the error of all.
"""

from __future__ import annotations

from collections.abc import Sequence


def problem(where: str, *, found: str, needed: str, cure: str) -> ValueError:
    """Make (not raise) the `ValueError` ``"<where>: <found>; <needed>; <cure>"``.

    `where` is a parameter's fqn, an argument or a rank; numbers belong in `found`.
    """
    return ValueError(f"{where}: {found}; {needed}; {cure}")


def names(paths: Sequence[object], most: int = 5) -> str:
    """The first few of a long list, for messages."""
    shown = ", ".join(map(str, paths[:most]))
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
