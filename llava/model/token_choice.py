"""How tokens follow from logits when guesses are verified: greedy, or sampled without bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList


class TokenChoice:
    """The rule by which one answer continues.

    processors: what changes scores (repetition penalty, forbidden tokens, ...)
    warpers:    what shapes the distribution when tokens are sampled (temperature, top-p, ...);
                None: the best token is taken
    ids:        (1, n) what the answer starts behind, as processors want to see it
    ends:       tokens that end an answer
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        warpers: LogitsProcessorList | None,
        ids: Tensor,
        ends: list[int],
    ):
        self.rules = [*processors, *(warpers or [])]
        self.sampled = warpers is not None
        self.ids = ids
        self.ends = set(ends)

    def add(self, tokens: Tensor) -> None:
        """Tokens (n,) that are part of the answer now."""
        self.ids = torch.cat([self.ids, tokens[None]], dim=1)

    def guess(self, logits: Tensor, before: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """A token (1, 1) from the drafter's logits (1, V), its plain probability (1,), and the
        distribution (1, V) it was drawn from.

        before: the guesses between the answer and this one
        """
        scores = logits
        if self.rules:
            scores = self._scores(logits, torch.cat([self.ids, *before], dim=1))
        distribution = scores.softmax(dim=-1) if self.sampled else None
        if distribution is None:
            best, token = scores.max(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(distribution, 1)
        if self.sampled or self.rules:
            best = logits.gather(1, token)
        return token, (best[:, 0] - logits.logsumexp(dim=-1)).exp(), distribution

    def stops(self, token: Tensor, probability: Tensor, least: float) -> bool:
        """Whether guessing ends with this token; waits for the device."""
        # One transfer for both; float32 holds every id below 2 ** 24 exactly.
        number, sure = torch.cat([token[0].float(), probability]).tolist()
        return sure < least or int(number) in self.ends

    def verify(self, logits: Tensor, guess) -> tuple[Tensor, list[int], Tensor]:
        """What the decoder makes of g guesses.

        logits: (g + 1, V) before each guess and behind the last
        Returns the tokens (n,) that the answer grows by, the same as numbers, and the scores (n, V)
        they were chosen from: the guesses that were accepted and one token of the decoder's own.
        Waits for the device once.
        """
        guessed = torch.cat([self.ids[:, :0], *guess.tokens], dim=1)
        scores = logits
        if self.rules:
            rows = [
                self._scores(row[None], torch.cat([self.ids, guessed[:, :number]], dim=1))
                for number, row in enumerate(logits)
            ]
            scores = torch.cat(rows)
        choose = self._sampled if self.sampled else self._best
        tokens, agreed = choose(scores, guessed[0], guess.distributions)
        count, *numbers = torch.cat([agreed[None] + 1, tokens]).tolist()
        return tokens[:count], numbers[:count], scores[:count]

    def _best(self, scores: Tensor, guessed: Tensor, _) -> tuple[Tensor, Tensor]:
        best = scores.argmax(dim=-1)
        return best, run_of(best[:-1] == guessed)

    def _sampled(
        self, scores: Tensor, guessed: Tensor, distributions: list
    ) -> tuple[Tensor, Tensor]:
        """A guess d, drawn from q, stays with probability min(1, p(d) / q(d)); the first that does
        not is replaced by a draw from what p has more than q. So every token has distribution p."""
        p = scores.softmax(dim=-1)
        q = torch.cat([p[:0], *distributions])
        at = guessed[:, None]
        ratio = p[:-1].gather(1, at)[:, 0] / q.gather(1, at)[:, 0]
        agreed = run_of(torch.rand_like(ratio) < ratio)
        here = agreed[None]  # as an index of one place: a number would have to be waited for
        more, own = (p - F.pad(q, (0, 0, 0, 1)))[here].clamp(min=0), p[here]
        more = torch.where(more.sum() > 0, more, own)  # p = q up to rounding
        drawn = torch.multinomial(more, 1)[0]
        tokens = F.pad(guessed, (0, 1)).scatter(0, here, drawn)
        return tokens, agreed

    def _scores(self, logits: Tensor, ids: Tensor) -> Tensor:
        for rule in self.rules:
            logits = rule(ids, logits)
        return logits


def run_of(flags: Tensor) -> Tensor:
    """How many flags (n,) are True before the first that is not."""
    return flags.long().cumprod(dim=0).sum()
