"""Conversation data: samples are read, tokenised and their images prepared when they are needed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
)
from llava.conversation import Conversation, default_conversation
from llava.mm_utils import load_image, process_images

from .labels import preprocess

# A sample with an image counts as this many words longer when batches are formed by length.
IMAGE_WORDS = 128


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


class LazySupervisedDataset(Dataset):
    """Samples of a JSON list, made one by one.

    data_path: file with `[{"id", "image"?, "conversations": [{"from", "value"}, ...]}, ...]`; image
               paths are relative to `data_args.image_folder`
    data_args: `DataArguments`; a multimodal run adds `image_processor`, `mm_use_im_start_end` and,
               for anyres, `image_grid_pinpoints`
    conv:      prompt template

    An item holds `input_ids` and `labels` (S,); in a multimodal run also `image` (3, H, W), zeros
    for a text-only sample, or (1 + T, 3, H, W) with anyres, then with `image_size` (width, height).
    """

    def __init__(self, data_path: str, tokenizer, data_args, conv: Conversation | None = None):
        with open(data_path, encoding="utf-8") as file:
            self.samples = json.load(file)
        self.tokenizer = tokenizer
        self.data_args = data_args
        self.conv = default_conversation if conv is None else conv

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> list[int]:
        """White-space separated words of each sample, IMAGE_WORDS more with an image."""
        return [_words(s) + (IMAGE_WORDS if "image" in s else 0) for s in self.samples]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each sample, negative without an image."""
        return [_words(s) if "image" in s else -_words(s) for s in self.samples]

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        sample = self.samples[i]
        messages, has_image = sample["conversations"], "image" in sample
        try:
            image = self._image(sample) if has_image else {}
            if has_image:
                messages = preprocess_multimodal(
                    messages, self.conv, getattr(self.data_args, "mm_use_im_start_end", False)
                )
                _check_marks(messages)
            item = preprocess(
                messages,
                self.tokenizer,
                self.conv,
                has_image,
                getattr(self.data_args, "label_masks", "exact"),
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"training sample {i} (id {sample.get('id')!r}): {error}") from error
        if not has_image and self.data_args.is_multimodal:
            image = self._no_image()
        return item | image

    def _image(self, sample: dict) -> dict:
        args = self.data_args
        image = load_image(os.path.join(args.image_folder or "", sample["image"]))
        pixels = process_images([image], args.image_processor, args)[0]
        anyres = args.image_aspect_ratio == "anyres"
        return {"image": pixels} | ({"image_size": image.size} if anyres else {})

    def _no_image(self) -> dict:
        crop = self.data_args.image_processor.crop_size
        size = (crop["width"], crop["height"])
        anyres = self.data_args.image_aspect_ratio == "anyres"
        zeros = torch.zeros(3, size[1], size[0])
        return {"image": zeros} | ({"image_size": size} if anyres else {})


def _words(sample: dict) -> int:
    return sum(len(message["value"].split()) for message in sample["conversations"])


def _check_marks(messages: list[dict]) -> None:
    marks = sum(DEFAULT_IMAGE_TOKEN in message["value"] for message in messages)
    if marks > 1:
        raise ValueError(f"{marks} messages hold {DEFAULT_IMAGE_TOKEN}, but a sample has one image")


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads a batch on the right and cuts it to `tokenizer.model_max_length`.

    Gives `input_ids`, `labels` and `attention_mask` (B, S), the mask from the lengths (an unknown
    token in the text is not padding); `images` (B, 3, H, W), or a list where shapes differ, and
    `image_sizes` where the samples have them.
    """

    tokenizer: object

    def __call__(self, instances: Sequence[dict]) -> dict:
        limit = self.tokenizer.model_max_length
        ids = [instance["input_ids"][:limit] for instance in instances]
        labels = [instance["labels"][:limit] for instance in instances]
        lengths = torch.tensor([len(row) for row in ids])
        batch = {
            "input_ids": pad_sequence(ids, True, self.tokenizer.pad_token_id),
            "labels": pad_sequence(labels, True, IGNORE_INDEX),
        }
        places = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = places < lengths[:, None]
        if "image" in instances[0]:
            images = [instance["image"] for instance in instances]
            same = len({image.shape for image in images}) == 1
            batch["images"] = torch.stack(images) if same else images
        if "image_size" in instances[0]:
            batch["image_sizes"] = [instance["image_size"] for instance in instances]
        return batch


def make_supervised_data_module(tokenizer, data_args, conv: Conversation | None = None) -> dict:
    """The Trainer's `train_dataset`, `eval_dataset` (None) and `data_collator`."""
    return {
        "train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args, conv),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }
