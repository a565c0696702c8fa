"""Self-speculative generation with trees of guesses: the same answers as one token at a time."""

import gc

import pytest
import torch

from llava.model.language_model import attention, compiled_step
from llava.model.language_model.compiled_step import CompiledStep
from llava.model.language_model.cuda_graphs import GraphStep
from llava.model.lockstep import Numbers
from llava.model.token_choice import TokenChoice
from llava.pruning.testing.tiny import make_own_grids_model, picture
from llava.pruning.twigvlm import TwigVLM
from tests.conftest import ANYRES, SIDE
from tests.model import speculation_tools
from tests.model.speculation_tools import (
    GREEDY,
    SPECULATE,
    Recorder,
    assert_an_end_mark_ends_the_answer,
    assert_caches_hold_the_answer,
    assert_rows_stay_apart,
    assert_scores_are_those_of_one_by_one,
    assert_stopping_criteria_see_every_token,
    assert_traces_describe_the_prompt,
    counted_caches,
    sharpened,
)
from tests.model.test_attention import flash  # noqa: F401
from tests.model.test_position_bias import PlacedTwig
from tests.pruning.test_twigvlm import grown

TREE = dict(tree_nodes=60, tree_depth=4, tree_width=10)


@pytest.fixture
def sharp(make_model):
    return sharpened(make_model(), 3)


def answers(model, ids, images, tree=TREE, **options):
    """Tokens one by one and with trees, and the logs of these."""
    return speculation_tools.answers(model, ids, images, tree, **options)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("nodes", [1, 10, 60])
@pytest.mark.parametrize("width", [1, 2, 10])
def test_greedy_answers_are_those_of_one_token_at_a_time(sharp, sample, depth, nodes, width):
    grown(sharp, 1, 2, visual_token_num=14)
    tree = dict(tree_depth=depth, tree_nodes=nodes, tree_width=width)
    prompt = sample(4, "image", 5)
    plain, fast, logs = answers(sharp, prompt.ids, prompt.images, tree)
    assert torch.equal(plain, fast)
    most = min(nodes, width + (depth - 1) * width * width)
    assert {len(tree) for tree in logs[0].trees} == {most}
    assert {int(tree.depths.max()) for tree in logs[0].trees} <= set(range(1, depth + 1))


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("pruning", [True, False])
@pytest.mark.parametrize("pieces", [(4, "image", 5), (7,), (3, "image", 4, "image", 2)])
def test_so_they_are_for_every_prompt_and_depth_of_the_branch(
    sharp, sample, shared, pruning, pieces
):
    grown(sharp, shared, 3 - shared, visual_token_num=14, enable_pruning=pruning)
    prompt = sample(*pieces)
    plain, fast, logs = answers(sharp, prompt.ids, prompt.images)
    assert torch.equal(plain, fast)
    assert sum(logs[0].accepted) >= 3  # the test would be idle if no guess were ever right
    assert any(len(path) and path != list(range(1, len(path) + 1)) for path in logs[0].paths)


@pytest.mark.parametrize("seed", range(6))
def test_so_they_are_for_twigs_that_differ_from_the_decoder(make_model, sample, seed):
    """Wrong guesses of all kinds: near copies with noise on every weight."""
    model = sharpened(make_model(), 3)
    twig = grown(model, 2, 2, visual_token_num=20).module
    torch.manual_seed(seed)
    for weight in twig.parameters():
        weight.data += 0.3 * weight.std() * torch.randn_like(weight)
    prompt = sample(4, "image", 5, seed=seed)
    tree = dict(tree_nodes=30, tree_width=6)
    plain, fast, logs = answers(model, prompt.ids, prompt.images, tree, max_new_tokens=30)
    assert torch.equal(plain, fast) and len(set(logs[0].accepted)) > 1


@pytest.mark.parametrize("family", ["grouped", "next", "own grids"])
def test_so_they_are_for_every_family(make_model, sample, family):
    if family == "own grids":
        model, images, sizes = make_own_grids_model(), [picture(4, 9)], {}
    elif family == "next":
        model, sizes = make_model(**ANYRES), {"image_sizes": [(SIDE, SIDE // 2)]}
        images = [torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))]
    else:
        model, images, sizes = make_model(mistral=True), sample("image").images, {}
    grown(sharpened(model, 3), 2, 2, visual_token_num=30)
    ids = sample(4, "image", 5).ids
    plain, fast, logs = answers(model, ids, images, **sizes)
    assert torch.equal(plain, fast) and sum(logs[0].accepted) >= 2


def test_a_vocabulary_smaller_than_the_width(make_model):
    model = make_model(vocab_size=7)
    grown(model, 2, 2, enable_pruning=False)
    ids = torch.tensor([[1, 5, 3, 6]])
    plain, fast, logs = answers(model, ids, None)
    assert torch.equal(plain, fast) and sum(logs[0].accepted) >= 1
    assert int((logs[0].trees[0].depths == 1).sum()) <= 7 and len(logs[0].trees[0]) == 60
    assert len(answers(model, ids, None, dict(tree_nodes=60, tree_depth=1))[2][0].trees[0]) == 7


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_exactly_as_many_tokens_as_allowed(sharp, sample, most):
    grown(sharp)
    prompt = sample(4, "image", 5)
    plain, fast, _ = answers(sharp, prompt.ids, prompt.images, max_new_tokens=most)
    assert fast.shape == (1, most) and torch.equal(plain, fast)


def test_a_tree_of_width_one_accepts_what_a_row_does(sharp, sample):
    grown(sharp, visual_token_num=14, draft_stop_prob=0.0)
    prompt = sample(4, "image", 5)
    tree = dict(tree_nodes=4, tree_depth=4, tree_width=1)
    options = dict(GREEDY, max_new_tokens=30, **SPECULATE, return_dict_in_generate=True)
    row = sharp.generate(prompt.ids, images=prompt.images, **options, num_speculations=4)
    fast = sharp.generate(prompt.ids, images=prompt.images, **options, **tree)
    assert torch.equal(row.sequences, fast.sequences)
    steps = len(row.logs[0].accepted) - 2  # at the end rows are cut to what may be accepted
    assert row.logs[0].accepted[:steps] == fast.logs[0].accepted[:steps]
    assert row.logs[0].drafts[:steps] == fast.logs[0].drafts[:steps]


def test_a_twig_that_is_the_rest_of_the_decoder_is_always_right(sharp, sample):
    grown(sharp, 2, 4, enable_pruning=False)
    prompt = sample(4, "image", 5)
    plain, fast, logs = answers(sharp, prompt.ids, prompt.images)
    assert torch.equal(plain, fast) and logs[0].acceptance_rate == 1
    assert logs[0].accepted == [4, 4, 4] and logs[0].tokens_per_step == 5


@pytest.mark.parametrize("given", [{"max_new_tokens": 0}, {"max_length": 1}], ids=str)
def test_an_answer_without_room_is_one_token_as_elsewhere(sharp, sample, given):
    grown(sharp)
    prompt = sample(4, "image", 5)
    options = dict(do_sample=False, eos_token_id=-1, pad_token_id=0, **given)
    options |= {"output_scores": True, "return_dict_in_generate": True}
    plain, fast = (
        sharp.generate(prompt.ids, images=prompt.images, **options, **more)
        for more in ({}, SPECULATE | TREE)
    )
    assert torch.equal(plain.sequences, fast.sequences) and fast.sequences.shape == (1, 1)
    torch.testing.assert_close(fast.scores, plain.scores, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("place", range(6))
def test_an_end_mark_anywhere_ends_the_answer(sharp, sample, place):
    """As a guess, as the decoder's own token, as the first token."""
    grown(sharp, enable_pruning=False)
    prompt = sample(4, "image", 5)
    assert_an_end_mark_ends_the_answer(sharp, prompt, place, TREE)


def test_stopping_criteria_see_every_token(sharp, sample):
    grown(sharp, enable_pruning=False)
    assert_stopping_criteria_see_every_token(sharp, sample(4, "image", 5), TREE)


@pytest.mark.parametrize("most", [12, 30])
def test_rules_about_scores_look_at_the_way_through_the_tree(sharp, sample, most):
    grown(sharp)
    prompt = sample(4, "image", 5)
    rules = dict(repetition_penalty=1.5, no_repeat_ngram_size=2, max_new_tokens=most)
    plain, fast, logs = answers(sharp, prompt.ids, prompt.images, **rules)
    assert torch.equal(plain, fast) and sum(logs[0].accepted) >= 1
    free = answers(sharp, prompt.ids, prompt.images, max_new_tokens=most)[1]
    assert not torch.equal(fast, free)


@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.3}], ids=str)
def test_scores_are_those_the_tokens_were_chosen_from(sharp, sample, rules):
    grown(sharp)
    assert_scores_are_those_of_one_by_one(sharp, sample(4, "image", 5), TREE, **rules)


def test_rows_of_a_batch_stay_apart(sharp, sample):
    grown(sharp, visual_token_num=14)
    assert_rows_stay_apart(sharp, sample, TREE)


def test_a_streamer_sees_the_answer_and_nothing_else(sharp, sample):
    grown(sharp, enable_pruning=False)
    prompt, streamer = sample(4, "image", 5), Recorder()
    output = sharp.generate(
        prompt.ids, images=prompt.images, **GREEDY, **SPECULATE, **TREE, streamer=streamer
    )
    assert sum(streamer.puts[1:], []) == output[0].tolist()
    assert streamer.ended == 1 and len(streamer.puts[1:]) < 12


# --- how attention is computed --------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("pruning", [True, False])
def test_every_backend_gives_the_same(
    make_model,
    sample,
    flash,  # noqa: F811
    backend,
    pruning,
    monkeypatch,
):
    """FlashAttention knows no mask: nodes run on sdpa, and the prompt before them does not."""
    run, sizes = attention._flash, []

    def watched(q, k, v):
        sizes.append(q.shape[2])
        return run(q, k, v)

    monkeypatch.setattr(attention, "_flash", watched)
    model = sharpened(make_model(), 3)
    model.config._attn_implementation = model.model.step.backend = backend
    for layer in model.model.layers:
        layer.self_attn.backend = backend
    twig = grown(model, 2, 2, visual_token_num=14, enable_pruning=pruning)
    assert {layer.self_attn.backend for layer in twig.module.layers} == {backend}
    prompt = sample(4, "image", 5)
    plain = model.generate(prompt.ids, images=prompt.images, **GREEDY)
    before = [size for size in sizes if size > 5]
    sizes.clear()
    _, fast, logs = answers(model, prompt.ids, prompt.images)
    assert torch.equal(plain, fast) and sum(logs[0].accepted) >= 3
    if backend == "flash_attention_2":  # one by one, then with trees, where the twig runs as well
        assert len(before) == 5 + pruning
        wanted = 2 * before + before[: not pruning]
        assert sorted(size for size in sizes if size > 5) == sorted(wanted)
    else:
        assert not sizes


@pytest.mark.parametrize("kind", [CompiledStep, GraphStep])
@pytest.mark.parametrize(("shared", "method"), [(0, TwigVLM), (2, TwigVLM), (2, PlacedTwig)])
def test_compiled_and_captured_steps_verify_trees(sharp, sample, monkeypatch, kind, shared, method):
    monkeypatch.setattr(compiled_step, "compiled", lambda function: function)
    grown(sharp, shared, 2, method, visual_token_num=14)
    prompt, taken = sample(4, "image", 5), []
    run = kind.run

    def counted(step, plan):
        taken.append(plan.branches is not None)
        return run(step, plan)

    monkeypatch.setattr(kind, "run", counted)
    plain, fast, logs = answers(sharp, prompt.ids, prompt.images, max_new_tokens=70)
    assert torch.equal(plain, fast)
    more = {"capture": lambda work, device: work} if kind is GraphStep else {}
    sharp.model.step = kind(sharp.model.rotary, "sdpa", **more)
    for _ in "ab":  # captured steps serve a second answer
        found = answers(sharp, prompt.ids, prompt.images, max_new_tokens=70)
        assert torch.equal(found[1], plain) and found[2][0].accepted == logs[0].accepted
        gc.collect()
    # In every step but the first: levels of guesses, nodes in the first layers and in the rest.
    passes = 3 + (1 if shared == 0 else 2)
    assert sum(taken) >= 2 * (len(logs[0].accepted) - 1) * passes


@pytest.mark.slow
def test_trees_are_compiled(sharp, sample):
    grown(sharp, 2, 2, visual_token_num=14)
    prompt = sample(4, "image", 5)
    plain, fast, logs = answers(sharp, prompt.ids, prompt.images, max_new_tokens=30)
    sharp.compile_decoding = True
    again = answers(sharp, prompt.ids, prompt.images, max_new_tokens=30)
    assert torch.equal(plain, fast) and torch.equal(again[1], plain)
    assert again[2][0].accepted == logs[0].accepted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trees_in_half_precision_have_scores_in_float32(sharp, sample, dtype):
    sharp.to(dtype)
    grown(sharp, 2, 4, enable_pruning=False)
    prompt = sample(4, "image", 5)
    images = prompt.images.to(dtype)
    _, fast, logs = answers(sharp, prompt.ids, images)
    assert fast.shape == (1, 12)
    for tree in logs[0].trees:
        assert tree.scores.dtype == torch.float32
        own = torch.cat([torch.zeros(1), tree.scores])
        assert bool((own[1:] <= own[tree.parents]).all())


# --- caches, logs, waits --------------------------------------------------------------------


def test_caches_hold_the_path_that_was_accepted_and_never_move(sharp, sample, monkeypatch):
    from llava.model import kv_cache
    from llava.model.tree_speculation import TreeSpeculation

    made, caches = counted_caches(monkeypatch), []
    verify = TreeSpeculation._verified

    def watched(own, tree, logits):
        out = yield from verify(own, tree, logits)
        held = [own.cache.entries(layer) for layer in range(own.depth)]
        caches.append([(k.clone(), v.clone()) for k, v in held])
        return out

    monkeypatch.setattr(TreeSpeculation, "_verified", watched)
    grown(sharp, 2, 2, visual_token_num=14)
    prompt = sample(4, "image", 5)
    options = dict(images=prompt.images, **GREEDY | {"max_new_tokens": 40})
    out = sharp.generate(prompt.ids, **options, **SPECULATE, **TREE, return_dict_in_generate=True)
    fast, (log,) = out.sequences, out.logs
    assert len(made) == 2 * (6 + 2)  # keys and values of 6 layers and the twig's 2, once
    for size, _, twig in assert_caches_hold_the_answer(log, prompt.ids.shape[1]):
        assert twig == size  # it sees an accepted token in the next step
    # The same tokens one by one:
    caches_of_one = []
    append = kv_cache.KVCache.append
    monkeypatch.setattr(
        kv_cache.KVCache,
        "append",
        lambda cache, *words: caches_of_one.append(cache) or append(cache, *words),
    )
    assert torch.equal(sharp.generate(prompt.ids, **options), fast)
    whole = caches_of_one[-1]
    for (keys, values), layer in zip(caches[-1], range(6), strict=True):
        wanted = whole.entries(layer)
        length = min(keys.shape[2], wanted[0].shape[2])
        for found, one_by_one in zip((keys, values), wanted, strict=True):
            pair = found[:, :, :length], one_by_one[:, :, :length]
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-3)  # processors round differently


def test_the_trace_describes_the_prompt_whatever_the_strategy(sharp, sample):
    grown(sharp, visual_token_num=14)
    assert_traces_describe_the_prompt(sharp, sample(4, "image", 5), TREE)


def test_the_log_says_what_every_step_did(sharp, sample):
    grown(sharp, visual_token_num=14)
    prompt = sample(4, "image", 5)
    _, fast, (log,) = answers(sharp, prompt.ids, prompt.images)
    steps = len(log.accepted)
    assert len(log.trees) == len(log.paths) == len(log.drafts) == len(log.kv_lengths) == steps
    tokens = []
    for tree, path, bonus in zip(log.trees, log.paths, log.bonus, strict=True):
        parents = [int(tree.parents[node - 1]) for node in path]
        assert parents == [0, *path][: len(path)]
        tokens += [int(tree.tokens[node - 1]) for node in path] + [bonus]
    assert tokens[:12] == fast[0].tolist() and list(map(len, log.paths)) == log.accepted
    assert log.acceptable == [4] * steps
    assert log.acceptance_rate == sum(log.accepted) / (4 * steps)
    assert all(0 <= p <= 1 for step in log.probabilities for p in step)


def test_a_step_waits_for_the_device_once(sharp, sample, monkeypatch):
    waits, read = [], Numbers.answer
    monkeypatch.setattr(Numbers, "answer", lambda asked: waits.append(len(asked)) or read(asked))
    monkeypatch.setattr(TokenChoice, "on_host", None)
    grown(sharp, enable_pruning=False)
    prompt = sample(4, "image", 5)
    _, _, logs = answers(sharp, prompt.ids, prompt.images)
    assert waits == [1] * len(logs[0].accepted)


# --- sampling -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"temperature": 1.7, "top_p": 0.9, "top_k": 0}], ids=str)
@pytest.mark.parametrize("tree", [TREE, dict(tree_nodes=3, tree_depth=3, tree_width=1)], ids=str)
def test_sampled_answers_are_those_of_one_token_at_a_time(sharp, sample, seed, options, tree):
    """After one seed: the noise of a token belongs to its place in the answer."""
    grown(sharp, visual_token_num=14)
    prompt, found = sample(4, "image", 5), []
    options = dict(GREEDY, do_sample=True, max_new_tokens=30, **options)
    for more in ({}, SPECULATE | tree):
        torch.manual_seed(seed)
        found.append(sharp.generate(prompt.ids, images=prompt.images, **options, **more))
    assert torch.equal(*found)


def test_nearly_no_temperature_is_greedy(sharp, sample):
    grown(sharp)
    prompt = sample(4, "image", 5)
    plain = sharp.generate(prompt.ids, images=prompt.images, **GREEDY)
    options = dict(GREEDY, do_sample=True, temperature=1e-4, **SPECULATE, **TREE)
    assert torch.equal(plain, sharp.generate(prompt.ids, images=prompt.images, **options))


# --- the interface --------------------------------------------------------------------------


def test_a_method_or_a_call_asks_for_trees(sharp, sample):
    grown(sharp, tree_nodes=20, tree_depth=2)
    prompt = sample(4, "image", 5)

    def logs(**options):
        words = dict(GREEDY, **SPECULATE, return_dict_in_generate=True, **options)
        return sharp.generate(prompt.ids, images=prompt.images, **words).logs[0]

    assert {(len(tree), tree.deepest) for tree in logs().trees} == {(20, 2)}
    assert {len(tree) for tree in logs(tree_nodes=5).trees} == {5}
    assert not logs(tree_nodes=0).trees and logs(tree_nodes=0, num_speculations=2).drafts
    with pytest.raises(ValueError, match="num_speculations would not be read, as guesses are a tr"):
        logs(num_speculations=3)
    with pytest.raises(ValueError, match="tree_width would not be read, as guesses are a row"):
        logs(tree_nodes=0, tree_width=3)
    for name, value in (("tree_depth", 0), ("tree_width", 0), ("tree_nodes", -1)):
        with pytest.raises(ValueError, match=f"{name} .{value}. must be a whole number from"):
            logs(**{name: value})
