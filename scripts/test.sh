#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest; PYTHON=python3.11 tests on that one.
# EXTRAS=test,plan-tpu,plan-gpu also compiles for TPUs and GPUs that are not there.
# scripts/test.sh --fast: no test that compiles a step of a model or starts a run (tests/conftest.py).
# scripts/test.sh -m nightly: more of the same, which takes an hour.
set -euo pipefail
source "$(dirname "$0")/setup.sh" "${EXTRAS:-test}"
# Compiling allocates much and small: huge pages, and no bins whose merging takes long, save a sixth of
# the time with glibc. Others ignore the variable.
export GLIBC_TUNABLES=glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1
# Tests start many processes. Without the byte code that the first one keeps each of them reads all
# of jax as source, for three seconds; in the environment it is not in the way of anything.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$PWD/$venv/bytecode
[ "${1:-}" != --fast ] || set -- -m 'not slow and not nightly' "${@:2}"
times="installation $SECONDS s"
trap 'echo "$0: $times, $SECONDS s in all"' EXIT
part() { # NAME COMMAND...
    local start=$SECONDS status=0
    "${@:2}" || status=$?
    times+=", $1 $((SECONDS - start)) s"
    return "$status"
}
"$venv/bin/ruff" format --check .
part lint "$venv/bin/ruff" check .
part types "$venv/bin/pyright" --pythonpath "$venv/bin/python"
part tests "$venv/bin/python" -m pytest --numprocesses=auto --maxprocesses=4 \
    --dist=loadfile --no-loadscope-reorder "$@"
