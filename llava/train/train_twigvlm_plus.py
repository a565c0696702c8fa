"""Trains a twig with a pruning head (TwigVLM++) on a finished LLaVA model, which stays as it is.

    python -m llava.train.train_twigvlm_plus --stage 1 --model_name_or_path CHECKPOINT \
        --version v1 --data_path data.json --image_folder images --twig_K 2 --twig_T 3 \
        --output_dir STAGE1 ...
    python -m llava.train.train_twigvlm_plus --stage 2 --model_name_or_path CHECKPOINT \
        --version v1 --data_path data.json --image_folder images --twig_path STAGE1 \
        --num_samples 64000 --output_dir STAGE2 ...

Stage 1, distillation: the twig learns to say the answers as the whole model does, the pruning head
to look where it looks. Stage 2, reinforcement: selections of visual tokens are drawn and the model
says the answer on each; only the two gates of the pruning head learn. Takes the flags of
`llava.train.train`; several processes, precision and resuming work as there. The output of either
is a whole twig in the published layout, with a config.json. Paper:
https://arxiv.org/abs/2503.14075v3
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import transformers

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.pruning.learned import read_part_config
from llava.pruning.twig_files import holds_pruning_head
from llava.pruning.twigvlm import TWIG_LAYERS, TwigVLM, load_twig
from llava.pruning.twigvlm_plus import TwigVLMPlus
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, filled
from llava.train.processes import leave_group
from llava.train.run import FlagParser, given_flags, run
from llava.train.train_twigvlm import Trunk, load_trunk
from llava.train.twig_plus.distillation import Distillation, TwigDistillation, attention_layer
from llava.train.twig_plus.policy import Cuts, HeadReinforcement, Reinforcement
from llava.train.twig_plus.trainers import DistillationTrainer, ReinforcementTrainer
from llava.weight_files import local_folder

logger = logging.getLogger(__name__)

#: flags that one stage alone has
STAGE_FLAGS = {
    1: ("twig_T", "alpha", "gamma", "temperature", "clip"),
    2: ("num_samples", "num_groups", "beta_max", "power", "kl", "kl_squared"),
}


def shown(text: str, default=None) -> object:
    return field(default=default, metadata={"help": text})


@dataclass
class TwigPlusArguments:
    """What is trained; the weights of the losses as in the published scripts."""

    stage: int = shown("1: distillation, 2: reinforcement", 1)
    twig_K: int | None = shown(
        "decoder layers that the twig grows from; default: 2 of 32, in stage 2 what the twig says"
    )
    final_wipe_layer: int | None = shown(
        "all visual tokens go before it; default: 24 of 32, in stage 2 what the twig says"
    )
    attention_layer: int | None = shown(
        "the model's layer, from 0, whose attention the pruning head learns; default: 19 of 32, "
        "below final_wipe_layer, in stage 2 what the twig says"
    )
    twig_path: str | None = shown(
        "stage 2: folder of the twig of stage 1; stage 1: a twig of TwigVLM to begin with, in "
        "place of copies of the decoder's layers"
    )
    twig_T: int | None = shown("stage 1: layers of the twig; default: 3, or those of twig_path")
    alpha: float = shown("stage 1: weight of the model's probabilities", 0.1)
    gamma: float = shown("stage 1: weight of the model's attention", 1.0)
    temperature: float = shown("stage 1: of both probabilities", 5.0)
    clip: float = shown("stage 1: divergence above which a token's gradient is held back", 4.0)
    num_samples: int | None = shown(
        "stage 2: samples that are learned from; default, and with --max_steps: what that or "
        "epochs say"
    )
    num_groups: int = shown("stage 2: selections that are compared for a sample", 32)
    beta_max: float = shown("stage 2: how rare large budgets are in the end", 8.0)
    power: float = shown("stage 2: of the training's progress in that", 2.0)
    kl: float = shown("stage 2: weight of the model's attention; 0 as in the paper", 1.0)
    kl_squared: bool = shown("stage 2: its factor from 1 to 2 counts twice, as released", True)
    skip_samples: list[int] = field(
        default_factory=list, metadata={"help": "places in the data of samples to leave out"}
    )

    def check(self, given: set[str]) -> None:
        """Raises ValueError for an unknown stage and for flags of the other one; given: names of
        the flags on the command line."""
        if self.stage not in STAGE_FLAGS:
            raise ValueError(f"--stage {self.stage} is unknown: 1 distils, 2 reinforces")
        other = 3 - self.stage
        if foreign := sorted(given.intersection(STAGE_FLAGS[other])):
            raise ValueError(f"--{foreign[0]} belongs to --stage {other}, this is {self.stage}")
        if self.stage == 2 and self.twig_path is None:
            raise ValueError("--twig_path is missing: stage 2 goes on with the twig of stage 1")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"--num_samples ({self.num_samples}) must be at least 1")

    def settings(self, kind: type, layer: int):
        """The `Distillation` or `Reinforcement` of these flags."""
        return filled(kind, self, attention_layer=layer)


CLASSES = (TwigPlusArguments, ModelArguments, DataArguments, TrainingArguments)


def train(
    args: Sequence[str] | None = None,
    attn_implementation: str | None = None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> DistillationTrainer | ReinforcementTrainer:
    """Runs a whole stage and returns its Trainer (its twig is `.model.twig`).

    args: command-line words, default those of this process; the others as in `llava.train.train`
    """
    return run(lambda words: prepare(words, attn_implementation, callbacks), args)


def prepare(words: Sequence[str], attn_implementation: str | None = None, callbacks=()):
    """Everything up to the first step."""
    twig_args, model_args, data_args, training_args = FlagParser(CLASSES).parse(words)
    given = given_flags(words)
    twig_args.check(given)
    trunk = load_trunk(model_args, data_args, training_args, given, attn_implementation)
    shared = {"args": training_args, "tokenizer": trunk.tokenizer, "callbacks": list(callbacks)}
    shared |= trunk.data(data_args, twig_args.skip_samples)
    prepare_stage = {1: prepare_distillation, 2: prepare_reinforcement}[twig_args.stage]
    trainer = prepare_stage(twig_args, trunk, training_args, shared)
    trainer.base_model = model_args.model_name_or_path
    return trainer


def prepare_distillation(
    twig_args: TwigPlusArguments, trunk: Trunk, training_args, shared: dict
) -> DistillationTrainer:
    """Stage 1."""
    depth, own = trunk.model.config.num_hidden_layers, twig_args
    options = {"twig_K": own.twig_K, "final_wipe_layer": own.final_wipe_layer}
    method, start = TwigVLMPlus(**options), None
    count = TWIG_LAYERS if own.twig_T is None else own.twig_T
    if own.twig_path is not None:
        folder = local_folder(own.twig_path)
        owner = TwigVLMPlus if holds_pruning_head(folder) else TwigVLM
        method = owner(twig=folder, **options)
        start = load_twig(folder, trunk.model, own.twig_T, kind=owner.twig_class)
        count = len(start.layers)
    method.check_depth(depth)
    layer = own.attention_layer
    layer = attention_layer(depth, method.wipe_layer(depth)) if layer is None else layer
    weights = own.settings(Distillation, layer)
    training = TwigDistillation(trunk.model, method.shared_layers(depth), count, weights)
    if start is not None:  # gates that it lacks stay fresh
        training.twig.load_state_dict(start.state_dict(), strict=False)
    if not training_args.deepspeed:  # which keeps float32 copies itself
        training.twig.float()
    trainer = DistillationTrainer(model=training, **shared)
    trainer.final_wipe_layer = method.wipe_layer(depth)
    return trainer


def prepare_reinforcement(
    twig_args: TwigPlusArguments, trunk: Trunk, training_args, shared: dict
) -> ReinforcementTrainer:
    """Stage 2."""
    depth, own = trunk.model.config.num_hidden_layers, twig_args
    method = TwigVLMPlus(
        twig=own.twig_path, twig_K=own.twig_K, final_wipe_layer=own.final_wipe_layer
    )
    (folder,) = method.part_folders("")
    if os.path.realpath(folder) == os.path.realpath(training_args.output_dir):
        raise ValueError(f"--output_dir {folder} is that of stage 1, which is still needed")
    method.attach(trunk.model)
    method.check_depth(depth)
    known = read_part_config(folder, method.name).get("attention_layer")
    wipe = method.wipe_layer(depth)
    layers = (own.attention_layer, known, attention_layer(depth, wipe))
    layer = next(layer for layer in layers if layer is not None)
    cuts = Cuts(method.shared_layers(depth), wipe)
    settings = own.settings(Reinforcement, layer)
    training = HeadReinforcement(trunk.model, method.module, cuts, settings)
    if not training_args.deepspeed:
        training.head.float()
    keep_questions_about_images(shared["train_dataset"])
    if own.num_samples is not None and training_args.max_steps <= 0:
        at_once = training_args.train_batch_size * training_args.world_size
        at_once *= training_args.gradient_accumulation_steps
        training_args.max_steps = -(-own.num_samples // at_once)
    trainer = ReinforcementTrainer(model=training, **shared)
    trainer.twig_path = folder
    return trainer


def keep_questions_about_images(dataset) -> None:
    """Leaves out of the data what no selection can be judged by: samples without an image, those
    that show one behind their first answer, and those whose answers are all cut away by
    model_max_length. Raises ValueError when nothing is left."""

    def fits(sample: dict) -> bool:
        messages = sample["conversations"]  # an answer in front, or a system turn, is none of them
        answer = next(i for i, m in enumerate(messages) if i and m["from"] == "gpt")
        late = any(DEFAULT_IMAGE_TOKEN in message["value"] for message in messages[answer:])
        return "image" in sample and not late and dataset.keeps_an_answer(sample)

    kept = [place for place, sample in enumerate(dataset.samples) if fits(sample)]
    if not kept:
        raise ValueError(
            f"{dataset.data_path}: stage 2 needs samples with an image, and an answer within "
            "model_max_length: there is none"
        )
    if lost := len(dataset.samples) - len(kept):
        logger.warning(
            "%d samples without an image in their first question, or without an answer within "
            "model_max_length, are left out",
            lost,
        )
    dataset.samples = [dataset.samples[place] for place in kept]
    dataset.numbers = [dataset.numbers[place] for place in kept]


if __name__ == "__main__":
    train()
    leave_group()
