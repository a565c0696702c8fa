#!/usr/bin/env bash
# RefCOCO, the box of a described thing: share of boxes with an IoU of at least 0.5.
#
#     bash scripts/v1_5/eval/refcoco.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

answer model_vqa_loader refcoco/llava_refcoco_val.jsonl refcoco/images
score refcoco
