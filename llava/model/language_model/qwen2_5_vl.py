"""Qwen2.5-VL: a vision tower for images of any grid before a decoder with positions on three axes.

Prompts are those of the other families, with -200 where an image or a video goes; prompts in the
form of transformers, with a run of `image_token_id` for every image and of `video_token_id` for
every video, are taken as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from ...constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from ...pruning.base import Pruner
from ...pruning.ops import true_first
from ...pruning.tokens import PAIRS, ImageTokens
from ..block_encoding import BlockEncoding, image_length
from ..kv_cache import holds_tokens
from ..multimodal_encoder.qwen2_5_vl_encoder import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionTower
from ..multimodal_encoder.qwen2_5_vl_images import split_images
from ..multimodal_encoder.qwen2_5_vl_videos import Video, split_videos
from ..prompt import Prompt
from ..pruner_slot import PrunerSlot
from ..qwen2_5_vl_rules import check_own, flat
from ..splice import Splice
from .causal_lm import VisionLanguageForCausalLM
from .modeling_llama import LlamaModel

#: images and videos as the processor of transformers names them
NAMED_PIXELS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)
#: frequencies that time, height and width turn in the released models
RELEASED_SCALING = {"type": "mrope", "mrope_section": [16, 24, 24]}


class Qwen2_5_VLConfig(Qwen2Config):
    """Sizes of the decoder, and `vision_config` with those of the tower."""

    model_type = "qwen2_5_vl"
    #: queries, keys and values have biases, the output has none
    qkv_bias = True
    #: what stands for an image or a video in a prompt, and between that and the question
    image_mark = f"<|vision_start|>{DEFAULT_IMAGE_TOKEN}<|vision_end|>"
    image_separator = ""
    #: what its tokenizer has for an image and for a video, which no question may hold
    reserved_texts = ("<|image_pad|>", "<|video_pad|>")

    def __init__(
        self,
        vision_config: dict | Qwen2_5_VLVisionConfig | None = None,
        rope_scaling: dict | None = None,
        image_token_id: int = 151655,
        video_token_id: int = 151656,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
        **kwargs,
    ):
        super().__init__(**kwargs)
        made = vision_config if isinstance(vision_config, Qwen2_5_VLVisionConfig) else None
        tower: Any = (vision_config or {}) if made is None else made.to_dict()
        given = flat({**kwargs, **({"rope_scaling": rope_scaling} if rope_scaling else {})})
        given["rope_scaling"] = given.get("rope_scaling") or RELEASED_SCALING
        given |= {"vision_config": tower, "hidden_size": self.hidden_size}
        check_own(given, "the config of Qwen2.5-VL")
        self.vision_config = Qwen2_5_VLVisionConfig(**tower) if made is None else made
        sections = given["rope_scaling"]["mrope_section"]
        self.rope_scaling = {"type": "mrope", "mrope_section": list(sections)}
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id

    def to_diff_dict(self) -> dict:
        """What is saved: every size of the tower, as other programs may have other defaults."""
        return super().to_diff_dict() | {"vision_config": self.vision_config.to_diff_dict()}


class Qwen2_5_VLTextModel(LlamaModel):
    config_class = Qwen2_5_VLConfig


class Qwen2_5_VLForConditionalGeneration(
    BlockEncoding, Splice, PrunerSlot, VisionLanguageForCausalLM
):
    """The whole model, with a pruning method in use: see `pruner`."""

    config_class = Qwen2_5_VLConfig
    model_class = Qwen2_5_VLTextModel
    position_axes = (3,)
    position_policy = "grid"  # of every method: see `VisionStage.position_policy`
    _no_split_modules = ["DecoderLayer", "Qwen2_5_VLVisionTower"]

    def __init__(self, config: Qwen2_5_VLConfig):
        super().__init__(config)
        self.visual = Qwen2_5_VLVisionTower(config.vision_config)
        self.post_init()

    def get_model(self) -> Qwen2_5_VLTextModel:
        return self.model

    def get_vision_tower(self) -> Qwen2_5_VLVisionTower:
        return self.visual

    def follow_method(self, pruner: Pruner) -> dict:
        """Images are the same for every method."""
        return {}

    def forward(self, input_ids=None, attention_mask=None, *args, images=None, **kwargs):
        """As of the other families; images and videos may also come as transformers has them, see
        `NAMED_PIXELS`."""
        continues = holds_tokens(kwargs.get("past_key_values"))
        # A single token, a step of decoding, does not wait for the device.
        if continues and input_ids is not None and input_ids.shape[1] > 1:
            why = " behind a filled past_key_values: all images belong to the prompt that fills it"
            self._refuse_pads(input_ids, why)
        images = self._images(input_ids, attention_mask, images, kwargs)
        if images is None and input_ids is not None and not continues:
            shown = without_padding(input_ids, attention_mask)
            self._refuse_pads(shown, ", but no images were given")
        return super().forward(input_ids, attention_mask, *args, images=images, **kwargs)  # type: ignore[misc] # beyond `args`

    @torch.no_grad()
    def generate(self, inputs=None, images=None, **kwargs):  # type: ignore[override] # the rest: kwargs
        """As of the other families, with `images` as `process_images` makes them, (h, w, 4, values)
        each, videos as `process_video` does, or both as transformers has them: `pixel_values`
        (patches, values) and `image_grid_thw` (images, 3), `pixel_values_videos`, `video_grid_thw`
        and `second_per_grid_ts` (seconds that a pair of frames lasts; 1 without it). `questions`
        follow the order of images and videos in the prompts."""
        mask = kwargs.get("attention_mask")
        images = self._images(kwargs.get("input_ids", inputs), mask, images, kwargs)
        return super().generate(inputs, images=images, **kwargs)

    def _pads(self) -> dict[int, str]:
        """The tokens that stand for images and videos in prompts of transformers."""
        ids = self.config.image_token_id, self.config.video_token_id
        return dict(zip(ids, self.config.reserved_texts, strict=True))

    def _refuse_pads(self, ids: Tensor, why: str) -> None:
        """Raises ValueError where prompts (B, L) hold a token that stands for an image or video."""
        for token, what in self._pads().items():
            if (ids == token).any():
                raise ValueError(f"the prompt holds {what} tokens{why}")

    def _images(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, images, keywords: dict
    ):
        """`images` in the order of the prompts, from what `keywords` have of `NAMED_PIXELS`, which
        is taken out of them."""
        given = {name: keywords.pop(name, None) for name in NAMED_PIXELS}
        pixels, grids, video_pixels, video_grids, seconds = given.values()
        if pixels is None and video_pixels is None:
            return images
        unequal = (pixels is None) != (grids is None)
        if images is not None or unequal or (video_pixels is None) != (video_grids is None):
            raise ValueError(
                "pass either images, or pixel_values together with image_grid_thw, and "
                "pixel_values_videos together with video_grid_thw"
            )
        merge = self.visual.config.spatial_merge_size
        found = [] if pixels is None else split_images(pixels, grids, merge)
        if video_pixels is None:
            return found
        videos = split_videos(video_pixels, video_grids, seconds, merge)
        if not found or input_ids is None:
            return found + videos
        shown = without_padding(input_ids, attention_mask)
        return in_order(shown, found, videos, *self._pads())

    def padding_side_of(self, mask: Tensor) -> str:
        """As of the other families; where the config names none, the side that the prompts
        themselves are padded on, so that logits stand where transformers has them."""
        if getattr(self.config, "tokenizer_padding_side", None) is None:
            padded = not mask.all() and mask[:, -1].all()
            return "left" if padded else "right"
        return super().padding_side_of(mask)

    def read_prompts(self, input_ids, ids, mask, labels, images):
        """As of the other families; runs of `image_token_id` and `video_token_id` are taken for
        marks."""
        shown = without_padding(ids, mask)
        if any((shown == token).any() for token in self._pads()):
            runs = [
                (self._pad_of(image), image_length(image))
                for image in (() if images is None else images)
            ]
            ids, mask, labels = runs_to_marks(ids, mask, labels, runs, self._pads())
            input_ids = ids.to(input_ids.device)
        return input_ids, ids, mask, labels

    def _pad_of(self, image: Tensor | Video | ImageTokens) -> int:
        """The token that stands for this image or video."""
        video = isinstance(image, Video) or getattr(image, "frame_pairs", 0) > 0
        return self.config.video_token_id if video else self.config.image_token_id

    def ids_for_rules(self, prompt: Prompt, ids: Tensor, mask: Tensor) -> Tensor:
        """What transformers would have had."""
        return expanded_ids(prompt, ids, mask, *self._pads())


def without_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Prompts (B, L) with 0 for what stands for nothing, which may be any token."""
    if attention_mask is None:
        return input_ids
    return input_ids.masked_fill(~attention_mask.to(input_ids.device, torch.bool), 0)


def in_order(
    input_ids: Tensor, images: list[Tensor], videos: list[Video], image_id: int, video_id: int
) -> list[Tensor | Video]:
    """Images and videos as their runs stand in prompts (B, L), row after row; what has no run comes
    last."""
    left: dict[int, list[Any]] = {image_id: list(images), video_id: list(videos)}
    ordered: list[Any] = []
    rows = input_ids.cpu()
    marks = rows[(rows == image_id) | (rows == video_id)].tolist()
    place = 0
    while place < len(marks) and left[marks[place]]:
        ordered.append(left[marks[place]].pop(0))
        place += image_length(ordered[-1])
    return ordered + left[image_id] + left[video_id]


def runs_to_marks(
    ids: Tensor,
    mask: Tensor,
    labels: Tensor | None,
    runs: list[tuple[int, int]],
    pads: dict[int, str],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ids, mask, labels) with one mark in place of every run of a pad, padded on the left.

    ids, mask, labels: (B, L), the first two on the host
    runs: (pad, tokens) of every image and video, in order
    pads: what the pads are called
    Raises ValueError where the runs of the prompts are others.
    """
    rows, left, kinds = [], list(runs), torch.tensor(list(pads))
    is_pad = torch.isin(ids, kinds) & mask
    for row, shown, padded in zip(ids.numpy(), mask.numpy(), is_pad.numpy(), strict=True):
        if (row[shown] == IMAGE_TOKEN_INDEX).any():
            names = " and ".join(f"{name} ({pad})" for pad, name in pads.items())
            raise ValueError(
                f"the prompt marks images by {IMAGE_TOKEN_INDEX} as well as by {names}: use one of "
                "them"
            )
        places = np.flatnonzero(padded)
        dropped = np.zeros(len(row), dtype=bool)
        while len(places):
            pad, size = left.pop(0) if left else (None, 0)
            run = places[:size]
            if len(run) < max(size, 1) or run[-1] - run[0] != size - 1 or (row[run] != pad).any():
                raise ValueError(unlike_runs(runs, pads))
            dropped[run[1:]], places = True, places[size:]
        rows.append(np.flatnonzero(shown & ~dropped))
    longest = max(map(len, rows))
    index = torch.from_numpy(np.stack([np.pad(row, (longest - len(row), 0)) for row in rows]))
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    mask = torch.arange(longest) >= longest - lengths
    ids = ids.gather(1, index)
    ids = ids.masked_fill(torch.isin(ids, kinds) & mask, IMAGE_TOKEN_INDEX)
    if labels is not None:
        labels = labels.gather(1, index.to(labels.device))
        labels = labels.masked_fill(~mask.to(labels.device), IGNORE_INDEX)
    return ids, mask, labels


def unlike_runs(runs: list[tuple[int, int]], pads: dict[int, str]) -> str:
    """What to say where prompts have other runs than those of their images."""
    needed = [f"{size} {pads[pad]}" for pad, size in runs]
    return (
        f"the runs of {' and '.join(pads.values())} in the prompts are not those of the "
        f"{len(runs)} images and videos, which need {', '.join(needed) or 'none'}, in this order"
    )


def expanded_ids(prompt: Prompt, ids: Tensor, mask: Tensor, image_id: int, video_id: int) -> Tensor:
    """(B, S) ids of the prompts as the decoder sees them, `image_id` for every token of an image,
    `video_id` for those of a video. Padding repeats the first token of its row, so that it adds
    nothing a rule could look at.

    ids, mask: (B, L) with marks, on the host
    """
    text = (ids != IMAGE_TOKEN_INDEX) & mask
    order = true_first(text)
    owner = prompt.visual_index
    packed = ids.gather(1, order).clamp(min=0).to(owner.device)
    is_text = prompt.attention_mask & (owner < 0)
    rank = (is_text.cumsum(dim=1) - 1).clamp(min=0)
    known = packed.gather(1, rank).masked_fill(owner >= 0, image_id)
    for row, images in enumerate(prompt.image_extras.get(PAIRS, [])):
        for number in (number for number, pairs in enumerate(images) if pairs):
            known[row].masked_fill_(owner[row] == number, video_id)
    first = prompt.attention_mask.to(torch.uint8).argmax(dim=1, keepdim=True)
    return torch.where(prompt.attention_mask, known, known.gather(1, first))


AutoConfig.register(Qwen2_5_VLConfig.model_type, Qwen2_5_VLConfig)
AutoModelForCausalLM.register(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
