"""A model whose decoder layers run in vLLM: prompts go there as embeddings, token ids come back."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..mm_utils import holds_text, most_tokens
from ..model.context import PromptTooLong, answer_room
from ..model.generation import padded
from ..model.prompt import Prompt
from ..pruning.cost import DecoderShape
from .payload import COMPLETIONS, ids_of, pieces, rows_of, tensor_text
from .probe import card_of, served_model
from .sampling import Sampling, sampling_of
from .server import Server
from .support import check_method, check_options, reason_of_model

REQUESTS = 64  # answers of one call that are under way at the same time


@dataclass
class Place:
    """A server that fits the model. name: what it calls its model; positions: the most of a prompt
    and its answer; None: it does not say"""

    server: Server
    name: str
    positions: int | None
    under_way: int = 0


class VLLMEngine:
    """Answers prompts with the language model in one or several vLLM servers.

    `load_pretrained_model(..., engine=engine)` loads what is left to do here and connects the two.
    Calls of `generate` may come from any number of threads; each answer goes to the server with
    the fewest under way.

    urls:    http://HOST:PORT of each server; one text may name several, with commas between them
    allowed: HOST or HOST:PORT of servers that are not on this machine
    key:     sent as a bearer token
    seconds: longest silence of a server
    Raises ValueError where an address is neither on this machine nor in `allowed`.
    """

    def __init__(
        self,
        urls: str | Iterable[str],
        allowed: Iterable[str] = (),
        key: str | None = None,
        seconds: float = 600.0,
    ):
        urls = urls.split(",") if isinstance(urls, str) else list(urls)
        allowed = list(allowed)
        self.servers = [Server(url.strip(), allowed, key, seconds) for url in urls]
        self.places: list[Place] = []
        self.tokenizer = None
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(server.url for server in self.servers)})"

    # What a model asks of its engine.

    @staticmethod
    def check_model(model_class: type) -> None:
        """Raises ValueError with the reason where the decoder of a family cannot be in a server."""
        if reason := reason_of_model(model_class):
            raise ValueError(reason)

    check_method = staticmethod(check_method)
    check_options = staticmethod(check_options)

    def check_servers(self) -> None:
        """Raises EngineError where a server cannot be reached."""
        for server in self.servers:
            card_of(server)

    def connect(self, model, tokenizer) -> None:
        """Asks the servers whether they have the language model of `model`.

        Raises EngineError where none answers, ValueError where it is another model, is too old, or
        was started without a flag.
        """
        self.tokenizer = tokenizer
        self.places = [Place(one, *served_model(one, model)) for one in self.servers]

    def encode(
        self,
        model,
        input_ids: Tensor,
        images=None,
        image_sizes=None,
        questions: list[str] | None = None,
        attention_mask: Tensor | None = None,
        **options,
    ) -> Prompt:
        """The prompts with the tokens of their images, as `generate` takes them; arguments as in
        `model.generate`. What was kept is written into the trace of the model.

        options: those of the method's release for one call; others change nothing here
        """
        pruner = model.pruner
        pruner, _ = pruner.published.for_call(pruner, options)
        with model.using(pruner):
            prompt = model.splice(
                input_ids,
                attention_mask,
                images=images,
                image_sizes=image_sizes,
                questions=questions,
                padding_side="left",
            )
        self.record(model, prompt)
        return prompt

    @staticmethod
    def record(model, prompt: Prompt) -> None:
        """Notes in the trace of the model what all of its layers see: the prompt as it is."""
        if (trace := model.pruning_trace) is None:
            return
        if trace.attention_layers:
            raise ValueError("attention is not recorded: the layers run in a server")
        shape = DecoderShape.from_config(model.config, prompt.inputs_embeds.element_size())
        trace.start_prefill(shape, prompt.position_ids)
        trace.add_layer(prompt.visual_index, prompt.attention_mask, prompt.position_ids)
        trace.prompt_tokens *= shape.num_layers
        trace.visual_tokens *= shape.num_layers
        trace.finish_prefill(None, prompt.visual_index)

    def generate(
        self,
        model,
        prompt: Prompt,
        streamer=None,
        should_stop: Callable[[], bool] | None = None,
        **options,
    ) -> Tensor:
        """The new tokens (B, n) of every prompt, on the CPU, shorter answers padded on the right.

        streamer:    of one prompt: `put` is called with a stand-in for the prompt, then with new
                     ids (n,) as they come, and `end`; what it raises ends the answer in the server
        should_stop: asked several times a second, from another thread; once it says True, what
                     there is of the answers is all of them
        options:     `do_sample`, `temperature`, `top_p`, `top_k`, `max_new_tokens`, `eos_token_id`,
                     `seed` (the n-th prompt gets seed + n), and `stop`, texts that end an answer
        The model is not run and may have another method by now. Raises ValueError for options that
        a server cannot follow, PromptTooLong, and EngineError.
        """
        sampling = sampling_of(model.generation_config, options)
        rows = rows_of(prompt)
        if streamer is not None and len(rows) > 1:
            raise ValueError(f"a streamer shows one answer, but there are {len(rows)} prompts")
        size = model.get_input_embeddings().num_embeddings
        room = answer_room(model, prompt.num_positions, sampling.max_new_tokens)
        sampling = replace(sampling, max_new_tokens=room)
        answer = partial(self._answer, size=size, streamer=streamer, should_stop=should_stop)
        numbered = [
            sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
            for number in range(len(rows))
        ]
        if len(rows) == 1:
            answers = [answer(rows[0], numbered[0])]
        else:
            with ThreadPoolExecutor(min(REQUESTS, len(rows))) as pool:
                answers = list(pool.map(answer, rows, numbered))
        pad = options.get("pad_token_id")
        ends = sampling.ends
        return padded([torch.tensor(one, dtype=torch.long) for one in answers], pad_of(pad, ends))

    # One answer.

    def _answer(
        self, embeds: Tensor, sampling: Sampling, size: int, streamer, should_stop
    ) -> list[int]:
        """The new ids behind one prompt (S, D)."""
        with self._place() as place:
            sampling = self._fitting(place, len(embeds), sampling)
            body = {"model": place.name, "prompt_embeds": tensor_text(embeds), **sampling.body()}
            if streamer is None and should_stop is None and not sampling.stop:
                return ids_of(place.server, place.server.post(COMPLETIONS, body), size)
            if streamer is not None:
                streamer.put(torch.zeros(1, 0, dtype=torch.long))
            found: list[int] = []
            stops = self._stops(sampling.stop)
            with closing(pieces(place.server, body, size, should_stop)) as coming:
                for new in coming:
                    new, finished = stops(found, new)
                    found += new
                    if streamer is not None and new:
                        streamer.put(torch.tensor(new))
                    if finished:
                        break
            if streamer is not None:
                streamer.end()
            return found

    @contextmanager
    def _place(self) -> Iterator[Place]:
        """The server with the fewest answers under way, for the time of one more."""
        if not self.places:
            raise ValueError(f"{self!r} is connected to no model: load one with engine=...")
        with self._lock:
            place = min(self.places, key=lambda one: one.under_way)
            place.under_way += 1
        try:
            yield place
        finally:
            with self._lock:
                place.under_way -= 1

    def _fitting(self, place: Place, length: int, sampling: Sampling) -> Sampling:
        """What a server has positions for behind a prompt of `length` tokens."""
        room = sampling.max_new_tokens if place.positions is None else place.positions - length
        if room < 1:
            raise PromptTooLong(
                f"the prompt takes {length} positions, and {place.server.url} has "
                f"{place.positions} for it and an answer (its --max-model-len): use fewer images, "
                "fewer visual tokens or less text"
            )
        if room >= sampling.max_new_tokens:
            return sampling
        if place.server.url not in self._warned:
            self._warned.add(place.server.url)
            warnings.warn(
                f"an answer of up to {sampling.max_new_tokens} tokens was asked for; behind a "
                f"prompt of {length} it ends after {room}, as {place.server.url} has "
                f"{place.positions} positions (its --max-model-len)",
                stacklevel=2,
            )
        return replace(sampling, max_new_tokens=room)

    def _stops(self, texts: tuple[str, ...]) -> Callable:
        """(ids so far, new ids) -> (those that belong to the answer, whether it ends there)."""
        if not texts:
            return lambda found, new: (new, False)
        window = most_tokens(texts)

        def stops(found: list[int], new: list[int]) -> tuple[list[int], bool]:
            for count in range(1, len(new) + 1):
                tail = (found[-window:] + new[:count])[-window:]
                if holds_text(self.tokenizer, tail, texts):
                    return new[:count], True
            return new, False

        return stops

    def abort(self) -> None:
        """Ends all answers that are under way; who waits for one gets an EngineError."""
        for server in self.servers:
            server.abort()

    def close(self) -> None:
        """Ends the connections that nobody uses."""
        for server in self.servers:
            server.close()


def pad_of(pad: int | None, ends: tuple[int, ...]) -> int:
    """What fills up shorter answers."""
    return pad if pad is not None else ends[0] if ends else 0
