"""The trained part of GlimpsePrune: its shape, the glimpse vectors, and how it judges a prompt.

Names of parameters and settings are those of the published files (`new_modules_gp.pt` and its
config.json), so that both load as they are.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import RMSNorm
from .glimpseprune_predictor import ImportancePredictor
from .ops import gather_tokens, scale_layer

#: layers of the paper: glimpse row and cut of 32 decoder layers, hidden states of a 24-layer tower
#: of which LLaVA reads the one numbered `PAPER_FEATURES`
PAPER_LAYER, PAPER_TOWER_STATES, PAPER_FEATURES = 21, (23, 17, 11, 5), 23
PREDICTOR = "AttnFuserV1"


@dataclass(frozen=True)
class GlimpseConfig:
    """Shape of the trained part, and where it acts. Layers count from 0.

    hidden_size:            width of the decoder
    num_attention_heads:    its query heads
    mm_hidden_size:         width of the vision tower
    rms_norm_eps:           of the decoder, used for the glimpse vectors
    le_layers:              decoder layers in front of which a learned vector is added to the
                            glimpse; 0 is the one that makes it
    le_length:              glimpse tokens
    le_dropout_prob:        dropout of the glimpse vectors, in training
    selected_layers:        decoder layers of which the glimpse's attention row is read
    reduce_layer:           last decoder layer that sees all visual tokens
    selected_visual_layers: hidden states of the tower that condition the predictor, one for each of
                            its layers; 0 is the embeddings, so n is the output of layer n - 1
    attn_fuse_size:         width of the predictor
    visual_cond_size:       width of a condition
    attn_fuse_num_heads:    heads of the predictor
    use_attention_logits:   it reads scaled products instead of the logarithm of attention weights
    deep_supervision:       every layer of it has an output, for the training loss
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

    def __post_init__(self):
        width, heads = self.attn_fuse_size + self.visual_cond_size, self.attn_fuse_num_heads
        if width % (4 * heads) or self.attn_fuse_size % heads:
            raise ValueError(
                f"attn_fuse_num_heads ({heads}) must divide attn_fuse_size ({self.attn_fuse_size}) "
                f"and, four times, attn_fuse_size + visual_cond_size ({width})"
            )
        if self.le_length < 1:
            raise ValueError(f"le_length ({self.le_length}) must be at least 1 glimpse token")
        if 0 not in self.le_layers:
            raise ValueError(f"le_layers {self.le_layers} must contain 0, where the glimpse starts")
        if not self.selected_layers or max(self.selected_layers) > self.reduce_layer:
            raise ValueError(
                f"selected_layers {self.selected_layers} must not lie behind reduce_layer "
                f"({self.reduce_layer})"
            )
        if min(self.selected_visual_layers, default=0) < 1:
            raise ValueError(
                f"selected_visual_layers {self.selected_visual_layers} must be 1 (output of the "
                "first layer) or above"
            )

    @classmethod
    def for_model(cls, model: nn.Module, **changes) -> GlimpseConfig:
        """The paper's setting, its layers scaled to the depth of `model`; `changes` replace it."""
        config, tower = model.config, model.get_vision_tower()
        depth, states = config.num_hidden_layers, tower.depth[1] + 1
        layer = scale_layer(PAPER_LAYER, depth)
        tower_states = (scale_layer(n, states + 1, PAPER_FEATURES + 1) for n in PAPER_TOWER_STATES)
        paper = {
            "le_layers": tuple(range(depth)),
            "selected_layers": (layer,),
            "reduce_layer": layer,
            "selected_visual_layers": tuple(tower_states),
        }
        return cls.from_values({**paper, **changes}, model)

    @classmethod
    def from_values(cls, values: dict, model: nn.Module) -> GlimpseConfig:
        """The config that the keys of a config.json describe, for `model`.

        Raises ValueError when they do not fit it, or ask for another predictor.
        """
        if (kind := values.get("attn_fuse_type", PREDICTOR)) != PREDICTOR:
            raise ValueError(f"attn_fuse_type {kind!r} is not supported, choose {PREDICTOR!r}")
        config, tower = model.config, model.get_vision_tower()
        known = {f.name for f in fields(cls)}
        given = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in known
        }
        given |= {
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "mm_hidden_size": tower.hidden_size,
            "rms_norm_eps": config.rms_norm_eps,
        }
        if missing := [f.name for f in fields(cls) if f.name not in given and f.default is MISSING]:
            raise ValueError(f"the config of the trained part lacks {', '.join(missing)}")
        made = cls(**given)
        made.check_depth(config.num_hidden_layers, tower.depth[0])
        return made

    def check_depth(self, num_layers: int, tower_layers: int) -> None:
        """Raises ValueError when a layer does not exist in a model of that depth."""
        for name, last in (
            ("le_layers", num_layers - 1),
            ("selected_layers", num_layers - 1),
            ("selected_visual_layers", tower_layers),
        ):
            if not 0 <= max(layers := getattr(self, name)) <= last:
                raise ValueError(f"{name} {layers} must not exceed {last} on this model")

    def values(self) -> dict:
        """What belongs into a config.json: everything the base model does not say."""
        base = ("hidden_size", "num_attention_heads", "mm_hidden_size", "rms_norm_eps")
        return {key: value for key, value in asdict(self).items() if key not in base}


class Glimpse(nn.Module):
    """Everything GlimpsePrune trains."""

    def __init__(self, config: GlimpseConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        shape = len(config.le_layers), config.le_length, width
        self.learnable_embeddings = nn.Parameter(torch.empty(shape))
        self.le_proj = nn.Linear(width, width)
        self.le_norm = RMSNorm(width, config.rms_norm_eps)
        self.attn_fuser = ImportancePredictor(config)

    def vectors(self) -> dict[int, Tensor]:
        """Decoder layer -> (le_length, D) that the glimpse starts from there, or is added to it."""
        made = self.le_norm(self.le_proj(self.learnable_embeddings))
        made = F.dropout(made, self.config.le_dropout_prob, self.training)
        return dict(zip(self.config.le_layers, made, strict=True))

    def judge(
        self, rows: list[Tensor], context: Tensor, image: Tensor, patch: Tensor, grid
    ) -> tuple[list[Tensor], Tensor]:
        """Logits (B, V * N) of every output for all patches of all views, and their places.

        rows:    per selected layer (B, H, S), what the last glimpse token pays each token
        context: (B, S, J * C), the conditions of each token
        image, patch: (B, S) `visual_index` and `patch_index` of the prompts
        Places (B, V * N) are S where there is no token, see `view_places`.
        """
        place = view_places(image, patch, grid)
        size, shape = patch.shape[1], (-1, math.prod(grid))
        seen, real = place.clamp(max=size - 1), place < size
        rows = torch.cat([row.transpose(1, 2) for row in rows], dim=-1)
        rows = gather_tokens(rows, seen).masked_fill(~real[..., None], 0)
        inputs = (x.unflatten(1, shape).flatten(0, 1) for x in (rows, gather_tokens(context, seen)))
        outputs = self.attn_fuser(*inputs, grid, real.unflatten(1, shape).flatten(0, 1))
        return [logits.float().view(place.shape) for logits in outputs], place

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


def view_places(image: Tensor, patch: Tensor, grid: tuple[int, int]) -> Tensor:
    """Place (B, V * N) in the prompt of every patch of every view, S where there is none.

    image, patch (B, S) as in `Prefill`; V counts images x crops, view after view. Patches that were
    cut off as padding and views that a row does not have are not there.
    """
    batch, size = patch.shape
    per_crop = math.prod(grid)
    images, crops = torch.stack([image.amax() + 1, patch.amax() // per_crop + 1]).tolist()
    total = images * crops * per_crop
    slot = torch.where(patch >= 0, image * crops * per_crop + patch, total)
    places = torch.arange(size, device=patch.device).expand(batch, -1)
    table = torch.full((batch, total + 1), size, device=patch.device)
    return table.scatter(1, slot, places)[:, :total]
