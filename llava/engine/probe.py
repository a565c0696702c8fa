"""Whether a server has the language model of a checkpoint, found out before the first prompt.

A server says what it calls its model and where it was loaded from, not how large it is. So it is
asked for the same few tokens twice, as ids and as embeddings from the table here: where the tables
are one, both continue alike.
"""

from __future__ import annotations

import os
from contextlib import suppress

import torch

from ..checkpoint_kind import values_in
from ..config_file import read_config
from ..llava_hf import is_llava_hf
from .payload import COMPLETIONS, ids_of, tensor_text
from .sampling import Sampling
from .server import EngineError, RefusedError, Server

MODELS, VERSION = "/v1/models", "/version"
#: small ones: an id beyond its vocabulary would end the server
IDS = (5, 77, 140, 31, 200, 96, 9, 163)
NEW_TOKENS = 4
#: largest difference of two logarithms of one probability: tables may be rounded to other types
TOLERANCE = 0.25
FLAG = "--enable-prompt-embeds"
START = (
    "Start it with python -m vllm.entrypoints.openai.api_server --model FOLDER "
    f"{FLAG} --skip-tokenizer-init, where FOLDER is what python -m llava.model.export --to llama "
    "writes"
)
SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")


def card_of(server: Server) -> tuple[str, str, int | None]:
    """(name of the model in a server, where it was loaded from, most positions of a prompt with its
    answer, None where that is not said).

    Raises EngineError where no server answers, ValueError where it is none of vLLM.
    """
    try:
        card = server.get(MODELS)["data"][0]
        name, root, positions = str(card["id"]), card.get("root"), card.get("max_model_len")
    except RefusedError as error:
        raise ValueError(f"{error}. Is it vLLM? {START}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{server.url} does not say which model it serves. {START}") from error
    return name, str(root or name), positions if type(positions) is int else None


def served_model(server: Server, model) -> tuple[str, int | None]:
    """(name of the model in the server, most positions), as `card_of` has them.

    Raises ValueError where its model is not the language model of `model`, with what to do.
    """
    name, folder, positions = card_of(server)
    check_sizes(server, folder, model)
    check_table(server, name, model)
    return name, positions


def check_sizes(server: Server, folder: str, model) -> None:
    """Raises ValueError where the folder that a server has loaded holds a model of other sizes; one
    that is not on this machine is not looked at. The layout of transformers fills vocabularies up.
    """
    values, padded = {}, False
    if os.path.isdir(folder):
        with suppress(OSError, ValueError):
            values, padded = values_in(folder), is_llava_hf(read_config(folder))
    wanted = {key: getattr(model.config, key) for key in SIZES}
    wanted["vocab_size"] = model.get_input_embeddings().num_embeddings
    for key, here in wanted.items():
        there = values.get(key, here)
        if there != here and not (padded and key == "vocab_size" and there > here):
            raise ValueError(
                f"{server.url} serves another model: {folder} has {key} {there}, the checkpoint "
                f"here {here}. {START}"
            )


def check_table(server: Server, name: str, model) -> None:
    """Raises ValueError unless a server takes embeddings, sends token ids, and continues tokens of
    its own table as it does those of the table here."""
    table = model.get_input_embeddings()
    size = table.num_embeddings
    ids = [number for number in IDS if number < size]
    sampling = Sampling(max_new_tokens=NEW_TOKENS).body()
    body = {"model": name, **sampling, "logprobs": 1, "return_tokens_as_token_ids": True}
    embeds = tensor_text(table(torch.tensor(ids, device=table.weight.device)).detach().cpu())
    try:
        ours = server.post(COMPLETIONS, body | {"prompt_embeds": embeds})
        own = server.post(COMPLETIONS, body | {"prompt": ids})
    except RefusedError as error:
        raise ValueError(reason_of_refusal(server, error.reason)) from error
    if not alike(*((ids_of(server, reply, size), chances(reply)) for reply in (ours, own))):
        raise ValueError(
            f"{server.url} serves another model ({name}): it continues the same tokens otherwise "
            f"by its own table of embeddings than by that of the checkpoint here. {START}"
        )


def reason_of_refusal(server: Server, reason: str) -> str:
    """What to say where a server does not take the embeddings of a few tokens."""
    if FLAG in reason:
        return f"{server.url} was started without {FLAG}. {START}"
    if "hidden_size" in reason or "hidden size" in reason:
        return f"{server.url} serves another model ({reason}). {START}"
    return f"{server.url}, {version_of(server)}, takes no prompts as embeddings: {reason}. {START}"


def chances(reply: dict) -> list[float]:
    """The logarithms of the probabilities of an answer's tokens."""
    with suppress(LookupError, TypeError, ValueError):
        return [float(value) for value in reply["choices"][0]["logprobs"]["token_logprobs"]]
    return []


def alike(first: tuple[list[int], list[float]], second: tuple[list[int], list[float]]) -> bool:
    """Whether two answers, (ids, logarithms) each, are one but for rounding: a close call may fall
    the other way, and what follows it says nothing."""
    steps = list(zip(*first, *second, strict=False))
    for own, chance, other, its in steps:
        if abs(chance - its) > TOLERANCE:
            return False
        if own != other:
            return True
    return bool(steps) or first[0] == second[0]  # a server may tell no probabilities


def version_of(server: Server) -> str:
    """The version that a server says it has, in words."""
    with suppress(RefusedError, EngineError):
        return f"vLLM {server.get(VERSION).get('version', '?')}"
    return "of unknown version"
