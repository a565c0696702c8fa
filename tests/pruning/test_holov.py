"""HoloV: what runs get, and in which order tokens enter the prompt."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.holov import best_of_runs, fitted, one_each, quotas, run_places, run_scores
from llava.pruning.testing.tiny import SIDE


def test_the_first_runs_are_one_longer():
    places, real = run_places(11, 4, torch.device("cpu"))
    runs = [own[there].tolist() for own, there in zip(places, real, strict=True)]
    assert runs == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


def test_the_share_of_a_run_is_nearly_its_attention():
    draw = torch.Generator().manual_seed(0)
    features, attention = (
        torch.randn(1, 3, 5, 8, generator=draw),
        torch.rand(1, 3, 5, generator=draw),
    )
    real = torch.ones(3, 5, dtype=torch.bool)
    scores = run_scores(features, attention, real, 0.09)
    torch.testing.assert_close(scores, 1090 * attention.mean(dim=2), rtol=1e-3, atol=0)
    alone = run_scores(features[:, :, :1], attention[:, :, :1], real[:, :1], 0.09)
    torch.testing.assert_close(alone, attention[:, :, 0])


def test_padding_of_short_runs_changes_no_score():
    draw = torch.Generator().manual_seed(0)
    features, attention = (
        torch.randn(1, 1, 4, 8, generator=draw),
        torch.rand(1, 1, 4, generator=draw),
    )
    real = torch.tensor([[True, True, True, False]])
    cut = run_scores(features[:, :, :3], attention[:, :, :3], real[:, :3], 2.0)
    torch.testing.assert_close(run_scores(features, attention, real, 2.0), cut)


def test_shares_are_rounded_down_and_the_rest_goes_to_the_best():
    scores = torch.tensor([[1.0, 4.0, 2.0, 1.0]])
    assert quotas(scores, 9).tolist() == [[1, 5, 2, 1]]
    assert quotas(torch.zeros(1, 4), 6).tolist() == [[2, 2, 1, 1]]


def test_what_a_run_cannot_give_goes_round_after_round_to_those_with_room():
    quota, sizes = torch.tensor([[9, 1, 1, 1]]), torch.tensor([[3, 3, 9, 2]])
    scores = torch.tensor([[9.0, 2.0, 1.0, 1.5]])
    assert fitted(quota, sizes, scores, 9).tolist() == [[3, 3, 4, 2]]
    left, room = torch.tensor([[4]]), torch.tensor([[0, 2, 8, 1]])
    assert one_each(left, room, scores, 8).tolist() == [[0, 2, 1, 1]]


def test_tokens_come_run_by_run_and_in_a_run_by_attention():
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.0, 0.3, 0.3]])
    features = torch.eye(6)[None]
    assert best_of_runs(features, attention, 3, 2, 0.09).tolist() == [[1, 2, 4]]
    assert best_of_runs(features, attention, 5, 2, 0.09).tolist() == [[0, 1, 2, 4, 5]]
    assert best_of_runs(features, attention, 6, 2, 0.09).tolist() == [list(range(6))]
    assert best_of_runs(features, attention, 2, 9, 0.09).tolist() == [[1, 4]]


def kept(model, pruner, prompt, images, **options) -> list[int]:
    model.pruner = pruner
    with trace_pruning(model, embeds=True) as trace:
        model.generate(prompt.ids, images=images, max_new_tokens=1, **options)
    assert trace.position_ids[0].flatten().tolist() == list(range(trace.position_ids.shape[1]))
    return trace.visual_positions[0].tolist()


def test_the_order_in_the_prompt_is_an_option(model, sample):
    prompt = sample(4, "image", 5)
    options = dict(visual_token_num=20, num_runs=4)
    found = kept(model, build_pruner("holov", **options), prompt, prompt.images)
    sorted_ = build_pruner("holov", **options, raster_order=True)
    assert found != sorted(found)
    assert kept(model, sorted_, prompt, prompt.images) == sorted(found)


def test_tiles_are_one_sequence_without_newlines(anyres_model, sample):
    prompt, draw = sample(4, "image", 5), torch.Generator().manual_seed(5)
    images = [torch.randn(3, 3, SIDE, SIDE, generator=draw)]
    for count in (50, 90, 107):
        pruner = build_pruner("holov", visual_token_num=count)
        found = kept(anyres_model, pruner, prompt, images, image_sizes=[(42, 84)])
        assert len(found) == len(set(found)) == count and min(found) >= 0
        assert max(found) >= 36  # of the tiles, too


def test_the_name_of_the_release_is_understood():
    assert build_pruner("holov", num_patches=8).num_runs == 8
    with pytest.raises(ValueError, match="num_runs"):
        build_pruner("holov", num_runs=0)


def test_alpha_may_be_zero_and_not_less():
    assert build_pruner("holov", alpha=0).alpha == 0
    with pytest.raises(ValueError, match="at least 0"):
        build_pruner("holov", alpha=-0.1)
