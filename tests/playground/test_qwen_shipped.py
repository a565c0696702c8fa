"""The small Qwen2.5-VL that ships: it answers, pruned and unpruned, on pictures of any shape."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava.front_end import FrontEnd
from llava.model.builder import load_pretrained_model
from llava.playground import trained_part
from llava.pruning import build_pruner, trace_pruning
from playground import questions, scenes
from playground.qwen_glimpse import part_folder, plus_folder
from playground.train_qwen import OUTPUT

TASKS = (questions.existence, questions.attribute, questions.relation, questions.options)
SHAPES = [(336, 336), (448, 252), (280, 392)]


@pytest.fixture(scope="module")
def front():
    tokenizer, model, processor, _ = load_pretrained_model(
        str(OUTPUT), None, "", device="cpu", torch_dtype=torch.float32
    )
    return FrontEnd(tokenizer, model, processor, "qwen2_5_vl")


def asked(size, tasks=TASKS):
    """Pictures with a question each."""
    found = []
    for number, task in enumerate(tasks):
        scene = scenes.make_scene(scenes.HELD_OUT_SEEDS + 5000 + number, size)
        rng = np.random.default_rng(number)
        found.append((Image.fromarray(scenes.render(scene)), task(scene, rng)))
    return [(picture, question) for picture, question in found if question is not None]


def answers(front, pairs, method="none", **options):
    """What is answered to the pairs, in one batch, and the trace."""
    model = front.model
    prompts = [front.encode(front.prompt(question.text, num_images=1)) for _, question in pairs]
    pictures = [[front.picture(picture)] for picture, _ in pairs]
    inputs = front.inputs(prompts, pictures, [question.text for _, question in pairs])
    model.pruner = build_pruner(method, **options)
    try:
        with trace_pruning(model) as trace:
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    finally:
        model.pruner = build_pruner("none")
    return front.decode(ids), trace


def right(texts, pairs):
    return sum(text == question.answer for text, (_, question) in zip(texts, pairs, strict=True))


@pytest.mark.parametrize("size", SHAPES)
def test_questions_about_pictures_of_any_shape_are_answered(front, size):
    pairs = asked(size)
    assert right(answers(front, pairs)[0], pairs) >= len(pairs) - 1


def test_pictures_of_several_shapes_in_one_batch_are_answered_as_one_by_one(front):
    pairs = [pair for size in SHAPES for pair in asked(size, TASKS[:2])]
    alone = [answers(front, [pair])[0][0] for pair in pairs]
    assert answers(front, pairs)[0] == alone


def test_a_fifth_of_the_tokens_is_enough_for_most_answers(front):
    pairs = asked(SHAPES[0]) + asked(SHAPES[1])
    texts, trace = answers(front, pairs, "vispruner", visual_token_ratio=0.222)
    assert right(texts, pairs) >= len(pairs) - 2
    tokens, kept = torch.tensor(trace.unpruned_lengths), trace.visual_tokens[0]
    assert torch.equal(kept, (0.222 * tokens).round().long())


def test_the_shipped_glimpse_drops_most_tokens_and_the_answers_stay(front):
    part = trained_part("glimpseprune", str(OUTPUT))
    pairs = asked(SHAPES[0]) + asked(SHAPES[2])
    texts, trace = answers(front, pairs, "glimpseprune", new_modules=part)
    assert right(texts, pairs) >= len(pairs) - 2
    assert trace.visual_tokens[-1].sum() < 0.2 * sum(trace.unpruned_lengths)


def test_with_the_adapter_the_glimpse_that_was_trained_for_it_is_used():
    adapter = plus_folder(OUTPUT)
    tokenizer, model, processor, _ = load_pretrained_model(
        str(adapter), str(OUTPUT), "", device="cpu", torch_dtype=torch.float32
    )
    pairs = asked((336, 336))
    plus = FrontEnd(tokenizer, model, processor, "qwen2_5_vl")
    texts, trace = answers(plus, pairs, "glimpseprune")
    assert right(texts, pairs) == len(pairs)
    assert trace.visual_tokens[-1].sum() < 0.2 * sum(trace.unpruned_lengths)
    assert trained_part("glimpseprune", str(adapter)) == str(part_folder(adapter))


def test_what_ships_stays_small():
    models = [OUTPUT, plus_folder(OUTPUT)]
    parts = [*models, *map(part_folder, models)]
    files = [file for part in parts for file in part.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40e6
