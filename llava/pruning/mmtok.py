"""MMTok: cover the question's words and all patches of the image at once.

Paper: MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs,
https://arxiv.org/abs/2508.18264

Words, as rows of the embedding matrix of the language model, are compared with patches behind the
projector; patches with one another in front of it. Both become shares by a softmax over patches.

Written from the paper. Where it leaves a choice: the question is the user's text without image
marks and without the line that says how to answer, read without a start mark. The small model that
adds words to the question, an option of the paper, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import device_of
from .base import SelectPruner
from .captured import captured
from .coverage import cover_most
from .extras import with_extra, without_extra
from .interfaces import LanguageModel
from .letters import Letters
from .ops import NEGLIGIBLE, cosines, first_copies, gather_tokens, normalize, on_device
from .own_grids import OwnGrids
from .questions import bare_question
from .required import assigned
from .tokens import VisionTokens

#: the extra from one hook to the next: (B, N, C) what a patch is in front of the projector
PATCHES = "patches"
#: words of prompts are padded to a multiple of it: few loops to capture
ROUND_UP = 16
#: temperature of words over patches by default, on LLaVA and where images have grids of their own
TAU_T, OWN_GRIDS_TAU_T = 0.02, 0.01


@dataclass
class MMTok(OwnGrids, SelectPruner):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT the sum over five crops (640 = 5 x 128),
                      images with fewer crops have fewer tokens
    tau_t:            temperature of a word's shares among the patches; None: 0.02, on Qwen2.5-VL
                      0.01
    tau_v:            temperature of a patch's shares among the patches
    alpha:            weight of the patches against the words, which count 1 together
    """

    tau_t: float | None = None
    tau_v: float = 0.2
    alpha: float = 0.5

    name = "mmtok"
    reads_question = True
    anyres_config = {"mm_patch_merge_type": "spatial"}

    def __post_init__(self):
        super().__post_init__()
        for name in ("tau_t", "tau_v"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} ({value}) must be above 0")
        if self.alpha < 0:
            raise ValueError(f"alpha ({self.alpha}) must be at least 0")
        self._letters: Letters | None = None
        self._tokenizer: Any = None
        self._embed: nn.Module | None = None

    # --- words --------------------------------------------------------------------------------

    def use_random_parts(self, model: LanguageModel) -> None:
        """Reads letter by letter where the model has no tokenizer."""
        self._letters = Letters(model.config.vocab_size)

    def attach(self, model: LanguageModel) -> None:
        super().attach(model)
        self._tokenizer = self._letters if model.tokenizer is None else model.tokenizer
        self._embed = model.get_input_embeddings()
        if self._tokenizer is None:
            raise FileNotFoundError(
                f"{self.name} reads questions with the tokenizer of the model, which this one was "
                "made without: load it with load_pretrained_model, or set model.tokenizer"
            )

    @torch.no_grad()
    def words(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """(embeddings (n, M, D), weights (n, M) fp32, 0 on padding) of the words of questions."""
        embed = assigned(self._embed, self.name)
        options = dict(add_special_tokens=False, verbose=False)
        rows = [self._tokenizer(text, **options).input_ids for text in texts]
        longest = -(-max(map(len, rows)) // ROUND_UP) * ROUND_UP
        ids = [row + [0] * (longest - len(row)) for row in rows]
        weights = [[1 / max(1, len(row))] * len(row) + [0.0] * (longest - len(row)) for row in rows]
        found = embed(on_device(ids, device_of(embed)))
        return found.to(device), on_device(weights, device, torch.float32)

    # --- choice -------------------------------------------------------------------------------

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        return with_extra(vision, PATCHES, vision.features)

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        self.check_model(vision)
        patches, vision = vision.extras[PATCHES], without_extra(vision, PATCHES)
        if vision.questions is None:
            batch, _, width = vision.features.shape
            words, weights = (patches.new_empty(batch, 0, width), patches.new_empty(batch, 0))
        else:
            words, weights = self.words(list(map(bare_question, vision.questions)), patches.device)
            words, weights = words[vision.owners], weights[vision.owners]
        tau_t = self.tau_t or (OWN_GRIDS_TAU_T if self.own_grids else TAU_T)
        texts, constants = (words, weights), (tau_t, self.tau_v, self.alpha)
        count = self.num_keep(vision)
        picks = cover_both(vision.features, patches, *texts, count, *constants)
        return vision.keep(picks.sort(dim=1).values)


@captured
@torch.no_grad()
def cover_both(
    projected: Tensor,
    patches: Tensor,
    words: Tensor,
    weights: Tensor,
    count: int,
    tau_t: float,
    tau_v: float,
    alpha: float,
) -> Tensor:
    """Places (B, T) in the order they are picked: the most of what they add to how much of words
    and patches is covered, each by the largest share that it has in a pick.

    projected: (B, N, D) tokens as words (B, M, D) are compared with them, which count `weights`
               (B, M) each
    patches:   (B, N, C) tokens as they are compared with one another, which count `alpha` together
    """
    size = projected.shape[1]
    alike = cosines(patches)
    image = (alike / tau_v).softmax(dim=1) * (alpha / size)
    text = normalize(projected) @ normalize(words).transpose(1, 2)  # (B, N, M)
    first = gather_tokens(text, first_copies(alike))
    text = torch.where((text - first).abs() < NEGLIGIBLE, first, text)
    text = (text / tau_t).softmax(dim=1) * weights.float()[:, None]
    return cover_most(torch.cat([image, text], dim=2), count)
