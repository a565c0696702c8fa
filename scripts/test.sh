#!/usr/bin/env bash
# Runs the tests. The first run makes .venv and installs the project and its tools there.
#
#     bash scripts/test.sh                          the quick tests, in two processes
#     bash scripts/test.sh -n 4                     in four (-n 0: in one); any argument goes to pytest
#     bash scripts/test.sh -m slow                  the slow ones; with -m all run in one process
#     PYTHON=/path/to/python bash scripts/test.sh   in an environment of your own
set -euo pipefail
CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

# A file stays in one process, which then builds what its tests share once.
OPTIONS=(-n 2 --dist loadfile)
for word in "$@"; do
    [[ $word != -m* ]] || OPTIONS=()
done
# Processes with more threads than that would fight over the cores.
[ ${#OPTIONS[@]} = 0 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
prepare_env dev
if ! "$PYTHON" -c "import xdist" 2>/dev/null; then
    echo "$PYTHON lacks pytest-xdist: all tests run in one process"
    OPTIONS=()
fi

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # tests need no network; a stray look-up fails at once
set -- ${OPTIONS[@]+"${OPTIONS[@]}"} "$@" # an own -n comes later and wins
echo "Running: $PYTHON -m pytest $*"
exec "$PYTHON" -m pytest "$@"
