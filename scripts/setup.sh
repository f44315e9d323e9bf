# Sourced by the scripts next to it: makes the virtual environment and installs jaxlm with $1 extras.
# PYTHON names the interpreter (default python3); one that is named has an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    { echo "$0: no $python here; set PYTHON to Python 3.11 or later" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "$0: $python is Python $version; set PYTHON to Python 3.11 or later" >&2; exit 2; }
venv=.venv${PYTHON:+-$version}
stamp=$venv/.installed-${1:-plain}
wanted=$("$python" -V; cat pyproject.toml)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing jaxlm${1:+ with $1} into $venv"
    [ -x "$venv/bin/python" ] && [ "$("$venv/bin/python" -V)" = "$("$python" -V)" ] ||
        "$python" -m venv --clear "$venv"
    # --no-compile saves a minute: Python compiles what it imports, a small part of the files.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -e ".${1:+[$1]}"
    printf '%s\n' "$wanted" > "$stamp"
fi
