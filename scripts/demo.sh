#!/usr/bin/env bash
# Shows a real model streaming with a compressed memory. Makes its own environment.
#
#   bash scripts/demo.sh [demo arguments]      bash scripts/demo.sh --help
#
# ADMS_DEMO_VENV names the environment's folder, PYTHON the Python to begin from.
set -euo pipefail

SCRIPT=demo.sh
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/scripts/environment.sh"

make_environment "${ADMS_DEMO_VENV:-$ROOT/.venv-demo}" demo
# In the caller's folder, where paths among the arguments and the output belong.
exec "$PYTHON" -m adms.evaluation.demo "$@"
