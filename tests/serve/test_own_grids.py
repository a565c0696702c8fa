"""The model worker with a model whose images have grids of their own."""

from __future__ import annotations

import base64

import pytest

from llava.pruning import build_pruner
from llava.serve.engine import Engine
from llava.serve.web.report import read_report
from llava.serve.worker_app import Places, worker_app
from tests.golden_cases import locate
from tests.golden_checks.models import load_checkpoint
from tests.paths import GOLDEN
from tests.serve.serve_tools import body, call, chunks_of

STREAM = "/worker_generate_stream"
GRID = (13, 23)  # of 640 x 360 pixels


@pytest.fixture(scope="module")
def engine():
    tokenizer, model, processor = load_checkpoint("tiny-qwen2.5-vl-cut", GOLDEN)
    model.pruner = build_pruner("none")
    engine = Engine(tokenizer, model, processor, "qwen", concurrency=2)
    yield engine
    engine.close()


def ask(engine, **changes) -> dict:
    image = base64.b64encode(locate("img1_640x360.png", GOLDEN / "qwen2_5_vl").read_bytes())
    prompt = "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    own = {"model": "qwen", "images": [image.decode()], "prompt": prompt, "max_new_tokens": 3}
    (reply,) = call(worker_app(engine, Places(5)), (STREAM, body(**{**own, **changes})))
    chunk = chunks_of(reply.content)[-1]
    assert chunk["error_code"] == 0, chunk
    return chunk["pruning_report"]


def test_the_status_says_which_methods_it_has_and_why_not_the_others(engine):
    status = engine.status()
    reasons = {entry["name"]: entry["reason"] for entry in status["pruning_methods"]}
    assert reasons["vispruner"] is None and "'text_tower'" in reasons["cdpruner"]
    assert status["num_patches"] is None and status["conv_mode"] == "qwen2_5_vl"


@pytest.mark.parametrize(
    ("pruning", "grid", "kept"),
    [
        ({"method": "none"}, GRID, 299),
        ({"method": "vispruner", "visual_token_num": 20}, GRID, 20),
        ({"method": "fastervlm", "options": {"visual_token_ratio": 0.111}}, GRID, 33),
        ({"method": "downsample", "visual_token_num": 32}, (4, 7), 28),
    ],
)
def test_a_report_counts_in_the_grid_of_the_image(engine, pruning, grid, kept):
    found = read_report(ask(engine, pruning=pruning))
    (image,) = found.images
    assert image.grid == grid and image.total == grid[0] * grid[1]
    assert len(image.kept) == found.tokens_per_layer[0] == kept
    assert found.dense_tokens == 299 and image.crops == [[0, 0, 1, 1]]


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>"])
def test_a_question_that_holds_what_stands_for_an_image_is_refused_in_a_sentence(engine, mark):
    prompt = f"<|im_start|>user\nWhat is {mark}?<|im_end|>\n<|im_start|>assistant\n"
    app = worker_app(engine, Places(5))
    (reply,) = call(app, (STREAM, body(model="qwen", prompt=prompt)))
    (chunk,) = chunks_of(reply.content)
    assert (reply.status_code, chunk["cause"]) == (400, "bad_request")
    assert mark in chunk["text"] and "<image>" in chunk["text"]
