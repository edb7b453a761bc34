#!/usr/bin/env bash
# Lint, types and the whole test suite (CPU, gloo):
#
#     bash launch/test.sh                     # everything but the tests marked slow or gpu
#     bash launch/test.sh tests/unit -x       # arguments go to pytest
set -euo pipefail
# pytest gets its paths from the repository root, wherever the caller stands
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# DeepSpeed's operators are built when first used, not at installation.
export DS_BUILD_OPS=0
install_extras recipes,accelerate,fabric,lightning,deepspeed,peft,dev

stage "ruff"
python -m ruff check .
stage "mypy"
python -m mypy --strict distmuon
stage "pytest"
python -m pytest "$@"
