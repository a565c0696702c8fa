"""Prompts as embeddings: text pieces and image tokens in one sequence per sample."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..constants import IGNORE_INDEX
from ..pruning.counts import TokenCounts
from ..pruning.ops import on_device
from ..pruning.position_bias import PositionBias
from ..pruning.tokens import GRID, PAIRS, ImageTokens
from .visuals import Visuals

PIECES = ("x", "labels", "place", "visual", "patch")


@dataclass
class Prompt:
    """Embedded prompts of a batch, padded to the longest.

    inputs_embeds:  (B, S, D), zeros on padding
    attention_mask: (B, S) True on tokens
    position_ids:   (B, S) positions seen by RoPE, 0 on padding; (B, S, A) where a family counts
                    on A axes
    labels:         (B, S) or None
    visual_index, patch_index, extras, image_extras, counts, position_bias, answered: as in
                    `Visuals`
    num_positions:  positions of the longest prompt, see `llava.model.context`; None: not known
    token_ids:      (B, S) what stands for the prompts where rules about tokens, such as a penalty
                    of repetition, look at them; None: such rules see the answer alone
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    visual_index: Tensor
    patch_index: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    image_extras: dict[str, list[list[int | float]]] = field(default_factory=dict)
    counts: TokenCounts | None = None
    position_bias: list[PositionBias | None] | None = None
    answered: int = 0
    num_positions: int | None = None
    token_ids: Tensor | None = None

    @property
    def visuals(self) -> Visuals:
        """What the decoder is told of the tokens."""
        return Visuals(**{f.name: getattr(self, f.name) for f in fields(Visuals)})

    def rows(self, rows: list[int]) -> Prompt:
        """These rows of the batch, in this order; one may come several times."""
        index, visuals = on_device(rows, self.inputs_embeds.device), self.visuals.rows(rows)
        names = ("inputs_embeds", "attention_mask", "position_ids", "labels", "token_ids")
        known = {name: own for name in names if (own := getattr(self, name)) is not None}
        own = {f.name: getattr(visuals, f.name) for f in fields(Visuals)}
        return replace(self, **own, **{name: x[index] for name, x in known.items()})


def positions_behind(positions: Tensor, count: int) -> Tensor:
    """(B, count), or (B, count, A), of the tokens of text behind prompts at `positions` (B, S), or
    (B, S, A): one further each, from the largest of a prompt on, the same on all axes."""
    last = positions.flatten(1).amax(dim=1, keepdim=True)
    behind = last + torch.arange(1, count + 1, device=positions.device)
    return behind if positions.ndim == 2 else behind[..., None].expand(-1, -1, positions.shape[2])


def build_row(
    embeds: Tensor,
    labels: Tensor,
    marks: list[int],
    images: list[ImageTokens],
    policy: str,
    max_length: int | None,
    blanks: dict[str, Tensor],
    axes: tuple[int, ...] = (),
) -> dict[str, Any]:
    """One sample: text `embeds` (L, D) with images in place of the tokens at `marks`.

    policy: "sequence" counts positions through; "grid" gives visual tokens the place they have in
    the unpruned image, and the text after it the place it had. The result is cut to `max_length`.
    blanks: extras of the images of the batch, of no tokens, see `blank_extras`.
    axes: () for one number per position, (A,) for A of them; text has the same on every axis.
    """
    pieces: dict[str, list[Tensor]] = {key: [] for key in PIECES}
    extras: dict[str, list[Tensor]] = {name: [] for name in blanks}
    start = place = 0
    stops = [*marks, embeds.shape[0]]
    for number, stop in enumerate(stops):
        count = stop - start
        nothing = labels.new_full((count,), -1)
        pieces["x"].append(embeds[start:stop])
        pieces["labels"].append(labels[start:stop])
        places = torch.arange(place, place + count, device=labels.device)
        pieces["place"].append(places[:, None].expand(-1, *axes) if axes else places)
        pieces["visual"].append(nothing)
        pieces["patch"].append(nothing)
        for name, blank in blanks.items():
            extras[name].append(zeros(blank, count))
        start, place = stop + 1, place + count
        if number == len(marks):
            break
        image = images[number]
        tokens = len(image.patches)
        pieces["x"].append(image.embeds.to(embeds.dtype))
        pieces["labels"].append(labels.new_full((tokens,), IGNORE_INDEX))
        own = image.offsets if image.positions is None else image.positions
        pieces["place"].append(own + place)
        pieces["visual"].append(labels.new_full((tokens,), number))
        pieces["patch"].append(image.patches)
        for name, blank in blanks.items():
            values = image.extras.get(name)
            extras[name].append(zeros(blank, tokens) if values is None else values)
        place += image.extent
    row: dict[str, Any] = {key: torch.cat(parts)[:max_length] for key, parts in pieces.items()}
    if policy == "sequence":
        row["place"] = torch.arange(len(row["labels"]), device=labels.device)
    row["extras"] = {name: torch.cat(parts)[:max_length] for name, parts in extras.items()}
    return row


def blank_extras(images: list[ImageTokens]) -> dict[str, Tensor]:
    """Name -> (0, ...): what kinds of extras the images have."""
    return {name: own[:0] for image in images for name, own in image.extras.items()}


def count_tokens(
    rows: list[list[ImageTokens]], texts: list[list[int]], limit: int | None, left: bool
) -> TokenCounts:
    """Of prompts with these images, between texts of so many tokens (one more than images), each
    cut to `limit`; left: whether they are padded on the left."""
    total, leading, images = [], [], []
    most = max(1, *map(len, rows))
    for own, text in zip(rows, texts, strict=True):
        place, before, counts = text[0], None, [0] * most
        for number, image in enumerate(own):
            end = place + len(image.patches)
            stop = end if limit is None else min(end, limit)
            counts[number] = max(0, stop - place)
            before = place if before is None and counts[number] else before
            place = end + text[number + 1]
        place = place if limit is None else min(place, limit)
        total.append(place - sum(counts))
        leading.append(place if before is None else before)
        images.append(tuple(counts))
    visual = tuple(map(sum, images))
    return TokenCounts(tuple(total), visual, tuple(images), tuple(leading), left)


def image_numbers(rows: list[list[ImageTokens]]) -> dict[str, list[list[int | float]]]:
    """Name -> the `image_extras` of the images of every row, and what `Prefill` says of all; 0
    where an image lacks what another has."""
    numbers = [
        [
            {
                **dict(zip(GRID, image.grid or (0, 0), strict=True)),
                PAIRS: image.frame_pairs,
                **image.image_extras,
            }
            for image in row
        ]
        for row in rows
    ]
    names = dict.fromkeys(name for row in numbers for image in row for name in image)
    return {name: [[image.get(name, 0) for image in row] for row in numbers] for name in names}


def position_biases(rows: list[list[ImageTokens]]) -> list[PositionBias | None] | None:
    """`Visuals.position_bias` of rows with these images."""
    found = [[image.position_bias for image in row if image.position_bias] for row in rows]
    return [own[0] if own else None for own in found] if any(found) else None


def zeros(like: Tensor, count: int) -> Tensor:
    """(count, ...) zeros of the kind of `like` (n, ...)."""
    return like.new_zeros(count, *like.shape[1:])


def pad_rows(rows: list[dict], side: str, least: int = 0) -> Prompt:
    """A batch of rows of `build_row`, padded on `side` ("left" or "right") to the longest of them,
    and to `least` tokens."""
    longest = max(least, *(len(row["labels"]) for row in rows))

    def pad(values: list[Tensor], fill: int = 0) -> Tensor:
        parts = []
        for own in values:
            filler = own.new_full((longest - len(own), *own.shape[1:]), fill)
            parts.append(torch.cat([filler, own] if side == "left" else [own, filler]))
        return torch.stack(parts)

    def padded(key: str, fill: int = 0) -> Tensor:
        return pad([row[key] for row in rows], fill)

    for row in rows:
        row["mask"] = torch.ones_like(row["labels"], dtype=torch.bool)
    return Prompt(
        inputs_embeds=padded("x"),
        attention_mask=padded("mask"),
        position_ids=padded("place"),
        labels=padded("labels", IGNORE_INDEX),
        visual_index=padded("visual", -1),
        patch_index=padded("patch", -1),
        extras={name: pad([row["extras"][name] for row in rows]) for name in rows[0]["extras"]},
    )
