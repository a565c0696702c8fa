"""The vision tower, by name or folder."""

from __future__ import annotations

import os
import warnings

from ...playground import ROOT
from .clip_encoder import CLIPVisionTower
from .s2_encoder import CLIPVisionTowerS2

#: folders above a checkpoint in which a tower that was not copied along is looked for
LEVELS = 3
HUB_PREFIXES = ("openai", "laion")


def resolve_tower_path(name: str, checkpoint_dir: str | None) -> str:
    """Where tower `name` is: a folder relative to the checkpoint wins, then `name` as it stands.

    A copy of a checkpoint may have lost the tower its relative path led to. A folder of the same
    name above the copy (at most `LEVELS` up), or among the playground's, is taken for it, and said.
    """
    if not checkpoint_dir or os.path.isabs(name):
        return name
    if beside := tower_beside(name, checkpoint_dir):
        return beside
    if os.path.isdir(name) or not name.startswith("."):
        return name
    moved = _moved_tower(os.path.basename(os.path.normpath(name)), checkpoint_dir)
    if moved is None:
        return name
    warnings.warn(
        f"vision tower {name!r} of {checkpoint_dir} is not there, using {moved}", stacklevel=2
    )
    return moved


def tower_beside(name: str, checkpoint_dir: str) -> str | None:
    """The folder that a relative path means as seen from a checkpoint, or from where it is linked
    to; None when there is none."""
    starts = (os.path.abspath(checkpoint_dir), os.path.realpath(checkpoint_dir))
    paths = (os.path.normpath(os.path.join(start, name)) for start in starts)
    return next(filter(os.path.isdir, paths), None)


def _moved_tower(name: str, checkpoint_dir: str) -> str | None:
    place, places = os.path.abspath(checkpoint_dir), []
    if name in ("", ".", ".."):
        return None
    for _ in range(LEVELS):
        place = os.path.dirname(place)
        places.append(place)
    found = (os.path.join(place, name) for place in [*places, str(ROOT / "checkpoints")])
    return next((path for path in found if os.path.isfile(f"{path}/config.json")), None)


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
