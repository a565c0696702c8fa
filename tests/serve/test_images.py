"""Images and long prompts at the worker: spellings, memory, the model's turn."""

from __future__ import annotations

import base64

import pytest

from llava.pruning import build_pruner
from llava.serve.engine import Engine
from llava.serve.protocol import GenerateRequest
from llava.serve.worker_app import Places, worker_app
from tests.golden_cases import SHIPPED, locate
from tests.golden_checks.models import load_checkpoint
from tests.serve.serve_tools import body, call, chunks_of

FOLDER = SHIPPED / "llava-base"
PROMPT = "USER: <image> What? ASSISTANT:"


@pytest.fixture(scope="module")
def engine():
    tokenizer, model, processor = load_checkpoint("tiny-llava-v1.5", FOLDER)
    model.pruner = build_pruner("none")
    engine = Engine(tokenizer, model, processor, "tiny-llava-v1.5")
    really_close, engine.close = engine.close, lambda: None  # servers come and go, it stays
    yield engine
    really_close()
    model.pruner = build_pruner("none")


@pytest.fixture(scope="module")
def image():
    return base64.b64encode(locate("img1_640x360.png", FOLDER).read_bytes()).decode()


def ask(engine, image: str, **changes) -> list[dict]:
    content = body(**{"images": [image], "prompt": PROMPT, **changes})
    (reply,) = call(worker_app(engine, Places(20)), ("/worker_generate_stream", content))
    return chunks_of(reply.content)


def outcome(chunks: list[dict]) -> dict:
    """The last chunk without what differs from run to run."""
    last = chunks[-1]
    for key in ("prefill_seconds", "total_seconds"):
        last["pruning_report"].pop(key)
    return last


def test_wrapped_base64_and_data_urls_are_images(engine, image):
    wrapped = "\n".join(image[start : start + 76] for start in range(0, len(image), 76))
    spellings = [image, wrapped, f"data:image/png;base64,{wrapped}"]
    answers = [outcome(ask(engine, text)) for text in spellings]
    assert answers[0] == answers[1] == answers[2]


def test_images_are_prepared_while_others_have_the_model(engine, image, monkeypatch):
    held, prepare = [], engine.front.picture

    def watched(*args):
        held.append(engine.turns._lock._held)
        return prepare(*args)

    monkeypatch.setattr(engine.front, "picture", watched)
    engine._prepare(GenerateRequest(**body(images=[image], prompt=PROMPT)), "id")
    assert held == [False]


def test_a_request_that_cannot_be_prepared_gives_its_turn_back(engine, image, monkeypatch):
    class Broken(type(engine.model)):
        @property
        def image_settings(self):
            raise RuntimeError("no settings")

    monkeypatch.setattr(engine.model, "__class__", Broken)
    (failed,) = ask(engine, image)
    assert failed["cause"] == "internal"
    monkeypatch.undo()
    assert not engine.turns._lock._held
    assert ask(engine, image)[-1]["error_code"] == 0


def test_a_prompt_that_is_too_long_is_said_as_published(engine, image, monkeypatch):
    monkeypatch.setattr(engine.model.config, "max_position_embeddings", 300)
    (refused,) = ask(engine, image)
    assert refused["cause"] == "prompt_too_long" and refused["error_code"] == 0
    answer = ask(engine, image, pruning={"method": "random", "visual_token_num": 64})
    assert answer[-1]["pruning_report"]["new_tokens"] > 0  # so few tokens leave room
    late = ask(engine, image, pruning={"method": "random", "visual_token_num": 320})
    assert late[-1]["cause"] == "prompt_too_long" and late[-1]["text"] == refused["text"]


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("method", ["none", "random"])
def test_an_answer_fills_the_context_to_its_last_place(engine, image, monkeypatch, images, method):
    """As `generate` does: the last token of an answer takes none."""
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", -1)
    more = {"images": [image] * images, "prompt": PROMPT.replace("<image>", "<image>" * images)}
    more |= {"pruning": {"method": method}, "stop": None}
    chunks = ask(engine, image, **more, max_new_tokens=1)
    report = chunks[-1]["pruning_report"]
    length = report["prompt_tokens"] + report["tokens_per_layer"][0]
    for room, tokens in ((3, 4), (0, 1)):
        monkeypatch.setattr(engine.model.config, "max_position_embeddings", length + room)
        chunks = ask(engine, image, **more, max_new_tokens=20)
        assert chunks[-1]["pruning_report"]["new_tokens"] == tokens
    monkeypatch.setattr(engine.model.config, "max_position_embeddings", length - 1)
    assert ask(engine, image, **more)[-1]["cause"] == "prompt_too_long"
