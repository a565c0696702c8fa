"""LLaVA in training: a vision tower beside the model, a projector, marks in the vocabulary."""

from __future__ import annotations

import math

import transformers
from torch import nn

from llava.config_file import RULES, check_rules
from llava.conv_mode import CONFIG_KEY, DEFAULT
from llava.conversation import Conversation, conv_templates
from llava.model.builder import FAMILIES, has_json_alone
from llava.model.split_parameters import whole

from .family import FULL, LORA, PROJECTOR, Family, check_loaded, loading_options, set_attention
from .sample_images import PIXEL_BOUNDS

#: settings that a checkpoint brings along; a flag that is given wins over it
CHECKPOINT_SETTINGS = (
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "mm_projector_type",
)
DECODER = ("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head.")


class LlavaFamily(Family):
    """LLaVA-1.5 and LLaVA-NeXT on Llama or Mistral, and language models that become one."""

    def load_model(self, model_args, data_args, training_args, given, attention=None):
        """As of every family. A LLaVA keeps its vision settings except for flags in `given`."""
        path, cache_dir = model_args.model_name_or_path, training_args.cache_dir
        if flag := next((name for name in PIXEL_BOUNDS if name in given), None):
            raise ValueError(f"--{flag}: images for {path} have one size, that of its vision tower")
        layout = {
            "--image_aspect_ratio": data_args.image_aspect_ratio,
            "--mm_patch_merge_type": model_args.mm_patch_merge_type,
        }
        check_rules(layout, {flag: RULES[flag.removeprefix("--")] for flag in layout}, "flags")
        options = loading_options(self, model_args, training_args, attention)
        options["cache_dir"] = cache_dir
        if model_args.vision_tower is None and not self.kind.multimodal:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
            model.config.use_cache = False
            return model
        config_class, model_class = FAMILIES[self.kind.family]
        config = config_class.from_pretrained(path, cache_dir=cache_dir)
        set_attention(config, attention)
        if getattr(config, "mm_vision_tower", None):
            adopt_settings(config, model_args, data_args, given)
        model, info = model_class.from_pretrained(
            path, config=config, output_loading_info=True, **options
        )
        check_loaded(info, path, DECODER)
        if any(key.endswith("image_newline") for key in info["missing_keys"]):
            newline = model.get_model().image_newline
            with whole([newline], change=True):
                newline.data.normal_(std=1 / math.sqrt(config.hidden_size))
        model.config.use_cache = False
        return model

    def load_tokenizer(self, training_args):
        """The checkpoint's tokenizer, padding on the right; the slow one unless tokenizer.json is
        all there is."""
        return transformers.AutoTokenizer.from_pretrained(
            self.folder,
            cache_dir=training_args.cache_dir,
            model_max_length=training_args.model_max_length,
            padding_side="right",
            use_fast=has_json_alone(self.folder),
        )

    def template_name(self, version) -> str:
        name = {"v0": DEFAULT, "v0.5": DEFAULT, "v1": DEFAULT}.get(version, version)
        if name not in conv_templates:
            raise ValueError(
                f"unknown version {version!r}, choose from v0.5, {', '.join(conv_templates)}"
            )
        return name

    def choose_template(self, tokenizer, model, version) -> Conversation:
        """As of every family: whoever loads the result asks in the words that the config names."""
        name = self.template_name(version)
        if version != "v0":
            # Llama 3 knows no unknown tokens.
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        elif tokenizer.pad_token is None:
            add_token_rows(tokenizer, model, {"pad_token": "[PAD]"})
        setattr(model.config, CONFIG_KEY, name)
        return conv_templates[name]

    def freeze_backbone(self, model) -> None:
        """The decoder; the head goes on learning, as published."""
        getattr(model, "model", model).requires_grad_(False)

    def add_vision(self, model, tokenizer, model_args, data_args, training_args) -> None:
        """Vision tower and projector, as of every family; nothing where no tower is named."""
        if model_args.vision_tower is None:
            return
        inner = model.get_model()
        inner.initialize_vision_modules(model_args, fsdp=training_args.fsdp or None)
        config, tower = model.config, model.get_vision_tower()
        tower.to(device=training_args.device, dtype=training_args.compute_dtype)
        for key, value in {
            "image_aspect_ratio": data_args.image_aspect_ratio,
            "tokenizer_padding_side": tokenizer.padding_side,
            "tokenizer_model_max_length": tokenizer.model_max_length,
            "tune_mm_mlp_adapter": model_args.tune_mm_mlp_adapter,
            "freeze_mm_mlp_adapter": training_args.freeze_mm_mlp_adapter,
            "mm_use_im_start_end": model_args.mm_use_im_start_end,
            "mm_projector_lr": training_args.mm_projector_lr,
            "mm_use_im_patch_token": model_args.mm_use_im_patch_token,
        }.items():
            setattr(config, key, value)
        if data_args.image_aspect_ratio == "anyres" and not getattr(
            config, "image_grid_pinpoints", None
        ):
            side = tower.image_size
            shapes = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
            config.image_grid_pinpoints = [[side * w, side * h] for w, h in shapes]
        if model_args.tune_mm_mlp_adapter:
            model.requires_grad_(False)
            inner.mm_projector.requires_grad_(True)
        if training_args.freeze_mm_mlp_adapter:
            inner.mm_projector.requires_grad_(False)
        model.initialize_vision_tokenizer(model_args, tokenizer)
        tower.requires_grad_(False)
        if model_args.unfreeze_mm_vision_tower:
            config.unfreeze_mm_vision_tower = True
            config.mm_vision_tower_lr = training_args.mm_vision_tower_lr
            tower.vision_tower.requires_grad_(True)
        data_args.image_processor = tower.image_processor
        data_args.tokens_per_image = tower.num_patches
        data_args.is_multimodal = True
        data_args.mm_use_im_start_end = model_args.mm_use_im_start_end

    def saved_part(self, model) -> str:
        """As of every family: the projector alone, unless the tower is trained with it."""
        part = super().saved_part(model)
        if part == LORA or not getattr(model.config, "tune_mm_mlp_adapter", False):
            return part
        names = (name for name, p in model.named_parameters() if p.requires_grad)
        return FULL if any(self.part_of(name) == "tower" for name in names) else PROJECTOR

    def is_saved(self, model, name) -> bool:
        """A frozen tower is left out: the config names it."""
        own_tower = getattr(model.config, "unfreeze_mm_vision_tower", False)
        return super().is_saved(model, name) and (own_tower or "vision_tower." not in name)

    def save_beside(self, folder, part, tokenizer) -> None:
        if part == FULL and tokenizer is not None:
            tokenizer.save_pretrained(folder)


def adopt_settings(config, model_args, data_args, given: set[str]) -> None:
    """Unifies the flags with the config of a LLaVA checkpoint, in both directions."""
    for key in CHECKPOINT_SETTINGS:
        if key not in given:
            value = getattr(config, key, None)
            setattr(model_args, key, getattr(model_args, key) if value is None else value)
        elif (
            key == "mm_projector_type" and config.mm_projector_type != model_args.mm_projector_type
        ):
            raise ValueError(
                f"mm_projector_type {model_args.mm_projector_type!r} does not fit the checkpoint, "
                f"whose projector is {config.mm_projector_type!r}"
            )
        setattr(config, key, getattr(model_args, key))
    if "image_aspect_ratio" not in given:
        ratio = getattr(config, "image_aspect_ratio", None)
        data_args.image_aspect_ratio = ratio or data_args.image_aspect_ratio
    if model_args.vision_tower is None:
        model_args.vision_tower = config.mm_vision_tower
    config.mm_vision_tower = model_args.vision_tower


def add_token_rows(tokenizer, model: nn.Module, special_tokens: dict[str, str]) -> None:
    """Adds special tokens; their embeddings start as the mean of all others."""
    added = tokenizer.add_special_tokens(special_tokens)
    model.resize_token_embeddings(len(tokenizer))
    if added:
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            with whole([table.weight], change=True):
                weight = table.weight.data
                weight[-added:] = weight[:-added].mean(dim=0, keepdim=True)
