#!/usr/bin/env bash
# From a fresh clone to benchmark scores: makes .venv, installs the project, and evaluates the
# playground checkpoint with all 576 and with 192, 128 and 64 visual tokens per image.
#
#     bash scripts/quickstart.sh                         a part of the questions, under 6 minutes
#     LIMIT=300 bash scripts/quickstart.sh               about so many questions per task
#     PYTHON=/path/to/python bash scripts/quickstart.sh  in an environment of your own
#
# A second run continues with the answers of the first. Results: runs/quickstart (OUT=... elsewhere).
set -euo pipefail
case $* in
"") ;;
-h | --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0" && exit 0 ;;
*) echo "error: '$*' is not understood; settings go in front: LIMIT=300 bash $0" >&2 && exit 1 ;;
esac
case ${OUT:-} in "" | /*) ;; *) OUT=$PWD/$OUT ;; esac # as seen from where it was called
CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
prepare_env eval
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # everything needed is in the repository

LIMIT=${LIMIT:-40}
OUT=${OUT:-runs/quickstart/limit_$LIMIT}
mkdir -p "$OUT"

DEFAULT=$("$PYTHON" -c "from llava.pruning import DEFAULT_METHOD; print(DEFAULT_METHOD)")

echo "Evaluating the playground, about $LIMIT questions per task:"
"$PYTHON" -m llava.eval.compare.suite --tokens 576 192 128 64 --methods "$DEFAULT" random \
    --limit "$LIMIT" --out "$OUT"

echo
echo "One question, with the patches that $DEFAULT keeps:"
"$PYTHON" -m llava.eval.run_llava --temperature 0 --visual-token-num 64 \
    --show-pruning "$OUT/kept_patches.png"

echo
echo "Table:               $OUT/table.md"
echo "Plot of the scores:  $OUT/plot.png"
echo "Patches kept:        $OUT/kept_patches.png"
[ "$PYTHON" != "$PWD/.venv/bin/python" ] || echo "To go on with llava: source .venv/bin/activate"
