#!/usr/bin/env bash
# Lint, types and tests (CPU, gloo), in an environment that this script makes:
#
#     bash launch/test.sh fast                # before a push: a minute
#     bash launch/test.sh                     # before a merge: everything but the tests marked slow or gpu
#     bash launch/test.sh nightly             # the slow tests, and the errors that no test provokes
#     bash launch/test.sh tests/unit -x -n 0  # arguments go to pytest; -n 0: in one process, where --pdb works
set -euo pipefail
# pytest gets its paths from the repository root, wherever the caller stands
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# The layout, the rules, routing, refusals, the house, the promises; and Algorithm 1 against the oracle at 2 ranks.
FAST=(
    -m "not slow and not gpu and not hypothesis"
    tests/unit/test_{errors,house,layout,memory,newton_schulz,promises,reference,routing,standing}.py
    "tests/distributed/test_parity.py::test_five_steps_equal_one_process[2-1]"
    "tests/distributed/test_parity.py::test_masters_of_bfloat16_parameters_keep_the_promise[mixed-2]"
)

# DeepSpeed's operators are built when first used, not at installation.
export DS_BUILD_OPS=0
install_extras recipes,accelerate,fabric,lightning,deepspeed,peft,ray,docs,dev

stage "ruff"
python -m ruff check .
python -m ruff format --check .
if [[ "${1:-}" == fast ]]; then
    stage "pytest, the fast tier"
    exec python -m pytest "${FAST[@]}" "${@:2}"
fi
stage "mypy"
python -m mypy
stage "codespell"
codespell
if [[ "${1:-}" == nightly ]]; then
    stage "pytest -m slow"
    status=0
    python -m pytest -m slow "${@:2}" || status=$?
    stage "errors that no test provokes"
    python -m tests.raises || status=$?
    exit "$status"
fi
stage "pytest"
# Two files of tests at a time: ranks wait for each other, and what is no run of ranks uses one core. Files stay whole,
# for their fixtures, and in order: the short tests come last and even out the end.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
