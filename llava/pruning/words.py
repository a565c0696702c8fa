"""The words behind images, as judges of their tokens: which rows of attention to look at, and what
they say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .prefill import Prefill


@dataclass
class Words:
    """
    rows: (B, R) places of the words, of the last prompt token where there is none
    own:  (B, I, R) which of them stand behind each image of their row; behind an image without any,
          the last prompt token does
    """

    rows: Tensor
    own: Tensor


def words_behind(prefill: Prefill) -> Words:
    """All words behind the images of every row, without waiting for the device."""
    behind, last = prefill.text_behind(), prefill.last[:, None]  # (B, I, S)
    counts = prefill.counts
    # Only an image behind which there is no word needs the last token, and may come after others.
    most = max(1, *(count + (len(counts.images[0]) > 1) for count in counts.behind))
    if len(counts.images[0]) > 1 or min(counts.behind) == 0:
        end = torch.zeros_like(behind).scatter(2, last[:, None].expand(-1, behind.shape[1], 1), 1)
        behind = torch.where(behind.any(dim=-1, keepdim=True), behind, end)
    rows, real = prefill.places(behind.any(dim=1), most)
    own = behind.gather(2, rows[:, None].expand(-1, behind.shape[1], -1))
    return Words(rows, own & real[:, None])


def mean_attention(prefill: Prefill, rows: Tensor, judges: Tensor) -> Tensor:
    """(B, S) what the judges of the image that a token belongs to attend to it on average; text
    gets what those of the first image do.

    rows (B, R, S) of attention; judges (B, I, R) which of them judge each image
    """
    share = judges.float() / judges.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = share @ rows  # (B, I, S)
    if mean.shape[1] == 1:
        return mean[:, 0]
    return mean.gather(1, prefill.visual_index.clamp(min=0)[:, None])[:, 0]
