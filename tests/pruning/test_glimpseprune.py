"""GlimpsePrune: the glimpse, the rules of what stays, views of images, and its files."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from llava.eval import run_llava
from llava.pruning import Prefill, build_pruner, trace_pruning
from llava.pruning.cells import boxes_to_cells
from llava.pruning.cli import add_pruning_args, pruner_from_args
from llava.pruning.glimpseprune import GlimpsePrune
from llava.pruning.glimpseprune_modules import Glimpse, GlimpseConfig
from llava.pruning.glimpseprune_views import CROPS, Views, grid_angles
from llava.pruning.learned import save_part
from llava.pruning.picture import PANEL_SIDE, importance_of_patches
from llava.pruning.tokens import GRID as GRID_NUMBERS
from tests.conftest import SIDE, pad_batch, with_random_parts
from tests.golden_data import GOLDEN, golden_json

GRID = (2, 3)


def prefill(images, before=1, after=2, newlines=()):
    """A prompt of text, images (lists of patch indices, -1 a newline) and text."""
    image, patch = [-1] * before, [-1] * before
    for number, patches in enumerate(images):
        image += [number] * len(patches)
        patch += patches
    image, patch = image + [-1] * after, patch + [-1] * after
    size = len(image)
    places = torch.arange(size)[None]
    return Prefill(
        decoder=None,
        layer=0,
        hidden_states=torch.arange(size, dtype=torch.float32)[None, :, None].expand(1, -1, 4),
        position_ids=places,
        visual_index=torch.tensor([image]),
        patch_index=torch.tensor([patch]),
        index=places,
        valid=None,
        image_extras=numbers(images),
    )


def numbers(images):
    """Numbers of images of 2 x 3 patches a crop, as the prompt has them."""
    crops = [max(patches) // 6 + 1 for patches in images]
    sides = [[side] * len(images) for side in GRID]
    return {name: [own] for name, own in zip((*GRID_NUMBERS, CROPS), (*sides, crops), strict=True)}


def kept(pruner, chance, prompt=None):
    """Patches of a 2 x 3 image that stay for these probabilities."""
    prompt = prompt or prefill([list(range(6))])
    score = torch.zeros(1, prompt.patch_index.shape[1])
    judged = prompt.patch_index >= 0
    score[judged] = torch.tensor(chance)
    mask = pruner.choose(score, judged, prompt)
    return prompt.patch_index[mask].tolist()


def random_method(model, **changes):
    """A method with random weights on `model`."""
    torch.manual_seed(0)
    pruner = GlimpsePrune()
    pruner.module = Glimpse(GlimpseConfig.for_model(model, **changes)).requires_grad_(False)
    pruner.module.initialize()
    model.pruner = pruner
    return pruner


def generate(model, prompt, **kwargs):
    with trace_pruning(model) as trace:
        out = model.generate(
            prompt.ids,
            images=prompt.images,
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=-1,
            **kwargs,
        )
    return out, trace


# --- what stays ---------------------------------------------------------------------------------


def test_a_token_stays_when_it_is_above_the_threshold_not_at_it():
    assert kept(GlimpsePrune(), [0.6, 0.5, 0.1, 0.9, 0.2, 0.5]) == [0, 3]
    assert kept(GlimpsePrune(reduce_threshold=0.15), [0.6, 0.5, 0.1, 0.9, 0.2, 0.5]) == [
        0,
        1,
        3,
        4,
        5,
    ]


def test_a_cap_takes_the_best_and_only_where_more_would_stay():
    chance = [0.6, 0.7, 0.1, 0.9, 0.2, 0.8]
    assert kept(GlimpsePrune(visual_token_num=2), chance) == [3, 5]
    assert kept(GlimpsePrune(visual_token_num=5), chance) == [0, 1, 3, 5]
    assert kept(GlimpsePrune(max_remain_ratio=0.5), chance) == [1, 3, 5]
    assert kept(GlimpsePrune(max_remain_ratio=0.49), chance) == [3, 5]  # rounded down
    assert kept(GlimpsePrune(max_remain_ratio=0.5, visual_token_num=1), chance) == [3]


def test_the_minimum_comes_after_the_cap_and_the_corners_on_top():
    chance = [0.1, 0.2, 0.3, 0.4, 0.45, 0.35]
    assert kept(GlimpsePrune(), chance) == [4]
    assert kept(GlimpsePrune(min_remain_num=3), chance) == [3, 4, 5]
    assert kept(GlimpsePrune(min_remain_num=0), chance) == []
    corners = GlimpsePrune(visual_token_num=1, anchor_positions=["tl", "br", "tr", "bl"])
    assert kept(corners, [0.1, 0.9, 0.1, 0.1, 0.8, 0.1]) == [0, 1, 2, 3, 5]


def test_the_cap_of_several_images_is_shared():
    both = prefill([list(range(6)), list(range(6))])
    chance = [0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert len(kept(GlimpsePrune(visual_token_num=3), chance, both)) == 6


def test_a_newline_stays_when_a_patch_of_its_row_does():
    tiles = [6, 7, 8, -1, 9, 10, 11, -1]  # crop 1, each row with a newline
    prompt = prefill([[*range(6), *tiles]])
    alive = torch.zeros_like(prompt.patch_index, dtype=torch.bool)
    alive[0, 1:4] = True  # the overview has no rows with newlines
    alive[prompt.patch_index == 10] = True
    newlines = GlimpsePrune().newlines(alive, prompt)
    assert newlines[0].nonzero()[:, 0].tolist() == [1 + 6 + 7]
    single = prefill([[*range(6), -1]])
    alive = single.patch_index == 2
    assert GlimpsePrune().newlines(alive, single).sum() == 1


def test_boxes_mark_every_cell_they_touch():
    assert boxes_to_cells([[0.1, 0.1, 0.4, 0.4]], (2, 4)).long().tolist() == [[1, 1, 0, 0], [0] * 4]
    assert boxes_to_cells([[0.5, 1.0, 0.5, 1.0]], (2, 4)).sum() == 0  # below the last row
    assert boxes_to_cells([[0.5, 0.5, 0.5, 0.5]], (2, 4)).sum() == 1  # no area
    assert boxes_to_cells([[0, 0, 1, 1]], (2, 4)).all()


def test_boxes_become_the_recorded_cells():
    for case in golden_json("glimpseprune-qwen/utils.json")["box_to_mask"]:
        cells = boxes_to_cells(case["normed_bboxes"], tuple(case["grid_hw"]))
        assert cells.flatten().nonzero()[:, 0].tolist() == sorted(case["on"])


# --- tokens and views -----------------------------------------------------------------------------


def test_the_glimpse_is_no_part_of_the_prompt():
    prompt = prefill([list(range(6))])
    grown = prompt.append(torch.ones(1, 2, 4))
    assert grown.position_ids[0, -2:].tolist() == [9, 10]
    assert grown.next_position.tolist() == [9]
    assert grown.index[0, -2:].tolist() == [-1, -2]
    assert grown.last.tolist() == [10]
    back = grown.keep(grown.index >= 0)
    assert torch.equal(back.hidden_states, prompt.hidden_states)
    assert back.next_position.tolist() == [9]


def test_a_prompt_that_is_padded_on_the_right_gets_its_glimpse_at_its_own_position():
    prompt = prefill([list(range(6))])
    prompt.valid = torch.ones(1, 9, dtype=torch.bool)
    prompt.valid[0, 7:] = False
    grown = prompt.append(torch.ones(1, 1, 4))
    assert grown.position_ids[0, -1] == 7 and grown.valid[0, -1]


def test_every_view_has_a_full_grid_of_places():
    prompt = prefill([[0, 1, 2, 3, 4, 5], [0, 2, 4, 7, 11]])
    views = Views.of(prompt.visual_index, prompt.patch_index, prompt.image_extras, prompt.counts)
    none = prompt.patch_index.shape[1]
    assert views.grids == (GRID,) * 3 and not views.complete
    assert views.place.view(-1, 6).tolist() == [
        [1, 2, 3, 4, 5, 6],
        [7, none, 8, none, 9, none],
        [none, 10, none, none, none, 11],
    ]
    values = torch.arange(1.0, 19)
    assert views.scatter(values).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 18, 0, 0]]
    known = views.gather(torch.arange(14.0)[None, :, None])
    assert known.flatten().tolist()[6:] == [7, 0, 8, 0, 9, 0, 0, 10, 0, 0, 0, 11]


def test_half_of_the_angles_turn_with_the_row():
    cos, sin = (x[:, 0] for x in grid_angles([(2, 3), (1, 2)], 8, None))
    sin[:, :4] *= -1  # as `rotate` wants it
    angle = torch.atan2(sin, cos)
    assert angle[:, 0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1, 0, 0])
    assert angle[:, 2].tolist() == pytest.approx([0, 1, 2, 0, 1, 2, 0, 1])
    assert torch.equal(angle[:, :4], angle[:, 4:])


def test_cut_off_patches_change_no_other_view(model):
    pruner = random_method(model)
    fuser, grids = pruner.module.attn_fuser, [(6, 6)] * 2
    rows, context = torch.randn(72, 4), torch.randn(72, 4 * 512)
    real = torch.ones(72, dtype=torch.bool)
    whole = fuser(rows, context, grids)[-1]
    torch.testing.assert_close(fuser(rows, context, grids, real)[-1], whole)
    real[66:] = False
    cut = fuser(rows, context, grids, real)[-1]
    torch.testing.assert_close(cut[:36], whole[:36])
    assert not torch.allclose(cut[36:66], whole[36:66])
    real[36:] = False
    assert fuser(rows, context, grids, real)[-1].isfinite().all()


# --- in the model -------------------------------------------------------------------------------


def test_all_caches_hold_what_stayed_and_generation_continues_behind_the_prompt(model, sample):
    random_method(model)
    _, trace = generate(model, sample(4, "image", 5))
    assert trace.visual_tokens[:5] == [torch.tensor([36])] * 5
    stayed = int(trace.visual_tokens[5])
    assert 0 < stayed < 36
    assert [int(n) for n in trace.kv_lengths] == [stayed + 10] * 6
    chance = trace.importance[0]
    assert len(chance) == 36 and int((chance > 0.5).sum()) == stayed


def test_without_anything_to_drop_the_model_is_the_plain_one(model, sample):
    prompt = sample(4, "image", 5)
    plain, _ = generate(model, prompt)
    pruner = random_method(model)
    pruner.reduce_threshold = 0.0
    same, trace = generate(model, prompt)
    assert int(trace.visual_tokens[5]) == 36
    assert torch.equal(same, plain)


def test_a_cut_behind_the_last_layer_changes_the_cache_alone(model, sample):
    prompt = sample(4, "image", 5)
    options = dict(output_scores=True, return_dict_in_generate=True)
    plain, _ = generate(model, prompt, **options)
    random_method(model, reduce_layer=5)
    cut, trace = generate(model, prompt, **options)
    torch.testing.assert_close(cut.scores[0], plain.scores[0], atol=1e-5, rtol=1e-5)
    assert int(trace.kv_lengths[0]) == int(trace.kv_lengths[5]) < 46
    assert not torch.allclose(cut.scores[1], plain.scores[1], atol=1e-4)


def test_several_layers_and_glimpse_tokens_work_in_a_batch(model, sample):
    random_method(model, selected_layers=(2, 1), reduce_layer=3, le_length=3, le_layers=(0, 2))
    prompts = [sample(3, "image", 9, seed=1), sample("image", 4, "image", 2, seed=2)]
    alone = [generate(model, prompt)[0] for prompt in prompts]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images = torch.cat([prompt.images for prompt in prompts])
    together = model.generate(
        ids, images=images, attention_mask=mask, max_new_tokens=3, eos_token_id=-1, do_sample=False
    )
    assert torch.equal(together, torch.cat(alone))


def test_scores_before_the_softmax_can_be_read(model, sample):
    pruner = random_method(model, use_attention_logits=True)
    assert pruner.probe(6).form == "scores"
    generate(model, sample(4, "image", 5))


def test_images_of_many_crops_are_judged_crop_by_crop(anyres_model, sample):
    model = anyres_model
    random_method(model)
    prompt = sample(4, "image", 5)
    size = (2 * SIDE, SIDE)
    prompt.images = [torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))]
    _, trace = generate(model, prompt, image_sizes=[size])
    patches, chance = trace.visual_positions[0], trace.importance[0]
    assert chance.isnan().equal(patches < 0)
    last = trace.decoder_keep[5][0]
    stayed = patches[last[(last >= 5) & (last < 5 + len(patches))] - 5]
    assert set(stayed[stayed >= 0].tolist()) == set(patches[chance > 0.5].tolist())
    rows = {(p // 36, p % 36 // 6) for p in stayed[stayed >= 36].tolist()}
    assert int((stayed < 0).sum()) == len({row for _, row in rows})


def test_the_picture_shows_the_map_beside_what_stayed(tmp_path):
    words = ["--model-path", GOLDEN / "tiny-llava-v1.5", "--query", "What is it?"]
    words += ["--image-file", GOLDEN / "images/img1_640x360.png", "--temperature", 0]
    words += ["--max-new-tokens", 1, "--pruning-method", "glimpseprune"]
    words += ["--pruning-arg", f"new_modules={GOLDEN / 'glimpseprune-llava/new_modules_A'}"]
    words += ["--show-pruning", tmp_path / "kept.png"]
    run_llava.answer(run_llava.build_parser().parse_args([str(word) for word in words]))
    picture = np.asarray(Image.open(tmp_path / "kept.png").convert("RGB"), dtype=int)
    assert picture.shape[1] > 2 * PANEL_SIDE
    left, right = picture[20:300, 20:500], picture[20:300, PANEL_SIDE + 40 : PANEL_SIDE + 520]
    colour = [np.ptp(side, axis=2).mean() for side in (left, right)]
    assert colour[1] > 2 * colour[0]  # from blue to red


def test_patches_without_a_value_get_the_lowest_in_the_map():
    values, patches = torch.tensor([0.5, float("nan"), 0.2]), torch.tensor([3, -1, 0])
    assert importance_of_patches(values, patches, 5) == pytest.approx([0.2, 0.2, 0.2, 0.5, 0.2])


# --- files ----------------------------------------------------------------------------------------


def test_a_saved_part_loads_as_it_was(model, sample, tmp_path):
    pruner = random_method(model, selected_layers=(1,), reduce_layer=2)
    first, _ = generate(model, sample(4, "image", 5))
    values = {**pruner.module.config.values(), "reduce_threshold": 0.4}
    save_part(str(tmp_path), pruner.name, pruner.module.state_dict(), "base", **values)
    model.pruner = loaded = build_pruner("glimpseprune", new_modules=str(tmp_path))
    assert loaded.module.config == pruner.module.config
    assert loaded.setting("reduce_threshold") == 0.4
    loaded.reduce_threshold = 0.5
    again, _ = generate(model, sample(4, "image", 5))
    assert torch.equal(first, again)


def test_a_missing_part_is_an_error_that_says_how_to_get_one(model):
    with pytest.raises(FileNotFoundError, match="new_modules=FOLDER.*llava.train.train_glimpse"):
        model.pruner = build_pruner("glimpseprune")


def test_a_part_for_another_model_is_refused(model, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(GOLDEN / "glimpseprune-llava/new_modules_A", folder)
    with pytest.raises(ValueError, match="le_layers .* must not exceed 5"):
        model.pruner = build_pruner("glimpseprune", new_modules=str(folder))
    config = json.loads((folder / "config.json").read_text())
    shallow = {"le_layers": [0], "selected_layers": [1], "selected_visual_layers": [4, 3, 2, 1]}
    (folder / "config.json").write_text(json.dumps(config | shallow))
    with pytest.raises(ValueError, match="learnable_embeddings"):
        model.pruner = build_pruner("glimpseprune", new_modules=str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selected_layers": (3,), "reduce_layer": 2}, "must not lie behind reduce_layer"),
        ({"le_layers": (1, 2)}, "must contain 0"),
        ({"le_layers": (0, 6)}, "must not exceed 5"),
        ({"selected_visual_layers": (0,)}, "must be 1"),
        ({"le_length": -1}, "must not be negative"),
        ({"attn_fuse_num_heads": 5}, "must divide"),
        ({"attn_fuse_type": "AttnFuserDummy"}, "not supported"),
        ({"attn_fuse_hidden_act": "gelu"}, "attn_fuse_hidden_act 'gelu' is not supported"),
        ({"le_norm_type": "batchnorm"}, "le_norm_type 'batchnorm' is unknown"),
        ({"selected_layers": (-1,)}, "nor be negative"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        GlimpseConfig.for_model(model, **changes)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("visual_token_num", 0),
        ("max_remain_ratio", 0),
        ("reduce_threshold", 1.5),
        ("min_remain_num", -1),
        ("anchor_positions", ["top"]),
    ],
)
def test_an_option_that_cannot_be_is_refused(option, value):
    with pytest.raises(ValueError, match=option):
        build_pruner("glimpseprune", **{option: value})


@pytest.mark.parametrize("text, corners", [("tl", ("tl",)), ("tl,br", ("tl", "br"))])
def test_corners_are_named_on_a_command_line(text, corners):
    parser = argparse.ArgumentParser()
    add_pruning_args(parser)
    pruner = pruner_from_args(parser.parse_args(["--anchor-positions", text]))
    assert pruner.name == "glimpseprune" and pruner.anchor_positions == corners


def test_layers_follow_the_depth_of_the_model(model):
    config = GlimpseConfig.for_model(model)
    assert config.reduce_layer == 4 and config.selected_layers == (4,)
    assert config.le_layers == (0, 1, 2, 3, 4, 5)
    assert config.selected_visual_layers == (3, 3, 2, 1)
    schedule = GlimpsePrune(visual_token_num=5).token_schedule(36, 6)
    assert schedule == [36] * 5 + [5]
    # 29 of 100 are no more than this share, although it is 28.99... of them.
    assert GlimpsePrune(max_remain_ratio=0.29).token_schedule(100, 6)[-1] == 29
    assert GlimpsePrune(max_remain_ratio=0.111).token_schedule(576, 6)[-1] == 63


def test_boxes_can_take_the_place_of_the_glimpse(model, sample):
    model.pruner = with_random_parts(GlimpsePrune(ref_boxes=[[0, 0, 0.3, 0.3]]))
    _, trace = generate(model, sample(4, "image", 5))
    assert int(trace.visual_tokens[5]) == 4


@pytest.mark.parametrize(
    "reference", [{"ref_boxes": [[0, 0, 0.3, 0.3]]}, {"ref_masks": [[[True]]]}]
)
def test_references_say_no_places_of_images_that_are_cut_into_tiles(
    anyres_model, sample, reference
):
    anyres_model.pruner = with_random_parts(GlimpsePrune())
    ids = sample(4, "image", 5).ids
    images, sizes = torch.randn(1, 5, 3, SIDE, SIDE), [(2 * SIDE, 2 * SIDE)]
    options = dict(images=images, image_sizes=sizes, max_new_tokens=1)
    with pytest.raises(ValueError, match="are for images in one crop, this model cuts one into 5"):
        anyres_model.generate(ids, **options, **reference)
    for everything in ([], [None]):  # nothing stays, or all
        anyres_model.generate(ids, **options, ref_boxes=everything)
