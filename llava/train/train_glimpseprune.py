"""Trains the glimpse of GlimpsePrune on questions with boxes; the model itself stays as it is.

    python -m llava.train.train_glimpseprune --model_name_or_path liuhaotian/llava-v1.5-7b \
        --train_dataset gqa_cot_train.jsonl --img_dir datas --bf16 True --output_dir OUT
    python -m llava.train.train_glimpseprune --config recipe.yaml --output_dir OUT

Models of both families, LLaVA-1.5 and Qwen2.5-VL. Keys of the yaml file are the flags; flags on the
command line win, `env:` sets environment variables. Several processes: `accelerate launch -m
llava.train.train_glimpseprune ...`. A run whose output folder holds `checkpoint-*` continues from
the newest. See docs/Training.md.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

import torch
import transformers

from llava.config_file import read_json
from llava.conv_mode import CONFIG_KEY, announce, checkpoint_conv_mode
from llava.front_end import FrontEnd
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.pruning.glimpseprune import DEFAULTS, WEIGHTS_FILES, GlimpsePrune
from llava.pruning.glimpseprune_modules import Glimpse, GlimpseConfig
from llava.pruning.learned import CONFIG_FILE, METHOD_KEY, read_part, save_part
from llava.train.processes import leave_group

from .glimpse.arguments import (
    BoxArguments,
    GlimpseArguments,
    GlimpseTrainingArguments,
    with_config,
)
from .glimpse.batches import (
    BoxCollator,
    BoxDataset,
    LengthLimits,
    ModelFacts,
    check_frame,
)
from .glimpse.data import BoxSample, read_datasets
from .glimpse.loss import GlimpseObjective
from .glimpse.saving import save_released
from .llava_trainer import LLaVATrainer
from .run import FlagParser, check_trainer_flags, run
from .saving import gathered
from .zero import join_processes, kept_whole, refuse_fsdp, register_parameter

logger = logging.getLogger(__name__)


def train(args: Sequence[str] | None = None) -> GlimpseTrainer:
    """Runs a whole training and returns its Trainer.

    args: command-line words, default those of this process
    """
    return run(prepare, args)


def prepare(words: Sequence[str]) -> GlimpseTrainer:
    """Everything up to the first step."""
    classes = (GlimpseArguments, BoxArguments, GlimpseTrainingArguments)
    model_args, box_args, training_args = FlagParser(classes).parse(with_config(words))
    training_args.refuse_other_recipes()
    if box_args.train_dataset is None:
        raise ValueError("--train_dataset is missing: a yaml file, or a Visual-CoT .jsonl or .json")
    if training_args.fsdp:
        refuse_fsdp("a glimpse")
    check_trainer_flags(training_args, has_eval_data=box_args.eval_dataset is not None)
    check_frame(box_args.box_frame)
    samples = box_samples(box_args.train_dataset, box_args)
    eval_samples = box_args.eval_dataset and box_samples(box_args.eval_dataset, box_args)
    transformers.set_seed(training_args.seed)
    join_processes(training_args)
    front = load_frozen(model_args, box_args, training_args)
    model = front.model
    model.pruner = fresh_method(model, model_args)
    front.model = ModelFacts.of(model)
    settings = {**DEFAULTS, **model.pruner.saved, **model_args.pruning}
    saved = {CONFIG_KEY: front.conv_mode, **settings}
    if model_args.adapter_dir is not None:  # what was trained fits the merged model alone
        saved["adapter_dir"] = os.path.basename(os.path.realpath(model_args.adapter_dir))
    return GlimpseTrainer(
        model=GlimpseObjective(model, training_args.loss_weights),
        base_model=model_args.model_name_or_path,
        saved_values=saved,
        tokenizer=front.tokenizer,
        args=training_args,
        train_dataset=box_dataset(samples, front, box_args),
        eval_dataset=eval_samples and box_dataset(eval_samples, front, box_args),
        data_collator=BoxCollator(front.pad_id),
    )


def load_frozen(
    model_args: GlimpseArguments, box_args: BoxArguments, training_args: GlimpseTrainingArguments
) -> FrontEnd:
    """The model that is to be pruned, with what stands in front of it."""
    path, adapter = model_args.model_name_or_path, model_args.adapter_dir
    name = get_model_name_from_path(path)
    own = (adapter, path) if adapter else (path, None)  # an adapter says what it was trained in
    version = checkpoint_conv_mode(*own, model_name=name, given=box_args.version)
    announce(version)
    with kept_whole(training_args):  # DeepSpeed splits it later, with all that is trained
        tokenizer, model, processor, _ = load_pretrained_model(
            adapter or path,
            path if adapter else None,
            name,
            device_map=None,
            device=training_args.device,
            torch_dtype=model_args.torch_dtype or training_args.compute_dtype,
            attn_implementation=model_args.attn_implementation,
        )
    if model.image_settings.image_aspect_ratio == "anyres":
        raise ValueError(
            f"{path} cuts images into tiles (image_aspect_ratio anyres), but a glimpse is trained "
            "on images of one crop: take a LLaVA-1.5 or Qwen2.5-VL model"
        )
    if training_args.gradient_checkpointing:
        logger.info("gradient_checkpointing: nothing to save, prompts run without gradients")
        training_args.gradient_checkpointing = False
    if box_args.max_pixels is not None:
        if model.get_vision_tower().grid is None:
            processor.max_pixels = box_args.max_pixels
            processor.process_images([])  # bounds that leave no size are an error
        else:
            logger.warning("max_pixels: all images of %s have one size, it changes nothing", path)
    return FrontEnd(tokenizer, model, processor, version.name)


def box_samples(source: str, box_args: BoxArguments) -> list[BoxSample]:
    """The samples of a file."""
    return read_datasets(source, box_args.img_dir, box_args.sampling_seed)


def box_dataset(samples: list[BoxSample], front: FrontEnd, box_args: BoxArguments) -> BoxDataset:
    """Those of the samples that are within the limits."""
    dataset = BoxDataset(samples, front, box_args.box_frame)
    limits = LengthLimits(box_args.max_input_seq_length, box_args.max_input_remain_seq_length)
    dataset.keep_within(limits)
    return dataset


def fresh_method(model, model_args: GlimpseArguments) -> GlimpsePrune:
    """GlimpsePrune for `model` with new weights in fp32, or those of `load_new_modules`."""
    if model_args.load_new_modules is not None:
        pruner = GlimpsePrune(new_modules=model_args.load_new_modules)
        pruner.module = pruner.load(model).float()
        check_shape(pruner.module.config, model_args)
        return pruner
    shape = model_args.shape
    if "selected_layers" in shape:
        shape.setdefault("reduce_layer", max(shape["selected_layers"]))
    pruner = GlimpsePrune()
    pruner.module = Glimpse(GlimpseConfig.for_model(model, **shape))
    pruner.module.initialize()
    pruner.module.to(model.device)
    return pruner


def check_shape(config: GlimpseConfig, model_args: GlimpseArguments) -> None:
    """Raises ValueError for flags that ask for another shape than the trained part has."""
    fields = GlimpseArguments.__dataclass_fields__
    for name, value in model_args.shape.items():
        own = getattr(config, name, value)
        own = tuple(own) if isinstance(own, list) else own
        if value not in (fields[name].default, own):
            raise ValueError(
                f"{name} {value} does not fit the trained part in {model_args.load_new_modules}, "
                f"where it is {own}: leave the flag out"
            )


class GlimpseTrainer(LLaVATrainer):
    """Trains and saves the pruning method's part alone; logs its losses and what it finds of boxes.

    model: a `GlimpseObjective`; base_model: name or folder of its frozen model; saved_values: what
    else goes into config.json
    """

    full_batches = True

    def __init__(self, *args, base_model: str, saved_values: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.base_model, self.saved_values = base_model, saved_values
        if self.is_deepspeed_enabled and self.part.config.has_glimpse:
            register_parameter(self.model, self.part.learnable_embeddings)
        self._sums: dict[bool, dict[str, torch.Tensor]] = {
            True: {},
            False: {},
        }  # in training, or not

    @property
    def hidden_size(self) -> int:
        return self.model.llava.config.hidden_size

    @property
    def part(self) -> Glimpse:
        """What is trained."""
        return self.accelerator.unwrap_model(self.model).glimpse

    def run_settings(self) -> dict:
        return self.part.config.values()

    def compute_loss(self, model, inputs, return_outputs: bool = False):
        out = model(**inputs)
        self._note(out, len(inputs["masks"]), self._sums[model.training])
        return (out["loss"], out) if return_outputs else out["loss"]

    def _note(self, out, samples: int, sums: dict[str, torch.Tensor]) -> None:
        """Adds what a batch of so many samples gave to `sums`: counts of tokens, and the rest,
        which are means, for every sample; nothing where there is none."""
        for name, value in out.items():
            if name != "loss":
                value = value.float() * (min(samples, 1) if name == "hits" else samples)
                sums[name] = sums.get(name, 0) + value
        sums["samples"] = sums.get("samples", 0) + out["loss"].new_tensor(samples).float()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone: what else there is goes into the log, for every sample once, although
        several processes get some of them twice, where a last batch lacks samples."""
        inputs = self._prepare_inputs(inputs)
        own = self._own_samples(len(inputs["masks"]))
        if own:
            inputs = {name: values[:own] for name, values in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**inputs)
        self._note(out, own, self._sums[False])
        return out["loss"].detach().mean(), None, None

    def _own_samples(self, count: int) -> int:
        """How many of the `count` samples of a batch that is evaluated are not there to fill it."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return count
        return min(max(state.remainder - self.args.process_index * count, 0), count)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As of every Trainer; what is logged beside the loss can say which checkpoint is best."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in self._logged(in_training=False).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def log(self, logs: dict[str, float]) -> None:
        if "loss" in logs:
            logs = {**logs, **self._logged(in_training=True)}
        super().log(logs)

    def _logged(self, in_training: bool) -> dict[str, float]:
        """What was summed up since the last time, over all processes: means of the losses, and
        shares of the boxes."""
        sums, self._sums[in_training] = self._sums[in_training], {}
        if not sums:
            return {}
        sums = {name: self.accelerator.reduce(value, "sum") for name, value in sums.items()}
        logs, samples = found_boxes(sums.pop("hits").tolist()), sums.pop("samples")
        for name, total in sums.items():
            mean = (total / samples).flatten().tolist()
            names = [name] if len(mean) == 1 else [f"{name}_{i}" for i in range(len(mean))]
            logs |= {key: round(value, 4) for key, value in zip(names, mean, strict=True)}
        return logs

    # --- checkpoints --------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained part: in fp32 during training, at the end in the computing type and
        the layout that is asked for. Called by every process."""
        weights = {name: gathered(p) for name, p in self.part.named_parameters()}
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        dtype = torch.float32 if _internal_call else self.args.compute_dtype
        weights = {name: value.to(dtype) for name, value in weights.items()}
        released = self.args.save_layout == "released" and not _internal_call
        save = save_released if released else save_part
        values = self.saved_values | self.part.config.values()
        remove_result(folder)
        save(folder, GlimpsePrune.name, weights, self.base_model, **values)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        _, weights = read_part(resume_from_checkpoint)
        self.part.load_state_dict(weights)


def remove_result(folder: str) -> None:
    """Takes the weights of an earlier run, of any layout, from the folder of a result: those of
    another layout would stay beside it, and may be what is read. Files that are no trained part of
    ours, as far as the config tells, stay."""
    try:
        owner = read_json(os.path.join(folder, CONFIG_FILE)).get(METHOD_KEY)
    except (OSError, ValueError):  # there is none, or it is damaged
        return
    if owner != GlimpsePrune.name:
        return
    for path in (os.path.join(folder, name) for name in WEIGHTS_FILES):
        if os.path.isfile(path):
            os.remove(path)


def found_boxes(hits: Sequence[float]) -> dict[str, float]:
    """Precision, recall, F1 and IoU of tokens from true positives, false positives, misses."""
    right, wrong, missed = hits
    shares = {
        "precision": (right, right + wrong),
        "recall": (right, right + missed),
        "f1": (2 * right, 2 * right + wrong + missed),
        "iou": (right, right + wrong + missed),
    }
    return {
        name: round(part / all_, 4) if all_ else math.nan for name, (part, all_) in shares.items()
    }


if __name__ == "__main__":
    train()
    leave_group()
