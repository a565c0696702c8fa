"""What the page has to draw while an answer comes."""

import asyncio
import json

import httpx
import pytest

pytest.importorskip("gradio")

from llava.serve.web import asking  # noqa: E402
from tests.serve.web.test_parts import at, collect, conversation_about, replying  # noqa: E402


def test_signs_of_life_of_a_worker_are_no_updates_of_the_page(monkeypatch):
    monkeypatch.setattr(asking, "UPDATE_SECONDS", 0)
    prompt = conversation_about("Hi").get_prompt()
    said = ["", "", " a", " a", " a cat", " a cat", " a cat"]
    chunks = [json.dumps({"text": prompt + text, "error_code": 0}) + "\0" for text in said]
    service = replying(at("http://w1:1"), httpx.Response(200, content="".join(chunks)))
    assert [answer.text for answer in collect(service, "Hi")] == ["a", "a cat", "a cat"]


@pytest.mark.parametrize("kind", [httpx.ConnectError, httpx.ConnectTimeout])
def test_what_can_be_chosen_is_said_by_a_worker_that_can_be_reached(kind):
    dropped = httpx.Response(200, json={"alive": False})
    told = httpx.Response(200, json={"conv_mode": "qwen2_5_vl"})
    service = replying(at("http://w1:1"), kind("gone"), dropped, at("http://w2:1"), told)
    assert asyncio.run(service.status("m")) == {"conv_mode": "qwen2_5_vl"}
    service = replying(at("http://w1:1"), httpx.ReadTimeout("busy"))
    assert asyncio.run(service.status("m")) == {}
