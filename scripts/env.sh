# Sourced by the other scripts, from the root of the repository:
#
#     source scripts/env.sh
#     prepare_env dev        # extras of setup.py; sets PYTHON to an interpreter that has them
#     choose_python          # sets PYTHON to the interpreter at hand; installs nothing
#
# PYTHON=/path/to/python in the environment is used as it is and never installed into.
# Otherwise .venv is made and filled, again only after setup.py has changed.

TORCH_VERSION=2.13.0 # the version the project is developed on; setup.py allows a range

prepare_env() {
    local extras=$1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(_num_threads)}
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    if [ -n "${PYTHON:-}" ]; then
        _check_given_python "$extras"
    else
        _make_venv "$extras"
        PYTHON=$PWD/.venv/bin/python
    fi
}

# The interpreter that was given, that of an activated environment (conda's base is always one), that of .venv,
# or the system's.
choose_python() {
    [ -z "${PYTHON:-}" ] || return 0
    if [ -n "${VIRTUAL_ENV:-}" ] || [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        PYTHON=python
    elif [ -x .venv/bin/python ]; then
        PYTHON=$PWD/.venv/bin/python
    else
        PYTHON=python3
    fi
}

# More threads than this slow small models down.
_num_threads() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    echo $((cores < 8 ? cores : 8))
}

_check_given_python() {
    local missing
    missing=$("$PYTHON" - "$1" <<'PY'
import importlib.util, sys

wanted = ["torch", "transformers", "accelerate", "sentencepiece", "PIL", "requests"]
wanted += {"dev": ["pytest", "ruff", "peft", "matplotlib", "gradio"], "eval": ["matplotlib"], "gpu": ["pytest"]}.get(sys.argv[1], [])
print(*(name for name in wanted if importlib.util.find_spec(name) is None))
PY
    )
    if [ -n "$missing" ]; then
        echo "error: $PYTHON lacks: $missing" >&2
        echo "Install them with: $PYTHON -m pip install -e '.[$1]'" >&2
        return 1
    fi
    echo "Using the given environment: $PYTHON"
}

_make_venv() {
    local extras=$1 stamp=.venv/.installed-$1 wanted base
    wanted=$(cksum <setup.py)-torch-$TORCH_VERSION
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c "" 2>/dev/null; then
        echo "Environment: .venv (up to date)"
        return
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        base=$(_find_python) || return 1
        echo "Making .venv with $base ($("$base" --version))"
        "$base" -m venv --clear .venv || return 1
    fi
    # First and pinned: a bare "torch" can pull a newer build with gigabytes of GPU libraries.
    echo "Installing torch $TORCH_VERSION into .venv"
    .venv/bin/python -m pip install --quiet "torch==$TORCH_VERSION" || return 1
    echo "Installing this project with [$extras] into .venv"
    .venv/bin/python -m pip install --quiet --editable ".[$extras]" || return 1
    echo "$wanted" >"$stamp"
}

# The pinned transformers needs a tokenizers release with wheels for Python 3.10 to 3.12.
_find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10, 3.11 or 3.12 found; set PYTHON=/path/to/python" >&2
    return 1
}
