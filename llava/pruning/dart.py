"""DART: keep a few pivot tokens and, for each of them, the visual tokens that resemble it least.

Paper: Stop Looking for Important Tokens in Multimodal Large Language Models: Duplication Matters
More (DART), https://arxiv.org/abs/2502.11494

Differs from the release: pivots take their turns in a fixed order, visual ones first, the largest
key first (there, in the order of a set of integers); the budget is met exactly (there, 64 are 68);
prompts with fewer than four words behind the image have fewer pivots (there, an error); every image
of every prompt of a batch at its real place, no loop on the host. Fewer pivots take the same number
of tokens together, by either `rule`. "Keys of layer K-1" may mean two things, see `key_states`: the
default is what the recorded selections follow. On LLaVA-NeXT the budget is that of a full image,
and images cut into fewer tiles keep the same share of their tokens (there, a setting by hand).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import DecoderPruner
from .captured import captured
from .extras import with_number
from .ops import normalize, on_device, top_stable
from .option_types import check_choice
from .prefill import Prefill
from .staged import BUDGET
from .stages import Probe
from .tokens import ImageTokens

RULES, KEY_STATES = ("exact", "released"), ("output", "input")
#: crops of a full image on LLaVA-NeXT, for which budgets are given
FULL_IMAGE = 5


@dataclass
class DART(DecoderPruner):
    """
    visual_token_num:  tokens per image from `layer` on; on LLaVA-NeXT of a full image (2880
                       tokens), others keep the same share of theirs, newlines included
    layer:             K, the first decoder layer that sees fewer tokens (at least 1); None: 2 of 32
                       layers, scaled to the depth of the decoder
    pivot_image_token: visual tokens with the largest keys, kept in any case
    pivot_text_token:  words behind the image with the largest keys, pivots like them
    key_states:        states that layer K-1 takes those keys from: "output", the keys that it would
                       make of what it gives, or "input", those that it has made
    rule:              "exact": as many tokens as the budget says; "released": 4 and 8 times an
                       eighth of the budget, rounded down (64 are 68)
    """

    pivot_image_token: int = 4
    pivot_text_token: int = 4
    key_states: str = "output"
    rule: str = "exact"

    name = "dart"

    def __post_init__(self):
        super().__post_init__()
        check_choice("rule", self.rule, RULES)
        check_choice("key_states", self.key_states, KEY_STATES)
        if self.pivot_image_token < 1 or self.pivot_text_token < 0:
            raise ValueError(
                f"pivot_image_token ({self.pivot_image_token}) must be at least 1 and "
                f"pivot_text_token ({self.pivot_text_token}) at least 0"
            )

    # --- how many -----------------------------------------------------------------------------

    def kept_of(self, budget: int, count: int) -> int:
        """Tokens that the rule leaves of an image of `count` tokens with this budget."""
        if self.rule == "exact" or budget >= count:
            return min(budget, count)
        pivots = self.pivot_image_token + self.pivot_text_token
        return min(self.pivot_image_token + budget // pivots * pivots, count)

    def left_of(self, count: int) -> int:
        return self.kept_of(self.tokens_of(count), count)

    def before_prompt(self, image: ImageTokens) -> ImageTokens:
        """Leaves the budget of the image."""
        present = len(image.embeds)
        budget = self.tokens_of(present)
        if image.crops > 1 and not image.frame_pairs and self.visual_token_ratio is None:
            full = FULL_IMAGE * math.prod(image.crop_grid)
            budget = max(1, round(budget * image.length / full))
        return with_number(image, BUDGET, self.kept_of(budget, present))

    def budgets(self, prefill: Prefill) -> list[list[int]]:
        pairs = zip(prefill.image_numbers(BUDGET), prefill.counts.images, strict=True)
        return [[min(pair) for pair in zip(*rows, strict=True)] for rows in pairs]

    # --- which --------------------------------------------------------------------------------

    def probe(self, num_layers: int) -> Probe:
        made = self.key_states == "input"
        return Probe((self.cut_layer(num_layers) - 1,), form="keys") if made else Probe()

    def score(self, prefill: Prefill) -> Tensor:
        """(B, S) the earlier a visual token is taken, the higher; 0 on those never taken."""
        budgets = self.budgets(prefill)
        if budgets == [list(row) for row in prefill.counts.images]:
            return torch.zeros_like(prefill.index)
        row, place, real = images = prefill.images()
        pivots, words, num_words = self.pivots(prefill, *images)
        states = prefill.hidden_states.detach()[row, torch.cat([place, words], dim=1)]
        unit = normalize(prefill.decoder.final_norm(states))  # (G, V + q, D)
        count = place.shape[1]
        ends = torch.arange(count, unit.shape[1], device=pivots.device).expand(len(pivots), -1)
        all_pivots = torch.cat([pivots, ends], dim=1)
        groups = torch.arange(len(pivots), device=pivots.device)[:, None]
        alike = unit[groups, all_pivots] @ unit[:, :count].transpose(1, 2)  # (G, p + q, V)
        alike = alike.masked_fill(~real[:, None], torch.inf)
        kept = on_device(budgets, pivots.device).view(-1, 1)  # (G, 1)
        turn = least_alike(alike, pivots, kept, num_words)
        taken = turn < kept
        return prefill.from_images(count - turn, row, place, taken & real)

    def pivots(
        self, prefill: Prefill, row: Tensor, place: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image by image as `Prefill.images` gives them (row, place, real): places in the image
        (G, p) of the visual tokens with the largest keys and in the prompt (G, q) of the words
        behind it, largest first, and how many such words there are (G, 1)."""
        if self.key_states == "output":
            x, positions = prefill.hidden_states, prefill.position_ids
            keys = prefill.decoder.layer_keys(prefill.layer - 1, x, positions)
        else:
            keys = prefill.recorded_keys
        size = keys.detach().abs().sum(dim=(1, 3), dtype=torch.float32)  # (B, S)
        visual = size[row, place].masked_fill(~real, -1.0)
        behind = prefill.text_behind().flatten(0, 1)  # (G, S)
        text = size[row[:, 0]].masked_fill(~behind, -1.0)
        words = top_stable(text, self.pivot_text_token)
        num_words = behind.gather(1, words).sum(dim=1, keepdim=True)
        return top_stable(visual, self.pivot_image_token), words, num_words


@captured
def least_alike(alike: Tensor, pivots: Tensor, count: Tensor, num_words: Tensor) -> Tensor:
    """(G, V) at which turn each token is taken, from 0 on; V and above: never.

    alike:     (G, P, V) cosines of the pivots, visual ones first, and the tokens; inf on padding
    pivots:    (G, p) places of the visual ones, which are taken first
    count:     (G, 1) tokens to take
    num_words: (G, 1) pivots behind the visual ones that there are
    Each pivot takes the same number of those that are left and resemble it least, the lower place
    where they are equal, until there are as many as wanted.
    """
    size, places = alike.shape[2], torch.arange(alike.shape[2], device=alike.device)
    own = count.clamp(max=pivots.shape[1])  # visual pivots, (G, 1)
    num_pivots = own + num_words
    quota = (count - own + num_pivots - 1) // num_pivots.clamp(min=1)  # rounded up
    number = torch.arange(alike.shape[1], device=alike.device)
    behind = number >= pivots.shape[1]
    number = torch.where(behind, number - pivots.shape[1] + own, number)  # (G, P) among the real
    there = torch.where(behind, number < num_pivots, number < own)
    start = own + quota * number  # taken before
    allowed = (count - start).clamp(min=0).minimum(quota) * there
    turns = (start[..., None] + places).masked_fill(places >= allowed[..., None], size)
    first = places[: pivots.shape[1]]
    first = first.expand_as(pivots).masked_fill(first >= own, size)
    turn = torch.full_like(alike[:, 0], size, dtype=torch.long).scatter(1, pivots, first)
    for pivot in range(alike.shape[1]):  # four small operations
        left = alike[:, pivot].masked_fill(turn < size, torch.inf)
        order = left.argsort(dim=1, stable=True)
        turn = turn.scatter_reduce(1, order, turns[:, pivot], "amin")
    return turn
