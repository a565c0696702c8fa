"""TwigVLM++: a pruning head on the twig, trained for that alone, chooses the tokens, and the twig
guesses trees of the answer's.

Paper: Growing a Multi-head Twig to Accelerate Large Vision-Language Models,
https://arxiv.org/abs/2503.14075v3

The twig and its use are TwigVLM's. New is the pruning head: two gates on queries and keys of the
twig's last layer give the visual tokens a score of its own, a softmax over these tokens alone. It
learns by distillation, then by reinforcement, see `llava.train.train_twigvlm_plus`; the twig's own
head is left to guess tokens, of which a whole tree is verified at once.

Differs from the release: batches, several images (one pool), text-only prompts and no pruning at
all work on any backend; scores stay in fp32, of equal ones the lower place wins; grouped keys are
repeated to all heads; the copies of the base model in published folders are not read, split files
are; the newline tokens of LLaVA-NeXT are visual tokens, as in TwigVLM (there they are neither
ranked nor removed); a twig without a head is refused. The guessing is as exact as TwigVLM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import Linear
from .interfaces import Decoder, LanguageModel, Layer
from .ops import gather_tokens, repeat_heads, split_heads
from .per_token import at
from .prefill import Prefill
from .twigvlm import Twig, TwigVLM
from .twigvlm_release import TwigPlusRelease


class PruningHead(nn.Module):
    """Gates on the queries and keys of a twig's last layer."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        width = config.hidden_size // self.num_heads * self.num_heads
        self.q_gate = Linear(config.hidden_size, width, bias=False)
        self.k_gate = Linear(config.hidden_size, width, bias=False)

    def forward(self, x: Tensor, y: Tensor, q: Tensor, k: Tensor, real: Tensor) -> Tensor:
        """(B, V) fp32 scores of the tokens y (B, V, D) by the token x (B, 1, D), both behind the
        layer's first norm; they sum to 1, and are 0 where `real` (B, V) is False.

        q (B, H, 1, d) of x and k (B, G, V, d) of y: after RoPE
        """
        q = q.float() * self._opened(self.q_gate(x))
        k = repeat_heads(k, self.num_heads).float() * self._opened(self.k_gate(y))
        return shares(q, k, real)

    def _opened(self, gate: Tensor) -> Tensor:
        """(B, H, S, d) fp32: relu(g) * sigmoid(g) of a gate's output g (B, S, H * d)."""
        gate = split_heads(gate.float(), self.num_heads)
        return gate.relu() * gate.sigmoid()


class GatedTwig(Twig):
    """A twig with a pruning head."""

    has_head = True

    def __init__(self, model: LanguageModel, count: int):
        super().__init__(model, count)
        self.pruning_head = PruningHead(model.config)

    def scores(
        self,
        decoder: Decoder,
        x: Tensor,
        position_ids: Tensor,
        asking: Tensor,
        places: Tensor,
        real: Tensor,
    ) -> Tensor:
        """(B, V) fp32 scores of the tokens at `places` (B, V) by the token at `asking` (B, 1), and
        0 where `real` (B, V) is False, on the device of the twig's last layer.

        x:            (B, S, D) tokens as they enter that layer
        position_ids: as in `Prefill`
        """
        layer: Any = self.layers[-1]
        asks, asked, q, k = probed(decoder, layer, x, position_ids, asking, places)
        return self.pruning_head(asks, asked, q, k, real.to(x.device))


def probed(
    decoder: Decoder,
    layer: Layer,
    x: Tensor,
    position_ids: Tensor,
    asking: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the tokens at `asking` (B, 1) and at `places` (B, V), as they enter `layer`: their states
    (B, 1, D) and (B, V, D) behind its first norm, the query (B, H, 1, d) of the one and the keys
    (B, G, V, d) of the others, after RoPE.

    x (B, S, D) and position_ids as in `GatedTwig.scores`
    """
    rows = torch.cat([asking, places], dim=1).to(x.device)
    normed = layer.input_layernorm(gather_tokens(x, rows))
    cos, sin = decoder.rotary(at(rows)(position_ids.to(x.device), 1), x.dtype)
    asks, asked = normed[:, :1], normed[:, 1:]
    q = layer.self_attn.queries(asks, (cos[:, :, :1], sin[:, :, :1]))
    return asks, asked, q, layer.self_attn.keys(asked, (cos[:, :, 1:], sin[:, :, 1:]))


def shares(q: Tensor, k: Tensor, real: Tensor) -> Tensor:
    """(B, V) what a query q (B, H, 1, d) attends to among keys k (B, G, V, d) alone, mean over its
    heads; 0 where `real` (B, V) is False. In fp32, inside autocast, too."""
    product = (q.float() * repeat_heads(k, q.shape[1]).float()).sum(dim=-1) * q.shape[-1] ** -0.5
    product = product.masked_fill(~real[:, None], torch.finfo(product.dtype).min)
    return product.softmax(dim=-1).mean(dim=1).masked_fill(~real, 0)


@dataclass
class TwigVLMPlus(TwigVLM):
    """
    visual_token_num: tokens per image, averaged over the decoder layers, as in TwigVLM
    twig:             folder of the twig with its pruning head; None: the one that comes with the
                      playground checkpoint
    twig_K, twig_T, final_wipe_layer, enable_pruning: as in TwigVLM
    tree_nodes, tree_depth, tree_width: of the trees that are guessed, see
                      `llava.pruning.drafter.Drafter`: 60 nodes as published, 8 on a CPU;
                      tree_nodes=0 guesses rows as TwigVLM does, with `num_speculations` and
                      `draft_stop_prob`
    """

    tree_nodes: int | None = None

    name = "twigvlm_plus"
    published = TwigPlusRelease()
    twig_class = GatedTwig

    def score(self, prefill: Prefill) -> Tensor:
        """(B, S) scores of the pruning head by the last prompt token; 0 on text."""
        twig: Any = self.module  # a `GatedTwig`
        x = prefill.drafter_input
        if x is None:
            x = prefill.decoder.through(prefill, twig.layers[:-1])
        places, real = prefill.places(prefill.is_visual, max(prefill.counts.visual))
        last = prefill.last[:, None]
        scores = twig.scores(prefill.decoder, x, prefill.position_ids, last, places, real)
        scores = scores.to(places.device)
        # Added: what pads a row is its last token, which may be one of an image, too.
        return scores.new_zeros(prefill.index.shape).scatter_add(1, places, scores)
