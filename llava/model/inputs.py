"""Prompts and prepared images as the arguments of `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..devices import device_of


@dataclass(eq=False)
class Picture:
    """An image ready for the model; the same object stands for the same image.

    pixels: (3, S, S), (crops, 3, S, S), or what else the image processor makes of an image or a
            video: something with `shape` and `to`
    size:   (width, height) of the original
    """

    pixels: Tensor
    size: tuple[int, int]


def generate_inputs(
    model,
    prompts: list[Tensor],
    pictures: list[list[Picture]],
    questions: list[str],
    pad_id: int = 0,
) -> dict:
    """The arguments of `model.generate`, and of the model itself, that are a batch of prompts.

    prompts:   ids (L,) of every prompt, with -200 where an image goes
    pictures:  those of every prompt, in order
    questions: of every prompt, for methods that read it
    """
    ids, mask = pad_left(prompts, pad_id)
    device = device_of(model.get_input_embeddings())
    found: dict[str, Any] = {"input_ids": ids.to(device)}
    if not bool(mask.all()):
        found["attention_mask"] = mask.to(device)
    if own := [picture for row in pictures for picture in row]:
        found["images"] = stack_pixels(model, own)
        found["image_sizes"] = [picture.size for picture in own]
        rows = zip(pictures, questions, strict=True)
        found["questions"] = [question for row, question in rows for _ in row]
    return found


def stack_pixels(model, pictures: list[Picture]) -> Tensor | list[Tensor]:
    """The pixels on the device and in the type of the model; one tensor where shapes are equal."""
    device, dtype = device_of(model.get_vision_tower()), model.dtype
    pixels = [picture.pixels.to(device, dtype, non_blocking=True) for picture in pictures]
    alike = len({p.shape for p in pixels}) == 1 and all(isinstance(p, Tensor) for p in pixels)
    return torch.stack(pixels) if alike else pixels


def pad_left(rows: list[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Returns ids and attention mask (B, L) of prompts of different lengths."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return ids, mask
