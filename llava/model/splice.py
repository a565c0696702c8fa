"""The splice: prompts as embeddings, with the tokens of images in place of their marks."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from ..pruning.ops import on_device
from ..pruning.stages import acts_inside
from ..pruning.tokens import ImageTokens
from ..pruning.trace import PruningTrace
from .context import check_prompts, count_positions
from .model_part import ModelPart
from .patches import SPLICE, replacement, spliced_outside
from .prompt import (
    Prompt,
    blank_extras,
    build_row,
    count_tokens,
    image_numbers,
    pad_rows,
    position_biases,
)
from .pruner_slot import in_one_method


class Splice(ModelPart):
    """Mixin of models with `get_model()`, `image_tokens()` and `pruner`."""

    #: set by `trace_pruning` for the time of its block
    pruning_trace: PruningTrace | None = None
    #: whether the splice follows the rules of training: a long prompt is cut, a text-only one uses
    #: up a dummy image. None: with labels, and in training mode
    as_in_training: bool | None = None
    #: () where a position is one number, (A,) where it has A axes
    position_axes: tuple[int, ...] = ()

    @property
    def position_policy(self) -> str:
        """Where tokens of an image and the text behind them stand, as in `build_row`."""
        return self.pruner.vision.position_policy

    @property
    def outside_splice(self):
        """What another package assigned to `prepare_inputs_labels_for_multimodal`, or None."""
        return replacement(self, SPLICE, AS_IT_CAME)

    def splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images=None,
        image_sizes=None,
        questions: list[str] | None = None,
        padding_side: str | None = None,
    ) -> Prompt:
        """`build_prompt`, or what another package put in its place."""
        outside = None if images is None else self.outside_splice
        if outside is not None:
            return spliced_outside(
                outside, self.pruner, input_ids, attention_mask, labels, images, image_sizes
            )
        return self.build_prompt(
            input_ids, attention_mask, labels, images, image_sizes, questions, padding_side
        )

    @in_one_method
    def build_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | list[Tensor] | list[ImageTokens] | None = None,
        image_sizes=None,
        questions: list[str] | None = None,
        padding_side: str | None = None,
    ) -> Prompt:
        """Embeds prompts (B, L) and puts the images in place of their marks.

        Images go to the marks in order of appearance, sample after sample, and their number must
        equal the number of marks; they may also be what `image_tokens` made of them. Nothing is
        cut: a prompt longer than `max_position_embeddings` is an error, see `llava.model.context`.
        In training (see `as_in_training`) images may exceed the marks by one per text-only sample,
        which uses up a dummy, and rows are cut to `tokenizer_model_max_length`. Raises ValueError.
        In training mode dummies are encoded as well when a batch holds nothing else, and every
        parameter that images use gets a gradient: processes that train together wait for each
        other at each of them.
        """
        training = self.as_in_training
        if training is None:
            training = self.training or labels is not None
        ids, mask = on_host(input_ids, attention_mask)
        check_shapes(ids, mask)
        given, width = mask.sum(dim=1).tolist(), mask.shape[1]
        side = padding_side or self.padding_side_of(mask)
        input_ids, ids, mask, labels = self.read_prompts(input_ids, ids, mask, labels, images)
        check_ids(ids, mask, self.config.vocab_size)
        marked = (ids == IMAGE_TOKEN_INDEX) & mask
        num_images = 0 if images is None else len(images)
        slots = image_slots(marked.sum(dim=1).tolist(), num_images, training)
        # In training processes wait for each other at every part that images use.
        only_dummies = self.training and num_images > 0 and not any(slots)
        used = num_images > 0 and (any(slots) or only_dummies)
        tokens = self._tokens_of_images(images, image_sizes, questions) if used else []
        if self.pruning_trace is not None and not only_dummies:
            for image in tokens:
                self.pruning_trace.add_image(image)
        embeds = self.get_model().embed_tokens(input_ids.clamp(0, self.config.vocab_size - 1))
        if labels is None:
            labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels = labels.to(embeds.device)
        limit = getattr(self.config, "tokenizer_model_max_length", None) if training else None
        own_images, blanks = [[tokens[i] for i in own] for own in slots], blank_extras(tokens)
        rows, policy, positions, texts = [], self.position_policy, [], []
        for row, own in enumerate(own_images):
            there = mask[row].nonzero()[:, 0]
            marks = marked[row][there].nonzero()[:, 0].tolist()
            edges = [-1, *marks, len(there)]
            texts.append([stop - start - 1 for start, stop in pairwise(edges)])
            positions.append(count_positions(sum(texts[-1]), own, policy))
            keep = places(there, embeds.device)
            parts = embeds[row, keep], labels[row, keep], marks, own
            rows.append(build_row(*parts, policy, limit, blanks, self.position_axes))
        if only_dummies:  # none of their rows, yet a gradient of zeros
            rows[0]["x"] = torch.cat([rows[0]["x"], tokens[0].embeds[:0].to(rows[0]["x"])])
        if not training:
            check_prompts(self, positions)
        # Prompts in which every token has its place already keep the width that they came in.
        kept = padding_side is None and given == [len(row["labels"]) for row in rows]
        prompt = pad_rows(rows, side, width if kept else 0)
        prompt.counts = count_tokens(own_images, texts, limit, side == "left")
        prompt.image_extras = image_numbers(own_images)
        prompt.position_bias = position_biases(own_images)
        prompt.num_positions = max(positions)
        prompt.token_ids = self.ids_for_rules(prompt, ids, mask)
        return prompt

    def _tokens_of_images(self, images: Any, image_sizes, questions) -> list[ImageTokens]:
        """The tokens of all images, which may be known already."""
        known = isinstance(images[0], ImageTokens)
        tokens: list[ImageTokens]
        tokens = images if known else self.image_tokens(images, image_sizes, questions)
        newline = getattr(self.get_model(), "image_newline", None)
        if self.training and newline is not None:
            # Gradients have to come in the same order whether the images of a batch use it or not:
            # before the projector's, behind those of the embeddings.
            first = tokens[0].embeds
            tokens[0].embeds = torch.cat([first, newline[None, :][:0].to(first)])
        return tokens

    def padding_side_of(self, mask: Tensor) -> str:
        """The side, "left" or "right", that rows are padded on where the call does not say: the one
        that the config names, else the right. mask: (B, L) of the prompts as they came, on the
        host"""
        return str(getattr(self.config, "tokenizer_padding_side", None) or "right")

    def read_prompts(
        self, input_ids: Tensor, ids: Tensor, mask: Tensor, labels: Tensor | None, images
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(ids as they came, ids and mask on the host, labels) of prompts (B, L) in which every
        image has one mark; ids, mask: `on_host`. A family may take them in other forms."""
        return input_ids, ids, mask, labels

    def ids_for_rules(self, prompt: Prompt, ids: Tensor, mask: Tensor) -> Tensor | None:
        """`Prompt.token_ids`, from what `read_prompts` gave."""
        return None

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        image_sizes=None,
    ):
        """The splice in the form of LLaVA: (input_ids, position_ids, attention_mask,
        past_key_values, inputs_embeds, labels). What was None stays None, except that the mask is
        kept when rows were padded, and positions where they are not simply counted. Embeddings do
        not say where the images are: a method inside the decoder is not called for them, which a
        warning says."""
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        prompt = self.build_prompt(input_ids, attention_mask, labels, images, image_sizes)
        if attention_mask is not None:
            attention_mask = prompt.attention_mask.to(attention_mask.dtype)
        elif prompt.counts is None or not prompt.counts.even:
            attention_mask = prompt.attention_mask
        if prompt.position_bias is not None or acts_inside(self.pruner.decoder):
            warnings.warn(
                f"{self.pruner!r} acts inside the decoder, but these embeddings do not say where "
                "the images are: run on them alone, the decoder does without it. Give input_ids "
                "and images to the model or its generate",
                stacklevel=2,
            )
        counted = position_ids is None and self.position_policy == "sequence"
        return (
            None,
            None if counted else prompt.position_ids,
            attention_mask,
            past_key_values,
            prompt.inputs_embeds,
            None if labels is None else prompt.labels,
        )


#: the function that other packages replace, as it came
AS_IT_CAME = Splice.prepare_inputs_labels_for_multimodal


def on_host(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts (B, L) and where they are not padding; the device is waited for once."""
    if attention_mask is None:
        ids = input_ids.cpu()
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if input_ids.device == attention_mask.device and input_ids.shape == attention_mask.shape:
        ids, mask = torch.stack([input_ids, attention_mask.to(input_ids.dtype)]).cpu()
        return ids, mask.bool()
    return input_ids.cpu(), attention_mask.cpu().bool()


def places(index: Tensor, device: torch.device) -> Tensor | slice:
    """Ascending places (n,) as a slice where nothing lies between them, else on `device`."""
    first, last = (index[0].item(), index[-1].item()) if len(index) else (0, -1)
    if last - first + 1 == len(index):
        return slice(first, last + 1)
    return on_device(index.tolist(), device)


def check_shapes(ids: Tensor, mask: Tensor) -> None:
    """Raises ValueError unless `ids` are prompts (B, L) and `mask` is as large."""
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(
            f"input_ids must be (prompts, tokens), one token at least, not {tuple(ids.shape)}"
        )
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must have the shape of input_ids, "
            f"{tuple(ids.shape)}"
        )


def check_ids(ids: Tensor, mask: Tensor, vocabulary: int) -> None:
    """Raises ValueError unless `ids` (B, L) are tokens and image marks where `mask`, of the same
    shape, is True. Both are on the host: on a GPU an id that is no token ends everything."""
    known = (ids == IMAGE_TOKEN_INDEX) | (ids >= 0) & (ids < vocabulary)
    if odd := ids[mask & ~known].tolist():
        raise ValueError(
            f"input_ids hold {odd[0]}, which is neither a token (0 to {vocabulary - 1}) nor an "
            f"image mark ({IMAGE_TOKEN_INDEX})"
        )


def image_slots(marks: list[int], num_images: int, training: bool = True) -> list[list[int]]:
    """Which images each sample gets, from its number of marks.

    Raises ValueError unless the images match the marks, or, in training, exceed them by one per
    text-only sample.
    """
    text_only = marks.count(0)
    dummies = training and num_images == sum(marks) + text_only
    if num_images != sum(marks) and not dummies:
        rule = "write <image> into the prompts once for every image"
        if training:
            rule = f"they must match, or exceed by one for each of {text_only} text-only prompts"
        raise ValueError(
            f"{num_images} images for {sum(marks)} <image> marks in {len(marks)} prompts: {rule}"
        )
    slots, used = [], 0
    for count in marks:
        slots.append(list(range(used, used + count)))
        used += count or int(dummies)
    return slots
