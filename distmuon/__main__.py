"""`python -m distmuon plan`: see `cli.py`; `python -m distmuon doctor`: see `doctor.py`."""

from __future__ import annotations

import sys

from distmuon.cli import doctor
from distmuon.cli import plan as cli

if __name__ == "__main__":
    sys.exit(doctor.main() if sys.argv[1:] == ["doctor"] else cli.main())
