"""The menu of methods: groups, lines and labels follow from what a worker says, not from names."""

import asyncio

import pytest

from llava.serve.web.menu import GROUPS, MARK, budget_label, budget_note, group_of, headings, menu
from llava.serve.web.methods import BUDGET, SHARE, Method, offered
from tests.serve.web.web_service import METHODS

OFFERED = offered({"pruning_methods": METHODS})


def test_methods_stand_in_groups_by_where_they_act_and_whether_they_are_trained():
    assert [name for _, name in menu(OFFERED)] == [
        "none",
        "vispruner",
        "fastv",
        "twigvlm",
        "glimpseprune",
    ]
    mixed = dict(reversed(OFFERED.items()))
    ranks = [GROUPS.index((mixed[n].acts, mixed[n].trained)) for _, n in menu(mixed)]
    assert ranks == sorted(ranks)


def test_a_line_can_be_searched_by_name_by_how_the_method_chooses_and_by_group():
    lines = {name: line for line, name in menu(OFFERED)}
    assert lines["fastv"] == "fastv: what the last token looks at · inside the decoder"
    assert lines["twigvlm"].startswith("twigvlm (not available): ")
    assert lines["twigvlm"].endswith(" · inside the decoder, trained")


def test_every_group_has_a_heading_that_no_other_group_ends_with():
    names = [group_of(Method("", acts=place, trained=trained)) for place, trained in GROUPS]
    for name in names:
        assert f"content: '{name.capitalize()}'" in headings()
        assert [n for n in names if f"{MARK}{n}".endswith(f"{MARK}{name}")] == [name]


def test_a_worker_that_says_nothing_about_its_methods_has_a_menu_of_names():
    plain = offered({"pruning_methods": [{"name": "x", "options": {BUDGET: 3}}]})
    assert menu(plain) == [("x", "x")] and budget_note(plain["x"]) == ""
    assert budget_label(plain["x"], BUDGET) == "Visual tokens per image"


@pytest.mark.parametrize(
    "counts, alone, behind",
    [
        ("every layer", "Visual tokens per image", "Of these, tokens"),
        (
            "average",
            "Visual tokens per image on average over the layers",
            "Of these, tokens on average over the layers",
        ),
        (
            "later layers",
            "Visual tokens per image from layer 2 on",
            "Of these, tokens from layer 2 on",
        ),
        ("at most", "Visual tokens per image at most", "Of these, tokens at most"),
    ],
)
def test_a_slider_says_what_its_budget_counts(counts, alone, behind):
    method = Method("x", counts=counts, from_layer=2)
    assert budget_label(method, BUDGET) == alone
    assert budget_label(method, BUDGET, behind=True) == behind
    assert budget_label(method, SHARE).startswith("Share of an image's tokens, %")
    assert ("see all tokens" in budget_note(method)) == (counts == "later layers")


def test_without_a_worker_no_worker_is_said_to_offer_nothing(page):
    values = {page.controls.model: None, **{picker.method: None for picker in page.pickers}}
    updates = asyncio.run(page.offer(values))
    for picker in page.pickers:
        assert "as soon as a worker answers" in updates[picker.note]["value"]
