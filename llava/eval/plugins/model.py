"""A loaded model that answers texts about pictures, for evaluation programs of others."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from PIL import Image

from llava.conv_mode import resolve_conv_mode
from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.program import load_loop
from llava.eval.answering.questions import Question
from llava.image_io import to_rgb
from llava.mm_utils import get_model_name_from_path
from llava.model_args import DTYPES
from llava.pruning import Pruner
from llava.pruning.cli import pruner_from_args

SEPARATOR = ";"


def read_pruner(
    method: str | None,
    visual_token_num: int | str | None,
    options: str = "",
    others: Mapping[str, object] | None = None,
) -> Pruner:
    """The method that a program names whose options are plain strings; None: the one that the
    options belong to.

    options: KEY=VALUE pairs with semicolons between them, as for --pruning-arg
    others:  further options by name; None is as good as not given
    """
    pairs = [pair.strip() for pair in options.split(SEPARATOR) if pair.strip()]
    pairs += [f"{key}={value}" for key, value in (others or {}).items() if value is not None]
    number = None if visual_token_num in (None, "") else int(visual_token_num)
    return pruner_from_args(
        argparse.Namespace(pruning_method=method, visual_token_num=number, pruning_arg=pairs)
    )


def open_loop(
    model_path: str | None = None,
    model_base: str | None = None,
    conv_mode: str = "auto",
    pruner: Pruner | None = None,
    device: str | None = None,
    dtype: str | None = None,
    vision_tower: str | None = None,
    min_pixels: int | str | None = None,
    max_pixels: int | str | None = None,
    attn_implementation: str | None = None,
    adapter_dir: str | None = None,
    system_prompt: str | None = None,
) -> AnswerLoop:
    """Loads a model; without a path the playground's.

    dtype: a name in `DTYPES`
    adapter_dir: LoRA adapter that is merged into the model
    system_prompt: in place of the template's own
    min_pixels, max_pixels: bounds of the area of an image, for Qwen2.5-VL
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}, choose from {', '.join(DTYPES)}")
    if model_path is None:
        from llava.playground import default_model_path

        model_path = default_model_path()
    if adapter_dir is not None:
        if model_base is not None:
            raise ValueError("model_base and adapter_dir both make an adapter of a checkpoint")
        model_path, model_base = adapter_dir, model_path
    name = get_model_name_from_path(model_path)
    args = argparse.Namespace(
        model_path=model_path,
        model_base=model_base,
        model_name=name,
        conv_mode=resolve_conv_mode(conv_mode, name, model_path, model_base),
        pruner=pruner,
        device=device,
        dtype=dtype,
        vision_tower=vision_tower,
        load_8bit=False,
        load_4bit=False,
        attn_implementation=attn_implementation,
        min_pixels=None if min_pixels is None else int(min_pixels),
        max_pixels=None if max_pixels is None else int(max_pixels),
    )
    loop = load_loop(args)
    loop.front.system = system_prompt
    return loop


def ask(
    loop: AnswerLoop, prompts: list[tuple[str, list[Image.Image]]], max_new_tokens: int
) -> list[str]:
    """Answers to a batch of (text, pictures); image marks in the text are optional."""
    loop.max_new_tokens = max_new_tokens
    batch = []
    for number, (text, images) in enumerate(prompts):
        pictures = [loop.front.picture(to_rgb(image, background=None)) for image in images]
        marks = [str(place) for place in range(len(images))]
        batch.append((Question({"question_id": number}, text, marks), pictures))
    return [answer.text for answer in loop.generate(batch)]
