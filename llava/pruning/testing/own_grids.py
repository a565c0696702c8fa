"""The contract of a pruning method on models whose images have grids of their own."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.inputs import Picture
from llava.model.multimodal_encoder.qwen2_5_vl_videos import Video
from llava.model.reuse import PrefixCache

from .. import METHODS, Pruner, build_pruner
from ..base import option_names
from .contract import LAYERS
from .promises import GREEDY, Promises, generate
from .tiny import (
    Sample,
    make_own_grids_model,
    make_pruner,
    pad_batch,
    picture,
    sample,
    still,
    video,
)

#: grids of the images in the tests
WIDE, TALL, SMALL = (4, 9), (7, 5), (2, 3)
QUESTION = "What is it?"


class OwnGridsContract(Promises):
    """Derive a class whose name starts with Test, and name the method; see `Promises`.

    refused: whether the method is none for such models: then it has to say so when it is assigned
    """

    refused: ClassVar[bool] = False

    def images_of(self, *prompts: Sample) -> list[Tensor]:
        count = sum(int((prompt.ids == IMAGE_TOKEN_INDEX).sum()) for prompt in prompts)
        return [picture(*grid) for grid in (WIDE, TALL, SMALL)[:count]]

    @pytest.fixture(scope="class")
    @classmethod
    def plain_model(cls):
        return make_own_grids_model()

    @pytest.fixture
    def model(self, plain_model, pruner):
        """A tiny model without pruning; the test is skipped for a method that is refused."""
        plain_model.pruner = build_pruner("none")
        try:
            plain_model.pruner = pruner
        except ValueError as error:
            pytest.skip(str(error))
        plain_model.pruner = build_pruner("none")
        return plain_model

    def is_refused(self, pruner: Pruner) -> bool:
        return self.refused

    def test_it_is_accepted_or_says_what_it_lacks(self, plain_model, pruner):
        if not self.is_refused(pruner):
            plain_model.pruner = pruner
            return
        with pytest.raises(
            ValueError, match=f"{pruner.name} needs '.*tower of .* does not provide"
        ):
            plain_model.pruner = pruner

    def test_every_image_is_pruned_to_its_budget(self, model, pruner):
        model.pruner = pruner
        prompt = sample(4, "image", 2, "image", 5)
        _, _, trace = generate(model, prompt.ids, [picture(*WIDE), picture(*TALL)])
        assert trace.grids == [WIDE, TALL] or pruner.name == "downsample"
        assert trace.unpruned_lengths == [36, 35]
        assert len(trace.visual_positions) == 2
        pairs = zip(
            *(pruner.with_budget_of(n).token_schedule(n, LAYERS) for n in (36, 35)), strict=True
        )
        seen = [int(tokens[0]) for tokens in trace.visual_tokens]
        for kept, both in zip(seen, map(sum, pairs), strict=True):
            assert kept <= both
        assert pruner.name == "none" or min(seen) < 71

    def test_kept_tokens_stay_where_they_are(self, model, pruner):
        """In the picture and in raster order, and the text behind goes on from there."""
        prompt = sample(4, "image", 5)
        _, _, dense = generate(model, prompt.ids, [picture(*WIDE)])
        model.pruner = pruner
        _, _, trace = generate(model, prompt.ids, [picture(*WIDE)])
        (_, columns), kept = trace.grids[0], trace.visual_positions[0]
        places = trace.position_ids[0, 5 : 5 + len(kept)]
        assert places.shape[1] == 3
        known = kept >= 0
        assert torch.equal(places[known, 1] - 5, kept[known] // columns)
        assert torch.equal(places[known, 2] - 5, kept[known] % columns)
        order = places[:, 1] * 1000 + places[:, 2]
        assert torch.equal(order, order.sort().values)
        if trace.grids[0] == WIDE:
            assert torch.equal(trace.position_ids[0, -5:], dense.position_ids[0, -5:])

    def test_a_video_of_one_pair_of_frames_is_an_image(self, model, pruner):
        if pruner.adaptive:
            pytest.skip("what this method keeps of videos is an option of its own")
        model.pruner = pruner
        prompt, image = sample(4, "image", 5), still(*WIDE)
        expected = generate(model, prompt.ids, [image])
        found = generate(model, prompt.ids, [Video(image[None], 1.0)])
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert torch.equal(found[2].visual_positions[0], expected[2].visual_positions[0])
        assert torch.equal(found[2].position_ids, expected[2].position_ids)

    def test_the_pairs_of_frames_of_a_video_share_its_budget(self, model, pruner):
        if pruner.adaptive:
            pytest.skip("what this method keeps of videos is an option of its own")
        model.pruner = pruner
        _, _, trace = generate(model, sample(4, "image", 5).ids, [video(3, 6, 6)])
        assert trace.unpruned_lengths == [3 * 36]
        plan = pruner.with_budget_of(3 * 36, 3).token_schedule(36, LAYERS, 3)
        seen = [int(tokens[0]) for tokens in trace.visual_tokens]
        assert all(kept <= planned for kept, planned in zip(seen, plan, strict=True))
        assert pruner.name == "none" or min(seen) < 3 * 36
        pair = trace.visual_positions[0]
        time = trace.position_ids[0, 5 : 5 + len(pair), 0] - 5
        size = trace.grids[0][0] * trace.grids[0][1]
        known = pair >= 0
        assert torch.equal(time[known], 2 * (pair[known] // size))  # two a second
        for number in range(3):  # no pair of frames is left out in front of the decoder
            assert (time == 2 * number).any()

    def test_a_share_of_a_video_is_what_is_scheduled(self, model, pruner):
        if pruner.name not in METHODS or "visual_token_ratio" not in option_names(type(pruner)):
            pytest.skip("this method takes no share")
        # of a pair 14.35, of the video 43.05 of 105 tokens
        model.pruner = pruner = make_pruner(pruner.name, **self.options, visual_token_ratio=0.41)
        _, _, trace = generate(model, sample(4, "image", 5).ids, [video(3, 7, 5)])
        plan = pruner.with_budget_of(3 * 35, 3).token_schedule(35, LAYERS, 3)
        seen = [int(tokens[0]) for tokens in trace.visual_tokens]
        assert all(kept <= planned for kept, planned in zip(seen, plan, strict=True))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_batching_changes_nothing(self, model, pruner, side):
        model.pruner = pruner
        prompts = [
            sample(3, "image", 9, seed=1),
            sample(5, seed=3),
            sample(2, "image", 1, "image", 4),
        ]
        images: list[list] = [[picture(*WIDE)], [], [video(2, *TALL), picture(*WIDE, seed=1)]]
        alone = [
            generate(model, p.ids, own or None) for p, own in zip(prompts, images, strict=True)
        ]
        ids, mask = pad_batch([p.ids for p in prompts], side)
        together = [image for own in images for image in own]
        tokens, logits, trace = generate(model, ids, together, attention_mask=mask)
        for row, (own_tokens, own_logits, own_trace) in enumerate(alone):
            assert torch.equal(tokens[row], own_tokens[0])
            torch.testing.assert_close(logits[row], own_logits[0], atol=1e-4, rtol=1e-4)
            for layer, lengths in enumerate(own_trace.kv_lengths):
                assert trace.kv_lengths[layer][row] == lengths[0]
        single = [positions for *_, own in alone for positions in own.visual_positions]
        assert all(map(torch.equal, trace.visual_positions, single))

    def test_a_share_of_an_image_depends_on_no_other_image(self, model, pruner):
        if pruner.name not in METHODS or "visual_token_ratio" not in option_names(type(pruner)):
            pytest.skip("this method takes no share")
        model.pruner = make_pruner(pruner.name, **self.options, visual_token_ratio=0.5)
        prompts = [sample(3, "image", 4, seed=1), sample(3, "image", 6, seed=2)]
        images = [picture(3, 4), picture(9, 10)]
        alone = [generate(model, p.ids, [own]) for p, own in zip(prompts, images, strict=True)]
        ids, mask = pad_batch([p.ids for p in prompts])
        _, logits, trace = generate(model, ids, images, attention_mask=mask)
        for row, (_, own_logits, own_trace) in enumerate(alone):
            torch.testing.assert_close(logits[row], own_logits[0], atol=1e-4, rtol=1e-4)
            assert torch.equal(trace.visual_positions[row], own_trace.visual_positions[0])

    def test_images_at_the_end_and_side_by_side_run(self, model, pruner):
        prompts = [sample(2, "image"), sample("image", "image", 1, seed=3)]
        images = [picture(*WIDE), picture(*SMALL), picture(*TALL)]
        for budget in (1, 7):
            model.pruner = self.make(pruner.name, budget)
            ids, mask = pad_batch([p.ids for p in prompts])
            tokens, logits, _ = generate(model, ids, images, attention_mask=mask)
            alone = generate(model, prompts[1].ids, images[1:])
            torch.testing.assert_close(logits[1], alone[1][0], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("budget", [36, 1000])
    def test_a_budget_of_all_tokens_or_more_is_the_dense_model(self, model, pruner, budget):
        if pruner.adaptive:
            pytest.skip("the budget of this method is the label of a published setting")
        prompt = sample(4, "image", 3, "image", 5)
        images = [picture(*WIDE), picture(*SMALL)]
        dense = generate(model, prompt.ids, images)
        model.pruner = self.make(pruner.name, budget)
        full = generate(model, prompt.ids, images)
        torch.testing.assert_close(full[1], dense[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(full[0], dense[0])

    def test_a_share_is_a_number_for_every_image(self, model, pruner):
        if pruner.name not in METHODS or "visual_token_ratio" not in option_names(type(pruner)):
            pytest.skip("this method takes no share")
        prompt = sample(4, "image", 5)
        for grid in (WIDE, TALL):
            number = round(0.4 * grid[0] * grid[1])
            settings = (
                make_pruner(pruner.name, number, **self.options),
                make_pruner(pruner.name, **self.options, visual_token_ratio=0.4),
            )
            found = []
            for model.pruner in settings:
                found.append(generate(model, prompt.ids, [picture(*grid)]))
            assert torch.equal(found[0][1], found[1][1])
            assert torch.equal(found[0][0], found[1][0])

    def test_questions_about_one_image_share_its_beginning(self, model, pruner):
        model.pruner = pruner
        first, second = Picture(picture(*WIDE), (9, 4)), Picture(picture(*TALL), (5, 7))
        cache = PrefixCache(model)
        for batch in ([(first, 1), (second, 2)], [(first, 3), (first, 4)], [(second, 5)]):
            prompts = [
                torch.cat([sample(3, "image").ids[0], sample(n + 2, seed=n).ids[0]])
                for _, n in batch
            ]
            own = [[image] for image, _ in batch]
            questions = [QUESTION] * len(batch)
            options = dict(GREEDY, pad_token_id=0)
            found = cache.generate(prompts, own, questions, **options)
            for row, (ids, (image, _)) in enumerate(zip(prompts, batch, strict=True)):
                alone = model.generate(
                    ids[None], images=[image.pixels], questions=[QUESTION], **options
                )
                assert torch.equal(found[row], alone[0])
