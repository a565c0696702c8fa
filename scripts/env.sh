# Sourced by the other scripts, in the root of the repository, which they have just gone to:
#
#     source scripts/env.sh
#     prepare_env dev        # extras of setup.py; sets PYTHON to an interpreter that has them
#     choose_python          # sets PYTHON to the interpreter at hand; installs nothing
#
# PYTHON=/path/to/python in the environment is used as it is and never installed into; so is an activated
# environment. Otherwise .venv is made and filled, again only after setup.py has changed.

TORCH_VERSION=2.13.0 # the version the project is developed on; setup.py allows a range

# A PYTHON with a folder is meant as seen from where the script was called.
case ${PYTHON:-} in
'' | /*) ;;
*/*) PYTHON=${OLDPWD:-$PWD}/$PYTHON ;;
esac

prepare_env() {
    local extras=$1 lacking
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(_num_threads)}
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    if [ -n "${PYTHON:-}" ]; then
        lacking=$(_lacking "$PYTHON" "$extras") || return 1
        if [ -n "$lacking" ]; then
            echo "error: $PYTHON lacks: $lacking" >&2
            echo "Install them with: $PYTHON -m pip install -e '.[$extras]'" >&2
            return 1
        fi
        echo "Using the given environment: $PYTHON"
    elif _activated && lacking=$(_lacking python "$extras") && [ -z "$lacking" ]; then
        PYTHON=$(command -v python || echo python)
        echo "Using the activated environment: $PYTHON"
    else
        _make_venv "$extras" || return 1
        PYTHON=$PWD/.venv/bin/python
    fi
}

# The interpreter that was given, that of an activated environment, that of .venv, or the system's.
choose_python() {
    local lacking
    if [ -n "${PYTHON:-}" ]; then
        :
    elif _activated; then
        PYTHON=$(command -v python || echo python)
    elif [ -x .venv/bin/python ]; then
        PYTHON=$PWD/.venv/bin/python
    else
        PYTHON=python3
    fi
    lacking=$(_lacking "$PYTHON" "") || return 1
    if [ -n "$lacking" ]; then
        echo "error: $PYTHON lacks: $lacking" >&2
        echo "Activate the environment of this project, or set PYTHON=/path/to/python;" \
            "\`bash scripts/quickstart.sh\` makes one in .venv." >&2
        return 1
    fi
}

# Of conda, the environment `base` is always active.
_activated() {
    [ -n "${VIRTUAL_ENV:-}" ] || [ "${CONDA_DEFAULT_ENV:-base}" != base ]
}

# More threads than this slow small models down.
_num_threads() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    echo $((cores < 8 ? cores : 8))
}

# _lacking PYTHON EXTRAS: the modules of these extras, or of none, that an interpreter does not have, and the one
# package whose version matters to the digit.
_lacking() {
    "$1" - "$2" <<'PY' && return
import importlib.util, os, re, sys
from importlib.metadata import version

wanted = ["torch", "transformers", "accelerate", "sentencepiece", "PIL", "numpy", "requests", "shortuuid", "tqdm"]
serve = ["gradio", "fastapi", "uvicorn", "h11", "httpx", "httpx_sse", "python_multipart", "pydantic"]
evaluation = ["matplotlib", "openpyxl"]
tests = ["pytest", "hypothesis", "mypy", "ruff", "peft"]
wanted += {"dev": tests + evaluation + serve, "eval": evaluation, "gpu": ["pytest"]}.get(sys.argv[1], [])
lacking = [name for name in wanted if importlib.util.find_spec(name) is None]
if os.path.exists("setup.py") and "transformers" not in lacking:
    pinned = re.search(r'"transformers==([^"]+)"', open("setup.py").read())[1]
    if version("transformers") != pinned:
        lacking.append(f"transformers=={pinned}")
print(*lacking)
PY
    echo "error: $1 does not start; set PYTHON=/path/to/python" >&2
    return 1
}

_make_venv() {
    local extras=$1 stamp=.venv/.installed-$1 wanted base made
    wanted=$(cksum <setup.py)-torch-$TORCH_VERSION
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c "" 2>/dev/null; then
        echo "Environment: .venv (up to date)"
        return
    fi
    made=$(ls .venv/.installed-* 2>/dev/null) || true
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        base=$(_find_python) || return 1
        echo "Making .venv with $base ($("$base" --version))"
        "$base" -m venv --clear .venv || return 1
    elif [ -z "$made" ] && [ -z "$(_lacking .venv/bin/python "$extras")" ]; then
        echo "Environment: .venv, which was not made by this script, as it is"
        return
    fi
    # First and pinned: a bare "torch" can pull a newer build with gigabytes of GPU libraries. One that somebody
    # chose stays.
    if [ -n "$made" ] || ! .venv/bin/python -c "import torch" 2>/dev/null; then
        echo "Installing torch $TORCH_VERSION into .venv"
        .venv/bin/python -m pip install --quiet "torch==$TORCH_VERSION" || return 1
    fi
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
