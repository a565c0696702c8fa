"""The tab that asks one question with several budgets, against a small service; no browser."""

import asyncio
import base64
import json
import re
from types import SimpleNamespace

import pytest

gradio = pytest.importorskip("gradio")

from llava.serve.web.budgets import proposed, read_budgets  # noqa: E402
from llava.serve.web.failures import Failure  # noqa: E402
from llava.serve.web.page import Page  # noqa: E402
from llava.serve.web.runs import Run  # noqa: E402
from llava.serve.web.sweep_view import Step, smallest_agreeing, sweep_html  # noqa: E402
from tests.serve.web.test_page import IMAGE, Visitor  # noqa: E402
from tests.serve.web.test_parts import report_of  # noqa: E402


def sweep(page: Page, budgets: str, method: str = "vispruner", text: str = "Hello") -> Visitor:
    visitor, tab = Visitor(page), page.sweep
    visitor.pick(tab.picker, method)
    visitor.values |= {tab.text: text, tab.budgets: budgets, page.controls.image: IMAGE}
    visitor.run(tab.sweep)
    return visitor


def cards(visitor: Visitor) -> list[str]:
    panel = visitor.values[visitor.page.sweep.panel]
    return re.findall("<section.*?</section>", panel, re.S)


def test_every_budget_is_asked_and_shown_beside_all_tokens(page, fake):
    before = len(fake.bodies)
    visitor = sweep(page, "4, 9 18")
    asked = [body["pruning"] for body in fake.bodies[before:]]
    assert [one["method"] for one in asked] == ["none", *["vispruner"] * 3]
    assert [one["visual_token_num"] for one in asked] == [None, 4, 9, 18]
    assert len({(body["prompt"], *body["images"]) for body in fake.bodies[before:]}) == 1
    whole, *pruned = cards(visitor)
    assert "all tokens" in whole and "288 ms" in whole
    for card, budget, seconds, change in zip(
        pruned, (4, 9, 18), (32, 72, 144), ("−89 %", "−75 %", "−50 %"), strict=True
    ):
        assert f"{budget} tokens on average, prefill {seconds} ms" in card and change in card
        assert "word9" in card and "same answer" in card
        assert f"{budget} of 36 patches of the image are kept" in card
    panel = visitor.values[page.sweep.panel]
    assert "The answer stays the same down to <b>4</b>" in panel


def test_all_reports_can_be_taken_along(page):
    panel = sweep(page, "4, 9").values[page.sweep.panel]
    data = re.search(r"download='sweep.json' href='data:application/json;base64,(.*?)'", panel)[1]
    taken = json.loads(base64.b64decode(data))
    assert [one["report"]["method"] for one in taken] == ["none", "vispruner", "vispruner"]
    assert [len(one["report"]["images"][0]["kept"]) for one in taken] == [36, 4, 9]
    assert [one["dense_prefill_seconds"] for one in taken] == pytest.approx([0.288] * 3)


@pytest.mark.parametrize(
    "budgets, method, sentence",
    [
        ("", "vispruner", "Name 1 to 8 budgets"),
        ("1 2 3 4 5 6 7 8 9", "vispruner", "Name 1 to 8 budgets"),
        ("4, many", "vispruner", "'many' is no budget"),
        ("4, -1", "vispruner", "'-1' is no budget"),
        ("200%", "vispruner", "'200%' is no budget"),
        ("10%", "vispruner", "takes numbers of tokens, no shares"),
        ("4", "none", "The method none has no budget"),
        ("4", "twigvlm", "its trained part is missing"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_is_asked(
    page, fake, warnings, budgets, method, sentence
):
    before = len(fake.bodies)
    sweep(page, budgets, method)
    assert sentence in warnings[0] and len(fake.bodies) == before


def test_a_sweep_needs_an_image(page, warnings):
    Visitor(page).run(page.sweep.sweep)
    assert warnings == ["Choose an image first: an example, or one of your own."]


def test_budgets_are_numbers_or_shares_each_once():
    assert read_budgets("64, 32;16 32 11%") == [(64, False), (32, False), (16, False), (11, True)]
    assert read_budgets("11.1 %, 5 % 16") == [(11.1, True), (5, True), (16, False)]
    assert proposed(576) == "16, 32, 64, 128, 192" and proposed(36) == "1, 2, 4, 8, 12"
    assert all(share for _, share in read_budgets(proposed(None)))
    assert read_budgets(proposed(3))
    with pytest.raises(Failure):
        read_budgets("1e400%")


def test_a_failing_worker_leaves_the_other_cards(page):
    visitor = sweep(page, "4", text="crash")
    assert all("The worker stopped while it was answering" in card for card in cards(visitor))
    assert "Not all budgets were asked" in visitor.values[page.sweep.panel]


def test_a_stopped_sweep_ends_by_itself(page, fake):
    visitor, tab = Visitor(page), page.sweep
    visitor.values |= {tab.text: "held", page.controls.image: IMAGE, tab.budgets: "4"}
    fake.released.clear()
    before = len(fake.bodies)
    later = visitor.end(tab.sweep(visitor.values), 2, tab.stopped)
    assert later == [{tab.panel: gradio.skip()}]
    assert len(fake.bodies) == before + 1, "nothing more is asked"


def test_a_stopped_sweep_keeps_what_is_there(page):
    visitor, tab = Visitor(page), page.sweep
    visitor.values |= {tab.text: "slow", tab.budgets: "4", page.controls.image: IMAGE}

    async def some():
        turn = tab.sweep(visitor.values)
        for _ in range(3):
            visitor.receive(await anext(turn))
        await turn.aclose()

    asyncio.run(some())
    visitor.receive(tab.stopped(visitor.values))
    first, second = cards(visitor)
    assert "word0" in first and "(stopped)" in first and "(stopped)" in second


def test_bars_are_the_times_beside_the_slowest_one():
    steps = [Step(Run()), Step(Run(), 4), Step(Run(), 2)]  # still being asked
    for step, seconds in zip(steps, (0.1, 0.4, 0.2), strict=True):
        step.run.report = report_of("vispruner", 9, prefill_seconds=seconds)
    assert re.findall(r"<i style='width:(\d+)%'", sweep_html(steps, None)) == ["25", "100", "50"]


def done(text: str, tokens: float) -> Run:
    run = Run()
    run.text, run.ended, run.report = text, True, SimpleNamespace(mean_tokens=tokens)
    return run


@pytest.mark.parametrize(
    "answers, smallest",
    [
        ({9: "red", 4: "red", 1: "red"}, 1),
        ({9: "red", 4: "blue", 1: "red"}, 9),
        ({9: "blue", 4: "red", 1: "red"}, None),
    ],
)
def test_the_smallest_budget_counts_from_above(answers, smallest):
    steps = [Step(done("red", 36)), *(Step(done(a, n), n) for n, a in answers.items())]
    found = smallest_agreeing(steps)
    assert (found and found.budget) == smallest
