"""Qwen2.5-VL: a vision tower for images of any grid before a decoder with positions on three axes.

Prompts are those of the other families, with -200 where an image goes; prompts in the form of
transformers, with a run of `image_token_id` for every image, are taken as well.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from ...constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from ...pruning.base import Pruner
from ...pruning.tokens import ImageTokens
from ..block_encoding import BlockEncoding
from ..kv_cache import holds_tokens
from ..multimodal_encoder.qwen2_5_vl_encoder import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionTower
from ..multimodal_encoder.qwen2_5_vl_images import VIDEOS, split_images
from ..prompt import Prompt
from ..pruner_slot import PrunerSlot
from ..splice import Splice, on_host
from .causal_lm import VisionLanguageForCausalLM
from .modeling_llama import LlamaModel

#: frequencies that time, height and width turn in the released models
RELEASED_SECTIONS = (16, 24, 24)


class Qwen2_5_VLConfig(Qwen2Config):
    """Sizes of the decoder, and `vision_config` with those of the tower."""

    model_type = "qwen2_5_vl"
    #: queries, keys and values have biases, the output has none
    qkv_bias = True
    #: what stands for an image in a prompt, and between that and the question
    image_mark = f"<|vision_start|>{DEFAULT_IMAGE_TOKEN}<|vision_end|>"
    image_separator = ""

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
        if not isinstance(vision_config, Qwen2_5_VLVisionConfig):
            vision_config = Qwen2_5_VLVisionConfig(**(vision_config or {}))
        self.vision_config = vision_config
        sections = (rope_scaling or {}).get("mrope_section", RELEASED_SECTIONS)
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

    @property
    def patch_grid(self) -> None:
        """Every image has a grid of its own."""
        return None

    def follow_method(self, pruner: Pruner) -> None:
        """Images are the same for every method."""

    def forward(
        self, input_ids=None, *args, pixel_values=None, image_grid_thw=None, images=None, **kwargs
    ):
        """As of the other families; images may also come as transformers has them: `pixel_values`
        (patches, values) and `image_grid_thw` (images, 3)."""
        images = self._images(images, pixel_values, image_grid_thw)
        continues = holds_tokens(kwargs.get("past_key_values"))
        if images is None and input_ids is not None and not continues:
            if (input_ids == self.config.image_token_id).any():
                raise ValueError("the prompt holds <|image_pad|> tokens, but no images were given")
        return super().forward(input_ids, *args, images=images, **kwargs)

    @torch.no_grad()
    def generate(
        self, inputs=None, images=None, *, pixel_values=None, image_grid_thw=None, **kwargs
    ):
        """As of the other families, with `images` as `process_images` makes them, (h, w, 4, values)
        each, or `pixel_values` and `image_grid_thw` as transformers has them."""
        images = self._images(images, pixel_values, image_grid_thw)
        return super().generate(inputs, images=images, **kwargs)

    def _images(self, images, pixel_values, image_grid_thw):
        if pixel_values is None:
            return images
        if images is not None or image_grid_thw is None:
            raise ValueError("pass either images, or pixel_values together with image_grid_thw")
        return split_images(pixel_values, image_grid_thw, self.visual.config.spatial_merge_size)

    def read_prompts(self, input_ids, attention_mask, labels, images):
        """As of the other families; runs of `image_token_id` are taken for marks."""
        ids, mask = on_host(input_ids, attention_mask)
        config, shown = self.config, ids.masked_fill(~mask, 0)
        if (shown == config.video_token_id).any():
            raise ValueError(f"the prompt holds <|video_pad|> tokens: {VIDEOS}")
        if (shown == config.image_token_id).any():
            counts = [image_length(image) for image in (() if images is None else images)]
            ids, mask, labels = runs_to_marks(ids, mask, labels, counts, config.image_token_id)
            input_ids = ids.to(input_ids.device)
        return input_ids, ids, mask, labels

    def ids_for_rules(self, prompt: Prompt, ids: Tensor, mask: Tensor) -> Tensor:
        """What transformers would have had."""
        return expanded_ids(prompt, ids, mask, self.config.image_token_id)


def image_length(image: Tensor | ImageTokens) -> int:
    """Tokens that an image takes in a prompt."""
    return image.length if isinstance(image, ImageTokens) else image.shape[0] * image.shape[1]


def runs_to_marks(
    ids: Tensor, mask: Tensor, labels: Tensor | None, counts: list[int], image_id: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ids, mask, labels) with one mark in place of every run of `image_id`, padded on the left.

    ids, mask, labels: (B, L), the first two on the host; counts: tokens of every image, in order
    Raises ValueError where the runs are not those of the images.
    """
    rows, left = [], list(counts)
    for row, shown in zip(ids.numpy(), mask.numpy(), strict=True):
        if (row[shown] == IMAGE_TOKEN_INDEX).any():
            raise ValueError(
                f"the prompt marks images by {IMAGE_TOKEN_INDEX} as well as by <|image_pad|> "
                f"({image_id}): use one of them"
            )
        places = np.flatnonzero((row == image_id) & shown)
        dropped = np.zeros(len(row), dtype=bool)
        while len(places):
            size = left.pop(0) if left else 0
            run = places[:size]
            if not size or len(run) < size or run[-1] - run[0] != size - 1:
                raise ValueError(
                    f"the <|image_pad|> tokens of the prompts do not fit {len(counts)} images of "
                    f"{', '.join(map(str, counts)) or 'no'} tokens: every image needs a run of its "
                    "own length"
                )
            dropped[run[1:]], places = True, places[size:]
        rows.append(np.flatnonzero(shown & ~dropped))
    longest = max(map(len, rows))
    index = torch.from_numpy(np.stack([np.pad(row, (longest - len(row), 0)) for row in rows]))
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    mask = torch.arange(longest) >= longest - lengths
    ids = ids.gather(1, index)
    ids = ids.masked_fill((ids == image_id) & mask, IMAGE_TOKEN_INDEX)
    if labels is not None:
        labels = labels.gather(1, index.to(labels.device))
        labels = labels.masked_fill(~mask.to(labels.device), IGNORE_INDEX)
    return ids, mask, labels


def expanded_ids(prompt: Prompt, ids: Tensor, mask: Tensor, image_id: int) -> Tensor:
    """(B, S) ids of the prompts as the decoder sees them, `image_id` for every token of an image.
    Padding repeats the first token of its row, so that it adds nothing a rule could look at.

    ids, mask: (B, L) with marks, on the host
    """
    text = (ids != IMAGE_TOKEN_INDEX) & mask
    order = (~text).to(torch.uint8).argsort(dim=1, stable=True)
    packed = ids.gather(1, order).clamp(min=0).to(prompt.visual_index.device)
    is_text = prompt.attention_mask & (prompt.visual_index < 0)
    rank = (is_text.cumsum(dim=1) - 1).clamp(min=0)
    known = packed.gather(1, rank).masked_fill(prompt.visual_index >= 0, image_id)
    first = prompt.attention_mask.to(torch.uint8).argmax(dim=1, keepdim=True)
    return torch.where(prompt.attention_mask, known, known.gather(1, first))


AutoConfig.register(Qwen2_5_VLConfig.model_type, Qwen2_5_VLConfig)
AutoModelForCausalLM.register(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
