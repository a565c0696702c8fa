"""TOPS: sets that are relevant, cover the image and are diverse, chosen once after the projector
and twice inside the decoder.

Paper: TOPS, Token Optimal Preservation Sets, https://arxiv.org/abs/2606.27161

There is no release: this follows the text, and where that is silent the choice is ours. Criteria
are scaled to 0 to 1 as in its main part (its algorithms divide by means: `normalize="mean"`).
Raters are the words behind the image that look at it more than they do on average; layer p still
sees all its tokens, rates them, and its output is compared. In a tower without a class token the
attention that patches receive from all takes its place. On LLaVA-NeXT all patches of an image
compete in the first stage, whichever crop they belong to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import BudgetPruner
from .captured import captured
from .extras import with_extra, with_number, without_extra
from .ops import cosines, interpolate, on_device, scale_layers
from .option_types import check_choice
from .own_grids import OwnGrids
from .prefill import Prefill
from .sinks import SinkFilter
from .staged import BUDGET, StagedPlan, StagedPruner, StageLayers
from .stages import Probe, VisionStage
from .tokens import ImageTokens, VisionTokens, keep_chosen
from .words import Words, mean_attention, words_behind

#: layers whose attention rates, and of how many layers
LAYERS, BLOCK_LAYERS = ((12, 24), 32), ((12, 16), 28)
#: where tokens are blocks of patches: label -> tokens after the two cuts
BLOCK_TOKENS = {0: (0, 0), 64: (71, 19), 128: (139, 39), 256: (281, 77)}
#: weight of coverage in the decoder for 2/9, 1/9 and 1/18 of the tokens: (LLaVA-NeXT, more than 32
#: layers) -> weights
BUDGETS = (2 / 9, 1 / 9, 1 / 18)
COVERAGE = {
    (False, False): (0.5, 1.0, 1.0),
    (False, True): (0.4, 0.4, 0.4),
    (True, False): (0.5, 0.4, 0.5),
    (True, True): (0.5, 0.5, 0.5),
}
BLOCK_COVERAGE, VIDEO_COVERAGE = 0.4, 0.5
#: of the first stage, coverage and diversity
FIRST_WEIGHTS = (0.5, 0.5)
NORMALIZE, RATERS = ("minmax", "mean"), ("threshold", "all", "last")
#: what images carry into the decoder: their share of tokens, and what they are
SHARE, KIND = "tops_share", "tops_kind"
IMAGE, TILED, VIDEO = range(3)
SALIENCE = "tops_salience"
#: the distance that says a token is taken, the least between others (a power of two: sums of it are
#: exact), and what is divided by the distance to mark what is taken: 1e6 there, next to nothing
#: elsewhere
TAKEN, COPY, MARK = -1e-37, 2.0**-46, 1e-31
#: the least that a criterion spans: one that is the same everywhere counts 0
LEAST = 1e-9


@dataclass
class Plan(StagedPlan):
    """
    words: that were asked in the layer before
    """

    words: Words | None = None


@dataclass
class TOPS(SinkFilter, OwnGrids, VisionStage, BudgetPruner, StagedPruner, StageLayers):
    """
    visual_token_num: T, the label of the published tables: 2T tokens of an image enter the decoder,
                      T and T/4 are left after the cuts, which is 1.24 T on average (64 are 79.5);
                      on LLaVA-NeXT the sum over five crops; on Qwen2.5-VL 1.1 T and 0.3 T are left
    average:          True: `visual_token_num` is the average over the layers, and T follows from it
    alpha:            weight of diversity in the decoder; relevance has 1
    lam:              weight of coverage there; None: as published for the model and the nearest of
                      its budgets, 0.4 to 1. In the first stage both are 0.5
    normalize:        how criteria are scaled: "minmax", or by their "mean"
    raters:           words behind the image whose attention is relevance: "threshold", those that
                      look at it more than the mean; "all"; or "last", the last prompt token
    pruning_layers:   layers (0-based) whose attention rates; the layer after each sees fewer
                      tokens.
                      None: 12, 24 of 32 layers, on Qwen2.5-VL 12, 16 of 28, scaled to the depth
    sink_ratio:       share of the patches left out, those of the largest norm; 0: none
    """

    average: bool = False
    alpha: float = 0.5
    lam: float | None = None
    normalize: str = "minmax"
    raters: str = "threshold"
    pruning_layers: Sequence[int] | None = None

    name = "tops"
    needs = frozenset({"salience"})
    anyres_tiles = (2, 2)
    looks_back = 1
    plan_class = Plan

    #: decoder layers of the model it is assigned to
    depth = LAYERS[1]

    def __post_init__(self):
        super().__post_init__()
        check_choice("normalize", self.normalize, NORMALIZE)
        check_choice("raters", self.raters, RATERS)
        if min(self.alpha, self.lam or 0) < 0:
            raise ValueError(f"alpha ({self.alpha}) and lam ({self.lam}) must be at least 0")
        if self.pruning_layers is not None and len(self.pruning_layers) != 2:
            raise ValueError(f"pruning_layers ({self.pruning_layers}) must name two layers")

    def attach(self, model) -> None:
        super().attach(model)
        self.depth = model.config.num_hidden_layers

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        layers, depth = BLOCK_LAYERS if self.own_grids else LAYERS
        return tuple(self.pruning_layers or scale_layers(layers, num_layers, depth))

    # --- how many -----------------------------------------------------------------------------

    def label(self, total: int, num_layers: int) -> int:
        """T of an image of `total` tokens."""
        wanted = self.tokens_of(total)
        if not self.average or wanted >= total:
            return wanted
        low, high = 1, wanted  # the largest T whose average stays within the budget
        while low < high:
            label = (low + high + 1) // 2
            plan = self.image_schedule(min(2 * label, total), num_layers, total, label)
            low, high = (label, high) if sum(plan) <= wanted * num_layers else (low, label - 1)
        return low

    def label_in_parts(self, total: int, parts: int, num_layers: int) -> int:
        """T of an image of `total` tokens; with `average` that of a video is the sum over its
        `parts` pairs of frames, which are cut one by one."""
        if parts < 2 or not self.average:
            return self.label(total, num_layers)
        return parts * self.for_part(parts).label(total // parts, num_layers)

    def image_schedule(
        self, count: int, num_layers: int, num_patches: int, budget: int = 0
    ) -> list[int]:
        """budget: T of the image."""
        plan = [count] * num_layers
        if count <= budget:  # T is all there is
            return plan
        left: tuple[int, ...] = (budget, budget // 4)
        if self.own_grids:
            last = max(BLOCK_TOKENS)
            part = interpolate(BLOCK_TOKENS, min(budget, last))
            left = tuple(round(number * max(budget / last, 1.0)) for number in part)
        for layer, number in zip(self.stage_layers(num_layers), left, strict=True):
            number = max(1, min(plan[layer], number))
            plan[layer + 1 :] = [number] * (num_layers - layer - 1)
        return plan

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        total = num_patches * crops
        # What are crops here are the pairs of frames of a video where images have own grids.
        label = self.label_in_parts(total, crops if self.own_grids else 1, num_layers)
        first = min(2 * label, total)
        return self.image_schedule(first, num_layers, num_patches, label)

    # --- after the projector ------------------------------------------------------------------

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        self.check_model(vision)
        size, crops = vision.features.shape[1], vision.crops_in_budget
        first = min(2 * self.label(size * crops, self.depth), size * crops)
        return self.candidates(vision, math.ceil(first / crops))

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        """Images of a single crop, all at once."""
        if vision.crops_in_budget > 1:  # they are chosen from as a whole
            return with_extra(vision, SALIENCE, vision.cue("salience"))
        count = 2 * self.label(math.prod(vision.grid), self.depth)
        if count >= vision.features.shape[1]:
            return vision
        picks = self.first_picks(vision.features, vision.cue("salience"), count)
        return vision.keep(picks.sort(dim=1).values)

    def after_layouts(self, images: list[ImageTokens]) -> list[ImageTokens]:
        """Chooses from images of several crops, and leaves T of every image."""
        labels = [self.label_of(image) for image in images]

        def choose(alike: list[ImageTokens], count: int) -> Tensor:
            embeds = torch.stack([image.embeds for image in alike])
            salience = torch.stack([image.extras[SALIENCE] for image in alike])
            return self.first_picks(embeds, salience, count).sort(dim=1).values

        # Images of a single crop and videos were cut in `after_projector`.
        counts = [
            2 * label if SALIENCE in image.extras else image.length
            for image, label in zip(images, labels, strict=True)
        ]
        pruned = keep_chosen(images, counts, choose)
        return [
            with_number(without_extra(image, SALIENCE), BUDGET, label)
            for image, label in zip(pruned, labels, strict=True)
        ]

    def label_of(self, image: ImageTokens) -> int:
        """T of an image or a video."""
        return self.label_in_parts(image.length, image.frame_pairs, self.depth)

    def first_picks(self, features: Tensor, salience: Tensor, count: int) -> Tensor:
        """(B, count) places of features (B, N, D) in the order they are picked."""
        weights = on_device([FIRST_WEIGHTS], features.device, torch.float32)
        real = torch.ones_like(salience, dtype=torch.bool)
        by_mean = self.normalize == "mean"
        return preserve(features, salience, real, weights.expand(len(real), -1), count, by_mean)[0]

    # --- inside the decoder -------------------------------------------------------------------

    def before_prompt(self, image: ImageTokens) -> ImageTokens:
        """Leaves what the weights depend on."""
        label = image.image_extras.get(BUDGET, image.length)
        # A video of one pair of frames is a still picture.
        kind = VIDEO if image.frame_pairs > 1 else TILED if image.crops > 1 else IMAGE
        image = with_number(super().before_prompt(image), KIND, kind)
        return with_number(image, SHARE, label / max(image.length, 1))

    def weights(self, prefill: Prefill) -> list[tuple[float, float]]:
        """(lam, alpha) for every image of every row, one behind the other."""
        deep, found = len(prefill.decoder.layers) > 32, []
        pairs = zip(prefill.image_numbers(SHARE), prefill.image_numbers(KIND), strict=True)
        for share, kind in (pair for rows in pairs for pair in zip(*rows, strict=True)):
            nearest = min(range(len(BUDGETS)), key=lambda n: abs(BUDGETS[n] - share))
            lam = COVERAGE[kind == TILED, deep][nearest]
            if self.own_grids:
                lam = VIDEO_COVERAGE if kind == VIDEO else BLOCK_COVERAGE
            found.append((lam if self.lam is None else self.lam, self.alpha))
        return found

    def probe(self, num_layers: int) -> Probe:
        return Probe(self.stage_layers(num_layers), self.ask)

    def ask(self, prefill: Prefill) -> Tensor:
        """Places (B, R) of the words that are asked, which are noted."""
        if self.raters == "last":
            rows = prefill.last[:, None]
            own = torch.ones_like(rows, dtype=torch.bool)[:, None]
            words = Words(rows, own.expand(-1, prefill.most_images, -1))
        else:
            words = words_behind(prefill)
        prefill.state.words = words
        return words.rows

    def score(self, prefill: Prefill, kept: list[list[int]]) -> Tensor:
        """(B, S) the earlier a visual token is picked, the higher; 0 on those never picked."""
        words, rows = prefill.state.words, prefill.recorded_rows.mean(dim=1)  # (B, R, S)
        judges = words.own
        if self.raters == "threshold":
            looks = prefill.own_tokens().float() @ rows.transpose(1, 2)  # (B, I, R)
            judges = above_mean(looks, judges)
        relevance = mean_attention(prefill, rows, judges)
        row, place, real = prefill.images()
        device, most = place.device, max(map(max, kept))
        weights = on_device(self.weights(prefill), device, torch.float32)
        order, _ = preserve(
            prefill.hidden_states[row, place],
            relevance[row, place],
            real,
            weights,
            most,
            self.normalize == "mean",
        )
        number = torch.arange(order.shape[1], device=device)
        picked = number < on_device(kept, device).view(-1, 1)
        return prefill.from_images(most - number, row, place.gather(1, order), picked)


def above_mean(looks: Tensor, asked: Tensor) -> Tensor:
    """(..., R) True on those that are asked (..., R) and look at an image as much as they do on
    average; at least one of them, by rounding all where all look the same. looks: (..., R)"""
    mean = (looks * asked).sum(dim=-1, keepdim=True) / asked.sum(dim=-1, keepdim=True).clamp(min=1)
    return asked & (looks >= mean * (1 - 1e-6))


@captured
@torch.no_grad()
def preserve(
    features: Tensor, relevance: Tensor, real: Tensor, weights: Tensor, count: int, by_mean: bool
) -> tuple[Tensor, Tensor]:
    """(G, count) places in the order they are picked, and what each pick scored, from features
    (G, V, D), relevance (G, V), real (G, V) False on padding, and weights (G, 2) of coverage and
    diversity. Groups with fewer tokens than `count` are at their end before: what follows is noise.

    The first pick is the most relevant token. Each further one has the largest sum of relevance,
    coverage (what it adds to how well the free tokens are represented) and diversity (distance to
    the nearest pick), each scaled over the free tokens; equal sums: the lower place.

    Coverage is looked at from the other end: what is left uncovered were a token picked, the sum
    of how far the free ones are from their nearest pick then. So it is the lower the better.
    """
    size = features.shape[1]
    count = min(count, size)
    relevance = relevance.float()
    best, pick = relevance.masked_fill(~real, -torch.inf).max(dim=1, keepdim=True)
    order, scores = [pick], [best]
    # Beside LEAST the mark of a free token vanishes, so that it decides between no equals.
    rating = scaled(relevance, real, by_mean)[:, None] + LEAST
    # (G, V + 1, V): row i is how far every token would be from its nearest pick with i among them,
    # the last one without a further pick. What a token leaves of itself, something where it is
    # zero, is in a column behind the others: its own place is a mark for when it is taken.
    apart = (1 - cosines(features)).clamp_(min=COPY)
    whole = apart.new_full((len(apart), size + 1, size + 1), torch.inf)
    left, itself = whole[..., :size], whole[..., size]
    left[:, :size] = apart.masked_fill_(~real[..., None], torch.inf)
    left.masked_fill_(~real[:, None], TAKEN).diagonal(dim1=1, dim2=2).fill_(TAKEN)
    itself.zero_()[:, :size] = torch.where(real, apart.diagonal(dim1=1, dim2=2), 0.0)

    # (3, G, V + 1): what is left uncovered, the distance to the nearest pick, and a mark of what is
    # taken; in `above` the first two counted from the worst among the free tokens.
    criteria = left.new_zeros(3, len(left), size + 1)
    uncovered, far, tokens = criteria[0], criteria[1, :, :size], criteria[..., :size]
    worst_is_most = torch.ones_like(criteria[:, :1, :1])
    worst_is_most[1].neg_()
    above = LEAST * -worst_is_most.expand_as(criteria)  # its last place stays: see LEAST
    marked, scale = above[..., :size], torch.ones_like(above[..., 0])
    ends = left.new_empty(4, 2, len(left))  # both criteria, most, least, least and most
    worst, span = (pair.diagonal(dim1=0, dim2=1).t() for pair in (ends[:2], ends[2:]))
    worst = criteria[:2, :, size:] if by_mean else worst[..., None]
    shares, pick = weights.t()[..., None].expand(-1, -1, count), pick[..., None]
    if by_mean:  # of how many free tokens a sum is made
        free = real.sum(dim=1, keepdim=True)
        shares = shares * (free - torch.arange(count, device=free.device))
    for number in range(1, count):  # ten small operations
        torch.gather(left, 1, pick.expand(-1, -1, size), out=far[:, None])
        torch.minimum(left, far[:, None], out=left)
        if by_mean:  # what is taken adds nothing to the mean
            itself.scatter_(1, pick[:, 0], 0.0)
        torch.sum(whole, dim=2, out=uncovered)
        torch.addcdiv(tokens, worst_is_most, far, value=MARK, out=marked)
        if not by_mean:
            torch.aminmax(marked[:2], dim=2, out=(ends[1], ends[0]))
        torch.sub(tokens[:2], worst, out=marked[:2])
        if by_mean:
            span = above[:2].sum(dim=2)
        else:
            torch.aminmax(above[:2], dim=2, out=(ends[2], ends[3]))
        torch.div(shares[..., number], span, out=scale[:2])
        score = torch.baddbmm(rating, scale.t()[:, None], marked.transpose(0, 1))
        best, pick = score.max(dim=2, keepdim=True)
        order.append(pick[:, 0])
        scores.append(best[:, 0])
    return torch.cat(order, dim=1), torch.cat(scores, dim=1)


def scaled(values: Tensor, real: Tensor, by_mean: bool) -> Tensor:
    """Values (G, V) over the real tokens from 0 to 1, or by their mean; equal ones become 0, and
    so does padding, which may stand on a token of the text that is looked at far more."""
    if by_mean:
        values = values * real
        mean = values.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.where(mean > 0, values / mean.clamp(min=1e-30), 0.0)
    above = values - values.masked_fill(~real, torch.inf).amin(dim=1, keepdim=True)
    above = above.masked_fill(~real, 0.0)
    return above / above.amax(dim=1, keepdim=True).clamp(min=1e-30)
