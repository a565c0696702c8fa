"""Batches whose rows guess trees: all rows in one step, each as if it were alone."""

import time

import pytest
import torch

from llava.model.language_model import compiled_step
from llava.model.language_model.compiled_step import CompiledStep
from llava.model.language_model.cuda_graphs import GraphStep
from llava.model.lockstep import Numbers
from llava.pruning.twigvlm import TwigVLM
from tests.model.speculation_tools import (
    GREEDY,
    SPECULATE,
    answers,
    batch_of_three,
    counted_caches,
    sharpened,
)
from tests.model.test_attention import flash  # noqa: F401
from tests.model.test_position_bias import PlacedTwig
from tests.pruning.test_twigvlm import grown

TREE = dict(tree_nodes=20, tree_depth=4, tree_width=5)


@pytest.fixture
def model(make_model):
    """Guesses of which some are wrong, so that rows accept different numbers."""
    model = sharpened(make_model(), 3)
    twig = grown(model, 2, 2, visual_token_num=14).module
    torch.manual_seed(0)
    for weight in twig.parameters():
        weight.data += 0.3 * weight.std() * torch.randn_like(weight)
    return model


@pytest.fixture
def batch(sample):
    """(ids, mask, images) of three rows, the last without an image."""
    return batch_of_three(sample)


def one_by_one(model, batch, **options):
    """Answers and logs of every row by itself, without padding."""
    (ids, mask, images), found = batch, []
    options = {**GREEDY, "return_dict_in_generate": True, **SPECULATE, **TREE, **options}
    for row in range(len(ids)):
        own = None if row == 2 else images[row : row + 1]
        found.append(model.generate(ids[row : row + 1, mask[row].bool()], images=own, **options))
    return [out.sequences[0].tolist() for out in found], [out.logs[0] for out in found]


def test_rows_do_together_what_each_does_alone(model, batch, monkeypatch):
    ids, mask, images = batch
    alone, logs = one_by_one(model, batch, max_new_tokens=20)
    waits, read, runs = [], Numbers.answer, []
    monkeypatch.setattr(Numbers, "answer", lambda asked: waits.append(len(asked)) or read(asked))
    made = counted_caches(monkeypatch)
    hook = model.model.layers[5].register_forward_pre_hook(lambda *_: runs.append(1))
    options = {**GREEDY, **SPECULATE, **TREE, "max_new_tokens": 20}
    began = time.perf_counter()
    out = model.generate(
        ids, images=images, attention_mask=mask, **options, return_dict_in_generate=True
    )
    spent = time.perf_counter() - began
    hook.remove()
    assert out.sequences.tolist() == alone
    for own, together in zip(logs, out.logs, strict=True):
        for name in ("accepted", "paths", "bonus", "kv_lengths"):
            assert getattr(own, name) == getattr(together, name), name
    seconds = [log.seconds for log in out.logs]
    assert sum(seconds) <= spent and all(log.seconds >= log.first_seconds > 0 for log in out.logs)
    steps = [len(log.accepted) for log in out.logs]
    assert len({tuple(log.accepted) for log in out.logs}) == 3 and min(steps) < max(steps)
    # One wait for each prompt, then one for each step of the rows that have not ended.
    later = [sum(own > step for own in steps) for step in range(1, max(steps))]
    assert waits == [1, 1, 1, *later]
    assert len(runs) == 3 + len(later)
    assert len(made) == 3 * 2 * (6 + 2)  # buffers of every row and layer, once


@pytest.mark.parametrize("most", [1, 2, 9])
def test_answers_are_those_of_one_token_at_a_time(model, batch, most):
    ids, mask, images = batch
    plain, fast, _ = answers(model, ids, images, TREE, attention_mask=mask, max_new_tokens=most)
    assert torch.equal(plain, fast) and fast.shape == (3, most)


def test_so_they_are_where_heads_share_keys(make_model, batch):
    model = sharpened(make_model(mistral=True), 3)
    grown(model, 2, 2, visual_token_num=14)
    ids, mask, images = batch
    plain, fast, logs = answers(model, ids, images, TREE, attention_mask=mask)
    assert torch.equal(plain, fast) and all(sum(log.accepted) for log in logs)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_row_that_ends_leaves_the_others_as_they_are(model, batch, row, place):
    ids, mask, images = batch
    end = model.generate(ids, images=images, attention_mask=mask, **GREEDY)[row, place]
    options = dict(attention_mask=mask, eos_token_id=int(end))
    plain, fast, _ = answers(model, ids, images, TREE, **options)
    assert torch.equal(plain, fast) and end in fast[row, : place + 1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"temperature": 1.7, "top_k": 0}], ids=str)
def test_sampled_batches_are_those_of_one_token_at_a_time(model, batch, seed, options):
    """After one seed, all rows."""
    (ids, mask, images), found = batch, []
    options = dict(GREEDY, do_sample=True, max_new_tokens=20, attention_mask=mask, **options)
    for more in ({}, SPECULATE | TREE):
        torch.manual_seed(seed)
        found.append(model.generate(ids, images=images, **options, **more))
    assert torch.equal(*found) and len(set(found[0].flatten().tolist())) > 3


def test_rules_and_scores_are_those_of_one_by_one(model, batch):
    (ids, mask, images), found = batch, []
    options = dict(GREEDY, repetition_penalty=1.3, output_scores=True, attention_mask=mask)
    for more in ({}, SPECULATE | TREE):
        out = model.generate(ids, images=images, **options, **more, return_dict_in_generate=True)
        found.append(out)
    assert torch.equal(found[0].sequences, found[1].sequences)
    pair = (torch.stack(out.scores) for out in found)
    torch.testing.assert_close(*pair, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "flash_attention_2"])
def test_every_backend_gives_the_same(model, batch, flash, backend):  # noqa: F811
    model.config._attn_implementation = model.model.step.backend = backend
    for layer in [*model.model.layers, *model.pruner.module.layers]:
        layer.self_attn.backend = backend
    ids, mask, images = batch
    plain, fast, _ = answers(model, ids, images, TREE, attention_mask=mask)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("kind", [CompiledStep, GraphStep])
@pytest.mark.parametrize("method", [TwigVLM, PlacedTwig])
def test_batches_are_the_same_where_steps_are_compiled(
    make_model, batch, monkeypatch, kind, method
):
    monkeypatch.setattr(compiled_step, "compiled", lambda function: function)
    model = sharpened(make_model(), 3)
    grown(model, 2, 2, method, visual_token_num=14)
    ids, mask, images = batch
    plain, fast, _ = answers(model, ids, images, TREE, attention_mask=mask)
    more = {"capture": lambda work, device: work} if kind is GraphStep else {}
    model.model.step = kind(model.model.rotary, "sdpa", **more)
    again = answers(model, ids, images, TREE, attention_mask=mask)
    assert torch.equal(plain, fast) and torch.equal(again[1], plain)
