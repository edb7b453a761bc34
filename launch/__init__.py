"""The recipe: programs, each of them started by `python -m launch.<name>`."""

import os
import sys

# The imports of a program take seconds, so its first words come before them. While Python looks for the module of `-m`,
# sys.argv[0] is "-m"; an import of this package by anything else says nothing.
if sys.argv[:1] == ["-m"] and os.environ.get("RANK", "0") == "0":
    print(f"loading {sys.orig_argv[sys.orig_argv.index('-m') + 1]} ...", file=sys.stderr, flush=True)
