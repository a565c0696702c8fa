"""Guesses that are right by chance: what guessing costs and brings, without trained weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.token_choice import TokenChoice, run_of
from llava.model.token_tree import TokenTree


class ChanceChoice(TokenChoice):
    """Greedy choice of a decoder that agrees with each guess with probability `acceptance`.

    Random weights never agree. How long a step takes depends on how many tokens are guessed and
    stay, not on which: here chance (torch's generator) says how many stay, and all the work of
    finding that out is done as well. Guessing stops at the drafter's `num_speculations` alone. Of a
    tree chance says how many levels stay.
    """

    def __init__(self, *args, acceptance: float):
        super().__init__(*args)
        self.acceptance = acceptance

    def stops(self, number: int, sure: float, least: float) -> tuple[bool, bool]:
        return False, False

    def _best(self, scores: Tensor, guessed: Tensor, _) -> tuple[Tensor, Tensor]:
        best = scores.argmax(dim=-1)
        agreed = run_of(torch.rand(guessed.shape, device=guessed.device) < self.acceptance)
        places = torch.arange(len(best), device=best.device)
        return torch.where(places < agreed, F.pad(guessed, (0, 1)), best), agreed

    def _best_behind(self, logits: Tensor, tree: TokenTree) -> Tensor:
        """Agrees with the way to the tree's last node, as far as chance says."""
        best = super()._best_behind(logits, tree)
        agreed = run_of(torch.rand(tree.deepest, device=best.device) < self.acceptance)
        way = tree.lineage[-1, 1:] & (tree.depths <= agreed)
        beyond = len(best)  # where what is not on it goes
        parents = tree.parents.masked_fill(~way, beyond)
        return F.pad(best, (0, 1)).scatter(0, parents, tree.tokens)[:beyond]
