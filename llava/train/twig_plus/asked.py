"""Where a training sample asks: the token that scores its visual tokens, and these tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.model.prompt import Prompt
from llava.pruning.ops import true_first


@dataclass
class Asked:
    """Of a batch of samples with their answers (B, S):

    asking: (B, 1) place of the last token of the first question with an answer that is learned: the
            one in front of the first supervised token, which is the last of the prompt when the
            model is asked
    places: (B, V) places of the visual tokens in front of it, of all images, in order; V is at
            least 1
    real:   (B, V) which of `places` are: none where a sample has no image, or no answer
    """

    asking: Tensor
    places: Tensor
    real: Tensor

    @classmethod
    def of(cls, prompt: Prompt) -> Asked:
        supervised = (prompt.labels != IGNORE_INDEX) & prompt.attention_mask
        first = supervised.int().argmax(dim=1, keepdim=True)  # 0: there is none
        asking = (first - 1).clamp(min=0)
        place = torch.arange(supervised.shape[1], device=first.device)
        visual = (prompt.visual_index >= 0) & (place < first)
        most = max(1, *prompt.counts.visual)  # on the host, so nothing waits
        places = true_first(visual)[:, :most]
        return cls(asking, places, visual.gather(1, places))
