"""GlimpsePrune+, stage 1: a model learns to answer from pruned images, by reinforcement.

    python -m llava.train.train_glimpseprune_plus --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct \
        --train_dataset scripts/qwen2_5_vl/viscot_rand.yaml --img_dir datas --bf16 True \
        --per_device_train_batch_size 4 --output_dir ADAPTER
    accelerate launch --num_processes 4 -m llava.train.train_glimpseprune_plus --config recipe.yaml

A LoRA adapter on the decoder is trained; stage 2 trains a glimpse for the model with that adapter:
`llava.train.train_glimpseprune --adapter_dir ADAPTER`. Several answers are drawn to each question
from a prompt that keeps the visual tokens in its boxes, scored (by a judge behind --judge_url, or
by rules), and compared with one another. Flags and yaml files as in
`llava.train.train_glimpseprune`. A run whose output folder holds `checkpoint-*` continues from the
newest. See docs/Training.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import transformers

from llava.conv_mode import CONFIG_KEY
from llava.judge import Judge
from llava.pruning import build_pruner
from llava.pruning.glimpseprune_modules import GlimpseConfig

from .glimpse.arguments import BoxArguments, with_config
from .glimpse.batches import LengthLimits, ModelFacts, check_frame
from .glimpse.data import BoxSample
from .processes import leave_group
from .reinforcement.adapter import with_adapter
from .reinforcement.arguments import PolicyModelArguments, PolicyTrainingArguments
from .reinforcement.data import QuestionCollator, QuestionDataset, check_rewards, needs_judge
from .reinforcement.objective import PolicyObjective
from .reinforcement.rewards import Scorer, check_judge, training_judge
from .reinforcement.sampling import AnswerSampler
from .reinforcement.trainer import PolicyTrainer
from .run import FlagParser, check_trainer_flags, run
from .train_glimpseprune import box_samples, load_frozen

CLASSES = (PolicyModelArguments, BoxArguments, PolicyTrainingArguments)


def train(args: Sequence[str] | None = None) -> PolicyTrainer:
    """Runs a whole training and returns its Trainer.

    args: command-line words, default those of this process
    """
    return run(prepare, args)


def prepare(words: Sequence[str]) -> PolicyTrainer:
    """Everything up to the first step; the judge is tried before the model is loaded."""
    model_args, box_args, args = FlagParser(CLASSES).parse(with_config(words))
    args.check()
    if box_args.train_dataset is None:
        raise ValueError("--train_dataset is missing: a yaml file with `datasets:`")
    if box_args.eval_dataset is not None:
        raise ValueError("eval_dataset cannot be set: the log shows the reward of every step")
    if args.token_pass == "exact" and model_args.attn_implementation == "flash_attention_2":
        raise ValueError(
            "token_pass exact hides tokens from parts of a sequence, which flash_attention_2 "
            "cannot: choose attn_implementation sdpa, or token_pass released"
        )
    transformers.set_seed(args.seed)
    check_trainer_flags(args)
    check_frame(box_args.box_frame)
    samples = box_samples(box_args.train_dataset, box_args)
    check_rewards(samples, box_args.train_dataset)
    judge = make_judge(args) if needs_judge(samples) else None
    front = load_policy(model_args, box_args, args)
    policy, glimpse = front.model, None
    if model_args.load_new_modules is not None:
        glimpse = build_pruner("glimpseprune", new_modules=model_args.load_new_modules)
        policy.pruner = glimpse
    layer = reduce_layer(policy, model_args, glimpse)
    own = replace(front, model=ModelFacts.of(policy))
    dataset = QuestionDataset(samples, own, box_args.box_frame, model_args.use_ref_masks)
    limits = LengthLimits(box_args.max_input_seq_length, box_args.max_input_remain_seq_length)
    dataset.keep_within(limits)
    check_masks(dataset.samples, dataset, model_args)
    answers = AnswerSampler(front, layer, args.max_completion_length, glimpse, args.temperature)
    adapted = with_adapter(
        policy, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return PolicyTrainer(
        model=PolicyObjective(adapted, answers.stage, args.policy_weights),
        tokenizer=front.tokenizer,
        args=args,
        train_dataset=dataset,
        data_collator=QuestionCollator(),
        answers=answers,
        scorer=Scorer(judge),
        glimpse_share=model_args.gen_mask_usage_ratio,
    )


def make_judge(args: PolicyTrainingArguments) -> Judge:
    """The judge of the flags, which has answered once."""
    judge = training_judge(
        args.judge_model, args.judge_url, timeout=args.judge_timeout, workers=args.judge_workers
    )
    if args.process_index == 0:
        check_judge(judge)
    return judge


def load_policy(model_args, box_args, args):
    """The model and what stands in front of it, as `load_frozen`; here gradients do flow through
    its layers."""
    checkpointing, args.gradient_checkpointing = args.gradient_checkpointing, False
    front = load_frozen(model_args, box_args, args)
    args.gradient_checkpointing = checkpointing
    setattr(front.model.config, CONFIG_KEY, front.conv_mode)  # for whoever loads the adapter
    return front


def reduce_layer(model, model_args: PolicyModelArguments, glimpse) -> int:
    """The last decoder layer that sees all visual tokens: the flag's, the glimpse's, or the
    paper's."""
    layer, depth = model_args.reduce_layer, model.config.num_hidden_layers
    if layer is None and glimpse is not None:
        layer = glimpse.last_dense_layer(depth)  # a part may name one behind the last
    elif layer is None:
        layer = GlimpseConfig.for_model(model).reduce_layer
    if not -1 <= layer < depth:
        raise ValueError(
            f"reduce_layer {layer} must be one of the {depth} decoder layers, or -1: none of them "
            "sees all visual tokens"
        )
    return layer


def check_masks(
    samples: list[BoxSample], dataset: QuestionDataset, model_args: PolicyModelArguments
) -> None:
    """Raises ValueError where a glimpse is needed and none is given."""
    bare = sum(not dataset.masked(sample) for sample in samples)
    if model_args.load_new_modules is None and (bare or model_args.gen_mask_usage_ratio):
        raise ValueError(
            f"{bare} of {len(samples)} questions are not pruned to boxes (use_ref_masks "
            f"{model_args.use_ref_masks}, gen_mask_usage_ratio {model_args.gen_mask_usage_ratio}): "
            "give a trained glimpse with --load_new_modules"
        )


if __name__ == "__main__":
    train()
    leave_group()
