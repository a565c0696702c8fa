"""The small files beside the weights of an exported checkpoint: tokenizer, image processor, prompt
template."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from copy import copy

from transformers import (
    AddedToken,
    CLIPImageProcessor,
    LlamaTokenizerFast,
    PreTrainedTokenizerBase,
)

from ..chat_template import chat_template
from ..config_file import first_line, read_json
from ..conversation import conv_templates
from ..llava_hf import IMAGE_TOKEN, NEXT, PAD_TOKEN, SETTINGS, is_next
from ..log_output import say
from ..mm_utils import tokenizer_image_token
from .multimodal_encoder.preprocessor_files import PREPROCESSOR, PROCESSOR

CHAT_TEMPLATE = "chat_template.json"
#: files of a released folder that are taken over as they are
KEPT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
    "chat_template.jinja",
    "video_preprocessor_config.json",
)
#: entries of tokenizer_config.json that belong to the layout of transformers
FOREIGN_ENTRIES = ("processor_class", "chat_template", "image_token", "extra_special_tokens")
#: what a tokenizer of another kind must read in the same way
PROBES = (
    "A chat. USER: \nWhat color is the ring?\nAnswer with one word. ASSISTANT:",
    "  two blanks,\ttab, 42 km\u2026 caf\u00e9 \u6f22\u5b57 \U0001f600</s>",
)
AROUND_AN_IMAGE = f"A chat. USER: {IMAGE_TOKEN}\nWhat is it? ASSISTANT:"
#: where tokenizers of Llama differ: those with `legacy: false` put no space behind an end mark
LATER_TURNS = "What? ASSISTANT: Red.</s>USER: And?</s>\n</s> so"


def write_json(folder: str, name: str, values: dict) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")


def add_layout_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the tokens for an image and for padding, which are added unless they are there."""
    image = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens([image], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "left"  # answers are generated
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.pad_token_id


def tokens_behind(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str] | None:
    """Tokens from id `rows` on that are not those of `add_layout_tokens`; None where there are no
    others."""
    behind = {token for token, number in tokenizer.get_vocab().items() if number >= rows}
    return sorted(behind - {IMAGE_TOKEN, PAD_TOKEN}) or None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """The tokenizer's files, and tokenizer.json where it reads texts in the same way.

    With a token for an image it has to read what is behind one as LLaVA does, as the start of a
    text. Later turns may differ then: without tokenizer.json, every prompt would.
    """
    tokenizer.save_pretrained(folder)
    if tokenizer.is_fast or not os.path.isfile(os.path.join(folder, "tokenizer.model")):
        return
    image = tokenizer.get_vocab().get(IMAGE_TOKEN)

    def differs(text: str) -> bool:
        own = tokenizer_image_token(text, tokenizer, image_token_index=image)
        return fast(text).input_ids != own

    try:
        fast = LlamaTokenizerFast.from_pretrained(folder)
        probes = (*PROBES, LATER_TURNS if image is None else AROUND_AN_IMAGE)
        different = list(filter(differs, probes))
        why = f"it would read {different[0]!r} in another way" if different else None
    except Exception as error:  # converters of odd vocabularies fail in every way there is
        why = first_line(error)
    if why is None:
        fast.backend_tokenizer.save(os.path.join(folder, "tokenizer.json"))
        if differs(LATER_TURNS):
            say(
                "tokenizer.json puts a space behind </s>, which this tokenizer does not (legacy: "
                "false): in dialogues of several turns, the first token of a turn may be another."
            )
    else:
        say(f"No tokenizer.json is written, {why}; tokenizer.model is there.")


def copy_tokenizer(source: str, folder: str, rows: int, **entries) -> None:
    """The tokenizer in `source` without its tokens from id `rows` on.

    entries: other values in its settings, `pad_token` for one
    """
    copy_files(source, folder, skip=(CHAT_TEMPLATE, "chat_template.jinja"))

    def change(name: str, edit: Callable[[dict], None]) -> None:
        if os.path.isfile(path := os.path.join(folder, name)):
            edit(values := read_json(path))
            write_json(folder, name, values)

    def settings(values: dict) -> None:
        for key in FOREIGN_ENTRIES:
            values.pop(key, None)
        if isinstance(kept := values.get("added_tokens_decoder"), dict):
            values["added_tokens_decoder"] = {n: t for n, t in kept.items() if int(n) < rows}
        named = values.pop("additional_special_tokens", None) or []
        if own := [token for token in named if not is_layout_token(token)]:
            values["additional_special_tokens"] = own
        values |= {key: value for key, value in entries.items() if key in values}

    def whole(values: dict) -> None:
        tokens = values.get("added_tokens") or []
        values["added_tokens"] = [token for token in tokens if token["id"] < rows]
        values["padding"] = None

    change("tokenizer_config.json", settings)
    change("special_tokens_map.json", settings)
    change("tokenizer.json", whole)
    path = os.path.join(folder, "added_tokens.json")
    if os.path.isfile(path):
        added = {token: n for token, n in read_json(path).items() if n < rows}
        write_json(folder, "added_tokens.json", added) if added else os.remove(path)


def is_layout_token(token) -> bool:
    """Whether an entry of a tokenizer's files is one of those of `add_layout_tokens`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text in (IMAGE_TOKEN, PAD_TOKEN)


def copy_files(source: str, folder: str, skip: tuple[str, ...] = ()) -> None:
    """The files of `KEPT_FILES` that are in `source`."""
    for name in KEPT_FILES:
        path = os.path.join(source, name)
        if name not in skip and os.path.isfile(path):
            shutil.copyfile(path, os.path.join(folder, name))


def clip_processor(processor: CLIPImageProcessor) -> CLIPImageProcessor:
    """The processor as that of a tower alone."""
    processor = copy(processor)
    for key in ("image_grid_pinpoints", "do_pad", "aspect_ratio_setting", "_processor_class"):
        processor.__dict__.pop(key, None)
    return processor


def save_processor(
    processor: CLIPImageProcessor, folder: str, values: dict, conv_mode: str
) -> None:
    """preprocessor_config.json, processor_config.json and the prompt template of a model whose
    config.json in the layout of transformers has these values.

    Images of LLaVA-1.5 are padded to squares: `LlavaImageProcessor` of later versions does that
    where `do_pad` says so; a `CLIPImageProcessor` cuts out the middle.
    """
    tiles = is_next(values)
    name = "LlavaNextProcessor" if tiles else "LlavaProcessor"
    images = clip_processor(processor).to_dict()
    images |= {"processor_class": name, "image_processor_type": "CLIPImageProcessor"}
    if tiles:
        images |= {
            "image_processor_type": NEXT.replace("ForConditionalGeneration", "ImageProcessor"),
            "image_grid_pinpoints": values["image_grid_pinpoints"],
            "aspect_ratio_setting": "anyres",
            "do_pad": True,
        }
    elif values[SETTINGS].get("image_aspect_ratio") == "pad":
        images |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    write_json(folder, PREPROCESSOR, images)
    strategy = values["vision_feature_select_strategy"]
    write_json(
        folder,
        PROCESSOR,
        {
            "processor_class": name,
            "image_token": IMAGE_TOKEN,
            "patch_size": values["vision_config"]["patch_size"],
            "num_additional_image_tokens": 1,  # the class token
            "vision_feature_select_strategy": strategy,
        },
    )
    template = chat_template(conv_templates[conv_mode])
    if template is None:
        say(f"No chat template is written: the prompts of {conv_mode} do not fit into one.")
        return
    write_json(folder, CHAT_TEMPLATE, {"chat_template": template})
    path = os.path.join(folder, "tokenizer_config.json")
    own = {"chat_template": template, "processor_class": name}
    write_json(folder, "tokenizer_config.json", read_json(path) | own)
