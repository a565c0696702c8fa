#!/usr/bin/env bash
# RefCOCOg, longer descriptions: as refcoco.sh. SPLIT=test.
# Unpruned, as published: LLaVA-1.5-7B 48.82.
#
#     bash scripts/v1_5/eval/refcocog.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate refcocog
