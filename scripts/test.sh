#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest; PYTHON=python3.11 tests on that one.
# EXTRAS=test,plan-tpu,plan-gpu also compiles for TPUs and GPUs that are not there.
set -euo pipefail
source "$(dirname "$0")/setup.sh" "${EXTRAS:-test}"
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
"$venv/bin/pyright" --pythonpath "$venv/bin/python"
exec "$venv/bin/python" -m pytest "$@"
