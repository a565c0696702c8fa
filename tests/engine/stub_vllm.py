"""A local server that speaks the part of vLLM's protocol that is used, with a model of this package
in the place of vLLM's."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer

import torch

from tests.local_server import JSONHandler, running

NAME = "stub"
NO_FLAG = "You must set `--enable-prompt-embeds` to input `prompt_embeds`."


class StubVLLM(ThreadingHTTPServer):
    """
    model:     answers prompts greedily, one token at a time
    takes_embeddings, sends_ids: False as servers without the flag, and old ones, do
    root:      where it says its model was loaded from
    positions: as with --max-model-len
    pause:     seconds before every token
    together:  answers begin once so many have been under way at the same time
    die_after: tokens after which an answer breaks off, with its connection
    die_after_requests: requests after which all answers do so at once
    broken:    all answers have status 500
    meddle:    tokens of an answer -> those that are sent
    requests:  bodies of what was asked for, in order; paths and headers likewise
    most:      answers that were under way at the same time; ended: that ended before their end;
               made: tokens of all answers
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model, **settings):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.root, self.positions = model, None, 2048
        self.takes_embeddings = self.sends_ids = True
        self.pause, self.together, self.die_after, self.meddle = 0.0, 0, None, None
        self.die_after_requests, self.broken = None, False
        self.requests, self.headers, self.paths = [], [], []
        self.most = self.under_way = self.ended = self.made = 0
        self.lock = threading.Lock()
        for name, value in settings.items():
            assert hasattr(self, name)
            setattr(self, name, value)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @torch.inference_mode()
    def tokens(self, body: dict) -> Iterator[tuple[int, float]]:
        """(id, logarithm of its probability) of an answer, one by one."""
        table = self.model.get_input_embeddings()
        if text := body.get("prompt_embeds"):
            embeds = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)[None]
        else:
            embeds = table(torch.tensor([body["prompt"]]))
        cache = None
        wait_until(lambda: self.most >= self.together, 300)
        for _ in range(min(body["max_tokens"], self.positions - embeds.shape[1])):
            time.sleep(self.pause)
            with self.lock:
                out = self.model(
                    inputs_embeds=embeds,
                    past_key_values=cache,
                    use_cache=True,
                    last_logits_only=True,
                )
                self.made += 1
            logits, cache = out.logits[0, -1], out.past_key_values
            token = int(logits.argmax())
            yield token, float(logits.log_softmax(0)[token])
            if token in body["stop_token_ids"]:
                return
            embeds = table(torch.tensor([[token]]))


class Handler(JSONHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        card = {"id": NAME, "root": self.server.root, "max_model_len": self.server.positions}
        found = {"/v1/models": {"data": [card]}, "/version": {"version": "0.0"}}
        if self.path in found:
            return self.send(200, found[self.path])
        self.send(404, {"error": {"message": "Not Found"}})

    def do_POST(self):
        server = self.server
        body = self.body()
        with server.lock:
            server.requests.append(body)
            server.paths.append(self.path)
            server.headers.append(dict(self.headers))
            server.under_way += 1
            server.most = max(server.most, server.under_way)
            most = server.die_after_requests
            dead = most is not None and len(server.requests) > most
        try:
            if dead:
                self.close_connection = True
            else:
                self.answer(body)
        except OSError:
            with server.lock:
                server.ended += 1
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, body: dict) -> None:
        server = self.server
        if server.broken:
            return self.send(500, {"error": {"message": "EngineCore encountered an issue."}})
        if body["model"] != NAME:
            return self.send(404, {"error": {"message": f"The model {body['model']} is unknown"}})
        if "prompt_embeds" in body and not server.takes_embeddings:
            return self.send(400, {"error": {"message": NO_FLAG, "code": 400}})
        if body.get("stream"):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        found, chances = [], []
        for token, chance in server.tokens(body):
            if len(found) == server.die_after:
                self.close_connection = True
                return
            found.append(token)
            chances.append(chance)
            if body.get("stream"):
                self.event({"choices": [self.choice([token], None)]})
        if server.meddle is not None:
            found = server.meddle(found)
        reason = "stop" if found and found[-1] in body["stop_token_ids"] else "length"
        if body.get("stream"):
            self.event({"choices": [self.choice([], reason)]})
            self.piece(b"data: [DONE]\n\n")
            return self.wfile.write(b"0\r\n\r\n")
        self.send(200, {"choices": [self.choice(found, reason, chances)]})

    def choice(self, ids: list[int], reason: str | None, chances=()) -> dict:
        own = {"index": 0, "text": "", "finish_reason": reason}
        own |= {"token_ids": ids} if self.server.sends_ids else {}
        return own | ({"logprobs": {"token_logprobs": list(chances)}} if chances else {})

    def event(self, value: dict) -> None:
        self.piece(f"data: {json.dumps(value)}\n\n".encode())

    def piece(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def stub_vllm(model, **settings):
    """Runs a server for the block; settings: attributes of `StubVLLM`."""
    return running(StubVLLM(model, **settings))


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()
