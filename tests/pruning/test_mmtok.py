"""MMTok: what words and patches cover, and which words those are."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.letters import Letters
from llava.pruning.mmtok import ROUND_UP, cover_both


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_pick_adds_most_to_both_coverages():
    projected, patches, words = random(1, 14, 9), random(1, 14, 6, seed=1), random(1, 4, 9, seed=2)
    found = cover_both(projected, patches, words, torch.full((1, 4), 0.25), 6, 0.2, 0.3, 0.5)

    def cosine(a, b):
        a, b = (torch.nn.functional.normalize(x[0].double(), dim=-1) for x in (a, b))
        return a @ b.T

    text = (cosine(words, projected) / 0.2).softmax(dim=1)
    image = (cosine(patches, patches) / 0.3).softmax(dim=1)

    def covered(chosen):
        shares = [map_[:, chosen].amax(dim=1).mean() for map_ in (text, image)]
        return float(shares[0] + 0.5 * shares[1])

    chosen = []
    for pick in found[0].tolist():
        value = {n: covered([*chosen, n]) for n in range(14) if n not in chosen}
        assert pick == max(value, key=value.get)
        chosen.append(pick)


def test_copies_are_taken_in_order_wherever_they_stand():
    draw = torch.Generator().manual_seed(0)
    for _ in range(100):
        tokens, words = torch.randn(1, 9, 64, generator=draw), torch.randn(1, 3, 64, generator=draw)
        tokens[:, ::3] = tokens[:, :1]
        found = cover_both(tokens, tokens, words, torch.full((1, 3), 1 / 3), 4, 0.02, 0.2, 0.5)
        copies = [pick for pick in found[0].tolist() if pick % 3 == 0]
        assert copies[:1] in ([], [0])


@pytest.fixture
def pruner(model):
    pruner = build_pruner("mmtok", visual_token_num=10)
    pruner.use_random_parts(model)
    model.pruner = pruner
    return pruner


def test_words_are_rows_of_the_embedding_matrix(model, pruner):
    texts = ["ab", "abc" * ROUND_UP]
    words, weights = pruner.words(texts, torch.device("cpu"))
    assert words.shape == (2, 3 * ROUND_UP, 32)
    table = model.get_input_embeddings().weight
    letters = len(table) - 2  # behind them, the marks of start and end
    assert torch.equal(words[0, :2], table[[ord("a") % letters, ord("b") % letters]])
    assert weights[0].tolist() == [0.5, 0.5] + [0] * (3 * ROUND_UP - 2)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))


def kept(model, prompt, questions) -> list[int]:
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, questions=questions, max_new_tokens=1)
    return trace.visual_positions[0].tolist()


def test_the_question_decides_and_the_answer_format_does_not(model, pruner, sample):
    prompt, ending = sample(4, "image", 5), "\nAnswer the question using a single word or phrase."
    assert kept(model, prompt, ["zzz"]) == kept(model, prompt, [f"zzz{ending}"])
    found = {tuple(kept(model, prompt, [text])) for text in ("zzz", "what", "01234")}
    assert len(found) > 1


def test_without_words_the_image_alone_is_covered(model, pruner, sample):
    prompt = sample(4, "image", 5)
    assert kept(model, prompt, None) == kept(model, prompt, [""])


def test_a_model_without_a_tokenizer_is_refused_when_the_method_is_chosen(model):
    with pytest.raises(FileNotFoundError, match="model.tokenizer"):
        model.pruner = build_pruner("mmtok", visual_token_num=10)
    model.tokenizer = Letters(90)
    try:
        model.pruner = build_pruner("mmtok", visual_token_num=10)
    finally:
        del model.tokenizer


def test_the_temperature_of_words_belongs_to_the_family(
    model, own_grids_model, monkeypatch, sample
):
    seen = []
    monkeypatch.setattr(
        "llava.pruning.mmtok.cover_both",
        lambda *args: seen.append(args[5]) or torch.zeros(len(args[0]), 1, dtype=torch.long),
    )
    from llava.pruning.testing.tiny import picture

    for own, images in ((model, sample("image").images), (own_grids_model, [picture(4, 5)])):
        for tau_t in (None, 0.3):
            pruner = build_pruner("mmtok", visual_token_num=1, tau_t=tau_t)
            pruner.use_random_parts(own)
            own.pruner = pruner
            own.image_tokens(images, questions=["a"])
    assert seen == [0.02, 0.3, 0.01, 0.3]


def test_temperatures_are_above_zero():
    with pytest.raises(ValueError, match="tau_v"):
        build_pruner("mmtok", tau_v=0)
