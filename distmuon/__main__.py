"""`python -m distmuon plan`: see `cli.py`; `python -m distmuon doctor`: see `doctor.py`."""

from __future__ import annotations

import sys

from distmuon import cli, doctor

if __name__ == "__main__":
    sys.exit(doctor.main() if sys.argv[1:] == ["doctor"] else cli.main())
