"""How tokens follow from logits when guesses are verified: greedy, or sampled without bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from .lockstep import Numbers, Work, alone
from .token_tree import TokenTree

#: processors that take any text, also one that can be no answer, and forbid all tokens of none
TAKE_ANY_TEXT = (
    RepetitionPenaltyLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)


@dataclass
class Walk:
    """The way a step takes through a tree of guesses.

    tokens:   (n,) that the answer grows by: the guesses on the way, and one token of the decoder's
    nodes:    (n,) behind which they were chosen, from the root, 0, on
    scores:   (n, V) from which they were
    numbers:  `tokens` on the host
    accepted: `nodes` on the host, without the root
    """

    tokens: Tensor
    nodes: Tensor
    scores: Tensor
    numbers: list[int]
    accepted: list[int]


class Noise:
    """What decides the draws of the answers of a batch, place by place: that of `torch.multinomial`
    for all of them at once, so that after one seed the tokens are those of sampling one by one.

    rows: answers of the batch
    """

    def __init__(self, rows: int = 1):
        self.places: list[float] = [0] * rows  # how long each answer is
        self.first = 0  # the place of the first of `drawn`
        self.drawn: list[Tensor] = []  # (B, V) each

    def ahead(self, row: int, count: int, like: Tensor) -> Tensor:
        """(1, V) of the token that is `count` of them ahead of an answer's next one.

        like: (1, V) probabilities of tokens
        """
        place = int(self.places[row]) + count - self.first
        while len(self.drawn) <= place:
            shape = len(self.places), like.shape[1]
            self.drawn.append(like.new_empty(shape).exponential_())
        return self.drawn[place][row : row + 1]

    def forget(self, row: int, count: float = float("inf")) -> None:
        """`count` more tokens of an answer are chosen; by default it has ended."""
        self.places[row] += count
        if (shortest := min(self.places)) < float("inf"):
            del self.drawn[: int(shortest) - self.first]
            self.first = int(shortest)


class TokenChoice:
    """The rule by which one answer continues.

    processors: what changes scores (repetition penalty, forbidden tokens, ...)
    warpers:    what shapes the distribution when tokens are sampled (temperature, top-p, ...);
                None: the best token is taken
    ids:        (1, n) what the answer starts behind, as processors want to see it
    ends:       tokens that end an answer
    noise, row: of sampling with trees of guesses, where the answer is a row of a batch
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        warpers: LogitsProcessorList | None,
        ids: Tensor,
        ends: list[int],
        noise: Noise | None = None,
        row: int = 0,
    ):
        self.rules = [*processors, *(warpers or [])]
        self.sampled = warpers is not None
        # Whether there are rules that may know what an answer can be, and fail at anything else.
        self.look_back = any(type(rule) not in TAKE_ANY_TEXT for rule in processors)
        self.ids = ids
        self.ends = set(ends)
        self.noise, self.row = noise or Noise(), row

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
            # Some rules write into what they are given.
            scores = self._scores(logits.clone(), torch.cat([self.ids, *before], dim=1))
        distribution = None
        if self.sampled:
            distribution = scores.softmax(dim=-1)
            token = torch.multinomial(distribution, 1)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        return token, logits.softmax(dim=-1).gather(1, token)[0], distribution

    def on_host(self, token: Tensor, probability: Tensor) -> tuple[int, float]:
        """A token (1, 1) and its probability (1,) as numbers; waits for the device."""
        if token.is_cpu:
            return int(token), float(probability)
        # One transfer for both; float32 holds every id below 2 ** 24 exactly.
        number, sure = torch.cat([token[0].float(), probability]).tolist()
        return int(number), sure

    def stops(self, number: int, sure: float, least: float) -> tuple[bool, bool]:
        """Whether guessing ends with a token of this probability, and whether the answer would."""
        ends = number in self.ends
        return sure < least or ends, ends

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
                for number, row in enumerate(logits[:-1] if guess.ended else logits)
            ]
            scores = torch.cat([*rows, logits[len(rows) :]])  # behind an end there are no rules
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

    # --- trees --------------------------------------------------------------------------------

    def walk(self, logits: Tensor, tree: TokenTree, most: int | None = None) -> Walk:
        """From the root of a tree along the tokens of the decoder, as far as guesses go.

        logits: (N + 1, V) of the decoder behind the root and behind every node
        most:   tokens that the answer may grow by, at least 1; None: any number. Where no rule
                asks, there may be more of them
        Every token is what the decoder chooses, or draws, behind those before it, whatever was
        guessed. Waits for the device once; with processors, but for those that `TAKE_ANY_TEXT`,
        once for each token.
        """
        return alone(self.walking(logits, tree, most))

    def walking(self, logits: Tensor, tree: TokenTree, most: int | None = None) -> Work[Walk]:
        """`walk`, for several answers at once."""
        if self.rules or self.sampled:
            tokens, nodes, count, scores = yield from self._walk_by_rules(logits, tree, most)
        else:
            tokens, nodes, count = self._walk_greedily(logits, tree)
            scores = logits.index_select(0, nodes)
        count, *numbers = yield Numbers(torch.cat([count[None] + 1, tokens, nodes]))
        accepted = numbers[len(tokens) + 1 : len(tokens) + count]
        self.noise.forget(self.row, count)
        return Walk(tokens[:count], nodes[:count], scores[:count], numbers[:count], accepted)

    def _walk_greedily(self, logits: Tensor, tree: TokenTree) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens (d + 1,) chosen level by level, the node (d + 1,) that each was chosen behind,
        how many guesses were accepted); what comes after those means nothing.

        A node is on the way if it and all above it are what the decoder chose behind their parents;
        nodes with one parent hold different tokens, so a level has at most one of them.
        """
        best = self._best_behind(logits, tree)
        wrong = best[tree.parents] != tree.tokens
        good = ~(tree.lineage[1:, 1:] & wrong).any(dim=1)
        numbers = torch.arange(1, len(tree) + 1, device=good.device)
        beyond = tree.deepest + 1
        path = torch.zeros(beyond + 1, dtype=torch.long, device=good.device)
        path = path.scatter(0, tree.depths.masked_fill(~good, beyond), numbers)
        path = path[:beyond]
        return best[path], path, good.sum()

    def _walk_by_rules(
        self, logits: Tensor, tree: TokenTree, most: int | None
    ) -> Work[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Likewise, and the scores (d + 1, V): level by level, since rules want to see the answer
        as it is before each token. Processors see nothing but that, unless they `TAKE_ANY_TEXT`:
        those that allow a few answers alone may know no other text, and none behind an end."""
        ids, node = self.ids, self.ids.new_zeros(1)
        alive, count = torch.ones_like(node), self.ids.new_zeros(())
        numbers = torch.arange(1, len(tree) + 1, device=node.device)
        chosen, path, scores = [], [], []
        for level in range(min(tree.deepest + 1, most or tree.deepest + 1)):
            scores.append(self._scores(logits.index_select(0, node), ids))
            chosen.append(self._draw(scores[-1], level) if self.sampled else scores[-1].argmax(-1))
            path.append(node)
            ids = torch.cat([ids, chosen[-1][None]], dim=1)
            follows = (tree.parents == node) & (tree.tokens == chosen[-1])
            alive = alive * follows.any()
            count = count + alive[0]
            node = (numbers * follows).sum(dim=0, keepdim=True)
            if self.look_back:
                token, place = yield Numbers(torch.cat([chosen[-1], node]))
                if token in self.ends or not place:
                    break
        count = count.clamp(max=len(path) - 1)
        return torch.cat(chosen), torch.cat(path), count, torch.cat(scores)

    def _best_behind(self, logits: Tensor, tree: TokenTree) -> Tensor:
        """(N + 1,) the decoder's token behind every node."""
        return logits.argmax(dim=-1)

    def _draw(self, scores: Tensor, ahead: int) -> Tensor:
        """(1,) drawn from scores (1, V) for the token that is `ahead` of the next one, by the noise
        that belongs to its place in the answer."""
        p = scores.softmax(dim=-1)
        return (p / self.noise.ahead(self.row, ahead, p)).argmax(dim=-1)

    def _scores(self, logits: Tensor, ids: Tensor) -> Tensor:
        for rule in self.rules:
            logits = rule(ids, logits)
        return logits


def run_of(flags: Tensor) -> Tensor:
    """How many flags (n,) are True before the first that is not."""
    return flags.long().cumprod(dim=0).sum()
