# Sourced by scripts/v1_5/eval/*.sh (and through them by those of v1_6 and qwen2_5_vl):
#
#     bash scripts/v1_5/eval/pope.sh [TOKENS] [KEY=VALUE ...] [further options]
#
# TOKENS       visual tokens of an image to keep or, with a decimal point, a share of those it has
#              (0.222: best where images differ in how many they have, as with Qwen2.5-VL); left out:
#              the unpruned model, or METHOD's own budget. For a method that decides per image,
#              TOKENS is the most it may keep
# KEY=VALUE    options of the pruning method, e.g. important_ratio=0.7; as a flag as well
#              (--important_ratio 0.7), and where the method's published scripts take them by place
#              (64 0.7) or from the environment, in that way (docs/Methods.md)
# NEW_MODULES_DIR [ADAPTER_DIR] in front of all this are the words of GlimpsePrune's release: folders
# (or names on the hub) of its trained part and of a LoRA adapter of the checkpoint.
# Everything else is handed to the answering program (llava/eval/model_vqa_loader.py --help), such as
# --skip-bad, which records questions that cannot be asked and goes on.
#
# From the environment:
#   METHOD       pruning method (default: the one that the options belong to, with TOKENS alone
#                vispruner); none: the unpruned model
#   CKPT         checkpoint: a folder, a name inside CKPT_DIR, or a name on the hub
#                (default: the playground's of that family; with CKPT_DIR: the published 7B model)
#   CKPT_DIR     folder of the checkpoints
#   DATA_DIR     evaluation data and answers: playground/data/eval/README.md has its layout. Not
#                set: playground/data/eval, where a benchmark that is not there is replaced by the
#                playground's
#   CUDA_VISIBLE_DEVICES   one process per listed GPU
#   NPROC        number of processes, if it should be another; on several machines, of all together
#   LAUNCH       further options of `accelerate launch`, for several machines
#   LAUNCHER     a command that starts all processes in its place (scripts/slurm/eval.sbatch)
#   BATCH_SIZE   prompts per step (default: 8)
#   LIMIT        about so many questions, evenly spread, for quick runs (as an option: --limit N)
#   CONV_MODE    prompt template (default: the one that the checkpoint asks for)
#   OPENAI_API_KEY, OPENAI_BASE_URL, JUDGE_MODEL, JUDGE_WORKERS, JUDGE_EXTRA
#                the judge of llavabench, mmvet and viscot: docs/Evaluation.md
#   BASE_MODEL, NUM_SAMPLES   GlimpsePrune's names of CKPT and LIMIT
#   MAX_REMAIN_RATIO, MIN_REMAIN_NUM   options of METHOD=glimpseprune
#   SAVE_MASKS=1 write what was kept of each image as a picture, one pixel per token
#   ATTN_IMPL    attention: sdpa, flash_attention_2 or eager
#   ADAPTER_MERGE   1: ADAPTER_DIR is merged into the model, which is what happens in any case
#   EXTRA        further options of the answering program, for all calls, but for LIMIT and BRIEF,
#                which scoring has to know; with
#                "--engine vllm --engine-url http://127.0.0.1:8000" a vLLM server answers
#   PYTHON       interpreter (default: that of an activated environment, else .venv's, else python3)
#
# Answers go to DATA_DIR/BENCHMARK/answers/QUESTIONS/CKPT/METHOD/n_TOKENS[_KEY=VALUE][_limitN].jsonl,
# the score into a .score.json beside them. A name of more than 180 characters is cut, with a number
# that stands for the rest. A run that was interrupted continues.

set -euo pipefail
for word in "$@"; do
    if [ "$word" = -h ] || [ "$word" = --help ]; then # the comments at the top of both files
        for file in "$0" "${BASH_SOURCE[0]}"; do
            sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$file" && echo
        done
        exit 0
    fi
done
# Given as seen from where the script was called; the scripts run in the root of the repository. Links keep
# their names.
from_here() {
    if [ -d "$1" ]; then
        (CDPATH= cd -- "$1" && pwd)
    else
        case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
    fi
}
[ -z "${DATA_DIR:-}" ] || DATA_DIR=$(from_here "$DATA_DIR")
[ -z "${CKPT_DIR:-}" ] || CKPT_DIR=$(from_here "$CKPT_DIR")
# A name without a slash is sought in CKPT_DIR first.
for name in CKPT BASE_MODEL; do
    if [ -d "${!name:-}" ] && { [ -z "${CKPT_DIR:-}" ] || [[ ${!name} == */* ]]; }; then
        printf -v "$name" %s "$(from_here "${!name}")"
    fi
done
source "$(dirname "${BASH_SOURCE[0]}")/released_names.sh"
CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
export LLAVA_TYPED_COMMAND=${LLAVA_TYPED_COMMAND:-bash $0} # how the programs call themselves
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false

PLAYGROUND_MODEL=playground/checkpoints/llava-v1.5-playground
DEFAULT_DATA=playground/data/eval
source scripts/env.sh
choose_python

SCORES=() # files of the scores so far

# --- the command line: sets METHOD, LABEL (of the answers file) and OPTIONS ---
METHOD=${METHOD:-}
TOKENS=
PAIRS=()
REST=()
if [ $# -gt 0 ] || [ -n "$METHOD" ]; then
    # all.sh has read the words for the scripts it starts
    words=${WORDS_READ:-$(CALLED_FROM=$OLDPWD "$PYTHON" -m \
        llava.eval.answering.script_args "$METHOD" "$@")}
    eval "$words"
fi
METHOD=${METHOD:-none}
LABEL=n_${TOKENS:-$([ "$METHOD" = none ] && echo all || echo default)}
OPTIONS=(--pruning-method "$METHOD" ${TOKENS:+--visual-token-num "$TOKENS"})
for pair in ${PAIRS[@]+"${PAIRS[@]}"}; do
    OPTIONS+=(--pruning-arg "$pair")
    LABEL+=_${pair//\//-} # a folder among the options must not become one of the answers
done
OPTIONS+=(${REST[@]+"${REST[@]}"})
for word in ${EXTRA:-}; do
    case ${word%%=*} in
    --limit | --num[-_]samples) meant=LIMIT=N ;;
    --brief) meant=BRIEF=1 ;;
    *) continue ;;
    esac
    echo "error: EXTRA has $word, of which scoring would not know: set $meant in its place" >&2
    exit 1
done
if [ -n "${LIMIT:-}" ]; then
    OPTIONS+=(--limit "$LIMIT")
    LABEL+=_limit$LIMIT
fi
LABEL+=$RELEASED_LABEL
# A file system takes names of up to 255 bytes, and what lies beside the answers has longer ones.
[ ${#LABEL} -le 180 ] || LABEL=${LABEL:0:160}_$(cksum <<<"$LABEL" | cut -d' ' -f1)

# --- the checkpoint: sets MODEL and MODEL_NAME ---
# OWNER of published models on the hub.
OWNER=liuhaotian DEFAULT_CKPT=${DEFAULT_CKPT:-llava-v1.5-7b}
if [ "${MODEL_FAMILY:-}" = qwen2_5_vl ]; then
    OWNER=Qwen DEFAULT_CKPT=Qwen2.5-VL-7B-Instruct
    PLAYGROUND_MODEL=playground/checkpoints/qwen2.5-vl-playground
fi
if [[ "${CKPT:-}" == /* ]] && [ -d "$CKPT" ]; then
    MODEL=$CKPT
elif [ -n "${CKPT_DIR:-}" ]; then
    MODEL=$CKPT_DIR/${CKPT:-$DEFAULT_CKPT}
    if [ ! -d "$MODEL" ]; then
        echo "error: there is no checkpoint $MODEL; the published ones are at" \
            "https://huggingface.co/$OWNER/$(basename "$MODEL")" >&2
        exit 1
    fi
elif [ -z "${CKPT:-}" ]; then
    MODEL=$PLAYGROUND_MODEL
elif [[ $CKPT == */* ]]; then
    MODEL=$CKPT
else
    MODEL=$OWNER/$CKPT
fi
if [ -n "$RELEASED_ADAPTER" ]; then
    OPTIONS+=(--model-base "$MODEL")
    MODEL=$RELEASED_ADAPTER
fi
MODEL_NAME=$(basename "$MODEL")
# Every training has a checkpoint-500: the folder around it tells them apart, as in the answers.
case $MODEL_NAME in
checkpoint-*) MODEL_NAME=$(basename "$(dirname "$MODEL")")_$MODEL_NAME ;;
esac

# evaluate BENCHMARK: asks its questions and scores the answers. The benchmark is one of
# llava/eval/benchmarks, which knows its files and the program that asks; SPLIT from the environment
# chooses another split of it.
evaluate() {
    local name=$1${SPLIT:+_$SPLIT}
    answer "$name"
    score "$name"
}

# answer BENCHMARK: sets SOURCE, QUESTIONS and ANSWERS.
answer() {
    local found path split IMAGES PROGRAM VARIANT
    found=$("$PYTHON" -m llava.eval.benchmarks.data_files "$1" ${DATA_DIR:+--data-dir "$DATA_DIR"})
    eval "$found"
    path=${QUESTIONS#"$SOURCE/"}
    split=$(basename "${path%.*}")
    ANSWERS=${DATA_DIR:-$DEFAULT_DATA}/${path%%/*}/answers/$split/$MODEL_NAME/$METHOD/$LABEL$VARIANT.jsonl
    echo "$MODEL_NAME, method $METHOD${TOKENS:+, $TOKENS tokens}: $QUESTIONS -> $ANSWERS"
    # shellcheck disable=SC2086 # EXTRA holds several words
    run_in_processes "${PROGRAM[@]}" --model-path "$MODEL" \
        --question-file "$QUESTIONS" --image-folder "$IMAGES" --temperature 0 \
        --conv-mode "${CONV_MODE:-auto}" --batch-size "${BATCH_SIZE:-8}" \
        "${OPTIONS[@]}" ${EXTRA:-}
}

# Runs a module once, or in several processes that share the questions.
run_in_processes() {
    local gpus=() count
    if [ -n "${LAUNCHER:-}" ]; then
        # shellcheck disable=SC2086 # LAUNCHER holds several words
        $LAUNCHER "$PYTHON" -m "$@" --answers-file "$ANSWERS"
        return
    fi
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
    count=${NPROC:-${#gpus[@]}}
    if [[ ! $count =~ ^[0-9]+$ ]]; then
        echo "error: NPROC=$count is not a number of processes" >&2
        exit 1
    fi
    if [ "$count" -le 1 ]; then
        "$PYTHON" -m "$@" --answers-file "$ANSWERS"
        return
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # --multi_gpu stands for one process each, on CPUs as well; port 0 is any free one.
    # shellcheck disable=SC2086 # LAUNCH holds several words
    "$PYTHON" -m llava.eval.answering.launch --multi_gpu --num_processes "$count" \
        --mixed_precision no --dynamo_backend no \
        ${LAUNCH:---num_machines 1 --main_process_port 0} --module "$@" --answers-file "$ANSWERS"
}

# score BENCHMARK: prints the benchmark's report and, as the last line, the score as JSON. Of several
# machines the first one does.
score() {
    if [[ "${LAUNCH:-} " =~ --machine[_-]rank[=\ ]+([0-9]+)\  ]] && [ "${BASH_REMATCH[1]}" != 0 ]; then
        echo "$1: scored on the machine of rank 0"
        return
    fi
    "$PYTHON" -m llava.eval.score "$1" --data-dir "$SOURCE" --question-file "$QUESTIONS" \
        --answers-file "$ANSWERS" ${LIMIT:+--limit "$LIMIT"}
    SCORES+=("${ANSWERS%.jsonl}.score.json")
    # all.sh makes a table of them
    [ -z "${SCORE_LIST:-}" ] || echo "${ANSWERS%.jsonl}.score.json" >>"$SCORE_LIST"
}

# list_benchmarks [options]: names there is data for.
list_benchmarks() {
    "$PYTHON" -m llava.eval.benchmarks.data_files list ${DATA_DIR:+--data-dir "$DATA_DIR"} "$@"
}

# run_all ARGUMENTS: runs every benchmark there is data for; a table of all scores. One that fails
# does not stop the others; Ctrl-C does.
run_all() {
    local name names status failed=()
    names=$(list_benchmarks) || return 1
    if [ -z "$names" ]; then
        echo "error: there is no data of any benchmark in ${DATA_DIR:-$DEFAULT_DATA}" >&2
        return 1
    fi
    SCORE_LIST=$(mktemp)
    export SCORE_LIST WORDS_READ=${words:-}
    while read -r name <&3; do
        echo "=== $name"
        SPLIT='' bash scripts/v1_5/eval/benchmark.sh "$name" "$@" && continue
        status=$?
        failed+=("$name")
        case $status in
        130 | 143) # SIGINT, SIGTERM
            rm "$SCORE_LIST"
            exit $status
            ;;
        esac
    done 3<<<"$names"
    [ ! -s "$SCORE_LIST" ] || "$PYTHON" -m llava.eval.score_table --list "$SCORE_LIST"
    rm "$SCORE_LIST"
    [ ${#failed[@]} = 0 ] || { printf 'error: %s failed\n' "${failed[@]}" >&2 && return 1; }
}
