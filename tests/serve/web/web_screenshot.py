"""Takes the pictures of the README and of docs/Serving.md from a running demo.

    python -m llava.serve.demo --port 7860                      # in another terminal
    python -m tests.serve.web.web_screenshot http://127.0.0.1:7860 images/demo.png
    python -m tests.serve.web.web_screenshot http://127.0.0.1:7860 images/demo_vllm.png chat

Needs chromium, chromedriver and selenium, as the browser test does.
"""

from __future__ import annotations

import base64
import io
import sys

from PIL import Image

from tests.serve.web.test_browser import Browser

WIDTH, HEIGHT = 1366, 768


def compare(browser: Browser, address: str) -> None:
    """Lets a method that keeps a number of tokens, and one that decides, answer the first
    example."""
    browser.open(address)
    browser.load_example()
    browser.tab("Compare")
    browser.find("#compare-question textarea")
    browser.choose("#left-method", "vispruner")
    browser.choose("#right-method", "glimpseprune")
    browser.until(lambda: browser.shows("right-own"), "the box")
    browser.click("#compare")
    browser.until(lambda: "dense" in browser.text("#right-panel"), "the right panel")
    browser.until(lambda: "measuring" not in browser.text("#right-panel"), "the dense time")


def chat(browser: Browser, address: str) -> None:
    """Lets the method chosen by default answer the first example."""
    browser.open(address)
    browser.load_example()
    browser.click("#send")
    browser.until(lambda: "dense" in browser.text("#insight"), "the report")
    browser.until(lambda: "measuring" not in browser.text("#insight"), "the dense time")


PICTURES = {"compare": compare, "chat": chat}


def whole_page(browser: Browser) -> Image.Image:
    size = browser.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    options = {"captureBeyondViewport": True, "clip": clip}
    shot = browser.driver.execute_cdp_cmd("Page.captureScreenshot", options)
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


def main(address: str, path: str, kind: str = "compare") -> None:
    browser = Browser(WIDTH, HEIGHT)
    try:
        PICTURES[kind](browser, address)
        terms = browser.find("#terms").rect["y"]
        picture = whole_page(browser).crop((55, 0, WIDTH - 55, int(terms) - 10))
    finally:
        browser.driver.quit()
    # Few enough colours to be small; the search for them keeps rare ones, such as the red ring.
    few = picture.quantize(256, Image.Quantize.MEDIANCUT, kmeans=4, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
