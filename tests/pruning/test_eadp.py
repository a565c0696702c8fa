"""EADP: relevance on inputs small enough to check by hand, and budgets of crops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.clip_text import ClipText
from llava.pruning.eadp import cover_relevant, smoothed
from llava.pruning.ops import normalize, shared_out
from llava.pruning.testing.tiny import SIDE
from tests.golden_checks.compare import Report
from tests.golden_checks.eadp import check_relevance


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ONE = torch.zeros(1, dtype=torch.long)


def test_words_up_to_the_quantile_of_their_entropy_count():
    entropy = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    for quantile, counting in (
        (0, [1]),
        (0.2, [1]),
        (0.5, [1, 2]),
        (0.7, [0, 1, 2]),
        (1, [0, 1, 2, 3]),
    ):
        pruner = build_pruner("eadp", quantile=quantile)
        found = pruner.counting(entropy, [4], ONE)[0]
        assert found.nonzero().flatten().tolist() == counting
        most = torch.quantile(entropy[0], quantile)
        assert torch.equal(found, entropy[0] <= most)


def test_a_question_is_not_changed_by_a_longer_one_beside_it():
    pruner, patches = build_pruner("eadp"), random(2, 12, 8)
    words = [normalize(random(3, 8, seed=1)), normalize(random(7, 8, seed=2))]
    ends = normalize(random(2, 8, seed=3))
    together = pruner.relevance(patches, words, ends, torch.tensor([0, 1]), (3, 4))
    for n in range(2):
        alone = pruner.relevance(patches[n : n + 1], words[n : n + 1], ends[n : n + 1], ONE, (3, 4))
        torch.testing.assert_close(together[n], alone[0], atol=1e-5, rtol=0)


def test_relevance_is_scaled_over_the_crops_of_an_image():
    pruner = build_pruner("eadp", mu=1.0)
    patches = torch.eye(2)[[0, 0, 1, 1]].view(2, 2, 2)  # a crop of each kind
    ends = torch.tensor([[1.0, 0.0]])
    found = pruner.relevance(patches, [ends], ends, torch.tensor([0, 0]), (1, 2))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), atol=1e-5, rtol=0)
    same = pruner.relevance(patches[:1], [ends], ends, ONE, (1, 2))
    assert same.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("ends", [0, 1])
def test_a_recorded_relevance_without_words_or_without_a_question_is_compared(ends):
    recorded = {"image_embeds": np.ones((2, 6, 8)), "text_tokens": np.zeros((0, 8))}
    recorded |= {"eos": np.ones((ends, 8)), "expected_relevance": np.ones((2, 6))}
    recorded |= {f"expected_{name}": np.zeros((2, 0)) for name in ("entropy", "text_kept")}
    report = Report()
    check_relevance({"args": {"grid": [2, 3]}}, None, recorded, report)
    assert report.problems == []


def test_smoothing_mirrors_behind_the_border_without_its_own_row():
    edge = math.exp(-0.5)
    score = torch.zeros(1, 3, 1)
    score[0, 1] = 1.0
    sides = torch.tensor([2 * edge, 1.0, 2 * edge]) / (1 + 2 * edge)
    torch.testing.assert_close(smoothed(score)[0, :, 0], sides)
    assert smoothed(torch.ones(1, 1, 1)).item() == 1
    torch.testing.assert_close(smoothed(torch.full((2, 4, 5), 0.3)), torch.full((2, 4, 5), 0.3))


def test_the_weight_lies_on_what_is_covered():
    features = torch.tensor([[[1.0, 0], [0, 1], [-1, 0.1]]])
    assert cover_relevant(features, torch.tensor([[0.0, 1.0, 0.0]]), 1).tolist() == [[1]]
    copies = random(1, 6, 8).repeat(1, 3, 1)
    relevance = torch.rand(1, 18, generator=torch.Generator().manual_seed(1))
    assert sorted(cover_relevant(copies, relevance, 6)[0].tolist()) == list(range(6))


@pytest.mark.parametrize(
    "shares, sizes, total, counts",
    [
        ([1, 1, 1, 1, 1], [576] * 5, 640, [128] * 5),
        ([0, 0, 0, 0, 0], [9] * 5, 12, [3, 3, 2, 2, 2]),
        ([10, 0, 0, 0, 0], [576] * 5, 160, [156, 1, 1, 1, 1]),
        ([10, 1, 1, 0, 0], [5] * 5, 20, [5, 4, 4, 4, 3]),
        ([3, 2, 1], [9] * 3, 2, [1, 1, 0]),
        ([1, 2], [3, 3], 99, [3, 3]),
        ([1, 1], [0, 5], 2, [0, 2]),
        ([1, 2, 3], [0, 1, 9], 2, [0, 1, 1]),
    ],
)
def test_a_budget_is_shared_out_exactly(shares, sizes, total, counts):
    assert shared_out(shares, sizes, total) == counts


def test_crops_get_tokens_by_their_relevance_and_the_sum_is_exact(anyres_model, sample):
    prompt, draw = sample(4, "image", 5), torch.Generator().manual_seed(5)
    images = [torch.randn(5, 3, SIDE, SIDE, generator=draw)]
    anyres_model.pruner = build_pruner("eadp", visual_token_num=53)
    with trace_pruning(anyres_model) as trace:
        anyres_model.generate(
            prompt.ids,
            images=images,
            image_sizes=[(2 * SIDE, 2 * SIDE)],
            questions=["what color is the dog"],
            max_new_tokens=1,
        )
    crops = trace.visual_positions[0] // 36
    assert len(crops) == 53
    counts = [int((crops == n).sum()) for n in range(5)]
    assert min(counts) >= 1 and len(set(counts)) > 1


def test_single_words_are_those_of_all_segments_but_the_end(tower_dir):
    clip = ClipText.load(tower_dir)
    text = "red circle " * 60
    segments = clip.segments(text)
    (reading,) = clip.read([text], words=True)
    assert len(segments) == 2 and len(reading.words) == sum(map(len, segments)) - 1
    torch.testing.assert_close(reading.words.norm(dim=1), torch.ones(len(reading.words)))
    pooled, _ = clip.run(segments)
    # Pooling takes the state of the end mark, which is left out.
    short = clip.read(["red"], words=True)[0]
    assert not (short.words @ short.direction > 0.9999).any() and len(pooled) == 2


def test_questions_that_were_read_for_their_direction_are_read_again_for_words(tower_dir):
    clip = ClipText.load(tower_dir)
    before = clip.directions(["red", "blue dog"])
    assert clip.known["red"].words is None
    readings = clip.read(["blue dog", "red"], words=True)
    assert torch.equal(readings[1].direction, clip.known["red"].direction)
    torch.testing.assert_close(readings[0].direction, before[1], atol=1e-5, rtol=0)
    assert [len(reading.words) for reading in readings] == [
        len(clip.tokenizer(text).input_ids) - 1 for text in ("blue dog", "red")
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["eadp", "cdpruner"])
@pytest.mark.parametrize("cast", ["before", "after"])
def test_in_half_precision_scores_and_choice_are_those_of_fp32_on_the_same_features(
    make_model, sample, name, dtype, cast
):
    """Whether the model is cast before it gets the method or with it."""
    seen = {}

    def watch(pruner, hook: str) -> None:
        inner = getattr(pruner, hook)

        def watched(vision):
            seen[hook] = vision, inner(vision)
            return seen[hook][1]

        setattr(pruner, hook, watched)

    model, prompt = make_model(), sample(4, "image", 5)
    if cast == "before":
        model.to(dtype)
    model.pruner = build_pruner(name, visual_token_num=10)
    if cast == "after":
        model.to(dtype)
    for hook in ("after_encoder", "after_projector"):
        watch(model.pruner, hook)
    asked = dict(images=prompt.images.to(dtype), questions=["what color is the dog"])
    model.generate(prompt.ids, max_new_tokens=1, **asked)

    whole = make_model()
    whole.pruner = build_pruner(name, visual_token_num=10)
    if cast == "after":  # its weights were rounded
        whole.pruner.module.to(dtype).float()
    for hook, (given, found) in seen.items():
        assert given.features.dtype == dtype
        expected = getattr(whole.pruner, hook)(replace(given, features=given.features.float()))
        assert torch.equal(found.positions, expected.positions)
        for extra, values in expected.extras.items():
            assert values.dtype == torch.float32 and torch.equal(found.extras[extra], values)


def test_without_a_question_or_an_exponent_nothing_but_coverage_counts(model, sample):
    prompt, found = sample(4, "image", 5), []
    for beta, questions in ((1.0, None), (0, ["what color is the dog"])):
        model.pruner = build_pruner("eadp", visual_token_num=10, beta=beta)
        with trace_pruning(model) as trace:
            model.generate(prompt.ids, images=prompt.images, questions=questions, max_new_tokens=1)
        found.append(trace.visual_positions[0].tolist())
    assert found[0] == found[1] and model.pruner_module is None


@pytest.mark.parametrize(
    "options", [{"quantile": 1.2}, {"mu": -0.1}, {"tau": 0}, {"gamma": 0}, {"beta": -1}]
)
def test_what_is_no_setting_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build_pruner("eadp", **options)
