"""CLIP vision tower: patch features of one layer, and the extras a pruning method asks for.

The weights live in transformers' `CLIPVisionModel`; the forward pass is our own: SDPA instead of
eager attention, no layer after the selected one, and attention rows without attention maps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from ...blocks import in_pieces
from ...devices import device_of
from ...linear import fast_linears
from ...pruning.attention_cues import attention_extras
from ...pruning.cues import OutputMean, fingerprint
from ...pruning.ops import middle_places, split_heads
from ...pruning.precision import full_precision
from ...pruning.stages import VisionStage
from ...pruning.tokens import TowerTokens, VisionTokens
from ..language_model.compiling import compiled, may_compile
from ..placement import single_device
from .clip_files import read_image_processor, read_vision_config, read_vision_model

LAYER_CUES = frozenset(
    {
        "salience",
        "cls_attention",
        "keys",
        "cls_query",
        "cls_key",
        "attention_mean",
        "output",
        "output_mean",
    }
)
#: those that the layer of the features gives beside its output
OWN_CUES = frozenset({"salience", "cls_attention", "keys"})
#: those that take a whole layer, not its projections alone
OUTPUTS = frozenset({"output", "output_mean"})
CUES = OWN_CUES | {"cls_token", "fingerprint", "tower_tokens", "text_tower", "one_grid"}


class CLIPVisionTower(nn.Module):
    """A frozen CLIP vision model that returns the hidden states of `mm_vision_select_layer`.

    vision_tower: folder or hub name
    args:         config with `mm_vision_select_layer`, `mm_vision_select_feature` ("patch" or
                  "cls_patch") and `unfreeze_mm_vision_tower`
    delay_load:   read the config only; `load_model` reads the weights
    """

    title = "a CLIP vision tower"
    provides, provides_in_layers = CUES, LAYER_CUES
    window_side = None
    takes_smaller_images = True
    #: whether layers are compiled, see `compile_prefill` of the model
    compile_layers = False

    def __init__(self, vision_tower: str, args, delay_load: bool = False):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(
                f"Unexpected select feature: {self.select_feature!r}, choose patch or cls_patch"
            )
        if delay_load and not getattr(args, "unfreeze_mm_vision_tower", False):
            self.cfg_only = read_vision_config(vision_tower)
        elif delay_load:  # the checkpoint brings the tower's weights
            self._install(CLIPVisionModel(read_vision_config(vision_tower)))
        else:
            self.load_model()

    def load_model(self, device_map=None, torch_dtype=None) -> None:
        """Reads the weights; does nothing when they are there.

        device_map: as in `load_pretrained_model`; None, or several devices: where it was read to
        """
        if not self.is_loaded:
            device = None if device_map is None else single_device(device_map, None)
            model = read_vision_model(self.vision_tower_name, torch_dtype)
            self._install(model if device is None else model.to(device))

    def _install(self, model: CLIPVisionModel) -> None:
        self.image_processor = self.load_image_processor()
        self.vision_tower = model.requires_grad_(False)
        fast_linears(self.vision_tower)
        self.is_loaded = True

    def load_image_processor(self) -> CLIPImageProcessor:
        return read_image_processor(self.vision_tower_name)

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Features (n, N, C) of crops (n, 3, S, S); a list of crops gives a list of (1, N, C)."""
        if isinstance(images, list):
            return [self(image[None]) for image in images]
        return self.tokens(images).features

    def tokens(
        self,
        images: Tensor,
        needs: frozenset[str] = frozenset(),
        stage: VisionStage | None = None,
        crops_in_budget: int = 1,
        image_index: Tensor | None = None,
    ) -> VisionTokens:
        """Tokens of crops (B, 3, S, S) with the extras named in `needs` (see `VisionTokens`); the
        hooks of `stage` that act inside the tower are called.

        image_index: (B,) image each crop belongs to (default: one crop per image).
        """
        stage, images = stage or VisionStage(), images.to(self.device)
        given, expected = tuple(images.shape[1:]), (3, self.image_size, self.image_size)
        if given != expected:
            raise ValueError(
                f"crops must have the shape {expected}, as process_images makes them, not {given}"
            )
        if unknown := needs - self.provides:
            raise ValueError(f"unknown cues {sorted(unknown)}, choose from {sorted(self.provides)}")
        total, selected = self.depth
        asked = dict(stage.tower_extras(total, selected))
        asked[selected] = asked.get(selected, frozenset()) | needs & OWN_CUES
        images = stage.before_tower(images, self.config.patch_size, crops_in_budget)
        if image_index is None:
            image_index = torch.arange(len(images), device=images.device)
        layers: dict[int, dict[str, Tensor]] = {}
        tokens = self._run(images, asked, layers, stage, image_index)
        hidden, cues = tokens.hidden_states.to(images.dtype), layers.get(selected, {})
        return VisionTokens(
            features=hidden[:, 1:] if self.select_feature == "patch" else hidden,
            positions=self._places(tokens, images.shape[-1] // self.config.patch_size),
            grid=self.grid,
            crops_in_budget=crops_in_budget,
            valid=tokens.valid,
            all_patches=tokens.all_patches,
            known=tokens.known,
            num_heads=self.config.num_attention_heads,
            salience=cues.get("salience"),
            cls_attention=cues.get("cls_attention"),
            keys=cues.get("keys"),
            extras=tokens.extras,
            cls_token=hidden[:, :1] if "cls_token" in needs else None,
            layers=layers,
            fingerprint=fingerprint(images) if "fingerprint" in needs else None,
        )

    def _places(self, tokens: TowerTokens, side: int) -> Tensor:
        """(B, N) row-major place in the grid of a whole crop that the features stand for; side:
        patches along a side of the crops that ran. With "cls_patch" the class token is counted as
        the first of them."""
        batch, count, _ = tokens.hidden_states.shape
        positions, full = tokens.positions, self.num_patches_per_side
        if self.select_feature != "patch":
            return torch.arange(count, device=positions.device).expand(batch, -1)
        if side == full:
            return positions
        middle = middle_places(side, full, positions.device)
        return (middle[:, None] * full + middle).flatten()[positions]

    def _run(
        self,
        images: Tensor,
        wanted: dict[int, frozenset[str]],
        found: dict[int, dict[str, Tensor]],
        stage: VisionStage,
        image_index: Tensor,
    ) -> TowerTokens:
        """Tokens after the selected layer; what `wanted` names of any layer goes into `found`.

        Layers after the selected one run only as far as something is wanted from them.
        """
        if unknown := frozenset().union(*wanted.values()) - LAYER_CUES:
            raise ValueError(f"unknown cues {sorted(unknown)}, choose from {sorted(LAYER_CUES)}")
        model = self.vision_tower.vision_model
        x = model.pre_layrnorm(self._embed(images.to(self.device, self.dtype)))
        count = x.shape[1] - 1
        places = torch.arange(count, device=x.device).expand(x.shape[0], -1)
        tokens = TowerTokens(x, places, image_index.to(x.device), all_patches=places)
        chosen = tokens  # of layer `num_run_layers` - 1, where there is one
        means = OutputMean(wanted)
        last = max([self.num_run_layers - 1, *(n for n, names in wanted.items() if names)])
        mask: Tensor | None = None
        masked: tuple[Tensor | None, Tensor | None] = (None, None)  # what the mask is made of
        for number, layer in enumerate(model.encoder.layers[: last + 1]):
            with full_precision(x.device):
                tokens = stage.before_tower_layer(number, tokens)
            names = wanted.get(number, frozenset())
            x = tokens.hidden_states
            needs_output = number < max(last, self.num_run_layers) or bool(names & OUTPUTS)
            if masked[0] is not tokens.valid or masked[1] is not tokens.key_bias:
                mask, masked = key_mask(tokens), (tokens.valid, tokens.key_bias)
            inside = names - OUTPUTS
            compiles = self.compile_layers and needs_output and not inside and may_compile(self)
            run = compiled(run_layer) if compiles else run_layer
            x, found[number] = run(layer, x, mask, inside, needs_output)
            if not needs_output:
                break
            tokens = replace(tokens, hidden_states=x)
            if "output" in names:
                found[number]["output"] = x[:, 1:]
            if (mean := means.add(number, x[:, 1:])) is not None:
                found[number]["output_mean"] = mean
            if number == self.num_run_layers - 1:
                chosen = tokens
        return chosen

    def _embed(self, images: Tensor) -> Tensor:
        """Embeddings (B, 1 + N, C); positions are interpolated for crops that were made smaller."""
        embeddings = self.vision_tower.vision_model.embeddings
        if images.shape[-1] == self.config.image_size:
            return embeddings(images)
        side = images.shape[-1] // self.config.patch_size
        table = embeddings.position_embedding.weight
        full = self.num_patches_per_side
        grid = table[1:].unflatten(0, (full, full)).permute(2, 0, 1)[None].float()
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        positions = torch.cat([table[:1], grid[0].flatten(1).t().to(table.dtype)])
        patches = embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
        cls = embeddings.class_embedding.expand(len(images), 1, -1)
        return torch.cat([cls, patches], dim=1) + positions

    @property
    def depth(self) -> tuple[int, int]:
        """(number of tower layers, 0-based layer whose output are the features)."""
        return self.config.num_hidden_layers, self.num_run_layers - 1

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches of every crop."""
        return (self.num_patches_per_side,) * 2

    @property
    def num_run_layers(self) -> int:
        """Encoder layers that run: `hidden_states[select_layer]`, index 0 being the embeddings."""
        total = self.config.num_hidden_layers
        number = self.select_layer if self.select_layer >= 0 else total + 1 + self.select_layer
        if not 0 <= number <= total:
            raise ValueError(
                f"mm_vision_select_layer ({self.select_layer}) is outside the {total} tower layers"
            )
        return number

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.vision_tower)

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def whole_layers(self) -> list[int]:
        return list(range(self.config.num_hidden_layers))

    @property
    def image_size(self) -> int:
        """Side of one crop in pixels."""
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


def run_layer(
    layer, x: Tensor, mask: Tensor | None, names: frozenset[str], needs_output: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a CLIP layer gives on x (B, T, C), and the cues `names` that are seen inside it.

    mask: (B, T) as `key_mask` gives it. needs_output: False: only the cues are wanted, x stays
    """
    attention, normed = layer.self_attn, layer.layer_norm1(x)
    q, k = attention.q_proj(normed), attention.k_proj(normed)
    cues = attention_extras(attention.num_heads, attention.scale, q, k, names, mask)
    if not needs_output:
        return x, cues
    x = x + attention.out_proj(self_attention(attention, normed, q, k, mask))
    return in_pieces(partial(feed_forward, layer), x), cues


def feed_forward(layer, x: Tensor) -> Tensor:
    """What follows attention in a CLIP layer, of tokens x (..., C)."""
    return x + layer.mlp(layer.layer_norm2(x))


def key_mask(tokens: TowerTokens) -> Tensor | None:
    """(B, 1 + N) fp32 the bias that a method adds to keys, 0 where it adds none, and -inf on
    padding, which nobody looks at; None where there is neither."""
    mask = None if tokens.valid is None else F.pad(tokens.valid, (1, 0), value=True)
    bias = tokens.key_bias
    if bias is None:
        if mask is None:
            return None
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
    if bias.shape != tokens.hidden_states.shape[:2] or bias.dtype != torch.float32:
        raise ValueError(
            f"key_bias {tuple(bias.shape)} of {bias.dtype} must be torch.float32 with one value "
            f"for each of the {tuple(tokens.hidden_states.shape[:2])} tokens, class token included"
        )
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def self_attention(attention, x: Tensor, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Full attention of a CLIP layer, before its output projection; x, q, k are (B, T, C).

    mask: (B, T) as `key_mask` gives it
    """
    heads = attention.num_heads
    q, k, v = (split_heads(t, heads) for t in (q, k, attention.v_proj(x)))
    if mask is not None:
        mask = mask[:, None, None].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
