"""Trains a twig (TwigVLM) on a finished LLaVA model, which stays as it is.

    python -m llava.train.train_twigvlm --model_name_or_path CHECKPOINT --version v1 \
        --data_path data.json --image_folder images --twig_K 2 --twig_T 3 --output_dir OUT ...

Takes the flags of `llava.train.train`. The twig starts as a copy of decoder layers K to K + T - 1,
the final norm and the head, and learns to say the answers of the data from what layer K - 1 gives,
all visual tokens in place. Several processes, precision and resuming work as there. The output is
the twig in the published layout, with a config.json. Paper: https://arxiv.org/abs/2503.14075
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from llava.checkpoint_kind import is_llava
from llava.constants import IGNORE_INDEX
from llava.conv_mode import CONFIG_KEY
from llava.conversation import Conversation
from llava.model.prompt import Prompt
from llava.pruning.prefill import Prefill
from llava.pruning.twig_files import read_twig
from llava.pruning.twigvlm import Twig, TwigVLM, grow_twig, save_twig
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.data import check_data_path, make_supervised_data_module
from llava.train.llava_trainer import LLaVATrainer
from llava.train.model_setup import choose_family
from llava.train.processes import leave_group
from llava.train.run import FlagParser, check_trainer_flags, given_flags, run
from llava.train.saving import gathered
from llava.train.zero import join_processes, kept_whole, refuse_fsdp


@dataclass
class TwigArguments:
    """What is trained."""

    twig_K: int = field(default=2, metadata={"help": "decoder layers that the twig grows from"})
    twig_T: int = field(default=3, metadata={"help": "layers of the twig"})
    skip_samples: list[int] = field(
        default_factory=list, metadata={"help": "places in the data of samples to leave out"}
    )


class TwigTraining(nn.Module):
    """A twig, which is all that is trained, saved and shared between processes, on a frozen trunk.

    Takes the batches of `llava.train.data` and returns {"loss": mean cross-entropy of the next
    token over supervised tokens}.
    """

    #: what grows
    kind: type[Twig] = Twig

    def __init__(self, model: nn.Module, shared_layers: int, count: int):
        """model: a LLaVA model, which is frozen; the rest as in `grow_twig`"""
        super().__init__()
        # named as the optimizer knows decoders
        self.model = grow_twig(model, shared_layers, count, self.kind)
        self.shared_layers = shared_layers
        model.requires_grad_(False).eval()
        self._trunk = [model]  # a list hides it from optimizers, checkpoints and other processes

    @property
    def twig(self) -> Twig:
        return self.model

    @property
    def trunk(self) -> nn.Module:
        return self._trunk[0]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list | None = None,
    ) -> dict[str, Tensor]:
        decoder = self.trunk.model
        with torch.no_grad():
            batch = input_ids, attention_mask, labels, images, image_sizes
            prompt, prefill = started(self.trunk, *batch)
            prefill.hidden_states = decoder.first_layers(prefill, self.shared_layers, None)
        hidden = self.twig(decoder, prefill)
        targets = prompt.labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        logits = self.twig.head(hidden[:, :-1][supervised]).float()
        return {"loss": next_token_loss(logits, targets[supervised])}


def started(trunk: nn.Module, *batch) -> tuple[Prompt, Prefill]:
    """A batch, given as to `trunk.build_prompt`, embedded and in front of the first layer."""
    prompt = trunk.build_prompt(*batch)
    prefill = trunk.model.start(
        prompt.inputs_embeds, prompt.attention_mask, prompt.position_ids, visuals=prompt.visuals
    )
    return prompt, prefill


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of targets (N,) by logits (N, V); 0 without any."""
    return F.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))


class TwigTrainer(LLaVATrainer):
    """Trains a `TwigTraining`; checkpoints and result hold the twig alone."""

    #: what config.json says the twig was trained on, and the method that it is for
    base_model, method = "", TwigVLM.name

    def run_settings(self) -> dict:
        return {"twig_K": self.model.shared_layers}

    @property
    def hidden_size(self) -> int:
        return self.model.trunk.config.hidden_size

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the twig; called by every process. Checkpoints during training
        (`_internal_call`) keep the training precision, the result has the compute precision."""
        dtype = None if _internal_call else self.args.compute_dtype
        weights = {name: gathered(p) for name, p in self.model.twig.named_parameters()}
        if self.args.should_save:
            weights = {name: w if dtype is None else w.to(dtype) for name, w in weights.items()}
            folder = output_dir or self.args.output_dir
            save_twig(
                folder,
                weights,
                self.model.shared_layers,
                self.base_model,
                self.method,
                **self.twig_facts(),
            )

    def twig_facts(self) -> dict:
        """What config.json says besides sizes."""
        return {CONFIG_KEY: getattr(self.model.trunk.config, CONFIG_KEY)}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        twig = (self.model if model is None else model).twig
        twig.load_state_dict(read_twig(resume_from_checkpoint)[1])


def train(
    args: Sequence[str] | None = None,
    attn_implementation: str | None = None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> TwigTrainer:
    """Runs a whole training and returns the Trainer (its twig is `.model.twig`).

    args: command-line words, default those of this process; the others as in `llava.train.train`
    """
    return run(lambda words: prepare(words, attn_implementation, callbacks), args)


def prepare(
    words: Sequence[str], attn_implementation: str | None = None, callbacks=()
) -> TwigTrainer:
    """Everything up to the first step."""
    parser = FlagParser((TwigArguments, ModelArguments, DataArguments, TrainingArguments))
    twig_args, model_args, data_args, training_args = parser.parse(words)
    trunk = load_trunk(
        model_args, data_args, training_args, given_flags(words), attn_implementation
    )
    training = TwigTraining(trunk.model, twig_args.twig_K, twig_args.twig_T)
    if not training_args.deepspeed:  # which keeps float32 copies itself
        training.twig.float()
    trainer = TwigTrainer(
        model=training,
        tokenizer=trunk.tokenizer,
        args=training_args,
        callbacks=list(callbacks),
        **trunk.data(data_args, twig_args.skip_samples),
    )
    trainer.base_model = model_args.model_name_or_path
    return trainer


@dataclass
class Trunk:
    """A finished model that something is trained on, and what its data needs."""

    model: nn.Module
    tokenizer: object
    conv: Conversation

    def data(self, data_args, skip: Sequence[int] = ()) -> dict:
        """The Trainer's data sets and collator."""
        return make_supervised_data_module(self.tokenizer, data_args, self.conv, skip)


def load_trunk(
    model_args, data_args, training_args, given: set[str], attn_implementation: str | None = None
) -> Trunk:
    """The model of the flags in the compute precision, on its device, whole in every process.

    given: names of the flags on the command line. Raises ValueError for flags that ask for
    something else than a twig to be trained.
    """
    refuse_other_recipes(model_args, training_args)
    check_data_path(data_args.data_path)
    check_trainer_flags(training_args)
    transformers.set_seed(training_args.seed)
    model_args.freeze_backbone = True  # so that the trunk is loaded in the compute precision
    if training_args.fsdp:
        refuse_fsdp("a twig")
    join_processes(training_args)
    family = choose_family(model_args, training_args, given)
    refuse_other_tokens(model_args, family.values, given)
    with kept_whole(training_args):
        model = family.load_model(model_args, data_args, training_args, given, attn_implementation)
        tokenizer = family.load_tokenizer(training_args)
        conv = family.choose_template(tokenizer, model, model_args.version)
        family.add_vision(model, tokenizer, model_args, data_args, training_args)
    data_args.image_grid_pinpoints = getattr(model.config, "image_grid_pinpoints", None)
    return Trunk(model.to(training_args.device), tokenizer, conv)


def refuse_other_tokens(model_args, values: dict, given: set[str]) -> None:
    """Raises ValueError for flags by which the vocabulary of the trunk, and with it the head of the
    twig, would have another size than that of the model with the config `values` when it is loaded:
    the twig would fit no model.

    given: names of the flags on the command line
    """
    for name, usual in (("mm_use_im_start_end", False), ("mm_use_im_patch_token", True)):
        asked, known = getattr(model_args, name), values.get(name, usual)
        if name in given and asked != known and is_llava(values):
            raise ValueError(
                f"--{name} {asked}: {model_args.model_name_or_path} has {known}, and a twig knows "
                "the tokens of its model: leave the flag out"
            )


def refuse_other_recipes(model_args, training_args) -> None:
    """Raises ValueError for flags that ask for something else to be trained."""
    others = {
        "lora_enable": training_args.lora_enable,
        "tune_mm_mlp_adapter": model_args.tune_mm_mlp_adapter,
        "unfreeze_mm_vision_tower": model_args.unfreeze_mm_vision_tower,
        "gradient_checkpointing": training_args.gradient_checkpointing,
        "bits": training_args.bits != 16,
        "neftune_noise_alpha": training_args.neftune_noise_alpha is not None,
        "pruning_method": model_args.pruning_method != "none",
    }
    if asked := [name for name, value in others.items() if value]:
        raise ValueError(
            f"{', '.join(asked)} cannot be set: only the twig is trained, on all tokens"
        )


if __name__ == "__main__":
    train()
    leave_group()
