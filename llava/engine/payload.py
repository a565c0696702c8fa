"""What goes to vLLM and what comes back: prompts as text, answers as token ids."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from ..model.prompt import Prompt
from ..pruning.apart import check_bias
from .server import EngineError, Server, Watch

COMPLETIONS = "/v1/completions"
TOO_OLD = "its vLLM is too old for this, which was tried with 0.32"
BROKEN = ("abort", "error")  # reasons of an end that is none


def rows_of(prompt: Prompt) -> list[Tensor]:
    """The prompts (S, D) without padding. Raises ValueError where positions are not counted
    through, and where tokens carry a bias of attention: a server would know of neither."""
    check_bias(prompt.extras, prompt.position_bias)
    mask, size = prompt.attention_mask, prompt.inputs_embeds.shape[1]
    known = prompt.counts is not None
    lengths = prompt.counts.lengths if known else mask.sum(dim=1).tolist()
    first = size - torch.tensor(lengths)[:, None]
    wanted = (torch.arange(size) - first).clamp(min=0)
    positions = prompt.position_ids.cpu()
    even = positions.shape == wanted.shape
    if not even or not torch.equal(positions.masked_fill(~mask.cpu(), 0), wanted):
        raise ValueError(
            "the tokens of the prompt have positions with gaps, but a server counts them through"
        )
    embeds = prompt.inputs_embeds.detach().cpu()
    return [row[size - length :] for row, length in zip(embeds, lengths, strict=True)]


def tensor_text(tensor: Tensor) -> str:
    """A tensor as vLLM reads it: a file of torch in base64."""
    file = io.BytesIO()
    torch.save(tensor.clone(), file)  # a view would be written with all that it is a view of
    return base64.b64encode(file.getbuffer()).decode()


def pieces(
    server: Server, body: dict, size: int, should_stop: Callable[[], bool] | None = None
) -> Iterator[list[int]]:
    """The new ids of an answer as they come, until its end or until `should_stop`, which is asked
    several times a second, says so. Closing it ends the answer in the server."""
    watch = None if should_stop is None else Watch(should_stop)
    try:
        with watch or nullcontext(), server.events(COMPLETIONS, body, watch) as events:
            for event in events:
                if event.get("choices"):  # not so the one that counts tokens
                    yield ids_of(server, event, size)
    except EngineError:
        if watch is None or not watch.ended:
            raise


def ids_of(server: Server, reply: dict, size: int) -> list[int]:
    """The new token ids in a reply. Raises EngineError where there are none, where the answer
    failed, and where a model of `size` tokens has no such."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise EngineError(f"{server.url} sends what is no answer of vLLM: {str(reply)[:100]}")
    if (reason := choices[0].get("finish_reason")) in BROKEN:
        raise EngineError(f"{server.url} broke off in the middle of an answer ({reason})")
    ids = choices[0].get("token_ids")
    if not isinstance(ids, list):
        raise EngineError(f"{server.url} sends no token ids: {TOO_OLD}")
    if odd := [number for number in ids if type(number) is not int or not 0 <= number < size]:
        raise EngineError(
            f"{server.url} answers with token {odd[0]}, of which the model here has {size}: it "
            "serves another model"
        )
    return ids
