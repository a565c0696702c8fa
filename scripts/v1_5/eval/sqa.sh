#!/usr/bin/env bash
# ScienceQA, school science with options: accuracy on the questions that have an image.
# Unpruned, as published: LLaVA-1.5-7B 69.5, 69.6; LLaVA-NeXT-7B 67.6, 70.2; LLaVA-1.5-13B 71.6, 72.8; LLaVA-NeXT-13B 73.6.
#
#     bash scripts/v1_5/eval/sqa.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate sqa
