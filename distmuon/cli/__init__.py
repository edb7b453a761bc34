"""The command line, a module for each command: `python -m distmuon plan`, `python -m distmuon doctor`."""
