"""A worker as a web application, whatever it answers with: endpoints, queue and heart beat."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from .errors import ServeError
from .heart_beat import HeartBeat
from .protocol import GenerateRequest
from .service import ChunkStream, FastAPI, Request, build_app, read, request_id_of


class Places:
    """Requests that are answered or wait for it, up to a number.

    changed: called whenever the number changes
    """

    def __init__(self, total: int):
        self.total, self.taken, self.changed = total, 0, lambda: None

    def take(self):
        """A function that gives the place back (once). Raises ServeError when there is none."""
        if self.taken >= self.total:
            raise ServeError("busy", "The worker is busy and its queue is full; try again soon.")
        self.taken += 1
        self.changed()
        given = False

        def give_back() -> None:
            nonlocal given
            if not given:
                given = True
                self.taken -= 1
                self.changed()

        return give_back


def worker_app(
    backend, places: Places, token: str | None = None, heart_beat: HeartBeat | None = None
) -> FastAPI:
    """The worker's endpoints.

    backend: has `model_name`, `status()` (keys of its own), `await prepare(request, request_id)`,
             which raises ServeError, `stream(job)`, an asynchronous generator of encoded chunks,
             and `close()`
    """

    def status() -> dict:
        return {
            "model_names": [backend.model_name],
            "speed": 1,
            "queue_length": places.taken,
            **backend.status(),
        }

    @asynccontextmanager
    async def lifespan(_):
        beating = None
        if heart_beat is not None:
            heart_beat.status, places.changed = status, heart_beat.nudge
            beating = asyncio.ensure_future(heart_beat.run())
        yield
        if beating is not None:
            beating.cancel()
            await heart_beat.leave()
        backend.close()

    app = build_app(token, lifespan)

    @app.post("/worker_get_status")
    async def worker_get_status():
        return status()

    @app.post("/worker_generate_stream")
    async def worker_generate_stream(request: Request):
        body = await read(request, GenerateRequest)
        give_back = places.take()
        try:
            job = await backend.prepare(body, request_id_of(request))
        except BaseException:
            give_back()
            raise
        return ChunkStream(backend.stream(job), on_close=give_back)

    return app
