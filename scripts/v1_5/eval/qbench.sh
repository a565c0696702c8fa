#!/usr/bin/env bash
# Q-Bench, questions on image quality with options: accuracy on the development split.
# SPLIT=test (its authors score the answers), zh or zh_test (in Chinese); also as the first word.
#
#     bash scripts/v1_5/eval/qbench.sh [SPLIT] [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
case ${1:-} in
dev | test | zh | zh_test) SPLIT=$1 && shift ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate qbench
