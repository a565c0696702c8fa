"""The contract of a pruning method: what it promises, whatever it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .. import METHODS, build_pruner
from ..tokens import KEY_BIAS
from .promises import Promises, generate, questions_about
from .tiny import (
    ANYRES,
    NUM_PATCHES,
    SIDE,
    TINY,
    Sample,
    make_model,
    pad_batch,
    sample,
    write_tower,
)

LAYERS, WIDTH = TINY["num_hidden_layers"], TINY["hidden_size"]


class MethodContract(Promises):
    """Derive a class whose name starts with Test, and name the method; see `Promises`."""

    def images_of(self, *prompts: Sample) -> Tensor:
        return torch.cat([prompt.images for prompt in prompts if prompt.images is not None])

    @pytest.fixture(scope="class")
    @classmethod
    def tower(cls, tmp_path_factory):
        return write_tower(tmp_path_factory.mktemp("tower"))

    @pytest.fixture(scope="class")
    @classmethod
    def plain_model(cls, tower):
        return make_model(tower)

    @pytest.fixture(scope="class")
    @classmethod
    def plain_anyres_model(cls, tower):
        return make_model(tower, **ANYRES)

    @pytest.fixture
    def model(self, plain_model):
        """A tiny LLaVA-1.5 without pruning."""
        plain_model.pruner = build_pruner("none")
        return plain_model

    @pytest.fixture
    def anyres_model(self, plain_anyres_model):
        """A tiny LLaVA-NeXT without pruning."""
        plain_anyres_model.pruner = build_pruner("none")
        return plain_anyres_model

    def test_it_is_in_the_table_under_its_name(self, pruner):
        for part in pruner.name.split("+"):
            assert METHODS.usable(part).name == part

    def test_schedule_is_what_happens(self, model, pruner):
        model.pruner = pruner
        prompt = sample(4, "image", 5)
        _, _, trace = generate(model, prompt.ids, prompt.images)
        seen = [int(tokens[0]) for tokens in trace.visual_tokens]
        promised = pruner.token_schedule(NUM_PATCHES, LAYERS)
        if pruner.adaptive:
            assert all(n <= most for n, most in zip(seen, promised, strict=True))
        else:
            assert seen == promised
        for layer in range(LAYERS):
            for earlier in pruner.decoder.pruned_caches(layer, LAYERS):
                seen[earlier] = seen[layer]
        assert [int(n[0]) for n in trace.kv_lengths] == [n + 10 for n in seen]

    def test_cache_bytes_are_those_of_the_kept_tokens(self, model, pruner):
        model.pruner = pruner
        prompt = sample(4, "image", 5)
        _, _, trace = generate(model, prompt.ids, prompt.images)
        entries = sum(int(n[0]) for n in trace.kv_lengths)
        assert trace.kv_bytes == entries * 2 * WIDTH * 4  # key and value, fp32

    def test_kept_patches_are_unique_and_in_raster_order(self, model, pruner):
        model.pruner = pruner
        prompt = sample(4, "image", 5)
        _, _, trace = generate(model, prompt.ids, prompt.images)
        kept = trace.visual_positions[0]
        plain = kept[kept >= 0]
        assert len(set(plain.tolist())) == len(plain)
        if pruner.vision.in_raster_order:
            assert plain.tolist() == sorted(plain.tolist())
        assert trace.visual_embeds[0].shape == (len(kept), WIDTH)

    def test_attention_has_a_bias_where_the_class_says_so(self, model, pruner):
        model.pruner = pruner
        prompt = sample(4, "image", 5)
        questions = questions_about(prompt.images)
        extras = model.build_prompt(prompt.ids, images=prompt.images, questions=questions).extras
        assert (KEY_BIAS in extras) == pruner.vision.biases_attention

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_batching_changes_nothing(self, model, pruner, side):
        model.pruner = pruner
        prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2), sample(5, seed=3)]
        alone = [generate(model, p.ids, p.images) for p in prompts]
        ids, mask = pad_batch([p.ids for p in prompts], side)
        images = torch.cat([p.images for p in prompts if p.images is not None])
        tokens, logits, trace = generate(model, ids, images, attention_mask=mask)
        for row, (own_tokens, own_logits, own_trace) in enumerate(alone):
            assert torch.equal(tokens[row], own_tokens[0])
            torch.testing.assert_close(logits[row], own_logits[0], atol=1e-4, rtol=1e-4)
            for layer, lengths in enumerate(own_trace.kv_lengths):
                assert trace.kv_lengths[layer][row] == lengths[0]
        for row in range(2):
            assert torch.equal(trace.visual_positions[row], alone[row][2].visual_positions[0])

    @pytest.mark.parametrize("budget", [1, 7])
    def test_images_at_the_end_and_side_by_side_run_in_any_batch(self, model, pruner, budget):
        model.pruner = self.make(pruner.name, budget)
        prompts = [
            sample(2, "image", seed=2),
            sample("image", "image", 1, seed=3),
            sample(3, seed=5),
        ]
        alone = [generate(model, p.ids, p.images, max_new_tokens=2) for p in prompts]
        ids, mask = pad_batch([p.ids for p in prompts])
        images = torch.cat([p.images for p in prompts if p.images is not None])
        _, logits, _ = generate(model, ids, images, attention_mask=mask, max_new_tokens=2)
        for row, (_, own_logits, _) in enumerate(alone):
            torch.testing.assert_close(logits[row], own_logits[0], atol=1e-4, rtol=1e-4)

    def test_several_images_in_one_prompt_are_pruned_one_by_one(self, model, pruner):
        model.pruner = pruner
        both = sample(3, "image", 4, "image", 5)
        _, _, trace = generate(model, both.ids, both.images)
        schedule = pruner.token_schedule(NUM_PATCHES, LAYERS)
        seen = [int(n[0]) for n in trace.visual_tokens]
        if pruner.adaptive:
            assert all(n <= 2 * most for n, most in zip(seen, schedule, strict=True))
        else:
            assert seen == [2 * n for n in schedule]
        assert len(trace.visual_positions) == 2

    def test_a_budget_of_all_patches_is_the_dense_model(self, model, pruner):
        if pruner.adaptive:
            pytest.skip("the budget of this method is the label of a published setting")
        prompt = sample(4, "image", 5)
        dense = generate(model, prompt.ids, prompt.images)
        model.pruner = self.make(pruner.name, NUM_PATCHES)
        full = generate(model, prompt.ids, prompt.images)
        torch.testing.assert_close(full[1], dense[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(full[0], dense[0])

    def test_a_budget_above_the_patch_count_is_an_error(self, model, pruner):
        if not hasattr(pruner, "visual_token_num") or pruner.adaptive:
            pytest.skip("this method takes no budget")
        with pytest.raises(ValueError, match=f"exceeds the {NUM_PATCHES} patches"):
            model.pruner = self.make(pruner.name, NUM_PATCHES + 1)
        with pytest.raises(ValueError, match="at least 1"):
            self.make(pruner.name, 0)

    def test_anyres_images_follow_the_schedule(self, anyres_model, pruner):
        model = anyres_model
        name = pruner.name
        if not pruner.vision.anyres:
            with pytest.raises(ValueError, match="one crop per image"):
                model.pruner = pruner
            return
        model.pruner = pruner = self.make(name, 50)
        prompt = sample(4, "image", 5)
        tiles = model.image_settings.image_grid_pinpoints
        size = (42, 84) if pruner.vision.anyres_tiles is None else (2 * SIDE, 2 * SIDE)
        count = 5 if len(tiles) == 1 else 3  # 84 x 168 for the portrait image
        images = [torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))]
        _, _, trace = generate(model, prompt.ids, images, image_sizes=[size])
        if pruner.vision.anyres_tiles is not None:  # then there are no newlines to count
            schedule = pruner.token_schedule(NUM_PATCHES, LAYERS, crops=5)
            assert len(trace.visual_positions[0]) == schedule[0]
        assert int(trace.visual_tokens[0][0]) == len(trace.visual_positions[0])

    def test_an_image_so_thin_that_its_tiles_are_padding_runs(self, anyres_model, pruner):
        if not pruner.vision.anyres or pruner.vision.anyres_tiles is not None:
            pytest.skip("there are no such images for it")
        anyres_model.pruner = self.make(pruner.name, 50)
        prompt, image = sample(4, "image", 5), torch.randn(3, 3, SIDE, SIDE)
        for size in ((300, 7), (7, 300)):
            _, scores, _ = generate(anyres_model, prompt.ids, [image], image_sizes=[size])
            assert scores.isfinite().all()
