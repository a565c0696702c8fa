"""What a step learns from answers and their worth: probabilities of their tokens, and the losses.

The first token follows from the prompt as it is used: all visual tokens up to the layer that
prunes, those that are needed behind it; its reference sees all of them everywhere. How the other
tokens are weighed is `token_pass`:

"released": by one pass over the pruned prompt and the answer, from which unneeded tokens are
            missing in every layer. In the layers before the cut the prompt's tokens would have seen
            them, so these are not quite the probabilities the answer was drawn from.
"exact":    by one pass over the whole prompt and the answer, in which the answer's tokens do not
            see unneeded ones, and which drops those behind the cut, as generation does. One pass
            for all answers to a prompt; the reference is the whole prompt without the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava.model.language_model.attention import padded_causal_mask
from llava.model.language_model.layers import Step
from llava.model.prompt import Prompt, positions_behind
from llava.pruning import build_pruner
from llava.pruning.ops import gather_tokens
from llava.pruning.per_token import at

from .loss import cut_to, distance_loss, packed, reward_loss
from .sampling import Answers

TOKEN_PASSES = ("released", "exact")


@dataclass
class PolicyWeights:
    """
    reward_weight:  of the policy's loss
    kd_weight:      of the distance from the model without the adapter
    max_seq_length: tokens of the pruned prompt and the answer; what an answer has beyond them is
                    not learned from; None: no limit
    token_pass:     how tokens behind the first are weighed, see above
    temperature:    as in sampling
    """

    reward_weight: float = 1.0
    kd_weight: float = 0.04
    max_seq_length: int | None = 640
    token_pass: str = "released"
    temperature: float = 1.0

    def __post_init__(self):
        if self.token_pass not in TOKEN_PASSES:
            raise ValueError(
                f"token_pass {self.token_pass!r} is unknown, choose from {', '.join(TOKEN_PASSES)}"
            )


class PolicyObjective(nn.Module):
    """The loss of a batch of answers; `policy` is a PeftModel, of which the adapter is trained.

    stage: the `KeepNeeded` that the answers were sampled with
    """

    def __init__(self, policy: nn.Module, stage, weights: PolicyWeights | None = None):
        super().__init__()
        self.policy, self.stage, self.weights = policy, stage, weights or PolicyWeights()

    @property
    def llava(self) -> nn.Module:
        """The model inside of the adapter's wrapper."""
        return self.policy.get_base_model()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None):
        """As of the model; by default in the way that works without gradients of the inputs."""
        options = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        self.llava.gradient_checkpointing_enable(options)

    def forward(self, answers: Answers, worth: Tensor) -> dict[str, Tensor]:
        """Losses of answers (B) whose advantages are `worth` (B,)."""
        lengths = answers.kept.sum(dim=1)
        mask = cut_to(self.weights.max_seq_length, lengths, answers.mask)
        mask[:, 0] = answers.mask[:, 0]  # it follows from the prompt, which is not cut
        log_probs = self.log_probs(answers, mask)
        rewarded = reward_loss(log_probs, worth.to(log_probs), mask)
        losses = {"loss": self.weights.reward_weight * rewarded, "reward_loss": rewarded.detach()}
        if self.weights.kd_weight:
            with torch.no_grad(), self.without_adapter():
                reference = self.log_probs(answers, mask, reference=True)
            distance = distance_loss(log_probs, reference, mask)
            losses["loss"] = losses["loss"] + self.weights.kd_weight * distance
            losses["kd_loss"] = distance.detach()
        return losses

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The model as it was before the training, and without dropout."""
        training = self.policy.training
        self.policy.eval()
        try:
            with self.policy.disable_adapter():
                yield
        finally:
            self.policy.train(training)

    def log_probs(self, answers: Answers, mask: Tensor, reference: bool = False) -> Tensor:
        """(B, T) logarithms of the probabilities of the answers' tokens, 0 where `mask` is False.

        reference: the first token (with "exact": every token) from the unpruned prompt
        """
        if self.weights.token_pass == "exact":
            return self._exact(answers, mask, reference)
        first, rest = self._first(answers, reference), self._rest(answers, mask)
        return torch.cat([first[:, None], rest], dim=1)

    def _first(self, answers: Answers, reference: bool) -> Tensor:
        """(B,) of the first tokens; a prompt that was answered several times runs once."""
        prompt, rows = answers.once
        with self.llava.using(build_pruner("none") if reference else self.stage):
            out = self.llava(
                inputs_embeds=prompt.inputs_embeds,
                attention_mask=prompt.attention_mask,
                position_ids=prompt.position_ids,
                visuals=prompt.visuals,
                use_cache=False,
                last_logits_only=True,
            )
        return self._chosen(out.logits[:, -1][rows], answers.ids[:, 0])

    def _rest(self, answers: Answers, mask: Tensor) -> Tensor:
        """(B, T - 1) of the tokens behind the first, 0 where `mask` is False."""
        order, valid = packed(torch.cat([answers.kept, mask], dim=1))
        hidden = self.llava.model(
            gather_tokens(self._embedded(answers), order),
            attention_mask=valid,
            position_ids=self._positions(answers, order),
        ).hidden_states
        asks = torch.cat([torch.zeros_like(answers.kept), mask], dim=1).gather(1, order)
        asks = asks[:, 1:] & asks[:, :-1]  # predicted by a token of the answer
        return self._predicted(hidden[:, :-1][asks], answers.ids[:, 1:], mask[:, 1:])

    def _exact(self, answers: Answers, mask: Tensor, reference: bool) -> Tensor:
        """(B, T) of all tokens, 0 where `mask` is False. The answers to a prompt stand one behind
        the other behind it, and do not see one another: a prompt runs once."""
        (prompt, rows), decoder = answers.once, self.llava.model
        shared = SharedPrompts.of(answers, mask)
        valid = torch.cat([prompt.attention_mask, shared.mask], dim=1)
        kept = prompt.attention_mask if reference else shared.kept
        kept = torch.cat([kept, shared.mask], dim=1)
        owner = shared.owner.expand_as(valid)
        x = torch.cat([prompt.inputs_embeds, self._embeds(shared.ids, prompt)], dim=1)
        places = [prompt.position_ids] + [shared.positions] * shared.most
        places = torch.cat(places, dim=1)
        rope = decoder.rotary(places, x.dtype)
        seen = padded_causal_mask(valid, valid.shape[1]) & apart(owner)
        seen = seen & ~((owner >= 0)[:, None, :, None] & ~kept[:, None, None, :])
        # What hides from an answer may not leave its padding without a key.
        step = Step(rope, seen | ~seen.any(dim=-1, keepdim=True))
        asked = shared.asked
        for number, layer in enumerate(decoder.layers):
            if number == self.stage.layer + 1 and not reference:
                order, there = packed(kept)
                x, owner, places = (at(order)(values, 1) for values in (x, owner, places))
                seen = padded_causal_mask(there, there.shape[1]) & apart(owner)
                step = Step(decoder.rotary(places, x.dtype), seen | ~seen.any(-1, keepdim=True))
                # where a token is now: how many that stay stand in front of it, padding included
                asked = kept.cumsum(dim=1).gather(1, asked) - 1 + (~there).sum(1, keepdim=True)
            x, _ = decoder.run_layer(layer, x, step, None)
        hidden = gather_tokens(decoder.norm(x), asked)
        hidden = hidden.unflatten(1, (shared.most, -1))[rows, shared.slot]
        return self._predicted(hidden[mask], answers.ids, mask)

    def _embedded(self, answers: Answers) -> Tensor:
        """(B, S + T, D) prompts and answers."""
        prompt = answers.prompt
        return torch.cat([prompt.inputs_embeds, self._embeds(answers.ids, prompt)], dim=1)

    def _embeds(self, ids: Tensor, prompt: Prompt) -> Tensor:
        return self.llava.model.embed_tokens(ids).to(prompt.inputs_embeds)

    def _positions(self, answers: Answers, order: Tensor) -> Tensor:
        """Positions (B, L), or (B, L, A), of the tokens at `order` (B, L) of prompt and answer."""
        own = answers.prompt.position_ids
        places = torch.cat([own, positions_behind(own, answers.ids.shape[1])], dim=1)
        return at(order)(places, 1)

    def _predicted(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) of `ids` where `mask` is True, else 0; hidden (n, D) stands in front of each."""
        values = self._chosen(self.llava.logits_of(hidden), ids[mask])
        return values.new_zeros(ids.shape).masked_scatter(mask, values)

    def _chosen(self, logits: Tensor, ids: Tensor) -> Tensor:
        """(n,) of `ids` (n,) by logits (n, V)."""
        scaled = logits.float() / self.weights.temperature
        chosen = scaled.gather(1, ids[:, None])[:, 0]
        return chosen - scaled.logsumexp(dim=1)


@dataclass
class SharedPrompts:
    """The answers to every prompt one behind the other: of U prompts, at most M answers each.

    slot:      (B,) number of an answer among those to its prompt
    most:      M
    ids, mask: (U, M * T) of the answers, padded
    kept:      (U, S) True on the tokens of the prompt that stay
    owner:     (1, S + M * T) number of the answer that a token belongs to; -1: to the prompt
    positions: (U, T), or (U, T, A), of the tokens of any answer
    asked:     (U, M * T) place of the token in front of each: for the first the prompt's last one
    """

    slot: Tensor
    most: int
    ids: Tensor
    mask: Tensor
    kept: Tensor
    owner: Tensor
    positions: Tensor
    asked: Tensor

    @classmethod
    def of(cls, answers: Answers, mask: Tensor) -> SharedPrompts:
        """mask: (B, T) True on the tokens of the answers that count"""
        prompt, rows = answers.once
        size = answers.ids.shape[1]
        same = rows[:, None] == rows[None, :]
        slot = same.tril(-1).sum(dim=1)
        most, length = int(slot.max()) + 1, prompt.inputs_embeds.shape[1]

        def placed(values: Tensor) -> Tensor:
            room = values.new_zeros(len(prompt.inputs_embeds), most, size)
            room[rows, slot] = values
            return room.flatten(1)

        kept = torch.empty_like(prompt.attention_mask)
        kept[rows] = answers.kept
        place = torch.arange(most * size, device=rows.device)
        owner = torch.cat([place.new_full((length,), -1), place // size])[None]
        asked = torch.where(place % size == 0, 0, place) + length - 1
        positions = positions_behind(prompt.position_ids, size)
        ids, own = placed(answers.ids), placed(mask)
        return cls(slot, most, ids, own, kept, owner, positions, asked.expand_as(ids))


def apart(owner: Tensor) -> Tensor:
    """(U, 1, L, L) False where a token of an answer would see one of another; owner (U, L)."""
    return (owner[:, None, :, None] == owner[:, None, None, :]) | (owner < 0)[:, None, None, :]
