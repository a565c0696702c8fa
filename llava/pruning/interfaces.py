"""What a method may rely on of the model it is assigned to, as types.

`Prefill.decoder` is a `Decoder`, `Pruner.attach` gets a `LanguageModel`, and its vision tower is a
`VisionTower`. The models of this package have more than stands here, which methods leave alone: a
model of another make works with every method once it offers this. Letters in shapes as in
`llava.pruning.tokens`; where a decoder is given a `Prefill`, it is the prompts as they are now.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn


class Tower(Protocol):
    """What a vision tower says of itself.

    title:    what messages call it
    provides: cues of the layer whose output are the features, and of the tower as a whole
    provides_in_layers: cues of any layer; a layer that sees parts of an image alone stands for the
              next one that sees all of it where attention is asked for
    depth:    (number of layers, 0-based layer whose output are the features)
    grid:     (h, w) of every crop; None: images have grids of their own
    hidden_size: width of a patch in the layers
    window_side: tokens along a side of the windows that patches attend in where a layer does not
              see all of an image; None: all layers do. `whole_layers` are those that do
    takes_smaller_images: whether it works on images smaller than its own, see
              `VisionStage.before_tower`
    select_feature: "patch", or "cls_patch" where the class token is a token like any other
    """

    title: str
    provides: frozenset[str]
    provides_in_layers: frozenset[str]
    select_feature: str
    takes_smaller_images: bool

    @property
    def depth(self) -> tuple[int, int]: ...

    @property
    def grid(self) -> tuple[int, int] | None: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def window_side(self) -> int | None: ...

    @property
    def whole_layers(self) -> list[int]: ...


class VisionTower(Tower, Protocol):
    """A tower that is part of a model.

    vision_tower_name: folder or hub name of the CLIP model it comes from, where it is one
    is_loaded:         whether its weights are there
    config:            its sizes, as transformers names them
    """

    vision_tower_name: str
    is_loaded: bool

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


class RotaryEmbedding(Protocol):
    """The rotation that positions turn queries and keys by."""

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, 1, S, d) of positions (B, S) or (B, S, A)."""


class Attention(Protocol):
    """Attention of a layer; its projections take hidden states (..., D), and turn nothing."""

    layer_idx: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """(B, H, S, d) after RoPE, of inputs x (B, S, D) behind the norm; rope: as the
        `RotaryEmbedding` gives it for their positions."""

    def keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """(B, G, S, d) likewise."""


class Layer(Protocol):
    """A decoder layer."""

    input_layernorm: nn.Module
    self_attn: Attention

    @property
    def device(self) -> torch.device: ...

    def state_dict(self) -> dict[str, Tensor]: ...


class Layers(Protocol):
    """All decoder layers, in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Layer]: ...

    @overload
    def __getitem__(self, index: int) -> Layer: ...

    @overload
    def __getitem__(self, index: slice) -> Layers: ...


class Decoder(Protocol):
    """The decoder that a prefill runs in."""

    @property
    def layers(self) -> Layers: ...

    @property
    def norm(self) -> nn.Module: ...

    @property
    def rotary(self) -> RotaryEmbedding: ...

    def final_norm(self, x: Tensor) -> Tensor:
        """x (..., D) through the norm behind the last layer, on the device of x."""

    def attention_rows(
        self,
        layer: int,
        x: Tensor,
        position_ids: Tensor,
        rows: Tensor,
        valid: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(B, H, R, S) fp32 rows of the attention map that a layer would have on inputs x
        (B, S, D); rows (B, R) are the places of the queries. See `Prefill.attention_rows`."""

    def attention_bias(self, prefill: Any, rows: Tensor | None = None) -> Tensor | None:
        """What the layers add to attention among the tokens, for the queries at `rows` (B, R)."""

    def layer_keys(self, layer: int, x: Tensor, position_ids: Tensor) -> Tensor:
        """(B, G, S, d) keys after RoPE that a layer would make of inputs x (B, S, D)."""

    def through(self, prefill: Any, layers: nn.ModuleList) -> Tensor:
        """(B, S, D) what further layers give on the tokens, on their device."""

    def branch_attention(self, prefill: Any, layers: nn.ModuleList) -> Tensor:
        """(B, H, 1, S) fp32 what the last prompt token attends to in the last of further layers
        that run on the tokens beside the decoder's own."""


class LanguageModel(Protocol):
    """The whole model: vision tower, decoder and head.

    config:        sizes as transformers names them (`hidden_size`, `num_hidden_layers`, ...)
    pruner:        the method in use
    pruning_trace: what records the calls of the model, see `llava.pruning.trace`
    tokenizer:     None where the model was made without one
    """

    config: Any
    pruner: Any
    pruning_trace: Any
    tokenizer: Any

    @property
    def model(self) -> Decoder: ...

    @property
    def lm_head(self) -> nn.Linear: ...

    def get_vision_tower(self) -> VisionTower | None:
        """None: the model has none."""

    def get_input_embeddings(self) -> nn.Module: ...

    def _init_weights(self, module: nn.Module) -> None:
        """Gives a part of the model random weights."""
