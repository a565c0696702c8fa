"""Nüwa: salient patches all over the grid gather their neighbours; the prompt picks among them.

Stage 1, after the encoder: every 2 x 2 cell offers its most salient patches, the best of all cells
stay. The more salient of them (pillars) stay as they are, the others (collectors) add up what is
near and similar. Stage 2, at half the depth of the decoder: those the last prompt token attends to
most stay. Every token keeps the position it has in the unpruned prompt.

Paper: https://arxiv.org/abs/2602.02951

Differs from the release: image spans come from the prompt (there, place 35); images of a prompt
and prompts of a batch are pruned one by one (there, they share one budget and one set of
positions); LLaVA-NeXT runs, with tile rows and columns in the right order and newlines in the
positions and in stage 2; any budget works; every layer is causal; single attention rows instead of
maps; another `distance` takes effect at once; fp32 arithmetic with stable ties.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .base import DecoderPruner
from .ops import normalize, rank_within_groups, scale_layer, top_stable
from .prefill import Prefill
from .published import Published
from .random import scramble
from .stages import Probe, VisionStage
from .tokens import ImageLayout, ImageTokens, VisionTokens

CELL = 2  # patches along the side of a cell
#: tokens after stage 1 on LLaVA-NeXT, and patches that a cell offers, as the release has them
NEXT_TOKENS = {64: 112, 128: 224, 160: 290, 192: 336, 320: 582, 640: 1162}
NEXT_TOP = {64: 1, 128: 2, 160: 2, 192: 3, 320: 3, 640: 3}
#: the number of an image's tokens that stage 2 leaves
KEPT = "kept"


class View(NamedTuple):
    """A grid that is pruned as one.

    keep:      patches to keep
    top:       patches that a cell offers; 0: there are no cells
    quantile:  share of the kept patches that are collectors
    untouched: nothing is dropped or blended
    """

    rows: int
    columns: int
    keep: int
    top: int
    quantile: float
    untouched: bool = False


@dataclass
class Nuwa(VisionStage, DecoderPruner):
    """
    visual_token_num:  tokens per image, averaged over the decoder layers: 7/4 of them enter it, 1/4
                       stay from `layer` on (64 = 112 and 16). On LLaVA-NeXT the sum over the crops,
                       newlines not counted: 20/11 enter, and a tenth of those stays
    layer:             first decoder layer that sees the tokens of stage 2; None: 16 of 32 layers,
                       scaled to the depth of the decoder
    distance:          square of the radius, in patches, within which a collector collects (280:
                       16.7 patches; 1058 is the diagonal of a 24 x 24 grid)
    pillar_quantile:   share of the kept patches that are collectors; None: 0.55, on LLaVA-NeXT 0.5
    pillar_mode:       what pillars lead in: "salience" (class-token attention), "l2norm" (of the
                       feature), or "none": all are collectors
    region:            keep the best of every 2 x 2 cell; False: the best of the whole image
    top_per_region:    patches a cell offers; None: the fewest that fill the budget, on LLaVA-NeXT
                       at least 2 (budgets up to 160; 64: 1) or 3 (192 and above 160)
    stage2:            "attention" of the last prompt token, "random" or "off"
    seed:              of stage2="random"
    """

    distance: float = 280.0
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
        },
    )
    needs = frozenset({"cls_attention"})
    position_policy = "grid"
    paper_layer = 16

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (
            ("pillar_mode", ("salience", "l2norm", "none")),
            ("stage2", ("attention", "random", "off")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"unknown {name} {value!r}, choose from {', '.join(choices)}")
        if self.distance <= 0:
            raise ValueError(f"distance ({self.distance}) must be above 0 squared patches")
        quantile = self.pillar_quantile
        if quantile is not None and not 0 <= quantile <= 1:
            raise ValueError(f"pillar_quantile ({quantile}) must lie between 0 and 1")
        if self.top_per_region not in (None, 1, 2, 3, 4):
            raise ValueError(f"top_per_region ({self.top_per_region}) must be 1 to {CELL**2}")

    # --- budgets ------------------------------------------------------------------------------

    def tokens_per_crop(self, num_patches: int, crops: int) -> int:
        """Tokens of stage 1 for each of the `crops` of an image."""
        total, side = self.visual_token_num, math.isqrt(num_patches)
        if total >= num_patches * crops:
            return num_patches
        wanted = min(round(7 * total / 4), 2 * total - 1)
        if crops > 1:
            wanted = max(1, NEXT_TOKENS.get(total, round(20 * total / 11)) // crops)
        whole_cells = (side // CELL * CELL) ** 2 if self.region else num_patches
        return min(wanted, whole_cells)

    def stage2_tokens(self, count: int, num_patches: int, crops: int) -> int:
        """Tokens of stage 2 of an image with `count` tokens in the decoder."""
        total = self.visual_token_num
        if self.stage2 == "off" or total >= num_patches * crops:
            return count
        if crops > 1:
            return max(1, count // 10)
        return min(count, 2 * total - self.tokens_per_crop(num_patches, 1))

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        self = self.with_budget_of(num_patches * crops)
        first, layer = self.tokens_per_crop(num_patches, crops) * crops, self.cut_layer(num_layers)
        second = self.stage2_tokens(first, num_patches, crops)
        return [first] * layer + [second] * (num_layers - layer)

    # --- stage 1 ------------------------------------------------------------------------------

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        return {layer: frozenset({"output"}) for layer in similarity_layers(num_layers)}

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        layers = similarity_layers(max(vision.layers) + 1)
        similar = sum(vision.layers[n]["output"].float() for n in layers) / len(layers)
        similar = similar.flatten(0, 1)  # (B * N, C)
        salience = vision.cls_attention.float().sum(dim=1).flatten()
        features = vision.features.flatten(0, 1).clone()
        kept = torch.zeros_like(salience, dtype=torch.bool)
        for view, places in self.views(vision).items():
            places = torch.stack(places)  # (G, V)
            if view.untouched:
                kept[places] = True
                continue
            chosen = choose(salience[places], view)
            own = features[places], similar[places], salience[places]
            blended, _ = self.collect(*own, chosen, view)
            chosen = places.gather(1, chosen)
            features[chosen], kept[chosen] = blended.to(features.dtype), True
        vision = replace(vision, features=features.view_as(vision.features), layers={})
        return vision.keep_mask(kept.view(vision.positions.shape))

    def views(self, vision: VisionTokens) -> dict[View, list[Tensor]]:
        """What is pruned as one grid, by shape and budget: single crops, and the tiles of an image
        as one. With each the places (V,) of its patches among the B * N, row by row."""
        device, (batch, num_patches) = vision.features.device, vision.features.shape[:2]
        layouts = vision.layouts or [ImageLayout(slice(n, n + 1)) for n in range(batch)]
        rows, columns = vision.grid
        views: dict[View, list[Tensor]] = {}
        for layout in layouts:
            first, crops = layout.crops.start, layout.crops.stop - layout.crops.start
            singles = crops if layout.tiles is None else 1
            view = self.view(rows, columns, 1, num_patches, crops)
            for crop in range(first, first + singles):
                places = torch.arange(num_patches, device=device) + crop * num_patches
                views.setdefault(view, []).append(places)
            if layout.tiles is not None:
                top, bottom, left, right = layout.window
                row = torch.arange(top, bottom, device=device)[:, None]
                column = torch.arange(left, right, device=device)
                tile = row // rows * layout.tiles[0] + column // columns
                places = row % rows * columns + column % columns
                places = (first + 1 + tile) * num_patches + places
                view = self.view(bottom - top, right - left, crops - 1, num_patches, crops)
                views.setdefault(view, []).append(places.flatten())
        return views

    def view(self, rows: int, columns: int, share: int, num_patches: int, crops: int) -> View:
        """A grid that has the budget of `share` of the `crops` of its image."""
        untouched = self.visual_token_num >= num_patches * crops
        keep = self.tokens_per_crop(num_patches, crops) * share
        needed = math.ceil(keep * CELL**2 / (rows * columns))  # of every cell
        top = self.top_per_region or 1
        if crops > 1 and self.top_per_region is None:
            top = NEXT_TOP.get(self.visual_token_num, 2 if self.visual_token_num <= 160 else 3)
        if crops > 1 and top < needed >= CELL**2:
            keep = rows * columns  # as released: a budget of more than 3 of 4 patches keeps all
        if crops > 1 or self.top_per_region is None:
            top = min(max(top, needed), CELL**2)
        if not self.region:
            top = 0
        quantile = self.pillar_quantile
        if quantile is None:
            quantile = 0.55 if crops == 1 else 0.5
        return View(rows, columns, keep, top, quantile, untouched)

    def collect(
        self, features: Tensor, similar: Tensor, salience: Tensor, chosen: Tensor, view: View
    ) -> tuple[Tensor, Tensor]:
        """Features (G, K, C) in fp32 of the patches at `chosen` (G, K), and (G, K) which of them
        are pillars. features, similar (G, V, C) and salience (G, V) are those of whole grids."""
        features, own = features.float(), chosen[..., None]
        plain = features.take_along_dim(own, dim=1)
        lead = salience.gather(1, chosen) if self.pillar_mode == "salience" else plain.norm(dim=-1)
        threshold = lead.quantile(view.quantile, dim=1, keepdim=True)
        pillar = lead >= threshold if self.pillar_mode != "none" else torch.zeros_like(lead).bool()
        unit = normalize(similar)
        weight = (unit.take_along_dim(own, dim=1) @ unit.transpose(1, 2)).relu()  # (G, K, V)
        weight = weight * proximity(chosen, view, self.distance)
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-8)
        weight = weight.scatter(2, own, 1.0)  # a collector counts in full beside what it collects
        return torch.where(pillar[..., None], plain, weight @ features), pillar

    # --- stage 2 ------------------------------------------------------------------------------

    def before_prompt(self, image: ImageTokens) -> ImageTokens:
        """How many of its tokens stay; newlines compete as well."""
        rows, columns = image.blocks[0]
        count = self.stage2_tokens(len(image.patches), rows * columns, image.crops)
        return replace(image, image_extras={**image.image_extras, KEPT: count})

    def probe(self, num_layers: int) -> Probe:
        return super().probe(num_layers) if self.stage2 == "attention" else Probe()

    def score(self, prefill: Prefill) -> Tensor:
        if self.stage2 == "attention":
            return super().score(prefill)
        return scramble(scramble(prefill.position_ids) + self.seed)

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        if self.stage2 == "off" or index != self.cut_layer(len(prefill.decoder.layers)):
            return prefill
        return prefill.keep_visual(self.score(prefill), prefill.image_numbers(KEPT))


def similarity_layers(num_layers: int) -> range:
    """Tower layers whose mean output says how alike patches are: 15 to 23 of 24."""
    return range(scale_layer(15, num_layers, reference=24), num_layers)


def choose(salience: Tensor, view: View) -> Tensor:
    """Places (G, K) in ascending order of the patches of grids (G, V) that stay."""
    place = torch.arange(salience.shape[1], device=salience.device)
    count = view.keep
    if view.top:
        cells_across, rows, columns = (
            view.columns // CELL,
            place // view.columns,
            place % view.columns,
        )
        cell = (rows // CELL * cells_across + columns // CELL).expand_as(salience)
        # An odd last row or column belongs to no cell.
        inside = (rows < view.rows // CELL * CELL) & (columns < cells_across * CELL)
        salience = salience.masked_fill(~inside, -torch.inf)
        offered = rank_within_groups(salience, cell.masked_fill(~inside, -1)) < view.top
        salience = salience.masked_fill(~offered, -torch.inf)
        count = min(count, view.rows // CELL * cells_across * view.top)
    return top_stable(salience, count).sort(dim=1).values


def proximity(chosen: Tensor, view: View, distance: float) -> Tensor:
    """(G, K, V) 1 at the patches at `chosen` (G, K), falling to 0 at the radius sqrt(distance)."""
    place = torch.arange(view.rows * view.columns, device=chosen.device)
    down = chosen[..., None] // view.columns - place // view.columns
    across = chosen[..., None] % view.columns - place % view.columns
    return 1 - ((down**2 + across**2).float().sqrt() / distance**0.5).clamp(max=1)


def nuwa(model, matain_token: int = 64, distance: float = 280):
    """Assigns Nüwa to `model` and returns it: the entry point of the release, spelling included."""
    model.pruner = Nuwa(visual_token_num=matain_token, distance=distance)
    return model
