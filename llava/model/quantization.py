"""8-bit and 4-bit weights through bitsandbytes (the extra `quant`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import CustomDtype
from torch import nn

from llava.errors import how_to_install

#: modules that stay in half precision: small, or sensitive
KEPT = ("lm_head", "mm_projector", "vision_tower", "visual")
#: activations above this magnitude take the half-precision path in 8 bits
OUTLIER_THRESHOLD = 6.0


def import_bitsandbytes():
    """The package, or an ImportError that says how to get it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            f"load_8bit and load_4bit need the package bitsandbytes: {how_to_install('quant')}"
        ) from error
    return bitsandbytes


def quantize(model: nn.Module, bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """Replaces the decoder's linear layers by quantised ones; they multiply in `dtype`.

    The weights are packed when the model moves to its device. Returns their types then, by name, as
    accelerate takes them.
    """
    bnb = import_bitsandbytes()
    weights = {id(linear.weight) for _, _, linear in quantizable(model)}
    packed = CustomDtype.INT4 if bits == 4 else torch.int8
    found = {name: packed for name, own in model.named_parameters() if id(own) in weights}
    for parent, name, linear in list(quantizable(model)):
        setattr(parent, name, _quantized(bnb, linear, bits, dtype))
    return found


def quantizable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers that `quantize` replaces: (module around it, its name there, the layer)."""
    for parent_name, parent in model.named_modules():
        for name, linear in parent.named_children():
            path = f"{parent_name}.{name}".split(".")
            if isinstance(linear, nn.Linear) and not set(path) & set(KEPT):
                yield parent, name, linear


def _quantized(bnb, linear: nn.Linear, bits: int, dtype: torch.dtype) -> nn.Module:
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.data
    if bits == 4:
        # The format of QLoRA: nf4 values with scales that are quantised themselves.
        options = {"quant_type": "nf4", "compress_statistics": True}
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, device="meta", **options)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
    else:
        new = bnb.nn.Linear8bitLt(
            *sizes, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
        )
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = linear.bias
    return new.requires_grad_(False)
