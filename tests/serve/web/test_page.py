"""The web page's turns and its guard, against a small service in a thread; no browser."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")


from llava.serve import gradio_web_server  # noqa: E402
from llava.serve.web import chat_tab  # noqa: E402
from llava.serve.web.methods import offered  # noqa: E402
from llava.serve.web.page import Page  # noqa: E402
from tests.serve.web.web_service import DENSE, METHODS, MODEL  # noqa: E402

IMAGE = Image.new("RGB", (60, 40), "white")
VISITOR = SimpleNamespace(client=SimpleNamespace(host="1.2.3.4"), query_params={})


class Visitor:
    """The components' values as one visitor's browser holds them."""

    def __init__(self, page: Page, method: str = "vispruner"):
        self.page = page
        self.values = {
            component: component.value
            for component in page.blocks.blocks.values()
            if hasattr(component, "value")
        }
        known = {"methods": offered({"pruning_methods": METHODS}), "dense": DENSE}
        self.values[page.chat.methods] = known
        self.values[page.controls.model] = MODEL
        for picker in page.pickers:
            self.pick(picker, method)

    def pick(self, picker, method: str) -> None:
        known = self.values[self.page.chat.methods]
        self.values[picker.method] = method
        self.receive(picker.choose(known, method))

    def receive(self, updates: dict) -> None:
        for component, update in updates.items():
            plain = not (isinstance(update, dict) and update.get("__type__") == "update")
            if plain:
                self.values[component] = update
            elif "value" in update:
                self.values[component] = update["value"]

    def run(self, handler, *more) -> list[dict]:
        async def collect():
            return [update async for update in handler(self.values, *more)]

        updates = asyncio.run(collect())
        for update in updates:
            self.receive(update)
        return updates

    def end(self, turn, count: int, ending) -> list[dict]:
        """What comes of `turn` when `ending`, a handler, is called behind `count` updates."""

        async def collect():
            for _ in range(count):
                self.receive(await anext(turn))
            self.receive(ending(self.values))
            return [update async for update in turn]

        return asyncio.run(asyncio.wait_for(collect(), 20))

    def say(self, text: str, image=None) -> list[dict]:
        self.values[self.page.chat.text] = text
        self.values[self.page.controls.image] = image
        return self.run(self.page.chat.ask, VISITOR)

    @property
    def answer(self) -> str:
        return self.values[self.page.chat.window][-1]["content"]

    @property
    def panel(self) -> str:
        return self.values[self.page.chat.insight]


def can_click(updates: list[dict], page: Page) -> list[bool]:
    """Whether each of the five buttons can be pressed at the end."""
    last = {}
    for update in updates:
        last |= {
            button: update[button]["interactive"]
            for button in page.chat.buttons
            if button in update
        }
    return [last[button] for button in page.chat.buttons]


# Turns.


def test_an_answer_streams_into_the_chat_and_brings_its_panel(page, fake):
    visitor = Visitor(page)
    updates = visitor.say("Hello", IMAGE)
    assert can_click(updates[:1], page) == [False] * 5 and can_click(updates, page) == [True] * 5
    texts = [
        update[page.chat.window][-1]["content"] for update in updates if page.chat.window in update
    ]
    assert visitor.answer.startswith("word0 word1") and visitor.answer.endswith("word9")
    assert visitor.values[page.chat.text] == "" and texts
    assert "dense 288 ms" in visitor.panel and "72 ms" in visitor.panel
    dense = fake.bodies[-1]
    assert dense["pruning"]["method"] == "none" and dense["max_new_tokens"] == 1


def test_a_second_question_goes_on_with_the_dialogue_and_a_new_image_starts_another(page, fake):
    visitor = Visitor(page, "none")
    visitor.say("First", IMAGE)
    visitor.say("Second", IMAGE)
    prompt = fake.bodies[-1]["prompt"]
    assert prompt.count("USER:") == 2 and prompt.index("<image>") < prompt.index("Second")
    visitor.say("Third", Image.new("RGB", (60, 40), "black"))
    assert fake.bodies[-1]["prompt"].count("USER:") == 1


def test_the_same_drawing_in_another_colour_is_a_new_image(page, fake):
    """The pixels of an image with a palette are numbers of its colours."""
    red, blue = (Image.new("P", (60, 40)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    visitor = Visitor(page, "none")
    visitor.say("First", red)
    visitor.say("Second", red.copy())
    assert fake.bodies[-1]["prompt"].count("USER:") == 2
    before = fake.bodies[-1]["images"]
    visitor.say("Third", blue)
    assert fake.bodies[-1]["prompt"].count("USER:") == 1 and fake.bodies[-1]["images"] != before


def test_regenerate_asks_the_same_with_the_method_chosen_now(page, fake):
    visitor = Visitor(page, "none")
    visitor.say("Hello", IMAGE)
    first = fake.bodies[-1]
    visitor.pick(page.chat.picker, "fastv")
    visitor.values[page.controls.dense] = False
    visitor.run(page.chat.regenerate, VISITOR)
    again = fake.bodies[-1]
    assert again["prompt"] == first["prompt"] and again["images"] == first["images"]
    assert again["pruning"] == {"method": "fastv", "visual_token_num": 12, "options": {}}
    assert "from layer 2 on" in visitor.panel


def test_a_dialogue_goes_on_in_the_template_that_is_chosen_now(page, fake):
    """Another model may have been chosen, or another template among the parameters."""
    visitor, known = Visitor(page, "none"), page.chat.methods
    visitor.say("First", IMAGE)
    visitor.values[known] = {**visitor.values[known], "conv_mode": "mistral_instruct"}
    visitor.run(page.chat.regenerate, VISITOR)
    body = fake.bodies[-1]
    assert body["prompt"] == "[INST] <image>\nFirst [/INST]" and len(body["images"]) == 1
    visitor.values[page.controls.template] = "chatml_direct"
    visitor.say("Second", IMAGE)
    body = fake.bodies[-1]
    assert body["prompt"].count("<|im_start|>user") == 2 and "[INST]" not in body["prompt"]
    assert body["prompt"].count("<image>") == 1 and "word9" in body["prompt"]
    assert body["stop"] == "<|im_end|>"


def test_a_second_method_goes_on_inside_the_decoder(page, fake):
    visitor, picker = Visitor(page), page.chat.picker
    known = visitor.values[page.chat.methods]
    assert picker.choose(known, "vispruner")[picker.then]["visible"] is True
    assert picker.choose(known, "fastv")[picker.then]["visible"] == "hidden"
    visitor.values[picker.then] = "fastv"
    updates = picker.followed(visitor.values)
    labels = [updates[box].get("label") for box in picker.boxes[:4]]
    assert labels == ["important_ratio", "seed", "fastv: layer", None]
    visitor.receive(updates)
    visitor.say("Hello", IMAGE)
    asked = fake.bodies[-2]["pruning"]
    assert asked["method"] == "vispruner+fastv"
    assert asked["options"] == {"vispruner_visual_token_num": 9, "fastv_visual_token_num": 4}
    assert "layers 0–1: 9, layers 2–7: 4" in visitor.panel
    visitor.pick(picker, "fastv")
    assert visitor.values[picker.then] == "", "it does not stay behind the next choice"


def test_the_options_of_a_second_method_go_with_it(page):
    visitor, picker = Visitor(page), page.chat.picker
    visitor.values[picker.then] = "fastv"
    visitor.receive(picker.followed(visitor.values))
    ours, its = picker.boxes[0], picker.boxes[2]
    visitor.values |= {ours: "0.7", its: "3"}
    updates = picker.rescaled(visitor.values)
    visitor.receive(updates)
    assert visitor.values[picker.then] == "" and visitor.values[ours] == "0.7"
    assert updates[its]["visible"] == "hidden" and visitor.values[its] == ""


@pytest.mark.parametrize(
    "word, sentence",
    [
        ("crash", "The worker stopped while it was answering"),
        ("broken", "The GPU has too little memory left"),
        ("full", "All slots are taken."),
    ],
)
def test_failures_are_sentences_and_leave_the_dialogue_usable(page, fake, word, sentence):
    visitor = Visitor(page, "none")
    updates = visitor.say(word, IMAGE)
    assert sentence in visitor.answer and "request " in visitor.answer
    assert "Traceback" not in visitor.answer and "127.0.0.1" not in visitor.answer
    assert can_click(updates, page) == [False, False, False, True, True]
    visitor.say("Hello", IMAGE)
    assert visitor.answer.startswith("word0")
    body = fake.bodies[-1]
    assert (
        word not in body["prompt"] and body["prompt"].count("<image>") == len(body["images"]) == 1
    )


def test_without_a_worker_the_answer_says_so(page):
    visitor = Visitor(page)
    visitor.values[page.controls.model] = "llava-gone"
    visitor.say("Hello", IMAGE)
    assert "No worker serves llava-gone right now" in visitor.answer


def test_a_method_that_is_not_available_keeps_the_question(page, fake, warnings):
    visitor = Visitor(page, "twigvlm")
    before = len(fake.bodies)
    visitor.say("Hello", IMAGE)
    assert warnings == [
        "The method twigvlm is not available: its trained part is missing <b>here</b>."
    ]
    assert visitor.values[page.chat.text] == "Hello" and len(fake.bodies) == before


def test_an_empty_question_is_not_sent(page, fake, warnings):
    before = len(fake.bodies)
    Visitor(page).say("  ", IMAGE)
    assert warnings == ["Type a question first."] and len(fake.bodies) == before


def test_stop_keeps_what_was_written(page, fake):
    visitor = Visitor(page)

    async def half():
        visitor.values |= {page.chat.text: "slow", page.controls.image: IMAGE}
        turn = page.chat.ask(visitor.values, VISITOR)
        for _ in range(4):
            visitor.receive(await anext(turn))
        await turn.aclose()

    asyncio.run(half())
    visitor.receive(page.chat.stopped(visitor.values))
    assert visitor.answer.startswith("word0") and visitor.answer.endswith("*(stopped)*")
    visitor.say("Next", IMAGE)
    assert "word0" in fake.bodies[-2]["prompt"] and "▌" not in fake.bodies[-2]["prompt"]


def test_what_is_measured_when_clear_is_pressed_is_not_shown_any_more(page):
    visitor = Visitor(page)

    async def until_answered():
        visitor.values |= {page.chat.text: "Hello", page.controls.image: IMAGE}
        turn = page.chat.ask(visitor.values, VISITOR)
        async for update in turn:
            visitor.receive(update)
            if "dense: measuring" in (visitor.panel or ""):
                break
        visitor.receive(page.chat.cleared(visitor.values))
        return [update async for update in turn]

    # gradio sends the last update again, which must not be the panel of before
    assert asyncio.run(until_answered()) == [{page.chat.window: gradio.skip()}]
    assert "Ask something" in visitor.panel


@pytest.mark.parametrize("end", ["stopped", "cleared"])
@pytest.mark.parametrize("before", ["first", "next"])
def test_no_piece_arrives_after_stop_or_clear_and_the_worker_is_left(page, fake, end, before):
    """The browser learns of it in its own time, so the turn ends by itself."""
    visitor, ended = Visitor(page), len(fake.ended)
    fake.released.clear()

    visitor.values |= {page.chat.text: "held", page.controls.image: IMAGE}
    turn, count = page.chat.ask(visitor.values, VISITOR), {"first": 1, "next": 3}[before]
    later = visitor.end(turn, count, getattr(page.chat, end))
    assert later == [{page.chat.window: gradio.skip()}]
    bubbles = visitor.values[page.chat.window]
    assert bubbles == [] if end == "cleared" else visitor.answer.endswith("*(stopped)*")
    for _ in range(100):
        if before == "first" or fake.ended[ended:] == ["left"]:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"the worker still writes: {fake.ended[ended:]}")


def test_an_answer_that_was_complete_when_stop_was_pressed_is_not_called_stopped(page):
    visitor = Visitor(page)
    visitor.say("Hello", IMAGE)
    visitor.receive(page.chat.stopped(visitor.values))
    assert visitor.answer.endswith("word9")


@pytest.mark.parametrize("answer, sentence", [(None, "does not answer"), (True, "GUIDELINES")])
def test_a_moderated_text_is_not_sent_and_the_reason_is_said(
    page, fake, warnings, answer, sentence, monkeypatch
):
    monkeypatch.setattr(page.chat, "moderate", True)
    monkeypatch.setattr(chat_tab, "violates_moderation", lambda text, on_error: answer)
    before, visitor = len(fake.bodies), Visitor(page)
    visitor.say("Hello", IMAGE)
    assert len(fake.bodies) == before and sentence in warnings[0]
    assert visitor.values[page.chat.text] == "Hello"


def test_clear_starts_from_nothing(page, fake):
    visitor = Visitor(page)
    visitor.say("Hello", IMAGE)
    visitor.receive(page.chat.cleared())
    assert visitor.values[page.chat.window] == [] and "Ask something" in visitor.panel
    visitor.say("Again", IMAGE)
    assert "Hello" not in fake.bodies[-1]["prompt"]


def test_a_forgotten_session_can_start_again(page, warnings):
    visitor = Visitor(page)
    visitor.run(page.chat.regenerate, VISITOR)
    assert warnings == ["Type a question first."] and visitor.values[page.chat.window] == []


def test_votes_are_counted_once(page):
    visitor = Visitor(page)
    visitor.say("Hello", IMAGE)
    updates = page.chat._voter("upvote")(visitor.values, VISITOR)
    assert [updates[button]["interactive"] for button in page.chat.votes] == [False] * 3


def test_both_methods_are_asked_the_same(page, fake):
    visitor = Visitor(page)
    visitor.pick(page.compare.pickers[0], "none")
    visitor.values |= {page.compare.text: "Hello", page.controls.image: IMAGE}
    before = len(fake.bodies)
    visitor.run(page.compare.compare)
    left, right = fake.bodies[before:]
    assert left["pruning"]["method"] == "none" and right["pruning"]["method"] == "vispruner"
    assert (left["prompt"], left["images"]) == (right["prompt"], right["images"])
    left, right = (visitor.values[panel] for panel in page.compare.panels)
    assert "word9" in left and "word9" in right
    assert "dense 288 ms" in right and "72 ms" in right, "the unpruned run gives the dense time"


def test_a_stopped_comparison_keeps_what_was_written(page):
    visitor = Visitor(page)
    visitor.values |= {page.compare.text: "slow", page.controls.image: IMAGE}

    async def some():
        turn = page.compare.compare(visitor.values)
        for _ in range(4):
            visitor.receive(await anext(turn))
        await turn.aclose()

    asyncio.run(some())
    visitor.receive(page.compare.stopped(visitor.values))
    left, right = (visitor.values[panel] for panel in page.compare.panels)
    assert "word0" in left and "(stopped)" in left and "▌" not in left
    assert "(stopped)" in right and "Waiting" not in right


def test_a_stopped_comparison_ends_by_itself(page, fake):
    visitor, tab = Visitor(page), page.compare
    visitor.values |= {tab.text: "held", page.controls.image: IMAGE}
    fake.released.clear()
    before = len(fake.bodies)
    later = visitor.end(tab.compare(visitor.values), 3, tab.stopped)
    assert later == [{tab.panels[0]: gradio.skip()}]
    assert len(fake.bodies) == before + 1, "nothing more is asked"


def test_one_failing_side_does_not_stop_the_other(page):
    visitor = Visitor(page)
    visitor.pick(page.compare.pickers[0], "twigvlm")
    visitor.values |= {page.compare.text: "Hello", page.controls.image: IMAGE}
    visitor.run(page.compare.compare)
    left, right = (visitor.values[panel] for panel in page.compare.panels)
    assert "trained part is missing &lt;b&gt;" in left and "word9" in right


def test_a_comparison_needs_image_and_question(page, warnings):
    visitor = Visitor(page)
    visitor.run(page.compare.compare)
    assert warnings == ["Choose an image first: an example, or one of your own."]


def test_the_address_chooses_the_model_and_a_worker_without_methods_is_no_error(
    page, fake, warnings
):
    request = SimpleNamespace(query_params={"model": MODEL})
    assert asyncio.run(page.visit(request))["value"] == MODEL
    chosen = {page.controls.model: MODEL, **{picker.method: None for picker in page.pickers}}
    fake.methods = None
    try:
        updates = asyncio.run(page.offer(chosen))
    finally:
        fake.methods = METHODS
    assert updates[page.chat.methods]["methods"] == {}
    assert "no choice" in updates[page.chat.picker.note]["value"]
    updates = asyncio.run(page.offer(chosen))
    assert updates[page.chat.picker.method]["value"] == "vispruner"
    labels = [label for label, _ in updates[page.chat.picker.method]["choices"]]
    assert any(label.startswith("twigvlm (not available)") for label in labels)
    assert updates[page.chat.picker.budget]["maximum"] == DENSE


def test_the_method_that_the_worker_was_started_with_is_chosen_first(page, fake, monkeypatch):
    async def status(model):
        return {"pruning_methods": METHODS, "default_pruning": {"method": "fastv"}}

    monkeypatch.setattr(page.service, "status", status)
    chosen = {page.controls.model: MODEL, **{picker.method: None for picker in page.pickers}}
    updates = asyncio.run(page.offer(chosen))
    names = [updates[picker.method]["value"] for picker in page.pickers]
    assert names == ["fastv", "none", "fastv", "fastv"]


# Options of the program.


def test_flags_of_the_published_program_are_understood():
    line = "--host 0.0.0.0 --port 1 --controller-url http://x --concurrency-count 2 "
    line += "--model-list-mode reload --share --moderate --embed"
    args = gradio_web_server.build_parser().parse_args(line.split())
    assert (args.host, args.port, args.model_list_mode) == ("0.0.0.0", 1, "reload")
    defaults = gradio_web_server.build_parser().parse_args([])
    assert defaults.host == "127.0.0.1" and defaults.controller_url == "http://localhost:21001"
    assert defaults.concurrency_count == 16 and defaults.model_list_mode == "once"


def test_names_under_which_the_page_answers():
    def hosts(line):
        args = gradio_web_server.build_parser().parse_args(line.split())
        return gradio_web_server.allowed_hosts(args)

    assert hosts("") == ("localhost", "127.0.0.1", "::1")
    assert hosts("--host 0.0.0.0") is None and hosts("--share") is None
    assert "demo.example" in hosts("--host 0.0.0.0 --allow-host Demo.example")


def test_images_are_stored_with_their_dialogues_only():
    args = gradio_web_server.build_parser().parse_args(["--save-images"])
    with pytest.raises(ValueError, match="--log-conversations"):
        gradio_web_server.build_page(args)


def test_where_images_have_grids_of_their_own_a_share_is_chosen_first(page, fake, monkeypatch):
    options = {"visual_token_num": 9, "visual_token_ratio": None}
    entries = [
        {"name": "vispruner", "options": options, "place": "first"},
        {"name": "fastv", "options": options, "place": "second"},
    ]

    async def status(model):
        return {"pruning_methods": entries, "num_patches": None}

    monkeypatch.setattr(page.service, "status", status)
    chosen = {page.controls.model: MODEL, **{picker.method: None for picker in page.pickers}}
    visitor, picker = Visitor(page), page.chat.picker
    updates = asyncio.run(page.offer(chosen))
    visitor.receive(updates)
    assert visitor.values[picker.shares] is True and updates[picker.shares]["visible"]
    slider = updates[picker.budget]
    assert slider["label"].startswith("Share") and (slider["maximum"], slider["value"]) == (
        100,
        22.2,
    )
    visitor.values[page.controls.dense] = False
    visitor.say("Hello", IMAGE)
    assert fake.bodies[-1]["pruning"]["options"] == {"visual_token_ratio": 0.222}

    behind = {picker.then: "fastv"}
    visitor.values |= behind
    updates = picker.followed(visitor.values)
    assert updates[picker.then_budget]["label"].startswith("Of these, %")
    assert updates[picker.then_budget]["value"] == 50

    visitor.values[picker.shares] = False  # a number after all
    updates = picker.rescaled(visitor.values)
    visitor.receive(updates)
    assert updates[picker.budget]["label"].startswith("Visual tokens per image")
    assert visitor.values[picker.budget] == 9 and visitor.values[picker.then] == ""
    visitor.say("Hello", IMAGE)
    assert fake.bodies[-1]["pruning"]["visual_token_num"] == 9
    known = visitor.values[page.chat.methods]
    assert known["dense"] == DENSE and known["own_grids"]  # the answer said so
    again = picker.chosen(visitor.values)
    assert again[picker.shares]["value"] is True  # the next method starts with a share
