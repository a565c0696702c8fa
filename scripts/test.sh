#!/usr/bin/env bash
# Runs the tests. The first run makes .venv and installs the project and its tools there.
#
#     bash scripts/test.sh                          the quick tests
#     bash scripts/test.sh -m slow                  the slow ones; any argument goes to pytest
#     PYTHON=/path/to/python bash scripts/test.sh   in an environment of your own
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
prepare_env dev
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # tests need no network; a stray look-up fails at once
echo "Running: $PYTHON -m pytest $*"
exec "$PYTHON" -m pytest "$@"
