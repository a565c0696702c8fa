"""Stage 1: a twig and its pruning head learn from the answers and from the whole model.

The whole model, the teacher, reads the same prompt and answer without pruning. The twig learns the
answers' tokens and the teacher's probabilities of them, the pruning head what the question's last
token attends to among the visual tokens in one of the teacher's layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.model.language_model.layers import Step, run_layers
from llava.pruning.ops import scale_layer
from llava.pruning.prefill import Prefill
from llava.pruning.twigvlm_plus import GatedTwig, TwigVLMPlus, probed, shares

from ..train_twigvlm import TwigTraining, next_token_loss, started
from .asked import Asked
from .losses import prediction_loss, score_divergence, token_divergences

#: of a 32-layer decoder: the layer whose attention the pruning head learns
ATTENTION_LAYER = 19


@dataclass
class Distillation:
    """
    alpha:           weight of the teacher's probabilities
    gamma:           weight of the teacher's attention
    temperature:     of both probabilities
    clip:            a token's divergence above it has a gradient as if it were this
    attention_layer: of the teacher, from 0
    """

    alpha: float = 0.1
    gamma: float = 1.0
    temperature: float = 5.0
    clip: float = 4.0
    attention_layer: int = ATTENTION_LAYER

    def __post_init__(self):
        for name in ("temperature", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        for name in ("alpha", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")


def attention_layer(depth: int, wipe: int | None = None) -> int:
    """The teacher's layer in a decoder of `depth` layers, where none is given: one that still sees
    visual tokens when they are pruned, as 19 of 32.

    wipe: layer before which all of them go; None: where `TwigVLMPlus` does that by default
    """
    if wipe is None:
        wipe = TwigVLMPlus().wipe_layer(depth)
    return min(scale_layer(ATTENTION_LAYER, depth), wipe - 1)


def check_attention_layer(layer: int, depth: int) -> None:
    if not 0 <= layer < depth:
        raise ValueError(f"attention_layer ({layer}) must be one of the {depth} decoder layers")


def teacher_scores(decoder: nn.Module, layer: int, x: Tensor, places: Tensor, asked: Asked):
    """(B, V) what the question's last token attends to among the visual tokens in a layer of the
    decoder; x (B, S, D) tokens as they enter it, places (B, S) or (B, S, A) their positions."""
    own = decoder.layers[layer]
    _, _, q, k = probed(decoder, own, x, places, asked.asking, asked.places)
    return shares(q, k, asked.real)


@dataclass
class Teaching:
    """
    entered: (B, S, D) tokens as they enter layer K
    scores:  (B, V) of the visual tokens
    hidden:  (B, S, D) behind the last layer, before the norm; None: nobody asked
    """

    entered: Tensor
    scores: Tensor
    hidden: Tensor | None


def teach(
    decoder: nn.Module,
    prefill: Prefill,
    step: Step,
    asked: Asked,
    shared_layers: int,
    layer: int,
    whole: bool = True,
) -> Teaching:
    """Runs the decoder once on all tokens, as far as it is needed.

    shared_layers: K; layer: whose attention is taken; whole: up to the last layer
    """
    layers, x, at, seen = decoder.layers, prefill.hidden_states, 0, {}
    for stop in sorted({shared_layers, layer, *([len(layers)] if whole else [])}):
        x = run_layers(layers[at:stop], x, step, None)
        at, seen[stop] = stop, x
    scores = teacher_scores(decoder, layer, seen[layer], prefill.position_ids, asked)
    return Teaching(seen[shared_layers], scores, seen.get(len(layers)))


class TwigDistillation(TwigTraining):
    """A twig with a pruning head, which is all that is trained, on a frozen trunk.

    Returns {"loss"} and, detached, its parts {"ntp", "pred_kl", "attn_kl"}. Without an image in the
    batch attn_kl is 0; a sample without one counts as 0 in its mean.
    """

    kind = GatedTwig

    def __init__(
        self, model: nn.Module, shared_layers: int, count: int, weights: Distillation | None = None
    ):
        super().__init__(model, shared_layers, count)
        if weights is None:
            weights = Distillation(attention_layer=attention_layer(len(model.model.layers)))
        check_attention_layer(weights.attention_layer, len(model.model.layers))
        self.weights = weights

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list | None = None,
    ) -> dict[str, Tensor]:
        decoder, twig, weights = self.trunk.model, self.twig, self.weights
        with torch.no_grad():
            batch = input_ids, attention_mask, labels, images, image_sizes
            prompt, prefill = started(self.trunk, *batch)
            asked, step = Asked.of(prompt), decoder.prefill_step(prefill)
            wanted = asked, self.shared_layers, weights.attention_layer
            teaching = teach(decoder, prefill, step, *wanted, whole=weights.alpha > 0)
            targets = prompt.labels[:, 1:]
            supervised = targets != IGNORE_INDEX
            if teaching.hidden is not None:
                behind = decoder.norm(teaching.hidden[:, :-1][supervised])
                teacher = self.trunk.logits_of(behind)
        x = run_layers(twig.layers[:-1], teaching.entered, step, None)
        scores = twig.scores(
            decoder, x, prefill.position_ids, asked.asking, asked.places, asked.real
        )
        x = run_layers(twig.layers[-1:], x, step, None)
        logits = twig.head(twig.norm(x[:, :-1][supervised])).float()
        parts = {
            "ntp": next_token_loss(logits, targets[supervised]),
            "attn_kl": score_divergence(teaching.scores, scores, asked.real).mean(),
        }
        loss = parts["ntp"] + weights.gamma * parts["attn_kl"]
        if teaching.hidden is not None:
            divergences = token_divergences(teacher, logits, weights.temperature)
            parts["pred_kl"] = prediction_loss(divergences, weights.clip)
            loss = loss + weights.alpha * parts["pred_kl"]
        return {"loss": loss} | {name: part.detach() for name, part in parts.items()}
