"""CDPruner: the subset with the largest determinant of a kernel of similarity and relevance.

Paper: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs,
https://arxiv.org/abs/2506.10967

Differs from the release: relevance is scaled within an image (there, over the whole batch, so that
the answer depends on what else is asked); constant relevance counts as none (there, a division by
zero); what depends linearly on the picks comes last, most relevant first, and no token is picked
twice (there, fewer tokens than asked for remain); a batch may mix questions of any length; without
a question, diversity alone decides (there, an error); no streams, no device-wide synchronisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import SelectPruner
from .captured import captured
from .clip_text import RELEVANCE, AsksClip
from .extras import with_extra, without_extra
from .ops import NEGLIGIBLE, normalize, picks_then_rest, range_in_image
from .questions import bare_question
from .tokens import VisionTokens

#: of a relevance whose square is far from the largest number of fp32, about exp(88)
LARGEST_EXPONENT = 40.0


@dataclass
class CDPruner(AsksClip, SelectPruner):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT the sum over its five crops (640 = 5 x 128)
    theta:            weight of relevance against diversity, from 0 (none: the question is not read,
                      and no text tower is needed) to below 1; None: the kernel takes relevance as
                      it is, as in the paper's tables
    """

    visual_token_num: int = 64
    theta: float | None = None

    name = "cdpruner"
    does_without = {"text_tower": "theta=0 for diversity alone"}
    anyres_tiles = (2, 2)

    def __post_init__(self):
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"theta ({self.theta}) must lie from 0 to below 1")
        if self.theta == 0:
            self.ask_nothing()

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        """Leaves the relevance of every patch to the question about its image."""
        if vision.questions is None:
            return vision
        clip, owners = self.trained, vision.owners
        texts = clip.directions([bare_question(text) for text in vision.questions])
        patches = normalize(clip.image_embeds(vision.features))
        cosine = (patches @ texts[owners][..., None])[..., 0]
        # Patches of CLIP resemble a text least where it is about them, hence the sign.
        relevance = scale_per_image(-cosine, owners)
        if self.theta is not None:
            weight = self.theta / (2 * (1 - self.theta))
            # A factor common to all patches changes no choice, and squares must stay finite.
            relevance = torch.exp(relevance * weight - max(0.0, weight - LARGEST_EXPONENT))
        return with_extra(vision, RELEVANCE, relevance)

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        return without_extra(super().after_encoder(vision), RELEVANCE)  # of no use to the decoder

    def select(self, vision: VisionTokens) -> Tensor:
        return largest_volume(vision.features, self.relevance_left(vision), self.num_keep(vision))


def scale_per_image(score: Tensor, image_index: Tensor) -> Tensor:
    """Scores (B, N) brought to 0 ... 1 over the crops of each image; 1 where all are equal."""
    low, span = range_in_image(score, image_index)
    return torch.where(span > NEGLIGIBLE, (score - low + 1e-6) / span, 1.0)


@captured
@torch.no_grad()
def largest_volume(features: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Places (B, count) in the order a greedy search for the largest determinant picks them.

    The kernel of features (B, N, C) and relevance (B, N) > 0 is relevance_i cos_ij relevance_j. A
    pick's gain is its squared distance to the span of the picks before it; one row of an
    incremental factor per pick keeps all gains current. What lies in that span comes last, most
    relevant first. Ties go to the lower place.
    """
    size = features.shape[1]
    count = min(count, size)
    unit = normalize(features)
    # The diagonal is 1 by definition; as computed, rounding would decide ties. 0 for zero features.
    weight = relevance.square() * unit.any(dim=2)
    # A column holds all that is needed of a pick: its row of the kernel, its entries in the factor
    # so far, what counts as no gain, and the gain above that.
    table = weight.new_empty(len(unit), size + count + 2, size)
    kernel, factor, nothing, above = table.split([size, count, 1, 1], dim=1)
    torch.mul(unit @ unit.transpose(1, 2), relevance[:, :, None], out=kernel)
    kernel *= relevance[:, None]
    # Gains are kept apart. Twice the diagonal leaves a pick a gain far below zero.
    kernel.diagonal(dim1=1, dim2=2).copy_(2 * weight)
    torch.mul(weight[:, None], NEGLIGIBLE, out=nothing)
    torch.sub(weight[:, None], nothing, out=above)
    undivided = torch.empty_like(factor)  # by the gain of the pick
    picks, gains = [], []
    for number in range(count):  # six small operations
        gain, pick = above.max(dim=2, keepdim=True)
        column = table.gather(2, pick.expand(-1, table.shape[1], 1))
        known = column[:, size : size + number].transpose(1, 2)
        row, divided = undivided[:, number : number + 1], factor[:, number : number + 1]
        own = column[:, :size].transpose(1, 2)
        torch.baddbmm(own, known, undivided[:, :number], alpha=-1, out=row)
        torch.div(row, column[:, -2:-1] + column[:, -1:], out=divided)
        above.addcmul_(row, divided, value=-1)
        picks.append(pick)
        gains.append(gain)
    if not picks:
        return features.new_empty(len(unit), 0, dtype=torch.long)
    picked, gained = (torch.cat(parts, dim=1).squeeze(2) for parts in (picks, gains))
    by_relevance = relevance.argsort(dim=1, descending=True, stable=True)
    return picks_then_rest(picked, (gained > 0).cumprod(dim=1), by_relevance)
