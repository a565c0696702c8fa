#!/usr/bin/env bash
# VQAv2, questions of every kind: soft accuracy. The answers to the published test split are known
# to its server only; for it, the upload file is written instead of a score.
#
#     bash scripts/v1_5/eval/vqav2.sh [TOKENS] [KEY=VALUE ...]     see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

answer model_vqa_loader vqav2/llava_vqav2_mscoco_test-dev2015.jsonl vqav2/test2015
if [ -e "$SOURCE/vqav2/llava_vqav2_mscoco_test2015.jsonl" ]; then
    src=${ANSWERS#"$DATA_DIR/vqav2/"}
    dst=answers_upload/${src#answers/}
    "$PYTHON" scripts/convert_vqav2_for_submission.py --dir "$DATA_DIR/vqav2" \
        --src "$src" --dst "${dst%.jsonl}.json"
    echo "for the server: $DATA_DIR/vqav2/${dst%.jsonl}.json"
else
    score vqav2
fi
