# Sourced by the recipes in scripts/v1_5 and scripts/qwen2_5_vl, from the root of the repository.
#
# PYTHON=/path/to/python in the environment, else an activated environment, else .venv, else python3, runs
# everything, deepspeed and accelerate as well; LAUNCHER="PROGRAM WORD ..." puts another launcher in front.
#
# BF16=True or False in the environment chooses the precision, PROGRAM=train_mem.py or train.py attention with
# or without the package flash-attn. Left out, they follow the device at hand: bfloat16 where it is fast (GPUs,
# and CPUs with instructions for it), flash-attn on a GPU if it is installed. So does TF32=True or False.
#
# Files and folders in the environment are meant as seen from where the recipe was called, those in flags behind it as
# seen from the root of the repository.
source scripts/env.sh
choose_python
if [ "$OLDPWD" != "$PWD" ]; then
    # What is not there is a name on the hub, or in the root; what is written need not be there yet.
    for name in MODEL VISION_TOWER PROJECTOR TWIG ADAPTER DATA DATA_2 IMAGES CONFIG CONFIG_2 ZERO OUTPUT; do
        path=${!name:-}
        [[ -z $path || $path == /* ]] || [[ $name != OUTPUT && ! -e $OLDPWD/$path ]] ||
            printf -v "$name" %s "$OLDPWD/$path"
    done
fi
[[ $PYTHON != */* ]] || PATH=$(dirname "$PYTHON"):$PATH # for what LAUNCHER names
# A program that is started by its path sees its own folder, not this one.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# start "MODULE OPTION ..." PROGRAM FLAGS: runs the program by LAUNCHER from the environment, or else by a module of
# PYTHON; with "" the program is itself the name of a module.
start() {
    local launch
    if [ -n "${LAUNCHER:-}" ]; then
        read -ra launch <<<"$LAUNCHER"
    else
        # shellcheck disable=SC2206 # several words
        launch=("$PYTHON" -m $1)
        if [ -n "$1" ] && ! "$PYTHON" -c "import importlib.util as u; assert u.find_spec('${1%%.*}')" 2>/dev/null; then
            echo "error: $PYTHON lacks ${1%%.*}: $PYTHON -m pip install -e '.[train,deepspeed]', or name another" \
                "launcher, such as LAUNCHER=\"torchrun --nproc_per_node 8\" with --deepspeed \"\" behind the recipe" >&2
            exit 1
        fi
    fi
    shift
    "${launch[@]}" "$@"
}

if [ -z "${BF16:-}" ] || [ -z "${PROGRAM:-}" ] || [ -z "${TF32:-}" ]; then
    answer=$("$PYTHON" -c "
import importlib.util, torch
from llava.model.placement import choose_device, fast_dtype
device = choose_device(None)
flash = device.type == 'cuda' and importlib.util.find_spec('flash_attn')
tf32 = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
print(fast_dtype(device) == torch.bfloat16, 'train_mem.py' if flash else 'train.py', tf32)") || {
        echo "error: $PYTHON cannot ask for the device; set PYTHON=/path/to/python, or BF16, TF32 and PROGRAM" >&2
        exit 1
    }
    read -r fast_bf16 fast_program fast_tf32 <<<"$answer"
    BF16=${BF16:-$fast_bf16}
    PROGRAM=${PROGRAM:-$fast_program}
    TF32=${TF32:-$fast_tf32}
    echo "This device: bf16 $BF16, tf32 $TF32, $PROGRAM (BF16, TF32 and PROGRAM choose otherwise)" >&2
fi

# What all of them hand to the Trainer ...
TRAINER_FLAGS=(
    --bf16 "$BF16"
    --num_train_epochs 1
    --evaluation_strategy no
    --save_strategy steps
    --save_total_limit 1
    --weight_decay 0.
    --warmup_ratio 0.03
    --lr_scheduler_type cosine
    --logging_steps 1
    --tf32 "$TF32"
    --model_max_length 2048
    --dataloader_num_workers 4
    --lazy_preprocess True
    --report_to "${REPORT_TO:-wandb}"
)

# ... what the two stages of LLaVA-1.5 have in common besides ...
LLAVA_FLAGS=(
    --model_name_or_path "${MODEL:-lmsys/vicuna-13b-v1.5}"
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
    --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2
    --mm_use_im_start_end False
    --mm_use_im_patch_token False
    --gradient_accumulation_steps 1
    --gradient_checkpointing True
    --per_device_eval_batch_size 4
    "${TRAINER_FLAGS[@]}"
)

# ... and the recipes of Qwen2.5-VL: an image has at most 1280 tokens, which are 28 x 28 pixels each.
QWEN_FLAGS=(
    --model_name_or_path "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}"
    --data_path "${DATA:-./playground/data/llava_v1_5_mix665k.json}"
    --image_folder "${IMAGES:-./playground/data}"
    --group_by_modality_length True
    --per_device_train_batch_size 4
    --gradient_accumulation_steps 4
    --gradient_checkpointing True
    "${TRAINER_FLAGS[@]}"
    --max_pixels $((1280 * 28 * 28))
    --model_max_length 4096
)
