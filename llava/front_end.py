"""Texts and images as a model takes them: prompt template, image marks, token ids, pixels.

Programs call these methods and know no family: what differs from LLaVA is said by a model's config
(`image_mark`, `image_separator`), its image processor, and the template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    DEFAULT_VIDEO_TOKEN,
)
from llava.conversation import Conversation, conv_templates
from llava.image_settings import ImageSettings
from llava.mm_utils import known_ids, process_images, tokenizer_image_token
from llava.model.inputs import Picture, generate_inputs
from llava.video_io import Clip

#: what stands in front of the system text in templates that mark it
SYSTEM_MARK = "<|im_start|>system\n"


@dataclass
class FrontEnd:
    """What stands between people and a loaded checkpoint.

    conv_mode: name of the prompt template
    system:    what the model is told first, in place of the template's words; None: those
    """

    tokenizer: object
    model: object
    image_processor: object
    conv_mode: str
    system: str | None = None

    def __post_init__(self):
        if self.conv_mode not in conv_templates:
            names = ", ".join(conv_templates)
            raise ValueError(f"unknown conv mode {self.conv_mode!r}, choose from {names}")

    @property
    def mark(self) -> str:
        """What stands for an image in a prompt."""
        if own := getattr(self.model.config, "image_mark", None):
            return own
        if getattr(self.model.config, "mm_use_im_start_end", False):
            return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        return DEFAULT_IMAGE_TOKEN

    @property
    def separator(self) -> str:
        """What stands between an image and the text behind it."""
        return getattr(self.model.config, "image_separator", "\n")

    @property
    def reserved(self) -> tuple[str, ...]:
        """What the tokenizer has for images and videos, which no question may hold."""
        return getattr(self.model.config, "reserved_texts", ())

    @property
    def pad_id(self) -> int:
        """What fills up prompts and answers that are shorter than others of their batch."""
        pad_id = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad_id is None else pad_id

    def conversation(self) -> Conversation:
        """A new dialogue in the prompt template."""
        conversation = conv_templates[self.conv_mode].copy()
        if self.system is not None:
            head, mark, _ = conversation.system.rpartition(SYSTEM_MARK)
            conversation.system = head + mark + self.system
        return conversation

    def marked(self, text: str, num_images: int = 0, num_videos: int = 0) -> str:
        """The text with a mark for every image: where it says `<image>`, or else in front; with
        videos also where it says `<video>`, or else behind the images."""
        if num_videos:
            if DEFAULT_VIDEO_TOKEN not in text and DEFAULT_IMAGE_TOKEN in text:
                raise ValueError(
                    f"the text says where images go ({DEFAULT_IMAGE_TOKEN}), but not where the "
                    f"{num_videos} videos do: write {DEFAULT_VIDEO_TOKEN} once for each"
                )
            num_images += num_videos
            text = text.replace(DEFAULT_VIDEO_TOKEN, DEFAULT_IMAGE_TOKEN)
        if DEFAULT_IMAGE_TOKEN in text:
            return with_marks(text, self.mark, self.separator)
        return (self.mark + self.separator) * num_images + text

    def prompt(self, text: str, num_images: int = 0, num_videos: int = 0) -> str:
        """The whole prompt: a text about so many images and videos as one turn of the user."""
        conversation = self.conversation()
        marked = self.marked(text, num_images, num_videos)
        conversation.append_message(conversation.roles[0], marked)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    def encode(self, prompt: str, num_images: int | None = None) -> Tensor:
        """(L,) ids of a prompt, -200 for an image.

        num_images: how many marks there are; an `<image>` after that many is text. None: all are
        """
        return tokenizer_image_token(
            prompt, self.tokenizer, return_tensors="pt", num_images=num_images
        )

    def picture(self, image: Image.Image, settings: ImageSettings | None = None) -> Picture:
        """An image as the vision tower takes it; settings: in place of those in use."""
        settings = settings or self.model.image_settings
        return Picture(process_images([image], self.image_processor, settings)[0], image.size)

    def grid(self, picture: Picture) -> tuple[int, int]:
        """(h, w) visual tokens that each crop of an image has before any method."""
        return self.model.get_vision_tower().grid or tuple(picture.pixels.shape[:2])

    def video(self, clip: Clip) -> Picture:
        """A video as the vision tower takes it, which has a mark like an image.

        Raises ValueError where the model takes images alone.
        """
        process = getattr(self.image_processor, "process_video", None)
        if process is None:
            raise ValueError(
                f"{type(self.model).__name__} takes no videos: give single frames as images, one "
                f"{DEFAULT_IMAGE_TOKEN} each"
            )
        return Picture(process(clip.frames, clip.fps), clip.frames[0].size)

    def inputs(
        self, prompts: list[Tensor], pictures: list[list[Picture]], questions: list[str]
    ) -> dict:
        """The arguments of `generate` for a batch.

        prompts:   ids (L,) of every prompt
        pictures:  those of every prompt, in order
        questions: of every prompt, in plain words, for methods that read it
        """
        batch = generate_inputs(self.model, prompts, pictures, questions, self.pad_id)
        return {**batch, "pad_token_id": self.pad_id}

    def decode(self, answers: Tensor) -> list[str]:
        """The texts of new tokens (B, n)."""
        rows = [known_ids(self.tokenizer, row.tolist()) for row in answers]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts]


def in_order(text: str, images: list, videos: list) -> list:
    """Images and videos as `text` says `<image>` and `<video>`; without, images first.

    Raises ValueError unless the text has a place for each, or none at all.
    """
    marks = re.findall(f"{DEFAULT_IMAGE_TOKEN}|{DEFAULT_VIDEO_TOKEN}", text)
    if not marks:
        return images + videos
    for mark, own in ((DEFAULT_IMAGE_TOKEN, images), (DEFAULT_VIDEO_TOKEN, videos)):
        if (count := marks.count(mark)) != len(own):
            raise ValueError(
                f"the text says {mark} {count} times, for {len(own)} of them: write it once each"
            )
    left = {DEFAULT_IMAGE_TOKEN: iter(images), DEFAULT_VIDEO_TOKEN: iter(videos)}
    return [next(left[mark]) for mark in marks]


def with_marks(text: str, mark: str, separator: str) -> str:
    """The text with `mark` for every `<image>`, and `separator` for the line break behind it, with
    which texts are written for LLaVA."""
    text = text.replace(f"{DEFAULT_IMAGE_TOKEN}\n", DEFAULT_IMAGE_TOKEN + separator)
    return text.replace(DEFAULT_IMAGE_TOKEN, mark)
