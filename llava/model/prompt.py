"""Prompts as embeddings: text pieces and image tokens in one sequence per sample."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..constants import IGNORE_INDEX
from ..pruning.tokens import ImageTokens

PIECES = ("x", "labels", "place", "visual", "patch", "tags", "context")


@dataclass
class Prompt:
    """Embedded prompts of a batch, padded to the longest.

    inputs_embeds:  (B, S, D), zeros on padding
    attention_mask: (B, S) True on tokens
    position_ids:   (B, S) positions seen by RoPE, 0 on padding
    labels:         (B, S) or None
    visual_index:   (B, S) which image of the row a token belongs to, -1 on text and padding
    patch_index:    (B, S) crop * N + patch, -1 where there is none
    token_tags:     (B, S) marks of the pruning method, 0 where there is none; None: it left none
    token_context:  (B, S, E) values of the pruning method, likewise
    num_positions:  positions of the longest prompt, see `llava.model.context`; None: not known
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    visual_index: Tensor
    patch_index: Tensor
    token_tags: Tensor | None = None
    token_context: Tensor | None = None
    num_positions: int | None = None

    def part(self, row: int, columns: slice) -> Prompt:
        """The tokens at `columns` of one row, as a batch of one."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        tensors = {k: v[row : row + 1, columns] for k, v in values if isinstance(v, Tensor)}
        return Prompt(**{"labels": None, **tensors})


def build_row(
    embeds: Tensor,
    labels: Tensor,
    marks: list[int],
    images: list[ImageTokens],
    policy: str,
    max_length: int | None,
    context_width: int = 0,
) -> dict[str, Tensor]:
    """One sample: text `embeds` (L, D) with images in place of the tokens at `marks`.

    policy: "sequence" counts positions through; "grid" gives visual tokens the place they have in
    the unpruned image, and the text after it the place it had. The result is cut to `max_length`.
    context_width: E of `ImageTokens.context`, 0 where the images of the batch have none.
    """
    pieces: dict[str, list[Tensor]] = {key: [] for key in PIECES}
    start = place = 0
    stops = [*marks, embeds.shape[0]]
    for number, stop in enumerate(stops):
        count = stop - start
        nothing = labels.new_full((count,), -1)
        pieces["x"].append(embeds[start:stop])
        pieces["labels"].append(labels[start:stop])
        pieces["place"].append(torch.arange(place, place + count, device=labels.device))
        pieces["visual"].append(nothing)
        pieces["patch"].append(nothing)
        pieces["tags"].append(torch.zeros_like(nothing))
        pieces["context"].append(embeds.new_zeros(count, context_width))
        start, place = stop + 1, place + count
        if number == len(marks):
            break
        image = images[number]
        tokens = len(image.patches)
        pieces["x"].append(image.embeds.to(embeds.dtype))
        pieces["labels"].append(labels.new_full((tokens,), IGNORE_INDEX))
        pieces["place"].append(image.offsets + place)
        pieces["visual"].append(labels.new_full((tokens,), number))
        pieces["patch"].append(image.patches)
        tags = torch.zeros_like(image.patches) if image.tags is None else image.tags
        pieces["tags"].append(tags)
        blank = embeds.new_zeros(tokens, context_width)
        pieces["context"].append(blank if image.context is None else image.context.to(embeds.dtype))
        place += image.length
    row = {key: torch.cat(parts)[:max_length] for key, parts in pieces.items()}
    if policy == "sequence":
        row["place"] = torch.arange(len(row["labels"]), device=labels.device)
    return row


def pad_rows(rows: list[dict[str, Tensor]], side: str, tagged: bool = False) -> Prompt:
    """A batch of rows of `build_row`, padded on `side` ("left" or "right"); with `tagged` the
    marks of the pruning method come along."""
    longest = max(len(row["labels"]) for row in rows)

    def pad(key: str, fill: int) -> Tensor:
        parts = []
        for row in rows:
            missing = longest - len(row[key])
            filler = row[key].new_full((missing, *row[key].shape[1:]), fill)
            parts.append(torch.cat([filler, row[key]] if side == "left" else [row[key], filler]))
        return torch.stack(parts)

    for row in rows:
        row["mask"] = torch.ones_like(row["labels"], dtype=torch.bool)
    return Prompt(
        inputs_embeds=pad("x", 0),
        attention_mask=pad("mask", 0),
        position_ids=pad("place", 0),
        labels=pad("labels", IGNORE_INDEX),
        visual_index=pad("visual", -1),
        patch_index=pad("patch", -1),
        token_tags=pad("tags", 0) if tagged else None,
        token_context=pad("context", 0) if rows[0]["context"].shape[1] else None,
    )
