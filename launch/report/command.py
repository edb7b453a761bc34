"""The command: `python -m launch.report RUN [RUN...] [--out report.html]`, or `distmuon report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.report.page import REPORT_FILE, packages, write_report


def main(argv: list[str] | None = None) -> None:
    """Write the page of the runs that the command line names."""
    parser = argparse.ArgumentParser(
        prog="launch.report" if Path(sys.argv[0]).name == "__main__.py" else None,
        description="Write one page, which opens offline, about a run or several runs side by side.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder; files are passed by")
    parser.add_argument(
        "--out", type=Path, help=f"the page to write; default: {REPORT_FILE} in the folder of a single run, or here"
    )
    arguments = parser.parse_args(argv)
    folders = [path for path in arguments.runs if not path.is_file()]
    if not folders:
        raise ValueError(f"runs: found {len(arguments.runs)} files and no folder; at least one run's folder is needed")
    out = arguments.out or (folders[0] / REPORT_FILE if len(folders) == 1 else Path(REPORT_FILE))
    packages()
    write_report(folders, out)
    print(out)
