"""IDPruner: important tokens that differ from those already chosen (maximal marginal relevance).

Paper: IDPruner, https://arxiv.org/abs/2602.13315

The paper's tables take a trained scorer's word for how important a token is. Here it is, unless a
`scorer` is given, the attention of the class token or, in a tower without one, what a token
receives from all, so that nothing is trained. Files of the published scorers have to be converted:
their layout is not part of the paper. What is no stack of linear layers derives from this class and
overrides `importance`.

Differs from the release: importance and similarity are functions of this file (there, texts in a
YAML file that are run as code); batches; the picks stay on the device (there, the host waits for
each); on LLaVA-NeXT, where the authors have no numbers, every crop is chosen from by itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import device_of
from .base import EqualShares
from .captured import captured
from .extras import without_extra
from .interfaces import LanguageModel
from .ops import cosines, top_stable
from .option_types import check_share
from .scorer import Scorer, read_scorer, scorer_file
from .sinks import NORMS, SinkFilter, picked
from .tokens import VisionTokens


@dataclass
class IDPruner(SinkFilter, EqualShares):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT shared out equally among its crops, rounded
                      down (640 of five crops are 128 each)
    mmr_lambda:       weight of importance against difference, 0 to 1; 1 is importance alone, 0 the
                      most important token and then always the one farthest from all chosen
    scorer:           file of a trained network that says how important a token is, or its folder or
                      hub repository, see `llava.pruning.scorer`; None: attention does
    sink_ratio:       share of the patches left out, those of the largest norm; 0: none
    """

    mmr_lambda: float = 0.5
    scorer: str | None = None

    name = "idpruner"
    needs = frozenset({"salience"})
    does_without = {"salience": "scorer=FILE for a trained scorer"}
    part_is_optional = True

    def __post_init__(self):
        super().__post_init__()
        self.module: Scorer | None = None
        check_share("mmr_lambda", self.mmr_lambda)
        if self.scorer is not None:
            self.needs = frozenset()

    # --- the scorer ---------------------------------------------------------------------------

    def part_folders(self, model_path: str) -> list[str]:
        return [] if self.scorer is None else [scorer_file(self.scorer, self.name)]

    def attach(self, model: LanguageModel) -> None:
        super().attach(model)
        if self.scorer is None:
            return
        width = model.config.hidden_size
        if self.module is None or self.module.width != width:  # one of another model may fit, too
            self.module = read_scorer(self.scorer, self.name, width)
        self.module.to(device_of(model.get_input_embeddings()))

    # --- choice -------------------------------------------------------------------------------

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        """Tokens are compared in the space of the language model, sinks are known before it."""
        return self.with_norms(vision)

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        return without_extra(self.keep_shares(vision), NORMS)

    def importance(self, vision: VisionTokens, rows: Tensor | slice) -> Tensor:
        """(G, N) of every token of the crops `rows` (G,); the scale does not matter, it is brought
        to 0 ... 1 in a crop."""
        if (scorer := self.module) is None:
            return vision.cue("salience")[rows] * vision.block  # the sum over patches of a token
        features = vision.features[rows].detach()
        scores: Tensor = scorer(features.to(device_of(scorer)))
        return scores.to(features.device)

    def pick(self, vision: VisionTokens, rows: Tensor | slice, count: int) -> Tensor:
        given = vision.features[rows], self.importance(vision, rows)
        others = self.others(vision, rows, count)
        return picked(others, *given, marginally_best, count, self.mmr_lambda)


@captured
@torch.no_grad()
def marginally_best(features: Tensor, importance: Tensor, count: int, weight: float) -> Tensor:
    """Places (B, T) of features (B, N, C) in the order they are picked.

    The first is the most important token, by `importance` (B, N), each further one the best by
    weight * importance - (1 - weight) * its largest cosine with the picks. Ties go to the lower
    place.
    """
    importance = importance.float()
    low, high = importance.aminmax(dim=1, keepdim=True)
    importance = (importance - low) / (high - low + 1e-6)
    count = min(count, features.shape[1])
    if weight == 1 or count == 0:
        return top_stable(importance, count)
    similarity = cosines(features)
    similarity.diagonal(dim1=1, dim2=2).fill_(torch.inf)  # no token is picked twice
    pick = importance.argmax(dim=1, keepdim=True)
    picks, closest = [pick], torch.full_like(importance, -torch.inf)
    importance = weight * importance
    for _ in range(count - 1):  # four small operations
        row = similarity.gather(1, pick[..., None].expand(-1, -1, similarity.shape[2]))[:, 0]
        closest = torch.maximum(closest, row)
        pick = torch.sub(importance, closest, alpha=1 - weight).argmax(dim=1, keepdim=True)
        picks.append(pick)
    return torch.cat(picks, dim=1)
