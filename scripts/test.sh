#!/usr/bin/env bash
# Runs every check: formatting, lint, types, tests. Makes its own environment.
#
#   bash scripts/test.sh [--slow] [pytest arguments]
#
# --slow (or --all, or CI=true in the environment) runs the tests marked slow too.
# ADMS_TEST_VENV names the environment's folder, ADMS_TEST_ASSETS the folder of test models and
# texts (../shared of the repository where it is there), PYTHON the Python to begin from.
set -euo pipefail

SCRIPT=test.sh
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/scripts/environment.sh"

slow=${CI:-false}
arguments=(-q -rs)
for argument in "$@"; do
  case $argument in
    --slow | --all) slow=true ;;
    *) arguments+=("$argument") ;;
  esac
done

make_environment "${ADMS_TEST_VENV:-$ROOT/.venv-test}" dev,demo

if [ -z "${ADMS_TEST_ASSETS:-}" ] && [ -d "$ROOT/../shared/models" ]; then
  ADMS_TEST_ASSETS=$(cd "$ROOT/../shared" && pwd)
  export ADMS_TEST_ASSETS
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  # The models are tiny: beyond four threads, waiting for each other costs more than it gains.
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=$((cores < 4 ? cores : 4))
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

what="all tests"
if [ "$slow" != true ] && [ "$slow" != 1 ]; then
  what="all but the slow tests"
  # First, so that an -m among the arguments takes its place.
  arguments=(-m "not slow" "${arguments[@]}")
fi

# From the root, whatever the caller's folder: paths among the arguments are relative to it.
cd "$ROOT"
say "ruff format"
"$PYTHON" -m ruff format --check --quiet . || fail "files above are not formatted; run: $PYTHON -m ruff format ."
say "ruff check"
"$PYTHON" -m ruff check --quiet . || fail "lint found the faults above"
say "mypy"
"$PYTHON" -m mypy --no-error-summary || fail "the type checker found the faults above"
say "pytest, $what, assets: ${ADMS_TEST_ASSETS:-none}"
"$PYTHON" -m pytest "${arguments[@]}"
