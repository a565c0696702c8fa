#!/usr/bin/env bash
# As scripts/v1_5/eval/benchmark.sh; with CKPT_DIR the checkpoint defaults to llava-v1.6-vicuna-7b.
export DEFAULT_CKPT=llava-v1.6-vicuna-7b
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../v1_5/eval/benchmark.sh" "$@"
