"""Takes the pictures of the README and of docs/Serving.md from a running demo.

    python -m llava.serve.demo --port 7860                      # in another terminal
    python -m tests.serve.web.web_screenshot http://127.0.0.1:7860 images/demo.png
    python -m tests.serve.web.web_screenshot http://127.0.0.1:7860 images/demo_vllm.png chat
    python -m tests.serve.web.web_screenshot http://127.0.0.1:7860 sweep.png sweep --phone --dark

Before and after a change of the page, look at every tab like that: wide, on a phone, and dark.
Needs chromium, chromedriver and selenium, as the browser test does.
"""

from __future__ import annotations

import argparse
import base64
import io

from PIL import Image

from tests.serve.web.test_browser import Browser

LAPTOP, PHONE = (1366, 768), (390, 844)
#: what is left out beside the page of a laptop
MARGIN = 55


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


def sweep(browser: Browser, address: str) -> None:
    """Lets the method chosen by default answer the first example at every budget."""
    browser.open(address)
    browser.load_example()
    browser.tab("Sweep")
    browser.click("#sweep")
    browser.until(lambda: "down to" in browser.text("#sweep-panel"), "what the sweep found")


PICTURES = {"compare": compare, "chat": chat, "sweep": sweep}


def whole_page(browser: Browser) -> Image.Image:
    size = browser.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    scale = 1 / browser.driver.execute_script("return devicePixelRatio")  # 2 on a phone
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": scale}
    options = {"captureBeyondViewport": True, "clip": clip}
    shot = browser.driver.execute_cdp_cmd("Page.captureScreenshot", options)
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address", help="of the demo")
    parser.add_argument("path", help="of the picture")
    parser.add_argument("kind", nargs="?", choices=PICTURES, default="compare")
    parser.add_argument("--phone", action="store_true", help="as a phone shows it")
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    args = parser.parse_args()
    width, height = PHONE if args.phone else LAPTOP
    browser = Browser(width, height, args.phone)
    try:
        PICTURES[args.kind](browser, args.address + "/?__theme=dark" * args.dark)
        terms = browser.find("#terms").rect["y"]
        edge = 0 if args.phone else MARGIN
        picture = whole_page(browser).crop((edge, 0, width - edge, int(terms) - 10))
    finally:
        browser.driver.quit()
    # Few enough colours to be small; the search for them keeps rare ones, such as the red ring.
    few = picture.quantize(256, Image.Quantize.MEDIANCUT, kmeans=4, dither=Image.Dither.NONE)
    few.save(args.path, optimize=True)


if __name__ == "__main__":
    main()
