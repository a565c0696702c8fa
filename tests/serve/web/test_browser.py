"""The page in a real browser (Debian's chromium): an example, an answer, the patches, two methods.

Runs where chromium and selenium are installed.
"""

import shutil
import time

import pytest

pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")

from PIL import Image  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS = 180  # patience costs nothing where all goes well
PAUSE = 0.2  # between two looks, each of which keeps the page from its own work
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
)

#: marks of tests in a browser
IN_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]
pytestmark = IN_BROWSER


def name_in(line: str) -> str:
    """The method that a line of a menu is about, "fastv: how it chooses · where it acts"."""
    return line.partition(" · ")[0].partition(": ")[0]


class Browser:
    """One window; every look waits until what it looks for is there.

    downloads: folder for files that the page lets visitors download
    """

    def __init__(self, width: int, height: int, phone: bool = False, downloads: str = ""):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        if downloads:
            options.add_experimental_option("prefs", {"download.default_directory": downloads})
        if phone:
            metrics = {"width": width, "height": height, "pixelRatio": 2, "touch": True}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        service = webdriver.ChromeService(DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)

    def find(self, selector: str):
        def visible(driver):
            found = driver.find_elements(By.CSS_SELECTOR, selector)
            return next((element for element in found if element.is_displayed()), None)

        return WebDriverWait(self.driver, SECONDS, PAUSE).until(visible, f"no {selector}")

    def click(self, selector: str) -> None:
        element = self.find(selector)
        WebDriverWait(self.driver, SECONDS).until(lambda _: element.is_enabled())
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def until(self, condition, what: str):
        return WebDriverWait(self.driver, SECONDS, PAUSE).until(lambda _: condition(), what)

    def tab(self, name: str) -> None:
        self.driver.find_element(By.XPATH, f"//button[@role='tab'][contains(., '{name}')]").click()

    def errors(self) -> list[str]:
        """What the console said since the last call that a developer would have to look at."""
        entries = self.driver.get_log("browser")
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING")]

    def text(self, selector: str) -> str:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join()"
        return self.driver.execute_script(script, selector)

    def shows(self, name: str) -> bool:
        """Whether the element with that id is to be seen now."""
        script = "return document.getElementById(arguments[0])?.checkVisibility() ?? false"
        return self.driver.execute_script(script, name)

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.until(lambda: self.chosen("#chat-method") == "vispruner", "the menu of methods")

    def chosen(self, selector: str) -> str:
        """Name of the method that a menu shows."""
        return name_in(self.find(f"{selector} input").get_attribute("value"))

    def choose(self, selector: str, name: str) -> None:
        self.click(f"{selector} input")
        self.until(lambda: self.options(name), f"{name} in the menu")
        self.driver.execute_script(
            "arguments[0].dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))",
            self.options(name)[0],
        )
        self.until(lambda: self.chosen(selector) == name, f"{name} chosen")

    def options(self, name: str) -> list:
        found = self.driver.find_elements(By.CSS_SELECTOR, "ul[role=listbox] li")
        return [o for o in found if name_in(o.get_attribute("aria-label") or "") == name]

    def load_example(self) -> None:
        self.click("#examples button")
        self.until(lambda: self.find("#question textarea").get_attribute("value"), "the question")
        self.find("#image img")

    def ask(self, question: str) -> None:
        box = self.find("#question textarea")
        box.clear()
        box.send_keys(question)
        self.click("#send")


@pytest.fixture(scope="module")
def laptop(address):
    browser = Browser(1366, 768)
    yield browser
    browser.driver.quit()


@pytest.fixture
def page(laptop, address):
    laptop.open(address)
    return laptop


def test_an_example_is_asked_answered_and_shown(page):
    page.load_example()
    page.click("#send")
    page.until(lambda: "word9" in page.text("#chatbot .bot"), "the whole answer")
    page.until(lambda: "dense 288 ms" in page.text("#insight"), "the panel with dense times")
    assert "−75 %" in page.text("#insight") and "layers 0–7: 9" in page.text("#insight")
    picture = page.find("#insight .pv-pane img")
    script = "return arguments[0].naturalWidth"
    page.until(lambda: page.driver.execute_script(script, picture) == 560, "the overlay")
    page.click("#insight .pv-views label:nth-of-type(2)")
    page.until(lambda: not picture.is_displayed(), "the map of importance instead")


def test_text_arrives_piece_by_piece_and_stop_ends_it(page, fake):
    page.load_example()
    fake.released.clear()
    page.ask("held")
    page.until(lambda: "word1" in page.text("#chatbot .bot"), "the first words")
    assert "word19" not in page.text("#chatbot .bot")
    ended = len(fake.ended)
    page.click("#stop")
    page.until(lambda: "(stopped)" in page.text("#chatbot .bot"), "the mark of a stop")
    page.until(lambda: fake.ended[ended:] == ["left"], "the worker to be left")
    assert "word19" not in page.text("#chatbot .bot")
    fake.released.set()
    page.click("#regenerate")
    page.until(lambda: "word19" in page.text("#chatbot .bot"), "the whole answer")


def test_another_method_shows_its_layers(page):
    page.load_example()
    page.choose("#chat-method", "fastv")
    page.until(lambda: page.find("#chat-budget input").get_attribute("value") == "12", "its budget")
    page.click("#send")
    page.until(lambda: "from layer 2 on" in page.text("#insight"), "the stages")
    assert "layers 0–1: 36, layers 2–7: 12" in page.text("#insight")
    page.choose("#chat-method", "twigvlm (not available)")
    page.until(lambda: "trained part is missing" in page.text("#chat-note"), "the reason")


def test_a_second_method_can_go_on_inside_the_decoder(page):
    page.load_example()
    page.choose("#chat-then", "fastv")
    page.until(lambda: page.find("#chat-then-budget input").get_attribute("value") == "4", "half")
    assert page.shows("chat-then")
    page.click("#send")
    page.until(lambda: "layers 0–1: 9, layers 2–7: 4" in page.text("#insight"), "both methods")
    page.choose("#chat-method", "fastv")
    page.until(lambda: not page.shows("chat-then"), "no third")


def test_failures_are_read_as_sentences(page):
    page.load_example()
    page.ask("crash")
    page.until(lambda: "The worker stopped while it was" in page.text("#chatbot .bot"), "sentence")
    page.ask("hello")
    page.until(lambda: "word9" in page.text("#chatbot .bot"), "the next answer")


def test_an_own_image_can_be_asked_about_and_a_broken_one_is_explained(page, tmp_path):
    good, broken = tmp_path / "view.png", tmp_path / "broken.png"
    Image.new("RGB", (64, 48), "teal").save(good)
    broken.write_text("no image")
    entry = page.driver.find_element(By.CSS_SELECTOR, "#image input[type=file]")
    entry.send_keys(str(broken))
    page.until(lambda: "This file is not an image" in page.text("body"), "the sentence")
    entry = page.driver.find_element(By.CSS_SELECTOR, "#image input[type=file]")
    entry.send_keys(str(good))
    page.find("#image img")
    page.ask("hello")
    page.until(lambda: "word9" in page.text("#chatbot .bot"), "the answer")


def test_two_methods_are_compared(page):
    page.load_example()
    page.driver.find_element(By.XPATH, "//button[@role='tab'][contains(., 'Compare')]").click()
    page.until(lambda: page.find("#compare-question textarea").get_attribute("value"), "question")
    page.click("#compare")
    page.until(lambda: "dense 288 ms" in page.text("#right-panel"), "both panels")
    assert "word9" in page.text("#left-panel") and "288 ms" in page.text("#left-panel")
    assert page.text("#left-panel").startswith("none")
    assert page.text("#right-panel").startswith("vispruner")


def test_a_comparison_can_be_stopped(page, fake):
    page.load_example()
    page.driver.find_element(By.XPATH, "//button[@role='tab'][contains(., 'Compare')]").click()
    box = page.find("#compare-question textarea")
    box.clear()
    fake.released.clear()
    box.send_keys("held")
    page.click("#compare")
    page.until(lambda: "word1" in page.text("#left-panel"), "the first words")
    page.click("#compare-stop")
    page.until(lambda: "(stopped)" in page.text("#left-panel"), "the mark of a stop")
    assert "(stopped)" in page.text("#right-panel") and page.find("#compare").is_displayed()


def test_answers_and_names_are_shown_as_text(page, fake):
    page.load_example()
    page.ask(
        "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script>"
    )
    page.until(lambda: "word9" in page.text("#chatbot .bot"), "the answer")
    assert page.driver.title != "owned"


def test_the_page_fits_a_phone(address):
    browser = Browser(390, 844, phone=True)
    try:
        browser.open(address)
        browser.load_example()
        browser.click("#send")
        browser.until(lambda: "dense 288 ms" in browser.text("#insight"), "the panel")
        width = browser.driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390
        for selector in ("#send", "#insight .pv-pane img", "#regenerate"):
            box = browser.find(selector).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390, selector
    finally:
        browser.driver.quit()


def test_nothing_is_loaded_from_elsewhere(page, address):
    page.load_example()
    time.sleep(1)
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    loaded = page.driver.execute_script(script)
    assert loaded and all(name.startswith((address, "data:", "blob:")) for name in loaded), loaded
