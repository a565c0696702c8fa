"""From images and text to what the model reads: pixel tensors and token ids."""

import math
import os
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import StoppingCriteria
from transformers.image_utils import ChannelDimension

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conv_mode import choose_conv_mode
from llava.image_io import (
    expand2square,
    load_image,
    load_image_from_base64,
    resized_square,
    to_rgb,
)
from llava.image_settings import ImageSettings, read_pinpoints

__all__ = [
    "KeywordsStoppingCriteria",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "infer_conv_mode",
    "load_image",
    "load_image_from_base64",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]


# Image preparation: sizes are (width, height), tiles are square and row-major.

#: what a tokenizer of transformers calls its warning of a long text
TOO_MANY_TOKENS = "sequence-length-is-longer-than-the-specified-maximum"
BYTES_PER_CHARACTER = 4  # and so the most tokens that one character can take
BROKEN = "\ufffd"  # what stands for bytes that are no character
LONGEST = 32  # times the shorter side that are enlarged before the middle is cut out


def select_best_resolution(
    original_size, possible_resolutions, selection: str = "area"
) -> tuple[int, int] | None:
    """The candidate that shows most of the image, and among equals wastes the fewest pixels.

    Both arguments hold (width, height) in pixels; the earlier candidate wins ties. None when the
    image is so thin that no candidate would show a single pixel of it.
    selection: "area" as above; "fill": the candidate the enlarged image fills to the largest share
    """
    if selection not in ("area", "fill"):
        raise ValueError(f"unknown anyres_selection {selection!r}, choose from area, fill")
    width, height = original_size
    best, best_rank = None, (0, 0)
    for target_width, target_height in possible_resolutions:
        scale = min(target_width / width, target_height / height)
        area = int(width * scale) * int(height * scale)
        effective = min(area, width * height)  # enlarging shows nothing new
        rank = (effective, -target_width * target_height)
        if selection == "fill":
            rank = (area / (target_width * target_height), 0)
        if effective > 0 and (best is None or rank > best_rank):
            best, best_rank = (target_width, target_height), rank
    return best


def resize_and_pad_image(image: Image.Image, target_resolution) -> Image.Image:
    """The whole image, as large as fits into (width, height), centred on black; RGB."""
    width, height = image.size
    target_width, target_height = target_resolution
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        size = target_width, min(math.ceil(height * scale_width), target_height)
    else:
        size = min(math.ceil(width * scale_height), target_width), target_height
    corner = (target_width - size[0]) // 2, (target_height - size[1]) // 2
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(image.resize(size), corner)
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square tiles of `patch_size` pixels, row by row; black where a tile leaves the image."""
    width, height = image.size
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, height, patch_size)
        for left in range(0, width, patch_size)
    ]


def get_anyres_image_grid_shape(
    image_size, grid_pinpoints, patch_size: int, selection: str = "area"
) -> tuple[int, int]:
    """(tiles across, tiles down) that an image of (width, height) is cut into.

    grid_pinpoints: list of (width, height), or the same list as text
    patch_size:     side of a tile in pixels
    selection:      as in `select_best_resolution`
    """
    width, height = _anyres_resolution(image_size, grid_pinpoints, selection)
    return width // patch_size, height // patch_size


def process_anyres_image(
    image: Image.Image, processor, grid_pinpoints, selection: str = "area"
) -> torch.Tensor:
    """Overview and T tiles of one image, (1 + T, 3, S, S) float32.

    The overview is the whole image squeezed into one tile; the tiles keep its proportions.
    """
    padded = resize_and_pad_image(image, _anyres_resolution(image.size, grid_pinpoints, selection))
    side = processor.size["shortest_edge"]
    tiles = divide_to_patches(padded, processor.crop_size["height"])
    return _pixel_values([image.resize((side, side)), *tiles], processor)


def process_images(images: list[Image.Image], image_processor, model_cfg):
    """Pixels for the vision tower, prepared as `model_cfg` says: `model.image_settings`, the config
    of the model, or anything with the values of one, see `ImageSettings`. Its `image_aspect_ratio`:

    "pad":    padded to a square with the mean colour, (n, 3, S, S)
    "anyres": overview and tiles, (n, 1 + T, 3, S, S), or a list of n tensors (1 + T, 3, S, S)
              when the images differ in their number of tiles
    else:     shorter side resized to S, centre crop, (n, 3, S, S)

    Transparent parts become white. Images are prepared one after the other, in memory that does not
    grow with the square of their longer side. A processor that keeps proportions has a
    `process_images` of its own, which is called instead: a list of n tensors.
    """
    if own := getattr(image_processor, "process_images", None):
        return own(images)
    settings = ImageSettings.of(model_cfg)
    pixels = [_process_image(to_rgb(image), image_processor, settings) for image in images]
    if settings.image_aspect_ratio != "anyres":
        return torch.cat(pixels)
    return torch.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels


def _process_image(image: Image.Image, processor, settings: ImageSettings) -> torch.Tensor:
    """(1, 3, S, S), or with "anyres" (1 + T, 3, S, S), of an RGB image."""
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} pixels shows nothing")
    if settings.image_aspect_ratio == "anyres":
        pinpoints, selection = settings.image_grid_pinpoints, settings.anyres_selection
        return process_anyres_image(image, processor, pinpoints, selection)
    if settings.image_aspect_ratio == "pad":
        mean_color = tuple(int(255 * mean) for mean in processor.image_mean)
        side = processor.size.get("shortest_edge")
        if side and processor.do_resize:
            image = resized_square(image, mean_color, side, processor.resample)
        else:
            image = expand2square(image, mean_color)
    else:
        image = _middle(image)
    return _pixel_values([image], processor)


def _middle(image: Image.Image) -> Image.Image:
    """The image, or of one that is extremely long the part around its middle that is looked at.

    What is cut off is a multiple of the shorter side, the same on both ends, so that the centre
    crop stays where it was.
    """
    width, height = image.size
    shorter, longer = sorted(image.size)
    cut = (longer - LONGEST * shorter) // (2 * shorter) * shorter
    if cut <= 0:
        return image
    left, top = (cut, 0) if width > height else (0, cut)
    return image.crop((left, top, width - left, height - top))


def _anyres_resolution(image_size, grid_pinpoints, selection: str) -> tuple[int, int]:
    grid_pinpoints = read_pinpoints(grid_pinpoints)
    best = select_best_resolution(image_size, grid_pinpoints, selection)
    if best is None:
        width, height = image_size
        raise ValueError(f"an image of {width} x {height} is too thin for any of {grid_pinpoints}")
    return best


def _pixel_values(images: list[Image.Image], processor) -> torch.Tensor:
    # The layout is said, not guessed: an image of 1 or 3 rows looks like channels first.
    batch = processor.preprocess(
        images, return_tensors="pt", input_data_format=ChannelDimension.LAST
    )
    return batch["pixel_values"]


# Text.


def tokenizer_image_token(
    prompt: str,
    tokenizer,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors=None,
    num_images: int | None = None,
):
    """Token ids of `prompt` with one `image_token_index` for every "<image>" in it.

    num_images: how many there are; an "<image>" after that many is text. None: all are marks

    The text between images is tokenised piece by piece, each as the start of a string. Returns a
    list, or a 1-D LongTensor for `return_tensors="pt"`.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"Unsupported tensor type: {return_tensors}")
    # Too many tokens are counted where images have their place among them; a tokenizer that warns
    # by itself counts text alone, and promises errors that do not come.
    getattr(tokenizer, "deprecation_warnings", {})[TOO_MANY_TOKENS] = True
    pieces = prompt.split(DEFAULT_IMAGE_TOKEN, -1 if num_images is None else num_images)
    chunks = [tokenizer(text).input_ids for text in pieces]
    has_bos = bool(chunks[0]) and chunks[0][0] == tokenizer.bos_token_id
    ids = chunks[0][:]
    for chunk in chunks[1:]:
        ids.append(image_token_index)
        ids.extend(chunk[has_bos:])
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


def known_ids(tokenizer, ids: list[int]) -> list[int]:
    """The ids that are tokens. A table may have more rows, which can be drawn like any other; fast
    tokenizers pass them over, the others fail."""
    size = getattr(tokenizer, "vocab_size", None)
    if size is None or all(number < size for number in ids):
        return ids
    added = tokenizer.added_tokens_decoder
    return [number for number in ids if number < size or number in added]


def get_model_name_from_path(model_path: str) -> str:
    """Last folder of the path; `checkpoint-*` folders are prefixed with their parent's name.

    A path that does not say these names itself (".", "checkpoint-7") is looked at from where the
    program runs.
    """
    folders = [folder for folder in model_path.split("/") if folder not in ("", ".")]
    alone = len(folders) < 2 and not model_path.startswith("/")
    if alone and (folders or ["checkpoint-"])[-1].startswith("checkpoint-") or ".." in folders:
        folders = os.path.abspath(model_path).strip("/").split("/")
    if len(folders) < 2 or not folders[-1].startswith("checkpoint-"):
        return folders[-1] if folders else "/"
    return f"{folders[-2]}_{folders[-1]}"


def infer_conv_mode(model_name: str, config=None) -> str:
    """Name of the template a checkpoint was trained with.

    config: of the loaded model, which knows more than the name it goes by; see
            `llava.conv_mode.choose_conv_mode`, which also says why
    """
    return choose_conv_mode(config, model_name).name


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops generation when every row ends with a keyword.

    A row ends with a keyword when its last ids are the keyword's, or when its text contains the
    keyword only thanks to the last `max_keyword_len` new tokens. The prompt never counts.

    keywords:  texts to stop at
    input_ids: (B, S) ids given to `generate`. The rows seen later may repeat them or, when
               generation starts from embeddings, hold the new tokens only; both are recognised.
    """

    def __init__(self, keywords: list[str], tokenizer, input_ids: torch.Tensor):
        if not keywords or not all(keywords):
            raise ValueError(f"keywords must be a list of non-empty texts, not {keywords!r}")
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.prompt = input_ids
        self.start_len = input_ids.shape[1]
        self._endings = [self._without_bos(text) for text in self.keywords]
        self.keyword_ids = [torch.tensor(ids) for ids in self._endings]
        self.max_keyword_len = max(map(len, self._endings))

    def __call__(self, output_ids: torch.LongTensor, scores=None, **kwargs) -> bool:
        # Within an answer a keyword may be of more tokens than alone: "\n###" has no "▁###".
        last = max(self.max_keyword_len, most_tokens(self.keywords))
        last_ids = self._new_ids(output_ids)[:, -last:].tolist()
        return all(self._ends_with_keyword(row) for row in last_ids)

    def _without_bos(self, text: str) -> list[int]:
        ids = self.tokenizer(text).input_ids
        return ids[1:] if len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id else ids

    def know_prompt(self, prompt_ids: torch.Tensor) -> None:
        """Called by models whose rows begin with other ids (B, P) of the prompts than were given,
        for example those with an id for every token of an image."""
        self.prompt, self.start_len = prompt_ids, prompt_ids.shape[1]

    def _new_ids(self, output_ids):
        prompt = self.prompt[0].to(output_ids.device)
        if torch.equal(output_ids[0, : self.start_len], prompt):
            return output_ids[:, self.start_len :]
        # transformers 4.37 puts a BOS in front when it generates from embeddings.
        bos = self.tokenizer.bos_token_id
        has_bos = bos is not None and bool((output_ids[:, :1] == bos).all())
        return output_ids[:, int(has_bos) :]

    def _ends_with_keyword(self, row: list[int]) -> bool:
        if not row:
            return False
        if any(row[-len(ids) :] == ids for ids in self._endings):
            return True
        return any(self._holds(row, keyword) for keyword in self.keywords)

    def _holds(self, row: list[int], keyword: str) -> bool:
        def holds(ids: list[int]) -> bool:
            return holds_text(self.tokenizer, ids, [keyword], skip_special_tokens=True)

        last = self.max_keyword_len
        return holds(row) and (not holds(row[:-last]) or holds(row[-last:]))


def most_tokens(texts: Sequence[str]) -> int:
    """So many tokens one of the texts can take, and one before them: the first of some tokens loses
    its space where a tokenizer of Llama decodes them."""
    return max(len(text.encode()) for text in texts) + 1


def holds_text(tokenizer, ids: list[int], texts: Sequence[str], **options) -> bool:
    """Whether the text of the last tokens of an answer contains one of `texts`; options: of
    `tokenizer.decode`."""
    ids = known_ids(tokenizer, ids)
    for start in range(min(len(ids), BYTES_PER_CHARACTER)):
        tail = tokenizer.decode(ids[start:], **options)
        if any(text in tail for text in texts):
            return True
        if not tail.startswith(BROKEN):
            return False
        # Half of a character: beside it, fast tokenizers of Llama show no line break either.
    return False
