"""PruMerge on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.prumerge import PruMerge, class_attention


def centers(pruner, *rows):
    order, valid, counts = pruner.centers(torch.tensor(rows))
    found = [places[ok].tolist() for places, ok in zip(order, valid, strict=True)]
    assert counts == list(map(len, found))
    return found


FLAT = [0.01] * 12


def test_outliers_are_kept_by_falling_attention_image_by_image():
    first, second = FLAT.copy(), FLAT.copy()
    first[3], first[7] = 0.3, 0.5
    second[11] = 0.2
    assert centers(PruMerge(), first, second) == [[7, 3], [11]]


def test_an_image_without_outliers_keeps_its_most_attended_patch():
    assert centers(PruMerge(), [0.01, 0.02, 0.03, 0.02]) == [[2]]
    assert centers(PruMerge(), FLAT) == [[0]]


def test_the_plus_version_adds_patches_at_regular_intervals():
    row = FLAT.copy()
    row[4] = 0.5  # 1 of 12: every 12 / 3 = 4th patch
    assert centers(PruMerge(plus=True), row) == [[4, 0, 8]]
    every = PruMerge(plus=True, reduction_ratio=0.25)
    assert centers(every, [0.5, 0.1, 0.4, 0.1, 0.3, 0.1, 0.0, 0.0, 0.0]) == [[0, 2, 6]]


def test_a_ratio_or_a_budget_fixes_the_number():
    row = [n / 100 for n in range(12)]
    assert centers(PruMerge(reduction_ratio=0.25), row) == [[11, 10, 9]]
    assert centers(PruMerge(visual_token_num=3), row) == [[11, 10]]
    assert centers(PruMerge(visual_token_num=1), row) == [[]]


def test_a_center_adds_its_nearest_by_their_attention_and_the_rest_is_one_token():
    features = torch.tensor([1.0, 10, 100, 1000])[None, :, None]
    keys = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0, 1]])[None]
    attention = torch.tensor([[0.5, 0.1, 0.2, 0.3]])
    chosen, valid = torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool)
    tokens = PruMerge(neighbors=1).merge(features, keys, attention, chosen, valid)
    assert tokens.flatten().tolist() == pytest.approx([1 + 0.2 * 100, 1 + 20 + 300])


def test_class_attention_is_one_softmax_over_all_heads_and_the_class_token():
    query, cls_key = torch.tensor([[2.0, 0, 0, 0]]), torch.zeros(1, 4)
    keys = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0]]])
    expected = torch.tensor([0.0, 1.0, 0.0]).softmax(dim=0)[1:]
    torch.testing.assert_close(class_attention(query, cls_key, keys)[0], expected)


def test_images_of_a_batch_keep_their_own_number(model, sample):
    model.pruner = PruMerge(outlier_factor=0.1)
    prompt = sample(3, "image", 4, "image", 5)
    with trace_pruning(model) as trace:
        model(prompt.ids, images=prompt.images)
    together = [len(kept) for kept in trace.visual_positions]
    alone = []
    for image in prompt.images:
        with trace_pruning(model) as trace:
            model(sample(3, "image").ids, images=image[None])
        alone.append(len(trace.visual_positions[0]))
    assert together == alone
    assert max(alone) <= model.pruner.token_schedule(36, 6)[0]


@pytest.mark.parametrize(
    "options", [{"plus": True, "reduction_ratio": 1.0}, {"outlier_factor": -0.9}]
)
def test_no_image_has_more_tokens_than_the_schedule_says(model, sample, options):
    model.pruner = PruMerge(**options)
    prompt = sample(3, "image", 4)
    with trace_pruning(model) as trace:
        model(prompt.ids, images=prompt.images)
    assert 10 < int(trace.visual_tokens[0][0]) <= model.pruner.token_schedule(36, 6)[0] == 37


def test_tiled_images_are_refused_at_once(anyres_model):
    with pytest.raises(ValueError, match="one crop per image"):
        anyres_model.pruner = build_pruner("prumerge")


@pytest.mark.parametrize(
    "options",
    [
        {"visual_token_num": 0},
        {"visual_token_num": 9, "plus": True},
        {"reduction_ratio": 0.0},
        {"neighbors": -1},
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match="must|excludes"):
        PruMerge(**options)
