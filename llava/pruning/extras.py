"""What methods leave with tokens for a later hook: values of each token, numbers of an image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from .prefill import Prefill
from .tokens import ImageTokens, VisionTokens

Carrier = TypeVar("Carrier", VisionTokens, ImageTokens, Prefill)


def with_extra(tokens: Carrier, name: str, values: Tensor) -> Carrier:
    """`tokens` with one more of their `extras`: `values` (B, N, ...) for crops, (n, ...) for one
    image."""
    return replace(tokens, extras={**tokens.extras, name: values})


def without_extra(tokens: Carrier, name: str) -> Carrier:
    """`tokens` without that one of their `extras`, where they have it."""
    extras = {own: values for own, values in tokens.extras.items() if own != name}
    return replace(tokens, extras=extras)


def with_number(tokens: Carrier, name: str, number: Any) -> Carrier:
    """`tokens` with one more of their `image_extras`: a number, or a list of one per image."""
    return replace(tokens, image_extras={**tokens.image_extras, name: number})
