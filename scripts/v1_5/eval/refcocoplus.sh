#!/usr/bin/env bash
# RefCOCO+, descriptions without words of place: as refcoco.sh. SPLIT=testA or testB.
# Unpruned, as published: LLaVA-1.5-7B 46.32.
#
#     bash scripts/v1_5/eval/refcocoplus.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate refcoco+
