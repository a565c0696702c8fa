"""The page of answers in a real browser (Debian's chromium, by the WebDriver protocol): steps, a
condition, a jump, and files that it does not hand out."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import requests

pytest.importorskip("gradio")

from llava.eval.browse.program import build_parser, launch  # noqa: E402
from tests.eval.browse.test_browse import pair_of  # noqa: E402
from tests.ports import free_port  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--disable-dev-shm-usage", "--window-size=1400,1200"]
SECONDS = 120  # patience costs nothing where all goes well
ENTER = "\ue007"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


class Tab:
    """One page in a browser of its own."""

    def __init__(self, address: str):
        port = free_port()
        self.driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        until(lambda: self._answers("/status"), "the driver")
        options = {"binary": CHROMIUM, "args": FLAGS}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.url += f"/session/{self.post('/session', wanted)['sessionId']}"
        self.post("/url", {"url": address})

    def _answers(self, path: str) -> bool:
        try:
            return requests.get(self.url + path, timeout=5).ok
        except requests.RequestException:
            return False

    def post(self, path: str, body: dict):
        return requests.post(self.url + path, json=body, timeout=SECONDS).json()["value"]

    def run(self, script: str):
        return self.post("/execute/sync", {"script": script, "args": []})

    def write(self, selector: str, text: str) -> None:
        found = self.post("/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self.post(f"/element/{element}/clear", {})
        self.post(f"/element/{element}/value", {"text": text + ENTER})

    def shows(self, count: str) -> None:
        script = "return (document.querySelector('#count') || {}).innerText"
        until(lambda: (self.run(script) or "").strip() == count, count)

    def close(self) -> None:
        requests.delete(self.url, timeout=SECONDS)
        self.driver.terminate()


def until(condition, what: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


def test_steps_conditions_and_jumps_work_and_no_file_is_handed_out(tmp_path):
    _, paths = pair_of(tmp_path)
    argv = [*map(str, paths), "--port", str(free_port())]
    blocks, address = launch(build_parser().parse_args(argv))
    tab = Tab(address)
    try:
        tab.shows("1 of 3")
        tab.run("document.querySelector('#next').click()")
        tab.shows("2 of 3")
        tab.run("document.querySelector('#next').click()")
        tab.shows("3 of 3")
        tab.run("document.querySelector('#back').click()")
        tab.shows("2 of 3")
        tab.write("#number input", "3")
        tab.shows("3 of 3")
        tab.write("#condition textarea, #condition input", "ratio < 0.5 and iou < 1")
        tab.shows("1 of 3 of 3 questions")
        tab.write("#condition textarea, #condition input", "iou > 0.99")
        tab.shows("none of 3 questions")
        for name in ("/etc/passwd", paths[0], Path(__file__)):
            assert requests.get(f"{address}gradio_api/file={name}", timeout=30).status_code == 403
    finally:
        tab.close()
        blocks.close(verbose=False)
