"""FastV: keep the image tokens the last prompt token attends to most early in the decoder.

Paper: An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models, https://arxiv.org/abs/2403.06764

Differs from the release: one set is chosen in the prefill and serves the whole answer (the mask and
in-place versions choose again at every step); layer K-1 runs once and only one row of its attention
map is computed (there, it runs twice and fills its cache twice); the span of every image is the
real one, every prompt of a batch and every image of a prompt is ranked on its own.
"""

from dataclasses import dataclass

from .base import DecoderPruner


@dataclass
class FastV(DecoderPruner):
    """
    visual_token_num: tokens per image from `layer` on; the layers before it see all of them
    layer:            K, the first decoder layer that sees fewer tokens (at least 1); None: 2 of 32
                      layers, scaled to the depth of the decoder
    ratio:            R, share of an image's tokens that is removed, 0 to below 1; replaces
                      `visual_token_num`. None: the budget counts
    """

    ratio: float | None = None

    name = "fastv"
    paper_layer = 2

    def __post_init__(self):
        super().__post_init__()
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise ValueError(f"ratio ({self.ratio}) must lie between 0 (keep all) and below 1")

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        if self.ratio is None:
            super().check(num_patches, num_layers, crops)
        else:  # the budget is not used
            self.check_depth(num_layers)

    def blind_cuts(self, num_layers: int) -> tuple[int, ...]:
        return (self.cut_layer(num_layers),)

    @property
    def by_share(self) -> bool:
        return self.ratio is not None or super().by_share

    def left_of(self, count: int) -> int:
        if self.ratio is None:
            return super().left_of(count)
        return max(1, round(count * (1 - self.ratio)))
