"""The page in a real browser: quick, readable by everybody, clean, and what may be taken along.

Runs where chromium and selenium are installed.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("gradio")
pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from tests.serve.web.test_browser import IN_BROWSER, Browser  # noqa: E402

TABS = {"Chat": "#question", "Compare": "#compare-question", "Sweep": "#sweep-question"}
HELD_BACK = """
  const send = window.fetch;
  window.held = [];
  window.fetch = (url, ...more) => String(url.url ?? url).includes('queue/join')
    ? new Promise(done => window.held.push(() => done(send(url, ...more)))) : send(url, ...more);
"""
#: (words): measures `window.sign`, from the next Enter until the words are drawn: ms, and frames
TIMED = """
  const words = arguments[0];
  const shown = () => document.querySelector('#tabs').innerText.replace(/\\s+/g, ' ');
  if (shown().includes(words)) throw Error(`${words} is there before Enter`);
  window.sign = null;
  document.addEventListener('keydown', pressed => {
    let frames = 0;
    const drawn = () => { window.sign = [performance.now() - pressed.timeStamp, frames]; };
    const look = () => requestAnimationFrame(() => {
      frames++;
      shown().includes(words) ? setTimeout(drawn) : look();
    });
    look();
  }, {capture: true, once: true});
"""
pytestmark = IN_BROWSER


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def laptop(downloads):
    browser = Browser(1366, 768, downloads=str(downloads))
    yield browser
    browser.driver.quit()


@pytest.fixture
def page(laptop, address):
    laptop.open(address)
    return laptop


def answer(page: Browser) -> None:
    """Asks the first example and waits for all of the panel."""
    page.load_example()
    page.click("#send")
    page.until(lambda: "dense 288 ms" in page.text("#insight"), "the panel")


def test_no_tab_leaves_anything_in_the_console_or_the_log(page, caplog):
    answer(page)
    for tab, button in (("Compare", "#compare"), ("Sweep", "#sweep")):
        page.tab(tab)
        page.click(button)
        page.until(lambda: page.shows("compare-stop") or page.shows("sweep-stop"), "a start")
        page.until(lambda b=button: page.find(b).is_displayed(), "the end")
    page.until(lambda: "down to" in page.text("#sweep-panel"), "what the sweep found")
    assert page.errors() == []
    assert "an event failed" not in caplog.text


@pytest.mark.parametrize(
    "tab, words", [("Chat", "tell me ▌"), ("Compare", "Waiting"), ("Sweep", "Waiting")]
)
def test_the_question_is_taken_up_at_once_whatever_the_server_does(page, tab, words):
    page.load_example()
    page.tab(tab)
    box = page.find(f"{TABS[tab]} textarea")
    box.clear()
    box.send_keys("tell me")
    page.driver.execute_script(HELD_BACK)
    page.driver.execute_script(TIMED, words)
    box.send_keys(Keys.ENTER)
    page.until(lambda: page.driver.execute_script("return sign !== null"), "a sign")
    took, frames = page.driver.execute_script("return sign")
    print(f"{tab}: {words!r} is drawn {took:.0f} ms, {frames} frames, after Enter")
    assert frames <= 12  # 200 ms; a busy machine draws fewer a second
    assert page.driver.execute_script("return held.length"), "the server has heard of it"
    page.driver.execute_script("held.forEach(send => send())")


def test_methods_stand_under_headings_and_a_search_replaces_what_is_there(page):
    page.click("#chat-method input")
    page.until(lambda: page.options("fastv"), "the list")
    heading = "return getComputedStyle(arguments[0], '::before').content"
    headings = [
        page.driver.execute_script(heading, page.options(name)[0])
        for name in ("none", "vispruner", "fastv", "glimpseprune")
    ]
    assert headings == [
        '"No pruning"',
        '"Before the decoder"',
        '"Inside the decoder"',
        '"Before and inside the decoder, trained"',
    ]
    assert "what the last token looks at" in page.options("fastv")[0].text
    page.driver.switch_to.active_element.send_keys("last token", Keys.ENTER)
    page.until(lambda: page.chosen("#chat-method") == "fastv", "the method that was found")
    page.until(lambda: "What the last token looks at" in page.text("#chat-note"), "its line")


def test_the_track_of_a_slider_is_filled_up_to_its_value(page):
    script = """const range = document.querySelector(`#${arguments[0]}-budget input[type=range]`);
      return range && [parseFloat(getComputedStyle(range).getPropertyValue('--range_progress')),
              100 * (range.value - range.min) / (range.max - range.min)];"""

    def filled(name="chat"):
        found = page.driver.execute_script(script, name)
        return found and abs(found[0] - found[1]) < 0.1

    page.until(filled, "the first method")
    for method in ("fastv", "vispruner"):
        page.choose("#chat-method", method)
        page.until(lambda m=method: page.find("#chat-note").text, "the note")
        page.until(filled, method)
    box = page.find("#chat-budget input[type=number]")
    box.clear()
    box.send_keys("30\t")
    page.until(filled, "a number that was typed")
    page.tab("Compare")
    page.choose("#left-method", "vispruner")
    page.until(lambda: page.shows("left-budget"), "a slider that was not there before")
    page.until(lambda: filled("left"), "its track")


def test_the_method_may_decide_and_that_can_be_seen(page):
    page.choose("#chat-method", "glimpseprune")
    page.until(lambda: page.shows("chat-own"), "the box")
    assert page.find("#chat-own input").is_selected() and not page.shows("chat-budget")
    page.click("#chat-own input")
    page.until(lambda: page.shows("chat-budget"), "the slider")


def nameless(page: Browser) -> list[dict]:
    """What can be reached by keyboard and has no name for those who do not see the page."""
    page.driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = []
    for node in nodes:
        focusable = any(
            p["name"] == "focusable" and p["value"].get("value") for p in node.get("properties", [])
        )
        role = node.get("role", {}).get("value")
        if focusable and not node.get("name", {}).get("value") and role != "RootWebArea":
            found.append({"role": role, "id": node.get("backendDOMNodeId")})
    return [one | {"html": _html(page, one["id"])} for one in found]


def _html(page: Browser, node: int) -> str:
    shown = page.driver.execute_cdp_cmd("DOM.getOuterHTML", {"backendNodeId": node})
    return shown["outerHTML"][:200]


def test_everything_that_can_be_reached_by_keyboard_has_a_name(page):
    page.load_example()
    answer(page)
    for tab in TABS:
        page.tab(tab)
        page.find(f"{TABS[tab]} textarea")
        assert nameless(page) == [], tab


def test_all_can_be_done_with_the_keyboard(page):
    first = page.find("#examples button")
    page.driver.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ENTER)
    page.until(lambda: page.find("#question textarea").get_attribute("value"), "the question")
    page.find("#image img")
    page.find("#question textarea").send_keys(Keys.ENTER)
    page.until(lambda: "dense 288 ms" in page.text("#insight"), "the panel")
    page.driver.execute_script("document.querySelector('#insight input[type=radio]').focus()")
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    page.until(
        lambda: "importance" in page.find("#insight .pv-pane img").get_attribute("alt"), "the map"
    )


def test_pictures_say_what_is_kept(page):
    answer(page)
    alt = page.find("#insight .pv-pane img").get_attribute("alt")
    assert "9 of 36 patches of the image are kept" in alt
    missing = "return [...document.images].filter(i => !i.alt && i.getAttribute('alt') !== '')"
    found = page.driver.execute_script(f"{missing}.map(i => i.outerHTML.slice(0, 300))")
    assert found == []


def test_picture_and_report_are_downloaded(page, downloads: Path):
    answer(page)
    page.click("#insight [data-take=picture]")
    page.click("#insight a[download]")
    page.until(lambda: {"kept.jpg", "report.json"} <= {p.name for p in downloads.iterdir()}, "both")
    report = json.loads((downloads / "report.json").read_text())
    assert report["report"]["method"] == "vispruner" and report["example"] == 0
    assert (downloads / "kept.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_a_link_brings_everything_back(page, address):
    page.load_example()
    page.choose("#chat-method", "fastv")
    page.until(lambda: page.find("#chat-budget input").get_attribute("value") == "12", "its budget")
    box = page.find("#chat-budget input[type=number]")
    box.clear()
    box.send_keys("7\t")
    page.ask("Where is it?")
    page.until(lambda: "dense 288 ms" in page.text("#insight"), "the panel")
    page.click("#insight [data-take=link]")
    page.until(lambda: "method=fastv" in page.driver.current_url, "the link in the address bar")
    link = page.driver.current_url
    page.driver.get("about:blank")
    page.driver.get(link)
    page.until(lambda: page.find("#question textarea").get_attribute("value"), "the question")
    assert page.find("#question textarea").get_attribute("value") == "Where is it?"
    assert page.chosen("#chat-method") == "fastv"
    assert page.find("#chat-budget input[type=number]").get_attribute("value") == "7"
    page.find("#image img")
    page.click("#send")
    page.until(lambda: "layers 2–7: 7" in page.text("#insight"), "the same answer")


def test_a_sweep_shows_a_card_for_every_budget(page):
    page.load_example()
    page.tab("Sweep")
    page.until(lambda: page.find("#sweep-budgets input, #sweep-budgets textarea"), "the budgets")
    assert not page.shows("sweep-budget") and not page.shows("sweep-then")
    page.click("#sweep")
    page.until(lambda: "down to" in page.text("#sweep-panel"), "the end")
    cards = page.driver.find_elements(By.CSS_SELECTOR, "#sweep-panel section")
    assert [card.text.split()[0] for card in cards] == ["all", "1", "2", "4", "8", "12"]
    assert all(card.find_elements(By.CSS_SELECTOR, "img") for card in cards)


def test_on_a_phone_method_and_answer_stand_under_the_image_and_details_last(address):
    browser = Browser(390, 844, phone=True)
    try:
        browser.open(address)
        answer(browser)
        order = ["image", "examples", "chat-method", "chatbot", "question", "insight", "parameters"]
        script = """return arguments[0].map(
          name => document.getElementById(name).getBoundingClientRect().top + scrollY)"""
        tops = browser.driver.execute_script(script, order)
        assert tops == sorted(tops), dict(zip(order, tops, strict=True))
        assert tops[order.index("insight")] < 1600
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.driver.quit()
