"""Layers of prompts and of vision towers as graphs: the same answers, and few graphs."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from llava.blocks import rope_of
from llava.model.kv_cache import KVCache
from llava.model.language_model import causal_lm, compiling, prompt_layer
from llava.model.language_model.cuda_graphs import GraphStep
from llava.model.language_model.layers import Step
from llava.model.multimodal_encoder import clip_encoder, qwen2_5_vl_encoder
from llava.model.reuse import Picture, PrefixCache
from llava.pruning import METHODS, build_pruner
from llava.pruning.testing import tiny
from tests.conftest import SIDE, make_pruner
from tests.kernels import kernels
from tests.model.test_compiled_step import KERNEL
from tests.model.test_decode_step import CHAINS, GREEDY, SPECULATE, assert_same, batch, generate
from tests.model.test_key_bias import METHODS as WEIGHING
from tests.model.test_position_bias import METHODS as PLACED
from tests.pruning.test_twigvlm import grown

WAYS = ["as it is", pytest.param("compiled", marks=pytest.mark.slow)]
#: where layers run through `compiled`
MODULES = prompt_layer, clip_encoder, qwen2_5_vl_encoder
#: kernels of a layer on a prompt, as it is and compiled
DECODER, TOWER, ANY_GRID = (22, 13), (14, 11), (20, 11)
#: grids of images in blocks: one window, several of one size, of many sizes, images of equal grids
GRIDS = [[(3, 4)], [(8, 8)], [(9, 9), (2, 3)], [(5, 7), (5, 7), (9, 2)]]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """What is compiled runs as it is, or compiled."""
    if request.param == "compiled":
        return request.getfixturevalue("compiler")
    for module in MODULES:
        monkeypatch.setattr(module, "compiled", lambda function: function)


@pytest.fixture
def ran(monkeypatch):
    """The layers that run through `compiled`, without being compiled."""
    layers = []

    def noted(function):
        def call(layer, *args):
            layers.append(layer)
            return function(layer, *args)

        return call

    for module in MODULES:
        monkeypatch.setattr(module, "compiled", noted)
    return layers


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def both(model, call):
    """What `call()` gives with prompts as they are and compiled."""
    try:
        model.compile_prefill = False
        plain = call()
        model.compile_prefill = True
        return plain, call()
    finally:
        model.compile_prefill = False


def assert_no_change(model, inputs, **options):
    assert_same(*both(model, lambda: generate(model, inputs, max_new_tokens=2, **options)))


# --- the same answers -----------------------------------------------------------------------


@pytest.mark.parametrize("method", [*sorted(METHODS), *CHAINS])
def test_answers_of_a_padded_batch_are_the_same_with_every_method(way, model, sample, method):
    model.pruner = make_pruner(method)
    assert_no_change(model, batch(sample))


@pytest.mark.parametrize("method", ["none", "fastv", "sparsevlm", "vispruner+pyramiddrop"])
def test_padding_may_stand_behind_the_tokens(way, model, sample, method):
    model.pruner = make_pruner(method)
    inputs = batch(sample)
    inputs["input_ids"] = inputs.pop("inputs")
    with torch.no_grad():
        plain, found = both(model, lambda: model(**inputs))
    torch.testing.assert_close(found.logits, plain.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [*WEIGHING, *PLACED], ids=lambda method: method.name)
def test_biases_of_attention_are_kept(way, model, sample, method):
    model.pruner = method
    assert_no_change(model, batch(sample))


@pytest.mark.parametrize("pieces", [(4, "image", 9), (5, "image", 3, "image", 2), (17,)], ids=str)
@pytest.mark.parametrize("method", ["none", "fastv", "visionzip"])
def test_one_image_or_several_or_none_make_no_difference(way, anyres_model, sample, method, pieces):
    anyres_model.pruner, prompt = make_pruner(method), sample(*pieces)
    inputs = dict(inputs=prompt.ids)
    if prompt.images is not None:
        sizes = [(2 * SIDE, SIDE)] * len(prompt.images)
        inputs |= dict(images=prompt.images[:, None].expand(-1, 3, -1, -1, -1), image_sizes=sizes)
    assert_no_change(anyres_model, inputs)


@pytest.mark.parametrize("method", ["none", "fastv", "vispruner+pyramiddrop", "restore+vispruner"])
def test_positions_on_three_axes_are_served(way, own_grids_model, method):
    own_grids_model.pruner, prompt = make_pruner(method), tiny.sample(3, "image", 4)
    assert_no_change(own_grids_model, dict(inputs=prompt.ids, images=[tiny.picture(3, 4)]))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_grouped_queries_and_written_out_attention_are_served(way, make_model, sample, backend):
    model = make_model(mistral=True)
    for layer in model.model.layers:
        layer.self_attn.backend = backend
    model.pruner = make_pruner("pyramiddrop")
    assert_no_change(model, batch(sample))


@pytest.mark.parametrize("nodes", [0, 12])
def test_rows_and_trees_are_guessed_alike(way, make_model, sample, nodes):
    model, prompt = make_model(), sample(4, "image", 5)
    model.lm_head.weight.data *= 8
    grown(model, 2, 2, visual_token_num=30, draft_stop_prob=0.0, tree_nodes=nodes)
    inputs = dict(images=prompt.images, **GREEDY, **SPECULATE)
    plain, found = both(model, lambda: model.generate(prompt.ids, **inputs))
    assert torch.equal(found.sequences, plain.sequences)


def test_what_prompts_share_is_run_once(way, model, sample):
    first = sample(4, "image", seed=1).ids[0]
    prompts = [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in (9, 5, 7)]
    pixels = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def answers():
        known, picture = PrefixCache(model), Picture(pixels, (SIDE, SIDE))
        return known.generate(prompts, [[picture]] * 3, ["a"] * 3, **GREEDY)

    assert torch.equal(*both(model, answers))


def test_the_tower_gives_the_same_features_and_serves_batches_of_any_size(way, model):
    tower, images = model.get_vision_tower(), torch.randn(4, 3, SIDE, SIDE)
    plain, found = both(model, lambda: [tower(images[:n]) for n in (1, 2, 3, 4)])
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    before = graphs()
    both(model, lambda: tower(torch.randn(5, 3, SIDE, SIDE)))
    assert graphs() == before


@pytest.mark.parametrize(
    "wanted", [{}, {0: {"salience", "output"}, 3: {"keys"}}], ids=["none", "cues"]
)
def test_images_of_any_grid_give_the_same_features_and_cues(way, own_grids_model, wanted):
    tower = own_grids_model.get_vision_tower()
    wanted = {layer: frozenset(names) for layer, names in wanted.items()}
    images = [[tiny.picture(*grid) for grid in grids] for grids in GRIDS]

    @torch.no_grad()
    def features():
        groups = [group for own in images for group in tower.features(own, wanted)]
        return [(group.features, group.cues) for group in groups]

    plain, found = both(own_grids_model, features)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


# --- what is compiled, and what is not ------------------------------------------------------


@pytest.mark.parametrize(
    "method, decoder, vision",
    [
        (build_pruner("none"), range(6), [0, 1, 2]),
        (build_pruner("fastv", layer=2, visual_token_num=10), [0, 2, 3, 4, 5], [0, 1, 2]),
        (make_pruner("visionzip"), range(6), [0, 1]),
    ],
    ids=["none", "fastv", "visionzip"],
)
def test_layers_that_are_looked_into_run_as_they_are(model, sample, ran, method, decoder, vision):
    """FastV reads attention in front of its layer, VisionZip in the last layer of the tower."""
    layers = model.model.layers
    tower = model.get_vision_tower().vision_tower.vision_model.encoder.layers
    model.pruner, prompt = method, sample(4, "image", 5)
    both(model, lambda: model.generate(prompt.ids, images=prompt.images, **GREEDY))
    assert ran == [*(tower[n] for n in vision), *(layers[n] for n in decoder)]


def test_gradients_are_for_layers_as_they_are(model, sample, ran):
    prompt = sample(4, "image", 5)
    model.compile_prefill = True
    assert model(prompt.ids, images=prompt.images).logits.requires_grad
    model.compile_prefill = False
    assert ran == []


def test_layers_that_somebody_watches_run_as_they_are(model, sample, ran):
    """A hook would be part of the graph, and make one of every layer."""
    layers, prompt, seen = model.model.layers, sample(4, "image", 5), []
    hooks = [
        layers[1].register_forward_hook(lambda *_: seen.append("behind 1")),
        layers[3].register_forward_pre_hook(lambda *_: seen.append("before 3")),
    ]
    try:
        both(model, lambda: generate(model, dict(inputs=prompt.ids, images=prompt.images)))
    finally:
        for hook in hooks:
            hook.remove()
    assert {*layers} - {*ran} == {layers[1], layers[3]}
    assert seen[:2] == seen[-2:] == ["behind 1", "before 3"]


@pytest.mark.parametrize("asked", ["gradients", "a hook that brings weights"])
def test_towers_with_gradients_or_under_hooks_run_as_they_are(own_grids_model, ran, asked):
    tower, image = own_grids_model.get_vision_tower(), [tiny.picture(3, 4)]
    tower.compile_layers = True
    try:
        if asked == "gradients":
            assert tower(image)[0].requires_grad
        else:
            tower._hf_hook = None
            with torch.no_grad():
                tower(image)
        assert ran == []
    finally:
        tower.compile_layers = False
        vars(tower).pop("_hf_hook", None)


def test_every_layer_of_a_tower_of_any_grid_is_two_calls(own_grids_model, ran):
    """Cues come from between them."""
    own_grids_model.pruner = make_pruner("visionzip")
    inputs = dict(inputs=tiny.sample(3, "image", 4).ids, images=[tiny.picture(5, 7)])
    both(own_grids_model, lambda: generate(own_grids_model, inputs, max_new_tokens=1))
    blocks = own_grids_model.get_vision_tower().blocks
    assert ran[: 2 * len(blocks)] == [block for block in blocks for _ in "ab"]


def test_keys_that_a_method_looks_at_come_from_the_graph(model, sample, ran):
    model.pruner, prompt = make_pruner("dart"), sample(4, "image", 5)
    both(model, lambda: model.generate(prompt.ids, images=prompt.images, **GREEDY))
    assert {*model.model.layers} <= {*ran}


def test_assigning_decoding_compiles_prompts_on_a_gpu_alone(model, monkeypatch):
    model.compile_decoding = True
    assert not model.compile_prefill
    model.compile_prefill = True
    assert model.compile_prefill and model.get_vision_tower().compile_layers
    model.compile_decoding = False
    assert not model.compile_prefill and not model.get_vision_tower().compile_layers

    class Graphs(GraphStep):
        def __init__(self, *args):
            super().__init__(*args, capture=lambda work, device: work)

    monkeypatch.setattr(causal_lm, "GraphStep", Graphs)
    monkeypatch.setattr(causal_lm, "check_compiler", lambda device: None)
    monkeypatch.setattr(type(model.model.layers[0]), "device", torch.device("cuda"))
    model.compile_decoding = True
    assert model.compile_prefill
    model.compile_decoding = False


@pytest.mark.slow
def test_nothing_is_compiled_for_another_length(compiler, model, sample):
    model.pruner = build_pruner("fastv", layer=2, visual_token_num=10)
    prompts = [sample(4, "image", 5), sample(9, "image", 3), sample(2, "image", 27)]
    asked = [dict(inputs=p.ids, images=p.images) for p in prompts]
    wanted = [generate(model, own, max_new_tokens=1) for own in asked]
    compiling.compiled.cache_clear()
    torch.compiler.reset()
    model.compile_prefill, counted, found = True, [graphs()], []
    for own in asked:
        found.append(generate(model, own, max_new_tokens=1))
        counted.append(graphs())
    model.compile_prefill = False
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
    assert counted[0] + 2 == counted[1] == counted[-1], "one graph for each kind of layer"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "pyramiddrop", "sparsevlm", "visionzip"])
def test_nothing_is_compiled_after_a_prompt_and_a_batch(compiler, model, sample, method):
    model.pruner = make_pruner(method)

    def ask(*prompts):
        ids, mask = tiny.pad_batch([p.ids for p in prompts])
        images = [p.images for p in prompts if p.images is not None]
        images = dict(images=torch.cat(images)) if images else {}
        return generate(model, dict(inputs=ids, attention_mask=mask, **images), max_new_tokens=1)

    model.compile_prefill = True
    ask(sample(4, "image", 5))
    ask(sample(3, "image", 9), sample(12, "image", 2))
    ask(sample(4, "image", 5), sample(4, "image", 5, seed=1))  # rows of one length: no mask
    before = graphs()
    assert before > 0
    ask(sample(14, "image", 32))
    ask(sample(40))
    ask(sample(4, "image", 3, "image", 7, "image", 2))
    ask(sample(3, "image", 9), sample(24, "image", 2), sample(5), sample(8, "image", 8))
    ask(sample(3, "image", 36), sample(3, "image", 36), sample(3, "image", 36))
    assert graphs() == before
    model.compile_prefill = False


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "next", "own grids"])
def test_switching_methods_and_budgets_compiles_nothing(compiler, request, sample, family):
    """One row or several, each with a mask and without, are four graphs of the decoder; a tower of
    crops has one for a single crop, one for several, a tower of any grid two halves of a layer."""
    name = {"llava": "model", "next": "anyres_model", "own grids": "own_grids_model"}[family]
    model, share = request.getfixturevalue(name), 5 if family == "next" else 1

    def ask(*prompts):
        ids, mask = tiny.pad_batch([p.ids for p in prompts])
        count = sum(0 if p.images is None else len(p.images) for p in prompts)
        inputs: dict = dict(inputs=ids, attention_mask=mask)
        if count:
            inputs |= dict(images=torch.cat([p.images for p in prompts if p.images is not None]))
            inputs |= dict(questions=["What is it?"] * count)
        if count and family == "next":
            sizes = [(2 * SIDE, SIDE)] * count
            inputs |= dict(images=inputs["images"][:, None].expand(-1, 3, -1, -1, -1))
            inputs |= dict(image_sizes=sizes)
        if count and family == "own grids":
            sides = [(5, 7), (6, 6), (9, 4)] if count < 3 else [(5, 7)]
            inputs |= dict(images=[tiny.picture(*sides[n % len(sides)]) for n in range(count)])
        generate(model, inputs, max_new_tokens=1)

    compiling.compiled.cache_clear()
    torch.compiler.reset()
    start = graphs()
    model.compile_prefill = True
    try:
        ask(sample(4, "image", 5))
        ask(sample(3, "image", 9), sample(12, "image", 2))
        ask(sample(5), sample(5, seed=1))
        model.pruner = make_pruner("restore", 10 * share)  # its bias is a mask of a single row
        ask(sample(4, "image", 5))
        before = graphs()
        assert before - start == 4 + (1 if family == "next" else 2)
        for method in [*METHODS, *CHAINS, "restore+vispruner"]:
            for budget in (10, 14):
                try:
                    model.pruner = make_pruner(method, budget * share)
                except ValueError:
                    continue  # needs what this family has not
                if family == "next" and model.pruner.vision.anyres_tiles is not None:
                    continue  # wants its images cut in another way
                ask(sample(14, "image", 32))
                ask(sample(40))
                ask(sample(4, "image", 3, "image", 7, "image", 2))
                ask(sample(3, "image", 9), sample(24, "image", 2), sample(5), sample(8, "image", 8))
                assert graphs() == before, method
    finally:
        model.compile_prefill = False


@pytest.mark.slow
def test_images_of_any_grid_and_videos_are_two_graphs(compiler, own_grids_model):
    tower = own_grids_model.get_vision_tower()
    images = [[tiny.picture(*grid) for grid in grids] for grids in GRIDS]
    compiling.compiled.cache_clear()
    torch.compiler.reset()
    before = graphs()
    tower.compile_layers = True
    try:
        with torch.no_grad():
            for own in [*images, list(tiny.video(3, 5, 6).pixels)]:
                tower(own)
        assert graphs() - before == 2
    finally:
        tower.compile_layers = False


@pytest.mark.slow
@pytest.mark.parametrize("part", ["decoder", "tower"])
def test_a_layer_on_a_prompt_is_compiled_to_few_kernels(compiler, make_model, part):
    model = make_model()
    if part == "decoder":
        layer, x = model.model.layers[0], torch.randn(1, 70, 32)
        step = Step(model.model.rotary(torch.arange(70)[None], x.dtype))
        plain = kernels(lambda: layer(x, step, KVCache(6)))
        run, args, most = prompt_layer.run_compiled, (layer, x, step, KVCache(6)), DECODER
    else:
        layer = model.get_vision_tower().vision_tower.vision_model.encoder.layers[0]
        args, most = (layer, torch.randn(1, 37, 24), None, frozenset(), True), TOWER
        plain = kernels(lambda: clip_encoder.run_layer(*args))
        run = compiling.compiled(clip_encoder.run_layer)
    compiling.compiled.cache_clear()
    torch.compiler.reset()
    with torch.no_grad():
        _, (code,) = run_and_get_code(run, *args)
    count = len(KERNEL.findall(code[code.index("def call(") :]))
    assert len(plain) <= most[0], plain
    assert count <= most[1], code


@pytest.mark.slow
def test_a_layer_of_a_tower_of_any_grid_is_compiled_to_few_kernels(compiler, own_grids_model):
    tower = own_grids_model.get_vision_tower()
    plan = qwen2_5_vl_encoder.plan_images([(9, 9)], tower.config, "cpu")
    rope, x = rope_of(plan.angles[:, None], torch.float32), torch.randn(4 * 81, 16)
    plain = kernels(lambda: tower.blocks[1](x, rope, plan.wholes, None))
    compiling.compiled.cache_clear()
    torch.compiler.reset()
    with torch.no_grad():
        _, codes = run_and_get_code(tower.blocks[1], x, rope, plan.wholes, None, compiles=True)
    counts = [len(KERNEL.findall(code[code.index("def call(") :])) for code in codes]
    assert len(counts) == 2 and len(plain) <= ANY_GRID[0], plain
    assert sum(counts) + 1 <= ANY_GRID[1], codes  # attention is between them
