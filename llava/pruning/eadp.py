"""EADP: cover what the question is about, by those of its words that single something out.

Paper: EADP, entropy-aware dense pruning, https://arxiv.org/abs/2607.02484

A word of low entropy resembles few patches. The more it does, the more it says about relevance.

Written from the paper and its supplement. Where they leave a choice or contradict each other: the
start mark counts as a word, padding does not; half of the words stay (`quantile` 0.5, as in the row
that equals the main table; the text praises 0.3, the release calls 0.2); their weights are the
softmax of negative entropies that the text has; patches are compared behind the projector; of a
question longer than the text tower reads all segments count; relevance that is the same everywhere
is 1. What rounding down leaves of the budget of an image of several crops goes to the largest
fractions, so that the number is exact (there, up to four tokens are lost).

The projection of Qwen2.5-VL's patches into a text space is not described: refused there.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import WholeImages
from .captured import captured
from .clip_text import RELEVANCE, AsksClip
from .coverage import cover_most
from .extras import with_extra, without_extra
from .ops import NEGLIGIBLE, cosines, normalize, on_device, range_in_image, shared_out
from .option_types import check_share
from .questions import bare_question
from .required import required
from .tokens import VisionTokens

#: of crops with budgets of their own as many are picked as a multiple of it: few loops to capture
ROUND_UP = 32


@dataclass
class EADP(AsksClip, WholeImages):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT the sum over its five crops, which get as much
                      as they are relevant (640, 320, 160)
    quantile:         share of the words, those of the lowest entropy, that count, 0 to 1
    tau:              temperature of a word's distribution over the patches
    gamma:            temperature of the words' weights, by their entropies
    mu:               weight of the whole question against its words, 0 to 1
    beta:             exponent of relevance; 0 is coverage alone: the question is not read, and no
                      text tower is needed
    """

    quantile: float = 0.5
    tau: float = 0.01
    gamma: float = 0.01
    mu: float = 0.5
    beta: float = 1.0

    name = "eadp"
    does_without = {"text_tower": "beta=0 for coverage alone"}
    anyres_tiles = (2, 2)

    def __post_init__(self):
        super().__post_init__()
        check_share("quantile", self.quantile)
        check_share("mu", self.mu)
        for name in ("tau", "gamma"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")
        if self.beta < 0:
            raise ValueError(f"beta ({self.beta}) must be at least 0")
        if self.beta == 0:
            self.ask_nothing()

    # --- relevance ----------------------------------------------------------------------------

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        """Leaves the relevance of every patch to the question about its image."""
        if vision.questions is None:
            return vision
        clip = self.trained
        readings = clip.read([bare_question(text) for text in vision.questions], words=True)
        relevance = self.relevance(
            clip.image_embeds(vision.features),
            [
                required(reading.words, "a question was read without its words")
                for reading in readings
            ],
            torch.stack([reading.direction for reading in readings]),
            vision.owners,
            vision.grid,
        )
        return with_extra(vision, RELEVANCE, relevance)

    def relevance(
        self,
        patches: Tensor,
        words: list[Tensor],
        questions: Tensor,
        image_index: Tensor,
        grid: tuple[int, int],
    ) -> Tensor:
        """(B, N) of patches (B, N, P), crops of the images `image_index` (B,).

        words:     unit directions (M, P) of the words of every image's question
        questions: (I, P) of the questions as a whole
        """
        patches = normalize(patches)
        # Patches of CLIP resemble a text least where it is about them, hence the signs.
        questions = questions.to(patches.device)[image_index]
        score = -(patches @ questions[..., None])[..., 0]
        if any(map(len, words)):
            score = self.mu * score + (1 - self.mu) * self.by_words(patches, words, image_index)
        low, span = range_in_image(score, image_index)
        score = torch.where(span > NEGLIGIBLE, (score - low) / (span + NEGLIGIBLE), 1.0)
        return smoothed(score.unflatten(1, grid)).flatten(1) ** self.beta

    def by_words(self, patches: Tensor, words: list[Tensor], image_index: Tensor) -> Tensor:
        """(B, N) how far unit patches (B, N, P) are from the words that count."""
        distance = self.distances(patches, words, image_index)
        entropy = self.entropies(distance)
        counts = self.counting(entropy, [len(own) for own in words], image_index)
        weight = (-entropy / self.gamma).masked_fill(~counts, -torch.inf).softmax(dim=1)
        return (weight[:, None] @ distance)[:, 0]

    def distances(self, patches: Tensor, words: list[Tensor], image_index: Tensor) -> Tensor:
        """(B, M, N) negative cosines, of padding 0."""
        padded = nn.utils.rnn.pad_sequence(words, batch_first=True).to(patches.device)
        return -(padded[image_index] @ patches.transpose(1, 2))

    def entropies(self, distance: Tensor) -> Tensor:
        """(B, M) of what every word says of the patches."""
        logs = (distance / self.tau).log_softmax(dim=2)
        return -(logs.exp() * logs).sum(dim=2)

    def counting(self, entropy: Tensor, counts: list[int], image_index: Tensor) -> Tensor:
        """(B, M) which words count, by their entropy (B, M): those up to the quantile, which may
        lie between two of them. counts: words of every image; what follows them is padding"""
        ends = [self.quantile * (count - 1) for count in counts]
        device = entropy.device
        lower = on_device([int(end) for end in ends], device)[image_index, None]
        part = on_device([end % 1 for end in ends], device, torch.float32)[image_index, None]
        number = on_device(counts, device)[image_index, None]
        padding = torch.arange(entropy.shape[1], device=device) >= number
        entropy = entropy.masked_fill(padding, torch.inf)
        ascending = entropy.sort(dim=1).values
        upper = torch.minimum(lower + 1, number - 1)
        most = torch.lerp(ascending.gather(1, lower), ascending.gather(1, upper), part)
        return entropy <= most

    # --- choice -------------------------------------------------------------------------------

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        relevance, vision = self.relevance_left(vision), without_extra(vision, RELEVANCE)
        if vision.crops_in_budget == 1:
            picks = cover_relevant(vision.features, relevance, self.num_keep(vision))
            return vision.keep(picks.sort(dim=1).values)
        size, counts = vision.features.shape[1], []
        shares = relevance.sum(dim=1).tolist()  # the device is waited for
        for crops in vision.crops_of_images():
            own = shares[crops]
            counts += shared_out(own, [size] * len(own), self.visual_token_num)
        most = min(-(-max(counts) // ROUND_UP) * ROUND_UP, size)
        picks = cover_relevant(vision.features, relevance, most)
        rank = torch.arange(most, device=picks.device)
        taken = rank < on_device(counts, picks.device)[:, None]
        kept = torch.zeros_like(vision.positions, dtype=torch.bool).scatter_(1, picks, taken)
        return vision.keep_mask(kept, counts)


def smoothed(score: Tensor) -> Tensor:
    """Scores (B, h, w) under a Gaussian of 3 x 3 with sigma 1; behind the border they are mirrored,
    its own row or column left out. A grid of one row or column has nothing beside it to mirror."""
    side = math.exp(-0.5)
    for dim in (1, 2):
        size = score.shape[dim]
        if size > 1:
            mirrored = score.narrow(dim, 1, 1), score, score.narrow(dim, size - 2, 1)
            wide = torch.cat(mirrored, dim=dim)
            sides = wide.narrow(dim, 0, size) + wide.narrow(dim, 2, size)
            score = (score + side * sides) / (1 + 2 * side)
    return score


@captured
@torch.no_grad()
def cover_relevant(features: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Places (B, T) of features (B, N, C) in the order they are picked: the most of what they add
    to the similarity, 0 to 1, of all patches to a pick, each times its `relevance` (B, N)."""
    cover = (cosines(features) + 1) / 2 * relevance.float()[:, None]
    return cover_most(cover, count)
