"""Questions about one image share work, and get the answers that they get alone."""

from contextlib import contextmanager

import pytest
import torch

from llava.eval.compare import method_table
from llava.model.kv_cache import KVCache
from llava.model.language_model import attention, modeling_llama
from llava.model.reuse import Picture, PrefixCache
from llava.pruning import METHODS, build_pruner, trace_pruning
from llava.pruning.testing import tiny
from tests.conftest import SIDE, make_pruner

GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=-1)
CHAINS = ["vispruner+fastv", "pool+pyramiddrop"]


@pytest.fixture(params=[*sorted(METHODS), *CHAINS])
def pruner(request):
    return make_pruner(request.param)


def picture(seed, size=(SIDE, SIDE), crops=None):
    shape = (3, SIDE, SIDE) if crops is None else (crops, 3, SIDE, SIDE)
    return Picture(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), size)


def prompts_about(sample, *lengths, images=1):
    """Prompts with the same beginning and text of these lengths behind the image."""
    first = sample(4, *["image"] * images, seed=1).ids[0]
    return [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in lengths]


def alone(model, prompt, pictures, question, **kwargs):
    pixels = [p.pixels for p in pictures]
    with trace_pruning(model) as trace:
        out = model.generate(
            prompt[None],
            images=torch.stack(pixels) if pixels else None,
            image_sizes=[p.size for p in pictures],
            questions=[question] * len(pictures) if pictures else None,
            output_scores=True,
            return_dict_in_generate=True,
            **{**GREEDY, **kwargs},
        )
    return out.sequences[0], out.scores[0][0], trace


def shared(model, cache, prompts, pictures, questions, **kwargs):
    with trace_pruning(model) as trace:
        out = cache.generate(
            prompts,
            pictures,
            questions,
            output_scores=True,
            return_dict_in_generate=True,
            **{**GREEDY, **kwargs},
        )
    return out.sequences, out.scores[0], trace


def check(model, prompts, pictures, questions, batches):
    cache = PrefixCache(model)
    for batch in batches:
        own = [[x[i] for i in batch] for x in (prompts, pictures, questions)]
        tokens, logits, trace = shared(model, cache, *own)
        for row, case in enumerate(zip(*own, strict=True)):
            own_tokens, own_logits, own_trace = alone(model, *case)
            assert torch.equal(tokens[row], own_tokens)
            torch.testing.assert_close(logits[row], own_logits, atol=1e-4, rtol=1e-4)
            for layer in range(6):
                assert trace.kv_lengths[layer][row] == own_trace.kv_lengths[layer][0]
                assert trace.visual_tokens[layer][row] == own_trace.visual_tokens[layer][0]


def test_questions_about_one_image_get_the_answers_they_get_alone(model, pruner, sample):
    model.pruner = pruner
    prompts = prompts_about(sample, 5, 9, 3, 2, 12)
    questions = ["a cat", "two dogs", "is it red", "why", "how many"]
    check(model, prompts, [[picture(0)]] * 5, questions, [[0, 1, 2], [3, 4]])


def test_images_and_beginnings_may_mix_in_a_batch(model, pruner, sample):
    model.pruner = pruner
    a, b = picture(1), picture(2)
    prompts = [
        *prompts_about(sample, 5, 9),
        sample(12, "image", 1, seed=5).ids[0],
        *prompts_about(sample, 3, 2, images=2),
        sample("image", "image", seed=6).ids[0],
    ]
    pictures = [[a], [b], [a], [a, b], [b, a], [a, a]]
    check(model, prompts, pictures, ["what", "who"] * 3, [[0, 1, 2], [3, 4, 5], [0, 5, 3]])


def test_crops_of_images_share_as_well(anyres_model, sample):
    model = anyres_model
    first = [picture(0, (42, 84), crops=3)]
    second = [picture(1, (2 * SIDE, 2 * SIDE), crops=5)]
    prompts = prompts_about(sample, 5, 9, 3, 2)
    for name in ("none", "pyramiddrop"):  # where a stage lies may depend on the size of the image
        model.pruner = make_pruner(name, 50)
        pictures = [first, first, second, first]
        check(model, prompts, pictures, ["what"] * 4, [[0, 1], [2, 3], [1, 2, 3]])


@pytest.mark.parametrize("name", ["pyramiddrop", "sinkpruner", "tops"])
def test_images_that_are_cut_may_stand_beside_one_that_is_left_alone(own_grids_model, sample, name):
    """More layers are the same for all questions about the one that is left alone."""
    large, small = (Picture(tiny.picture(*grid), grid[::-1]) for grid in ((7, 5), (1, 2)))
    own_grids_model.pruner = make_pruner(name)
    prompts = prompts_about(sample, 5, 9, 3, 2)
    pictures = [[small], [large], [small], [large]]
    check(own_grids_model, prompts, pictures, ["what"] * 4, [[2], [0, 1], [0, 1], [3, 2], [2]])


def test_beams_share(model, sample):
    model.pruner = make_pruner("fastv")
    prompts, pictures = prompts_about(sample, 5, 9), [[picture(0)]] * 2
    tokens, _, _ = shared(model, PrefixCache(model), prompts, pictures, ["a"] * 2, num_beams=3)
    for row, prompt in enumerate(prompts):
        own, _, _ = alone(model, prompt, pictures[0], "a", num_beams=3)
        assert torch.equal(tokens[row], own)


def test_text_only_prompts_may_be_among_them(model, sample):
    prompts = [*prompts_about(sample, 5, 9), sample(7).ids[0]]
    check(model, prompts, [[picture(0)], [picture(0)], []], ["a"] * 3, [[0, 1, 2], [2], [1]])


@contextmanager
def counting(model):
    """Tokens that each decoder layer runs inside the block, and crops that the tower does."""
    tokens, crops = [0] * len(model.model.layers), [0]

    def count(layer):
        def hook(_, inputs):
            tokens[layer] += inputs[0].shape[0] * inputs[0].shape[1]

        return hook

    def see(_, inputs):
        crops[0] += len(inputs[0])

    embeddings = model.get_vision_tower().vision_tower.vision_model.embeddings
    handles = [embeddings.register_forward_pre_hook(see)]
    for number, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(count(number)))
    yield tokens, crops
    for handle in handles:
        handle.remove()


DEPTHS = [
    (build_pruner("none"), 6),
    (build_pruner("vispruner", visual_token_num=10), 6),
    (build_pruner("fastv", visual_token_num=10, layer=4), 3),  # layer 3 is probed
    (build_pruner("pyramiddrop", layer_list=(2, 3, 4)), 2),
    (build_pruner("vscan", visual_token_num=10), 3),
    (build_pruner("nuwa", visual_token_num=10), 2),
    (build_pruner("dart", visual_token_num=10, layer=4), 4),
    (build_pruner("dart", visual_token_num=10, layer=4, key_states="input"), 3),  # of layer 3
    (build_pruner("v2drop", layer_list=[4, 5], keep_list=[0.5, 0.5]), 3),  # what layer 3 changes
    (build_pruner("tops", visual_token_num=10), 2),
    (build_pruner("sinkpruner", visual_token_num=10), 1),
    (build_pruner("fastv", visual_token_num=10, layer=1), 0),
    (build_pruner("vispruner+fastv", fastv_visual_token_num=10, vispruner_visual_token_num=20), 0),
]


@pytest.mark.parametrize("pruner, depth", DEPTHS, ids=lambda value: str(value)[:30])
def test_an_image_runs_once_through_the_layers_its_method_leaves_alone(
    model, sample, pruner, depth
):
    model.pruner, cache, image = pruner, PrefixCache(model), picture(0)
    prompts = prompts_about(sample, 9, 5, 7, 3)
    entering = pruner.token_schedule(36, 6)[0] + 5  # with the text before the image
    with counting(model) as (tokens, crops):
        for own, tails, once in ((prompts[:2], 2 * 9, entering), (prompts[2:], 2 * 7, 0)):
            before = list(tokens)
            shared(model, cache, own, [[image]] * 2, ["a"] * 2, max_new_tokens=1)
            ran = [after - was for after, was in zip(tokens, before, strict=True)]
            assert ran[:depth] == [tails + once] * depth
            if depth < 6:  # where the method looks at all tokens, and may drop some
                assert tails < ran[depth] <= 2 * entering + tails
    assert crops == [1]


@pytest.mark.parametrize("pruner, depth", DEPTHS[:3], ids=lambda value: str(value)[:30])
def test_what_questions_about_one_image_begin_with_is_held_once(
    model, sample, pruner, depth, monkeypatch
):
    longest, append = [0] * 6, KVCache.append

    def spy(self, layer, keys, values):
        longest[layer] = max(keys.shape[2], longest[layer])
        return append(self, layer, keys, values)

    model.pruner, cache = pruner, PrefixCache(model)
    prompts, own = prompts_about(sample, 9, 5, 7), [[picture(0)]] * 3
    shared(model, cache, prompts, own, ["a"] * 3)
    monkeypatch.setattr(KVCache, "append", spy)
    shared(model, cache, prompts, own, ["a"] * 3)
    assert longest[:depth] == [9] * depth and min(longest[depth:], default=10) > 9


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("held", [2**26, 1])
def test_attention_behind_a_shared_beginning_is_attention(groups, held, monkeypatch):
    monkeypatch.setattr(attention, "WEIGHTS_HELD", held)
    known, valid = torch.randn(2, groups, 11, 8), torch.ones(3, 5, dtype=torch.bool)
    q, k, v = torch.randn(3, 4, 5, 8), *torch.randn(2, 3, groups, 5, 8)
    valid[1, :2] = False
    whole = [
        torch.cat([x.expand(3, -1, -1, -1), own], 2) for x, own in zip(known, (k, v), strict=True)
    ]
    seen = torch.cat([torch.ones(3, 11, dtype=torch.bool), valid], 1)
    for count in (5, 1):
        masks = [attention.padded_causal_mask(x, count) for x in (seen, valid)]
        out = attention.attend_behind(q[:, :, -count:], k, v, masks[1], known.unbind())
        wanted = attention.attend(q[:, :, -count:], *whole, masks[0], "sdpa")
        places = valid[:, -count:]  # what comes out on padding is nobody's business
        torch.testing.assert_close(out.transpose(1, 2)[places], wanted.transpose(1, 2)[places])
    out = attention.attend_behind(q, k, v, None, known.unbind())
    torch.testing.assert_close(out, attention.attend(q, *whole, None, "sdpa"))


def test_an_image_asked_about_once_costs_no_extra_pass(model, sample):
    cache, prompts = PrefixCache(model), prompts_about(sample, 9, 5, 4)
    one, two = picture(0), picture(1)
    with counting(model) as (tokens, _):
        shared(model, cache, prompts[:2], [[one], [two]], ["a"] * 2, max_new_tokens=1)
        assert tokens[0] == 2 * (41 + 9)
        shared(model, cache, prompts[2:], [[two]], ["a"], max_new_tokens=1)
        shared(model, cache, prompts[1:2], [[two]], ["a"], max_new_tokens=1)
    # the second question about an image runs its beginning apart, the third need not
    assert tokens[0] == 2 * (41 + 9) + (41 + 4) + 5


@pytest.mark.parametrize("name", ["pyramiddrop", "tops", "vscan", "sinkpruner"])
@pytest.mark.parametrize("first", ["small", "wide"])
def test_an_image_that_stays_whole_shares_a_batch_with_one_that_is_pruned(
    own_grids_model, sample, name, first
):
    """Without a cut its beginning reaches the last layer, that of the other the first cut."""
    model = own_grids_model
    model.pruner = make_pruner(name)
    small, wide = (Picture(tiny.picture(*grid), grid[::-1]) for grid in ((2, 3), (4, 9)))
    pictures = [small, small, wide, wide] if first == "small" else [wide, wide, small, small]
    prompts, cache = prompts_about(sample, 4, 5, 6, 7), PrefixCache(model)
    expected = [
        model.generate(ids[None], images=[own.pixels], pad_token_id=0, **GREEDY)[0]
        for ids, own in zip(prompts, pictures, strict=True)
    ]
    for _ in range(2):  # the second time beginnings are known
        own = [[picture] for picture in pictures]
        found = cache.generate(prompts, own, ["a"] * 4, pad_token_id=0, **GREEDY)
        assert torch.equal(found, torch.stack(expected))


def test_inputs_of_layers_that_are_wanted_are_those_of_the_whole_prompt(model, sample):
    cache, image = PrefixCache(model), picture(1)
    wanted = {"output_hidden_states": True, "return_dict_in_generate": True, **GREEDY}
    for lengths in ((2, 3), (4, 5)):  # the second time its beginning is known
        prompts = prompts_about(sample, *lengths)
        out = cache.generate(prompts, [[image]] * 2, [""] * 2, pad_token_id=0, **wanted)
        size = len(prompts[1]) + 35
        assert [x.shape for x in out.hidden_states[0]] == [(2, size, 32)] * 7


def test_another_method_empties_the_cache(model, sample):
    cache, prompts = PrefixCache(model), prompts_about(sample, 9, 5)
    pictures = [[picture(0)]] * 2
    for name in ("none", "random", "vispruner"):
        model.pruner = make_pruner(name)
        tokens, _, _ = shared(model, cache, prompts, pictures, ["a"] * 2)
        for row, prompt in enumerate(prompts):
            assert torch.equal(tokens[row], alone(model, prompt, pictures[row], "a")[0])


def test_a_method_that_changes_layers_it_calls_untouched_is_an_error(model, sample):
    class Wrong(type(build_pruner("fastv"))):
        def before_layer(self, index, prefill):
            return prefill.keep(prefill.index != 6) if index == 0 else prefill

    model.pruner = Wrong(visual_token_num=10, layer=4)
    with pytest.raises(ValueError, match="fastv changes tokens before layer 0, but its reusable_l"):
        prompts, pictures = prompts_about(sample, 9, 5), [[picture(0)]] * 2
        PrefixCache(model).generate(prompts, pictures, ["a"] * 2, **GREEDY)


def test_questions_reach_only_the_methods_that_read_them(model, sample, monkeypatch):
    seen = []
    for name in ("vispruner", "cdpruner"):
        model.pruner = make_pruner(name)
        method, hook = type(model.pruner), type(model.pruner).after_encoder

        def spy(self, vision, hook=hook):
            seen.append(vision.questions)
            return hook(self, vision)

        monkeypatch.setattr(method, "after_encoder", spy)
        alone(model, prompts_about(sample, 5)[0], [picture(0)], "is it red")
    assert seen == [None, ["is it red"]]


@pytest.mark.parametrize("name, crops", [("vispruner", 1), ("cdpruner", 2)])
def test_two_questions_share_an_image_unless_the_method_reads_them(model, sample, name, crops):
    model.pruner, image = make_pruner(name), picture(0)
    with counting(model) as (_, seen):
        asked = (prompts_about(sample, 5, 9), [[image]] * 2, ["is it red", "who is it"])
        shared(model, PrefixCache(model), *asked, max_new_tokens=1)
    assert seen == [crops]
    # the page with all methods says the same
    assert (method_table.shared(type(model.pruner)) == "nothing") == (crops == 2)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_layers_behind_a_known_beginning_share_one_mask(model, sample, monkeypatch, lengths):
    made, causal_mask = [], attention.causal_mask

    def counted(*args):
        made.append(args)
        return causal_mask(*args)

    cache, image = PrefixCache(model), picture(0)
    for _ in range(2):
        prompts = prompts_about(sample, *lengths)
        for place in (attention, modeling_llama):
            monkeypatch.setattr(place, "causal_mask", counted)
        made.clear()
        shared(model, cache, prompts, [[image]] * 2, ["a"] * 2, max_new_tokens=1)
    assert len(made) == 1
