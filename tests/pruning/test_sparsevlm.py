"""SparseVLM on inputs small enough to check by hand."""

import pytest
import torch

from llava.model.language_model.modeling_llama import Rotary
from llava.pruning import Prefill, trace_pruning
from llava.pruning.density_peaks import cluster
from llava.pruning.sparsevlm import SparseState, SparseVLM, find_raters, nearness


def prefill(states, visual):
    states = torch.tensor(states)[None]
    places = torch.arange(states.shape[1])[None]
    return Prefill(
        decoder=None,
        layer=0,
        hidden_states=states,
        position_ids=places,
        visual_index=torch.tensor([visual]),
        patch_index=places,
        index=places,
        valid=None,
    )


def run(model, prompt, **options):
    with trace_pruning(model) as trace:
        model.generate(
            prompt.ids, images=prompt.images, max_new_tokens=2, do_sample=False, eos_token_id=-1
        )
    return trace


def test_words_close_to_the_image_rate_it():
    states = [[9.0, 0.0], [1.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, 3.0], [2.9, 0.0]]
    raters, most = find_raters(prefill(states, [-1, 0, 0, -1, -1, -1]))
    assert raters.tolist() == [[[False, False, False, True, False, True]]]  # text before: never
    assert most == 2


def test_one_word_after_the_image_rates_alone():
    raters, most = find_raters(prefill([[1.0], [1.0], [1.0]], [0, 0, -1]))
    assert raters[0, 0].tolist() == [False, False, True] and most == 1


def test_without_text_after_the_image_the_last_token_rates():
    pruner, state = SparseVLM(), prefill([[1.0], [1.0], [1.0]], [-1, 0, 0])
    state.state = SparseState(*find_raters(state), totals=[[2]], counts=[[2]])
    rows, weights = pruner.rater_rows(state)
    # the last prompt token is one of the image here: nothing else follows it
    assert rows.shape == (1, 1) and weights.shape == (1, 1, 1)


def test_the_rating_is_the_mean_over_words_and_heads():
    attention = torch.tensor([[[[0.1, 0.3], [0.5, 0.1]], [[0.0, 0.2], [0.9, 0.9]]]])
    weights, own = torch.tensor([[[True, False]]]), torch.ones(1, 1, 2, dtype=torch.bool)
    score = SparseVLM().score(attention, weights, own)
    torch.testing.assert_close(score, torch.tensor([[0.05, 0.25]]))


def test_version_2_listens_to_the_heads_that_look_at_the_image():
    attention = torch.tensor([[[[0.1, 0.0]], [[0.4, 0.5]], [[0.2, 0.1]]]])
    ones = torch.ones(1, 1, 1, dtype=torch.bool)
    own = torch.ones(1, 1, 2, dtype=torch.bool)
    score = SparseVLM(version="2.0", num_selected_heads=1).score(attention, ones, own)
    torch.testing.assert_close(score, torch.tensor([[0.4, 0.5]]))


def test_nearness_is_the_product_of_rotated_ones(model):
    positions = torch.tensor([[0, 3, 7]])
    pull = nearness(model.model.rotary, positions, torch.tensor([[2]]))
    assert isinstance(model.model.rotary, Rotary)
    frequency = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    expected = [2 / 8**0.5 * torch.cos(gap * frequency).sum() for gap in (7, 4, 0)]
    torch.testing.assert_close(pull[0, 0, 0], torch.stack(expected))


def test_clusters_gather_round_dense_and_distant_tokens():
    tokens = torch.tensor([[[0.0], [0.1], [0.2], [5.0], [5.2], [9.9]]])
    valid = torch.tensor([[True] * 5 + [False]])
    centres, assign, merged, *_ = cluster(tokens, valid, torch.tensor([2]), 3)
    assert sorted(centres[0, :2].tolist()) == [0, 3]
    near = assign[0, 0]
    assert assign[0, :5].tolist() == [near] * 3 + [1 - near] * 2
    torch.testing.assert_close(merged[0, near], torch.tensor([0.1]), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(merged[0, 1 - near], torch.tensor([5.1]), atol=1e-5, rtol=0.0)


def test_equal_tokens_make_one_cluster_with_the_earliest_as_centre():
    tokens, valid = torch.ones(1, 4, 3), torch.ones(1, 4, dtype=torch.bool)
    centres, assign, merged, density, _ = cluster(tokens, valid, torch.tensor([1]), 1)
    assert centres.tolist() == [[0]] and assign.tolist() == [[0] * 4]
    assert density.tolist() == [[1.0] * 4]
    torch.testing.assert_close(merged, torch.ones(1, 1, 3), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize(
    ("budget", "average"), [(192, 206.5), (128, 145.41), (96, 114.09), (64, 82.25)]
)
def test_published_settings_enter_the_layers_with_their_true_average(budget, average):
    schedule = SparseVLM(visual_token_num=budget).token_schedule(576, 32)
    assert round(sum(schedule) / 32, 2) == average


def test_all_crops_of_an_image_are_one_number_of_tokens():
    pruner = SparseVLM(visual_token_num=640)
    assert pruner.token_schedule(576, 32, crops=5) == pruner.token_schedule(5 * 576, 32)


def test_other_budgets_lie_between_the_published_ones():
    assert SparseVLM(visual_token_num=160).allowed(576) == (301, 155, 73)
    assert SparseVLM(visual_token_num=640).allowed(2880) == (1515, 550, 180)  # 128 of 576
    assert SparseVLM(visual_token_num=576).allowed(576) == (576, 576, 576)


def test_merged_tokens_stand_behind_the_kept_ones_and_positions_count_through(model, sample):
    model.pruner = SparseVLM(pruning_layers=[1, 2, 3], retained_tokens=[320, 160, 80])
    trace = run(model, sample(4, "image", 5))
    # 36 -> 20 + 1 merged -> 10 + 1 -> 5 + 1
    assert [int(n) for n in trace.visual_tokens] == [36, 36, 21, 11, 6, 6]
    index = trace.decoder_keep[2][0].tolist()
    assert index[:5] == [0, 1, 2, 3, 4] and index[-6:] == [-1, 41, 42, 43, 44, 45]


def test_images_of_one_prompt_are_rated_and_merged_one_by_one(model, sample):
    model.pruner = SparseVLM(pruning_layers=[1, 2, 3], retained_tokens=[320, 160, 80])
    trace = run(model, sample(3, "image", 4, "image", 2))
    assert [int(n) for n in trace.visual_tokens] == [72, 72, 42, 22, 12, 12]
    assert sum(place < 0 for place in trace.decoder_keep[2][0].tolist()) == 2


def test_version_2_keeps_positions_and_merges_nothing(model, sample):
    model.pruner = SparseVLM(
        version=2.0, pruning_layers=[1, 2, 3], retained_tokens=[320, 160, 80], num_selected_heads=2
    )
    trace = run(model, sample(4, "image", 5))
    assert [int(n) for n in trace.visual_tokens] == [36, 36, 20, 10, 5, 5]
    assert min(trace.decoder_keep[4][0].tolist()) == 0


def test_version_1_keeps_by_the_rank_of_the_ratings(model, sample):
    model.pruner = pruner = SparseVLM(version="1.0", scale=2.0, bias=1.0)
    trace = run(model, sample(4, "image", 5))
    seen = [int(n) for n in trace.visual_tokens]
    assert pruner.adaptive and seen[-1] < 36
    assert all(n <= most for n, most in zip(seen, pruner.token_schedule(36, 6), strict=True))


def test_the_loss_ignores_merged_tokens(model, sample):
    model.pruner = SparseVLM(pruning_layers=[1, 2, 3], retained_tokens=[320, 160, 80])
    prompt = sample(4, "image", 5)
    with torch.no_grad():
        loss = model(prompt.ids, images=prompt.images, labels=prompt.ids.clamp(min=-100)).loss
    assert loss.isfinite()


def test_ratings_belong_to_the_tokens_of_each_image():
    own = prefill([[1.0]] * 4, [0, 1, -1, 1]).own_tokens()
    assert own.tolist() == [[[True, False, False, False], [False, True, False, True]]]


@pytest.mark.parametrize(
    "options",
    [
        {"version": "3.0"},
        {"visual_token_num": 0},
        {"retained_tokens": [300, 200]},
        {"pruning_layers": [2, 6]},
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match="must|choose"):
        SparseVLM(**options)


def test_impossible_settings_are_refused_when_assigned(model):
    for options in ({"pruning_layers": [1, 2, 5]}, {"visual_token_num": 37}):
        with pytest.raises(ValueError, match="ascend|exceeds"):
            model.pruner = SparseVLM(**{"visual_token_num": 10, **options})
