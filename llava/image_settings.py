"""How images are cut into crops and how their tokens are laid out, as one value."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields, replace

#: beginnings of ways to cut an image that models of later versions of LLaVA were trained with;
#: other unknown words cut the middle out, as in LLaVA
ELSEWHERE = ("anyres_", "highres", "crop_split")


@dataclass(frozen=True)
class ImageSettings:
    """What `process_images` and the model have to agree on; names as in the config of a checkpoint.

    image_aspect_ratio:   "pad", "anyres" (overview and tiles), or else the middle is cut out
    image_grid_pinpoints: (width, height) in pixels that "anyres" chooses from
    anyres_selection:     how, see `llava.mm_utils.select_best_resolution`
    mm_patch_merge_type:  "flat": crop after crop; "spatial": tiles are read as one grid;
                          "spatial_unpad": as one grid without padding, a newline behind each row
    """

    image_aspect_ratio: str | None = None
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    anyres_selection: str = "area"
    mm_patch_merge_type: str = "flat"

    @classmethod
    def of(cls, config) -> ImageSettings:
        """The settings that `config` stands for: itself; of the config of a model, those in use; of
        anything else, its values. Raises ValueError when it lacks the resolutions."""
        if isinstance(config, cls):
            return config
        return cls.of_checkpoint(config).changed(getattr(config, "image_changes", {}))

    def changed(self, changes: dict) -> ImageSettings:
        """With other values for images that are cut into tiles; the same for others."""
        return replace(self, **changes) if self.image_aspect_ratio == "anyres" else self

    @classmethod
    def of_checkpoint(cls, config) -> ImageSettings:
        """The values of `config`, whatever pruning method is in use."""
        given = {field.name: getattr(config, field.name, None) for field in fields(cls)}
        if str(ratio := given["image_aspect_ratio"]).startswith(ELSEWHERE):
            raise ValueError(
                f"image_aspect_ratio {ratio!r} is not supported, choose square, pad or anyres"
            )
        pinpoints = read_pinpoints(given["image_grid_pinpoints"])
        given["image_grid_pinpoints"] = tuple(tuple(size) for size in pinpoints or ())
        own = cls(**{key: value for key, value in given.items() if value})
        if own.image_aspect_ratio == "anyres" and not own.image_grid_pinpoints:
            raise ValueError("image_aspect_ratio anyres needs image_grid_pinpoints")
        return own

    def changes_of(self, pruner, side: int) -> dict:
        """What a pruning method asks to be changed of these settings, on a model whose crops have
        `side` pixels. Raises ValueError when it asks for what is no setting."""
        names, stage = [field.name for field in fields(self)], pruner.vision
        if unknown := set(stage.anyres_config) - set(names):
            raise ValueError(
                f"{pruner.name} sets {', '.join(sorted(unknown))} in anyres_config, choose from "
                f"{', '.join(names)}"
            )
        changes = dict(stage.anyres_config)
        if stage.anyres_tiles is not None:
            across, down = stage.anyres_tiles
            changes["image_grid_pinpoints"] = ((side * across, side * down),)
            changes["mm_patch_merge_type"] = self.mm_patch_merge_type.replace("_unpad", "")
        return changes


def read_pinpoints(pinpoints):
    """A list of (width, height) from itself or from the same as a text; ValueError for other texts,
    such as the ranges "(1x1),...,(6x6)" of later versions of LLaVA."""
    if not isinstance(pinpoints, str):
        return pinpoints
    try:
        return ast.literal_eval(pinpoints)
    except (ValueError, SyntaxError):
        raise ValueError(
            "image_grid_pinpoints must be a list of (width, height) in pixels, or that as a text, "
            f"not {pinpoints!r}"
        ) from None


class KnowsMethod:
    """Mixin of configs: a model's config knows, beside its values, what the pruning method in use
    changes of them for "anyres" images, so that `process_images(images, processor, model.config)`
    cuts images as the model expects.

    `image_changes` is no value of the config: it is not saved, printed or compared.
    """

    __slots__ = ("image_changes",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image_changes = {}
