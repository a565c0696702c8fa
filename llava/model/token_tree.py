"""Trees of guessed tokens: how they grow, and who in them sees whom.

A tree grows level by level: of the followers that the drafter gives to a level's nodes the most
probable are looked at further. Of all candidates those whose path is most probable are kept. All of
it happens on the device, in fp32, and of equal scores the older candidate comes first, so that no
node is kept without those above it. Which of a node's equally probable followers become candidates,
and in which order, is the device's choice (to sort a vocabulary takes far longer): trees may differ
there, answers do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class TokenTree:
    """N guesses, nodes 1 to N, that follow a root, node 0, which is known.

    tokens:  (N,)
    parents: (N,) the node each of them follows, one with a lower number
    depths:  (N,) how far each is from the root, ascending
    scores:  (N,) fp32 log-probability that the drafter gives to the path from the root to each
    deepest: the most levels that the tree may have
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    deepest: int

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lineage(self) -> Tensor:
        """(N + 1, N + 1) True where a node is another one's ancestor or itself: [node, ancestor].

        Reaches twice as far up with every round.
        """
        parents = torch.cat([self.parents.new_zeros(1), self.parents])
        above = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
        above[:, 0] = True
        reached = 1
        while reached < self.deepest:
            above = above | above[parents]
            parents = parents[parents]
            reached *= 2
        return above


class Growth:
    """A tree while it grows; candidates are numbered from 1 in the order they come, 0 is the root.

    width: followers of a node that become candidates, and nodes of a level that are followed
    like:  a tensor on the device where the tree is
    """

    def __init__(self, width: int, like: Tensor):
        self.width, self.levels = width, 0
        self.count = 0  # candidates before those of the newest level
        self.tokens: list[Tensor] = []  # per level (c,)
        self.parents: list[Tensor] = []
        self.scores: list[Tensor] = []
        # The nodes that are followed next: number and score (e,), and the rows that each sees among
        # those of all nodes that were followed.
        self.followed = torch.zeros(1, dtype=torch.long, device=like.device)
        self.reached = torch.zeros(1, device=like.device)
        self.visible = torch.zeros(1, 0, dtype=torch.bool, device=like.device)
        self.depths = self.followed[:0]

    def add(self, logits: Tensor) -> None:
        """A level of candidates, from the logits (e, V) behind the nodes that are followed."""
        self.count += self.tokens[-1].numel() if self.tokens else 0
        self.levels += 1
        best, tokens = logits.log_softmax(dim=-1).topk(min(self.width, logits.shape[1]), dim=-1)
        self.tokens.append(tokens.flatten())
        self.scores.append((self.reached[:, None] + best).flatten())
        self.parents.append(self.followed[:, None].expand_as(tokens).flatten())

    def follow(self) -> Tensor:
        """The tokens (e,) of the newest level that are followed; `depths` and `visible` are then
        those of `Branches` for their rows behind those of earlier levels."""
        scores, order = self.scores[-1].sort(descending=True, stable=True)
        order = order[: self.width]
        siblings = len(self.scores[-1]) // len(self.followed)
        own = torch.eye(len(order), dtype=torch.bool, device=order.device)
        self.visible = torch.cat([self.visible[order // siblings], own], dim=1)
        self.followed, self.reached = order + (self.count + 1), scores[: self.width]
        self.depths = torch.cat([self.depths, order.new_full(order.shape, self.levels)])
        return self.tokens[-1][order]

    def tree(self, most: int) -> TokenTree:
        """The `most` candidates with the best scores, in the order they came."""
        tokens, parents, scores = (
            torch.cat(own) for own in (self.tokens, self.parents, self.scores)
        )
        depths = torch.cat(
            [own.new_full(own.shape, level) for level, own in enumerate(self.parents, start=1)]
        )
        kept = scores.argsort(descending=True, stable=True)[:most].sort().values
        number = torch.arange(1, len(kept) + 1, device=kept.device)
        node = torch.zeros(len(tokens) + 1, dtype=torch.long, device=kept.device)
        node = node.scatter(0, kept + 1, number)
        return TokenTree(tokens[kept], node[parents[kept]], depths[kept], scores[kept], self.levels)


def on_host(trees: list[TokenTree]) -> list[TokenTree]:
    """The same in the memory of the host; waits for the device twice."""
    if not trees:
        return []
    whole = [torch.stack([tree.tokens, tree.parents, tree.depths]) for tree in trees]
    sizes = [len(tree) for tree in trees]
    whole = torch.cat(whole, dim=1).cpu().split(sizes, dim=1)
    scores = torch.cat([tree.scores for tree in trees]).cpu().split(sizes)
    return [
        replace(tree, tokens=own[0], parents=own[1], depths=own[2], scores=score)
        for tree, own, score in zip(trees, whole, scores, strict=True)
    ]
