"""Self-speculative generation where images have grids of their own and positions three axes."""

import pytest
import torch
from transformers import GenerationConfig

from llava.pruning import build_pruner
from llava.pruning.chain import Chain
from llava.pruning.testing.tiny import make_own_grids_model, pad_batch, picture, sample
from tests.model.speculation_tools import GREEDY, ROW, SPECULATE, Recorder, answers, sharpened
from tests.pruning.test_twigvlm import grown
from tests.second_device import SECOND, devices, place

WIDE, TALL = (4, 9), (7, 5)


@pytest.fixture
def sharp():
    return sharpened(make_own_grids_model(), 8)


PROMPTS = {
    "one image": ((4, "image", 5), [picture(*WIDE)]),
    "two images": ((3, "image", 4, "image", 2), [picture(*WIDE), picture(*TALL)]),
    "an image at the end": ((4, "image"), [picture(*TALL)]),
    "text": ((7,), None),
}


@pytest.mark.parametrize("share", [0.4, None])
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_answers_are_those_of_one_token_at_a_time(sharp, name, share):
    pieces, images = PROMPTS[name]
    budget = {"visual_token_num": None, "visual_token_ratio": share}
    grown(sharp, 1, 2, **(budget if share else {"enable_pruning": False}))
    plain, fast, logs = answers(sharp, sample(*pieces).ids, images)
    assert torch.equal(plain, fast)
    assert sum(logs[0].accepted) >= 3  # the test would be idle if no guess were ever right


@pytest.mark.parametrize("pieces", [(4, "image", 5), (4, "image")])
def test_tokens_that_were_dropped_before_leave_the_places_of_the_answer(sharp, pieces):
    twig = grown(sharp, 1, 2, visual_token_num=8)
    sharp.pruner = Chain(build_pruner("random", visual_token_num=12), twig)
    plain, fast, logs = answers(sharp, sample(*pieces).ids, [picture(*WIDE)])
    assert torch.equal(plain, fast) and sum(logs[0].accepted) >= 1


def test_rules_about_tokens_look_at_the_prompt_as_well(sharp):
    """As in plain transformers: the released models have a repetition penalty by default."""
    grown(sharp, visual_token_num=14)
    prompt, images = sample(40, "image", 5), [picture(*WIDE)]
    free = answers(sharp, prompt.ids, images)[0]
    rules = dict(repetition_penalty=1.5, no_repeat_ngram_size=2)
    plain, fast, _ = answers(sharp, prompt.ids, images, **rules)
    assert torch.equal(plain, fast) and not torch.equal(plain, free)
    sharp.generation_config.repetition_penalty = 1.5
    own = sharp.generate(prompt.ids, images=images, **GREEDY, **SPECULATE, no_repeat_ngram_size=2)
    assert torch.equal(own, plain)


#: all tokens but one, so that an end comes as soon as it may
ENDS = list(range(1, 90))
#: (limits, tokens that they allow)
LENGTHS = {
    "given by nobody": ({}, 19),  # transformers' own limit is 20
    "keyword": ({"max_length": 9}, 8),
    "no room": ({"max_length": 1}, 1),
    "config": ({"generation_config": GenerationConfig(max_length=30, eos_token_id=-1)}, 29),
    "least": ({"min_length": 6, "eos_token_id": ENDS, "max_length": 30}, 6),
    "least and new": ({"min_length": 6, "eos_token_id": ENDS, "max_new_tokens": 30}, 6),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("batch", [False, True])
def test_lengths_count_the_answer_and_its_start_mark(sharp, name, batch):
    """As in LLaVA, though ids of the prompt stand in front here, as many as a method leaves."""
    given, length = LENGTHS[name]
    prompts = [sample(4, "image", 5), sample(2, "image", 5)]
    ids, mask = pad_batch([own.ids for own in prompts[: 1 + batch]])
    options = {"images": [picture(*WIDE)] * len(ids), "attention_mask": mask, "do_sample": False}
    options |= {"eos_token_id": -1, "pad_token_id": 0, **given}
    found = [sharp.generate(ids, **options).shape[1]]
    sharp.pruner = build_pruner("random", visual_token_num=12)
    found.append(sharp.generate(ids, **options).shape[1])
    grown(sharp, visual_token_num=14)
    for tree in (ROW, {"tree_nodes": 20}):
        found.append(sharp.generate(ids, **options, **SPECULATE, **tree).shape[1])
    assert found == [length] * 4


@pytest.mark.parametrize("tree", [ROW, {"tree_nodes": 20}], ids=str)
def test_rows_of_a_batch_stay_apart(sharp, tree):
    grown(sharp, visual_token_num=None, visual_token_ratio=0.4)
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2), sample(5, seed=3)]
    ids, mask = pad_batch([p.ids for p in prompts])
    images = [picture(*WIDE), picture(*TALL)]
    for rules in ({}, {"repetition_penalty": 1.3}):
        plain, fast, logs = answers(sharp, ids, images, tree, attention_mask=mask, **rules)
        assert torch.equal(plain, fast)
        for row, own in enumerate(([images[0]], [images[1]], None)):
            options = {**GREEDY, **SPECULATE, **tree, **rules}
            alone = sharp.generate(prompts[row].ids, images=own, **options)
            assert torch.equal(fast[row], alone[0])
    assert len({tuple(log.accepted) for log in logs}) > 1  # they accept different numbers


def test_a_streamer_sees_the_answer_and_nothing_else(sharp):
    grown(sharp, visual_token_num=14)
    streamer = Recorder()
    output = sharp.generate(
        sample(4, "image", 5).ids,
        images=[picture(*WIDE)],
        **GREEDY,
        **SPECULATE,
        streamer=streamer,
    )
    streamed = [token for put in streamer.puts for token in put]
    assert streamed[-len(output[0]) :] == output[0].tolist() and streamer.ended == 1


def test_a_budget_out_of_reach_names_the_image(sharp):
    grown(sharp, visual_token_num=10)
    with pytest.raises(ValueError, match="image 1, of 30 x 30 tokens: .*out of reach"):
        sharp.generate(
            sample(4, "image", "image", 5).ids,
            images=[picture(*WIDE), picture(30, 30)],
            **GREEDY,
            **SPECULATE,
        )


def test_guessed_tokens_are_those_of_one_device(sharp):
    """The tower and deep layers elsewhere; the twig goes where its neighbours are."""
    prompt, images = sample(4, "image", 5), [picture(*WIDE)]
    grown(sharp, 2, 2, visual_token_num=None, visual_token_ratio=0.4)
    expected, _, logs = answers(sharp, prompt.ids, images)
    for part in (sharp.visual, *sharp.model.layers[4:]):
        place(part, SECOND)
    with torch.no_grad(), devices() as log:
        sharp.pruner = sharp.pruner
        options = {**GREEDY, **SPECULATE, "return_dict_in_generate": True}
        found = sharp.generate(prompt.ids, images=images, **options)
    assert found.sequences.tolist() == expected.tolist() and log.copies
    assert found.logs[0].accepted == logs[0].accepted
