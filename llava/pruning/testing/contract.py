"""The contract of a pruning method: what it promises, whatever it keeps."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from .. import METHODS, Chain, Pruner, build_pruner, trace_pruning
from .tiny import (
    ANYRES,
    NUM_PATCHES,
    SIDE,
    TINY,
    make_model,
    make_pruner,
    pad_batch,
    sample,
    write_tower,
)

LAYERS, WIDTH = TINY["num_hidden_layers"], TINY["hidden_size"]
GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=-1)


def generate(model, ids, images, **kwargs):
    """New tokens, first logits and the trace."""
    with trace_pruning(model, embeds=True) as trace:
        out = model.generate(
            ids,
            images=images,
            questions=questions_about(images),
            output_scores=True,
            return_dict_in_generate=True,
            **{**GREEDY, **kwargs},
        )
    return out.sequences, out.scores[0], trace


def questions_about(images) -> list[str] | None:
    """One for each image, the same whenever it is the same image, for methods that read them."""
    if images is None:
        return None
    values = (getattr(image, "pixels", image) for image in images)  # videos have them inside
    return [f"Is it larger than {float(pixels.sum()):.2f}?" for pixels in values]


class MethodContract:
    """Derive a class whose name starts with Test, and name the method.

    method:       its name
    options:      options it is tested with, beside the budget
    least_budget: tokens that it cannot go below, on images of 36 patches and 6 decoder layers
    """

    method: ClassVar[str]
    options: ClassVar[dict] = {}
    least_budget: ClassVar[int] = 1

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

    @pytest.fixture
    def pruner(self):
        """The method with a budget of 10 tokens where it takes one."""
        return self.make(self.method)

    def make(self, name: str, visual_token_num: int = 10) -> Pruner:
        return make_pruner(name, visual_token_num, self.least_budget, **self.options)

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
        assert plain.tolist() == sorted(set(plain.tolist()))
        assert trace.visual_embeds[0].shape == (len(kept), WIDTH)

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

    def test_pruning_twice_gives_the_same_answer(self, model, pruner):
        model.pruner = pruner
        prompt = sample(4, "image", 5)
        first, second = (generate(model, prompt.ids, prompt.images) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])

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

    def test_text_only_prompts_are_untouched(self, model, pruner):
        prompt = sample(7)
        dense = generate(model, prompt.ids, None)
        model.pruner = pruner
        pruned = generate(model, prompt.ids, None)
        assert torch.equal(dense[0], pruned[0])
        assert torch.equal(dense[1], pruned[1])

    def test_switching_off_restores_the_model(self, model, pruner):
        prompt = sample(4, "image", 5)
        before = generate(model, prompt.ids, prompt.images)
        model.pruner = pruner
        generate(model, prompt.ids, prompt.images)
        model.pruner = build_pruner("none")
        after = generate(model, prompt.ids, prompt.images)
        assert torch.equal(before[1], after[1])
        assert torch.equal(before[0], after[0])

    def test_decoding_equals_running_the_whole_answer_again(self, model, pruner):
        model.pruner = pruner
        prompt = sample(4, "image", 5)
        cached, _, _ = generate(model, prompt.ids, prompt.images)
        slow, _, _ = generate(model, prompt.ids, prompt.images, use_cache=False)
        assert torch.equal(cached, slow) or pruner.decoder.reads_text

    def test_beam_search_and_sampling_run(self, model, pruner):
        model.pruner = pruner
        prompts = [sample(3, "image", 9, seed=1), sample(6, "image", 2, seed=2)]
        ids, mask = pad_batch([p.ids for p in prompts])
        images = torch.cat([p.images for p in prompts])
        options = dict(attention_mask=mask, max_new_tokens=5, eos_token_id=-1)
        options["questions"] = questions_about(images)
        beams = model.generate(ids, images=images, num_beams=3, do_sample=False, **options)
        torch.manual_seed(0)
        drawn = model.generate(ids, images=images, do_sample=True, top_p=0.9, **options)
        assert beams.shape == drawn.shape == (2, 5)

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

    def test_a_printed_method_builds_itself_again(self, pruner):
        classes = (Chain, *(METHODS[part] for part in pruner.name.split("+")))
        namespace = {cls.__name__: cls for cls in classes}
        assert repr(eval(repr(pruner), namespace)) == repr(pruner)
