"""`python -m distmuon plan` and `python -m distmuon doctor`; each command is a module of `distmuon.cli`."""

from __future__ import annotations

import sys

from distmuon.cli import doctor, plan


def main(argv: list[str]) -> int:
    """Run the command that the first argument names; return the exit status."""
    if argv == ["doctor"]:
        return doctor.main()
    if argv[:1] == ["plan"]:
        return plan.main(argv[1:])
    print("usage: python -m distmuon plan MODEL --dp N[,N...] (plan --help says more) | doctor", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
