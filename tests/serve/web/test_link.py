"""A link brings back example, question, method and budget."""

from types import SimpleNamespace
from urllib.parse import parse_qsl

import pytest

gr = pytest.importorskip("gradio")

from llava.serve.web.client import Service  # noqa: E402
from llava.serve.web.link import Link, read_link  # noqa: E402
from llava.serve.web.log import ConversationLog  # noqa: E402
from llava.serve.web.page import Page, PageOptions  # noqa: E402
from tests.serve.web.test_page import Visitor  # noqa: E402
from tests.serve.web.web_service import MODEL  # noqa: E402


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    log = ConversationLog(tmp_path_factory.mktemp("log"))
    return Page(Service("http://127.0.0.1:9"), log, PageOptions(models=(MODEL,)))


REQUESTS = [
    {"method": "none", "visual_token_num": None, "options": {}},
    {"method": "vispruner", "visual_token_num": 5, "options": {"important_ratio": 0.25}},
    {"method": "glimpseprune", "visual_token_num": None, "options": {}},
    {
        "method": "vispruner+fastv",
        "visual_token_num": None,
        "options": {
            "vispruner_visual_token_num": 8,
            "vispruner_seed": 3,
            "fastv_visual_token_num": 2,
            "fastv_layer": 4,
        },
    },
]


def params(query: str) -> dict[str, str]:
    return dict(parse_qsl(query.removeprefix("?")))


def follow(page: Page, query: str) -> Visitor:
    visitor = Visitor(page)
    request = SimpleNamespace(query_params=params(query))
    visitor.receive(page.follow_link(visitor.values, request))
    return visitor


@pytest.mark.parametrize("pruning", REQUESTS, ids=lambda request: request["method"])
def test_a_link_asks_for_what_was_asked_for(page, pruning):
    query = Link.of(MODEL, 2, "Is it\nred & blue?", pruning).query()
    visitor = follow(page, query)
    known = visitor.values[page.chat.methods]["methods"]
    assert page.chat.picker.request(known, visitor.values) == pruning
    assert {visitor.values[box] for box in page.questions} == {"Is it\nred & blue?"}
    assert visitor.values[page.controls.image] is page.controls.samples[1].picture
    assert params(query)["model"] == MODEL


def test_shares_of_tokens_are_percent_in_a_link():
    options = {"visual_token_ratio": 0.111}
    link = Link.of(MODEL, None, "", {"method": "x", "visual_token_num": None, "options": options})
    assert params(link.query()) == {"model": MODEL, "method": "x", "budget": "11.1%"}
    again = read_link(params(link.query()))
    assert (again.budget, again.shares, again.options) == (11.1, True, {})


def test_what_a_link_names_and_the_page_does_not_have_is_said(page, monkeypatch):
    shown = []
    monkeypatch.setattr(gr, "Warning", shown.append)
    assert follow(page, "?method=magic").values[page.chat.picker.method] == "vispruner"
    assert "magic" in shown[0]
    follow(page, "?example=77")
    assert "example 77" in shown[1]
    assert follow(page, "?method=fastv%2Bvispruner").values[page.chat.picker.then] == ""
    assert "fastv+vispruner" in shown[2]


@pytest.mark.parametrize("budget", ["", "x", "nan", "inf", "-3", "0", "%"])
def test_what_is_no_budget_leaves_the_method_its_own(page, budget):
    visitor = follow(page, f"?method=vispruner&budget={budget}")
    assert visitor.values[page.chat.picker.budget] == 9


def test_a_budget_above_all_tokens_is_all_tokens(page):
    visitor = follow(page, "?method=vispruner&budget=1e9")
    assert visitor.values[page.chat.picker.budget] == 36


def test_budgets_beyond_a_slider_are_its_ends(page):
    visitor = follow(page, "?method=vispruner%2Bfastv&budget=16&then_budget=99")
    budgets = page.chat.picker.budget, page.chat.picker.then_budget
    assert [visitor.values[box] for box in budgets] == [16, 16]
    visitor = follow(page, "?method=vispruner%2Bfastv&budget=16&then_budget=0.1")
    assert visitor.values[page.chat.picker.then_budget] == 1


def test_a_question_that_is_too_long_for_an_address_has_no_link():
    assert Link(MODEL, question="ä" * 400).query() is None


def test_an_address_without_anything_changes_nothing(page):
    request = SimpleNamespace(query_params={"model": MODEL})
    assert page.follow_link(Visitor(page).values, request) == {page.controls.image: gr.update()}
