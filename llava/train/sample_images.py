"""The images of training samples: where they stand in the text, how many tokens they take, and what
the model gets of them. One class for each kind of image processor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.front_end import with_marks
from llava.image_io import image_size
from llava.mm_utils import load_image, process_images
from llava.progress import progress

#: flags that bound the area of an image; names as in the image processor
PIXEL_BOUNDS = ("min_pixels", "max_pixels")
#: an image counts as so many words when batches are formed by length, whatever its size
IMAGE_WORDS = 128
#: threads that look at the sizes of images, which is mostly waiting
READERS = 16


class SampleImages:
    """Images of LLaVA: one per sample, all with the same number of tokens.

    args: `DataArguments` with `image_processor`, `mm_use_im_start_end`, `tokens_per_image` and, for
          anyres, `image_grid_pinpoints`
    """

    #: whether a sample may have several images
    several = False
    #: what stands for images behind the tokenizer, and may not be written in a text
    reserved: tuple[str, ...] = ()

    def __init__(self, args):
        self.args = args

    def measure(self, paths: Iterable[str]) -> dict[str, str]:
        """Looks at what `tokens` has to know of the images in these files; path -> what is wrong
        with an image."""
        return {}

    def tokens(self, paths: Sequence[str]) -> int:
        """How many tokens the images of a sample take; with a pruning method, or without the flag
        that says it, at least."""
        return getattr(self.args, "tokens_per_image", 1) * len(paths)

    def words(self, paths: Sequence[str]) -> int:
        """How many words the images of a sample count as."""
        return IMAGE_WORDS if paths else 0

    def marked(self, messages: Sequence[dict], conv: Conversation) -> list[dict]:
        """The messages with images where, and as, the model expects them."""
        return preprocess_multimodal(
            messages, conv, getattr(self.args, "mm_use_im_start_end", False)
        )

    def item(self, paths: Sequence[str]) -> dict:
        """What a sample with these images has besides text: `image` (3, H, W), or (1 + T, 3, H, W)
        with anyres, then with `image_size`; zeros without an image."""
        args, anyres = self.args, self.args.image_aspect_ratio == "anyres"
        if paths:
            image = load_image(paths[0])
            pixels, size = process_images([image], args.image_processor, args)[0], image.size
        else:
            crop = args.image_processor.crop_size
            size = crop["width"], crop["height"]
            pixels = torch.zeros(3, size[1], size[0])
        return {"image": pixels} | ({"image_size": size} if anyres else {})

    def blank(self) -> Tensor | None:
        """An image that shows nothing, for batches that hold none; None: every sample has one."""
        return None


class GridImages(SampleImages):
    """Images whose tokens follow from their size, in any number, where the text says `<image>`.

    args:      `DataArguments`
    processor: keeps proportions, see `Qwen2_5_VLImageProcessor`
    mark, separator: what stands for an image in a prompt, and between that and the text behind it
    """

    several = True
    reserved = ("<|image_pad|>", "<|video_pad|>")

    def __init__(self, args, processor, mark: str, separator: str):
        super().__init__(args)
        self.processor, self.mark, self.separator = processor, mark, separator
        self._tokens: dict[str, int] = {}

    def measure(self, paths):
        """Reads the heads of the files."""

        def look(path: str) -> tuple[int, str | None]:
            try:
                return math.prod(self.processor.grid(image_size(path))), None
            except (OSError, ValueError) as error:
                return 0, str(error)

        new = sorted(set(paths) - self._tokens.keys())
        with ThreadPoolExecutor(READERS) as pool:
            looks = pool.map(look, new, chunksize=64)
            found = dict(zip(progress(new, "sizes of images", "files"), looks, strict=True))
        self._tokens |= {path: count for path, (count, wrong) in found.items() if wrong is None}
        return {path: wrong for path, (_, wrong) in found.items() if wrong is not None}

    def tokens(self, paths):
        if getattr(self.args, "tokens_per_image", None) is not None:  # a method drops some
            return super().tokens(paths)
        return self.words(paths)

    def words(self, paths):
        return sum(self._tokens[path] for path in paths)

    def marked(self, messages, conv):
        return [
            {**message, "value": with_marks(message["value"], self.mark, self.separator)}
            for message in messages
        ]

    def item(self, paths):
        """`images`: (h, w, M, values) of each."""
        return {"images": self.processor.process_images([load_image(path) for path in paths])}

    def blank(self):
        """One token."""
        values = 3 * self.processor.temporal_patch_size * self.processor.patch_size**2
        return torch.zeros(1, 1, self.processor.merge_size**2, values)


def preprocess_multimodal(
    messages: Sequence[dict], conv: Conversation, mm_use_im_start_end: bool = False
) -> list[dict]:
    """The messages with each image mark moved to the front of its message, in the template's form.

    Several marks in one message collapse into one.
    """
    image = DEFAULT_IMAGE_TOKEN
    if "mmtag" in conv.version:
        image = f"<Image>{image}</Image>"
    if mm_use_im_start_end:
        marked = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        image = image.replace(DEFAULT_IMAGE_TOKEN, marked)
    out = []
    for message in messages:
        value = message["value"]
        if DEFAULT_IMAGE_TOKEN in value:
            text = value.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            value = f"{image}\n{text}".strip()
        out.append({**message, "value": value})
    return out
