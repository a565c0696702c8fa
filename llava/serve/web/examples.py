"""Examples of the page: pictures of the playground, what is on them, and questions."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from functools import cached_property

import gradio as gr
from PIL import Image

from llava.clone_files import clone_file
from llava.image_io import displayed

from .pictures import data_uri

#: the playground's benchmark
FOLDER = "playground/benchmark"
#: (question file there, line); what they name is part of the package, see MANIFEST.in
CHOSEN = (
    ("gqa/llava_gqa_testdev_balanced.jsonl", 49),
    ("textvqa/llava_textvqa_val_v051_ocr.jsonl", 7),
    ("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", 40),
    ("describe/questions.jsonl", 12),
)
#: file with a sentence about every picture
ABOUT = "describe/questions.jsonl"
SIDE = 160  # pixels of a picture in the list

#: tells the page which button was pressed
PRESSED = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-number]');
  if (button) trigger('select', {number: Number(button.dataset.number)});
});"""


@dataclass(frozen=True)
class Example:
    """
    path:  file of the picture
    shows: the things on it, "a red ring, a sign: post"
    """

    path: str
    question: str
    shows: str

    @cached_property
    def picture(self) -> Image.Image:
        with Image.open(self.path) as file:
            return file.convert(file.mode)


def examples() -> list[Example]:
    """Those of `CHOSEN`, in that order."""
    about = {line["image"]: line["reference"] for line in _lines(ABOUT)}
    return [_example(name, line, about) for name, line in CHOSEN]


def number_of(image: Image.Image, listed: list[Example]) -> int | None:
    """Number, from 0, of the example whose picture `image` is."""
    for number, example in enumerate(listed):
        if example.picture.size == image.size and (
            displayed(example.picture).tobytes() == displayed(image).tobytes()
        ):
            return number
    return None


def example_list(listed: list[Example]) -> gr.HTML:
    """A button for every example, which fires `select` with its `number`."""
    return gr.HTML(
        f"<div class='pv-title'>Examples</div><div class='pv-examples'>{_buttons(listed)}</div>",
        js_on_load=PRESSED,
        elem_id="examples",
        elem_classes="pv-html",
    )


def _buttons(listed: list[Example]) -> str:
    return "".join(
        f"<button type='button' data-number='{number}' "
        f"aria-label='Example {number + 1}: {html.escape(one.question.splitlines()[0])} "
        f"The picture shows {html.escape(one.shows)}.'>"
        f"<img src='{data_uri(one.picture, SIDE)}' alt=''>"
        f"<span>{html.escape(one.shows)}</span></button>"
        for number, one in enumerate(listed)
    )


def _example(name: str, number: int, about: dict[str, str]) -> Example:
    question = _lines(name)[number]
    lines = question["text"].splitlines()
    text = "\n".join(line for line in lines if not line.startswith("Reference OCR"))
    path = clone_file(f"{FOLDER}/images/{question['image']}")
    return Example(str(path), text, legend(about[question["image"]]))


def _lines(name: str) -> list[dict]:
    text = clone_file(f"{FOLDER}/{name}").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def legend(sentences: str) -> str:
    """ "There is a red ring and a blue net. The black sign says post." in fewer words."""
    things, *signs = sentences.rstrip(".").split(". ")
    things = things.removeprefix("There is ").replace(" and ", ", ")
    said = [re.sub(r"The (\w+) sign says (\w+)", r"a \1 sign “\2”", sign) for sign in signs]
    return ", ".join([things, *said])
