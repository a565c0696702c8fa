"""RESTORE around other methods."""

import pytest
import torch

from llava.pruning import Chain, build_pruner, trace_pruning
from llava.pruning.density_merge import groups_of, merge
from llava.pruning.restore import LEFT_OUT, Restore
from llava.pruning.testing import MethodContract, OwnGridsContract, tiny
from llava.pruning.tokens import KEY_BIAS
from tests.conftest import SIDE

BASES = ["visionzip", "vispruner", "divprune", "holov", "hiprune", "cdpruner", "random"]
BASES += ["sinkpruner"]
#: what makes a method one that chooses before the decoder alone
SANITISER = {"sinkpruner_text_pruner": False}
OPTIONS = {"restore+sinkpruner": SANITISER}
COMBINED = [*(f"restore+{base}" for base in BASES), "restore+vispruner+fastv"]
GREEDY = dict(do_sample=False, max_new_tokens=3, eos_token_id=-1)


def make_pruner(name: str, visual_token_num: int = 10):
    return tiny.make_pruner(name, visual_token_num, **OPTIONS.get(name, {}))


class TestEveryBase(MethodContract):
    make = staticmethod(make_pruner)

    @pytest.fixture(params=COMBINED)
    def pruner(self, request):
        return make_pruner(request.param)


class TestEveryBaseOnOwnGrids(OwnGridsContract):
    make = staticmethod(make_pruner)

    @pytest.fixture(params=[name for name in COMBINED if "cdpruner" not in name])
    def pruner(self, request):
        return make_pruner(request.param)


# --- what it is called ----------------------------------------------------------------------


def test_the_method_in_it_is_named_behind_it_or_by_an_option():
    wrapped = build_pruner(
        "restore+vispruner", visual_token_num=32, gamma=0.25, vispruner_important_ratio=0.75
    )
    assert wrapped.name == "restore+vispruner" and wrapped.gamma == 0.25
    assert wrapped.base == build_pruner("vispruner", important_ratio=0.75)
    same = build_pruner("restore", base="vispruner", visual_token_num=32)
    assert same == build_pruner("restore+vispruner", restore_visual_token_num=32)
    assert build_pruner("restore").name == "restore+fastervlm"


def test_a_third_method_acts_inside_the_decoder():
    chain = build_pruner(
        "restore+vispruner+fastv", restore_visual_token_num=20, fastv_visual_token_num=8
    )
    assert isinstance(chain, Chain) and chain.name == "restore+vispruner+fastv"
    assert chain.first == build_pruner("restore+vispruner", visual_token_num=20)
    assert chain.token_schedule(36, 6) == [20, 8, 8, 8, 8, 8]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("restore+fastv", {}, "fastv, which chooses inside .* follow .* restore\\+METHOD\\+fastv$"),
        ("restore+pyramiddrop", {}, "pyramiddrop, which chooses inside the decoder"),
        ("restore+sparsevlm", {}, "sparsevlm, which chooses inside the decoder"),
        ("restore+nuwa", {}, "nuwa, which chooses inside .* what is not chosen$"),
        (
            "restore+nuwa",
            {"visual_token_num": 9, "nuwa_stage2": "off"},
            "its budget is an average over the layers",
        ),
        ("restore+sinkpruner", {}, "chooses inside .*: set sinkpruner_text_pruner=False$"),
        (
            "restore+sinkpruner",
            {"visual_token_num": 9, **SANITISER, "sinkpruner_diverse_token_num": 3},
            "beside salient_token_num and diverse_token_num",
        ),
        ("restore+pool", {}, "pool, which blends the tokens it leaves"),
        ("restore+prumerge", {}, "prumerge, which blends the tokens it leaves"),
        ("restore+downsample", {}, "downsample, which changes what the vision tower sees"),
        ("restore+none", {}, "none, which chooses no tokens"),
        ("restore", {"base": "restore+random"}, "which is a wrapper itself"),
        ("restore+vispruner", {"vispruner_visual_token_num": 9}, "has a budget of its own"),
        (
            "restore+visionzip",
            {"visual_token_num": 10, "visionzip_dominant": 9, "visionzip_contextual": 2},
            "a number of tokens beside dominant and contextual",
        ),
        (
            "restore+divprune",
            {"visual_token_num": 10, "divprune_subset_ratio": 0.5},
            "divprune keeps 18 tokens where restore asks it for 5: leave out what sets",
        ),
        ("restore+random", {"restore_base": "vispruner"}, "leave the option base out"),
        ("restore+random", {"gamma": 1.5}, "gamma \\(1.5\\) must lie from 0 to 1"),
        ("restore", {"c": 1}, "c \\(1\\) must be above 1"),
        ("restore", {"pruned_size": "two"}, "choose from one, uniform"),
        ("restore+xyz", {}, "unknown pruning method 'xyz'"),
        ("restore+random+fastv+fastv", {}, "form METHOD\\+METHOD"),
        ("restore+random+fastv+vscan", {}, "form METHOD\\+METHOD"),
        ("restore+random+fastv", {"gamma": 1.0}, "must start with restore_ or random_ or fastv_"),
        ("vispruner+restore", {}, "'vispruner\\+restore': .* comes first: restore\\+vispruner$"),
        (
            "vispruner+restore+fastv",
            {"visual_token_num": 10},
            "comes first: restore\\+vispruner\\+fastv$",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(model, name, options, message):
    with pytest.raises(ValueError, match=message):
        model.pruner = build_pruner(name, **options)


def test_a_refusal_of_the_base_says_whose_number_it_is():
    wrapped = build_pruner("restore+holov", visual_token_num=5)
    with pytest.raises(ValueError, match=r"^holov, which chooses 3 of 5 tokens: visual_token_num"):
        wrapped.check(576, 32, crops=5)


def test_options_that_say_how_many_are_refused_when_the_wrapper_is_made():
    """Not with the first image, where images have grids of their own."""
    for options in ({"visionzip_dominant": 9, "visionzip_contextual": 2}, {"nuwa_stage2": "off"}):
        name = f"restore+{min(options).partition('_')[0]}"
        with pytest.raises(ValueError, match="cannot be asked for a number of tokens"):
            build_pruner(name, **options)


def test_a_base_that_is_no_method_is_refused():
    with pytest.raises(ValueError, match="base \\('vispruner'\\) must be a pruning method"):
        Restore(base="vispruner")


# --- what it keeps --------------------------------------------------------------------------


def run(model, pruner, sample, **options):
    model.pruner, prompt = pruner, sample(4, "image", 5)
    with trace_pruning(model, embeds=True) as trace:
        out = model.generate(prompt.ids, images=prompt.images, **{**GREEDY, **options})
    return out, trace


@pytest.mark.parametrize("base", ["fastervlm", "vispruner", "divprune", "random"])
@pytest.mark.parametrize("budget, gamma", [(10, 0.5), (11, 0.5), (9, 0.25), (8, 1.0), (7, 0.0)])
def test_the_base_chooses_its_part_and_the_rest_is_merged(model, sample, base, budget, gamma):
    chosen = int(gamma * budget + 0.5)
    wrapped = build_pruner(f"restore+{base}", visual_token_num=budget, gamma=gamma)
    _, trace = run(model, wrapped, sample)
    kept = trace.visual_positions[0]
    assert len(kept) == budget and int((kept >= 0).sum()) == chosen
    if chosen:
        _, alone = run(model, build_pruner(base, visual_token_num=chosen), sample)
        assert torch.equal(kept[kept >= 0], alone.visual_positions[0])
        own = trace.visual_embeds[0][kept >= 0]
        torch.testing.assert_close(own, alone.visual_embeds[0], atol=1e-5, rtol=1e-5)


def test_of_visionzip_the_dominant_patches_are_chosen(model, sample):
    _, merged = run(model, build_pruner("restore+visionzip", visual_token_num=12), sample)
    _, plain = run(model, build_pruner("visionzip", dominant=7, contextual=0), sample)
    kept, dominant = merged.visual_positions[0], plain.visual_positions[0]
    assert torch.equal(kept[kept >= 0], dominant[dominant >= 0])
    assert len(kept) == 12 and int((kept >= 0).sum()) == 6


@pytest.mark.parametrize("budget, gamma", [(12, 0.5), (9, 1.0)])
def test_of_sinkpruner_salient_and_diverse_patches_are_chosen(model, sample, budget, gamma):
    options = {"visual_token_num": budget, "gamma": gamma, **SANITISER}
    _, merged = run(model, build_pruner("restore+sinkpruner", **options), sample)
    chosen = int(gamma * budget + 0.5)
    numbers = {"salient_token_num": chosen - chosen // 2, "diverse_token_num": chosen // 2}
    plain = build_pruner("sinkpruner", visual_token_num=5, text_pruner=False, **numbers)
    _, alone = run(model, plain, sample)
    kept, own = merged.visual_positions[0], alone.visual_positions[0]
    assert torch.equal(kept[kept >= 0], own[own >= 0].sort().values)  # the sinks are merged
    assert len(kept) == budget and int((kept >= 0).sum()) == chosen


def test_sizes_sum_to_all_tokens_and_text_stays_where_it_was(model, sample):
    prompt = sample(4, "image", 5)
    model.pruner = build_pruner("restore", visual_token_num=10)
    vision = model.encode_vision(prompt.images)
    assert float(vision.extras[KEY_BIAS].exp().sum()) == pytest.approx(36, abs=1e-3)
    assert vision.positions.tolist() == [sorted(set(vision.positions[0].tolist()))]
    _, trace = run(model, model.pruner, sample)
    places = trace.position_ids[0]
    assert places[:5].tolist() == list(range(5)) and places[-5:].tolist() == list(range(41, 46))
    assert torch.equal(places[5:15] - 5, vision.positions[0])


def test_uniform_sizes_are_those_of_tokens_that_stand_for_what_was_dropped(model, sample):
    images = sample(4, "image", 5).images
    for size, wanted in (("one", 1.0), ("uniform", 36 / 9)):
        options = dict(visual_token_num=9, gamma=1.0, pruned_size=size)
        model.pruner = build_pruner("restore", **options)
        sizes = model.encode_vision(images).extras[KEY_BIAS].exp()
        torch.testing.assert_close(sizes, torch.full_like(sizes, wanted))
    model.pruner = build_pruner("restore", visual_token_num=10, pruned_size="uniform")
    sizes = model.encode_vision(images).extras[KEY_BIAS].exp()
    assert float(sizes.min()) == pytest.approx(1)  # something is merged


def test_an_image_that_keeps_everything_has_no_bias_beside_one_that_does_not(own_grids_model):
    from llava.pruning.testing.tiny import picture, sample

    model = own_grids_model
    model.pruner = build_pruner("restore", visual_token_num=8)
    prompt = sample(4, "image", 5)
    ids = torch.cat([prompt.ids, prompt.ids])
    both = model.build_prompt(ids, images=[picture(2, 3), picture(4, 5)], padding_side="left")
    assert both.position_bias == [None, both.position_bias[1]] and both.position_bias[1].c == 2


@pytest.mark.parametrize("base", ["fastervlm", "hiprune", "divprune", "vispruner"])
def test_images_of_several_crops_are_merged_where_the_base_chooses(anyres_model, sample, base):
    model, prompt = anyres_model, sample(4, "image", 5)
    model.pruner = build_pruner(f"restore+{base}", visual_token_num=50)
    tiles = model.image_settings.image_grid_pinpoints
    count, size = (5, (2 * SIDE, 2 * SIDE)) if len(tiles) == 1 else (3, (42, 84))
    images = [torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))]
    with trace_pruning(model, embeds=True) as trace:
        model.generate(prompt.ids, images=images, image_sizes=[size], **GREEDY)
    kept = trace.visual_positions[0]
    share = {"hiprune": 48, "fastervlm": 30}  # 16 of three crops; 10 of five, and three are there
    assert len(kept) == share.get(base, 50)
    assert int((kept < 0).sum()) in (len(kept) // 2, len(kept) // 2 + 1) or base == "divprune"
    places = trace.position_ids[0, 5 : 5 + len(kept)]
    assert torch.equal(places, places.unique())


@pytest.mark.parametrize("gamma, budget", [(0.5, 50), (0.5, 75), (0.3, 60), (0.9, 170)])
def test_crops_that_differ_in_tokens_have_the_budget_together(anyres_model, sample, gamma, budget):
    """Of eadp, which gives every crop of an image its own number."""
    model, prompt = anyres_model, sample(4, "image", 5)
    model.pruner = build_pruner("restore+eadp", visual_token_num=budget, gamma=gamma)
    images = [torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))]
    asked = {"image_sizes": [(2 * SIDE, 2 * SIDE)], "questions": ["what color is the dog"]}
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=images, **asked, **GREEDY)
    assert len(trace.visual_positions[0]) == model.pruner.token_schedule(36, 6, 5)[0] == budget


def test_crops_with_other_numbers_of_tokens_are_padded(anyres_model, sample):
    """Of hiprune, which shares its budget out among as many crops as an image has."""
    model = anyres_model
    model.pruner = build_pruner("restore+hiprune", visual_token_num=50)
    made = torch.Generator().manual_seed(5)
    images = [torch.randn(n, 3, SIDE, SIDE, generator=made) for n in (3, 5)]
    sizes = [(42, 84), (2 * SIDE, 2 * SIDE)]
    together = model.image_tokens(images, sizes)
    for image, own, size in zip(images, together, sizes, strict=True):
        (alone,) = model.image_tokens([image], [size])
        assert torch.equal(own.offsets, alone.offsets)
        torch.testing.assert_close(own.embeds, alone.embeds, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own.extras[KEY_BIAS], alone.extras[KEY_BIAS])


@pytest.mark.parametrize("crops, size", [(5, (2 * SIDE, 2 * SIDE)), (3, (42, 84))])
@pytest.mark.parametrize("gamma, budget", [(0.5, 50), (1.0, 30)])
def test_sinks_that_the_base_leaves_out_of_a_sequence_are_merged(
    anyres_model, crops, size, gamma, budget
):
    """Of holov, which leaves them out of crops and chooses from the sequence of all crops."""
    model = anyres_model
    images = [torch.randn(crops, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))]
    sink, found = {"holov_sink_ratio": 0.1}, []
    wrapped = build_pruner("restore+holov", visual_token_num=budget, gamma=gamma, **sink)
    plain = build_pruner("holov", visual_token_num=int(gamma * budget + 0.5), sink_ratio=0.1)
    for model.pruner in (wrapped, plain):
        found += model.image_tokens(images, [size])
    assert len(found[0].embeds) == budget
    kept, own = found[0].offsets[found[0].patches >= 0], found[1].offsets.sort().values
    assert torch.equal(kept, own)
    if gamma < 1:
        total = float(found[0].extras[KEY_BIAS].exp().sum())
        assert total == pytest.approx(found[0].length, abs=1e-2)


def test_sinks_leave_an_image_that_keeps_everything_whole(anyres_model):
    images = [torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))]
    options = dict(visual_token_num=170, holov_sink_ratio=0.1)
    anyres_model.pruner = build_pruner("restore+holov", **options)
    (image,) = anyres_model.image_tokens(images, [(42, 84)])
    assert len(image.embeds) == image.length and LEFT_OUT not in image.extras


# --- merging --------------------------------------------------------------------------------


def test_groups_form_around_dense_tokens_by_hand():
    heaps = [[1, 0, 0], [1, 0.1, 0], [1, 0.2, 0], [0, 1, 0], [0, 1, 0.1], [0, 0, 1]]
    x, none = torch.tensor([heaps]), torch.zeros(1, 0, dtype=torch.long)
    group, anchors, density = groups_of(x, none, 3)
    cosines = torch.nn.functional.cosine_similarity(x[0][:, None], x[0], dim=-1)
    torch.testing.assert_close(density[0], cosines.sum(dim=1))
    assert anchors.tolist() == [[2, 4, 5]]  # the densest, and the densest that are unlike it
    assert group.tolist() == [[0, 0, 0, 1, 1, 2]]
    places, embeds, sizes, blended = merge(x, none, 3, 1.0)
    assert places.tolist() == [[1, 3, 5]] and sizes.tolist() == [[3, 2, 1]] and blended.all()
    torch.testing.assert_close(embeds[0, 0], x[0, :3].mean(dim=0))


def test_tokens_without_content_are_merged_like_any_other():
    group, anchors, _ = groups_of(torch.zeros(1, 4, 3), torch.tensor([[1]]), 2)
    assert anchors.tolist() == [[0, 2]] and group.tolist() == [[0, 2, 1, 0]]


def test_copies_of_an_anchor_form_groups_in_order():
    base = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    kind = torch.tensor([0, 1, 2] + [2, 0, 1, 1, 0, 2] * 5)
    _, anchors, _ = groups_of(base[kind][None], torch.zeros(1, 0, dtype=torch.long), 20)
    assert sorted(anchors[0, :3].tolist()) == [0, 1, 2]
    assert anchors[0, 3:].tolist() == list(range(3, 20))
