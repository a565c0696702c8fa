"""A model shared out over several devices gives what it gives on one, with every method."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from llava.devices import device_of, moved
from llava.model.reuse import Picture, PrefixCache
from llava.pruning import METHODS, DecoderStage, build_pruner, trace_pruning
from llava.pruning.base import DecoderPruner, Pruner
from llava.pruning.twigvlm import TwigVLM
from llava.pruning.twigvlm_plus import TwigVLMPlus
from tests.conftest import PINPOINTS, SIDE, make_pruner, pad_batch
from tests.model.test_key_bias import METHODS as WEIGHING
from tests.model.test_key_bias import WeighingTwig
from tests.model.test_position_bias import METHODS as PLACED
from tests.pruning.test_twigvlm import grown
from tests.second_device import SECOND, THIRD, devices, place

CHAINS = ["vispruner+fastv", "pool+pyramiddrop"]
GREEDY = dict(do_sample=False, max_new_tokens=3, eos_token_id=-1, pad_token_id=0)


def later_layers(model):
    """As a second GPU takes what does not fit on the first."""
    inner = model.model
    for part in (*inner.layers[3:], inner.norm, inner.vision_tower, inner.mm_projector):
        place(part, SECOND)
    place(model.lm_head, THIRD)


def there_and_back(model):
    """Embeddings alone on the first device, layers in turns, the head beside the embeddings."""
    inner = model.model
    for part in (*inner.layers[:2], inner.vision_tower, *inner.layers[5:]):
        place(part, SECOND)
    for part in (inner.mm_projector, inner.layers[3], inner.norm):
        place(part, THIRD)


LAYOUTS = {layout.__name__: layout for layout in (later_layers, there_and_back)}
slow = pytest.mark.slow
#: tokens of an image: with more, patches that cover each other add the same to a cover, so that
#: rounding, which differs between devices, decides between them
FEW = 6
BOTH = pytest.mark.parametrize(
    "layout", ["there_and_back", pytest.param("later_layers", marks=slow)]
)


@pytest.fixture(scope="module")
def models(make_model):
    """layout -> a model shared out that way, all with the same weights."""
    made = {}
    for name, layout in LAYOUTS.items():
        made[name] = make_model()
        layout(made[name])
    return made


@pytest.fixture(params=[*sorted(METHODS), *CHAINS])
def method(request):
    return request.param


def batch(sample):
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2), sample(5, seed=3)]
    ids, mask = pad_batch([p.ids for p in prompts])
    return ids, mask, torch.cat([p.images for p in prompts if p.images is not None])


def run(model, method, ids, mask, images, **options):
    """The output of one call, and its trace; method: None for the one in use."""
    if method is not None:
        model.pruner = make_pruner(method, FEW) if isinstance(method, str) else method
    with trace_pruning(model) as trace:
        options = {**GREEDY, **options}
        out = model.generate(
            ids,
            images=images,
            attention_mask=mask,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    return out, trace


def assert_equal(several, one):
    assert torch.equal(several[0].sequences, one[0].sequences)
    for own, wanted in zip(several[0].scores, one[0].scores, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)
    for name in ("kv_lengths", "visual_tokens", "prompt_tokens"):
        for own, wanted in zip(getattr(several[1], name), getattr(one[1], name), strict=True):
            assert torch.equal(own, wanted)


@BOTH
def test_prefill_and_decoding_of_a_batch_are_those_of_one_device(
    model, models, sample, method, layout
):
    wanted = run(model, method, *batch(sample))
    with devices():
        assert_equal(run(models[layout], method, *batch(sample)), wanted)


@BOTH
@pytest.mark.parametrize("method", ["fastv", "glimpseprune", pytest.param("mustdrop", marks=slow)])
def test_beams_and_several_answers_are_those_of_one_device(model, models, sample, method, layout):
    options = dict(num_beams=3, num_return_sequences=2)
    wanted = run(model, method, *batch(sample), **options)
    with devices():
        assert_equal(run(models[layout], method, *batch(sample), **options), wanted)


@BOTH
@pytest.mark.parametrize("method", [*WEIGHING, *PLACED], ids=lambda method: method.name)
def test_a_bias_of_attention_is_where_its_layers_are(model, models, sample, method, layout):
    for options in ({}, dict(num_beams=3)):
        wanted = run(model, method, *batch(sample), **options)
        with devices():
            assert_equal(run(models[layout], method, *batch(sample), **options), wanted)


def prompts_about(sample, *lengths):
    first = sample(4, "image", seed=1).ids[0]
    return [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in lengths]


@BOTH
@pytest.mark.parametrize(
    "method",
    [
        *("none", "fastv", WEIGHING[0]),
        *(pytest.param(m, marks=slow) for m in ("pyramiddrop", "twigvlm", *WEIGHING[1:])),
    ],
    ids=lambda method: getattr(method, "name", method),
)
def test_a_shared_beginning_is_shared_on_several_devices(model, models, sample, method, layout):
    pixels = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    answers = []
    for own in (model, models[layout]):
        picture = Picture(pixels, (SIDE, SIDE))
        with torch.no_grad(), devices() if own is not model else nullcontext():
            own.pruner = make_pruner(method) if isinstance(method, str) else method
            if method == "fastv":  # deep enough to begin on one device and end on another
                own.pruner = build_pruner("fastv", visual_token_num=10, layer=4)
            cache = PrefixCache(own)
            prompts = prompts_about(sample, 9, 5, 7)
            for part in (prompts[:2], prompts[1:]):
                images, texts = [[picture]] * len(part), ["a"] * len(part)
                # pretended devices know no inference mode
                plain = PrefixCache.generate.__wrapped__
                answers.append(plain(cache, part, images, texts, **GREEDY))
    for one, several in zip(answers[:2], answers[2:], strict=True):
        assert torch.equal(one, several)


@BOTH
@pytest.mark.parametrize("shared", [2, *(pytest.param(n, marks=slow) for n in (0, 4))])
@pytest.mark.parametrize("pruning", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize("method", [TwigVLM, TwigVLMPlus, WeighingTwig])
@pytest.mark.parametrize("nodes", [0, 60])
def test_guessed_tokens_are_those_of_one_device(
    make_model, sample, layout, shared, pruning, method, nodes
):
    prompt, found = sample(4, "image", 5), []
    for spread in (False, True):
        own = make_model()
        own.lm_head.weight.data *= 8
        grown(own, shared, 2, method, visual_token_num=30, enable_pruning=pruning)
        if spread:
            LAYOUTS[layout](own)
        with devices() if spread else nullcontext():
            own.pruner = own.pruner  # the twig goes where its neighbours are
            options = dict(generation_strategy="self_speculative", return_dict_in_generate=True)
            options |= {**GREEDY, "max_new_tokens": 7, "tree_nodes": nodes}
            found.append(own.generate(prompt.ids, images=prompt.images, **options))
            if spread:
                beside = own.model.layers[min(shared, 5)]
                assert device_of(own.pruner.module) == beside.device
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert found[0].logs[0].accepted == found[1].logs[0].accepted


def test_newlines_and_losses_are_those_of_one_device(make_model, sample):
    options = dict(
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=PINPOINTS,
    )
    prompt = sample(4, "image", 5)
    images = [torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))]
    labels, losses = prompt.ids.masked_fill(prompt.ids < 0, -100), []
    for layout in (lambda model: None, later_layers):
        own = make_model(**options)
        newline = own.model.image_newline
        layout(own)
        with devices(), torch.no_grad():
            if layout is later_layers:
                own.model.image_newline = torch.nn.Parameter(newline.data.to(SECOND), False)
            own.pruner = build_pruner("fastv", visual_token_num=50, layer=4)
            out = own(prompt.ids, images=images, image_sizes=[(42, 84)], labels=labels)
            own.train()
            trained = own(prompt.ids, images=images, image_sizes=[(42, 84)], labels=labels)
            losses.append((float(out.loss), float(trained.loss)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)


@dataclass
class Kept:
    note: torch.Tensor
    others: dict


class Notes(DecoderStage, Pruner):
    """Leaves tensors of many kinds for later layers."""

    def before_layer(self, index, prefill):
        if index == 0:
            note = prefill.index.float()
            prefill.state = Kept(note, {"a": [note, (note, 3)], "text": "b"})
        kept = prefill.state
        for note in (kept.note, kept.others["a"][0], kept.others["a"][1][0]):
            assert note.device == prefill.hidden_states.device == prefill.position_ids.device
        assert prefill.decoder.layers[index].device == prefill.hidden_states.device
        return prefill


def test_what_a_method_notes_comes_along(models, sample):
    own, prompt = models["there_and_back"], sample(4, "image", 5)
    own.pruner = Notes()
    with devices():
        own.generate(prompt.ids, images=prompt.images, **GREEDY)


class LateCut(DecoderPruner):
    """Cuts on the second device, and in the caches of the layers on the first one."""

    def pruned_caches(self, index, num_layers):
        return range(index) if index == 4 else range(0)


def test_caches_on_other_devices_lose_what_is_dropped(model, models, sample):
    found = []
    for own in (model, models["there_and_back"]):
        own.pruner = LateCut(visual_token_num=5, layer=4)
        with devices():
            found.append(run(own, None, *batch(sample)))
    assert_equal(*found)
    assert [int(n[0]) for n in found[1][1].kv_lengths] == [18] * 6


def test_a_step_of_decoding_copies_the_hidden_states_alone_from_device_to_device(models, sample):
    """What layers share is brought over in the prefill; afterwards every device has its own."""
    own = models["later_layers"]
    own.pruner = build_pruner("none")
    (ids, mask, images), counts = batch(sample), []
    for number in (2, 6):
        options = {**GREEDY, "max_new_tokens": number}
        with devices() as log:
            own.generate(ids, images=images, attention_mask=mask, **options)
        counts.append(len(log.copies))
    assert (counts[1] - counts[0]) / 4 == 3  # to the later layers, to the head, to the prompt


def test_one_device_means_no_copy(model, sample):
    for method in ("none", "fastv", "pyramiddrop"):
        model.pruner = make_pruner(method)
        with devices() as log:
            run(model, None, *batch(sample))
        assert log.copies == []


@pytest.mark.parametrize("method", ["none", "fastv", "pyramiddrop", "adaptprune", "vispruner"])
def test_hooks_of_accelerate_need_not_know_what_layers_share(model, make_model, sample, method):
    """Layers on the meta device, which accelerate's hooks bring hidden states to."""
    own, prompt = make_model(), sample(4, "image", 5)
    own.pruner = make_pruner(method)
    for part in (*own.model.layers[3:], own.model.norm, own.lm_head):
        part.to("meta")
        add_hook_to_module(part, AlignDevicesHook("meta"))
    cuts = {"pyramiddrop": dict(layer_list=[1, 2], image_token_ratio_list=[0.5, 0.2])}
    if method in cuts:
        own.pruner = build_pruner(method, **cuts[method])
    with torch.no_grad():
        out = own(prompt.ids, images=prompt.images)
        more = own(torch.tensor([[5]]), past_key_values=out.past_key_values)
    assert out.logits.is_meta and more.logits.shape == (1, 1, 90)


def test_weights_that_accelerate_keeps_elsewhere_count_where_they_are_used():
    layer = torch.nn.Linear(3, 3, device="meta")
    assert device_of(layer).type == "meta"
    add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, weights_map={}))
    assert device_of(layer).type == "cpu"
    add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, weights_map={}), append=True)
    assert device_of(torch.nn.Sequential(layer)).type == "cpu"
    assert device_of(torch.nn.Identity()).type == "cpu"


def test_values_of_any_build_are_moved():
    value = {"a": [torch.ones(2), (torch.zeros(1), "x", None)]}
    there = moved(value, torch.device("meta"))
    assert there["a"][0].is_meta and there["a"][1][0].is_meta
    assert there["a"][1][1:] == ("x", None) and not value["a"][0].is_meta
