"""The projector from vision width to language-model width, by name."""

from __future__ import annotations

import re

from torch import nn

from ...linear import Linear


class IdentityMap(nn.Module):
    """A projector that passes features on unchanged."""

    def forward(self, x, *args, **kwargs):
        return x

    @property
    def config(self) -> dict:
        return {"mm_projector_type": "identity"}


def build_vision_projector(config, delay_load: bool = False, **kwargs) -> nn.Module:
    """The projector `config.mm_projector_type`: "linear", "mlp<depth>x_gelu" or "identity".

    Maps (..., mm_hidden_size) to (..., hidden_size). ValueError on another name.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "linear":
        return Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "identity":
        return IdentityMap()
    if match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        layers: list[nn.Module] = [Linear(config.mm_hidden_size, config.hidden_size)]
        for _ in range(int(match[1]) - 1):
            layers += [nn.GELU(), Linear(config.hidden_size, config.hidden_size)]
        return nn.Sequential(*layers)
    raise ValueError(
        f"Unknown projector type: {kind!r}, choose from linear, identity, mlp<depth>x_gelu"
    )
