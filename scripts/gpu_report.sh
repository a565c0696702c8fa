#!/usr/bin/env bash
# Checks a GPU and measures it in under 8 minutes: `pytest -m gpu`, all methods at the sizes of a 7B
# model, how near decoding comes to the card's memory, kernels, guessing, throughput.
#
#     bash scripts/gpu_report.sh                  writes runs/gpu_report/report.json, docs/gpu/CARD.md
#     bash scripts/gpu_report.sh --budget 300     in less time; what is left out is named
#     bash scripts/gpu_report.sh --small          tiny models on the CPU: does all of it work?
#     PYTHON=/path/to/python bash scripts/gpu_report.sh               in an environment of your own
#     PYTHON=python3 WHEELS=wheels bash scripts/gpu_report.sh         with packages from a folder
#
# A call that was cut short, or a step that failed, is made up for by the same call again.
set -euo pipefail
CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

# Wheels stand in front of what the environment has, which is left as it is; nothing is downloaded.
if [ -n "${WHEELS:-}" ]; then
    : "${PYTHON:?WHEELS needs an environment: set PYTHON=/path/to/python}"
    site=$PWD/runs/gpu_report_site
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
        --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
prepare_env gpu
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # everything needed is in the repository
exec "$PYTHON" -m llava.eval.gpu_report "$@"
