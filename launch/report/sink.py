"""The report of a run that goes on: written at each validation and when the run ends, however it ends."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launch.logs import Record
from launch.report.page import REPORT_FILE, packages, write_report

MOST_OF_THE_TIME = 0.02
"""Writing takes at most about this share of a run: a page that takes long to write is written less often."""


class ReportSink:
    """Writes `report.html` into the run's folder, from its metrics file: it comes after the sink that writes that.

    Raises ImportError where a package is missing. `step`, the last one of an earlier start, is in the file as well.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        packages()
        self._folder = folder
        self._failed = False
        self._not_before = 0.0

    def write(self, record: Record) -> None:
        if record["kind"] == "val" and time.monotonic() >= self._not_before:
            self._write(running=True)

    def close(self) -> None:
        self._write(running=False)

    def _write(self, *, running: bool) -> None:
        start = time.monotonic()
        try:
            write_report([self._folder], self._folder / REPORT_FILE, known_state="running" if running else "ended")
        except Exception as error:
            # A page that cannot be written, for whatever reason, must not end a run of days. It is said once.
            if not self._failed:
                print(f"{REPORT_FILE} was not written: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self._failed = True
        end = time.monotonic()
        self._not_before = end + (end - start) / MOST_OF_THE_TIME
