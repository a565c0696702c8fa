"""How many tokens there are, as numbers of the host, so that nobody has to ask the device.

A number is known for as long as the tensors that it is about are the very same objects, and nobody
wrote into them: whoever changes one of them need not know of the numbers, they are then asked for
anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

#: stands for padding where -1 stands for text
PADDING = -2

Counts = TypeVar("Counts")


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a batch of prompts, padding left out.

    text:    of every row, all that belong to no image
    visual:  of every row, all that belong to images
    images:  of every image of every row, 0 where a row has no such image; (): not known
    leading: tokens of text before the first image of every row (all of them where there is none)
    left:    whether padding stands on the left; else on the right
    """

    text: tuple[int, ...]
    visual: tuple[int, ...]
    images: tuple[tuple[int, ...], ...]
    leading: tuple[int, ...]
    left: bool = True

    @classmethod
    def of(cls, owner: Tensor, most_images: int = 1) -> TokenCounts:
        """From the image that each token belongs to, (B, S) on the host: 0, 1, ..., -1 on text,
        `PADDING`; most_images: at least so many numbers for each row."""
        rows = owner.numpy()
        most = max(most_images, int(rows.max()) + 1)
        images = tuple(tuple(int((row == n).sum()) for n in range(most)) for row in rows)
        before = [row[: (row >= 0).argmax()] if row.max() >= 0 else row for row in rows]
        return cls(
            text=tuple(int((row == -1).sum()) for row in rows),
            visual=tuple(map(sum, images)),
            images=images,
            leading=tuple(int((row == -1).sum()) for row in before),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every row."""
        return tuple(map(sum, zip(self.text, self.visual, strict=True)))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def even(self) -> bool:
        """Whether all rows have the same number of tokens."""
        return len(set(self.lengths)) == 1

    @property
    def behind(self) -> tuple[int, ...]:
        """Tokens of text behind the first image of every row, 0 where there is none."""
        return tuple(all - before for all, before in zip(self.text, self.leading, strict=True))

    def with_images(self, images: Sequence[Sequence[int]]) -> TokenCounts:
        """The same text with other numbers of visual tokens."""
        rows = tuple(map(tuple, images))
        return replace(self, images=rows, visual=tuple(map(sum, rows)), left=True)

    def with_visual(self, visual: Sequence[int]) -> TokenCounts:
        """Likewise, where only those of whole rows are known."""
        alone = bool(self.images) and len(self.images[0]) == 1
        images = tuple((number,) for number in visual) if alone else ()
        return replace(self, images=images, visual=tuple(visual), left=True)

    def with_text(self, count: int) -> TokenCounts:
        """With `count` tokens of text more behind every row."""
        return replace(self, text=tuple(number + count for number in self.text))

    def rows(self, numbers: Sequence[int]) -> TokenCounts:
        """Of these rows alone, in this order."""
        images: tuple[tuple[int, ...], ...] = ()
        if self.images:  # no more of them than a row has
            chosen = [self.images[n] for n in numbers]
            most = max((n for row in chosen for n, own in enumerate(row, 1) if own), default=1)
            images = tuple(row[:most] for row in chosen)
        text, visual, leading = (
            tuple(own[n] for n in numbers) for own in (self.text, self.visual, self.leading)
        )
        return TokenCounts(text, visual, images, leading, self.left)


@dataclass(frozen=True, eq=False)
class Known(Generic[Counts]):
    """What the host knows of tensors.

    about:  those tensors; where they are `counted`, what is written to them is noticed
    counts: `TokenCounts` of prompts, or the number of tokens of every crop; None: not known
    hides:  whether padding stands before tokens of its row; None: not known
    left:   whether all of it stands there; False: not known
    """

    about: tuple[Tensor | None, ...]
    counts: Counts | None = None
    hides: bool | None = None
    left: bool = False
    versions: tuple[int, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "versions", tuple(map(version, self.about)))

    def holds_for(self, *tensors: Tensor | None) -> bool:
        same = all(own is tensor for own, tensor in zip(self.about, tensors, strict=True))
        return same and self.versions == tuple(map(version, tensors))


def version(value: Tensor | None) -> int:
    """How often a tensor was written to, as far as it counts."""
    return 0 if value is None or value.is_inference() else value._version


Maybe = TypeVar("Maybe", Tensor, Tensor | None)


def counted(value: Maybe) -> Maybe:
    """The same memory as a tensor that counts writes, which those of inference mode do not; the
    tensor itself where it does."""
    if type(value) is not Tensor or not value.is_inference():
        return value
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=value.dtype, device=value.device)
        layout = value.storage_offset(), value.size(), value.stride()
        return alias.set_(value.untyped_storage(), *layout)
