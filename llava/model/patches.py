"""Functions that other packages replace in a model from outside: honoured, or refused.

Published pruning packages work by assigning their own functions to classes of LLaVA and
transformers. Some of those functions are never called here; assigning to them would do nothing, so
that must not go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from ..pruning.ops import true_last
from .prompt import Prompt

SPLICE = "prepare_inputs_labels_for_multimodal"
ADVICE = (
    f"assign to the model's {SPLICE}, which is called, or write a pruning method "
    "(docs/Adding_a_Method.md); methods that come with this package: "
    "model.pruner = build_pruner(name)"
)
#: classes of transformers that pruning packages patch and that are not used here
UNUSED = [
    (module, name + part)
    for module, name in ((modeling_llama, "Llama"), (modeling_mistral, "Mistral"))
    for part in ("Model", "DecoderLayer", "Attention", "FlashAttention2", "SdpaAttention")
    if hasattr(module, name + part)
]
TOWER_PARTS = (
    modeling_clip.CLIPVisionModel,
    modeling_clip.CLIPVisionTransformer,
    modeling_clip.CLIPEncoder,
    modeling_clip.CLIPEncoderLayer,
    modeling_clip.CLIPAttention,
)


def replacement(owner, name: str, original: Callable) -> Callable | None:
    """The method `name` of an object where it is not `original` any more: assigned to the object,
    assigned to its class, or overridden in a subclass. None: it is."""
    if name in vars(owner) and not (name == "forward" and hasattr(owner, "_hf_hook")):
        own = vars(owner)[name]
        return None if getattr(own, "__func__", own) is original else own
    return None if getattr(type(owner), name) is original else getattr(owner, name)


def refuse(what: str) -> None:
    raise ValueError(f"{what} was replaced from outside, but it is not called here: {ADVICE}")


def check_decoder() -> None:
    """Raises ValueError when the decoder of transformers, which is not used here, was patched."""
    for module, name in UNUSED:
        kind = getattr(module, name)
        if kind.__module__ != module.__name__ or kind.forward.__module__ != module.__name__:
            refuse(f"{module.__name__}.{name}")
    tables = (modeling_llama.LLAMA_ATTENTION_CLASSES, modeling_mistral.MISTRAL_ATTENTION_CLASSES)
    for kind in (kind for table in tables for kind in table.values()):
        if not kind.__module__.startswith("transformers."):
            refuse(f"an attention class of transformers ({kind.__name__})")


def check_tower(tower: nn.Module, forward: Callable) -> None:
    """Raises ValueError when a function of the vision tower was replaced that its own forward pass
    goes round; `forward` is that of the tower's class as it came."""
    if replacement(tower, "forward", forward) is not None:
        refuse(f"{type(tower).__name__}.forward")
    clip: Any = tower.vision_tower
    layers = clip.vision_model.encoder.layers
    parts = [clip, clip.vision_model, clip.vision_model.encoder]
    for part in (*parts, *layers, *(layer.self_attn for layer in layers)):
        own = [kind for kind in TOWER_PARTS if isinstance(part, kind)]
        if not own:  # wrapped by something, such as torch.compile
            continue
        patched = type(part) is not own[0] or own[0].forward.__module__ != modeling_clip.__name__
        if patched or ("forward" in vars(part) and not hasattr(part, "_hf_hook")):
            refuse(f"{own[0].__name__}.forward of the vision tower")


def spliced_outside(
    splice: Callable, pruner, input_ids: Tensor, attention_mask, labels, images, image_sizes
) -> Prompt:
    """What another package's splice makes of prompts (B, L), for decoding: padded on the left.

    Raises ValueError when a method is in use as well, or the result is not that of LLaVA.
    """
    if pruner.name != "none":
        raise ValueError(
            f"{SPLICE} was replaced from outside, so that pruning method {pruner.name!r} would not "
            'see the images: use one of them (model.pruner = build_pruner("none"))'
        )
    sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
    out = splice(input_ids, None, attention_mask, None, labels, images, **sizes)
    if not isinstance(out, tuple) or len(out) != 6 or not isinstance(out[4], Tensor):
        raise ValueError(
            f"the {SPLICE} assigned from outside must return (input_ids, position_ids, "
            "attention_mask, past_key_values, inputs_embeds, labels) with inputs_embeds"
        )
    _, positions, mask, _, embeds, labels = out
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    mask = mask.to(embeds.device)
    if positions is None:
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    # A stable sort of the mask moves padding to the left and leaves the tokens in order.
    order = true_last(mask)
    nowhere = torch.full_like(order, -1)
    return Prompt(
        inputs_embeds=embeds.gather(1, order[..., None].expand_as(embeds)),
        attention_mask=mask.gather(1, order),
        position_ids=positions.to(embeds.device).expand_as(order).gather(1, order),
        labels=None if labels is None else labels.to(embeds.device).gather(1, order),
        visual_index=nowhere,
        patch_index=nowhere,
    )
