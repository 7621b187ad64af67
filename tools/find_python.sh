#!/usr/bin/env bash
# Print the path of a Python 3.12 that can make virtual environments, or say how to get one.
#
# A name on PATH proves little: pyenv's shims exist for versions that are not selected, and
# Debian ships interpreters without ensurepip. So every candidate is run before it is taken.
set -uo pipefail

# The base executable, because a candidate may itself live in a virtual environment (even in
# the .venv about to be rebuilt).
probe='
import sys, venv, ensurepip
assert sys.version_info[:2] == (3, 12)
print(getattr(sys, "_base_executable", None) or sys.executable)
'

try() {
    local found
    if command -v "$1" >/dev/null 2>&1 && found=$("$1" -c "$probe" 2>/dev/null); then
        printf '%s\n' "$found"
        exit 0
    fi
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    echo "note: PYTHON=$PYTHON is not a Python 3.12 with venv and ensurepip; looking further" >&2
fi
try python3.12
for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
    /usr/bin/python3.12 /usr/local/bin/python3.12 \
    /opt/homebrew/bin/python3.12 /opt/*/bin/python3.12; do
    try "$candidate"
done
try python3
if command -v uv >/dev/null 2>&1; then
    # --system: otherwise uv may answer with the project's own .venv.
    try "$(uv python find --system 3.12 2>/dev/null)"
fi

echo "error: no usable Python 3.12 found; install one ('apt install python3.12 python3.12-venv'," \
    "'uv python install 3.12' or 'pyenv install 3.12') or run 'make PYTHON=/path/to/python3.12'" >&2
exit 1
