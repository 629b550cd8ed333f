#!/usr/bin/env bash
# Runs the exactness tests on the oldest and a middle supported version of transformers.
#
#   bash scripts/version_matrix.sh [version ...]
#
# Each version gets a small environment of its own, which borrows everything but transformers from
# the test environment (scripts/test.sh makes it; ADMS_TEST_VENV names it). VERSION_MATRIX_VENVS
# names the folder for them, VERSION_MATRIX_REPORTS one for JUnit reports, of which
# scripts/architectures_table.py makes the README's table.
set -euo pipefail

SCRIPT=version_matrix.sh
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/scripts/environment.sh"

versions=("$@")
if [ ${#versions[@]} -eq 0 ]; then
  versions=(5.4.0 5.17.0)
fi
base=${ADMS_TEST_VENV:-$ROOT/.venv-test}
make_environment "$base" dev,demo
folder=${VERSION_MATRIX_VENVS:-$base/versions}
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
borrowed=$("$PYTHON" -c "$purelib")
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# From the root, as pytest.ini's paths are.
cd "$ROOT"
for version in "${versions[@]}"; do
  venv=$folder/$version
  if ! [ -f "$venv/complete" ]; then
    say "making an environment with transformers $version"
    "$PYTHON" -m venv --clear --without-pip "$venv"
    target=$("$venv/bin/python" -c "$purelib")
    # The path file lends it the base environment behind its own packages.
    printf '%s\n' "$borrowed" >"$target/borrowed.pth"
    PIP_CONSTRAINT=$ROOT/scripts/constraints.txt "$venv/bin/python" -m pip install -qq \
      --disable-pip-version-check --no-input "transformers==$version" ||
      fail "pip could not install transformers $version; its message is above"
    touch "$venv/complete"
  fi
  found=$("$venv/bin/python" -c 'import transformers; print(transformers.__version__)')
  [ "$found" = "$version" ] || fail "$venv has transformers $found instead of $version; remove it and run again"
  say "exactness tests on transformers $version"
  report=()
  if [ -n "${VERSION_MATRIX_REPORTS:-}" ]; then
    report=("--junitxml=$VERSION_MATRIX_REPORTS/$version.xml")
  fi
  "$venv/bin/python" -m pytest -q ${report[@]+"${report[@]}"} -p no:cacheprovider -m "not slow and not assets" \
    tests/test_architectures.py tests/test_architectures_generate.py \
    tests/test_architectures_wrapped.py ||
    fail "the tests above failed on transformers $version"
done
