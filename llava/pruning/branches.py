"""Tokens that stand behind a prompt as the nodes of a tree, not one behind the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Branches:
    """What attention and RoPE have to know of q new tokens that are nodes of a tree.

    depths:  (r,) how far the last r tokens, which end with these q and may hold nodes that came
             before, are from the root of the tree, whose own depth is 0
    visible: (q, r) True where a token sees one of those r: its ancestors and itself. All tokens
             before those r are seen by all
    root:    position of the root, counted from the first token of the answer; -1: it is the last
             token of the prompt
    deepest: the largest of `depths`
    """

    depths: Tensor
    visible: Tensor
    root: int
    deepest: int

    def __len__(self) -> int:
        return len(self.visible)
