"""The vision tower, by name or folder."""

from __future__ import annotations

import os

from .clip_encoder import CLIPVisionTower
from .s2_encoder import CLIPVisionTowerS2

HUB_PREFIXES = ("openai", "laion")


def resolve_tower_path(name: str, checkpoint_dir: str | None) -> str:
    """Where tower `name` is: a folder relative to the checkpoint wins, else `name` as it stands."""
    if checkpoint_dir and not os.path.isabs(name):
        beside = os.path.normpath(os.path.join(checkpoint_dir, name))
        if os.path.isdir(beside):
            return beside
    return name


def build_vision_tower(vision_tower_cfg, **kwargs) -> CLIPVisionTower:
    """The CLIP tower a config names in `mm_vision_tower` (or `vision_tower`).

    Accepts a local folder or a hub name that starts with "openai" or "laion" or contains
    "ShareGPT4V"; `s2` in the config selects the multi-scale tower. ValueError otherwise.
    """
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(
        vision_tower_cfg, "vision_tower", None
    )
    if not name:
        raise ValueError("the config names no vision tower (mm_vision_tower is missing or empty)")
    path = resolve_tower_path(name, getattr(vision_tower_cfg, "_name_or_path", None))
    if not (os.path.exists(path) or path.startswith(HUB_PREFIXES) or "ShareGPT4V" in path):
        raise ValueError(
            f"Unknown vision tower: {name!r} is neither a folder (looked at {path!r}) nor a hub "
            f"name starting with {' or '.join(HUB_PREFIXES)}; "
            "override it with --vision-tower PATH"
        )
    tower = CLIPVisionTowerS2 if getattr(vision_tower_cfg, "s2", False) else CLIPVisionTower
    return tower(path, args=vision_tower_cfg, **kwargs)
