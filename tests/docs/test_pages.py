"""Every page says first what it is for, and nothing is written twice."""

import re
from collections import defaultdict

import pytest

from tests.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES = 250  # of the README


def paragraphs(path) -> list[str]:
    """Blocks between empty lines, without those of code."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [block.strip("\n") for block in re.split(r"\n\s*\n", text) if block.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_begins_with_a_title_and_a_sentence_about_what_it_is_for(page):
    title, first = paragraphs(page)[:2]
    assert re.fullmatch(r"# .+", title)
    assert re.match(r"[A-Z`\[]", first) and len(first) > 40, first
    assert re.search(r"[.:]$|\. ", first), first
    start = page.read_text(encoding="utf-8").partition("\n")[2].lstrip("\n")
    assert start.startswith(first[:20]), "a block of code comes first"


def test_no_paragraph_stands_on_two_pages():
    found = defaultdict(set)
    for page in PAGES:
        for block in paragraphs(page):
            words = " ".join(block.split())
            if len(words) > 120 and not block.startswith(("|", "    ")):
                found[words].add(page.name)
    twice = {words[:80]: names for words, names in found.items() if len(names) > 1}
    made = {"Results.md", "Results_Qwen2.5-VL.md"}  # the same program wrote both
    assert {words: names for words, names in twice.items() if names != made} == {}


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES
