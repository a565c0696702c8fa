"""Loading Qwen2.5-VL: its config, tokenizer, image settings and weights, all of them checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, Qwen2TokenizerFast

from ..checkpoint_kind import NON_LORA, Kind
from ..config_file import (
    Rule,
    check_rules,
    first_line,
    number,
    read_json,
    whole,
)
from ..pruning import METHODS, Pruner
from ..pruning.cues import check_cues
from .checkpoint import (
    build_empty,
    clean_trainable_names,
    merge_lora,
    model_config,
    read_tensors,
)
from .language_model.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from .later_tokenizer import OTHER_FILES, earlier_files
from .multimodal_encoder.preprocessor_files import PREPROCESSOR, image_settings
from .multimodal_encoder.qwen2_5_vl_encoder import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionTower
from .multimodal_encoder.qwen2_5_vl_images import Qwen2_5_VLImageProcessor

COLOURS = Rule(
    "three numbers",
    lambda v: isinstance(v, list) and len(v) == 3 and all(map(number(-1e3, 1e3).holds, v)),
)
IMAGE_RULES = {
    "min_pixels": whole(1, 2**40, or_none=True),
    "max_pixels": whole(28 * 28, 2**40, or_none=True),
    "patch_size": whole(1, 2**10),
    "merge_size": Rule("2, the only value supported", lambda v: v == 2),
    "temporal_patch_size": Rule("2, the only value supported", lambda v: v == 2),
    "image_mean": COLOURS,
    "image_std": Rule("three numbers above 0", lambda v: COLOURS.holds(v) and min(v) > 0),
}
#: where newer versions of transformers put the template, which the pinned one does not read
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
#: that of the release: the parts of a message, one behind the other
CHAT_TEMPLATE = (
    "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'video' or 'video' in part -%}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}"
    "{%- for turn in messages -%}"
    "{{ '<|im_start|>' + turn['role'] + '\n' + words(turn['content']) + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def check_options(
    name: str,
    kind: Kind,
    base: str | None,
    vision_tower: str | None,
    pruner: Pruner,
    values: dict,
) -> None:
    """Raises ValueError for what cannot be loaded beside the checkpoint called `name`; values: as
    `checked_config` gives them."""
    with torch.device("meta"):
        tower = Qwen2_5_VLVisionTower(Qwen2_5_VLVisionConfig(**values["vision_config"]))
    check_cues(pruner.vision, tower, METHODS.own.values())
    if base is not None and kind.delta != "lora":
        raise ValueError(f"{name} is no LoRA adapter: Qwen2.5-VL has no other parts to put on top")
    if vision_tower is not None:
        raise ValueError(f"{name} is a Qwen2.5-VL model, which brings its own vision tower")


def load(
    folder: str,
    base: str | None,
    values: dict,
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str,
    use_safetensors: bool | None = None,
) -> tuple[PreTrainedTokenizerBase, Any, Qwen2_5_VLImageProcessor]:
    """(tokenizer, model, image processor) in `folder`, or in `base` with the adapter in `folder`;
    values: as `checked_config` gives them."""
    adapter, folder = (None, folder) if base is None else (folder, base)
    model_class = Qwen2_5_VLForConditionalGeneration
    config = model_config(Qwen2_5_VLConfig, model_class, folder, values, backend)
    trained = [adapter] if adapter and os.path.isfile(os.path.join(adapter, PREPROCESSOR)) else []
    tokenizer = load_tokenizer(folder, config)
    processor = load_image_processor(*trained or [folder])
    if processor.patch_size != config.vision_config.patch_size:
        raise ValueError(
            f"{folder}: {PREPROCESSOR} has patch_size {processor.patch_size}, "
            f"config.json {config.vision_config.patch_size}"
        )
    model, filler = build_empty(
        model_class,
        config,
        dtype,
        device,
        use_safetensors=use_safetensors,
        rename=released_name,
    )
    if adapter is not None:  # what was trained beside the adapter takes the place of the base's
        for name, tensor in clean_trainable_names(read_tensors(adapter, NON_LORA)).items():
            filler.add(name, tensor, adapter)
    filler.add_folder(folder)
    filler.finish(folder if adapter is None else f"{adapter} with {folder}")
    if adapter is not None:
        merge_lora(model, adapter, released_name)
    return tokenizer, model, processor


def load_image_processor(folder: str) -> Qwen2_5_VLImageProcessor:
    """How images are prepared: what preprocessor_config.json says, or processor_config.json, which
    later versions of transformers write in its place, or the values of the release."""
    path, values = image_settings(folder)
    size = values.get("size")
    if isinstance(size, dict):  # as later versions of transformers write it
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            values[key] = size.get(edge) if values.get(key) is None else values[key]
    check_rules(values, IMAGE_RULES, path)
    settings = {key: values[key] for key in IMAGE_RULES if values.get(key) is not None}
    processor = Qwen2_5_VLImageProcessor(**settings)
    if processor.min_pixels > processor.max_pixels:
        raise ValueError(
            f"{path}: min_pixels {processor.min_pixels} are more than max_pixels "
            f"{processor.max_pixels}"
        )
    return processor


@contextmanager
def without_advice() -> Iterator[None]:
    """A block in which transformers does not say of a published tokenizer that its added tokens
    have to be trained: they are."""
    logger = logging.getLogger("transformers.tokenization_utils_base")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def load_tokenizer(folder: str, config: Qwen2_5_VLConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, padding on the left; from vocab.json and merges.txt where
    tokenizer.json is missing or of a later version than the installed `tokenizers` reads, and
    without them from that file all the same."""
    tokenizer, errors = None, []
    for kind in (Qwen2TokenizerFast, Qwen2Tokenizer):
        try:
            with without_advice():
                tokenizer = kind.from_pretrained(folder, padding_side="left")
            break
        except Exception as error:  # tokenizers of damaged files fail in every way there is
            errors.append(first_line(error))
    tokenizer = later_tokenizer(folder) if tokenizer is None else tokenizer
    if tokenizer is None:
        hint = OTHER_FILES.format("vocab.json and merges.txt")
        raise ValueError(f"no tokenizer can be loaded from {folder}: {'; '.join(errors)}; {hint}")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model "
            f"{config.vocab_size}: it belongs to another model"
        )
    marks = {"<|image_pad|>": config.image_token_id, "<|video_pad|>": config.video_token_id}
    for mark, wanted in marks.items():
        if (found := tokenizer.convert_tokens_to_ids(mark)) != wanted:
            raise ValueError(
                f"{mark} is token {found} in {folder}, but {wanted} by its config.json"
            )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = read_template(folder)
    return tokenizer


def later_tokenizer(folder: str) -> PreTrainedTokenizerBase | None:
    """That of a tokenizer.json of a later version; None where it cannot be understood."""
    with earlier_files(folder) as copy:
        if copy is None:
            return None
        try:
            with without_advice():
                tokenizer = Qwen2TokenizerFast.from_pretrained(copy, padding_side="left")
        except Exception:  # as above
            return None
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = folder
    return tokenizer


def read_template(folder: str) -> str:
    """The template of a checkpoint from a file of its own, or that of the release."""
    for path in (os.path.join(folder, name) for name in TEMPLATE_FILES):
        if not os.path.isfile(path):
            continue
        if path.endswith(".json"):
            template = read_json(path).get("chat_template")
        else:
            with open(path, encoding="utf-8", errors="replace") as file:
                template = file.read()
        if isinstance(template, str):
            return template
    return CHAT_TEMPLATE


def released_name(name: str) -> str:
    """A weight's name in the released files, which is ours, from what later versions of
    transformers call it."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)


def module_name(name: str) -> str:
    """What transformers since 4.52 calls a weight of this name in the released files."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model."):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name
