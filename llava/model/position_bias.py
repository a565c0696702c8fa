"""A bias of attention by where tokens stand, as the layers need it: for a prompt at once, and for
the tokens of an answer as they come. What it is a method says, see `llava.pruning.position_bias`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..pruning.ops import gather_tokens
from ..pruning.position_bias import PositionBias


def between(
    function: PositionBias, queries: Tensor, keys: Tensor, asking: Tensor | None = None
) -> Tensor:
    """(B, Q, K) fp32 what queries add to their products with keys, from the `Rotary.directions` of
    both, (B, Q, d) and (B, K, d). asking: (B, Q) or (B, 1) False on queries that add nothing."""
    bias = function(queries @ keys.transpose(1, 2))
    return bias if asking is None else bias * asking[..., None]


def joined(of_keys: Tensor | None, of_pairs: Tensor | None) -> Tensor | None:
    """The bias of attention that is the sum of one of keys (B, K) and one of pairs (B, Q, K), of
    which each may be missing; (B, K) where there is none of pairs."""
    if of_pairs is None or of_keys is None:
        return of_keys if of_pairs is None else of_pairs
    return of_pairs + of_keys[:, None]


@dataclass
class Directions:
    """Where the tokens of a cache stand, for a bias that tokens of the answer look at them with.

    function: the bias
    known:    (B, m, d) fp32 `Rotary.directions` of the first m places
    asking:   (B, 1) False in rows without the bias; None: all have it
    """

    function: PositionBias
    known: Tensor
    asking: Tensor | None = None

    def at(self, order: Tensor) -> Directions:
        """Of the tokens at `order` (B, n) alone."""
        return replace(self, known=gather_tokens(self.known, order))

    def rows(self, rows: Tensor) -> Directions:
        """The rows at `rows` (B,) of the batch."""
        asking = None if self.asking is None else self.asking.index_select(0, rows)
        return replace(self, known=self.known.index_select(0, rows), asking=asking)
