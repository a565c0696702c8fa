#!/usr/bin/env bash
# VizWiz, photographs by blind people: the upload file of the test split, whose server is reported
# closed, or with SPLIT=val the soft accuracy on the validation split.
# Unpruned, as published: LLaVA-1.5-7B 50.0, 50.1; LLaVA-NeXT-7B 55.2; LLaVA-1.5-13B 53.6; LLaVA-NeXT-13B 60.5.
# SPLIT=val, unpruned, as published: LLaVA-1.5-7B 55.6; LLaVA-NeXT-7B 60.9.
#
#     bash scripts/v1_5/eval/vizwiz.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate vizwiz
