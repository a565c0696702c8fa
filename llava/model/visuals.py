"""Which tokens of prompts belong to images: what the splice knows and the decoder is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..pruning.counts import TokenCounts
from ..pruning.ops import on_device
from ..pruning.per_token import each, with_zeros
from ..pruning.position_bias import PositionBias


@dataclass
class Visuals:
    """The tokens of a batch of prompts (B, S) that belong to images, and what is known of them.

    visual_index:  (B, S) which image of the row a token belongs to, -1 on text and padding
    patch_index:   (B, S) crop * N + patch, -1 where there is none
    extras:        name -> (B, S, ...) values of the pruning method, see `Prefill`
    image_extras:  name -> its numbers for the images of every row, likewise
    counts:        how many tokens there are; None: not known, and none are visual
    position_bias: that of the images of every row, None where they have none; None: no row has one
    answered:      tokens at the end of every row that belong to the answer
    """

    visual_index: Tensor
    patch_index: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    image_extras: dict[str, list[list[int | float]]] = field(default_factory=dict)
    counts: TokenCounts | None = None
    position_bias: list[PositionBias | None] | None = None
    answered: int = 0

    @classmethod
    def none(cls, like: Tensor) -> Visuals:
        """Of prompts that hold text alone; like: (B, S) or (B, S, ...), of any kind."""
        nowhere = torch.full(like.shape[:2], -1, dtype=torch.long, device=like.device)
        return cls(nowhere, nowhere)

    @property
    def there(self) -> bool:
        """Whether there are visual tokens."""
        return self.counts is not None and any(self.counts.visual)

    def repeated(self, times: int) -> Visuals:
        """Every row so many times in a row, as beams are."""
        return self.rows([row for row in range(len(self.visual_index)) for _ in range(times)])

    def rows(self, rows: list[int]) -> Visuals:
        """These rows, in this order; one may come several times."""
        index = on_device(rows, self.visual_index.device)
        return replace(
            self,
            visual_index=self.visual_index[index],
            patch_index=self.patch_index[index],
            extras=each(self.extras, lambda x, _: x[index]),
            image_extras={k: [own[row] for row in rows] for k, own in self.image_extras.items()},
            counts=None if self.counts is None else self.counts.rows(rows),
            position_bias=self.position_bias and [self.position_bias[row] for row in rows],
        )

    def row(self, row: int, columns: slice | Tensor) -> Visuals:
        """The tokens at `columns` of one row, as a batch of one; `counts` are those of the row."""
        return replace(
            self,
            visual_index=self.visual_index[row][columns][None],
            patch_index=self.patch_index[row][columns][None],
            extras={name: own[row][columns][None] for name, own in self.extras.items()},
            image_extras={name: own[row : row + 1] for name, own in self.image_extras.items()},
            counts=None if self.counts is None else self.counts.rows([row]),
            position_bias=self.position_bias and self.position_bias[row : row + 1],
        )

    def with_text(self, count: int) -> Visuals:
        """With `count` tokens of text more behind every row."""
        nowhere = self.visual_index.new_full((len(self.visual_index), count), -1)
        return replace(
            self,
            visual_index=torch.cat([self.visual_index, nowhere], dim=1),
            patch_index=torch.cat([self.patch_index, nowhere], dim=1),
            extras=each(self.extras, with_zeros(count)),
            counts=None if self.counts is None else self.counts.with_text(count),
            answered=self.answered + count,
        )

    def shared_bias(self) -> tuple[PositionBias | None, Tensor | None]:
        """(the bias by position of these prompts, None where there is none; (B, S) True on tokens
        that look at others with it, None where all do)."""
        rows = self.position_bias or []
        function = next((own for own in rows if own is not None), None)
        if other := [own for own in rows if own not in (None, function)]:
            raise ValueError(
                f"prompts of one batch ask for different biases: {function} and {other[0]}"
            )
        if function is None or (function.answers and None not in rows):
            return function, None
        have = [own is not None for own in rows]
        asking = on_device(have, self.visual_index.device, torch.bool)[:, None]
        batch, size = self.visual_index.shape
        if function.answers or not self.answered:
            return function, asking.expand(batch, size)
        prompt = torch.arange(size, device=asking.device) < size - self.answered
        return function, asking & prompt
