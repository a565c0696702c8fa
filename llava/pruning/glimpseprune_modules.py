"""The trained part of GlimpsePrune: its shape, the glimpse vectors, and how it judges a prompt.

Names of parameters and settings are those of the published files (`new_modules_gp.pt` and its
config.json), so that both load as they are.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import RMSNorm
from .glimpseprune_predictor import ImportancePredictor
from .glimpseprune_views import Views
from .interfaces import LanguageModel
from .ops import scale_layer
from .option_types import check_saved, check_share
from .required import tower_of

#: layers of the paper: glimpse row and cut of 32 decoder layers, hidden states of a 24-layer tower
#: of which LLaVA reads the one numbered `PAPER_FEATURES`
PAPER_LAYER, PAPER_TOWER_STATES, PAPER_FEATURES = 21, (23, 17, 11, 5), 23
#: with a tower that looks through windows: of so many layers; all layers that see whole images
WINDOWED_PAPER_LAYER = 18, 28
PREDICTOR = "AttnFuserV1"
NORMS = ("rmsnorm", "layernorm")
#: values of a `GlimpseConfig` that follow from the model
OF_THE_MODEL = (
    "hidden_size",
    "num_attention_heads",
    "mm_hidden_size",
    "rms_norm_eps",
    "first_state",
    "window_side",
)


@dataclass(frozen=True)
class GlimpseConfig:
    """Shape of the trained part, and where it acts. Layers count from 0.

    hidden_size:            width of the decoder
    num_attention_heads:    its query heads
    mm_hidden_size:         width of the vision tower
    rms_norm_eps:           of the decoder, used for the glimpse vectors
    le_layers:              decoder layers in front of which a learned vector is added to the
                            glimpse; 0 is the one that makes it
    le_length:              glimpse tokens; with none, or without `le_layers`, there is no glimpse
                            and the last prompt token's row is read
    le_norm_type:           norm of the glimpse vectors, "rmsnorm" or "layernorm"
    le_dropout_prob:        dropout of the glimpse vectors, in training
    selected_layers:        decoder layers of which the glimpse's attention row is read
    reduce_layer:           last decoder layer that sees all visual tokens
    selected_visual_layers: hidden states of the tower that condition the predictor, one for each of
                            its layers; `first_state` is the output of the tower's first layer
    attn_fuse_size:         width of the predictor
    visual_cond_size:       width of a condition
    attn_fuse_num_heads:    heads of the predictor
    attn_fuse_global:       it attends in whole views, else in the windows of the tower
    use_attention_logits:   it reads scaled products instead of the logarithm of attention weights
    deep_supervision:       every layer of it has an output, for the training loss
    first_state, window_side: of the model: 1 where state 0 is the embeddings (LLaVA), 0 where
                            published parts count outputs alone (Qwen2.5-VL); tokens along a side of
                            the tower's windows, None where it has none
    """

    hidden_size: int
    num_attention_heads: int
    mm_hidden_size: int
    le_layers: tuple[int, ...]
    selected_layers: tuple[int, ...]
    reduce_layer: int
    selected_visual_layers: tuple[int, ...]
    rms_norm_eps: float = 1e-5
    le_length: int = 1
    le_dropout_prob: float = 0.0
    attn_fuse_size: int = 256
    visual_cond_size: int = 512
    attn_fuse_num_heads: int = 4
    use_attention_logits: bool = False
    deep_supervision: bool = False
    le_norm_type: str = "rmsnorm"
    attn_fuse_global: bool = True
    first_state: int = 1
    window_side: int | None = None

    def __post_init__(self):
        for name in ("attn_fuse_size", "visual_cond_size", "attn_fuse_num_heads"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} ({size}) must be at least 1")
        width, heads = self.attn_fuse_size + self.visual_cond_size, self.attn_fuse_num_heads
        if width % (4 * heads) or self.attn_fuse_size % heads:
            raise ValueError(
                f"attn_fuse_num_heads ({heads}) must divide attn_fuse_size ({self.attn_fuse_size}) "
                f"and, four times, attn_fuse_size + visual_cond_size ({width})"
            )
        if self.le_norm_type not in NORMS:
            raise ValueError(
                f"le_norm_type {self.le_norm_type!r} is unknown, choose from {', '.join(NORMS)}"
            )
        check_share("le_dropout_prob", self.le_dropout_prob)
        if self.le_length < 0:
            raise ValueError(f"le_length ({self.le_length}) must not be negative")
        if self.has_glimpse and 0 not in self.le_layers:
            raise ValueError(f"le_layers {self.le_layers} must contain 0, where the glimpse starts")
        if not self.selected_layers or max(self.selected_layers) > self.reduce_layer:
            raise ValueError(
                f"selected_layers {self.selected_layers} must not lie behind reduce_layer "
                f"({self.reduce_layer})"
            )
        if min(self.tower_layers, default=-1) < 0:
            raise ValueError(
                f"selected_visual_layers {self.selected_visual_layers} must be {self.first_state} "
                "(output of the first layer) or above"
            )

    @property
    def has_glimpse(self) -> bool:
        """Whether there are glimpse tokens at all."""
        return self.le_length > 0 and bool(self.le_layers)

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """Layers of the tower, from 0, whose outputs are `selected_visual_layers`."""
        return tuple(state - self.first_state for state in self.selected_visual_layers)

    @classmethod
    def for_model(cls, model: LanguageModel, **changes) -> GlimpseConfig:
        """The paper's setting, its layers scaled to the depth of `model`; `changes` replace it."""
        tower, depth = tower_of(model, "the trained part"), model.config.num_hidden_layers
        if tower.window_side is None:
            states = tower.depth[1] + 1
            layer = scale_layer(PAPER_LAYER, depth)
            seen = [scale_layer(n, states + 1, PAPER_FEATURES + 1) for n in PAPER_TOWER_STATES]
            paper: dict[str, Any] = {"selected_visual_layers": tuple(seen)}
        else:
            layer = scale_layer(WINDOWED_PAPER_LAYER[0], depth, WINDOWED_PAPER_LAYER[1])
            paper = {
                "selected_visual_layers": tuple(reversed(tower.whole_layers)),
                "use_attention_logits": True,
                "attn_fuse_global": True,
            }
        paper |= {
            "le_layers": tuple(range(depth)),
            "selected_layers": (layer,),
            "reduce_layer": layer,
        }
        return cls.from_values({**paper, **changes}, model)

    @classmethod
    def from_values(cls, values: dict, model: LanguageModel) -> GlimpseConfig:
        """The config that the keys of a config.json describe, for `model`.

        Raises ValueError when they do not fit it, or ask for another predictor.
        """
        if (kind := values.get("attn_fuse_type", PREDICTOR)) != PREDICTOR:
            raise ValueError(f"attn_fuse_type {kind!r} is not supported, choose {PREDICTOR!r}")
        if (act := values.get("attn_fuse_hidden_act", "silu")) != "silu":
            raise ValueError(f"attn_fuse_hidden_act {act!r} is not supported, choose 'silu'")
        config, tower = model.config, tower_of(model, "the trained part")
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in known
        }
        given |= {
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "mm_hidden_size": tower.hidden_size,
            "rms_norm_eps": config.rms_norm_eps,
            "window_side": tower.window_side,
            "first_state": 1 if tower.window_side is None else 0,
        }
        if tower.window_side is None:
            given["attn_fuse_global"] = True
        else:  # what the release assumes
            given.setdefault("attn_fuse_global", False)
        if missing := [f.name for f in fields(cls) if f.name not in given and f.default is MISSING]:
            raise ValueError(f"the config of the trained part lacks {', '.join(missing)}")
        check_saved(cls, given, "the config of the trained part")
        made = cls(**given)
        made.check_depth(config.num_hidden_layers, tower.depth[0])
        return made

    def check_depth(self, num_layers: int, tower_layers: int) -> None:
        """Raises ValueError when a layer does not exist in a model of that depth."""
        for name, last in (
            ("le_layers", num_layers - 1),
            ("selected_layers", num_layers - 1),
            ("selected_visual_layers", tower_layers - 1 + self.first_state),
        ):
            layers = getattr(self, name)
            if not all(0 <= layer <= last for layer in layers):
                raise ValueError(
                    f"{name} {layers} must not exceed {last} on this model, nor be negative"
                )

    def values(self) -> dict:
        """What belongs into a config.json: everything the base model does not say."""
        return {key: value for key, value in asdict(self).items() if key not in OF_THE_MODEL}


class Glimpse(nn.Module):
    """Everything GlimpsePrune trains; without a glimpse the predictor alone."""

    def __init__(self, config: GlimpseConfig):
        super().__init__()
        self.config = config
        if config.has_glimpse:
            width = config.hidden_size
            shape = len(config.le_layers), config.le_length, width
            self.learnable_embeddings = nn.Parameter(torch.empty(shape))
            self.le_proj = nn.Linear(width, width)
            layer_norm = config.le_norm_type == "layernorm"
            self.le_norm = (
                nn.LayerNorm(width) if layer_norm else RMSNorm(width, config.rms_norm_eps)
            )
        self.attn_fuser = ImportancePredictor(config)

    def vectors(self) -> dict[int, Tensor]:
        """Decoder layer -> (le_length, D) that the glimpse starts from there, or is added to it."""
        if not self.config.has_glimpse:
            return {}
        made = self.le_norm(self.le_proj(self.learnable_embeddings))
        made = F.dropout(made, self.config.le_dropout_prob, self.training)
        return dict(zip(self.config.le_layers, made, strict=True))

    def judge(self, rows: list[Tensor], context: Tensor, views: Views) -> list[Tensor]:
        """fp32 logits (n,) of every output for all patches of the views, the one that decides last.

        rows:    per selected layer (B, H, S), what the last glimpse token pays each token
        context: (B, S, J * C), the conditions of each token
        """
        paid = views.gather(torch.cat([row.transpose(1, 2) for row in rows], dim=-1))
        real = None if views.complete else views.real
        outputs = self.attn_fuser(paid, views.gather(context), views.grids, real)
        return [logits.float() for logits in outputs]

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights, as training starts from them."""
        for name, parameter in self.named_parameters():
            if name == "learnable_embeddings":
                parameter.normal_(std=0.02)
            elif name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                nn.init.xavier_uniform_(parameter)
