"""What the page says below an answer: true words, right numbers, and what may be taken along."""

import base64
import html
import json
import re

import pytest
from PIL import Image

pytest.importorskip("gradio")

from llava.serve.web.examples import examples, legend, number_of  # noqa: E402
from llava.serve.web.exports import Asked  # noqa: E402
from llava.serve.web.figures import cards  # noqa: E402
from llava.serve.web.insight import insight  # noqa: E402
from llava.serve.web.page import TITLE  # noqa: E402
from tests.serve.web.test_page import IMAGE, Visitor  # noqa: E402
from tests.serve.web.test_parts import GREY, report_of  # noqa: E402
from tests.serve.web.web_service import MODEL  # noqa: E402


def test_the_page_says_what_was_kept_and_not_what_was_needed(page):
    visitor = Visitor(page)
    visitor.receive(page.chat.cleared())
    assert "keeps" in TITLE and "needed" not in TITLE
    assert "the method kept" in visitor.panel and "needed" not in visitor.panel


def test_a_question_without_an_image_is_answered_with_a_hint(page):
    visitor = Visitor(page)
    visitor.say("Hello")
    assert visitor.answer.endswith("word9")
    assert "without an image" in visitor.panel and "Choose an example" in visitor.panel


def test_while_the_time_without_pruning_is_measured_the_panel_says_so(page):
    visitor = Visitor(page)
    panels = [u[page.chat.insight] for u in visitor.say("Hello", IMAGE) if page.chat.insight in u]
    assert "dense: measuring" in panels[0] and "dense 288 ms" in panels[1]
    visitor.values[page.controls.dense] = False
    (panel,) = [u[page.chat.insight] for u in visitor.say("Hi", IMAGE) if page.chat.insight in u]
    assert "dense not measured" in panel and "measuring" not in panel


def test_in_a_comparison_the_left_panel_says_that_it_is_measured_too(page):
    visitor, tab = Visitor(page), page.compare
    visitor.values |= {tab.text: "Hello", page.controls.image: IMAGE}
    panels = [u[tab.panels[0]] for u in visitor.run(tab.compare) if tab.panels[0] in u]
    assert "dense: measuring" in panels[-2] and "dense 288 ms" in panels[-1]
    visitor.values[page.controls.dense] = False
    panels = [u[tab.panels[0]] for u in visitor.run(tab.compare) if tab.panels[0] in u]
    assert not any("measuring" in panel for panel in panels)


def test_a_card_says_how_an_average_over_layers_comes_about():
    late = cards(report_of("fastv", 12), None)
    assert "Visual tokens, average<" in late and ">18<" in late
    assert "layers 0–1: 36, layers 2–7: 12" in late
    even = cards(report_of("vispruner", 9), None)
    assert "average" not in even and "layers" not in even
    many = cards(report_of("fastv", 12, tokens_per_layer=[36, 30, 20, 10, 5, 5, 5, 1]), None)
    assert "from 36 to 1" in many


def test_the_words_of_the_cards_are_explained_below_them():
    text = cards(report_of("vispruner", 9), None)
    assert all(f"{word}: " in text for word in ("Dense", "Prefill", "KV cache"))


def test_buttons_need_no_font_with_pictures(page):
    """Where no such font is installed, boxes would stand in their place."""
    labels = [button.value for button in page.chat.buttons]
    assert labels == ["Upvote", "Downvote", "Flag", "Regenerate", "Clear"]


def checked_views(panel: str) -> list[str]:
    return re.findall(r"checked><label[^>]*>(.*?) <small>", panel)


def test_the_view_shown_first_is_the_last_one_with_patches():
    image = {"kept": list(range(36)), "total": 36, "layers": [[2, [3, 4]], [6, []]]}
    panel = insight([GREY], report_of("fastv", 12, images=[image]))
    assert checked_views(panel) == ["from layer 2 on"]
    assert "from layer 6 on <small>0</small>" in panel
    image["layers"] = [[2, []]]
    assert checked_views(insight([GREY], report_of("fastv", 12, images=[image]))) == [
        "kept before the decoder"
    ]


def test_a_picture_is_described_by_what_is_kept_on_it():
    alts = re.findall("alt='(.*?)'", insight([GREY], report_of("vispruner", 9)))
    assert alts[0] == (
        "kept before the decoder: 9 of 36 patches of the image are kept and bright, the others dark"
    )
    assert "importance" in alts[1]


def test_the_report_that_may_be_taken_along_is_that_of_the_worker():
    request = {"method": "vispruner", "visual_token_num": 9, "options": {}}
    asked = Asked(MODEL, "Is it <red>?", "yes", request, example=0)
    panel = insight([GREY], report_of("vispruner", 9), 0.288, asked=asked)
    data = re.search(r"href='data:application/json;base64,(.*?)'", panel)[1]
    taken = json.loads(base64.b64decode(data))
    assert (taken["question"], taken["answer"], taken["pruning"]) == (
        "Is it <red>?",
        "yes",
        request,
    )
    assert taken["dense_prefill_seconds"] == 0.288
    assert taken["report"] == report_of("vispruner", 9).data
    link = html.unescape(re.search(r"data-take='link' href='(.*?)'", panel)[1])
    assert "example=1" in link and "budget=9" in link and "%3Cred%3E" in link
    assert "<red>" not in panel


def test_a_link_to_a_picture_of_the_visitor_says_that_it_leaves_it_out():
    panel = insight([GREY], report_of("none", None), asked=Asked(MODEL, "What?", "a", None))
    assert "without your image" in panel and "example=" not in panel


def test_examples_are_named_by_what_is_on_them(page):
    listed = page.controls.samples
    shown = page.controls.examples.value
    for number, one in enumerate(listed):
        assert f"aria-label='Example {number + 1}: {one.question.splitlines()[0]}" in shown
        assert shown.count(f"<span>{html.escape(one.shows)}</span>") == 1
    assert number_of(listed[2].picture.convert("RGB"), listed) == 2
    assert number_of(Image.new("RGB", listed[0].picture.size), listed) is None


def test_the_thing_that_the_first_question_is_about_is_in_its_legend():
    first = examples()[0]
    thing = re.search(r"the (\w+)\?", first.question)[1]
    assert thing in first.shows


def test_a_legend_is_short():
    sentences = "There is a red ring and a blue net. The black sign says post. The red sign says 7."
    assert legend(sentences) == "a red ring, a blue net, a black sign “post”, a red sign “7”"


def test_where_the_method_decides_there_is_a_box_for_that_and_no_slider(page, fake):
    visitor, picker = Visitor(page), page.chat.picker
    known = visitor.values[page.chat.methods]
    updates = picker.choose(known, "glimpseprune")
    assert updates[picker.own]["visible"] is True and updates[picker.own]["value"]
    assert updates[picker.budget]["visible"] == "hidden"
    visitor.receive(updates)
    visitor.values |= {picker.method: "glimpseprune", picker.own: False}
    decided = picker.decided(visitor.values)
    assert (
        decided[picker.budget]["visible"] is True and "at most" in decided[picker.budget]["label"]
    )
    visitor.receive(decided)
    visitor.say("Hello", IMAGE)
    assert fake.bodies[-2]["pruning"]["visual_token_num"] == 4
    assert picker.choose(known, "vispruner")[picker.own]["visible"] == "hidden"


def test_the_note_says_how_a_method_chooses_and_explains_its_number(page):
    visitor, picker = Visitor(page), page.chat.picker
    note = picker.choose(visitor.values[page.chat.methods], "fastv")[picker.note]
    assert note["visible"] and note["value"].startswith("What the last token looks at. ")
    assert "Layers before layer 2 see all tokens" in note["value"]
