"""What a method adds to attention for where two tokens stand, beside what belongs to a token alone
(the extra "key_bias").

An image that wants it carries one, `ImageTokens.position_bias`; it then holds in all decoder layers
for every token of its prompt, text included. Whoever runs the layers knows how positions turn
queries and keys, and asks with that alone, so that it works for any rotation and number of axes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PositionBias:
    """
    answers: whether tokens of the answer look at others with it; False: those of the prompt alone
    """

    answers: bool = True

    def __call__(self, closeness: Tensor) -> Tensor:
        """What is added to the products of queries and keys before the softmax, fp32 of the shape
        of `closeness`: the mean of cos(angle) over the angles by which the positions of a query and
        a key are turned apart, 1 where they are the same."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__()")
