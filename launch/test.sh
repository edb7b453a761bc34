#!/usr/bin/env bash
# Lint, types and the whole test suite (CPU, gloo):
#
#     bash launch/test.sh                     # everything but the tests marked slow or gpu
#     bash launch/test.sh tests/unit -x       # arguments go to pytest
set -euo pipefail
# pytest gets its paths from the repository root, wherever the caller stands
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_extras recipes,dev

stage "ruff"
python -m ruff check .
stage "mypy"
python -m mypy --strict distmuon
stage "pytest"
python -m pytest "$@"
