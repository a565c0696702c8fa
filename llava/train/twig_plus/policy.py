"""Stage 2: the pruning head learns by reinforcement which visual tokens answers need.

For every sample a group of selections is drawn from the head's scores. The frozen model says the
answer on each of them; what the answer's tokens cost, compared within the group, is the reward.
All else is frozen, the twig included, so gradients flow through the two gates alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.model.language_model.layers import Step, run_layers
from llava.model.prompt import Prompt
from llava.pruning.ops import gather_tokens
from llava.pruning.per_token import at
from llava.pruning.prefill import Prefill
from llava.pruning.twigvlm_plus import GatedTwig

from ..reinforcement.sampling import drawn
from .asked import Asked
from .distillation import ATTENTION_LAYER, check_attention_layer, teach
from .losses import (
    budget_chances,
    candidates,
    divergence_weight,
    draw_in_order,
    log_chances,
    score_divergence,
    worth,
)

#: logits that are held at once while answers are weighed
LOGITS_HELD = 2**27
#: what a draw is for: behind seed, step and process
BUDGET, TOKENS = 0, 1


@dataclass
class Reinforcement:
    """
    num_groups:      selections that are compared for one sample
    beta_max, power: the chances of budgets go from equal ones to exp(-beta_max) from one to the
                     next, with this power of the training's progress
    kl:              weight of the divergence from the teacher's attention; 0: none, as in the paper
    kl_squared:      its factor from 1 to 2, which grows with the budget, counts twice, as released
    attention_layer: of the teacher, from 0
    """

    num_groups: int = 32
    beta_max: float = 8.0
    power: float = 2.0
    kl: float = 1.0
    kl_squared: bool = True
    attention_layer: int = ATTENTION_LAYER

    def __post_init__(self):
        if self.num_groups < 2:
            raise ValueError(
                f"num_groups ({self.num_groups}) must be at least 2: selections are compared with "
                "one another"
            )
        if self.kl < 0 or self.beta_max < 0 or self.power <= 0:
            raise ValueError(
                f"kl ({self.kl}) and beta_max ({self.beta_max}) must not be negative, power "
                f"({self.power}) must be positive"
            )


@dataclass
class Cuts:
    """Layers in front of which tokens are selected (K), and all visual ones go."""

    first: int
    wipe: int


@dataclass
class Sample:
    """One sample without padding, and what is known of it before anything is drawn.

    prefill: in front of the first layer
    labels:  (1, S)
    asked:   its visual tokens, all of which are real
    """

    prefill: Prefill
    labels: Tensor
    asked: Asked

    @classmethod
    def of(cls, prompt: Prompt, row: int, decoder: nn.Module) -> Sample:
        one = prompt.rows([row])
        size, left = prompt.counts.lengths[row], prompt.counts.left
        own = slice(one.inputs_embeds.shape[1] - size, None) if left else slice(0, size)
        one.attention_mask, one.labels = one.attention_mask[:, own], one.labels[:, own]
        visuals = prompt.visuals.row(row, own)
        one.visual_index, one.patch_index = visuals.visual_index, visuals.patch_index
        places = one.position_ids[:, own]
        prefill = decoder.start(one.inputs_embeds[:, own], None, places, visuals)
        return cls(prefill, one.labels, Asked.of(one))

    @property
    def usable(self) -> bool:
        """Whether there are visual tokens in front of an answer, and none behind its question."""
        return bool(self.asked.real.all())


@dataclass
class Selections:
    """A group of selections of one sample.

    chosen: (G, r) numbers of visual tokens, in the order in which they were drawn
    least, most: smallest and largest budget there is
    """

    chosen: Tensor
    least: int
    most: int


class HeadReinforcement(nn.Module):
    """The pruning head of a twig, which is all that is trained; model and twig are frozen.

    Takes the batches of `llava.train.data`, how much of the training lies behind, and a key that
    the draws depend on. Returns {"loss"}, a mean over samples, and, detached, {"policy", "attn_kl",
    "cost" (per token of the answer), "cost_std", "kept"}.
    """

    def __init__(self, model: nn.Module, twig: GatedTwig, cuts: Cuts, settings: Reinforcement):
        super().__init__()
        check_attention_layer(settings.attention_layer, len(model.model.layers))
        model.requires_grad_(False).eval()
        twig.requires_grad_(False).eval()
        self.head = twig.pruning_head.requires_grad_(True)
        self.cuts, self.settings = cuts, settings
        self._frozen = model, twig  # a tuple hides them from optimizers and checkpoints

    @property
    def trunk(self) -> nn.Module:
        return self._frozen[0]

    @property
    def twig(self) -> GatedTwig:
        return self._frozen[1]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list | None = None,
        progress: float = 0.0,
        key: Sequence[int] = (0,),
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            prompt = self.trunk.build_prompt(input_ids, attention_mask, labels, images, image_sizes)
            rows = range(len(prompt.labels))
            samples = [Sample.of(prompt, row, self.trunk.model) for row in rows]
        found = [
            self.of_sample(sample, progress, (*key, row))
            for row, sample in enumerate(samples)
            if sample.usable
        ]
        if not found:  # every process has to take part in every step
            nothing = sum(p.sum() for p in self.head.parameters()) * 0
            return {"loss": nothing}
        return {name: torch.stack([one[name] for one in found]).mean() for name in found[0]}

    def of_sample(self, sample: Sample, progress: float, key: Sequence[int]) -> dict[str, Tensor]:
        entered, teacher, scores = self.scored(sample)
        selections = self.drawn(scores.detach(), progress, key)
        with torch.no_grad():
            costs, count = self.costs(sample, entered, selections.chosen)
        return self.losses(scores, teacher, selections, costs) | {
            "cost": costs.mean() * (sample.labels.shape[1] - sample.asked.asking[0, 0] - 1) / count,
        }

    def scored(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (1, S, D) as they enter layer K, and scores (V,) of the visual ones by the teacher
        and, with gradients, by the head. One pass of the frozen layers serves all three."""
        decoder, prefill, asked = self.trunk.model, sample.prefill, sample.asked
        with torch.no_grad():
            step = decoder.prefill_step(prefill)
            layer = self.settings.attention_layer if self.settings.kl else self.cuts.first
            layer = min(layer, len(decoder.layers) - 1)
            teaching = teach(decoder, prefill, step, asked, self.cuts.first, layer, whole=False)
            x = run_layers(self.twig.layers[:-1], teaching.entered, step, None)
        places = prefill.position_ids
        scores = self.twig.scores(decoder, x, places, asked.asking, asked.places, asked.real)
        return teaching.entered, teaching.scores[0], scores[0]

    def drawn(self, scores: Tensor, progress: float, key: Sequence[int]) -> Selections:
        """A budget, and a group of selections of so many tokens."""
        settings, depth = self.settings, len(self.trunk.model.layers)
        budgets = candidates(len(scores), self.cuts.first, self.cuts.wipe, depth)
        chances = budget_chances(len(budgets), progress, settings.beta_max, settings.power)
        number = int((chances.cumsum(0) <= drawn(1, *key, BUDGET)[0]).sum())
        kept = budgets[min(number, len(budgets) - 1)]
        uniform = drawn(settings.num_groups * len(scores), *key, TOKENS)
        with np.errstate(divide="ignore"):  # 0 is never chosen
            noise = -np.log(-np.log(uniform))
        noise = torch.tensor(noise, dtype=torch.float32).view(settings.num_groups, -1)
        chosen = draw_in_order(scores, kept, noise.to(scores.device))
        return Selections(chosen, budgets[0], budgets[-1])

    def costs(self, sample: Sample, entered: Tensor, chosen: Tensor) -> tuple[Tensor, int]:
        """(G,) cross-entropy of the answer's tokens, summed up, per token from the first of them to
        the end of the sequence, when only `chosen` visual tokens enter the layers up to the wipe;
        and how many tokens of the answer there are.

        entered: (1, S, D) all tokens as they enter layer K
        """
        decoder, asked, groups = self.trunk.model, sample.asked, len(chosen)
        positions, size = sample.prefill.position_ids, entered.shape[1]
        text = torch.ones(size, dtype=torch.bool, device=entered.device)
        text[asked.places[0]] = False
        words = text.nonzero()[:, 0]
        order = torch.cat([words.expand(groups, -1), asked.places[0][chosen]], dim=1)
        order = order.sort(dim=1).values
        x = gather_tokens(entered.expand(groups, -1, -1), order)
        own = at(order)(positions.expand(groups, *positions.shape[1:]), 1)
        step = Step(decoder.rotary(own, x.dtype))
        x = run_layers(decoder.layers[self.cuts.first : self.cuts.wipe], x, step, None)
        x = x[text[order]].view(groups, len(words), -1)
        step = Step(decoder.rotary(positions[:, words], x.dtype))
        x = run_layers(decoder.layers[self.cuts.wipe :], x, step, None)
        targets = sample.labels[0, words][1:]
        supervised = targets != IGNORE_INDEX
        hidden, targets = decoder.norm(x[:, :-1][:, supervised]), targets[supervised]
        sums = answer_costs(self.trunk, hidden, targets)
        return sums / (size - 1 - asked.asking[0, 0]), len(targets)

    def losses(
        self, scores: Tensor, teacher: Tensor, selections: Selections, costs: Tensor
    ) -> dict[str, Tensor]:
        """From scores (V,) of the head and of the teacher, and the costs (G,) of selections."""
        settings, chosen = self.settings, selections.chosen
        policy = -(worth(costs) * log_chances(scores, chosen)).mean()
        loss, kept = policy, chosen.shape[1]
        parts = {
            "policy": policy.detach(),
            "cost_std": costs.std(),
            "kept": torch.tensor(float(kept), device=scores.device),
        }
        if settings.kl:
            everything = torch.ones_like(scores, dtype=torch.bool)[None]
            divergence = score_divergence(teacher[None], scores[None], everything)[0]
            own = divergence_weight(kept, selections.least, selections.most, settings.kl_squared)
            loss = loss + settings.kl * own * divergence
            parts["attn_kl"] = divergence.detach()
        return {"loss": loss} | parts


def answer_costs(trunk: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """(G,) cross-entropy of targets (N,) summed up, from states (G, N, D) in front of them; of all
    logits as many at a time as `LOGITS_HELD`."""
    groups, count = hidden.shape[:2]
    rows = max(1, LOGITS_HELD // max(1, count * trunk.config.vocab_size))
    sums = []
    for part in hidden.split(rows):
        logits = trunk.logits_of(part).flatten(0, 1)
        losses = F.cross_entropy(logits, targets.repeat(len(part)), reduction="none")
        sums.append(losses.view(len(part), count).sum(dim=1))
    return torch.cat(sums)
