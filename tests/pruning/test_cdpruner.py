"""CDPruner on inputs small enough to check by hand."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from llava import linear
from llava.pruning import VisionTokens, build_pruner, trace_pruning
from llava.pruning.cdpruner import CDPruner, largest_volume, scale_per_image
from llava.pruning.clip_text import ClipText
from llava.pruning.questions import bare_question
from tests.conftest import TOWER, pad_batch


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_most_relevant_patch_is_picked_first():
    relevance = torch.tensor([[0.2, 0.9, 0.5, 0.4]])
    assert largest_volume(torch.eye(4)[None], relevance, 4).tolist() == [[1, 2, 3, 0]]


def test_a_near_copy_of_a_pick_comes_after_less_relevant_patches():
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]])
    relevance = torch.tensor([[0.9, 1.0, 0.3]])
    assert largest_volume(features, relevance, 2).tolist() == [[1, 2]]


def test_every_pick_is_the_one_that_enlarges_the_determinant_most():
    features, relevance = random(1, 12, 6), random(1, 12, seed=1).abs() + 0.1
    unit = torch.nn.functional.normalize(features[0], dim=-1).double()
    kernel = unit @ unit.T * torch.outer(relevance[0], relevance[0])
    chosen = []
    for pick in largest_volume(features, relevance, 5)[0].tolist():
        volume = {
            j: float(torch.linalg.det(kernel[[*chosen, j]][:, [*chosen, j]]))
            for j in range(12)
            if j not in chosen
        }
        assert pick == max(volume, key=volume.get)
        chosen.append(pick)


def test_beyond_the_rank_the_most_relevant_follow_in_order_of_place():
    features = torch.eye(2)[[0, 0, 1, 1, 0]][None]
    relevance = torch.tensor([[0.5, 1.0, 0.7, 0.9, 0.5]])
    assert largest_volume(features, relevance, 5).tolist() == [[1, 3, 2, 0, 4]]


def test_zero_features_are_picked_last_and_only_once():
    features = torch.eye(4)[None].clone()
    features[0, 1] = 0
    assert largest_volume(features, torch.ones(1, 4), 4).tolist() == [[0, 2, 3, 1]]


def test_relevance_is_scaled_over_the_crops_of_an_image_alone():
    score = torch.tensor([[0.0, 1.0], [2.0, 4.0], [10.0, 11.0]])
    scaled = scale_per_image(score, torch.tensor([0, 0, 1]))
    expected = torch.tensor([[0.0, 0.25], [0.5, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(scaled, expected, atol=1e-5, rtol=0)


def test_constant_relevance_leaves_diversity_alone():
    scaled = scale_per_image(torch.full((1, 3), 0.7), torch.zeros(1, dtype=torch.long))
    assert scaled.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    "text, question",
    [
        ("What?\nAnswer the question using a single word or phrase.", "What?"),
        ("<image>\nWhat?\nA. x\nB. y", "What?\nA. x\nB. y"),
        ("A?\nAnswer with the option's letter from the given choices directly.", "A?"),
        ("What? Answer the question using a single word or phrase.",) * 2,
    ],
)
def test_the_answer_format_is_no_part_of_the_question(text, question):
    assert bare_question(text) == question


@pytest.fixture(scope="module")
def clip(tower_dir):
    return ClipText.load(tower_dir)


def test_long_texts_are_cut_into_segments_and_averaged(clip):
    text = "red circle " * 60
    segments = clip.segments(text)
    assert [len(ids) for ids in segments] == [77, len(clip.tokenizer(text).input_ids) - 77]
    unit = torch.cat([torch.nn.functional.normalize(clip.run([ids])[0]) for ids in segments])
    torch.testing.assert_close(clip.directions([text])[0], unit.mean(dim=0), atol=1e-5, rtol=0)


def test_questions_of_different_length_do_not_influence_each_other(clip):
    texts = ["red", "how many blue circles are there?", "red circle " * 60]
    alone = torch.cat([ClipText.directions(clip, [text]) for text in texts])
    clip.known.clear()
    torch.testing.assert_close(clip.directions(texts), alone, atol=1e-5, rtol=0)


@pytest.mark.skipif(not linear.HAS_KERNELS, reason="torch has no MKL here")
def test_all_products_of_a_text_go_by_the_kernels_for_few_tokens(tower_dir, monkeypatch):
    clip, calls = ClipText.load(tower_dir), []
    product = linear.product
    monkeypatch.setattr(linear, "product", lambda *a: calls.append(a[1]) or product(*a))
    with torch.no_grad():
        clip.read(["is there a red circle?"], words=True)
    layers = clip.text.config.num_hidden_layers
    assert len(calls) == 6 * layers + 2  # of the whole text, and of its words


def test_the_question_decides_what_is_kept_and_batches_change_nothing(model, sample):
    model.pruner = build_pruner("cdpruner", visual_token_num=10)
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=1)]
    questions = ["what color is the dog", "how many circles are there below the square?"]
    images = prompts[0].images  # the same image twice

    def kept(ids, images, questions, **kwargs):
        with trace_pruning(model) as trace:
            model.generate(ids, images=images, questions=questions, max_new_tokens=1, **kwargs)
        return [positions.tolist() for positions in trace.visual_positions]

    alone = [kept(p.ids, images, [q])[0] for p, q in zip(prompts, questions, strict=True)]
    assert alone[0] != alone[1] and all(len(row) == 10 for row in alone)
    ids, mask = pad_batch([p.ids for p in prompts])
    assert kept(ids, torch.cat([images, images]), questions, attention_mask=mask) == alone


def test_every_image_needs_a_question_of_its_own(model, sample):
    model.pruner = build_pruner("cdpruner", visual_token_num=10)
    prompt = sample(4, "image", 5, "image", 2)
    with pytest.raises(ValueError, match="1 questions for 2 images"):
        model.generate(prompt.ids, images=prompt.images, questions=["what is it?"])


def test_more_weight_on_relevance_keeps_more_relevant_patches():
    features, relevance = random(1, 30, 8), torch.linspace(0, 1, 30)[None]
    sums = []
    for theta in (0.0, 0.5, 0.9):
        quality = torch.exp(relevance * theta / (2 * (1 - theta)))
        picks = largest_volume(features, quality, 6)
        sums.append(float(relevance.gather(1, picks).sum()))
    assert all(low <= high for low, high in itertools.pairwise(sums)) and sums[0] < sums[-1]


def test_the_text_tower_comes_and_goes_with_the_method(model):
    plain = set(model.state_dict())
    model.pruner = build_pruner("cdpruner", visual_token_num=10)
    assert any("pruner_module.text" in name for name in model.state_dict())
    model.pruner = build_pruner("none")
    assert set(model.state_dict()) == plain


def test_a_tower_without_text_is_an_error_when_the_method_is_chosen(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TOWER))
    tower = SimpleNamespace(vision_tower_name=str(tmp_path), is_loaded=False)
    with pytest.raises(ValueError, match="holds no weights of a CLIP model"):
        CDPruner().attach(SimpleNamespace(get_vision_tower=lambda: tower))


@pytest.mark.parametrize("theta", [0.5, 0.99, 0.995, 0.999])
def test_next_to_a_weight_of_1_relevance_alone_decides_between_unlike_patches(theta):
    features = torch.eye(8)[None]
    shares = torch.tensor([0.0, 0.3, 0.1, 0.9, 0.95, 0.2, 1.0, 0.4])
    embeds = torch.stack([-shares, (1 - shares.square()).sqrt()], dim=1)[None]
    pruner = CDPruner(visual_token_num=3, theta=theta)
    pruner.module = SimpleNamespace(
        image_embeds=lambda _: embeds, directions=lambda _: torch.tensor([[1.0, 0.0]])
    )
    places = torch.arange(8)[None]
    vision = VisionTokens(features, places, (1, 8), torch.zeros(1).long(), questions=["what?"])
    assert pruner.select(pruner.after_encoder(vision)).tolist() == [[6, 4, 3]]


def test_theta_outside_its_range_is_an_error():
    with pytest.raises(ValueError, match="theta"):
        build_pruner("cdpruner", theta=1.0)
