#!/usr/bin/env bash
# VizWiz, photographs by blind people: the upload file of the test split, whose server is reported
# closed, or with SPLIT=val the soft accuracy on the validation split.
#
#     bash scripts/v1_5/eval/vizwiz.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate vizwiz
