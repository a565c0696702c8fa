"""What the host knows of the tokens is true, at every layer and with every method."""

from dataclasses import replace

import pytest
import torch

from llava.devices import moved
from llava.model.language_model import hook_calls, prefill_loop
from llava.pruning import METHODS, build_pruner
from llava.pruning.base import Pruner
from llava.pruning.counts import PADDING, TokenCounts
from llava.pruning.stages import DecoderStage
from llava.pruning.tokens import VisionTokens
from tests.conftest import make_pruner, pad_batch
from tests.second_device import SECOND, THIRD, Elsewhere, devices

CHAINS = ["vispruner+fastv", "pool+pyramiddrop"]


def counted(prefill) -> TokenCounts:
    """From the tensors alone."""
    owner = prefill.visual_index
    if prefill.valid is not None:
        owner = torch.where(prefill.valid, owner, PADDING)
    return TokenCounts.of(owner, prefill.num_images)


def test_tokens_of_rows_say_what_images_have_where_a_row_has_one_at_most():
    one = TokenCounts((5, 5), (4, 0), ((4,), (0,)), (2, 5))
    assert one.with_visual([3, 0]).images == ((3,), (0,))
    two = TokenCounts((5, 5), (8, 4), ((4, 4), (4, 0)), (2, 5))
    assert two.with_visual([3, 2]).images == () and two.with_visual([3, 2]).visual == (3, 2)


@pytest.fixture
def layers(monkeypatch):
    """The known counts of every layer that was seen, each checked against the tensors."""
    seen = []

    def checked(hook, prefill, name):
        result = hook_calls.call(hook, prefill, name)
        known, true = result.prefill.what_is_known(), counted(result.prefill)
        if known.counts is not None:
            assert (known.counts.text, known.counts.visual) == (true.text, true.visual)
            assert known.counts.images in ((), true.images)
            rows = zip(known.counts.behind, true.behind, true.visual, strict=True)
            assert all(ours == theirs for ours, theirs, visual in rows if visual)
        valid = result.prefill.valid
        if valid is not None and known.hides is False:
            assert not (valid[:, 1:] & ~valid[:, :-1]).any()
        seen.append(known.counts)
        return result

    monkeypatch.setattr(prefill_loop, "call", checked)
    return seen


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*sorted(METHODS), *CHAINS])
def test_counts_are_true_in_ragged_batches(model, sample, layers, name, side):
    prompts = [sample(4, "image", 3, "image", 6, seed=1), sample(15, "image", 2, seed=2)]
    prompts.append(sample(7, seed=3))
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images = torch.cat([prompt.images for prompt in prompts if prompt.images is not None])
    model.pruner = make_pruner(name)
    model.config.tokenizer_padding_side = side
    options = dict(attention_mask=mask, images=images, questions=["What is it?"] * 3)
    try:
        with torch.inference_mode():
            model(ids, **options)
            model.generate(ids, num_beams=2, do_sample=False, max_new_tokens=2, **options)
    finally:
        del model.config.tokenizer_padding_side
    assert len(layers) >= 12 and layers[0] is not None


class Cut(DecoderStage, Pruner):
    """What it does before layer 1, it does to the whole batch."""

    def __init__(self, change):
        self.change = change

    def before_layer(self, index, prefill):
        return self.change(prefill) if index == 1 else prefill


CHANGES = {
    "a mask": lambda p: p.keep(~p.is_visual | (p.patch_index % 3 == 0)),
    "counts for images": lambda p: p.keep_visual(p.patch_index.float(), [[4, 7], [50, 0]]),
    "one count": lambda p: p.keep_visual(p.patch_index.float(), 5),
    "counts at tokens": lambda p: p.keep_visual(p.patch_index.float(), p.patch_index % 7),
    "appended": lambda p: p.append(p.hidden_states[:, :2]).append(p.hidden_states[:, :1]),
    "hidden tokens": lambda p: p.hide(~p.is_visual | (p.patch_index % 3 == 0)),
    "another mask": lambda p: replace(p, valid=p.index > 5),
    "another owner": lambda p: replace(p, visual_index=p.visual_index.clamp(max=0)),
    "blended": lambda p: p.keep_and_append(
        ~p.is_visual | (p.patch_index % 2 == 0),
        p.hidden_states[:, :2],
        p.index[:, :2] * 0,
        p.index[:, :2] >= 0,
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_counts_are_true_after_every_change(model, sample, layers, change):
    prompts = [sample(4, "image", 3, "image", 6, seed=1), sample(15, "image", 2, seed=2)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    after = []

    def changed(prefill):
        prefill = change(prefill)
        after.append((prefill.counts, counted(prefill), prefill.hides_padding, prefill.valid))
        return prefill

    model.pruner = Cut(changed)
    model(ids, attention_mask=mask, images=torch.cat([prompt.images for prompt in prompts]))
    ((known, true, hides, valid),) = after
    assert (known.text, known.visual, known.images) == (true.text, true.visual, true.images)
    assert known.behind == true.behind
    assert hides or valid is None or not (valid[:, 1:] & ~valid[:, :-1]).any()


def test_what_is_hidden_is_as_good_as_gone(model, sample):
    prompts = [sample(4, "image", 3, "image", 6, seed=1), sample(15, "image", 2, seed=2)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images, found = torch.cat([prompt.images for prompt in prompts]), []
    for how in ("keep", "hide"):
        model.pruner = Cut(
            lambda p, how=how: getattr(p, how)(~p.is_visual | (p.patch_index % 3 == 0), True)
        )
        out = model(ids, attention_mask=mask, images=images)
        found.append((out.logits[:, -1], out.past_key_values.row_lengths()))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert [x.tolist() for x in found[0][1]] == [x.tolist() for x in found[1][1]]


def test_what_is_known_moves_along(model):
    prefill = model.model.start(torch.zeros(1, 3, 32), torch.ones(1, 3))
    prefill.know(TokenCounts((3,), (0,), ((0,),), (3,)), hides=False)
    prefill.visual_index = Elsewhere(prefill.visual_index, SECOND)
    prefill.know(prefill.known.counts, hides=False)
    with devices():
        there = moved(prefill, THIRD)
    assert there.visual_index.device == THIRD
    assert there.what_is_known().counts == prefill.known.counts


def test_crops_know_how_many_tokens_they_keep():
    vision = VisionTokens(torch.randn(2, 4, 3), torch.arange(4).expand(2, -1), grid=(2, 2))
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()
    for counts in (None, [3, 1]):
        kept = vision.keep_mask(mask, counts)
        assert kept.crop_counts() == [3, 1] and kept.valid.sum(dim=1).tolist() == [3, 1]
    kept = replace(kept, valid=kept.valid & (kept.positions > 1))
    assert kept.crop_counts() == [2, 0]
    assert vision.crop_counts() == [4, 4]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nor_is_what_is_known_true_of_tensors_that_were_written_to(model, sample, mode):
    with mode():
        vision = VisionTokens(torch.randn(2, 4, 3), torch.arange(4).expand(2, -1), grid=(2, 2))
        vision = vision.keep_mask(torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool())
        for valid in (vision.valid, vision.valid.clone()):
            vision.valid = valid
            before = vision.crop_counts()[0]
            vision.valid[0, before - 1] = False
            assert vision.crop_counts()[0] == before - 1

    def written(prefill):
        prefill = prefill.keep(prefill.index > 5)
        for valid in (prefill.valid, prefill.valid.clone()):
            prefill.valid = valid
            before = prefill.counts.lengths
            prefill.valid[0, -before[0]] = False
            assert prefill.counts == counted(prefill)
            assert prefill.counts.lengths == (before[0] - 1, before[1])
        return prefill

    model.pruner = Cut(written)
    ids, mask = pad_batch([sample(4, "image", 3).ids, sample(15, "image", 2).ids])
    images = sample("image", "image").images
    with mode():
        model(ids, attention_mask=mask, images=images)


def test_a_prompt_without_images_has_counts_as_well(model, sample):
    counts = model.build_prompt(sample(7).ids).counts
    assert counts == TokenCounts((8,), (0,), ((0,),), (8,), left=False)
    model.pruner = build_pruner("none")


def test_counts_follow_the_cut_of_training(make_model, sample):
    model = make_model(tokenizer_model_max_length=20)
    prompts = [sample(4, "image", 3, seed=1), sample(25, "image", 2, seed=2)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images = torch.cat([prompt.images for prompt in prompts])
    prompt = model.build_prompt(ids, mask, labels=ids.clamp(min=0), images=images)
    assert prompt.counts == TokenCounts((5, 20), (15, 0), ((15,), (0,)), (5, 20), left=False)
    assert prompt.attention_mask.sum(dim=1).tolist() == [20, 20]
