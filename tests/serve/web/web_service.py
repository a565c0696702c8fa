"""A controller with one worker in a thread, for tests of the web page: no model, set answers.

What the worker does depends on a word in the question: "slow" (20 pieces, 0.8 s each), "held" (20
pieces, the fourth one as soon as the test sets `released`), "crash" (the connection breaks in the
middle), "broken" (an error chunk), "full" (503), else ten words.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

MODEL = "llava-v1.5-fake"
GRID, LAYERS = 6, 8
DENSE = GRID * GRID
METHODS = [
    {
        "name": "none",
        "options": {},
        "available": True,
        "reason": None,
        "about": "all tokens stay",
        "acts": "nowhere",
        "trained": False,
    },
    {
        "name": "vispruner",
        "options": {"visual_token_num": 9, "important_ratio": 0.5, "seed": None},
        "available": True,
        "reason": None,
        "place": "first",
        "about": "the patches with the most attention",
        "acts": "before",
        "trained": False,
        "counts": "every layer",
    },
    {
        "name": "fastv",
        "options": {"visual_token_num": 12, "layer": None},
        "available": True,
        "reason": None,
        "place": "second",
        "about": "what the last token looks at",
        "acts": "inside",
        "trained": False,
        "counts": "later layers",
        "from_layer": 2,
    },
    {
        "name": "glimpseprune",
        "options": {"visual_token_num": None},
        "available": True,
        "reason": None,
        "place": None,
        "about": "a learned token decides",
        "acts": "both",
        "trained": True,
        "counts": "at most",
    },
    {
        "name": "twigvlm",
        "options": {"visual_token_num": 12},
        "available": False,
        "reason": "its trained part is missing <b>here</b>.",
        "about": "a small branch decides",
        "acts": "inside",
        "trained": True,
        "counts": "average",
    },
]


class FakeService:
    """
    bodies:   what was asked
    ended:    how answers ended ("done" or "left")
    released: set by a test: answers to "held" go on
    """

    def __init__(self):
        self.url = ""
        self.models: list[str] = [MODEL]
        self.methods: list[dict] | None = METHODS
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.ended: list[str] = []
        self.released = threading.Event()
        self.app = self._app()

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/refresh_all_workers")
        async def refresh():
            return None

        @app.post("/list_models")
        async def models():
            return {"models": self.models}

        @app.post("/get_worker_address")
        async def address(request: Request):
            model = (await request.json())["model"]
            return {"address": self.url if model in self.models else ""}

        @app.post("/worker_get_status")
        async def status():
            known = {} if self.methods is None else {"pruning_methods": self.methods}
            known = known and {**known, "num_patches": DENSE}
            return {"model_names": self.models, "speed": 1, "queue_length": 0, **known}

        @app.post("/worker_generate_stream")
        async def generate(request: Request):
            body = await request.json()
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            if "full" in body["prompt"]:
                refusal = {"text": "All slots are taken.", "error_code": 1, "cause": "busy"}
                return Response(json.dumps(refusal).encode() + b"\0", 503)
            return StreamingResponse(self._answer(body))

        @app.exception_handler(Exception)
        async def failed(request, error):
            return JSONResponse({}, 500)

        return app

    async def _answer(self, body: dict):
        prompt, text = body["prompt"], ""
        asked = prompt.rsplit("USER:", 1)[-1]
        held = "held" in asked
        pause, words = (0.8, 20) if "slow" in asked else (0.01, 20 if held else 10)
        end = "left"
        try:
            for number in range(words):
                text += f"word{number} "
                yield _chunk({"text": prompt + text, "error_code": 0})
                await asyncio.sleep(pause)
                while held and number == 2 and not self.released.is_set():
                    await asyncio.sleep(0.1)
                    yield _chunk({"text": prompt + text, "error_code": 0})
                if number == 3 and "crash" in asked:
                    raise RuntimeError("the worker dies")
                if number == 3 and "broken" in asked:
                    sentence = "The GPU has too little memory left for this image."
                    yield _chunk({"text": sentence, "error_code": 1, "cause": "out_of_memory"})
                    return
            yield _chunk(
                {"text": prompt + text, "error_code": 0, "pruning_report": make_report(body)}
            )
            end = "done"
        finally:
            self.ended.append(end)


def make_report(body: dict) -> dict | None:
    """What a worker reports for a request."""
    if not body.get("images"):
        return None
    pruning = body.get("pruning") or {"method": "none", "visual_token_num": None}
    method, count = pruning["method"], pruning["visual_token_num"] or DENSE
    late = method.endswith("fastv")  # drops inside the decoder
    early = DENSE if late else count
    if "+" in method:
        early = pruning["options"]["vispruner_visual_token_num"]
        count = pruning["options"]["fastv_visual_token_num"]
    kept = list(range(0, DENSE, DENSE // early))[:early]
    layers = [[2, kept[:count]]] if late else []
    per_layer = [early if layer < 2 else count for layer in range(LAYERS)]
    return {
        "method": method,
        "grid": [[GRID, GRID]],
        "images": [{"kept": kept, "total": DENSE, "layers": layers}],
        "tokens_per_layer": per_layer,
        "dense_tokens": DENSE,
        "prefill_seconds": 0.001 * sum(per_layer),
        "kv_bytes": 1000 * sum(per_layer),
        "dense_kv_bytes": 1000 * DENSE * LAYERS,
        "importance": [list(range(DENSE))] if method == "vispruner" else None,
    }


def _chunk(chunk: dict) -> bytes:
    return json.dumps(chunk).encode() + b"\0"


@contextmanager
def running(service: FakeService):
    """Serves `service` on a free loopback port inside the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(service.app, port=port, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    service.url = f"http://127.0.0.1:{port}"
    try:
        yield service
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
