"""Knows the workers, and says which one a request should go to.

    python -m llava.serve.controller --host localhost --port 10000

Listens on loopback unless told otherwise. On a network it needs a token, and the workers that may
register must be named: --allow-worker HOST:PORT.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from contextlib import aclosing, asynccontextmanager, suppress

from ..errors import errors_as_messages
from ..program_parser import ProgramParser
from .service import (
    ChunkStream,
    FastAPI,
    Request,
    build_app,
    read,
    read_bytes,
    request_id_of,
    serve,
    set_up_logging,
)

import httpx  # isort: skip  # after `service`, which names the missing extra

from ..constants import CONTROLLER_HEART_BEAT_EXPIRATION
from ..network import is_loopback
from .addresses import WorkerAddresses, WorkerClient, normal
from .auth import add_token_arg, check_exposure, read_token
from .dispatch import METHODS, WorkerTable
from .errors import SEPARATOR, ServeError, encode_chunk
from .limits import CHUNK_BYTES, STATUS_BYTES
from .protocol import HeartBeat, ModelRequest, RegisterRequest, WorkerName, WorkerStatus, parse

STATUS_SECONDS = 5.0
PROBE_SECONDS = 2.0
SILENCE_SECONDS = 120.0  # a worker that sends nothing for so long is given up
TRIES = 3  # workers that are tried when one cannot be reached

logger = logging.getLogger(__name__)


class Controller:
    """The table of workers and what is done with it.

    allowed: addresses that may register
    client:  how workers are asked
    """

    def __init__(self, table: WorkerTable, allowed: WorkerAddresses, client: WorkerClient):
        self.table, self.allowed, self.client = table, allowed, client
        self._refreshing: asyncio.Task | None = None

    async def status_of(self, address: str, seconds: float = STATUS_SECONDS) -> WorkerStatus | None:
        """What a worker says about itself; None when it says nothing sensible."""
        try:
            reply = await self.client.ask(
                address, "/worker_get_status", seconds, most_bytes=STATUS_BYTES
            )
            return parse(WorkerStatus, reply)
        except (httpx.HTTPError, ServeError) as error:
            logger.warning("worker %s gives no status: %s", address, type(error).__name__)
            return None

    async def register(self, request: RegisterRequest, caller: str) -> None:
        """Adds a worker, or raises ServeError. A worker that does not say its status is asked.

        caller: address of the machine that asks
        """
        address = self.allowed.check(request.worker_name, here=is_loopback(caller))
        status = request.worker_status or await self.status_of(address)
        if status is None:
            raise ServeError(
                "no_worker",
                "No worker gives its status at this address, so it was not registered: is it "
                "running, with the same token as the controller?",
            )
        self.table.register(address, status, request.check_heart_beat)
        logger.info("registered %s: %s", address, status.model_names)

    async def refresh(self) -> None:
        """Asks all workers anew, all at once; callers at the same time share one round."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(self._refresh())
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        before = dict(self.table.workers)
        replies = await asyncio.gather(*map(self.status_of, before))
        for (address, worker), status in zip(before.items(), replies, strict=True):
            if status is None:
                if self.table.workers.get(address) is worker:  # not registered again since
                    self.table.drop(address)
            else:
                self.table.register(address, status, worker.check_heart_beat)

    async def summary(self) -> dict:
        """The status of all workers together, as if they were one."""
        replies = await asyncio.gather(*map(self.status_of, list(self.table.workers)))
        found = [status for status in replies if status is not None]
        return {
            "model_names": sorted({name for status in found for name in status.model_names}),
            "speed": sum(status.speed for status in found),
            "queue_length": sum(status.queue_length for status in found),
        }

    async def probe(self, address: str) -> bool:
        """Whether a registered worker answers; one that does not is dropped."""
        if address not in self.table.workers:
            return False
        worker = self.table.workers[address]
        alive = await self.status_of(address, PROBE_SECONDS) is not None
        if not alive and self.table.workers.get(address) is worker:
            self.table.drop(address)
            logger.warning("dropped %s: it does not answer", address)
        return alive

    async def forward(self, model: str, body: bytes, request_id: str) -> ChunkStream:
        """The answer of a worker for `model`; another one is asked when it cannot be reached."""
        for _ in range(TRIES):
            address = self.table.choose(model)
            if address is None:
                break
            reply = self.client.post(
                address, "/worker_generate_stream", body, SILENCE_SECONDS, request_id
            )
            try:
                response = await reply.__aenter__()
            except (httpx.ConnectError, httpx.ConnectTimeout):
                self.table.drop(address)
                logger.warning("dropped %s: no connection", address)
                continue
            except httpx.HTTPError:
                await self.probe(address)
                raise worker_died() from None
            if 300 <= response.status_code < 400:
                await reply.__aexit__(None, None, None)
                raise worker_died()
            chunks = self._chunks(reply, response, address, request_id)
            return ChunkStream(chunks, response.status_code)
        raise ServeError(
            "no_worker",
            "No worker serves this model right now. Start one, or choose another model.",
        )

    async def _chunks(self, reply, response, address: str, request_id: str):
        """The complete chunks of a reply, and a last one that says so when it breaks off."""
        rest, ended = b"", False
        try:
            async with aclosing(response.aiter_raw()) as pieces:
                async for piece in pieces:
                    whole, separator, rest = (rest + piece).rpartition(SEPARATOR)
                    if len(rest) > CHUNK_BYTES:
                        raise httpx.HTTPError("chunk too large")
                    if separator:
                        yield whole + separator
            ended = True
        except httpx.HTTPError as error:
            logger.warning("%s broke off: %s", address, type(error).__name__)
        finally:
            with suppress(httpx.HTTPError):
                await reply.__aexit__(None, None, None)
        if not ended or rest:
            await self.probe(address)
            yield encode_chunk(worker_died().chunk(request_id))


def worker_died() -> ServeError:
    return ServeError(
        "worker_died",
        "The worker stopped while it was answering. Send the request again: it will "
        "go to another worker, if there is one.",
    )


async def drop_silent_workers(table: WorkerTable) -> None:
    while True:
        await asyncio.sleep(CONTROLLER_HEART_BEAT_EXPIRATION)
        for address in table.drop_silent():
            logger.warning("dropped %s: no heart beat", address)


def controller_app(controller: Controller, token: str | None = None) -> FastAPI:
    """The controller's endpoints."""

    @asynccontextmanager
    async def lifespan(_):
        watch = asyncio.ensure_future(drop_silent_workers(controller.table))
        yield
        watch.cancel()
        await controller.client.close()

    app = build_app(token, lifespan)

    @app.post("/register_worker")
    async def register_worker(request: Request):
        caller = request.client.host if request.client else ""
        await controller.register(await read(request, RegisterRequest), caller)

    @app.post("/refresh_all_workers")
    async def refresh_all_workers():
        await controller.refresh()

    @app.post("/list_models")
    async def list_models():
        return {"models": controller.table.models()}

    @app.post("/get_worker_address")
    async def get_worker_address(request: Request):
        body = await read(request, ModelRequest)
        return {"address": controller.table.choose(body.model) or ""}

    @app.post("/receive_heart_beat")
    async def receive_heart_beat(request: Request):
        body = await read(request, HeartBeat)
        return {"exist": controller.table.beat(normal(body.worker_name), body.queue_length)}

    @app.post("/report_worker")
    async def report_worker(request: Request):
        """A client says that a worker failed; it is asked, and dropped if it is gone."""
        body = await read(request, WorkerName)
        return {"alive": await controller.probe(normal(body.worker_name))}

    @app.post("/worker_generate_stream")
    async def worker_generate_stream(request: Request):
        body = await read_bytes(request)
        return await controller.forward(
            parse(ModelRequest, body).model, body, request_id_of(request)
        )

    @app.post("/worker_get_status")
    async def worker_get_status():
        return await controller.summary()

    return app


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    parser.add_argument("--host", default="localhost", help="address to listen on")
    parser.add_argument("--port", type=int, default=21001, help="port to listen on")
    parser.add_argument(
        "--dispatch-method",
        choices=METHODS,
        default="shortest_queue",
        help="which of the workers of a model gets a request",
    )
    parser.add_argument(
        "--allow-worker",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="a worker beyond loopback that may register, as it calls itself; repeatable",
    )
    parser.add_argument("--log-dir", metavar="DIR", help="also log to DIR/controller.log")
    add_token_arg(parser)
    return parser


@errors_as_messages()
def main() -> None:
    args = build_parser().parse_args()
    token = read_token(args.token_file)
    check_exposure(args.host, token)
    set_up_logging("controller.log", args.log_dir)
    controller = Controller(
        WorkerTable(args.dispatch_method), WorkerAddresses(args.allow_worker), WorkerClient(token)
    )
    serve(controller_app(controller, token), args.host, args.port)


if __name__ == "__main__":
    main()
