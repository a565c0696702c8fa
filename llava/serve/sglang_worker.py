"""A worker that lets another server do the work: SGLang, or any that speaks OpenAI's protocol.

    python -m llava.serve.sglang_worker --controller http://localhost:10000 --port 40000 \
        --worker http://localhost:40000 --sgl-endpoint http://127.0.0.1:30000

Such a server gets the images as they are and prunes nothing: requests that name a pruning method
are refused. `model_worker --engine vllm` prunes here and leaves the language model to a server.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

from ..constants import DEFAULT_IMAGE_TOKEN
from ..conv_mode import announce, checkpoint_conv_mode
from ..conversation import conv_templates
from ..errors import errors_as_messages
from ..mm_utils import get_model_name_from_path, infer_conv_mode
from ..program_parser import ProgramParser
from .errors import NEEDS_EXTRA, ServeError, encode_chunk, server_gone, server_refused

try:
    import httpx
    from httpx_sse import EventSource, SSEError
except ImportError as error:
    raise ImportError(NEEDS_EXTRA) from error

from .dialogue import system_text, turns
from .direct import checked_address
from .images import decode_images, image_type, plain_base64
from .limits import CHUNK_BYTES, LIMITS, STATUS_BYTES, Limits
from .model_worker import CONCURRENCY, add_service_args, concurrency, run_worker
from .outbox import with_pauses
from .protocol import GenerateRequest
from .service import log_failure

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 120.0
KEEP_ALIVE_SECONDS = 5.0  # clients give up on a stream that is silent for 10 s

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A request that was checked. types: media type of every image."""

    request: GenerateRequest
    request_id: str
    types: list[str]


class Forwarder:
    """Passes requests on to the server at `endpoint` and its answers back.

    api: "sglang" (`/generate`, the prompt as it is) or "openai" (`/v1/chat/completions`, the
         prompt taken apart into messages)
    key: secret of that server, sent as a bearer token
    conv_mode: prompt template of the model; None: by its name
    served: what the server calls the model; None: as clients do
    at_once: requests that the server has at the same time; others wait
    """

    def __init__(
        self,
        endpoint: str,
        model_name: str,
        api: str = "sglang",
        key: str | None = None,
        limits: Limits = LIMITS,
        transport: httpx.AsyncBaseTransport | None = None,
        conv_mode: str | None = None,
        served: str | None = None,
        at_once: int = CONCURRENCY,
    ):
        self.model_name, self.api, self.limits = model_name, api, limits
        self.served = served or model_name
        self.conv_mode = conv_mode or infer_conv_mode(model_name)
        self.template = conv_templates[self.conv_mode]
        self._turns = asyncio.Semaphore(at_once)
        self.client = httpx.AsyncClient(
            base_url=base_url(endpoint),
            headers=key_headers(key),
            timeout=httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
            transport=transport,
            follow_redirects=False,
            trust_env=False,
        )

    def status(self) -> dict:
        return {"pruning_methods": [], "conv_mode": self.conv_mode}

    async def prepare(self, request: GenerateRequest, request_id: str) -> Job:
        images = request.images or []
        if request.model not in (None, self.model_name):
            raise ServeError("unknown_model", "This worker serves another model.")
        if request.pruning is not None and request.pruning.method != "none":
            raise ServeError("method_unavailable", "This worker cannot prune visual tokens.")
        marks = request.prompt.count(DEFAULT_IMAGE_TOKEN)
        if marks != len(images):
            raise ServeError(
                "image_count",
                f"Number of images ({len(images)}) does not match number of {DEFAULT_IMAGE_TOKEN} "
                f"tokens in the prompt ({marks}).",
            )
        await asyncio.to_thread(decode_images, images, self.limits)
        if images:
            request.images = [plain_base64(image) for image in images]
        return Job(request, request_id, [image_type(image) for image in images])

    async def stream(self, job: Job):
        """The chunks of the answer, encoded; the latest again whenever nothing comes for a while,
        be it that the server is silent or that the request waits for its turn."""
        latest = encode_chunk(job.request.chunk(""))
        async with aclosing(with_pauses(self._in_turn(job), KEEP_ALIVE_SECONDS)) as chunks:
            async for chunk in chunks:
                latest = chunk or latest
                yield latest

    async def _in_turn(self, job: Job):
        async with self._turns, aclosing(self._answer(job)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _answer(self, job: Job):
        path, body = self._upstream(job)
        text = ""
        try:
            async with self.client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    raise server_refused(response.status_code)
                async for event in events(response):
                    text = self._text(event, text)
                    yield encode_chunk(job.request.chunk(text))
        except (SSEError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            log_failure(error, job.request_id)
            wrong = ServeError("internal", "The model server sent something that is no answer.")
            yield encode_chunk(wrong.chunk(job.request_id))
        except httpx.HTTPError as error:
            logger.warning("request %s: %s", job.request_id, type(error).__name__)
            yield encode_chunk(server_gone().chunk(job.request_id))
        except ServeError as error:
            yield encode_chunk(error.chunk(job.request_id))

    def _upstream(self, job: Job) -> tuple[str, dict]:
        """(path, body) of the request to the server."""
        request = job.request
        sampling = {"temperature": request.temperature, "top_p": request.top_p}
        if request.top_p == 0:  # the likeliest token, which most servers know by this alone
            sampling = {"temperature": 0, "top_p": 1.0}
        if request.stop:
            sampling["stop"] = request.stop
        tokens = min(request.max_new_tokens, self.limits.new_tokens)
        if self.api == "sglang":
            prompt = request.prompt.replace(f" {DEFAULT_IMAGE_TOKEN}\n", DEFAULT_IMAGE_TOKEN)
            body = {
                "text": prompt,
                "sampling_params": {"max_new_tokens": tokens, **sampling},
                "stream": True,
            }
            return "/generate", body | ({"image_data": request.images} if request.images else {})
        return "/v1/chat/completions", {
            "model": self.served,
            "messages": messages(job, self.template),
            "max_tokens": tokens,
            "stream": True,
            **sampling,
        }

    def _text(self, event: dict, before: str) -> str:
        """The answer so far."""
        if self.api == "sglang":
            return str(event["text"])
        piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
        return before + (piece or "")

    def close(self) -> None:
        with suppress(RuntimeError):
            asyncio.get_running_loop().create_task(self.client.aclose())


def messages(job: Job, template) -> list[dict]:
    """The dialogue of a prompt in OpenAI's form, images in their places."""
    request, found = job.request, []
    if system := system_text(request.prompt, template):
        found.append({"role": "system", "content": system})
    images = iter(zip(request.images or [], job.types, strict=True))
    for speaker, text in turns(request.prompt, template):
        parts = []
        for number, piece in enumerate(text.split(DEFAULT_IMAGE_TOKEN)):
            if number:
                data, kind = next(images)
                url = f"data:{kind};base64,{data}"
                parts.append({"type": "image_url", "image_url": {"url": url}})
            if piece.strip():
                parts.append({"type": "text", "text": piece.strip()})
        found.append({"role": ("user", "assistant")[speaker], "content": parts})
    return found


class Bounded:
    """A response as `httpx_sse` reads it; one with an event of over `CHUNK_BYTES` is given up."""

    def __init__(self, response: httpx.Response):
        self.response, self.headers, self.waiting = response, response.headers, 0

    async def aiter_text(self):
        async for text in self.response.aiter_text():
            self.waiting += len(text)
            if self.waiting > CHUNK_BYTES:
                raise ValueError("event too large")
            yield text


async def events(response: httpx.Response):
    """The JSON objects of a stream of server-sent events, up to `[DONE]`."""
    source = Bounded(response)
    async for event in EventSource(source).aiter_sse():
        source.waiting = 0
        if event.data == "[DONE]":
            return
        if event.data:
            yield event.json()


def base_url(endpoint: str) -> str:
    """`endpoint` as it is before the paths of its protocol: a /v1 at its end is one of them."""
    return endpoint.rstrip("/").removesuffix("/v1")


def key_headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def served_model(endpoint: str, api: str, key: str | None = None) -> str:
    """Name of the model that the server says it serves. ValueError when it does not say."""
    return get_model_name_from_path(served_path(endpoint, api, key))


def served_path(endpoint: str, api: str, key: str | None = None) -> str:
    """Folder or name of that model, as seen from the server."""
    paths = ("/get_model_info", "/model_info") if api == "sglang" else ("/v1/models",)
    for path in paths:
        with suppress(httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
            reply = httpx.get(
                base_url(endpoint) + path,
                headers=key_headers(key),
                timeout=CONNECT_SECONDS,
                trust_env=False,
            )
            if reply.status_code == 200 and len(reply.content) <= STATUS_BYTES:
                known = reply.json()
                path = known["model_path"] if api == "sglang" else known["data"][0]["id"]
                return str(path)
    raise ValueError(f"{endpoint} does not say what it serves: is it running? Or pass --model-name")


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    add_service_args(parser)
    parser.add_argument("--sgl-endpoint", required=True, help="address of the server")
    parser.add_argument(
        "--api", choices=("sglang", "openai"), default="sglang", help="what the server speaks"
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="file with the server's secret")
    return parser


def load_forwarder(args) -> Forwarder:
    endpoint = checked_address(args.sgl_endpoint, "--sgl-endpoint")
    if args.api_key_file == "":
        raise ValueError("--api-key-file is empty: name a file, or leave the option out")
    key = Path(args.api_key_file).read_text().strip() if args.api_key_file else None
    path = model_at(endpoint, args.api, key, args.model_name)
    own = get_model_name_from_path(path)
    # The folder is asked where this machine has it, too; a name alone says less.
    choice = checkpoint_conv_mode(path if os.path.isdir(path) else None, None, own)
    announce(choice)
    name = args.model_name or own
    return Forwarder(
        endpoint,
        name,
        args.api,
        key,
        conv_mode=choice.name,
        served=path,
        at_once=concurrency(args),
    )


def model_at(endpoint: str, api: str, key: str | None, given: str | None) -> str:
    """Folder or name of the server's model; `given`, what clients call it, where the server goes by
    it or does not say. (With OpenAI's protocol a request names the model.)"""
    if given and api == "openai":
        return given
    try:
        return served_path(endpoint, api, key)
    except ValueError:
        if not given:
            raise
        return given


@errors_as_messages()
def main() -> None:
    run_worker(build_parser().parse_args(), load_forwarder)


if __name__ == "__main__":
    main()
