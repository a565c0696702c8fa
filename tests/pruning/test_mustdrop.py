"""MustDrop on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning import Prefill, Pruner, TowerTokens, VisionTokens, trace_pruning
from llava.pruning.mustdrop import MustDrop, mean_similarity
from llava.pruning.testing.tiny import make_own_grids_model, picture
from llava.pruning.testing.tiny import sample as prompt_of


def tower_tokens(patches, image_index):
    patches = torch.as_tensor(patches, dtype=torch.float32)
    return TowerTokens(
        hidden_states=torch.cat([torch.zeros(len(patches), 1, patches.shape[2]), patches], dim=1),
        positions=torch.arange(patches.shape[1]).expand(len(patches), -1),
        image_index=torch.tensor(image_index),
    )


def even_window(*windows):
    """Unlike patches of a 4 x 4 grid, except in `windows` (2 x 2 each), where all are alike."""
    patches = torch.eye(16)
    for window in windows:
        members = MustDrop(window=2).windows((4, 4), patches.device)[window]
        patches[members] = patches[members[0]].clone()
    return patches


def test_windows_are_read_row_by_row():
    assert MustDrop().windows((6, 6), None)[1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert MustDrop(window=2).windows((5, 5), None).tolist()[-1] == [
        12,
        13,
        17,
        18,
    ]  # border left out


def test_similarity_is_the_mean_over_pairs_of_different_tokens():
    block = torch.tensor([[[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]])
    torch.testing.assert_close(mean_similarity(block), torch.tensor([[1 / 3]]))


def test_an_even_window_becomes_one_token_in_front():
    pruner = MustDrop(window=2)
    tokens = pruner.before_tower_layer(1, tower_tokens(even_window(2)[None], [0]))
    rest = [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 14, 15]
    assert tokens.positions.tolist() == [[-1, *rest]]
    assert tokens.extras["merged"].tolist() == [[True] + [False] * 12] and tokens.valid is None
    torch.testing.assert_close(tokens.hidden_states[0, 1], torch.eye(16)[8])


def test_crops_of_an_image_merge_as_many_windows_as_the_least_even_one():
    crops = torch.stack([even_window(0, 3), even_window(1)])
    together = MustDrop(window=2).before_tower_layer(1, tower_tokens(crops, [0, 0]))
    assert (together.positions < 0).sum(dim=1).tolist() == [1, 1] and together.valid is None
    apart = MustDrop(window=2).before_tower_layer(1, tower_tokens(crops, [0, 1]))
    assert ((apart.positions < 0) & apart.valid).sum(dim=1).tolist() == [2, 1]
    assert apart.valid.sum(dim=1).tolist() == [10, 13]


def test_the_tokens_the_class_token_looks_at_are_marked():
    attention = torch.tensor([[0.1, 0.4, 0.3, 0.2, 0.9]])
    vision = VisionTokens(
        features=torch.zeros(1, 5, 2),
        positions=torch.arange(5)[None],
        grid=(1, 5),
        image_index=torch.tensor([0]),
        valid=torch.tensor([[True] * 4 + [False]]),
        layers={0: {}, 3: {"salience": attention}},
    )
    # a third of 4 tokens, rounded up; the padded one does not count
    assert MustDrop(key_ratio=1 / 3).after_encoder(vision).extras["key"].tolist() == [
        [False, True, True, False, False]
    ]


def test_a_token_falls_when_both_thresholds_say_so_and_it_is_not_marked(model):
    rows = torch.tensor(
        [[0.0, 0.01, 0.01, 0.30, 0.05, 0.2, 0.0], [0.0, 0.01, 0.01, 0.2, 0.05, 0.2, 0.2]]
    )
    size = rows.shape[1]
    places = torch.arange(size)[None]
    prefill = Prefill(
        decoder=model.model,
        layer=2,
        hidden_states=torch.zeros(1, size, 1),
        position_ids=places,
        visual_index=torch.tensor([[-1, 0, 0, 0, 0, -1, -1]]),
        patch_index=places,
        index=places,
        valid=None,
        extras={"key": torch.tensor([[0, 0, 1, 0, 0, 0, 0]]).bool()},
        attention=rows[None, None],
    )
    pruner = MustDrop(global_thr=0.2, individual_thr=0.04, pruning_layers=[1])
    assert pruner.text_rows(prefill).tolist() == [[5, 6]]
    assert pruner.before_layer(2, prefill).index.tolist() == [[0, 2, 3, 4, 5, 6]]
    pruner = MustDrop(global_thr=0.2, individual_thr=0.06, pruning_layers=[1])
    kept = pruner.before_layer(2, prefill)
    assert kept.index.tolist() == [[0, 2, 3, 5, 6]]
    assert kept.position_ids.tolist() == [[0, 1, 2, 3, 4]]


def generate(model, ids, images, **options):
    with trace_pruning(model) as trace:
        out = model.generate(
            ids, images=images, max_new_tokens=4, do_sample=False, eos_token_id=-1,
            output_scores=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
    return out, trace


def test_images_that_merge_differently_share_a_batch(model, sample):
    model.pruner = MustDrop(spatial_threshold=0.05, global_thr=0.028, individual_thr=1.0)
    prompts = [sample(3, "image", 4, seed=seed) for seed in range(4)]
    alone = [generate(model, p.ids, p.images) for p in prompts]
    merged = [int((trace.visual_positions[0] < 0).sum()) for _, trace in alone]
    assert len(set(merged)) > 1
    ids, images = (torch.cat([getattr(p, key) for p in prompts]) for key in ("ids", "images"))
    out, trace = generate(model, ids, images)
    for row, (own, own_trace) in enumerate(alone):
        assert torch.equal(out.sequences[row], own.sequences[0])
        torch.testing.assert_close(out.scores[0][row], own.scores[0][0], atol=1e-4, rtol=1e-4)
        assert [int(n[row]) for n in trace.kv_lengths] == [int(n[0]) for n in own_trace.kv_lengths]


def test_after_the_last_cut_the_caches_hold_its_survivors(model, sample):
    model.pruner = MustDrop(
        global_thr=0.028, individual_thr=1.0, pruning_layers=[1, 2, 3], spatial_threshold=0.99
    )
    prompt = sample(4, "image", 5)
    _, trace = generate(model, prompt.ids, prompt.images)
    seen = [int(n) for n in trace.prompt_tokens]
    assert seen[0] == seen[1] > seen[2] >= seen[3] >= seen[4]
    assert [int(n) for n in trace.kv_lengths] == [seen[0]] + [seen[4]] * 5


def test_the_labels_are_the_published_thresholds():
    assert MustDrop().thresholds == (0.011, 0.01)
    assert MustDrop(visual_token_num=128).thresholds == (0.0012, 0.001)
    assert MustDrop(visual_token_num=192, individual_thr=0.5).thresholds == (0.001, 0.5)
    assert MustDrop(visual_token_num=7, global_thr=0.1, individual_thr=0.2).thresholds == (0.1, 0.2)


@pytest.mark.parametrize("options", [{"visual_token_num": 100}, {"window": 1}, {"key_ratio": 1.5}])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match="must"):
        MustDrop(**options)


def test_impossible_layers_are_refused_when_assigned(model):
    for layers in ([2, 6, 10, 14], [3, 3], [5]):
        with pytest.raises(ValueError, match="ascend"):
            model.pruner = MustDrop(pruning_layers=layers)


@pytest.fixture(scope="module")
def own_grids():
    return make_own_grids_model()


@torch.no_grad()
def test_even_windows_of_blocks_become_the_mean_in_their_middle(own_grids):
    """What the first tower layer says is even; merged are tokens of the language model."""
    own_grids.pruner = Pruner()
    image = picture(7, 8)
    image[:3, 3:6], image[3:6, 3:6] = image[0, 3], image[3, 3]  # the second and fourth window
    (dense,) = own_grids.image_tokens([image])
    own_grids.pruner = MustDrop(spatial_threshold=0.4)
    (kept,) = own_grids.image_tokens([image])
    gone = {row * 8 + column for row in range(6) for column in (3, 4, 5)} - {12, 36}
    left = torch.tensor([place for place in range(56) if place not in gone])
    assert kept.offsets.tolist() == left.tolist()
    merged = (left == 12) | (left == 36)
    assert torch.equal(kept.patches, left.masked_fill(merged, -1))
    assert torch.equal(kept.positions, dense.positions[left])
    expected = dense.embeds[left].clone()
    for middle in (12, 36):
        window = [middle + down + across for down in (-8, 0, 8) for across in (-1, 0, 1)]
        expected[left == middle] = dense.embeds[window].mean(dim=0)
    torch.testing.assert_close(kept.embeds, expected, atol=1e-5, rtol=1e-4)
    assert int(kept.extras["key"].sum()) == 4  # 0.08 of 40, rounded up
    assert kept.extent == dense.extent == 8


@torch.no_grad()
def test_a_label_means_shares_of_the_image_where_those_have_their_own_sizes(own_grids):
    """Those of 576 tokens: 16 times as much of 36. Thresholds that are given stay as they are."""
    prompt = prompt_of(4, "image", 5)
    settings = [
        MustDrop(visual_token_num=128),
        MustDrop(global_thr=0.0012 * 16, individual_thr=0.001 * 16),
        MustDrop(global_thr=0.0012, individual_thr=0.001),
    ]
    counts = []
    for own_grids.pruner in settings:
        _, trace = generate(own_grids, prompt.ids, [picture(4, 9)])
        counts.append([int(n) for n in trace.visual_tokens])
    assert counts[0] == counts[1] != counts[2]
    assert counts[0][-1] < counts[2][-1]


def test_one_setting_serves_one_kind_of_model(own_grids, model):
    own_grids.pruner = pruner = MustDrop()
    model.pruner = pruner
    with pytest.raises(ValueError, match="make one for each model"):
        own_grids.image_tokens([picture(4, 9)])
