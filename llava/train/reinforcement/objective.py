"""What a step learns from answers and their worth: probabilities of their tokens, and the losses.

The first token follows from the prompt as it is used: all visual tokens up to the layer that
prunes, those that are needed behind it; its reference sees all of them everywhere. How the other
tokens are weighed is `token_pass`:

"released": by one pass over the pruned prompt and the answer, from which unneeded tokens are
            missing in every layer. In the layers before the cut the prompt's tokens would have seen
            them, so these are not quite the probabilities the answer was drawn from.
"exact":    by one pass over the whole prompt and the answer, in which the answer's tokens do not
            see unneeded ones, and which drops those behind the cut, as generation does. One pass
            for all tokens; the reference is the whole prompt without the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava.model.language_model.attention import padded_causal_mask
from llava.model.language_model.layers import Step
from llava.model.prompt import positions_behind
from llava.pruning import build_pruner
from llava.pruning.ops import gather_tokens

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
        """(B, T) of all tokens, 0 where `mask` is False."""
        prompt, decoder = answers.prompt, self.llava.model
        valid = torch.cat([prompt.attention_mask, mask], dim=1)
        kept = torch.cat([prompt.attention_mask if reference else answers.kept, mask], dim=1)
        answer = torch.cat([torch.zeros_like(prompt.attention_mask), mask], dim=1)
        x, everything = self._embedded(answers), torch.arange(valid.shape[1], device=valid.device)
        rope = decoder.rotary(self._positions(answers, everything.expand_as(valid)), x.dtype)
        seen = padded_causal_mask(valid, valid.shape[1])
        seen = seen & ~(answer[:, None, :, None] & ~kept[:, None, None, :])
        # What hides from an answer may not leave its padding without a key.
        step = Step(rope, seen | ~seen.any(dim=-1, keepdim=True))
        for number, layer in enumerate(decoder.layers):
            if number == self.stage.layer + 1 and not reference:
                order, there = packed(kept)
                x, answer = gather_tokens(x, order), answer.gather(1, order)
                rope = decoder.rotary(self._positions(answers, order), x.dtype)
                step = Step(rope, padded_causal_mask(there, there.shape[1]))
            x, _ = decoder.run_layer(layer, x, step, None)
        hidden = decoder.norm(x)
        return self._predicted(hidden[:, :-1][answer[:, 1:]], answers.ids, mask)

    def _embedded(self, answers: Answers) -> Tensor:
        """(B, S + T, D) prompts and answers."""
        prompt = answers.prompt.inputs_embeds
        return torch.cat([prompt, self.llava.model.embed_tokens(answers.ids).to(prompt)], dim=1)

    def _positions(self, answers: Answers, order: Tensor) -> Tensor:
        """Positions (B, L), or (B, L, A), of the tokens at `order` (B, L) of prompt and answer."""
        own = answers.prompt.position_ids
        places = torch.cat([own, positions_behind(own, answers.ids.shape[1])], dim=1)
        return places.gather(1, order) if own.ndim == 2 else gather_tokens(places, order)

    def _predicted(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) of `ids` where `mask` is True, else 0; hidden (n, D) stands in front of each."""
        values = self._chosen(self.llava.logits_of(hidden), ids[mask])
        return values.new_zeros(ids.shape).masked_scatter(mask, values)

    def _chosen(self, logits: Tensor, ids: Tensor) -> Tensor:
        """(n,) of `ids` (n,) by logits (n, V)."""
        scaled = logits.float() / self.weights.temperature
        chosen = scaled.gather(1, ids[:, None])[:, 0]
        return chosen - scaled.logsumexp(dim=1)
