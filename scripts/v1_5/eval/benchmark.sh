#!/usr/bin/env bash
# Any benchmark by its name: `python -m llava.eval.benchmarks.data_files list` shows them.
#
#     bash scripts/v1_5/eval/benchmark.sh NAME [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
case ${1:-} in
-h | --help) ;;
'' | -* | list)
    echo "error: the first word must be the name of a benchmark, not '${1:-}';" \
        "python -m llava.eval.benchmarks.data_files list shows them" >&2
    exit 1
    ;;
*) benchmark=$1 && shift ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate "$benchmark"
