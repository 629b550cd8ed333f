#!/usr/bin/env bash
# Runs scenarios times profiles and reports over all of them. Resumable: the same command goes on.
#
#   bash scripts/run_adms_report.sh                        built-in scenarios (network and a GPU)
#   SCENARIOS=offline bash scripts/run_adms_report.sh      SmolLM2 and local models, on a CPU
#   SCENARIOS="name=mine model=smollm2 dataset=pydoc tokens=2048" bash scripts/run_adms_report.sh
#
# FORCE_RERUN=1   run again what has a summary.json
# OUTPUT_ROOT     folder of the results, outputs/auto_adms_runs
# SCENARIOS       one string: offline, names of scenarios, or name=... model=... entries
# PROFILES        balanced, quality, or both (default)
# PYTHON          a Python with adms installed; without it, ADMS_REPORT_VENV (.venv-demo) is made
# Further arguments go to `adms report`; bash scripts/run_adms_report.sh --help lists them.
set -euo pipefail

SCRIPT=run_adms_report.sh
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -z "${PYTHON:-}" ] || ! "$PYTHON" -c 'import adms.cli' 2>/dev/null; then
  source "$ROOT/scripts/environment.sh"
  make_environment "${ADMS_REPORT_VENV:-$ROOT/.venv-demo}" demo
fi
exec "$PYTHON" -m adms.cli report "$@"
