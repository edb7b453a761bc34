# Sourced by quickstart.sh and test.sh: goes to the repository root, makes .venv there and installs into it.
#
# If the python3 at hand already has a torch that setup.cfg allows, .venv sees that torch (--system-site-packages) and
# nothing replaces it. Otherwise torch comes with the package, in the version of launch/constraints.txt.
# PYTHON=/path/to/python3 chooses the interpreter .venv is made from.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# One thread a process: the processes share the cores. A user's own setting stands.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

stage() { printf '\n== %s\n' "$*"; }

has_torch() {
    local floor
    floor="$(sed -n 's/^ *torch>=//p' setup.cfg)"
    "$1" - "$floor" 2>/dev/null <<'PYTHON'
import sys, torch
found, floor = (tuple(map(int, version.split(".")[:2])) for version in (torch.__version__, sys.argv[1]))
sys.exit(found < floor)
PYTHON
}

site_folders() {
    "$1" -c 'import sysconfig; print(*{sysconfig.get_path(name) for name in ("purelib", "platlib")}, sep="\n")'
}

# install_extras EXTRAS: .venv with `-e .[EXTRAS]`. Does nothing if the last call installed the same from the same files.
install_extras() {
    local base="${PYTHON:-python3}" stamp
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "$base: found $("$base" --version 2>&1); Python 3.10 or newer is needed; set PYTHON=/path/to/python3" >&2
        return 1
    fi
    if ! .venv/bin/python -m pip --version &>/dev/null; then
        stage "make .venv"
        if has_torch "$base"; then
            "$base" -m venv --system-site-packages .venv
            # If $base is itself a virtual environment, the option shows what lies beneath it, not its own packages.
            site_folders "$base" > "$(site_folders .venv/bin/python | head -n 1)/base.pth"
        else
            "$base" -m venv .venv
        fi
    fi
    stamp="$1 $(cat setup.py setup.cfg pyproject.toml launch/constraints.txt | cksum)"
    if [[ "$(cat .venv/installed-"$1" 2>/dev/null)" != "$stamp" ]]; then
        stage "install distmuon[$1] into .venv"
        local constraints=(-c launch/constraints.txt)
        if grep -qi 'include-system-site-packages *= *true' .venv/pyvenv.cfg && has_torch .venv/bin/python; then
            constraints=()
        fi
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "${constraints[@]}" -e ".[$1]"
        printf '%s\n' "$stamp" > .venv/installed-"$1"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
