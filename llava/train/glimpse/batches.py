"""GlimpsePrune: questions with boxes as batches of ids, pixels, and masks on the grid of tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX
from llava.front_end import FrontEnd
from llava.image_io import image_size, load_image
from llava.model.inputs import Picture
from llava.pruning.cells import boxes_to_cells

from ..labels import preprocess
from .data import BoxSample

logger = logging.getLogger(__name__)

FRAMES = ("seen", "released")


def check_frame(frame: str) -> None:
    """Raises ValueError for a name that is not in `FRAMES`."""
    if frame not in FRAMES:
        raise ValueError(f"box_frame {frame!r} is unknown, choose from {', '.join(FRAMES)}")


def box_mask(
    boxes: Sequence[Sequence[float]] | None,
    size: tuple[int, int],
    grid: tuple[int, int],
    mode: str | None,
    frame: str = "seen",
) -> Tensor:
    """(h, w) True on the tokens that boxes in pixels of a picture of `size` cover.

    mode:  what the tower sees: "whole" (the picture as it is), "pad" (padded to a square), or else
           the middle square
    frame: "seen": boxes are placed where the tower sees them; "released": as shares of the picture
           itself, which is what the published LLaVA weights were trained with
    """
    if boxes is None:
        return torch.ones(grid, dtype=torch.bool)
    check_frame(frame)
    width, height = size
    if frame == "released" or mode == "whole":
        left, top, across, down = 0, 0, width, height
    else:
        side = max(size) if mode == "pad" else min(size)
        left, top, across, down = -((side - width) // 2), -((side - height) // 2), side, side
    shares = []
    for x1, y1, x2, y2 in boxes:
        box = ((x1 - left) / across, (y1 - top) / down, (x2 - left) / across, (y2 - top) / down)
        if box[2] >= 0 and box[3] >= 0 and box[0] < 1 and box[1] < 1:
            shares.append([min(max(edge, 0.0), 1.0) for edge in box])
    return boxes_to_cells(shares, grid)


@dataclass(frozen=True)
class LengthLimits:
    """Samples beyond them are left out; None: no limit.

    max_input_seq_length:        tokens of a prompt, those of the image included
    max_input_remain_seq_length: the same without the visual tokens outside of the boxes
    """

    max_input_seq_length: int | None = None
    max_input_remain_seq_length: int | None = None

    def exceeded(self, text: int, mask: Tensor) -> str | None:
        """The limit that a prompt of `text` tokens around an image of this mask is beyond."""
        lengths = {
            "max_input_seq_length": text + mask.numel(),
            "max_input_remain_seq_length": text + int(mask.sum()),
        }
        over = (name for name, n in lengths.items() if n > (getattr(self, name) or n))
        return next(over, None)

    @property
    def any(self) -> bool:
        return self != LengthLimits()


@dataclass(frozen=True)
class ModelFacts:
    """What a `FrontEnd` and the masks ask of a model; processes that load data get no more of it.

    grid: (h, w) tokens of every image; None: every image has a grid of its own
    """

    config: object
    image_settings: object
    grid: tuple[int, int] | None

    @classmethod
    def of(cls, model) -> ModelFacts:
        return cls(model.config, model.image_settings, model.get_vision_tower().grid)


class BoxDataset(Dataset):
    """Samples as the training step takes them.

    front: of the checkpoint; its `model` may be `ModelFacts`
    frame: as in `box_mask`
    An item: `prompt`, `answer` and `labels` (ids, cut in front of the first supervised one),
    `image` (pixels of one picture) and `mask` (h, w).
    """

    def __init__(self, samples: list[BoxSample], front: FrontEnd, frame: str = "seen"):
        check_frame(frame)
        self.samples, self.front, self.frame = samples, front, frame
        self.grid = front.model.grid

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        sample = self.samples[i]
        picture, mask = self.seen(sample)
        return self.texts(sample) | {"image": picture.pixels, "mask": mask}

    def seen(self, sample: BoxSample) -> tuple[Picture, Tensor]:
        """The picture of a sample as the model takes it, and (h, w) True on the tokens in its
        boxes."""
        image = load_image(sample.path, as_stored=True)  # as the boxes were drawn on it
        try:
            picture = self.front.picture(image)
        except ValueError as error:
            raise ValueError(f"{sample.path}: {error}") from error
        grid = self.grid or tuple(picture.pixels.shape[:2])
        return picture, self.mask(sample, image.size, grid)

    def texts(self, sample: BoxSample) -> dict[str, Tensor]:
        """`prompt`, `answer` and `labels` of a sample; all of an answer is learned, and what ends
        its turn, a line break included."""
        messages = [
            {"from": "human", "value": self.front.marked(sample.question, num_images=1)},
            {"from": "gpt", "value": sample.answer},
        ]
        conversation = self.front.conversation()
        item = preprocess(messages, self.front.tokenizer, conversation, has_image=True)
        supervised = (item["labels"] != IGNORE_INDEX).nonzero()
        if not len(supervised):
            raise ValueError(f"the answer {sample.answer!r} to {sample.path} has no tokens")
        first = int(supervised[0])
        return {
            "prompt": item["input_ids"][:first],
            "answer": item["input_ids"][first:],
            "labels": item["input_ids"][first:].clone(),
        }

    def mask(self, sample: BoxSample, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """(h, w) True on the tokens in the boxes of a sample; size: (width, height) as stored."""
        ratio = self.front.model.image_settings.image_aspect_ratio
        mode = "whole" if self.grid is None else ratio
        boxes = sample.boxes
        if boxes is not None and sample.size is not None:
            across, down = (here / there for here, there in zip(size, sample.size, strict=True))
            boxes = [[x * across, y * down, z * across, w * down] for x, y, z, w in boxes]
        return box_mask(boxes, size, grid, mode, self.frame)

    def keep_within(self, limits: LengthLimits) -> None:
        """Leaves out, with a warning that counts them, samples beyond the limits, and pictures that
        cannot be opened or have no place on a grid. Opens the heads of all pictures.

        Raises ValueError when no sample is left.
        """
        kept, left_out = [], {}
        for sample in self.samples:
            if why := self._beyond(sample, limits):
                left_out.setdefault(why, []).append(sample.path)
            else:
                kept.append(sample)
        for why, paths in left_out.items():
            counts = len(paths), len(self.samples)
            logger.warning("%d of %d samples are left out: %s, %s for one", *counts, why, paths[0])
        if not kept:
            raise ValueError(f"no sample is left: {'; '.join(left_out)}")
        self.samples = kept

    def _beyond(self, sample: BoxSample, limits: LengthLimits) -> str | None:
        """Why a sample cannot be used."""
        try:
            size = image_size(sample.path)
        except (OSError, ValueError):
            return "their picture cannot be opened"
        try:
            grid = self.grid or self.front.image_processor.grid(size)
        except ValueError:
            return "their picture is too small or too thin for this model"
        if not limits.any:
            return None
        text = len(self.texts(sample)["prompt"]) - 1  # the mark is no token
        name = limits.exceeded(text, self.mask(sample, size, grid))
        return name and f"{name} {getattr(limits, name)} is exceeded"


@dataclass
class BoxCollator:
    """Prompts padded on the left, answers on the right; names as `GlimpseObjective` takes them.

    `images` are stacked where their shapes are equal, else a list; `masks` are a list.
    """

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor | list[Tensor]]:
        prompts = [item["prompt"].flip(0) for item in items]
        answers = [item["answer"] for item in items]
        images = [item["image"] for item in items]
        same = len({image.shape for image in images}) == 1
        return {
            "input_ids": pad_sequence(prompts, True, self.pad_token_id).flip(1),
            "attention_mask": _marks(prompts).flip(1),
            "answer_ids": pad_sequence(answers, True, self.pad_token_id),
            "answer_mask": _marks(answers),
            "labels": pad_sequence([item["labels"] for item in items], True, IGNORE_INDEX),
            "images": torch.stack(images) if same else images,
            "masks": [item["mask"] for item in items],
        }


def _marks(rows: Sequence[Tensor]) -> Tensor:
    """(B, L) True on what is not padding behind the rows."""
    return pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], True, False)
