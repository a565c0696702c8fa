"""Answers drawn from a model with pruned prompts, the same however the work is spread.

What an answer draws depends on the seed, the epoch, the question and its number in the group alone:
one process or several, interrupted or not, a run draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from llava.front_end import FrontEnd
from llava.model.inputs import Picture, generate_inputs
from llava.model.prompt import Prompt
from llava.model.reuse import Prefix, beginning
from llava.pruning.base import Pruner

from .loss import completion_mask
from .needed import NEEDED, KeepNeeded, by_method, in_masks


def drawn(count: int, *key: int) -> np.ndarray:
    """(count,) numbers from 0 to 1 that depend on `key` alone."""
    return np.random.default_rng(key).random(count)


class DrawnTokens(LogitsProcessor):
    """Leaves one token of every row: the one that its number, spread over the probabilities of all
    tokens, falls on. Greedy search then samples.

    numbers: (B, T) from 0 to 1, one for every token to come
    """

    def __init__(self, numbers: Tensor, temperature: float = 1.0):
        self.numbers, self.temperature, self.step = numbers, temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chance = (scores.float() / self.temperature).softmax(dim=-1)
        up_to = chance.cumsum(dim=-1, dtype=torch.float64)
        wanted = self.numbers[:, self.step, None].to(up_to.device) * up_to[:, -1:]
        token = torch.searchsorted(up_to, wanted, right=True).clamp(max=scores.shape[1] - 1)
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0)


@dataclass
class Asked:
    """A question as it is asked.

    ids:     (L,) of the prompt
    picture: of the question
    text:    the question in plain words
    mask:    (h, w) True on the tokens that are needed; None: what the trained glimpse says
    key:     number of the question in its data set
    """

    ids: Tensor
    picture: Picture
    text: str
    mask: Tensor | None
    key: int


@dataclass
class Answers:
    """Answers to a batch of questions.

    prompt: embedded, padded on the left
    once:   the same without repetitions, and which of its rows (B,) each row is
    kept:   (B, S) True on the tokens of the prompt that stay
    ids:    (B, T) of the answers, padded on the right
    mask:   (B, T) True on their tokens, see `completion_mask`
    ended:  (B,) True where an answer has an end mark
    """

    prompt: Prompt
    once: tuple[Prompt, Tensor]
    kept: Tensor
    ids: Tensor
    mask: Tensor
    ended: Tensor


class AnswerSampler:
    """Draws answers; `front.model` is the model itself, whatever wraps it.

    layer:       last decoder layer that sees all visual tokens
    glimpse:     a trained method, assigned to the model, for questions without a mask; or None
    temperature: of the probabilities that are drawn from
    """

    def __init__(
        self,
        front: FrontEnd,
        layer: int,
        max_new_tokens: int,
        glimpse: Pruner | None = None,
        temperature: float = 1.0,
    ):
        self.front, self.llava = front, front.model
        self.stage, self.glimpse = KeepNeeded(layer), glimpse
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        ends = front.model.generation_config.eos_token_id
        ends = front.tokenizer.eos_token_id if ends is None else ends
        self.ends = [ends] if isinstance(ends, int) else list(ends)

    @torch.no_grad()
    def __call__(self, asked: Sequence[Asked], keys: Sequence[tuple[int, ...]]) -> Answers:
        """One answer to each of `asked`; equal `keys` draw equal answers to equal questions.

        Questions with the same key of their own are read and looked at once.
        """
        training = self.llava.training
        self.llava.eval()  # no dropout: what is drawn is what the model would say
        try:
            once, rows = self.prompts(asked)
            prompt = once if rows == list(range(len(asked))) else once.rows(rows)
            kept = prompt.attention_mask & ((prompt.visual_index < 0) | prompt.extras[NEEDED])
            numbers = [drawn(self.max_new_tokens, *key) for key in keys]
            rule = DrawnTokens(torch.from_numpy(np.stack(numbers)), self.temperature)
            with self.llava.using(self.stage):
                ids = self.llava.generate_from(
                    prompt,
                    prefix=self.prefix(once, rows),
                    logits_processor=LogitsProcessorList([rule]),
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=self.ends,
                    pad_token_id=self.front.pad_id,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                )
        finally:
            self.llava.train(training)
        mask = completion_mask(ids, self.ends)
        ended = torch.isin(ids, ids.new_tensor(self.ends)).any(dim=1)
        index = torch.tensor(rows, device=ids.device)
        return Answers(prompt, (once, index), kept, ids, mask, ended)

    def prefix(self, once: Prompt, rows: list[int]) -> Prefix | None:
        """All but the last tokens of prompts in the layers before the cut, which a prompt that is
        answered several times runs through once; None where that saves nothing."""
        if self.stage.layer < 0 or len(rows) == len(once.inputs_embeds):
            return None
        size, lengths = once.inputs_embeds.shape[1], once.attention_mask.sum(dim=1).tolist()
        known = [
            beginning(self.llava, once, row, slice(size - length, size - 1))
            for row, length in enumerate(lengths)
        ]
        lengths = [lengths[row] for row in rows]
        return Prefix([known[row] for row in rows], lengths, share=False)

    def prompts(self, asked: Sequence[Asked]) -> tuple[Prompt, list[int]]:
        """The different ones of the questions embedded, with what is needed of them in their
        extras, and which of them each question is."""
        once = list({one.key: one for one in asked}.values())
        row_of = {one.key: row for row, one in enumerate(once)}
        rows = [row_of[one.key] for one in asked]
        unmasked = any(one.mask is None for one in once)
        if unmasked and self.glimpse is None:
            raise ValueError("a question has no boxes, and there is no trained glimpse to ask")
        with self.llava.using(self.glimpse if unmasked else self.stage):
            inputs = generate_inputs(
                self.llava,
                [one.ids for one in once],
                [[one.picture] for one in once],
                [one.text for one in once],
                self.front.pad_id,
            )
            single = self.llava.build_prompt(**inputs, padding_side="left")
            needed = by_method(self.llava, single, self.glimpse) if unmasked else None
        if needed is None:
            needed = in_masks(single, [one.mask for one in once])
        elif not all(one.mask is None for one in once):
            blank = [torch.zeros(n, dtype=torch.bool) for n in single.counts.visual]
            pairs = zip(once, blank, strict=True)
            masks = [none if one.mask is None else one.mask for one, none in pairs]
            predicted = torch.tensor([one.mask is None for one in once], device=needed.device)
            needed = torch.where(predicted[:, None], needed, in_masks(single, masks))
        return replace(single, extras={NEEDED: needed}), rows
