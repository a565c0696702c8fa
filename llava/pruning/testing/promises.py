"""What a pruning method promises on every kind of model."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import pytest
import torch

from .. import METHODS, Chain, Pruner, build_pruner, trace_pruning
from .tiny import Sample, make_pruner, pad_batch, sample

GREEDY: dict[str, Any] = dict(do_sample=False, max_new_tokens=6, eos_token_id=-1)


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


class Promises:
    """The base of the contracts, which bring a fixture `model`, without pruning, and its images.

    method:       its name
    options:      options it is tested with, beside the budget
    least_budget: tokens that it cannot go below, on images of 36 patches and 6 decoder layers
    """

    method: ClassVar[str]
    options: ClassVar[dict] = {}
    least_budget: ClassVar[int] = 1

    def images_of(self, *prompts: Sample):
        """The images of prompts as `model.generate` takes them."""
        raise NotImplementedError

    @pytest.fixture
    def pruner(self):
        """The method with a budget of 10 tokens where it takes one."""
        return self.make(self.method)

    def make(self, name: str, visual_token_num: int = 10) -> Pruner:
        return make_pruner(name, visual_token_num, self.least_budget, **self.options)

    def test_pruning_twice_gives_the_same_answer(self, model, pruner):
        model.pruner = pruner
        prompt = sample(4, "image", 5)
        first, second = (generate(model, prompt.ids, self.images_of(prompt)) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])

    def test_a_layer_works_on_no_more_tokens_than_are_counted(self, model, pruner):
        """On a CPU, where nothing is saved by carrying tokens along that were dropped."""
        model.pruner = pruner
        sizes: dict[int, int] = {}

        def note(layer, given) -> None:
            sizes.setdefault(layer.self_attn.layer_idx, given[0].shape[1])

        prompt = sample(4, "image", 5)
        hooks = [layer.register_forward_pre_hook(note) for layer in model.model.layers]
        try:
            _, _, trace = generate(model, prompt.ids, self.images_of(prompt))
        finally:
            for hook in hooks:
                hook.remove()
        counted = {n: int(tokens[0]) for n, tokens in enumerate(trace.prompt_tokens)}
        assert sizes == counted

    def test_watching_layers_changes_nothing(self, model, pruner):
        """What is watched runs as a whole; else tokens that a `blind_cuts` drops do not finish."""
        model.pruner = pruner
        prompt = sample(4, "image", 5)
        _, logits, trace = generate(model, prompt.ids, self.images_of(prompt))
        hooks = [layer.register_forward_hook(lambda *_: None) for layer in model.model.layers]
        try:
            _, whole, seen = generate(model, prompt.ids, self.images_of(prompt))
        finally:
            for hook in hooks:
                hook.remove()
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
        kept, others = (
            {layer: rows[0].tolist() for layer, rows in own.decoder_keep.items()}
            for own in (trace, seen)
        )
        assert kept == others

    def test_blind_cuts_do_not_look_at_states(self, model, pruner, monkeypatch):
        """The same tokens stay where the states behind attention in the layer before are NaN."""
        model.pruner = pruner
        prompt, layers = sample(4, "image", 5), model.model.layers
        _, _, trace = generate(model, prompt.ids, self.images_of(prompt))
        for cut in pruner.decoder.blind_cuts(len(layers)):
            if cut not in trace.decoder_keep:
                continue
            layer = layers[cut - 1]
            attend = layer.attend

            def spoilt(*given, attend=attend):
                x, rows = attend(*given)
                return x * torch.nan, rows

            with monkeypatch.context() as patch:
                patch.setattr(layer, "attend", spoilt)
                _, _, blind = generate(model, prompt.ids, self.images_of(prompt), max_new_tokens=1)
            for own, other in zip(trace.decoder_keep[cut], blind.decoder_keep[cut], strict=True):
                assert own.tolist() == other.tolist()

    def test_text_only_prompts_are_untouched(self, model, pruner):
        prompt = sample(7)
        dense = generate(model, prompt.ids, None)
        model.pruner = pruner
        pruned = generate(model, prompt.ids, None)
        assert torch.equal(dense[0], pruned[0])
        assert torch.equal(dense[1], pruned[1])

    def test_switching_off_restores_the_model(self, model, pruner):
        prompt = sample(4, "image", 5)
        images = self.images_of(prompt)
        before = generate(model, prompt.ids, images)
        model.pruner = pruner
        generate(model, prompt.ids, images)
        model.pruner = build_pruner("none")
        after = generate(model, prompt.ids, images)
        assert torch.equal(before[1], after[1])
        assert torch.equal(before[0], after[0])

    def test_decoding_equals_running_the_whole_answer_again(self, model, pruner):
        model.pruner = pruner
        prompt = sample(4, "image", 5)
        cached, _, _ = generate(model, prompt.ids, self.images_of(prompt))
        slow, _, _ = generate(model, prompt.ids, self.images_of(prompt), use_cache=False)
        assert torch.equal(cached, slow) or pruner.decoder.reads_text

    def test_beam_search_sampling_and_streaming_run(self, model, pruner):
        model.pruner = pruner
        prompts = [sample(3, "image", 9, seed=1), sample(6, "image", 2, seed=2)]
        ids, mask = pad_batch([p.ids for p in prompts])
        images = self.images_of(*prompts)
        options = dict(attention_mask=mask, max_new_tokens=5, eos_token_id=-1)
        options["questions"] = questions_about(images)
        beams = model.generate(ids, images=images, num_beams=3, do_sample=False, **options)
        torch.manual_seed(0)
        drawn = model.generate(ids, images=images, do_sample=True, top_p=0.9, **options)
        assert beams.shape == drawn.shape == (2, 5)
        streamer, one = Words(), self.images_of(prompts[0])
        questions = questions_about(one)
        answer = model.generate(
            prompts[0].ids, images=one, questions=questions, streamer=streamer, **GREEDY
        )
        assert streamer.tokens[-GREEDY["max_new_tokens"] :] == answer[0].tolist()

    def test_it_runs_where_products_are_cast(self, model, pruner):
        """As training does with `--bf16 True`, with weights in fp32."""
        model.pruner = pruner
        prompt = sample(4, "image", 5)
        with torch.autocast("cpu", torch.bfloat16):
            _, scores, _ = generate(model, prompt.ids, self.images_of(prompt))
        assert scores.isfinite().all()

    def test_a_printed_method_builds_itself_again(self, pruner):
        classes: list[type[Pruner]] = [Chain, *(METHODS[n] for n in pruner.name.split("+"))]
        namespace = {cls.__name__: cls for cls in classes}
        text = repr(pruner)
        assert repr(eval(text, namespace)) == text
        parts = [part for part in pruner.named.values() if is_dataclass(part)]
        given = {key for part in parts for key, value in printed(part).items() if value is not None}
        left_out = [key for key in sorted(given) if f"{key}=" not in text]
        assert not left_out, f"{text} does not say {', '.join(left_out)}"


def printed(pruner: Any) -> dict:
    """Option -> value of all that a method prints."""
    return {option.name: getattr(pruner, option.name) for option in fields(pruner) if option.repr}


class Words:
    """Takes the tokens that an answer is streamed as."""

    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass
