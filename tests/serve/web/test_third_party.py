"""The demo offers and runs a method of an installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("gradio")

import httpx  # noqa: E402

from llava import playground  # noqa: E402
from tests.paths import ROOT  # noqa: E402
from tests.pruning.packages import install_example  # noqa: E402
from tests.serve.serve_tools import free_port  # noqa: E402

SESSION = "visitor"


class Visitor:
    """Somebody at the page, by its own requests; values: what the components hold."""

    def __init__(self, client: httpx.Client):
        self.client, self.config = client, client.get("/config").json()
        self.ids = {one["props"].get("elem_id"): one["id"] for one in self.config["components"]}
        self.props = {one["id"]: one["props"] for one in self.config["components"]}

    def event_of(self, name: str, trigger: str) -> dict:
        target = [self.ids[name], trigger]
        events = [e for e in self.config["dependencies"] if e["backend_fn"]]
        return next(e for e in events if target in e["targets"])

    def choose(self, name: str, value) -> None:
        self.props[self.ids[name]]["value"] = value

    def upload(self, path: str) -> dict:
        with open(path, "rb") as file:
            stored = self.client.post("/gradio_api/upload", files={"files": file})
        return {"path": stored.json()[0], "meta": {"_type": "gradio.FileData"}}

    def fire(self, event: dict) -> str:
        """What the page sends back, which `props` follow."""
        data = [self.props[one].get("value") for one in event["inputs"]]
        body = {"fn_index": event["id"], "data": data, "session_hash": SESSION}
        joined = self.client.post("/gradio_api/queue/join", json=body)
        assert joined.status_code == 200, joined.text
        told = ""
        with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={SESSION}") as reply:
            for line in reply.iter_lines():
                told += line
                if "process_completed" in line:
                    break
        message = json.loads(line.removeprefix("data:"))
        assert message["success"], told
        for one, new in zip(event["outputs"], message["output"].get("data", []), strict=False):
            if isinstance(new, dict) and new.get("__type__") == "update":
                self.props[one] |= new
            else:
                self.props[one]["value"] = new
        return told


@pytest.mark.slow
@pytest.mark.skipif(
    not (playground.ROOT / playground.CHECKPOINT / "config.json").is_file(),
    reason="needs the playground checkpoint",
)
def test_the_page_offers_a_method_of_a_package_and_the_worker_answers_with_it(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "llava.serve.demo", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, **install_example(tmp_path)}
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        while "The demo is at" not in (line := running.stdout.readline()):
            assert line, "the demo ended"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            visitor = Visitor(client)
            dependencies = visitor.config["dependencies"]
            load = next(e for e in dependencies if e["targets"][0][1] == "load")
            visitor.fire(load)
            (offer,) = [e for e in dependencies if e["trigger_after"] == load["id"]]
            visitor.fire(offer)
            menu = visitor.props[visitor.ids["chat-method"]]
            assert "uniform" in [name for _, name in menu["choices"]]
            visitor.choose("chat-method", "uniform")
            visitor.fire(visitor.event_of("chat-method", "input"))
            visitor.choose("chat-budget", 32)
            visitor.choose("question", "What color is the ring?")
            visitor.choose("image", visitor.upload(playground.default_image()))
            assert "layer 0: 32 of 576 tokens" in visitor.fire(visitor.event_of("send", "click"))
            (phase,) = [props for props in visitor.props.values() if props.get("label") == "phase"]
            phase["value"] = "2"
            visitor.choose("question", "What color is the ring?")
            told = visitor.fire(visitor.event_of("send", "click"))
            assert "phase (2.0) must be at least 0 and below 1" in told
    finally:
        running.terminate()
        running.wait(60)
