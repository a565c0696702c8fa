"""A CLIP folder, local or on the hub: config, image processor and vision weights, all checked."""

from __future__ import annotations

import os

import torch
from accelerate import init_empty_weights
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_utils import no_init_weights

from ...config_file import check_config, number, one_sentence, read_json, shown, whole
from ...llava_hf import VISION_PREFIX, is_llava_hf, vision_name, vision_values
from ...weight_files import CACHE_DIR, hub_file, local_folder, tensors_in, weight_files
from ..checkpoint import Filler
from .preprocessor_files import image_settings

#: `model_type` of folders with a CLIP vision model; early ones name none
CLIP_TYPES = ("clip", "clip_vision_model", None)


def read_vision_config(name: str) -> CLIPVisionConfig:
    """Sizes of the vision model in the folder or hub repository `name`."""
    path = os.path.join(name, "config.json")
    if not os.path.isfile(path):
        found = None if os.path.isdir(name) else hub_file(name, "config.json")
        path = os.path.join(local_folder(name), "config.json") if found is None else found
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name} holds no config.json, so it is no vision tower")
    values = read_json(path)
    if is_llava_hf(values):  # a model that brings its tower along
        values = vision_values(values, path)
    elif values.get("model_type") not in CLIP_TYPES:
        raise ValueError(
            f"the vision tower {name} is a {shown(values['model_type'])} model, only CLIP towers "
            "are supported"
        )
    inner = values.get("vision_config", values)
    if not isinstance(inner, dict):
        raise ValueError(f"{path}: vision_config must be an object, not {shown(inner)}")
    checked = check_config(inner, path)
    with one_sentence(f"{path} describes no vision model"):
        return CLIPVisionConfig.from_dict(checked)


def read_vision_model(name: str, dtype: torch.dtype | None = None) -> CLIPVisionModel:
    """The vision model of a CLIP folder or hub repository, float32 unless told otherwise."""
    folder = local_folder(name)
    config = read_vision_config(folder)
    with one_sentence(f"{folder}/config.json describes no vision model"):
        with init_empty_weights(), no_init_weights():
            model = CLIPVisionModel(config)
    filler = Filler(model.eval(), dtype or torch.float32)
    for path in weight_files(folder):
        for key, tensor in tensors_in(path):
            if (name := vision_name(key)).startswith(VISION_PREFIX):
                filler.add(name, tensor, path)
    filler.finish(folder)
    return model


def read_image_processor(name: str) -> CLIPImageProcessor:
    """How the tower wants its images: what preprocessor_config.json says, or processor_config.json,
    which later versions of transformers write in its place."""
    with one_sentence(f"the image processor of {name} cannot be read"):
        _, values = image_settings(name)
        if values:
            processor = CLIPImageProcessor.from_dict(values)
        else:
            processor = CLIPImageProcessor.from_pretrained(name, cache_dir=CACHE_DIR.get())
    sides = [*dict(processor.size).values(), *dict(processor.crop_size).values()]
    colours = [*processor.image_mean, *processor.image_std, processor.rescale_factor]
    side, share = whole(1, 2**13), number(-1e3, 1e3)
    fits = all(map(side.holds, sides)) and all(map(share.holds, colours))
    if not fits or len(colours) != 7 or not all(processor.image_std):
        raise ValueError(
            f"the image processor of {name} has impossible sizes or colours: {shown(sides)}, "
            f"{shown(colours)}"
        )
    return processor
