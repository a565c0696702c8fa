"""Qwen2.5-VL in training: tower and merger are part of the model, images have grids of their own.

The merger is what LLaVA calls projector, and flags mean the same parts: see docs/Training.md.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import cached_property

import torch

from llava.conv_mode import CONFIG_KEY
from llava.conversation import conv_templates
from llava.model.checkpoint import model_config
from llava.model.language_model.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from llava.model.multimodal_encoder.preprocessor_files import PREPROCESSOR, image_settings
from llava.model.multimodal_encoder.qwen2_5_vl_images import Qwen2_5_VLImageProcessor
from llava.model.qwen2_5_vl_loading import (
    load_image_processor,
    load_tokenizer,
    released_name,
)
from llava.model.qwen2_5_vl_rules import checked_config
from llava.weight_files import CACHE_DIR, local_folder, names_in, tensors_in, weight_files

from .family import FULL, Family, check_loaded, loading_options, set_attention
from .sample_images import PIXEL_BOUNDS, GridImages

TEMPLATE = "qwen2_5_vl"
#: flags about parts of LLaVA that these models do not have
FOREIGN_FLAGS = (
    "vision_tower",
    "pretrain_mm_mlp_adapter",
    "mm_projector_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "image_aspect_ratio",
)
#: files of a released folder that training leaves as they are
KEPT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "video_preprocessor_config.json",
)


class Qwen2_5_VLFamily(Family):
    """Qwen2.5-VL of any size, in the layout of the release or of later versions of transformers."""

    projector = "visual.merger."
    tower = "visual."
    not_quantized = ("visual", "lm_head")

    @cached_property
    def source(self) -> str:
        """The folder that the files of the checkpoint are in."""
        return local_copy(self.folder)

    @cached_property
    def processor(self) -> Qwen2_5_VLImageProcessor:
        """How images are prepared."""
        return load_image_processor(self.source)

    def load_model(self, model_args, data_args, training_args, given, attention=None):
        if foreign := [name for name in FOREIGN_FLAGS if name in given]:
            raise ValueError(
                f"--{foreign[0]} has no meaning for {self.folder}: a Qwen2.5-VL model has its own "
                "vision tower, merger and image tokens"
            )
        folder = self.source = local_copy(self.folder, training_args.cache_dir)
        values = checked_config(self.values, os.path.join(folder, "config.json"))
        values["vision_config"] = self.values["vision_config"]  # other programs read more of it
        model_class = Qwen2_5_VLForConditionalGeneration
        config = self.config = model_config(Qwen2_5_VLConfig, model_class, folder, values)
        set_attention(config, attention)
        for name in PIXEL_BOUNDS:
            if (pixels := getattr(data_args, name)) is not None:
                setattr(self.processor, name, pixels)
        self.processor.process_images([])  # bounds that leave no size are an error
        options = loading_options(self, model_args, training_args, attention)
        weights = renamed_weights(folder)
        model, info = model_class.from_pretrained(
            folder if weights is None else None,
            config=config,
            state_dict=weights,
            output_loading_info=True,
            **options,
        )
        check_loaded(info, folder, ("",))
        model.config.use_cache = False
        return model

    def load_tokenizer(self, training_args):
        tokenizer = load_tokenizer(self.source, self.config)
        tokenizer.padding_side = "right"
        tokenizer.model_max_length = training_args.model_max_length
        return tokenizer

    def template_name(self, version):
        """The model's own: its end mark is what an answer ends with."""
        if version != TEMPLATE:
            raise ValueError(
                f"unknown version {version!r}: Qwen2.5-VL is trained in its own template, "
                f"{TEMPLATE}; leave the flag out"
            )
        return TEMPLATE

    def choose_template(self, tokenizer, model, version):
        name = self.template_name(version)
        setattr(model.config, CONFIG_KEY, name)
        return conv_templates[name]

    def freeze_backbone(self, model):
        """The whole language model, with its head."""
        model.model.requires_grad_(False)
        model.lm_head.requires_grad_(False)

    def add_vision(self, model, tokenizer, model_args, data_args, training_args):
        if data_args.label_masks != "exact":
            raise ValueError(
                f"--label_masks {data_args.label_masks}: masks of an earlier release exist for "
                "LLaVA alone"
            )
        tower, trained = model.get_vision_tower(), model_args.unfreeze_mm_vision_tower
        if model_args.tune_mm_mlp_adapter:
            model.requires_grad_(False)
        tower.requires_grad_(trained)
        tower.merger.requires_grad_(not training_args.freeze_mm_mlp_adapter)
        if not trained:
            for part in (tower.patch_embed, tower.blocks):
                part.to(training_args.compute_dtype)
        model.config.tokenizer_model_max_length = tokenizer.model_max_length
        data_args.is_multimodal = True
        data_args.sample_images = GridImages(
            data_args, self.processor, model.config.image_mark, model.config.image_separator
        )

    def merged_dtype(self):
        """What the checkpoint was saved in."""
        name = self.values.get("torch_dtype") or self.values.get("dtype")
        return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)

    def save_beside(self, folder, part, tokenizer):
        """The files of the release; an adapter has its image settings beside it."""
        save_preprocessor(self.source, folder, self.processor)
        if part != FULL or os.path.samefile(self.source, folder):
            return
        for name in KEPT_FILES:
            if os.path.isfile(path := os.path.join(self.source, name)):
                shutil.copyfile(path, os.path.join(folder, name))


def local_copy(name: str, cache_dir: str | None = None) -> str:
    """`local_folder` of a checkpoint, downloads in `cache_dir`."""
    token = CACHE_DIR.set(cache_dir)
    try:
        return local_folder(name)
    finally:
        CACHE_DIR.reset(token)


def renamed_weights(folder: str) -> dict | None:
    """The weights in a folder by their names here; None where the files have those already."""
    files = weight_files(folder)
    if all(name == released_name(name) for path in files for name in names_in(path)):
        return None
    return {released_name(name): t.clone() for path in files for name, t in tensors_in(path)}


def save_preprocessor(source: str, folder: str, processor) -> None:
    """preprocessor_config.json of `source`, with the bounds of `processor`."""
    _, values = image_settings(source)
    bounds = {name: getattr(processor, name) for name in PIXEL_BOUNDS}
    if isinstance(values.get("size"), dict):  # as later versions of transformers write it
        edges = dict(zip(("shortest_edge", "longest_edge"), bounds.values(), strict=True))
        values["size"] = values["size"] | edges
    with open(os.path.join(folder, PREPROCESSOR), "w", encoding="utf-8") as file:
        json.dump(values | bounds, file, indent=2)
