"""The text of an answer while it is written: that of the whole, and nothing that goes away."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from llava.front_end import FrontEnd
from llava.mm_utils import KeywordsStoppingCriteria
from llava.playground import default_model_path
from llava.serve import engine
from llava.serve.answer_text import AnswerStreamer, without_begun
from llava.serve.protocol import GenerateRequest

TEXTS = (
    "Here:\n  one\n    two\n three",
    "a\n\n  b \n c",
    "def f():\n    return 1\n",
    "日本\n  語 🙂\n 🙂",
)


class Kept(AnswerStreamer):
    """pieces: the texts as they come"""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(default_model_path())


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_answer_spaces_at_the_start_of_lines_included(tokenizer, text, at_once):
    streamer = Kept(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    for answer in range(2):  # a streamer may be used again
        streamer.put(torch.tensor([[1, 13]]))  # the prompt
        for piece in ids.split(at_once):
            streamer.put(piece)
        streamer.end()
        whole = "".join(streamer.pieces)
        assert whole == tokenizer.decode(ids) * (answer + 1) == text * (answer + 1)


@pytest.mark.parametrize("fast", [True, False])
def test_ids_that_are_no_tokens_have_no_text(fast):
    tokenizer = AutoTokenizer.from_pretrained(default_model_path(), use_fast=fast)
    tokenizer.add_tokens(["<box>"])
    ids = tokenizer("one <box> two", add_special_tokens=False).input_ids
    unknown = len(tokenizer)
    more = torch.tensor([own for number in ids for own in (number, unknown)])
    streamer = Kept(tokenizer)
    streamer.put(torch.tensor([[1, 13]]))
    for number in more:
        streamer.put(number[None])
    streamer.end()
    whole = tokenizer.decode(ids)
    front = FrontEnd(tokenizer, None, None, "vicuna_v1")
    assert "".join(streamer.pieces) == whole and front.decode(more[None]) == [whole]
    criteria = KeywordsStoppingCriteria(["two"], tokenizer, torch.tensor([[1]]))
    assert criteria(torch.tensor([[*ids, unknown]]))


@pytest.mark.parametrize(
    "text, stop, shown",
    [
        ("a b", "b c", "a "),
        ("a ", "b", "a "),
        ("aab", "aabb", ""),
        ("a\n", "\n\n", "a"),
        ("a", "", "a"),
        ("a", None, "a"),
        ("", "x", ""),
    ],
)
def test_what_may_become_the_stop_text_is_kept_back(text, stop, shown):
    assert without_begun(text, stop) == shown


class Seat:
    def pass_on(self, meanwhile):
        meanwhile()


class Job:
    seat = Seat()

    request = GenerateRequest(prompt="Q:", stop="two three")


@pytest.mark.parametrize(
    "end, last",
    [("two three four", "one "), ("two", "one two"), ("two\n  three", "one two\n  three")],
)
def test_no_chunk_shows_what_a_later_one_takes_back(tokenizer, end, last, monkeypatch):
    monkeypatch.setattr(engine.Writer, "report", lambda _: {})
    chunks = []
    outbox = type("Outbox", (), {"put": staticmethod(chunks.append)})
    writer = engine.Writer(tokenizer, Job, outbox)
    writer.put(torch.tensor([[1]]))
    try:
        for number in tokenizer(f"one {end}", add_special_tokens=False).input_ids:
            writer.put(torch.tensor([number]))
        writer.end()
    except engine.Stopped:
        pass
    texts = [chunk["text"] for chunk in chunks]
    assert texts[-1] == f"Q:{last}"
    assert all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
