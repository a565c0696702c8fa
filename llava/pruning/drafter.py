"""What a method offers that guesses the next tokens; `llava.model.self_speculative` runs it.

Paper: Growing a Twig to Accelerate Large Vision-Language Models, https://arxiv.org/abs/2503.14075
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Drafter:
    """Layers, norm and head that continue the first `shared_layers` layers of a decoder.

    shared_layers:    decoder layers that drafter and decoder have in common
    layers:           decoder layers whose `layer_idx` follows those of the decoder, so that one
                      cache serves both
    head:             (B, S, D) after `norm` -> logits
    num_speculations: most tokens guessed in a row
    draft_stop_prob:  a guess with a smaller probability is the last one of its step
    """

    shared_layers: int
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    num_speculations: int = 5
    draft_stop_prob: float = 0.6

    def __post_init__(self):
        number, stop = self.num_speculations, self.draft_stop_prob
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"num_speculations ({number!r}) must be a whole number from 0 on")
        if not 0 <= stop <= 1:
            raise ValueError(f"draft_stop_prob ({stop!r}) must lie between 0 and 1")

    def logits(self, x: Tensor) -> Tensor:
        """fp32 logits (B, S, V) from the output (B, S, D) of the last of `layers`."""
        return self.head(self.norm(x)).float()
