"""A server of a LLaVA in the layout of transformers gets texts, and the tokens of images."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TextStreamer

from llava.engine import EngineError, VLLMEngine
from llava.engine.routes import ImageRoute
from llava.pruning.testing.tiny import make_pruner
from tests.engine.stub_vllm import stub_vllm
from tests.engine.test_generate import IMAGES, ask, front_of
from tests.model.checkpoint_tools import CHECKPOINT, load


@pytest.fixture(scope="module")
def whole():
    return front_of(load(CHECKPOINT))


@pytest.fixture(scope="module")
def server(whole):
    tokenizer, model, *_ = load(CHECKPOINT)
    with stub_vllm(model, takes_embeddings=False, tokenizer=tokenizer) as server:
        yield server


@pytest.fixture(scope="module")
def remote(server):
    return front_of(load(CHECKPOINT, engine=VLLMEngine(server.url)))


@pytest.mark.parametrize("name", ["none", "vispruner", "prumerge"])
def test_answers_are_those_of_the_whole_model(whole, remote, server, name):
    for front in (whole, remote):
        front.model.pruner = make_pruner(name, 64)
    for images in ([], IMAGES[:1], IMAGES):
        expected = ask(whole, "What is it?", images=images)
        assert torch.equal(ask(remote, "What is it?", images=images), expected)
        assert server.paths[-1] == "/v1/chat/completions"
        parts = server.requests[-1]["messages"][0]["content"]
        assert [part["type"] for part in parts].count("image_embeds") == len(images)


def test_texts_come_piece_by_piece(whole, remote, capsys):
    for front in (whole, remote):
        front.model.pruner = make_pruner("none")
        ask(front, "What is it?", streamer=TextStreamer(front.tokenizer, skip_prompt=True))
    first, second, _ = capsys.readouterr().out.split("\n")
    assert first == second and first


def test_names_in_the_caches_follow_image_method_and_budget(remote, server):
    names = []
    for method, budget, image in (
        ("vispruner", 64, 0),
        ("vispruner", 64, 0),
        ("vispruner", 32, 0),
        ("divprune", 64, 0),
        ("vispruner", 64, 1),
    ):
        remote.model.pruner = make_pruner(method, budget)
        ask(remote, f"What is {len(names)}?", images=IMAGES[image : image + 1])
        parts = server.requests[-1]["messages"][0]["content"]
        names += [part["uuid"] for part in parts if part["type"] == "image_embeds"]
    assert names[0] == names[1] and len(set(names)) == 4


def test_another_tokenizer_is_an_error(remote, server, monkeypatch):
    monkeypatch.setattr(type(server), "prompt_ids", lambda self, body: [1, 2, 3])
    with pytest.raises(EngineError, match="makes other tokens of a prompt than the checkpoint"):
        ask(remote, "What is it?")


def test_a_server_with_other_embeddings_has_another_model(server):
    other = copy.deepcopy(server.model)
    torch.manual_seed(0)
    other.model.embed_tokens.weight.data = torch.randn_like(other.model.embed_tokens.weight)
    with stub_vllm(other, takes_embeddings=False, tokenizer=server.tokenizer) as wrong:
        with pytest.raises(ValueError, match="serves another model"):
            load(CHECKPOINT, engine=VLLMEngine(wrong.url))


def test_the_way_is_taken_where_the_other_is_closed(remote, whole):
    assert isinstance(remote.model.engine.places[0].route, ImageRoute)
