"""`python -m distmuon`: the same program as `distmuon`."""

from __future__ import annotations

import sys

from distmuon.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
