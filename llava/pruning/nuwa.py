"""Nüwa: salient patches all over the grid gather their neighbours; the prompt picks among them.

Stage 1, after the encoder: every 2 x 2 cell offers its most salient patches, the best of all cells
stay. The more salient of them (pillars) stay as they are, the others (collectors) add up what is
near and similar. Stage 2, at half the depth of the decoder: those the last prompt token attends to
most stay. Every token keeps the position it has in the unpruned prompt. On Qwen2.5-VL, which was
released apart, cells and neighbours are tokens of the language model, most of them are pillars, and
the last three prompt tokens ask.

Paper: https://arxiv.org/abs/2602.02951

Differs from the release: image spans come from the prompt (there, place 35); images of a prompt
and prompts of a batch are pruned one by one (there, they share one budget and one set of
positions); LLaVA-NeXT runs, with tile rows and columns in the right order and newlines in the
positions and in stage 2; any budget works; every layer is causal (there, one layer of Qwen2.5-VL
is not); what says how alike tokens are is in their order (there, on Qwen2.5-VL, in that of the
tower's windows); single attention rows instead of maps; another `distance` takes effect at once;
fp32 arithmetic with stable ties.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .base import NO_DECODER_STAGE, DecoderPruner, Pruner
from .extras import with_number
from .ops import gather_tokens, normalize, rank_within_groups, scale_layer, top_stable
from .option_types import check_choice, check_share
from .own_grids import OwnGrids
from .prefill import Prefill
from .published import Published
from .random import scramble
from .sinks import SinkFilter, without_marks
from .stages import DecoderStage, Probe, VisionStage, last_token
from .tokens import ImageLayout, ImageTokens, VisionTokens

CELL = 2  # patches along the side of a cell
#: tokens after stage 1 on LLaVA-NeXT, and patches that a cell offers, as the release has them
NEXT_TOKENS = {64: 112, 128: 224, 160: 290, 192: 336, 320: 582, 640: 1162}
NEXT_TOP = {64: 1, 128: 2, 160: 2, 192: 3, 320: 3, 640: 3}
PILLAR_MODES, STAGE2 = ("salience", "l2norm", "none"), ("attention", "random", "off")
#: the number of an image's tokens that stage 2 leaves
KEPT = "kept"


@dataclass(frozen=True)
class Variant:
    """How the method was released for a kind of model.

    similar: first and last tower layer whose outputs say, on average, how alike patches are, and of
             how many layers
    cut:     first decoder layer that sees the tokens of stage 2, and of how many
    queries: gives the places of the tokens at the end of the prompt that are asked in stage 2
    """

    similar: tuple[int, int, int]
    cut: tuple[int, int]
    queries: Callable[[Prefill], Tensor]


def last_three(prefill: Prefill) -> Tensor:
    """(B, 3) places of the last prompt tokens; of a shorter prompt the first stands for those that
    are missing."""
    places = prefill.last[:, None] - torch.arange(2, -1, -1, device=prefill.index.device)
    if prefill.valid is None:
        return places.clamp(min=0)
    return places.maximum(prefill.valid.to(torch.uint8).argmax(dim=1, keepdim=True))


LLAVA = Variant(similar=(15, 23, 24), cut=(16, 32), queries=last_token)
#: where images have grids of their own and tokens are blocks of patches
QWEN = Variant(similar=(7, 23, 32), cut=(15, 28), queries=last_three)
#: the square of the radius on LLaVA, in patches
DISTANCE = 280.0
#: average share of an image's tokens -> the share that enters the decoder of Qwen2.5-VL, and how
#: much of that stage 2 leaves, as the release has them
QWEN_SHARES = {0.25: (0.35, 0.42), 0.5: (0.6, 0.66), 0.75: (0.85, 0.7)}
#: patches that a cell offers there, at least
QWEN_TOP = 3
#: the radius there, as a share of the diagonal
QWEN_RADIUS = 0.8


class View(NamedTuple):
    """A grid that is pruned as one.

    keep:      patches to keep
    top:       patches that a cell offers; 0: there are no cells
    quantile:  share of the kept patches that are collectors
    untouched: nothing is dropped or blended
    blocks:    it is a grid of tokens that are blocks of patches: those beside the last whole cell
               are cells, too, and the weights of a collector add up to 1, its own included
    """

    rows: int
    columns: int
    keep: int
    top: int
    quantile: float
    untouched: bool = False
    blocks: bool = False


@dataclass
class Nuwa(SinkFilter, OwnGrids, VisionStage, DecoderPruner):
    """
    visual_token_num:  tokens per image, averaged over the decoder layers: 7/4 of them enter it, 1/4
                       stay from `layer` on (64 = 112 and 16). On LLaVA-NeXT the sum over the crops,
                       newlines not counted: 20/11 enter, and a tenth of those stays. On Qwen2.5-VL
                       a tenth of the image more enters (at most 7/4), and what stays gives the
                       average; a number that is 0.25, 0.5 or 0.75 of the image's tokens, rounded,
                       is the released setting of that name
    layer:             first decoder layer that sees the tokens of stage 2; None: 16 of 32 layers,
                       on Qwen2.5-VL 15 of 28, scaled to the depth of the decoder
    distance:          square of the radius, in patches, within which a collector collects (1058 is
                       the diagonal of a 24 x 24 grid); None: 280, that is 16.7 patches, on
                       Qwen2.5-VL 0.8 of the diagonal of the image
    pillar_quantile:   share of the kept patches that are collectors; None: 0.55, on LLaVA-NeXT 0.5,
                       on Qwen2.5-VL 0.1
    pillar_mode:       what pillars lead in: "salience" (attention received, from the class token
                       where there is one), "l2norm" (of the feature), or "none": all are collectors
    region:            keep the best of every 2 x 2 cell; False: the best of the whole image
    top_per_region:    patches a cell offers; None: the fewest that fill the budget, on LLaVA-NeXT
                       at least 2 (budgets up to 160; 64: 1) or 3 (192 and above 160), on Qwen2.5-VL
                       at least 3
    stage2:            "attention" of the end of the prompt, "random" or "off"
    seed:              of stage2="random"
    sink_ratio:        share of the patches left out of stage 1, of what collectors collect as well,
                       those of the largest norm of a crop, or of the tiles together; 0: none
    """

    distance: float | None = None
    pillar_quantile: float | None = None
    pillar_mode: str = "salience"
    region: bool = True
    top_per_region: int | None = None
    stage2: str = "attention"
    seed: int = 0

    name = "nuwa"
    published = Published(
        options={"matain_token": "visual_token_num"},
        environment={
            "NT": "visual_token_num",
            "DIST": "distance",
            "THRE": "pillar_quantile",
            "REGION": "region",
            "QWEN_VISION_TOKEN_KEEP_RATIO": "visual_token_ratio",
        },
    )
    needs = frozenset({"salience"})
    position_policy = "grid"
    before_decoder_by = 'stage2="off"'

    def __post_init__(self):
        super().__post_init__()
        check_choice("pillar_mode", self.pillar_mode, PILLAR_MODES)
        check_choice("stage2", self.stage2, STAGE2)
        if self.distance is not None and self.distance <= 0:
            raise ValueError(f"distance ({self.distance}) must be above 0 squared patches")
        check_share("pillar_quantile", self.pillar_quantile)
        if self.top_per_region not in (None, 1, 2, 3, 4):
            raise ValueError(f"top_per_region ({self.top_per_region}) must be 1 to {CELL**2}")

    @property
    def decoder(self) -> DecoderStage:
        return NO_DECODER_STAGE if self.stage2 == "off" else self

    def choosing(self, num_tokens: int) -> Pruner:
        raise ValueError(
            f"{self.name} cannot be asked for a number of tokens before the decoder: its budget is "
            "an average over the layers"
        )

    @property
    def variant(self) -> Variant:
        return QWEN if self.own_grids else LLAVA

    # --- budgets ------------------------------------------------------------------------------

    def stage1_tokens(self, num_patches: int, crops: int) -> int:
        """Tokens of stage 1 for each of the `crops` of an image."""
        total, side = self.visual_token_num, math.isqrt(num_patches)
        if total >= num_patches * crops:
            return num_patches
        if self.own_grids:
            return self.for_part(crops).block_tokens(num_patches)
        wanted = min(round(7 * total / 4), 2 * total - 1)
        if crops > 1:
            wanted = max(1, NEXT_TOKENS.get(total, round(20 * total / 11)) // crops)
        if not self.region or side < CELL:
            return min(wanted, num_patches)
        top = self.top_per_region if crops == 1 else None  # of several crops cells offer enough
        return min(wanted, (side // CELL) ** 2 * (top or CELL**2))

    def stage2_tokens(self, count: int, num_patches: int, crops: int) -> int:
        """Tokens of stage 2 of an image with `count` tokens in the decoder."""
        total = self.visual_token_num
        if self.stage2 == "off" or total >= num_patches * crops:
            return count
        if self.own_grids:
            return self.for_part(crops).stage2_blocks(count // crops, num_patches) * crops
        if crops > 1:
            return max(1, count // 10)
        return min(count, 2 * total - self.stage1_tokens(num_patches, 1))

    def block_tokens(self, count: int) -> int:
        """Tokens of stage 1 of an image of `count` tokens that are blocks of patches."""
        total = self.visual_token_num
        if (released := self.released_shares(count)) is not None:
            return math.ceil(count * released[0])
        share, (layer, layers) = total / count, QWEN.cut
        wanted = math.ceil(count * min(share + 0.1, 7 * share / 4, 1))
        return min(wanted, (layers * total - (layers - layer)) // layer)  # stage 2 leaves one

    def stage2_blocks(self, entered: int, count: int) -> int:
        """Tokens of stage 2 of such an image, of which `entered` are in the decoder."""
        if (released := self.released_shares(count)) is not None:
            return max(1, int(entered * released[1]))
        layer, layers = QWEN.cut
        rest = layers * self.visual_token_num - layer * entered
        return min(max(1, round(rest / (layers - layer))), entered)

    def released_shares(self, count: int) -> tuple[float, float] | None:
        """The entry of `QWEN_SHARES` that the budget stands for, of an image of `count` tokens."""
        total = self.visual_token_num
        shares = [share for share in QWEN_SHARES if max(1, round(share * count)) == total]
        nearest = min(shares, key=lambda share: abs(share - total / count), default=None)
        return None if nearest is None else QWEN_SHARES[nearest]

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        own = self.with_budget_of(num_patches * crops)
        first, layer = own.stage1_tokens(num_patches, crops) * crops, self.cut_layer(num_layers)
        second = own.stage2_tokens(first, num_patches, crops)
        return [first] * layer + [second] * (num_layers - layer)

    def cut_layer(self, num_layers: int) -> int:
        if self.layer is not None:
            return self.layer
        layer, layers = self.variant.cut
        return scale_layer(layer, num_layers, layers)

    # --- stage 1 ------------------------------------------------------------------------------

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        *ends, depth = self.variant.similar
        first, last = (scale_layer(layer, num_layers, depth) for layer in ends)
        return {layer: frozenset({"output_mean"}) for layer in range(first, last + 1)}

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        self.check_model(vision)
        if self.own_grids:
            return self.with_sinks_marked(vision, self.block_view(*vision.grid).keep)
        similar = vision.layer_cue("output_mean").flatten(0, 1)  # (B * N, C)
        salience = vision.cue("salience").flatten()
        features = vision.features.flatten(0, 1).clone()
        kept = torch.zeros_like(salience, dtype=torch.bool)
        for view, rows in self.views(vision).items():
            places = torch.stack(rows)  # (G, V)
            if view.untouched:
                kept[places] = True
                continue
            own = features[places], similar[places], salience[places]
            sinks = self.sink_mask(own[0], view.keep)
            chosen = choose(own[2], view, sinks)
            blended, _ = self.collect(*own, chosen, view, sinks)
            chosen = places.gather(1, chosen)
            features[chosen], kept[chosen] = blended.to(features.dtype), True
        vision = replace(vision, features=features.view_as(vision.features), layers={})
        return vision.keep_mask(kept.view(vision.positions.shape))

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        """Where blocks of patches become tokens here, it is those that are kept and blended."""
        if not self.own_grids:
            return vision
        vision, sinks = without_marks(vision)
        view = self.block_view(*vision.grid)
        if view.untouched:
            return replace(vision, layers={})
        features, salience = vision.features, vision.cue("salience")
        similar = vision.projected(vision.layer_cue("output_mean").to(features.dtype))
        chosen = choose(salience, view, sinks)
        blended, _ = self.collect(features, similar, salience, chosen, view, sinks)
        kept = replace(vision, layers={}).keep(chosen)
        kept.features = blended.to(features.dtype)
        return kept

    def block_view(self, rows: int, columns: int) -> View:
        """The grid of an image whose tokens are blocks of patches."""
        count = rows * columns
        keep = self.block_tokens(count)
        top = self.top_per_region or max(QWEN_TOP, min(math.ceil(keep * CELL**2 / count), CELL**2))
        quantile = 0.1 if self.pillar_quantile is None else self.pillar_quantile
        untouched = self.visual_token_num >= count
        top = top if self.region else 0
        return View(rows, columns, keep, top, quantile, untouched, blocks=True)

    def views(self, vision: VisionTokens) -> dict[View, list[Tensor]]:
        """What is pruned as one grid, by shape and budget: single crops, and the tiles of an image
        as one. With each the places (V,) of its patches among the B * N, row by row."""
        device, (batch, num_patches) = vision.features.device, vision.features.shape[:2]
        layouts = vision.layouts or [ImageLayout(slice(n, n + 1)) for n in range(batch)]
        rows, columns = vision.grid
        every = torch.arange(batch * num_patches, device=device).view(batch, num_patches)
        views: dict[View, list[Tensor]] = {}
        for layout in layouts:
            first, crops = layout.crops.start, layout.crops.stop - layout.crops.start
            singles = crops if layout.mosaic is None else 1
            view = self.view(rows, columns, 1, num_patches, crops)
            views.setdefault(view, []).extend(every[first : first + singles])
            if layout.mosaic is None:
                continue
            (across, down), (top, bottom, left, right) = layout.mosaic
            tiles = every[first + 1 : first + crops].view(down, across, rows, columns)
            whole = tiles.transpose(1, 2).reshape(down * rows, across * columns)
            if (places := whole[top:bottom, left:right].flatten()).numel():  # else all is padding
                view = self.view(bottom - top, right - left, crops - 1, num_patches, crops)
                views.setdefault(view, []).append(places)
        return views

    def view(self, rows: int, columns: int, share: int, num_patches: int, crops: int) -> View:
        """A grid that has the budget of `share` of the `crops` of its image."""
        untouched = self.visual_token_num >= num_patches * crops
        keep = self.stage1_tokens(num_patches, crops) * share
        cells = max(1, (rows // CELL) * (columns // CELL))
        needed = math.ceil(keep / cells)  # of every cell
        top = self.top_per_region or 1
        if crops > 1 and self.top_per_region is None:
            top = NEXT_TOP.get(self.visual_token_num, 2 if self.visual_token_num <= 160 else 3)
        if crops > 1 and top < needed >= CELL**2:
            keep = rows * columns  # as released: a budget of more than 3 of 4 patches keeps all
        if crops > 1 or self.top_per_region is None:
            top = min(max(top, needed), CELL**2)
        if not self.region or min(rows, columns) < CELL:  # not one cell
            top = 0
        quantile = self.pillar_quantile
        if quantile is None:
            quantile = 0.55 if crops == 1 else 0.5
        return View(rows, columns, keep, top, quantile, untouched)

    def collect(
        self,
        features: Tensor,
        similar: Tensor,
        salience: Tensor,
        chosen: Tensor,
        view: View,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features (G, K, C) in fp32 of the patches at `chosen` (G, K), and (G, K) which of them
        are pillars. features, similar (G, V, C) and salience (G, V) are those of whole grids;
        sinks: (G, V) True on patches that are not collected."""
        features, count = features.float(), chosen.shape[1]
        plain = gather_tokens(features, chosen)
        lead = salience.gather(1, chosen) if self.pillar_mode == "salience" else plain.norm(dim=-1)
        threshold = lead.quantile(view.quantile, dim=1, keepdim=True)
        pillar = lead >= threshold
        # Those below a quantile are among so many of the last; the others need no weights.
        below = min(math.floor(view.quantile * (count - 1)) + 2, count)
        if self.pillar_mode == "none":
            pillar, below = torch.zeros_like(pillar), count
        last = lead.argsort(dim=1, stable=True)[:, :below]
        own = chosen.gather(1, last)
        unit = normalize(similar)
        weight = (gather_tokens(unit, own) @ unit.transpose(1, 2)).relu()  # (G, L, V)
        weight = weight * proximity(own, view, self.squared_radius(view))
        if sinks is not None:
            weight = weight.masked_fill(sinks.scatter(1, chosen, False)[:, None], 0.0)
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-8)
        if not view.blocks:  # a collector counts in full beside what it collects
            weight = weight.scatter(2, own[..., None], 1.0)
        places = last[..., None].expand(-1, -1, features.shape[-1])
        blended = plain.scatter(1, places, weight @ features)
        return torch.where(pillar[..., None], plain, blended), pillar

    def squared_radius(self, view: View) -> float:
        """`distance` in a grid."""
        if self.distance is not None:
            return self.distance
        if not view.blocks:
            return DISTANCE
        sides = (side + side % CELL - 1 for side in (view.rows, view.columns))
        return QWEN_RADIUS**2 * sum(side**2 for side in sides)

    # --- stage 2 ------------------------------------------------------------------------------

    def before_prompt(self, image: ImageTokens) -> ImageTokens:
        """How many of its tokens stay; newlines compete as well."""
        num_patches, own = math.prod(image.blocks[0]), self
        if self.own_grids:
            own = self.with_budget_of(num_patches * image.crops, image.crops)
        count = own.stage2_tokens(len(image.patches), num_patches, image.crops)
        return with_number(image, KEPT, count)

    def probe(self, num_layers: int) -> Probe:
        if self.stage2 != "attention":
            return Probe()
        return Probe((self.cut_layer(num_layers) - 1,), self.variant.queries)

    def blind_cuts(self, num_layers: int) -> tuple[int, ...]:
        return (self.cut_layer(num_layers),)

    def score(self, prefill: Prefill) -> Tensor:
        if self.stage2 == "attention":
            rows = prefill.recorded_rows.mean(dim=2)  # (B, H, S)
            return rows.amax(dim=1) if self.own_grids else rows.mean(dim=1)
        places, seed = prefill.position_ids, self.seed
        first, *others = places.unbind(dim=2) if places.ndim == 3 else [places]
        draw = scramble(scramble(first) + seed)
        for axis in others:
            draw = scramble(scramble(axis) + draw)
        return draw

    def budgets(self, prefill: Prefill) -> list[list[int]]:
        return prefill.image_numbers(KEPT)


def choose(salience: Tensor, view: View, sinks: Tensor | None = None) -> Tensor:
    """Places (G, K) in ascending order of the patches of grids (G, V) that stay; sinks: (G, V) True
    on those that do so where cells have no others alone."""
    if sinks is not None:
        salience = salience.masked_fill(sinks, -1.0)  # below any attention
    place = torch.arange(salience.shape[1], device=salience.device)
    count = view.keep
    if view.top:
        row, column = place // view.columns, place % view.columns
        cell = (row // CELL * math.ceil(view.columns / CELL) + column // CELL).expand_as(salience)
        rows, columns = view.rows, view.columns
        if not view.blocks:  # an odd last row or column belongs to no cell
            rows, columns = rows // CELL * CELL, columns // CELL * CELL
            outside = (row >= rows) | (column >= columns)
            salience = salience.masked_fill(outside, -torch.inf)
            cell = cell.masked_fill(outside, -1)
        offered = rank_within_groups(salience, cell) < view.top
        salience = salience.masked_fill(~offered, -torch.inf)
        count = min(count, offers(rows, columns, view.top))
    return top_stable(salience, count).sort(dim=1).values


def offers(rows: int, columns: int, top: int) -> int:
    """How many patches the cells of a grid offer; a cell at the border may be smaller."""
    sides = [
        [min(CELL, side - start) for start in range(0, side, CELL)] for side in (rows, columns)
    ]
    return sum(min(top, height * width) for height in sides[0] for width in sides[1])


def proximity(chosen: Tensor, view: View, distance: float) -> Tensor:
    """(G, K, V) 1 at the patches at `chosen` (G, K), falling to 0 at the radius sqrt(distance)."""
    place = torch.arange(view.rows * view.columns, device=chosen.device)
    down = chosen[..., None] // view.columns - place // view.columns
    across = chosen[..., None] % view.columns - place % view.columns
    return 1 - ((down**2 + across**2).float().sqrt() / distance**0.5).clamp(max=1)


def nuwa(model, matain_token: int = 64, distance: float | None = None):
    """Assigns Nüwa to `model` and returns it: the entry point of the release, spelling included.

    distance: None: what `Nuwa` has for the model, 280 on LLaVA
    """
    model.pruner = Nuwa(visual_token_num=matain_token, distance=distance)
    return model
