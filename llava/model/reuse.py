"""What prompts share is computed once: questions about one image share everything up to its end.

`PrefixCache.generate` answers like `model.generate`. How far the work is shared follows from the
pruning method: the tokens of an image unless it reads the question (`VisionStage.reads_question`),
and the decoder layers that work the same whatever text follows (`DecoderStage.reusable_layers`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..constants import IMAGE_TOKEN_INDEX
from ..devices import device_of
from ..pruning.tokens import ImageTokens
from .generation import setting
from .inputs import Picture, generate_inputs, pad_left, stack_pixels
from .kv_cache import KVCache
from .prompt import Prompt


@dataclass
class Beginning:
    """The first tokens of a prompt after the first layers of the decoder.

    keys, values:  one (G, P, d) tensor per layer that was run
    hidden_states: (P, D) as they enter the layer after those
    key_bias:      (P,) as in `Prefill`
    """

    keys: list[Tensor]
    values: list[Tensor]
    hidden_states: Tensor
    key_bias: Tensor | None = None

    @property
    def depth(self) -> int:
        """Decoder layers that were run."""
        return len(self.keys)

    def __len__(self) -> int:
        return self.hidden_states.shape[0]


class Prefix:
    """What is known of the first `size` columns of a batch of prompts, padded on the left.

    Where all rows have the same beginning, the caches hold it once. Otherwise the rows may begin
    differently and know beginnings of different length: the columns end where the first of them is
    at its end, but a row has at least one token behind them.
    """

    def __init__(self, beginnings: list[Beginning], lengths: list[int], share: bool = True):
        """beginnings: of every row, of equal depth; lengths: tokens of every row; share: whether
        caches may hold once what rows have in common"""
        self.beginnings, self.lengths = beginnings, lengths
        self.depth = beginnings[0].depth
        unknown = [length - len(own) for own, length in zip(beginnings, lengths, strict=True)]
        tail = max(1, *unknown)
        self.size = max(lengths) - tail
        alike = all(own is beginnings[0] for own in beginnings)
        self.shared = share and alike and min(unknown) > 0
        self.counts = [max(0, length - tail) for length in lengths]  # known tokens that are used
        if self.shared:
            self.counts = [self.size] * len(lengths)

    def put(self, layer: int, cache: KVCache, batch: int) -> None:
        """Puts keys and values of a layer into its empty cache; `batch` may be a multiple of the
        rows (beams)."""
        if self.shared:
            first = self.beginnings[0]
            keys, bias = first.keys[layer], first.key_bias
            bias = None if bias is None else bias.to(keys.device)
            cache.share(layer, keys, first.values[layer], bias)
            return
        keys = self._columns([own.keys[layer] for own in self.beginnings], batch)
        values = self._columns([own.values[layer] for own in self.beginnings], batch)
        cache.append(layer, keys, values)

    def valid_in_cache(self, valid: Tensor | None) -> Tensor | None:
        """(B, n) which of the entries of a cache are tokens, from `valid` (B, S) of the prompts."""
        if valid is None or not self.shared:
            return valid
        # A row is behind its beginning as many places after its first token as that is long.
        return valid[:, : valid.shape[1] - self.size]

    def bias_in_cache(self, bias: Tensor | None) -> Tensor | None:
        """(B, n) the bias of the entries of a cache, from `bias` (B, S) of the prompts."""
        return bias[:, self.size :] if bias is not None and self.shared else bias

    def followed_by(self, tail: Tensor) -> Tensor:
        """(B, S, D) the prompts as they enter layer `depth`, of which `tail` (B, q, D) are the
        columns behind the first `size`; zeros on padding."""
        out = tail.new_zeros(tail.shape[0], self.size + tail.shape[1], tail.shape[2])
        beams = len(out) // len(self.lengths)
        for number, row in enumerate(out):
            length, count = self.lengths[number // beams], self.counts[number // beams]
            start = len(row) - length
            known = self.beginnings[number // beams].hidden_states
            row[start : start + count] = known[:count]
            row[start + count :] = tail[number, tail.shape[1] - (length - count) :]
        return out

    def _columns(self, rows: list[Tensor], batch: int) -> Tensor:
        shape = (*rows[0].shape[:-2], self.size, rows[0].shape[-1])
        out = rows[0].new_zeros(len(rows), *shape)
        for row, known, count in zip(out, rows, self.counts, strict=True):
            row[..., self.size - count :, :] = known[..., :count, :]
        return out.repeat_interleave(batch // len(rows), dim=0) if batch > len(rows) else out


class PrefixCache:
    """Remembers what the prompts of one batch began with, for those of the next one.

    A model whose weights or whose method's options change needs a new cache; another method
    assigned to the model empties it.
    """

    def __init__(self, model):
        self.model = model
        self.pruner: Any = None  # the method that what is kept was made with
        self._images: dict[tuple, ImageTokens] = {}
        self._beginnings: dict[tuple, Beginning | None] = {}  # None: seen once

    @torch.inference_mode()
    def generate(
        self, prompts: list[Tensor], pictures: list[list[Picture]], questions: list[str], **kwargs
    ) -> Tensor:
        """Returns the new tokens, as `model.generate` on the left-padded batch does.

        prompts:   ids (L,) of every prompt, with -200 where an image goes
        pictures:  those of every prompt, in order
        questions: of every prompt, for methods that read it
        The rest is as in `model.generate`.
        """
        pruner = self.model.pruner
        pruner, kwargs = pruner.published.for_call(pruner, kwargs)
        with self.model.using(pruner):
            return self._generate(prompts, pictures, questions, **kwargs)

    def _generate(self, prompts, pictures, questions, **kwargs) -> Tensor:
        if self.model.outside_splice is not None:  # it encodes images itself
            pad_id = kwargs.get("pad_token_id") or 0
            inputs = generate_inputs(self.model, prompts, pictures, questions, pad_id)
            return self.model.generate(**inputs, **kwargs)
        prompt, image_keys = self.embed(prompts, pictures, questions, kwargs.get("pad_token_id"))
        if self.model.engine is not None:  # which has caches of its own
            return self.model.generate_from(prompt, **kwargs)
        images, prefix = any(image_keys), None
        drafter = self.model.drafter_for(dict(kwargs))  # it fills caches of its own
        trace = self.model.pruning_trace
        whole = trace is not None and trace.attention_layers  # rows are over all of the prompt
        whole = whole or setting(self.model, kwargs, "output_hidden_states")  # so are these
        cached = setting(self.model, kwargs, "use_cache") is not False
        if images and drafter is None and cached and not whole:
            prefix = self._prefix(prompt, prompts, image_keys)
        return self.model.generate_from(prompt, prefix=prefix, **kwargs)

    def embed(
        self,
        prompts: list[Tensor],
        pictures: list[list[Picture]],
        questions: list[str],
        pad_id: int | None = None,
    ) -> tuple[Prompt, list[list[tuple]]]:
        """(the embedded batch, a key for every image of every prompt), with the tokens of images
        that the batch before had as they were."""
        if self.pruner is not self.model.pruner:
            self.pruner, self._images, self._beginnings = self.model.pruner, {}, {}
        keys = [
            [(picture, text if self.pruner.vision.reads_question else None) for picture in own]
            for own, text in zip(pictures, questions, strict=True)
        ]
        self._encode([key for own in keys for key in own])
        images = [self._images[key] for own in keys for key in own]
        ids, mask = pad_left(prompts, pad_id or 0)
        device = device_of(self.model.get_input_embeddings())
        prompt = self.model.build_prompt(
            ids.to(device), mask.to(device), images=images or None, padding_side="left"
        )
        return prompt, keys

    def _encode(self, keys: list[tuple]) -> None:
        """Makes `_images` hold the tokens of these images and no others."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._images]
        known = {key: self._images[key] for key in dict.fromkeys(keys) if key in self._images}
        if missing:
            texts = [text for _, text in missing]
            tokens = self.model.image_tokens(
                stack_pixels(self.model, [picture for picture, _ in missing]),
                [picture.size for picture, _ in missing],
                texts if self.pruner.vision.reads_question else None,
            )
            known |= dict(zip(missing, tokens, strict=True))
        self._images = known

    def _prefix(self, prompt, prompts: list[Tensor], image_keys: list[list]) -> Prefix | None:
        """The beginnings of the rows, up to their last image; None where that saves nothing."""
        size = prompt.visual_index.shape[1]
        places = torch.arange(1, size + 1, device=prompt.visual_index.device)
        ends = (places * (prompt.visual_index >= 0)).amax(dim=1)
        lengths = prompt.attention_mask.sum(dim=1)
        ends, lengths = torch.stack([ends, lengths]).tolist()
        if not all(ends):
            return None
        keys = []
        for ids, images in zip(prompts, image_keys, strict=True):
            marks = (ids == IMAGE_TOKEN_INDEX).nonzero()
            keys.append((tuple(ids[: int(marks[-1])].tolist()), tuple(images)))
        # A beginning that comes for the second time will come again.
        new = {key: row for row, key in enumerate(keys) if key not in self._beginnings}
        cost = sum(ends[row] - (size - lengths[row]) for row in new.values())
        shared = cost + sum(size - end for end in ends) < sum(lengths)
        known = {key: self._beginnings.get(key) for key in keys}
        if shared:
            self._begin(prompt, keys, known, [size - length for length in lengths], ends)
        self._beginnings = known
        begun = [own for key in keys if (own := known[key]) is not None]
        if not shared or any(own.depth == 0 for own in begun):
            return None
        # A bias by position is another one for each question, so that keys alone cannot hold it.
        share = prompt.position_bias is None
        share &= not self.pruner.decoder.drops_from_caches(self.model.config.num_hidden_layers)
        return Prefix(begun, lengths, share)

    def _begin(
        self, prompt, keys: list[tuple], known: dict, starts: list[int], ends: list[int]
    ) -> None:
        """Makes `known` hold the beginning of every row, its columns from its start to its end; all
        of as many layers: a method may cut one image where it leaves another alone."""

        def begin(row: int, most: int | None = None) -> Beginning:
            return beginning(self.model, prompt, row, slice(starts[row], ends[row]), most)

        for row, key in enumerate(keys):
            if known[key] is None:
                known[key] = begin(row)
        least = min(known[key].depth for key in keys)
        for row, key in enumerate(keys):
            if known[key].depth > least > 0:
                known[key] = begin(row, least)


def beginning(
    model, prompt: Prompt, row: int, columns: slice, most: int | None = None
) -> Beginning:
    """Runs the tokens at `columns` of one row of a prompt through the layers that the method in use
    leaves alone, the first `most` of them."""
    decoder = model.get_model()
    # How many tokens there are is known of the whole row alone.
    visuals = replace(prompt.visuals.row(row, columns), counts=None)
    prefill = decoder.start(
        prompt.inputs_embeds[row][columns][None],
        position_ids=prompt.position_ids[row][columns][None],
        visuals=visuals,
    )
    depth = model.pruner.decoder.reusable_layers(prefill)
    depth = depth if most is None else min(depth, most)
    cache = KVCache(len(decoder.layers), reserve=0)
    hidden_states = decoder.first_layers(prefill, depth, cache)
    entries = [cache.entries(layer) for layer in range(depth)]
    keys, values = [k[0] for k, _ in entries], [v[0] for _, v in entries]
    bias = None if prefill.key_bias is None else prefill.key_bias[0]
    return Beginning(keys, values, hidden_states[0], bias)
