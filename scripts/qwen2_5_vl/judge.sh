#!/bin/bash
# The judge of GlimpsePrune+ and of Visual-CoT: Qwen2.5-32B-Instruct (GPTQ, 8 bits) behind an OpenAI-compatible endpoint,
# on two GPUs with 24 GB each (pip install vllm, in an environment of its own).
#
#     CUDA_VISIBLE_DEVICES=4,5 bash scripts/qwen2_5_vl/judge.sh [flags of vllm serve]
#     python -m llava.train.reinforcement.judge_load               # does it answer, and how fast?
#
# From the environment: JUDGE_MODEL, JUDGE_GPUS (how many, 2), PORT (8000), LAUNCHER.
set -euo pipefail
${LAUNCHER:-vllm} serve "${JUDGE_MODEL:-Qwen/Qwen2.5-32B-Instruct-GPTQ-Int8}" \
    --tensor-parallel-size "${JUDGE_GPUS:-2}" \
    --max-num-seqs 4 \
    --max-model-len 2048 \
    --port "${PORT:-8000}" \
    "$@"
