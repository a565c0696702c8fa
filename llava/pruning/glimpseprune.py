"""GlimpsePrune: a learned token glances at the image, and decides how much of it is needed.

Paper: A Glimpse to Compress: Dynamic Visual Token Pruning for Large Vision-Language Models,
https://arxiv.org/abs/2508.01548

A trained token, the glimpse, stands behind the prompt. What it attends to in one decoder layer,
with hidden states of the vision tower, goes through a small transformer that gives every visual
token a probability of being needed. After `reduce_layer` the tokens below the threshold leave the
hidden states and the caches of all layers, and the glimpse leaves with them. Positions stay.

Differs from the release: attention rows and angles are fp32; any attention backend; batches (on
Qwen2.5-VL in decoding, too), several images and LLaVA-NeXT work: every crop is judged by itself,
cap and minimum are those of the whole prompt, and a newline token stays when a token of its row
does. What the release keeps on its model from call to call is said in the call. No `use_zero_masks`
(a threshold of 1 does the same) and no `AttnFuserDummy`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..devices import device_of, empty_like_weights, moved
from .base import Pruner
from .extras import with_extra, with_number, without_extra
from .glimpseprune_call import GlimpseRelease
from .glimpseprune_modules import PAPER_LAYER, Glimpse, GlimpseConfig
from .glimpseprune_reference import check_boxes, check_masks, check_uncut, reference_cells
from .glimpseprune_views import CROPS, Views, shapes_of
from .interfaces import LanguageModel
from .learned import CONFIG_FILE, WEIGHTS_FILE, build_part, part_folder, read_part, read_part_config
from .ops import lookup, on_device, rank_within_groups, scale_layer
from .option_types import check_saved
from .prefill import Prefill
from .required import assigned, tower_of
from .stages import DecoderStage, Probe, VisionStage, fills
from .tokens import ImageTokens, VisionTokens

logger = logging.getLogger(__name__)

#: weight files, ours and the published ones
WEIGHTS_FILES = (WEIGHTS_FILE, "new_modules_gp.safetensors", "new_modules_gp.pt")
#: the extra that holds what the predictor sees of the tower for each token
CONDITIONS = "conditions"
#: corner -> (row, column) as shares of the last one
ANCHORS = {"tl": (0, 0), "tr": (0, 1), "bl": (1, 0), "br": (1, 1)}
#: what the paper uses where neither the caller nor the trained part says otherwise
DEFAULTS = {
    "reduce_threshold": 0.5,
    "min_remain_num": 1,
    "max_remain_ratio": None,
    "anchor_positions": (),
}


@dataclass
class GlimpseState:
    """What a prefill remembers.

    vectors: decoder layer -> (le_length, D) added to the glimpse before it
    rows:    decoder layer -> (B, H, S) what the last glimpse token paid each token there
    """

    vectors: dict[int, Tensor]
    rows: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class GlimpsePrune(VisionStage, DecoderStage, Pruner):
    """
    visual_token_num: most tokens an image keeps (several images share the sum); None: no cap
    max_remain_ratio: the same as a share of the image's tokens; the smaller cap holds
    reduce_threshold: tokens with a larger probability stay
    min_remain_num:   tokens that stay in any case: the most probable ones
    anchor_positions: corners that stay in any case: of "tl", "tr", "bl", "br", in a list or in one
                      text ("tl,br")
    new_modules:      folder of the trained part, ours or the published layout, or hub repository;
                      None: the one of the playground, on the playground's model
    ref_boxes:        diagnosis, in place of the glimpse: what these boxes cover stays; boxes are
                      (left, top, right, bottom), as shares of the picture the tower sees. They hold
                      for all images, or are one list for each image of a call (None: all of it);
                      images that are cut into tiles have no such picture
    ref_masks:        likewise, one for each image of a call: True where a token stays (h, w), or a
                      picture that is bright there
    prune_videos:     every pair of frames of a video is judged as an image is; else videos stay
                      whole, as in the release

    None for `reduce_threshold`, `min_remain_num`, `max_remain_ratio` and `anchor_positions` is what
    the trained part says; the paper: 0.5, 1, no cap, none. All but `new_modules` may be given to
    `generate` for one call, which may also say `do_selection=False`.
    """

    visual_token_num: int | None = None
    max_remain_ratio: float | None = None
    reduce_threshold: float | None = None
    min_remain_num: int | None = None
    anchor_positions: str | Sequence[str] | None = None
    new_modules: str | None = None
    ref_boxes: Sequence | None = None
    ref_masks: Sequence | None = field(default=None, repr=False)
    prune_videos: bool = False

    name = "glimpseprune"
    published = GlimpseRelease()
    adaptive = True
    reads_text = True

    def __post_init__(self):
        self.module: Glimpse | None = None
        self.saved: dict = {}  # settings in the config of the trained part
        if self.visual_token_num is not None and self.visual_token_num < 1:
            raise ValueError(f"visual_token_num ({self.visual_token_num}) must be at least 1 token")
        if self.max_remain_ratio is not None and not 0 < self.max_remain_ratio <= 1:
            raise ValueError(f"max_remain_ratio ({self.max_remain_ratio}) must be above 0, up to 1")
        if self.reduce_threshold is not None and not 0 <= self.reduce_threshold <= 1:
            raise ValueError(f"reduce_threshold ({self.reduce_threshold}) must be from 0 to 1")
        if self.min_remain_num is not None and self.min_remain_num < 0:
            raise ValueError(f"min_remain_num ({self.min_remain_num}) must not be negative")
        if isinstance(self.anchor_positions, str):  # a word of a command line
            self.anchor_positions = tuple(self.anchor_positions.replace(",", " ").split())
        if unknown := set(self.anchor_positions or ()) - set(ANCHORS):
            raise ValueError(
                f"anchor_positions {sorted(unknown)} are unknown, choose from {', '.join(ANCHORS)}"
            )
        if self.ref_boxes is not None and self.ref_masks is not None:
            raise ValueError("ref_boxes and ref_masks both say which tokens stay: give one of them")
        if self.ref_boxes is not None:
            check_boxes(self.ref_boxes)
        if self.ref_masks is not None:
            check_masks(self.ref_masks)

    @property
    def asks_glimpse(self) -> bool:
        """Whether there is no reference in its place."""
        return self.ref_boxes is None and self.ref_masks is None

    def with_options(self, **options) -> GlimpsePrune:
        """The same method with other options and the same trained part."""
        other = replace(self, **options)
        other.module, other.saved = self.module, self.saved
        return other

    def setting(self, name: str):
        """The caller's value of an option, else that of the trained part, else the paper's."""
        given = getattr(self, name)
        return self.saved.get(name, DEFAULTS[name]) if given is None else given

    # --- the trained part ---------------------------------------------------------------------

    def attach(self, model: LanguageModel) -> None:
        tower = tower_of(model, self.name)
        if self.module is None:
            self.module = self.load(model)
        config = self.module.config
        fits = (config.hidden_size, config.num_attention_heads, config.mm_hidden_size)
        needed = (model.config.hidden_size, model.config.num_attention_heads, tower.hidden_size)
        if fits != needed:
            raise ValueError(
                f"the trained part of {self.name} is for a decoder and tower with (width, heads, "
                f"tower width) {fits}, this model has {needed}"
            )
        config.check_depth(model.config.num_hidden_layers, tower.depth[0])
        self.module.to(device_of(model.get_input_embeddings()))

    @property
    def trained(self) -> Glimpse:
        """`module`, see `assigned`."""
        return assigned(self.module, self.name)

    def part_folders(self, model_path: str) -> list[str]:
        return [part_folder(self.name, self.new_modules, model_path, "new_modules")]

    def load(self, model: LanguageModel) -> Glimpse:
        """Reads the trained part that belongs to `model`."""
        (folder,) = self.part_folders(getattr(model.config, "_name_or_path", ""))
        values = read_part_config(folder, self.name)
        self.saved = saved_settings(values, os.path.join(folder, CONFIG_FILE))
        config = GlimpseConfig.from_values(values, model)
        source, tensors = read_part(folder, WEIGHTS_FILES)
        like = empty_like_weights(model.get_input_embeddings())
        return build_part(lambda: Glimpse(config), tensors, source, like)

    def use_random_parts(self, model: LanguageModel) -> None:
        like = empty_like_weights(model.get_input_embeddings())
        made = Glimpse(GlimpseConfig.for_model(model)).to(like).requires_grad_(False)
        made.initialize()
        self.module = made.eval()

    def last_dense_layer(self, num_layers: int) -> int:
        """`reduce_layer`: the last layer that sees all visual tokens."""
        if self.module is None:
            return scale_layer(PAPER_LAYER, num_layers)
        return min(self.module.config.reduce_layer, num_layers - 1)

    # --- before the decoder -------------------------------------------------------------------

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        # A part that is not there yet asks for layers, too: for one that every tower has.
        layers = (selected,) if self.module is None else self.module.config.tower_layers
        return {layer: frozenset({"output"}) for layer in layers}

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        glimpse, here = self.trained, vision.features.device
        states = [vision.layers[layer]["output"] for layer in glimpse.config.tower_layers]
        if vision.block > 1:
            states = [x.unflatten(-1, (vision.block, -1)).mean(dim=-2) for x in states]
        states = moved(states, device_of(glimpse))
        conditions = glimpse.attn_fuser.conditions(states).to(here)
        return with_extra(vision, CONDITIONS, conditions)

    def before_prompt(self, image: ImageTokens) -> ImageTokens:
        whole = bool(image.frame_pairs) and not self.prune_videos
        if whole:
            say_videos_stay()
        return with_number(image, CROPS, 0 if whole else image.crops)

    # --- inside the decoder -------------------------------------------------------------------

    def probe(self, num_layers: int) -> Probe:
        if not self.asks_glimpse:
            return Probe()
        config = self.trained.config
        form = "scores" if config.use_attention_logits else "log_weights"
        return Probe(config.selected_layers, form=form)

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        if not judges_any(prefill):
            return prefill
        if index == 0:
            self.check_anchors(prefill)
            if self.asks_glimpse:
                return self.add_glimpse(prefill)
            if not prefill.has_axes:  # where they have, crops are frames
                most = max(map(max, filter(None, prefill.image_extras[CROPS])))
                check_uncut(self.ref_boxes, self.ref_masks, most)
            return prefill
        prefill = self.remember_row(index, prefill)
        if index == self.last_dense_layer(len(prefill.decoder.layers)) + 1:
            return self.reduce(prefill)
        vectors = {} if prefill.state is None else prefill.state.vectors
        return add_to_glimpse(prefill, vectors[index]) if index in vectors else prefill

    def after_layers(self, prefill: Prefill) -> Prefill:
        if not judges_any(prefill):
            return prefill
        count = len(prefill.decoder.layers)
        prefill = self.remember_row(count, prefill)
        return self.reduce(prefill) if self.last_dense_layer(count) == count - 1 else prefill

    def acts_behind(self, num_layers: int) -> bool:
        if "after_layers" in vars(self) or fills(type(self), GlimpsePrune, "after_layers"):
            return True  # of others, who built on this class
        return self.last_dense_layer(num_layers) == num_layers - 1

    def pruned_caches(self, index: int, num_layers: int) -> range:
        return range(index) if index == self.last_dense_layer(num_layers) + 1 else range(0)

    def check_anchors(self, prefill: Prefill) -> None:
        """Raises ValueError for corners of several images that have grids of their own."""
        several = [sum(row) for row in prefill.image_extras[CROPS] if sum(row) > 1]
        if prefill.has_axes and several and self.setting("anchor_positions"):
            raise ValueError(
                f"anchor_positions are defined for one image in a prompt, but one holds "
                f"{several[0]}: leave them out (anchor_positions=())"
            )

    def add_glimpse(self, prefill: Prefill) -> Prefill:
        vectors = self.trained.vectors()
        last = self.last_dense_layer(len(prefill.decoder.layers))
        used = {layer: vector for layer, vector in vectors.items() if layer <= last}
        prefill.state = GlimpseState(moved(used, prefill.index.device))
        if not vectors:
            return prefill
        start = vectors[0]
        return prefill.append(start.expand(len(prefill.hidden_states), *start.shape))

    def remember_row(self, index: int, prefill: Prefill) -> Prefill:
        """Keeps what the last glimpse token paid each token in the layer before `index`."""
        if prefill.attention is not None:
            prefill.state.rows[index - 1] = prefill.attention[:, :, 0]
        return prefill

    def reduce(self, prefill: Prefill) -> Prefill:
        """Without the glimpse and without the visual tokens that are not needed."""
        patch, every = prefill.patch_index, judges_all(prefill)
        judged = patch >= 0
        if not every:
            judged = judged & (prefill.at_tokens(prefill.image_values(CROPS)) > 0)
        ignored = ~judged
        views = Views.of(
            prefill.visual_index,
            patch if every else patch.masked_fill(ignored, -1),
            prefill.image_extras,
            prefill.counts,
        )
        if self.asks_glimpse:
            chance = self.importance(prefill, views).sigmoid()
        else:
            images = shapes_of(prefill.image_extras)
            cells = reference_cells(self.ref_boxes, self.ref_masks, images)
            chance = views.scatter(cells.float().to(judged.device, non_blocking=True))
        chance = chance.masked_fill(ignored, 0)
        prefill.record_importance(chance.masked_fill(ignored, float("nan")))
        kept = self.choose(chance, judged, prefill)
        if not (prefill.has_axes or views.complete):  # complete images have no newlines
            kept = kept | self.newlines(kept, prefill)
        if not every:
            kept = kept | ((patch >= 0) & ignored)
        text = ~prefill.is_visual & (prefill.index >= 0)
        return without_extra(prefill, CONDITIONS).keep(text | kept)

    def importance(self, prefill: Prefill, views: Views) -> Tensor:
        """(B, S) logits of the visual tokens; values on other tokens mean nothing."""
        glimpse = self.trained
        rows = [prefill.state.rows[layer] for layer in glimpse.config.selected_layers]
        inputs = moved((rows, prefill.extras[CONDITIONS], views), device_of(glimpse))
        logits = glimpse.judge(*inputs)[-1]
        return views.scatter(logits.to(prefill.index.device))

    def choose(self, chance: Tensor, judged: Tensor, prefill: Prefill) -> Tensor:
        """(B, S) True on the visual tokens that stay: threshold, cap, minimum, anchors."""
        rank = rank_within_groups(chance, judged.long())
        kept = judged & (chance > self.setting("reduce_threshold"))
        for over, most in self.caps(kept, judged, prefill):
            capped = judged & (rank < most[:, None])
            kept = torch.where(over[:, None], capped, kept)
        least = self.setting("min_remain_num") or 0
        kept = kept | (judged & (rank < least) & (kept.sum(dim=1) < least)[:, None])
        for name in self.setting("anchor_positions") or ():
            down, across = ANCHORS[name]
            corners = [
                [(down * (h - 1) * w + across * (w - 1)) if h else -1 for h, w in row]
                for row in prefill.grids
            ]
            corner = prefill.at_tokens(on_device(corners, judged.device))
            kept = kept | (judged & (prefill.patch_index == corner))
        return kept

    def caps(self, kept: Tensor, judged: Tensor, prefill: Prefill):
        """Which prompts (B,) exceed a cap, and what they may keep (B,); one pair for each cap.

        kept, judged: (B, S) flags of the visual tokens
        """
        if self.visual_token_num is None and self.setting("max_remain_ratio") is None:
            return
        count, total = kept.sum(dim=1), judged.sum(dim=1)
        if (ratio := self.setting("max_remain_ratio")) is not None:
            # A few sizes, so that prompts of other lengths find the tables that are there.
            size = 1 << prefill.index.shape[1].bit_length()
            share = lookup(share_down, total, ratio, size)
            yield count > lookup(most_within, total, ratio, size), share
        if self.visual_token_num is not None:
            pairs = zip(prefill.counts.images, prefill.image_numbers(CROPS), strict=True)
            rows = [[n for n, crops in zip(*row, strict=True) if crops] for row in pairs]
            sums = [sum(min(n, self.visual_token_num) for n in row) for row in rows]
            most = on_device(sums, total.device)
            if ratio is not None:
                most = torch.minimum(most, share)
            yield count > most, most

    def newlines(self, kept: Tensor, prefill: Prefill) -> Tensor:
        """(B, S) True on the newline tokens whose row of patches keeps one."""
        newline = prefill.is_visual & (prefill.patch_index < 0)
        # The overview in front of the tiles has no newlines: its tokens are no part of a row.
        overview = [[h * w for h, w in row] for row in prefill.grids]
        tile = prefill.patch_index >= prefill.at_tokens(on_device(overview, newline.device))
        behind_tile = tile.roll(1, dims=1)
        row = newline.long().cumsum(dim=1) - newline.long()
        group = 2 * row + torch.where(newline, behind_tile, tile).long()
        alive = torch.zeros_like(group.repeat(1, 2)).scatter_add(1, group, kept.long())
        return newline & (alive.gather(1, group) > 0)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        dense, last = num_patches * crops, self.last_dense_layer(num_layers)
        most = dense
        if (ratio := self.setting("max_remain_ratio")) is not None:
            most = min(most, most_within(dense, ratio))
        if self.visual_token_num is not None:
            most = min(most, self.visual_token_num)
        most = max(most, self.setting("min_remain_num") or 0)
        most = min(most + len(self.setting("anchor_positions") or ()), dense)
        return [dense] * (last + 1) + [most] * (num_layers - last - 1)


def saved_settings(values: dict, source: str) -> dict:
    """Of the values in the config of a trained part, `source`, the options of the method, under the
    same checks as those of a caller."""
    saved = {name: value for name, value in values.items() if name in DEFAULTS}
    check_saved(GlimpsePrune, saved, source)
    try:
        method = GlimpsePrune(**saved)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return {name: getattr(method, name) for name in saved}


@lru_cache
def say_videos_stay() -> None:
    """Says, once, what becomes of videos where nobody asked for more."""
    logger.warning("glimpseprune leaves videos whole: prune_videos=True prunes them, too")


def judges_any(prefill: Prefill) -> bool:
    """Whether the prompts hold anything that is judged."""
    return any(map(any, prefill.image_extras.get(CROPS, ())))


def judges_all(prefill: Prefill) -> bool:
    """Whether all patches are judged, which those of videos that stay whole are not."""
    return all(map(all, prefill.image_extras[CROPS]))


def share_down(count: int, share: float) -> int:
    """A share of `count`, rounded down."""
    return int(count * share)


def most_within(total: int, share: float) -> int:
    """The largest count whose quotient by `total` does not exceed `share`."""
    count = share_down(total, share) + 1
    return count if total and count / total <= share else count - 1


def add_to_glimpse(prefill: Prefill, vector: Tensor) -> Prefill:
    """`vector` (le_length, D) added to the glimpse, the last tokens of every prompt.

    In place unless gradients are recorded: copying all tokens before every layer is dear.
    """
    x, count = prefill.hidden_states, len(vector)
    if not torch.is_grad_enabled():
        x[:, -count:].add_(vector.to(x.dtype))
        return prefill
    glimpse = x[:, -count:] + vector.to(x.dtype)
    return replace(prefill, hidden_states=torch.cat([x[:, :-count], glimpse], dim=1))
