"""The command line, one module a command: `python -m distmuon plan`, `python -m distmuon doctor`."""
