"""What a method is given of images with grids of their own, and what becomes of it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from llava.blocks import rope_of, rotate
from llava.model.multimodal_encoder import qwen2_5_vl_encoder
from llava.model.multimodal_encoder.qwen2_5_vl_encoder import (
    patch_angles,
)
from llava.model.multimodal_encoder.qwen2_5_vl_images import blocks_of_pixels, pixels_of_blocks
from llava.pruning import (
    METHODS,
    DecoderStage,
    Pruner,
    SelectPruner,
    VisionStage,
    VisionTokens,
    build_pruner,
    trace_pruning,
)
from llava.pruning.testing.tiny import make_own_grids_model, picture, sample
from tests.conftest import SIDE, make_pruner, pad_batch
from tests.pruning.test_contract_own_grids import REFUSED
from tests.second_device import SECOND, Elsewhere, devices, place

GRIDS = [(4, 9), (7, 5), (4, 9)]
CUES = frozenset({"salience", "keys"})


@pytest.fixture
def model(own_grids_model):
    return own_grids_model


def slow_cues(tower, image: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(attention received (n,), keys (n, C)) of the blocks, from a whole map of a full layer."""
    h, w = image.shape[:2]
    inputs = []
    hook = tower.blocks[layer].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    tower.features([image])
    hook.remove()
    plan = qwen2_5_vl_encoder.plan_images([(h, w)], tower.config, "cpu")
    block = tower.blocks[layer]
    x = torch.empty_like(inputs[0]).unflatten(0, (-1, 4))
    x[plan.blocks] = inputs[0].unflatten(0, (-1, 4))
    qkv = block.attn.qkv(block.norm1(x.flatten(0, 1))).unflatten(
        -1, (3, tower.config.num_heads, -1)
    )
    angles = patch_angles(h, w, tower.config).flatten(0, 1)[:, None]
    q, k = (rotate(qkv[:, n], rope_of(angles, angles.dtype)).transpose(0, 1) for n in (0, 1))
    rows = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    received = rows.mean(dim=(0, 1)).unflatten(0, (h * w, 4)).mean(dim=1)
    return received, k.transpose(0, 1).flatten(1).unflatten(0, (h * w, 4)).mean(dim=1)


@pytest.mark.parametrize("entries", [2**24, 100])
@torch.no_grad()
def test_cues_are_those_of_a_whole_map_of_attention(model, entries, monkeypatch):
    monkeypatch.setattr(qwen2_5_vl_encoder, "MAP_ENTRIES_ON_CPU", entries)
    images = [picture(h, w, seed) for seed, (h, w) in enumerate(GRIDS)]
    for group in model.visual.features(images, {3: CUES, 1: CUES}):
        for place_, number in enumerate(group.images):
            for layer in (1, 3):
                received, keys = slow_cues(model.visual, images[number], layer)
                cues = group.cues[layer]
                torch.testing.assert_close(cues["salience"][place_], received, atol=1e-6, rtol=1e-4)
                torch.testing.assert_close(cues["keys"][place_], keys, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_layer_that_sees_windows_stands_for_the_next_that_sees_the_image(model):
    images = [picture(4, 9)]
    (group,) = model.visual.features(images, {0: CUES, 1: CUES, 2: CUES})
    assert torch.equal(group.cues[0]["salience"], group.cues[1]["salience"])
    assert not torch.equal(group.cues[2]["salience"], group.cues[1]["salience"])


@torch.no_grad()
def test_what_layers_give_is_read_as_the_features_are(model):
    """And its mean over layers, whether they see windows or whole images."""
    images = [picture(h, w, seed) for seed, (h, w) in enumerate(GRIDS)]
    both = frozenset({"output", "output_mean"})
    wanted = {0: both, 2: both, 3: frozenset({"output"})}
    for group in model.visual.features(images, wanted):
        first, third, last = (group.cues[layer]["output"] for layer in (0, 2, 3))
        torch.testing.assert_close(last.unflatten(2, (4, -1)), group.features)
        assert not torch.equal(first, third)
        mean = group.cues[2]["output_mean"]
        torch.testing.assert_close(mean, (first + third) / 2)
        assert mean.dtype == torch.float32 and "output_mean" not in group.cues[0]


class Looking(VisionStage, Pruner):
    """Keeps what it is given."""

    name = "looking"

    def after_encoder(self, vision):
        self.seen = vision
        return vision


@torch.no_grad()
def test_a_method_is_told_how_many_heads_the_tower_has(model):
    model.pruner = looking = Looking()
    model.image_tokens([picture(4, 9)])
    assert looking.seen.num_heads == model.visual.config.num_heads > 1


class Projecting(VisionStage, Pruner):
    """Projects the features once more."""

    name = "projecting"

    def after_encoder(self, vision):
        self.features = vision.features
        return vision

    def after_projector(self, vision):
        self.pair = vision.project(self.features), vision.features
        return vision


@torch.no_grad()
def test_a_method_may_project_features_of_its_own(model, make_model):
    clip, images = make_model(), torch.randn(2, 3, SIDE, SIDE)
    for own, encode in ((model, [picture(4, 9)]), (clip, images)):
        own.pruner = method = Projecting()
        own.image_tokens(encode)
        assert torch.equal(*method.pair)


class Spy(VisionStage, Pruner):
    """Writes down what its hooks are given."""

    name = "spy"
    needs = frozenset({"salience", "keys", "fingerprint"})
    reads_question = True

    def __init__(self):
        self.seen = []

    def after_encoder(self, vision):
        self.seen.append(vision)
        return vision

    def after_projector(self, vision):
        self.seen.append(vision)
        return vision

    def after_layout(self, image):
        self.seen.append(image)
        return image


@torch.no_grad()
def test_hooks_run_once_for_each_grid_and_nothing_is_padded(model):
    model.pruner = spy = Spy()
    images = [picture(h, w, seed) for seed, (h, w) in enumerate(GRIDS)]
    model.image_tokens(images, questions=["a", "b", "c"])
    wide, tall, merged, *layouts, _, _ = spy.seen
    assert (wide.grid, tall.grid) == ((4, 9), (7, 5))
    assert wide.features.shape == (2, 36, 4 * 16) and merged.features.shape == (2, 36, 32)
    assert wide.salience.shape == (2, 36) and wide.keys.shape == (2, 36, 16)
    assert wide.questions == ["a", "c"] and tall.questions == ["b"]
    assert wide.image_index.tolist() == [0, 1] and wide.block == 4 and wide.valid is None
    assert len(set(wide.fingerprint.tolist() + tall.fingerprint.tolist())) == 3
    assert [image.grid for image in layouts] == [(4, 9), (4, 9)]


def test_the_merger_is_called_once_whatever_grids_there_are(model):
    calls, merger = [], model.visual.merger
    handle = merger.register_forward_hook(lambda *_: calls.append(1))
    images = [picture(h, w, seed) for seed, (h, w) in enumerate(GRIDS)]
    together = [image.embeds for image in model.image_tokens(images)]
    assert len(calls) == 1  # processes that share its weights would wait for one another
    handle.remove()
    for image, embeds in zip(images, together, strict=True):
        alone = model.image_tokens([image])[0].embeds
        torch.testing.assert_close(embeds, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pruning_before_the_merger_changes_nothing_else(model):
    images = [picture(h, w, seed) for seed, (h, w) in enumerate(GRIDS)]
    dense = model.image_tokens(images)
    model.pruner = build_pruner("random", visual_token_num=9)
    for whole, kept in zip(dense, model.image_tokens(images), strict=True):
        assert len(kept.patches) == 9 and kept.extent == whole.extent
        torch.testing.assert_close(kept.embeds, whole.embeds[kept.patches], atol=1e-6, rtol=1e-5)
        assert torch.equal(kept.positions, whole.positions[kept.patches])


def test_a_smaller_image_is_one_with_a_smaller_grid(model):
    blocks = picture(4, 9)
    blocks = blocks.unflatten(3, (3, 2, 2, 2))[:, :, :, :, :1].expand(-1, -1, -1, -1, 2, -1, -1)
    blocks = blocks.reshape(4, 9, 4, -1)
    pixels = pixels_of_blocks(blocks, 2, 2)
    assert pixels.shape == (1, 3, 16, 36)
    assert torch.equal(blocks_of_pixels(pixels, 2, 2), blocks)
    model.pruner = build_pruner("downsample", visual_token_num=12)
    prompt = sample(4, "image", 5)
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=[blocks], max_new_tokens=1)
    assert trace.grids == [(2, 5)] and trace.unpruned_lengths == [36]
    assert trace.visual_positions[0].tolist() == list(range(10))
    assert trace.position_ids[0, -5:, 0].tolist() == [10, 11, 12, 13, 14]


def test_methods_in_the_decoder_know_the_grid_of_every_image(model):
    class Looks(DecoderStage, Pruner):
        name = "looks"
        seen = []

        def before_layer(self, index, prefill):
            self.seen.append(prefill.grids)
            return prefill

    model.pruner = Looks()
    prompts = [sample(4, "image", 5, "image", 2), sample(9, seed=1), sample(2, "image", 3, seed=2)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images = [picture(*grid) for grid in GRIDS]
    model.generate(ids, images=images, attention_mask=mask, max_new_tokens=1, num_beams=2)
    rows = [[(4, 9), (7, 5)], [(0, 0), (0, 0)], [(4, 9), (0, 0)]]
    assert Looks.seen[0] == [row for row in rows for _ in range(2)]


@pytest.mark.parametrize("policy", ["sequence", "grid"])
def test_places_in_the_picture_stay_whatever_a_method_does_with_positions(model, policy):
    """Both of positions counted anew in front of the decoder and of those counted anew inside."""

    class Renumbers(VisionStage, DecoderStage, Pruner):
        name = "renumbers"
        position_policy = policy

        def after_encoder(self, vision):
            return vision.keep(torch.tensor([[3, 20, 35]]))

        def before_layer(self, index, prefill):
            if index != 2:
                self.seen = prefill
                return prefill
            return prefill.keep(~prefill.is_visual | (prefill.patch_index == 20), renumber=True)

    model.pruner = own = Renumbers()
    with torch.no_grad():
        cache = model(sample(4, "image", 5).ids, images=[picture(4, 9)]).past_key_values
    # Patch 20 stands in row 2, column 2, behind five tokens of text; 9 columns move the text on.
    assert own.seen.position_ids[0, 5].tolist() == [5, 7, 7]
    assert own.seen.position_ids[0, 6:, 0].tolist() == [14, 15, 16, 17, 18]
    assert [int(row.next_position) for row in cache.rows] == [19] * 6


def test_a_budget_that_does_not_fit_an_image_names_it(model):
    class Two(SelectPruner):
        name = "two"

        def check(self, num_patches, num_layers, crops=1):
            if num_patches < 30:
                raise ValueError("too small")

        def select(self, vision):
            return torch.zeros(len(vision.features), 1, dtype=torch.long)

    model.pruner = Two(visual_token_num=1)
    with pytest.raises(ValueError, match="image 1, of 2 x 3 tokens: too small"):
        model.image_tokens([picture(4, 9), picture(2, 3)])


@pytest.mark.parametrize("name", ["vispruner", "divprune", "fastv", "sparsevlm", "pyramiddrop"])
def test_number_and_share_exclude_each_other(name):
    with pytest.raises(
        ValueError, match=r"visual_token_num \(5\) and visual_token_ratio \(0.5\) both"
    ):
        build_pruner(name, visual_token_num=5, visual_token_ratio=0.5)
    for share in (0, 1.5, True):
        with pytest.raises(ValueError, match="visual_token_ratio .* above 0 and up to 1"):
            build_pruner(name, visual_token_ratio=share)


def test_layers_that_are_not_there_are_refused_when_assigned(model):
    with pytest.raises(ValueError, match="at least 1 and below the 6 decoder layers"):
        model.pruner = build_pruner("fastv", layer=6)


WORKS = sorted(set(METHODS) - REFUSED)


@pytest.mark.parametrize("name", [*WORKS, "vispruner+fastv", "pool+pyramiddrop"])
def test_a_prompt_waits_for_the_device_no_more_than_it_has_to(name):
    model = make_own_grids_model()
    model.pruner = make_pruner(name)
    place(model, SECOND)
    ids = sample(4, "image", 5).ids
    mask, ids = (Elsewhere(x, SECOND) for x in (torch.ones_like(ids), ids))
    images = [Elsewhere(picture(4, 9), SECOND)]
    with torch.no_grad(), devices() as log:
        model.generate(
            ids,
            attention_mask=mask,
            images=images,
            questions=["What is it?"],
            do_sample=False,
            max_new_tokens=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    assert 0 < len(log.waits) <= (2 if name == "none" else 4), "\n".join(log.waits)


# Methods that are a little different where tokens are blocks of patches.


def blocks(grid: tuple[int, int], **values) -> VisionTokens:
    """Tokens behind the merger, on which a tower without a class token says `values`."""
    count = grid[0] * grid[1]
    return VisionTokens(
        features=torch.eye(count)[None],
        positions=torch.arange(count)[None],
        grid=grid,
        block=4,
        **values,
    )


def test_half_of_the_tokens_of_vscan_come_from_windows_with_a_share_each():
    local = torch.zeros(1, 4 * 9)
    local[0, [0, 1, 2, 3]] = torch.tensor([0.9, 0.8, 0.7, 0.6])  # all in the first window
    local[0, [8, 35]] = torch.tensor([0.5, 0.4])  # the last column joins the second window
    salience = torch.zeros(1, 36)
    salience[0, [0, 2, 20]] = torch.tensor([0.9, 0.8, 0.7])
    tokens = blocks((4, 9), salience=salience, layers={1: {"salience": local}})
    pruner = build_pruner("vscan")
    assert pruner.block_picks(tokens, 8)[0].nonzero()[:, 0].tolist() == [0, 1, 8, 35]
    # of the others the best, then the lowest places
    assert pruner.select(tokens, 8)[0].tolist() == [0, 1, 2, 3, 4, 8, 20, 35]


def test_visionzip_without_a_class_token_merges_into_tokens_that_stay_in_place():
    salience = torch.arange(40.0, 0.0, -1.0)[None]  # the first ones are dominant
    keys = torch.zeros(1, 40, 2)
    keys[0, :, 0], keys[0, 20:, 1] = 1.0, 9.0  # the second half looks another way
    tokens = blocks((5, 8), salience=salience, keys=keys)
    pruner = build_pruner("visionzip", visual_token_num=10)
    assert pruner.after_encoder(tokens) is tokens
    kept = pruner.after_projector(tokens)
    # 2 of 10 are a twentieth of 40; the targets are every 16th of the 32 that are left
    assert kept.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 24]
    assert kept.extras["merged"][0].tolist() == [False] * 8 + [True] * 2
    first, second = kept.features[0, 8:]
    assert first.nonzero()[:, 0].tolist() == list(range(8, 20))
    assert second.nonzero()[:, 0].tolist() == list(range(20, 40))
    torch.testing.assert_close(first[8:20], torch.tensor([1.0] + [1 / 11] * 11))


@pytest.mark.parametrize("kind", ["PIL", "numpy"])
def test_images_that_nobody_prepared_are_refused(model, kind):
    image = Image.new("RGB", (56, 56)) if kind == "PIL" else picture(2, 3).numpy()
    with pytest.raises(ValueError, match="what the image processor of the model makes of them"):
        model.generate(sample(4, "image", 5).ids, images=[image], max_new_tokens=1)
