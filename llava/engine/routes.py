"""The two ways on which a prompt with images gets into vLLM.

A language model takes the whole prompt as embeddings. A LLaVA in the layout of transformers
(llava-hf) takes texts, and in the places of images their tokens as embeddings; its tower is not
even loaded. As it makes the ids of the texts itself, its ids are compared with ours.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ..constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from .payload import Row, ids_of, tensor_text
from .server import EngineError, Server

#: puts the parts of the one message together, and adds nothing
TEMPLATE = (
    "{%- for message in messages -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}"
    f"{{%- else -%}}{DEFAULT_IMAGE_TOKEN}{{%- endif -%}}"
    "{%- endfor -%}{%- endfor -%}"
)
#: how a tokenizer makes a text that gives the same ids again
AS_THEY_STAND = {"clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False}


class PromptRoute:
    """The whole prompt as embeddings."""

    path = "/v1/completions"
    #: without it a server takes none
    flags = ("--enable-prompt-embeds",)
    #: asks for the probabilities of tokens
    chances = {"logprobs": 1}

    def body(self, row: Row) -> dict:
        """The part of a request that is the prompt."""
        return {"prompt_embeds": tensor_text(row.embeds)}

    def ids(self, server: Server, reply: dict, row: Row, size: int) -> list[int]:
        """The new ids in a reply. Raises EngineError, see `ids_of`."""
        return ids_of(server, reply, size)

    def chances_in(self, reply: dict) -> list:
        return reply["choices"][0]["logprobs"]["token_logprobs"]


@dataclass
class ImageRoute:
    """Texts, and the tokens of images as embeddings.

    tokenizer: of the checkpoint, which has to be that of the server
    image_id:  id of the token that stands for an image there
    """

    tokenizer: object
    image_id: int

    path = "/v1/chat/completions"
    flags = ("--enable-mm-embeds", "--trust-request-chat-template")
    chances = {"logprobs": True}

    def body(self, row: Row) -> dict:
        parts, text, place = [], [], 0
        images = iter(row.images)
        for number in [*row.ids, None]:
            if number is not None and number != IMAGE_TOKEN_INDEX:
                text.append(number)
                continue
            if text:
                words = self.tokenizer.decode(text, **AS_THEY_STAND)
                parts.append({"type": "text", "text": words})
            place, text = place + len(text), []
            if number is not None:
                count = next(images)
                parts.append(image_part(row.embeds[place : place + count]))
                place += count
        return {
            "messages": [{"role": "user", "content": parts}],
            "chat_template": TEMPLATE,
            "add_special_tokens": False,
            "add_generation_prompt": False,
        }

    def ids(self, server: Server, reply: dict, row: Row, size: int) -> list[int]:
        """As of the other way. Raises EngineError also where the server made other ids of the
        prompt than there are here."""
        if (own := reply.get("prompt_token_ids")) is not None and own != self.expanded(row):
            raise EngineError(
                f"{server.url} makes other tokens of a prompt than the checkpoint here: its "
                "tokenizer is another one"
            )
        return ids_of(server, reply, size)

    def expanded(self, row: Row) -> list[int]:
        """The ids of a prompt as a server has them, one for every token of an image."""
        images, found = iter(row.images), []
        for number in row.ids:
            image = number == IMAGE_TOKEN_INDEX
            found += [self.image_id] * next(images) if image else [number]
        return found

    def chances_in(self, reply: dict) -> list:
        return [own["logprob"] for own in reply["choices"][0]["logprobs"]["content"]]


def image_part(embeds) -> dict:
    """An image as a part of a message. Its name in the caches of the server follows from its
    tokens: from image, method, budget, and from the question where a method reads it."""
    name = hashlib.sha256(embeds.contiguous().view(torch.uint8).numpy()).hexdigest()
    return {"type": "image_embeds", "image_embeds": tensor_text(embeds), "uuid": name}
