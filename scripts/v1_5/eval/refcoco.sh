#!/usr/bin/env bash
# RefCOCO, the box of a described thing: share of boxes with an IoU of at least 0.5.
# SPLIT=testA (people) or testB (other things); default: val.
# Unpruned, as published: LLaVA-1.5-7B 56.42.
#
#     bash scripts/v1_5/eval/refcoco.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate refcoco
