#!/usr/bin/env bash
# Installs jaxlm into .venv and trains a small Llama on the sources of the Python standard library.
# Arguments are overrides: scripts/quickstart.sh devices.simulate=8 mesh.fsdp=2 mesh.tensor=4
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
exec "$venv/bin/jaxlm" train configs/quickstart.yaml "$@"
