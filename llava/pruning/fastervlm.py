"""FasterVLM: keep the patches that the class token attends to most.

Paper: [CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference
Faster, https://arxiv.org/abs/2412.01818v1

Differs from the release: scores stay fp32 with stable ties (there, they are rounded to half
precision first, and equal ones fall as the device likes); one row of one layer is computed (there,
the maps of all layers); a budget must be given as a number that fits (there, the default crashes);
in a tower without a class token the attention that a patch receives from all takes its place.
"""

from dataclasses import dataclass

from torch import Tensor

from .base import SelectPruner
from .ops import top_stable
from .sinks import SinkFilter
from .tokens import VisionTokens


@dataclass
class FasterVLM(SinkFilter, SelectPruner):
    """
    visual_token_num: tokens per image (paper: 288, 144, 58 and 29 of 576); on LLaVA-NeXT the sum
                      over five crops, so that an image cut into three keeps three fifths of it
    sink_ratio:       share of the patches left out, those of the largest norm; 0: none
    """

    visual_token_num: int = 144

    name = "fastervlm"
    needs = frozenset({"salience"})
    anyres_config = {"anyres_selection": "fill", "mm_patch_merge_type": "spatial"}

    def select(self, vision: VisionTokens) -> Tensor:
        return top_stable(vision.cue("salience"), self.num_keep(vision))
