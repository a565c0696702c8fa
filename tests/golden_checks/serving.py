"""Recorded conversations with controller and worker.

Where the release hides a cause (one text for every failure, status 200) or fails (a request without
`stop`, a second chunk after "no worker"), ours says the cause and answers; the error codes agree.
"""

import asyncio
import base64
import json
import re
import time

import httpx

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.pruning import build_pruner
from tests.golden_cases import load_json, locate
from tests.golden_checks.models import load_checkpoint

#: how a very long prompt was abbreviated: ... (+4200 x " the")
REPEATED = re.compile(r'\.\.\. \(\+(\d+) x "(.*)"\)$')


def check_serving(case, folder, report):
    """Both dispatch methods of the controller, then every request to the worker."""
    content = load_json(case, folder)
    for method in ("shortest_queue", "lottery"):
        report.prefix = f"controller, {method}: "
        asyncio.run(check_controller(content[f"controller_{method}"], method, report))
    asyncio.run(check_worker(case, folder, content["worker"], report))
    report.prefix = ""


async def check_controller(steps, method, report):
    from llava.serve.addresses import WorkerAddresses, WorkerClient
    from llava.serve.controller import Controller, controller_app
    from llava.serve.dispatch import WorkerTable

    table = WorkerTable(method)
    nobody = httpx.MockTransport(lambda request: httpx.Response(500))
    bodies = [step["body"] for step in steps if step.get("post") == "/register_worker"]
    workers = [body["worker_name"].removeprefix("http://") for body in bodies]
    controller = Controller(table, WorkerAddresses(workers), WorkerClient(transport=nobody))
    async with open_client(controller_app(controller)) as client:
        for step in steps:
            if "post" in step:
                await check_post(step, client, report)
            elif "state" in step:
                report.equal("state", state_of(table), step["state"])
            else:
                for text in step["after_expiry_of"]:
                    worker = table.workers[text.split()[0]]
                    worker.last_heart_beat = time.monotonic() - CONTROLLER_HEART_BEAT_EXPIRATION - 1
                table.drop_silent()
                report.equal("workers left", list(table.workers), step["workers_left"])


def open_client(app):
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)


def state_of(table) -> dict:
    return {
        address: {
            "queue_length": worker.queue_length,
            "speed": worker.speed,
            "models": worker.model_names,
            "check_heart_beat": worker.check_heart_beat,
        }
        for address, worker in table.workers.items()
    }


async def check_post(step, client, report):
    reply = await client.post(step["post"], json=step["body"])
    name = f"{step['post']} {step['body']}"
    if "raw" in step:
        chunks, recorded = chunks_of(reply.content), chunks_of(step["raw"].encode())
        report.equal(
            f"{name}: codes", [c["error_code"] for c in chunks], [recorded[0]["error_code"]]
        )
        report.equal(f"{name}: status", reply.status_code, 503)
        return
    report.equal(f"{name}: status", reply.status_code, step["status"])
    answer = reply.json()
    if "response_sorted" in step:
        report.equal(name, sorted(answer["models"]), step["response_sorted"])
    else:
        report.equal(name, answer, step["response"])


def chunks_of(body: bytes) -> list[dict]:
    """The JSON objects of a stream, each ended by a null byte."""
    *chunks, rest = body.split(b"\0")
    if rest:
        raise ValueError("the stream does not end with a null byte")
    return [json.loads(chunk) for chunk in chunks]


async def check_worker(case, folder, rows, report):
    from llava.serve.engine import Engine
    from llava.serve.worker_app import Places, worker_app

    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder)
    engine = Engine(tokenizer, model, processor, case["checkpoint"])
    end_mark = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = -1  # as recorded: an ordinary token
    try:
        async with open_client(worker_app(engine, Places(5))) as client:
            for row in rows:
                report.prefix = f"worker, {row['name']}: "
                if row["name"] == "status":
                    status = (await client.post("/worker_get_status")).json()
                    ours = {key: status[key] for key in row["response"]}
                    report.equal("status", ours, row["response"])
                else:
                    await check_stream(row, folder, client, report)
    finally:
        model.generation_config.eos_token_id = end_mark
        model.pruner = build_pruner("none")
        engine.close()


async def check_stream(row, folder, client, report):
    body = request_body(row["request"], folder)
    reply = await client.post("/worker_generate_stream", json=body)
    chunks, recorded = chunks_of(reply.content), row["chunks"]
    if row["name"] == "no_stop":
        report.equal("codes", {chunk["error_code"] for chunk in chunks}, {0})
        report.true("no text", len(chunks) == body["max_new_tokens"] + 1)
    elif recorded[0]["error_code"]:
        report.equal("codes", codes(chunks), codes(recorded))
        report.equal("status", reply.status_code, 400)
    else:
        report.equal("content type", reply.headers.get("content-type"), row["content_type"])
        report.equal("status", reply.status_code, row["status"])
        report.equal("codes", codes(chunks), codes(recorded))
        for number, (ours, theirs) in enumerate(zip(chunks, recorded, strict=False)):
            text = theirs["text"]
            shown = (
                "..." + ours["text"][-len(text) + 3 :] if text.startswith("...") else ours["text"]
            )
            report.equal(f"chunk {number}", shown, text)


def codes(chunks) -> list[int]:
    return [chunk["error_code"] for chunk in chunks]


def request_body(request: dict, folder) -> dict:
    """The recorded request with what was abbreviated written out."""
    body = dict(request)
    if repeated := REPEATED.search(body["prompt"]):
        prompt = body["prompt"][: repeated.start()]
        body["prompt"] = prompt + int(repeated[1]) * repeated[2]
    if "images" in body:
        body["images"] = [image_text(name, folder) for name in body["images"]]
    return body


def image_text(name: str, folder) -> str:
    if not name.startswith("<b64:"):
        return name
    file = locate(name.removeprefix("<b64:").removesuffix(">"), folder)
    return base64.b64encode(file.read_bytes()).decode()
