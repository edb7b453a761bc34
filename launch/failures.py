"""How a program that cannot go on says so: once, on rank 0, in one line, as the last thing it prints.

An error that this project raises is a text for its reader and needs no traceback; any other error keeps its own, on the
rank that has it. torchrun prints a summary behind it all; it finds the same line in the file that it asks for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import distmuon

OURS = ("launch", "distmuon")


def run_program(main: Callable[[], None]) -> None:
    """Run `main` as the whole of this process, and end with a status that is not 0 if it fails."""
    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; nothing was saved since the last checkpoint")
        raise SystemExit(130) from None
    except Exception as error:
        if not is_meant_for_the_reader(error):
            raise
        fail(str(error), status=1)


def fail(text: str, *, status: int) -> NoReturn:
    """Leave with `status`, after `text` on rank 0."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": details}}), encoding="utf-8")
    say(f"error: {text}")
    raise SystemExit(status)


def say(text: str) -> None:
    """Print on rank 0, behind all that it has printed."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)


def is_meant_for_the_reader(error: Exception) -> bool:
    """Whether this project has raised `error` itself, and not a library under it."""
    if isinstance(error, distmuon.LostRanks):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    # a program's own module is called __main__
    return isinstance(error, (ValueError, ImportError, OSError)) and package in (*OURS, "__main__")
