# Sourced by the other scripts, from the repository root: makes the virtual environment and installs the package into it.
# Afterwards $PYTHON is its Python. Read from the environment:
#   TRTBRIDGE_VENV  folder of the environment (default .venv)
#   PYTHON          the Python that makes it (default python3)

VENV="${TRTBRIDGE_VENV:-.venv}"
BASE_PYTHON="${PYTHON:-python3}"

heading() { printf '\n== %s\n' "$*"; }

# A path of the person's own would put other packages in front of the tested ones.
unset PYTHONPATH PYTHONHOME

if [[ ! -x "$VENV/bin/python" ]]; then
    if ! command -v "$BASE_PYTHON" >/dev/null; then
        echo "No $BASE_PYTHON found: install Python 3.10 or newer, or say which one to use: PYTHON=/path/to/python3 $0" >&2
        exit 1
    fi
    if ! "$BASE_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "trtbridge needs Python 3.10 or newer; $BASE_PYTHON is $("$BASE_PYTHON" -V 2>&1)." >&2
        echo "Say which one to use: PYTHON=/path/to/python3.11 $0" >&2
        exit 1
    fi
    heading "Making $VENV with $("$BASE_PYTHON" -V 2>&1)"
    if ! "$BASE_PYTHON" -m venv "$VENV"; then
        rm -rf "$VENV"
        echo "$BASE_PYTHON cannot make virtual environments; on Debian and Ubuntu install the package python3-venv." >&2
        exit 1
    fi
fi
PYTHON="$(cd "$VENV/bin" && pwd)/python"

# Installing again takes seconds even when there is nothing to do, so it is done when something changed.
stamp="$(cat pyproject.toml constraints.txt <(pwd) | cksum)"
if [[ "$(cat "$VENV/trtbridge.stamp" 2>/dev/null || true)" != "$stamp" ]]; then
    heading "Installing trtbridge and what it needs into $VENV (a few minutes the first time)"
    # Twice quiet: errors only, for pip warns of each index that lacks a package.
    "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check -e ".[rtx,demo,dev]" -c constraints.txt
    printf '%s\n' "$stamp" >"$VENV/trtbridge.stamp"
fi
