"""CDPruner: the subset with the largest determinant of a kernel of similarity and relevance.

Paper: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs,
https://arxiv.org/abs/2506.10967

Differs from the release: relevance is scaled within an image (there, over the whole batch, so that
the answer depends on what else is asked); constant relevance counts as none (there, a division by
zero); what depends linearly on the picks comes last, most relevant first, and no token is picked
twice (there, fewer tokens than asked for remain); a batch may mix questions of any length; without
a question, diversity alone decides (there, an error); no streams, no device-wide synchronisation.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..weight_files import CACHE_DIR, local_folder, weight_files
from .base import SelectPruner
from .captured import captured
from .ops import normalize
from .tokens import VisionTokens

#: last lines that say how to answer, not what is asked
ANSWER_FORMATS = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
    "\n请直接回答选项字母。",
)
#: a span of cosines, and a share of a token's own weight, that count as zero in fp32
NEGLIGIBLE = 1e-6
#: the extra from one hook to the next: (B, N) how much of the question a patch is about
RELEVANCE = "relevance"
QUESTIONS_REMEMBERED = 256
VOCABULARY = 1024  # of the random text tower


@dataclass
class CDPruner(SelectPruner):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT the sum over its five crops (640 = 5 x 128)
    theta:            weight of relevance against diversity, from 0 (none: the question is not read,
                      and no text tower is needed) to below 1; None: the kernel takes relevance as
                      it is, as in the paper's tables
    """

    visual_token_num: int = 64
    theta: float | None = None

    name = "cdpruner"
    needs = frozenset({"text_tower"})
    does_without = {"text_tower": "theta=0 for diversity alone"}
    reads_question = True
    anyres_tiles = (2, 2)

    def __post_init__(self):
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"theta ({self.theta}) must lie from 0 to below 1")
        if self.theta == 0:
            self.needs, self.reads_question = frozenset(), False

    def use_random_parts(self, model) -> None:
        if self.theta == 0:
            return
        tower = model.get_vision_tower()
        self.module = ClipText.random(tower.config)

    def attach(self, model: nn.Module) -> None:
        tower = model.get_vision_tower()
        if tower is not None and self.theta != 0:
            folder = tower.vision_tower_name
            if self.module is None or self.module.folder not in (None, folder):
                self.module = ClipText.load(folder)
            if tower.is_loaded:
                self.module.to(tower.device, tower.dtype)
            width = self.module.projection.in_features
            if tower.hidden_size != width:
                raise ValueError(
                    f"{self.name} compares features of width {width} with the question, this "
                    f"vision tower gives {tower.hidden_size}"
                )

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        """Leaves the relevance of every patch to the question about its image."""
        if vision.questions is None:
            return vision
        texts = self.module.directions([bare_question(text) for text in vision.questions])
        patches = normalize(self.module.image_embeds(vision.features))
        cosine = (patches @ texts[vision.image_index][..., None])[..., 0]
        # Patches of CLIP resemble a text least where it is about them, hence the sign.
        relevance = scale_per_image(-cosine, vision.image_index)
        if self.theta is not None:
            relevance = torch.exp(relevance * self.theta / (2 * (1 - self.theta)))
        return replace(vision, extras={**vision.extras, RELEVANCE: relevance})

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        kept = super().after_encoder(vision)
        kept.extras.pop(RELEVANCE, None)  # of no use to the decoder
        return kept

    def select(self, vision: VisionTokens) -> Tensor:
        relevance = vision.extras.get(RELEVANCE)
        if relevance is None:
            relevance = torch.ones_like(vision.positions, dtype=torch.float32)
        return largest_volume(vision.features, relevance, self.num_keep(vision))


class ClipText(nn.Module):
    """What maps texts and patches into the space CLIP compares them in.

    text:       text model with projection
    norm, projection: of the vision model
    tokenizer:  of the text model
    folder:     where all of it comes from; None: it is random
    """

    def __init__(self, text, norm: nn.LayerNorm, projection: nn.Linear, tokenizer, folder=None):
        super().__init__()
        self.folder = folder
        self.text, self.norm, self.projection = text, norm, projection
        self.tokenizer = tokenizer
        self.known: dict[str, Tensor] = {}
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: str) -> "ClipText":
        """From the folder or hub name of a full CLIP model; ValueError when it is not full."""
        from transformers import (
            CLIPTextModelWithProjection,
            CLIPTokenizerFast,
            CLIPVisionModelWithProjection,
        )

        try:
            folder = local_folder(folder)
            weight_files(folder)  # all there, none outside of the folder
        except OSError as error:
            raise ValueError(f"{folder} holds no weights of a CLIP model: {error}") from error
        parts = []
        for kind in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection):
            try:
                part, info = kind.from_pretrained(
                    folder, output_loading_info=True, cache_dir=CACHE_DIR.get()
                )
            except OSError as error:
                raise ValueError(f"{folder} holds no weights of a CLIP model: {error}") from error
            if info["missing_keys"]:
                raise ValueError(
                    f"{folder} lacks {len(info['missing_keys'])} weights of a full CLIP model, "
                    f"{info['missing_keys'][0]} for one: this method needs the text tower and both "
                    "projections beside the vision tower"
                )
            parts.append(part)
        text, vision = parts
        tokenizer = CLIPTokenizerFast.from_pretrained(folder, cache_dir=CACHE_DIR.get())
        norm = vision.vision_model.post_layernorm
        return cls(text, norm, vision.visual_projection, tokenizer, folder)

    @classmethod
    def random(cls, vision) -> "ClipText":
        """Random weights in the sizes of CLIP's text tower, beside a vision tower of config
        `vision`; its tokenizer reads letter by letter."""
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        width = vision.projection_dim
        # Released CLIP models have a text tower as wide as the space both towers meet in.
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=max(1, width // 64),
            vocab_size=VOCABULARY,
            projection_dim=width,
        )
        norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        projection = nn.Linear(vision.hidden_size, width, bias=False)
        return cls(CLIPTextModelWithProjection(config), norm, projection, letters)

    def image_embeds(self, features: Tensor) -> Tensor:
        """(B, N, P) embeddings of patch features (B, N, C)."""
        return self.projection(self.norm(features.to(self.projection.weight.dtype))).float()

    def directions(self, texts: list[str]) -> Tensor:
        """(n, P) means of the unit embeddings of each text's segments."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            if len(self.known) + len(new) > QUESTIONS_REMEMBERED:
                self.known = {text: self.known[text] for text in texts if text in self.known}
            segments = [self.segments(text) for text in new]
            embeds = normalize(self.embed([ids for own in segments for ids in own]))
            parts = embeds.split([len(own) for own in segments])
            self.known |= {text: own.mean(dim=0) for text, own in zip(new, parts, strict=True)}
        return torch.stack([self.known[text] for text in texts]).to(self.projection.weight.device)

    def segments(self, text: str) -> list[list[int]]:
        """The ids of a text, start and end mark included, cut at the length the model can read."""
        ids = self.tokenizer(text, verbose=False).input_ids
        size = self.text.config.max_position_embeddings
        return [ids[start : start + size] for start in range(0, len(ids), size)]

    def embed(self, segments: list[list[int]]) -> Tensor:
        """(m, P) embeddings of m segments."""
        rows = [torch.tensor(ids) for ids in segments]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        device = self.projection.weight.device
        with torch.no_grad():
            return self.text(ids.to(device), attention_mask=mask.to(device)).text_embeds.float()


class Letters(NamedTuple):
    """What a tokenizer returns."""

    input_ids: list[int]


def letters(text: str, **_) -> Letters:
    """A tokenizer without a vocabulary: one id per letter."""
    return Letters([1, *(2 + ord(letter) % 1000 for letter in text), VOCABULARY - 1])


def bare_question(text: str) -> str:
    """The question without image marks and without the line that says how to answer."""
    text = text.replace("<image>\n", "").replace("<image>", "")
    for ending in ANSWER_FORMATS:
        text = text.removesuffix(ending)
    return text


def scale_per_image(score: Tensor, image_index: Tensor) -> Tensor:
    """Scores (B, N) brought to 0 ... 1 over the crops of each image; 1 where all are equal."""

    def over_image(values: Tensor, how: str) -> Tensor:
        best = torch.zeros_like(values).scatter_reduce_(
            0, image_index, values, how, include_self=False
        )
        return best[image_index][:, None]

    low = over_image(score.amin(dim=1), "amin")
    span = over_image(score.amax(dim=1), "amax") - low
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
    picks, gains = (torch.cat(parts, dim=1).squeeze(2) for parts in (picks, gains))
    return spanned_last(picks, (gains > 0).cumprod(dim=1), relevance)


def spanned_last(picks: Tensor, independent: Tensor, relevance: Tensor) -> Tensor:
    """(B, count) `picks` as long as they are `independent` (ones, then zeros); from there on the
    places that are not among them, by falling relevance (B, N)."""
    taken = torch.zeros_like(relevance, dtype=torch.long).scatter_reduce(
        1, picks, independent, "amax"
    )
    by_relevance = relevance.argsort(dim=1, descending=True, stable=True)
    others = by_relevance.gather(1, taken.gather(1, by_relevance).argsort(dim=1, stable=True))
    rank = torch.arange(picks.shape[1], device=picks.device) - independent.sum(dim=1, keepdim=True)
    return torch.where(independent.bool(), picks, others.gather(1, rank.clamp(min=0)))
