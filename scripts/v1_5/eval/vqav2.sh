#!/usr/bin/env bash
# VQAv2, questions of every kind: soft accuracy. The answers to the published test split are known
# to its server only; for it, the upload file is written instead of a score. SPLIT=val: scored here.
# Unpruned, as published: LLaVA-1.5-7B 78.5; LLaVA-NeXT-7B 81.3, 81.8; LLaVA-1.5-13B 80.0; LLaVA-NeXT-13B 82.8.
#
#     bash scripts/v1_5/eval/vqav2.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate vqav2
