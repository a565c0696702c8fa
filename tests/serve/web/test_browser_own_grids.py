"""The page in a real browser, with a real worker whose images have grids of their own.

Runs where chromium and selenium are installed.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("gradio")
pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.by import By  # noqa: E402

from tests.paths import GOLDEN, ROOT  # noqa: E402
from tests.serve.serve_tools import free_port  # noqa: E402
from tests.serve.web.test_browser import IN_BROWSER, Browser  # noqa: E402

MODEL = "tests/golden/tiny-qwen2.5-vl-cut"
#: file -> (rows, columns) of its tokens
IMAGES = {"img1_640x360.png": (13, 23), "img2_300x480.png": (17, 11)}
SHARE = 0.222

pytestmark = IN_BROWSER


@pytest.fixture(scope="module")
def address():
    port = free_port()
    command = [sys.executable, "-m", "llava.serve.demo", "--port", str(port), "--device", "cpu"]
    running = subprocess.Popen(
        [*command, "--model-path", MODEL], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        while "The demo is at" not in (line := running.stdout.readline()):
            assert line, "the demo ended"
        yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(60)


@pytest.fixture(scope="module")
def page(address):
    browser = Browser(1366, 900)
    browser.open(address)
    browser.click("#parameters button")
    box = browser.find("input[aria-label='number input for Max output tokens']")
    box.clear()
    box.send_keys("8\t")
    yield browser
    browser.driver.quit()


def give(page: Browser, name: str) -> None:
    """Puts an image of its own in place of the one that is there."""
    page.driver.execute_script("document.querySelector('#image button[aria-label=Clear]')?.click()")
    entry = page.until(
        lambda: page.driver.find_elements(By.CSS_SELECTOR, "#image input[type=file]"), "a place"
    )[0]
    entry.send_keys(str(GOLDEN / "images" / name))
    page.find("#image img")


def see(page: Browser, kept: int, name: str) -> None:
    """Waits for the numbers of an answer, and looks at the overlay on the image."""
    rows, columns = IMAGES[name]
    said = f"Visual tokens\n{kept}\ndense {rows * columns}\n"
    page.until(lambda: page.text("#insight").startswith(said), "the image's own numbers")
    page.until(lambda: "ms\ndense" in page.text("#insight"), "the dense time")
    picture = page.find("#insight .pv-pane img")
    sides = page.driver.execute_script(
        "return [arguments[0].naturalHeight, arguments[0].naturalWidth]", picture
    )
    assert sides[0] / sides[1] == pytest.approx(rows / columns, rel=0.1)


def value(page: Browser, selector: str) -> float:
    return float(page.find(f"{selector} input[type=number]").get_attribute("value"))


@pytest.mark.parametrize("name", IMAGES)
def test_a_share_is_that_of_the_image_and_the_overlay_has_its_grid(page, name):
    rows, columns = IMAGES[name]
    give(page, name)
    assert "Share of an image's tokens" in page.text("#chat-budget")
    assert value(page, "#chat-budget") == 100 * SHARE
    page.ask("What is it?")
    see(page, round(SHARE * rows * columns), name)


def test_a_number_may_be_chosen_instead_and_another_method_starts_with_its_share(page):
    name = next(iter(IMAGES))
    give(page, name)
    page.click("#chat-shares input")
    page.until(lambda: "Visual tokens per image" in page.text("#chat-budget"), "the number")
    box = page.find("#chat-budget input[type=number]")
    box.clear()
    box.send_keys("20\t")
    page.ask("What is it?")
    see(page, 20, name)
    page.choose("#chat-method", "divprune")
    page.until(lambda: "Share of an image's tokens" in page.text("#chat-budget"), "the share")


def test_two_methods_are_compared_on_one_image(page):
    name = next(iter(IMAGES))
    whole = IMAGES[name][0] * IMAGES[name][1]
    give(page, name)
    page.driver.find_element(By.XPATH, "//button[@role='tab'][contains(., 'Compare')]").click()
    box = page.find("#compare-question textarea")
    box.clear()
    box.send_keys("What is it?")
    page.click("#compare")
    page.until(lambda: f"dense {whole}" in page.text("#right-panel"), "the right panel")
    assert f"Visual tokens\n{round(SHARE * whole)}" in page.text("#right-panel")
    assert f"Visual tokens\n{whole}" in page.text("#left-panel")
