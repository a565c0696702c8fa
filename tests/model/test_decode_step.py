"""Steps that look at buckets of the cache give what exact ones do: as they are, and compiled."""

import gc
import weakref

import pytest
import torch

from llava.model import kv_cache
from llava.model.language_model import compiled_step, compiling, decode_step
from llava.model.language_model.compiled_step import CompiledStep
from llava.model.language_model.cuda_graphs import GraphStep
from llava.model.language_model.decode_step import DecodeStep
from llava.model.reuse import Picture, PrefixCache
from llava.pruning import METHODS, build_pruner, trace_pruning
from tests.conftest import SIDE, make_pruner, pad_batch
from tests.model.test_key_bias import METHODS as WEIGHING
from tests.model.test_position_bias import METHODS as PLACED
from tests.pruning.test_twigvlm import grown

GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0)
CHAINS = ["vispruner+fastv", "pool+pyramiddrop"]
SPECULATE = dict(generation_strategy="self_speculative", return_dict_in_generate=True)


@pytest.fixture(autouse=True, params=["as it is", pytest.param("compiled", marks=pytest.mark.slow)])
def small_buckets(request, monkeypatch):
    """Answers of a few tokens that go from bucket to bucket, by steps compiled or not."""
    monkeypatch.setattr(kv_cache, "BUCKET", 8)
    if request.param == "as it is":
        monkeypatch.setattr(compiled_step, "compiled", lambda function: function)
        return
    try:
        compiling.check_compiler(torch.device("cpu"))
    except RuntimeError as error:
        pytest.skip(str(error))


def steps(model, *kinds):
    """Puts every kind of step into the model in turn."""
    decoder = model.model
    before = decoder.step
    try:
        for kind in kinds:
            decoder.step = kind(decoder.rotary, decoder.config._attn_implementation)
            yield decoder.step
    finally:
        decoder.step = before


def both(model, call):
    """What `call()` gives with exact steps and with steps on buckets."""
    return [call() for _ in steps(model, DecodeStep, CompiledStep)]


def batch(sample):
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2), sample(5, seed=3)]
    ids, mask = pad_batch([p.ids for p in prompts])
    images = torch.cat([p.images for p in prompts if p.images is not None])
    return dict(inputs=ids, attention_mask=mask, images=images)


def generate(model, inputs, **options):
    options = {**GREEDY, **options}
    options |= dict(output_scores=True, return_dict_in_generate=True)
    return model.generate(**inputs, **options)


def assert_same(one, other):
    assert torch.equal(one.sequences, other.sequences)
    for own, wanted in zip(one.scores, other.scores, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [*sorted(METHODS), *CHAINS])
def test_answers_of_a_padded_batch_are_the_same_with_every_method(model, sample, method):
    model.pruner = make_pruner(method)
    assert_same(*both(model, lambda: generate(model, batch(sample))))


@pytest.mark.parametrize("method", [*WEIGHING, *PLACED], ids=lambda method: method.name)
@pytest.mark.parametrize("beams", [1, 3])
def test_biases_of_attention_are_kept(model, sample, method, beams):
    model.pruner = method
    assert_same(*both(model, lambda: generate(model, batch(sample), num_beams=beams)))


@pytest.mark.parametrize(
    "options", [dict(mistral=True), dict(attn_implementation="eager")], ids=str
)
def test_grouped_queries_and_written_out_attention_are_served(make_model, sample, options):
    model = make_model(mistral=options.get("mistral", False))
    if "attn_implementation" in options:
        for layer in model.model.layers:
            layer.self_attn.backend = "eager"
    model.pruner = make_pruner("pyramiddrop")
    assert_same(*both(model, lambda: generate(model, batch(sample))))
    one = sample(4, "image", 5)
    inputs = dict(inputs=one.ids, images=one.images)
    assert_same(*both(model, lambda: generate(model, inputs)))


@pytest.mark.parametrize("method", ["none", "fastv", "vispruner+pyramiddrop", "restore+vispruner"])
def test_positions_on_three_axes_go_on_alike(own_grids_model, method):
    from llava.pruning.testing.tiny import picture, sample

    model = own_grids_model
    model.pruner = make_pruner(method)
    ids, mask = pad_batch([sample(3, "image", 4).ids, sample(7, "image", 2, seed=1).ids])
    inputs = dict(inputs=ids, attention_mask=mask, images=[picture(3, 4), picture(2, 3, 1)])
    assert_same(*both(model, lambda: generate(model, inputs)))


SEARCHES = {
    "beams": dict(num_beams=3, num_return_sequences=2),
    "groups of beams": dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    "samples": dict(do_sample=True, num_return_sequences=2, top_p=0.9),
    "rules": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("method", ["none", "pyramiddrop"])
def test_every_search_finds_the_same(model, sample, search, method):
    model.pruner = make_pruner(method)

    def answers():
        torch.manual_seed(0)
        return model.generate(**batch(sample), **{**GREEDY, **SEARCHES[search]})

    assert torch.equal(*both(model, answers))


@pytest.mark.parametrize("share", [True, False])
def test_what_prompts_share_is_looked_at_once(model, sample, share):
    first = sample(4, "image", seed=1).ids[0]
    prompts = [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in (9, 5, 7)]
    pixels = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    model.pruner = make_pruner("none" if share else "fastv")

    def answers():
        known, picture = PrefixCache(model), Picture(pixels, (SIDE, SIDE))
        ask = [[prompts, [[picture]] * 3, ["a"] * 3]] * 2
        return torch.cat([known.generate(*words, **GREEDY) for words in ask])

    assert torch.equal(*both(model, answers))


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("pruning", [True, False])
def test_guesses_and_their_verification_run_through_the_same_step(
    make_model, sample, shared, pruning
):
    model, prompt = make_model(), sample(4, "image", 5)
    model.lm_head.weight.data *= 8
    grown(model, shared, 2, visual_token_num=30, enable_pruning=pruning, draft_stop_prob=0.0)

    def answer():
        return model.generate(prompt.ids, images=prompt.images, **GREEDY, **SPECULATE)

    one, other = both(model, answer)
    assert torch.equal(one.sequences, other.sequences)
    assert one.logs[0].accepted == other.logs[0].accepted and sum(one.logs[0].accepted) > 0
    plain = both(model, lambda: model.generate(prompt.ids, images=prompt.images, **GREEDY))
    assert torch.equal(plain[1], other.sequences)


@pytest.mark.parametrize("together", [0, 12])
def test_a_guess_is_one_step_of_the_shared_layers_and_the_drafters(
    make_model, sample, monkeypatch, together
):
    monkeypatch.setattr(compiled_step, "FEW_LAYERS", together)
    model, prompt, taken = make_model(), sample(4, "image", 5), []
    model.lm_head.weight.data *= 8
    grown(model, 2, 2, visual_token_num=30, draft_stop_prob=0.0)
    run = CompiledStep.run
    monkeypatch.setattr(
        CompiledStep,
        "run",
        lambda self, plan: (
            taken.append([own.self_attn.layer_idx for own in plan.layers]) or run(self, plan)
        ),
    )
    for _ in steps(model, CompiledStep):
        options = GREEDY | SPECULATE | {"max_new_tokens": 40}
        (log,) = model.generate(prompt.ids, images=prompt.images, **options).logs
    caught_up = sum(
        accepted == len(drafts) > 0 and bool(later)
        for drafts, later, accepted in zip(log.drafts, log.drafts[1:], log.accepted, strict=False)
    )
    guesses = sum(map(len, log.drafts)) - 1  # the first one comes with the prompt
    assert len(log.accepted) > 3 and taken.count([0, 1, 6, 7]) == guesses - caught_up > 0
    assert taken.count([6, 7]) == caught_up


def test_what_is_wanted_of_single_layers_comes_from_exact_steps(model, sample, monkeypatch):
    monkeypatch.setattr(CompiledStep, "run", None)
    inputs, found = batch(sample), []
    for _ in steps(model, DecodeStep, CompiledStep):
        with trace_pruning(model, attention=[1]) as trace:
            found.append(generate(model, inputs))
        assert len(trace.answer_attention[1]) == 11
    assert_same(*found)
    for _ in steps(model, CompiledStep):
        out = generate(model, inputs, output_hidden_states=True)
        assert len(out.hidden_states[1]) == 7


@pytest.fixture
def endings(monkeypatch):
    """The ends of all compiled steps."""
    found, run = [], CompiledStep.run
    monkeypatch.setattr(
        CompiledStep, "run", lambda self, plan: found.append(plan.ending) or run(self, plan)
    )
    return found


@pytest.mark.parametrize("together", [0, 12])
def test_logits_are_part_of_a_compiled_step_unless_somebody_watches(
    model, sample, endings, together, monkeypatch
):
    """Norm and head in the graph, or as they are where hooks are on them or on the decoder."""
    monkeypatch.setattr(compiled_step, "FEW_LAYERS", together)
    inputs = batch(sample)
    wanted = generate(model, inputs)
    for _ in steps(model, CompiledStep):
        assert_same(generate(model, inputs), wanted)
        assert len(endings) == 11 and all(own.head is model.lm_head for own in endings)
        for part in (model.model.norm, model.lm_head, model.model):
            seen: list = []
            hook = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            endings.clear()
            assert_same(generate(model, inputs), wanted)
            hook.remove()
            assert endings == [None] * 11 and len(seen) == 12


def test_a_head_that_is_made_of_others_runs_behind_a_compiled_step(model, sample, endings):
    """They may be watched, or switched off, by themselves, as parts of an adapter are."""
    inputs, head, seen = batch(sample), model.lm_head, []
    wanted = generate(model, inputs)
    model.lm_head = torch.nn.Sequential(head)
    hook = head.register_forward_hook(lambda *_: seen.append(1))
    try:
        for _ in steps(model, CompiledStep):
            assert_same(generate(model, inputs), wanted)
    finally:
        hook.remove()
        model.lm_head = head
    assert endings == [None] * 11 and len(seen) == 12


@pytest.mark.parametrize("guessing", [True, False])
def test_logits_of_ones_own_are_those_of_every_token(make_model, sample, guessing):
    """Of guesses that are verified, too, in steps compiled or not."""
    model, prompt = make_model(), sample(4, "image", 5)
    grown(model, 0, 2, visual_token_num=30, draft_stop_prob=0.0)
    kept, options = model.logits_of, SPECULATE if guessing else {}
    model.logits_of = lambda hidden: kept(hidden).index_fill(-1, torch.arange(0, 50), -1e9)
    for answer in both(
        model, lambda: model.generate(prompt.ids, images=prompt.images, **GREEDY, **options)
    ):
        assert (getattr(answer, "sequences", answer) >= 50).all()


@pytest.mark.parametrize("kind", [DecodeStep, CompiledStep])
@pytest.mark.parametrize("last", [True, False])
def test_a_step_that_is_longer_than_its_tokens_leaves_them_alone_in_the_cache(model, kind, last):
    decoder, generator = model.model, torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, decoder.config.hidden_size, generator=generator)
    ending, found = decode_step.Ending(decoder.norm, model.lm_head, last), []
    for step in steps(model, kind):
        for most in (0, 4):
            with torch.no_grad():
                decoder(x, cache=(cache := kv_cache.KVCache(6)))
                for first, stop in ((0, 2), (2, 3), (3, 7)):
                    own = x[:, first:stop].contiguous()
                    found.append(step(decoder.layers, own, cache, ending=ending, most=most))
                    assert cache.lengths == [9 + stop] * 6
    for short, long, tokens in zip(found[:3], found[3:], (2, 1, 4), strict=True):
        assert short.shape[1] == (1 if last else tokens)
        torch.testing.assert_close(long, short, atol=1e-4, rtol=1e-4)


def test_the_logits_of_many_tokens_are_made_behind_their_step(model, endings):
    """A captured graph would keep them all, for every length."""
    decoder = model.model
    for step in steps(model, CompiledStep):
        for count in (16, 17):
            x = torch.randn(1, count, decoder.config.hidden_size)
            with torch.no_grad():
                decoder(x, cache=(cache := kv_cache.KVCache(6)))
                ending = decode_step.Ending(decoder.norm, model.lm_head)
                assert step(decoder.layers, x, cache, ending=ending).shape[1] == count
    assert [own is None for own in endings] == [False, True]


# --- steps that are captured ----------------------------------------------------------------


class Recorder:
    """In place of a CUDA graph: does the captured work again, on the tensors it was captured on."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, work, device):
        self.captured += 1

        def replay():
            self.replayed += 1
            return work()

        return replay


def test_a_captured_step_serves_later_tokens_and_later_answers(model, sample):
    model.pruner = build_pruner("pyramiddrop", visual_token_num=10)
    inputs = batch(sample)
    others = [inputs, dict(inputs, images=inputs["images"].flip(0))]
    wanted = [generate(model, own) for own in others]
    assert not torch.equal(wanted[0].scores[0], wanted[1].scores[0])
    recorder = Recorder()
    for _ in steps(model, lambda *words: GraphStep(*words, capture=recorder)):
        found = generate(model, others[0])
        assert_same(found, wanted[0])
        first = recorder.captured
        assert first < 11  # one whenever some layers go on to another bucket
        del found
        gc.collect()
        for own, other in zip(others[::-1], wanted[::-1], strict=True):
            assert_same(generate(model, own), other)
            gc.collect()
        assert recorder.captured == first


def test_a_captured_step_looks_at_the_places_of_its_own_prompt(model, sample):
    model.pruner = PLACED[1]
    prompts = [sample(3, "image", 9, seed=1), sample(9, "image", 3, seed=2)]
    inputs = [dict(inputs=p.ids, images=p.images) for p in prompts]
    wanted = [generate(model, own) for own in inputs]
    for _ in steps(model, lambda *words: GraphStep(*words, capture=Recorder())):
        for own, answer in zip(inputs * 2, wanted * 2, strict=True):
            assert_same(generate(model, own), answer)
            gc.collect()


def test_a_cache_that_is_still_there_keeps_its_buffers(model, sample):
    prompt, recorder = sample(4, "image", 5), Recorder()
    inputs = dict(images=prompt.images)
    for _ in steps(model, lambda *words: GraphStep(*words, capture=recorder)):
        with torch.no_grad():
            held = [model(prompt.ids, **inputs).past_key_values for _ in range(2)]
            out = [
                [model(torch.tensor([[5]]), past_key_values=c).logits for c in held] for _ in "ab"
            ]
    assert torch.equal(*out[0]) and torch.equal(*out[1]) and not torch.equal(out[0][0], out[1][0])
    assert held[0].entries(0)[0].data_ptr() != held[1].entries(0)[0].data_ptr()


def test_what_rows_share_is_not_held_by_graphs(model, sample):
    """Each image would make one, and its keys and values stay as long as that."""
    first = sample(4, "image", seed=1).ids[0]
    prompts = [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in (9, 5)]
    pixels = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    ask = prompts, [[Picture(pixels, (SIDE, SIDE))]] * 2, ["a"] * 2
    model.pruner, recorder = make_pruner("none"), Recorder()
    wanted = PrefixCache(model).generate(*ask, **GREEDY)
    for _ in steps(model, lambda *words: GraphStep(*words, capture=recorder)):
        known = PrefixCache(model)
        assert torch.equal(known.generate(*ask, **GREEDY), wanted)
        ((key, own),) = known._beginnings.items()
        keys = weakref.ref(own.keys[0])
        del known, key, own
        gc.collect()
        assert keys() is None and not recorder.captured


class Adapter(torch.nn.Module):
    """A product with something beside it, as adapters of PEFT are."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.on = base, True
        self.weight = base.weight

    def forward(self, x):
        return self.base_layer(x) * (3.0 if self.on else 1.0)


@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.up_proj"])
def test_an_adapter_that_comes_late_or_is_switched_off_is_seen_by_captured_steps(
    make_model, sample, part
):
    model, prompt, recorder = make_model(), sample(4, "image", 5), Recorder()
    ask = dict(inputs=prompt.ids, images=prompt.images)
    place, _, name = part.partition(".")
    owner = getattr(model.model.layers[2], place)

    def scores() -> torch.Tensor:
        found = torch.stack(generate(model, ask).scores)
        gc.collect()  # the buffers of this answer are those of the next one
        return found

    for _ in steps(model, lambda *words: GraphStep(*words, capture=recorder)):
        plain = scores()
        before = vars(recorder).copy()
        assert before["replayed"] > 0
        setattr(owner, name, adapter := Adapter(getattr(owner, name)))
        changed = scores()
        adapter.on = False
        torch.testing.assert_close(scores(), plain, atol=1e-4, rtol=1e-4)
        assert vars(recorder) == before  # a graph would do what it did
    for _ in steps(model, DecodeStep):
        adapter.on = True
        torch.testing.assert_close(scores(), changed, atol=1e-4, rtol=1e-4)
        assert not torch.equal(changed, plain)


def test_guesses_are_captured_too(make_model, sample):
    model, prompt = make_model(), sample(4, "image", 5)
    model.lm_head.weight.data *= 8
    grown(model, 2, 2, visual_token_num=30, draft_stop_prob=0.0)
    plain = model.generate(prompt.ids, images=prompt.images, **GREEDY)
    for step in steps(model, lambda *words: GraphStep(*words, capture=Recorder())):
        for _ in "ab":
            out = model.generate(prompt.ids, images=prompt.images, **GREEDY, **SPECULATE)
            assert torch.equal(out.sequences, plain)
        lengths = {len(own) for own in out.logs[0].drafts}
        verified = {key[0][1] for key in step.graphs if key[0][1] > 2}
        assert len(lengths) > 1 and verified == {6}, "one length for all verifications"


# --- the switch -----------------------------------------------------------------------------


def test_the_switch_says_what_a_machine_lacks(model, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(RuntimeError, match="C\\+\\+ compiler, and none was found: install"):
        model.compile_decoding = True
    assert not model.compile_decoding
    with pytest.raises(RuntimeError, match="not on mps"):
        compiling.check_compiler(torch.device("mps"))


def test_the_switch_puts_a_compiled_step_in_and_takes_it_out(model):
    model.compile_decoding = True
    assert model.compile_decoding and type(model.model.step) is CompiledStep
    model.compile_decoding = False
    assert not model.compile_decoding and type(model.model.step) is DecodeStep
