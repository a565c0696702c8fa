"""How the release of GlimpsePrune is called: settings and references of one `generate` call."""

from __future__ import annotations

from .base import Pruner
from .published import Published

#: keyword of `generate` that runs the model without the method
SELECTION = "do_selection"
#: options that may change from call to call
SETTINGS = (
    "visual_token_num",
    "max_remain_ratio",
    "reduce_threshold",
    "min_remain_num",
    "anchor_positions",
    "ref_boxes",
    "ref_masks",
    "prune_videos",
)
#: what other methods call a share of the tokens -> our option
SHARE = {"visual_token_ratio": "max_remain_ratio"}
#: what the release calls what it is given with the images -> our option
REFERENCES = {
    "normed_bboxes": "ref_boxes",
    "ref_token_masks": "ref_masks",
    "ref_image_masks": "ref_masks",
}


class GlimpseRelease(Published):
    """`generate(..., max_remain_ratio=0.1, normed_bboxes=[...], do_selection=False)`: what the
    release writes to its model before a call belongs to the call alone. None is not given."""

    def __init__(self):
        super().__init__(
            options={"new_modules_dir": "new_modules", **SHARE},
            environment={
                "MAX_REMAIN_RATIO": "max_remain_ratio",
                "MIN_REMAIN_NUM": "min_remain_num",
            },
        )

    def for_call(self, pruner, keywords: dict) -> tuple:
        names = {name: name for name in SETTINGS} | REFERENCES | SHARE
        keywords, changes = dict(keywords), {}
        selects = keywords.pop(SELECTION, None)
        for name in names.keys() & keywords.keys():
            if (value := keywords.pop(name)) is None:
                continue
            if names[name] in changes:
                raise ValueError(f"{names[name]} is given twice: {name} is another name of it")
            changes[names[name]] = value
        if selects is not None and not selects:
            return Pruner(), keywords
        return (pruner.with_options(**changes) if changes else pruner), keywords
