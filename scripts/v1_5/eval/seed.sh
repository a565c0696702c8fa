#!/usr/bin/env bash
# SEED-Bench, questions with options on images and on the middle frames of videos: accuracy.
# Unpruned, as published: LLaVA-1.5-7B 58.6; LLaVA-1.5-13B 61.6.
#
#     bash scripts/v1_5/eval/seed.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate seed
