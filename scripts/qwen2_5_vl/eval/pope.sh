#!/usr/bin/env bash
# As scripts/v1_5/eval/pope.sh, with Qwen2.5-VL (default: Qwen/Qwen2.5-VL-7B-Instruct).
export MODEL_FAMILY=qwen2_5_vl
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../v1_5/eval/pope.sh" "$@"
