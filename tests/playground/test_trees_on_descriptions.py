"""Trees of guesses on all questions that ask for a description: the answers of greedy search."""

import json
from pathlib import Path

import pytest
import torch

from llava.front_end import FrontEnd
from llava.image_io import load_image
from llava.model.builder import load_pretrained_model
from llava.playground import benchmark_dir
from llava.pruning import build_pruner
from playground.train import LLAVA

pytestmark = pytest.mark.slow
QUESTIONS = Path(benchmark_dir()) / "describe/questions.jsonl"
GREEDY = dict(do_sample=False, max_new_tokens=128)
TREES = dict(generation_strategy="self_speculative", return_dict_in_generate=True)


@pytest.fixture(scope="module")
def front():
    tokenizer, model, processor, _ = load_pretrained_model(
        str(LLAVA), None, LLAVA.name, device="cpu", torch_dtype=torch.float32
    )
    model.pruner = build_pruner("twigvlm_plus", visual_token_num=64)
    return FrontEnd(tokenizer, model, processor, "vicuna_v1")


def test_trees_give_the_greedy_answer_to_every_description(front):
    """In fp32, with the tree that `twigvlm_plus` guesses on this device."""
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    differ, accepted, steps = [], 0, 0
    for line in lines:
        picture = front.picture(load_image(str(QUESTIONS.parents[1] / "images" / line["image"])))
        prompt = front.encode(front.prompt(line["text"], num_images=1))
        inputs = front.inputs([prompt], [[picture]], [line["text"]])
        plain = front.model.generate(**inputs, **GREEDY)
        fast = front.model.generate(**inputs, **GREEDY, **TREES)
        if not torch.equal(plain, fast.sequences):
            differ.append(line["question_id"])
        (log,) = fast.logs
        assert log.trees  # and no rows
        accepted, steps = accepted + sum(log.accepted), steps + len(log.accepted)
    assert len(lines) == 60 and not differ
    assert accepted > 2 * steps  # the test would be idle if hardly a guess were right
