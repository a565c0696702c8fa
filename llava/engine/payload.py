"""What goes to vLLM and what comes back: prompts as text, answers as token ids."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..constants import IMAGE_TOKEN_INDEX
from ..model.prompt import Prompt
from .server import EngineError, Server, Watch

TOO_OLD = "its vLLM is too old for this, which was tried with 0.32"
BROKEN = ("abort", "error")  # reasons of an end that is none


@dataclass(frozen=True)
class Row:
    """One prompt of S tokens.

    embeds: (S, D) on the CPU
    ids:    those it was made of, with -200 for an image; None: not known
    images: tokens of each image
    """

    embeds: Tensor
    ids: list[int] | None = None
    images: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.embeds)


def rows_of(prompt: Prompt) -> list[Row]:
    """The prompts without padding. Raises ValueError where positions are not counted through, which
    a server would not know."""
    mask, size, counts = prompt.attention_mask, prompt.inputs_embeds.shape[1], prompt.counts
    lengths = mask.sum(dim=1).tolist() if counts is None else counts.lengths
    first = size - torch.tensor(lengths)[:, None]
    wanted = (torch.arange(size) - first).clamp(min=0)
    positions = prompt.position_ids.cpu()
    even = positions.shape == wanted.shape
    if not even or not torch.equal(positions.masked_fill(~mask.cpu(), 0), wanted):
        raise ValueError(
            "the tokens of the prompt have positions with gaps, but a server counts them through"
        )
    embeds, ids = prompt.inputs_embeds.detach().cpu(), prompt.marked_ids
    if ids is None or counts is None:
        return [Row(own[size - length :]) for own, length in zip(embeds, lengths, strict=True)]
    return [
        Row(own[size - length :], row, images[: row.count(IMAGE_TOKEN_INDEX)])
        for own, length, row, images in zip(embeds, lengths, ids, counts.images, strict=True)
    ]


def tensor_text(tensor: Tensor) -> str:
    """A tensor as vLLM reads it: a file of torch in base64."""
    file = io.BytesIO()
    torch.save(tensor.clone(), file)  # a view would be written with all that it is a view of
    return base64.b64encode(file.getbuffer()).decode()


def pieces(
    server: Server,
    path: str,
    body: dict,
    check: Callable[[dict], list[int]],
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[list[int]]:
    """The new ids of an answer as they come, which `check` finds in each event, until its end or
    until `should_stop`, which is asked several times a second, says so. Closing it ends the answer
    in the server."""
    watch = None if should_stop is None else Watch(should_stop)
    try:
        with watch or nullcontext(), server.events(path, body, watch) as events:
            for event in events:
                if event.get("choices"):  # not so the one that counts tokens
                    yield check(event)
    except EngineError:
        if watch is None or not watch.ended:
            raise


def choice_of(server: Server, reply: dict) -> dict:
    """The one choice of a reply. Raises EngineError where there is none, or the answer failed."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise EngineError(f"{server.url} sends what is no answer of vLLM: {str(reply)[:100]}")
    if (reason := choices[0].get("finish_reason")) in BROKEN:
        raise EngineError(f"{server.url} broke off in the middle of an answer ({reason})")
    return choices[0]


def ids_of(server: Server, reply: dict, size: int) -> list[int]:
    """The new token ids in a reply. Raises EngineError where there are none, where the answer
    failed, and where a model of `size` tokens has no such."""
    ids = choice_of(server, reply).get("token_ids")
    if ids is None and "delta" in reply["choices"][0]:
        return []  # the first event of a chat, which says who speaks
    if not isinstance(ids, list):
        raise EngineError(f"{server.url} sends no token ids: {TOO_OLD}")
    if odd := [number for number in ids if type(number) is not int or not 0 <= number < size]:
        raise EngineError(
            f"{server.url} answers with token {odd[0]}, of which the model here has {size}: it "
            "serves another model"
        )
    return ids
