"""What GlimpsePrune learns from: the answer, and boxes around what the question needs.

The glimpse stands between question and answer, where a frozen model would start to write. Tokens
before it do not see it, so they run once without gradients and leave their keys and values; only
the glimpse and the answer run with gradients. Losses and gradients are those of one pass over
everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.model.kv_cache import KVCache
from llava.model.language_model.attention import padded_causal_mask
from llava.model.language_model.modeling_llama import Step
from llava.model.prompt import positions_behind
from llava.pruning.glimpseprune import CONDITIONS
from llava.pruning.glimpseprune_views import Views

MASK_LOSSES = ("MaskLoss", "DiceLoss", "BCELoss")


@dataclass
class LossWeights:
    """
    le_weight:       of the answer's cross-entropy, which trains the glimpse vectors alone
    loc_weight:      of the mask losses, which train predictor and glimpse vectors
    loc_loss_class:  "MaskLoss" (both of the next), "DiceLoss" or "BCELoss"
    loc_dice_weight, loc_bce_weight: parts of "MaskLoss"
    """

    le_weight: float = 1.0
    loc_weight: float = 1.0
    loc_loss_class: str = "MaskLoss"
    loc_dice_weight: float = 1.0
    loc_bce_weight: float = 0.1

    def __post_init__(self):
        if self.loc_loss_class not in MASK_LOSSES:
            raise ValueError(
                f"loc_loss_class {self.loc_loss_class!r} is unknown, "
                f"choose from {', '.join(MASK_LOSSES)}"
            )

    def mask_loss(self, dice: Tensor, bce: Tensor) -> Tensor:
        if self.loc_loss_class == "DiceLoss":
            return dice
        if self.loc_loss_class == "BCELoss":
            return bce
        return self.loc_dice_weight * dice + self.loc_bce_weight * bce


class GlimpseObjective(nn.Module):
    """The losses of a batch; `llava.pruner` is a GlimpsePrune whose module is trained.

    The rest of `llava`, a model of any family, is frozen. Images have one crop each.
    """

    def __init__(self, llava: nn.Module, weights: LossWeights | None = None):
        super().__init__()
        self.llava = llava.requires_grad_(False)
        self.weights = weights or LossWeights()
        llava.pruner.module.requires_grad_(True)

    @property
    def glimpse(self) -> nn.Module:
        """The part that is trained."""
        return self.llava.pruner.module

    def train(self, mode: bool = True) -> GlimpseObjective:
        """As of every module; the frozen model takes prompts as it does when it is used, whole,
        and not cut to the length that it was trained with."""
        super().train(mode)
        self.llava.eval()
        self.glimpse.train(mode)
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        labels: Tensor,
        images: Tensor | list[Tensor],
        masks: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Losses, and counts of hits (3,) (true positive, false positive, false negative tokens).

        input_ids, attention_mask:  (B, P) up to the first supervised token, padded on the left
        answer_ids, answer_mask, labels: (B, T) from there on, padded on the right
        images: as `generate` takes them
        masks:  one (h, w) for each image, True on the tokens that the question needs
        """
        prompt = self.llava.build_prompt(
            input_ids, attention_mask, images=images, padding_side="left"
        )
        hidden, rows = self._run(prompt, answer_ids, answer_mask)
        views = Views.of(
            prompt.visual_index, prompt.patch_index, prompt.image_extras, prompt.counts
        )
        grids = tuple(tuple(mask.shape) for mask in masks)
        if not views.complete or views.grids != grids:
            raise ValueError(
                f"prompts must hold whole images of one crop each: grids of {views.grids} tokens "
                f"were found for masks of {grids}"
            )
        outputs = self.glimpse.judge(rows, prompt.extras[CONDITIONS], views)
        cells = torch.cat([mask.flatten() for mask in masks]).to(prompt.visual_index.device)
        wanted, real = views.scatter(cells.bool()), prompt.visual_index >= 0
        outputs = [views.scatter(logits) for logits in outputs]
        answer = self._answer_loss(hidden, labels)
        pair = wanted.float(), real
        parts = [(dice_loss(out, *pair), bce_loss(out, *pair)) for out in outputs]
        located = sum(self.weights.mask_loss(*both) for both in parts)
        losses = {
            "loss": self.weights.le_weight * answer + self.weights.loc_weight * located,
            "le_loss": answer.detach(),
            "dice_loss": torch.stack([dice for dice, _ in parts]).detach(),
            "bce_loss": torch.stack([bce for _, bce in parts]).detach(),
            "loc_loss": located.detach(),
        }
        return losses | {"hits": hits(outputs[-1].detach(), wanted, real)}

    def _run(self, prompt, answer_ids: Tensor, answer_mask: Tensor):
        """Hidden states (B, T, D) that predict the answer, and per selected layer the row (B, H, S)
        of the last glimpse token over the prompt; without a glimpse that of the last prompt token.
        """
        decoder, config = self.llava.model, self.glimpse.config
        embeds, mask = prompt.inputs_embeds, prompt.attention_mask
        batch, size = mask.shape
        dtype, vectors = embeds.dtype, self.glimpse.vectors()
        vectors = {layer: vector.to(dtype) for layer, vector in vectors.items()}
        if config.has_glimpse:
            known, reader = size, vectors[0].expand(batch, -1, -1)
        else:
            known, reader = size - 1, embeds[:, -1:]
        count = reader.shape[1]
        cache = KVCache(len(decoder.layers), reserve=count + answer_ids.shape[1])
        with torch.no_grad():
            places = prompt.position_ids[:, :known]
            decoder(embeds[:, :known], mask[:, :known], places, cache=cache)
        x = torch.cat([reader, decoder.embed_tokens(answer_ids)], dim=1)
        # A prompt ends with text: the token before those behind it stands one position earlier.
        positions = positions_behind(prompt.position_ids, x.shape[1]) - (size - known)
        ones = answer_mask.new_ones(batch, count)
        valid = torch.cat([mask[:, :known], ones.bool(), answer_mask.bool()], dim=1)
        step = Step(
            rope=decoder.rotary(positions, dtype),
            mask=padded_causal_mask(valid, x.shape[1]),
            valid=valid,
        )
        last = torch.full((batch, 1), count - 1, device=x.device)
        form = self.llava.pruner.probe(len(decoder.layers)).form
        probing = Step(step.rope, step.mask, valid, rows=last, form=form)
        found = {}
        for number, layer in enumerate(decoder.layers):
            if number and number in vectors:
                x = torch.cat([x[:, :count] + vectors[number], x[:, count:]], dim=1)
            x, row = layer(x, probing if number in config.selected_layers else step, cache)
            if row is not None:
                found[number] = row[:, :, 0, :size]
        x = decoder.norm(x)
        return x[:, count - 1 : -1], [found[layer] for layer in config.selected_layers]

    def _answer_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        supervised = labels != IGNORE_INDEX
        logits = self.llava.lm_head(hidden[supervised]).float()
        return F.cross_entropy(logits, labels[supervised])


def dice_loss(logits: Tensor, wanted: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over the batch of 1 - Dice of (B, N) logits and 0/1 masks; real (B, N): False on what is
    no visual token."""
    chance, smooth = logits.sigmoid(), 1e-6
    if real is not None:
        chance = chance.masked_fill(~real, 0)
    overlap = 2 * (chance * wanted).sum(dim=1) + smooth
    return (1 - overlap / (chance.sum(dim=1) + wanted.sum(dim=1) + smooth)).mean()


def bce_loss(logits: Tensor, wanted: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over the batch of the mean binary cross-entropy of visual tokens, likewise."""
    if real is None:
        return F.binary_cross_entropy_with_logits(logits, wanted)
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (loss.masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1)).mean()


def hits(logits: Tensor, wanted: Tensor, real: Tensor | None = None) -> Tensor:
    """(3,) tokens found, wrongly found and missed at probability 0.5, over the whole batch."""
    found = logits > 0 if real is None else (logits > 0) & real
    pairs = (found & wanted, found & ~wanted, ~found & wanted)
    return torch.stack([pair.sum() for pair in pairs]).float()
