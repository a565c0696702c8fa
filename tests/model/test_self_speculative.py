"""Self-speculative generation: the same answers as one token at a time, in fewer steps."""

import itertools
import time

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.generation import EncoderNoRepeatNGramLogitsProcessor, MaxTimeCriteria

from llava.constants import STRATEGIES
from llava.model.self_speculative import Guess
from llava.model.token_choice import TokenChoice
from llava.pruning import build_pruner, trace_pruning
from llava.pruning.twigvlm import TwigVLM
from tests.conftest import pad_batch
from tests.model.speculation_tools import (
    GREEDY,
    SPECULATE,
    Recorder,
    StopAt,
    answers,
    assert_an_end_mark_ends_the_answer,
    assert_caches_hold_the_answer,
    assert_rows_stay_apart,
    assert_scores_are_those_of_one_by_one,
    assert_stopping_criteria_see_every_token,
    assert_traces_describe_the_prompt,
    batch_of_three,
    counted_caches,
    sharpened,
)
from tests.pruning.test_twigvlm import grown


@pytest.fixture
def sharp(make_model):
    return sharpened(make_model(), 8)


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("pruning", [True, False])
@pytest.mark.parametrize("pieces", [(4, "image", 5), (7,), (3, "image", 4, "image", 2)])
def test_greedy_answers_are_those_of_one_token_at_a_time(sharp, sample, shared, pruning, pieces):
    grown(sharp, shared, 3 - shared, visual_token_num=14, enable_pruning=pruning)
    prompt = sample(*pieces)
    plain, fast, logs = answers(sharp, prompt.ids, prompt.images)
    assert torch.equal(plain, fast)
    assert sum(logs[0].accepted) >= 3  # the test would be idle if no guess were ever right


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("tree", [{}, {"tree_nodes": 6}])
def test_so_are_those_to_an_image_at_the_end(model, sample, shared, tree):
    """Its last token, at the largest position, is one of those that go."""
    grown(model, shared, 2, visual_token_num=20, draft_stop_prob=0.0)
    prompt = sample("image")
    plain, fast, _ = answers(model, prompt.ids, prompt.images, tree)
    assert torch.equal(plain, fast)


def test_grouped_queries_are_served_as_well(make_model, sample):
    model = make_model(mistral=True)
    model.lm_head.weight.data *= 8
    grown(model, 2, 4, visual_token_num=20, draft_stop_prob=0.0)
    prompt = sample(4, "image", 5)
    plain, fast, logs = answers(model, prompt.ids, prompt.images)
    assert torch.equal(plain, fast) and sum(logs[0].accepted) >= 1


def test_the_twig_looks_at_whole_layers_where_the_method_cuts_without_a_look(sharp, sample):
    class Seeing(TwigVLM):
        def score(self, prefill):
            return -prefill.index.float()

    class Blind(Seeing):
        def blind_cuts(self, num_layers):
            return (self.shared_layers(num_layers),)

    prompt, guesses = sample(4, "image", 5), []
    for method in (Seeing, Blind):
        grown(sharp, 2, 1, method=method, visual_token_num=14)
        plain, fast, (log,) = answers(sharp, prompt.ids, prompt.images)
        assert torch.equal(plain, fast)
        guesses.append(log.drafts)
    assert guesses[0] == guesses[1]


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_exactly_as_many_tokens_as_allowed(sharp, sample, most):
    grown(sharp)
    prompt = sample(4, "image", 5)
    plain, fast, logs = answers(sharp, prompt.ids, prompt.images, max_new_tokens=most)
    assert fast.shape == (1, most) and torch.equal(plain, fast)
    assert sum(accepted + 1 for accepted in logs[0].accepted) == most


def test_a_twig_that_is_the_rest_of_the_decoder_is_always_right(sharp, sample):
    grown(sharp, 2, 4, enable_pruning=False, draft_stop_prob=0.0)
    prompt = sample(4, "image", 5)
    plain, fast, logs = answers(sharp, prompt.ids, prompt.images)
    assert torch.equal(plain, fast) and logs[0].acceptance_rate == 1
    assert logs[0].accepted == [5, 5] and logs[0].tokens_per_step == 6


def test_an_unsure_guess_is_the_last_of_its_step_and_stays_in_it(sharp, sample):
    grown(sharp, draft_stop_prob=1.0, enable_pruning=False)
    prompt = sample(4, "image", 5)
    _, _, logs = answers(sharp, prompt.ids, prompt.images)
    assert {len(step) for step in logs[0].drafts[:-1]} == {1}
    _, fast, logs = answers(sharp, prompt.ids, prompt.images)
    plain = sharp.generate(
        prompt.ids, images=prompt.images, **GREEDY, **SPECULATE, num_speculations=0
    )
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("place", range(6))
def test_an_end_mark_anywhere_ends_the_answer(sharp, sample, place):
    """As a guess, as the decoder's own token, as the first token."""
    grown(sharp, enable_pruning=False)
    prompt = sample(4, "image", 5)
    assert_an_end_mark_ends_the_answer(sharp, prompt, place)


def test_stopping_criteria_see_every_token(sharp, sample):
    grown(sharp, enable_pruning=False)
    assert_stopping_criteria_see_every_token(sharp, sample(4, "image", 5))


def test_rules_about_scores_hold(sharp, sample):
    grown(sharp)
    prompt = sample(4, "image", 5)
    rules = dict(repetition_penalty=1.5, no_repeat_ngram_size=2)
    plain, fast, _ = answers(sharp, prompt.ids, prompt.images, **rules)
    assert torch.equal(plain, fast)
    assert not torch.equal(fast, answers(sharp, prompt.ids, prompt.images)[1])


@pytest.mark.parametrize("nodes", [0, 20])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("most", [3, 12])
def test_rules_are_asked_about_texts_alone_that_can_be_an_answer(
    sharp, sample, nodes, sampled, most
):
    """Not about what would stand behind an end mark, nor behind as many tokens as are allowed."""
    grown(sharp, enable_pruning=False)
    prompt, end = sample(4, "image", 5), 41
    after = {(): [11, 12], (11,): [13, 14], (12,): [14], (11, 13): [15, end], (12, 14): [end]}
    after |= {(11, 14): [16], (11, 13, 15): [end], (11, 14, 16): [end]}
    after = {text: after[text] for text in after if len(text) < most}
    options = dict(GREEDY, do_sample=sampled, max_new_tokens=most, eos_token_id=end)
    seen: list[list] = [[], []]
    found: list[set] = [set(), set()]
    for seed in range(12 if sampled else 1):
        for number, more in enumerate(({}, {**SPECULATE, "tree_nodes": nodes})):

            def allowed(_, ids, own=seen[number]):
                own.append(tuple(ids[1:].tolist()))
                return after[own[-1]]

            torch.manual_seed(seed)
            text = sharp.generate(
                prompt.ids,
                images=prompt.images,
                prefix_allowed_tokens_fn=allowed,
                **options,
                **more,
            )
            found[number].add(tuple(text[0].tolist()))
    assert all(len(text) == most or text[-1] == end for text in found[1])
    assert sampled or found[0] == found[1]
    if nodes:  # as without guessing, so that they may count how often they are asked
        assert seen[0] == seen[1]


def test_the_reported_probability_is_the_plain_one_whatever_rules_do_to_logits():
    logits = torch.tensor([[2.0, 1.5, 0.5, -1.0]])
    rules = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])  # it writes in place
    choice = TokenChoice(rules, None, torch.tensor([[0, 3]]), [])
    token, probability, _ = choice.guess(logits.clone(), [])
    assert token.item() == 1
    torch.testing.assert_close(probability, logits.softmax(-1)[:, 1])


class Own(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


OF_PROMPTS = EncoderNoRepeatNGramLogitsProcessor(2, torch.ones(1, 4, dtype=torch.long))
OWN_RULES = [
    {"stopping_criteria": [StopAt(6)]},
    {"logits_processor": LogitsProcessorList([Own()])},
    {"logits_processor": LogitsProcessorList([OF_PROMPTS])},
]


@pytest.mark.parametrize("nodes", [0, 8])
@pytest.mark.parametrize("rule", OWN_RULES, ids=["end", "scores", "scores by prompts"])
def test_rules_of_ones_own_want_one_prompt(sharp, sample, rule, nodes):
    """They would be called with one row of the batch, whatever they make of rows."""
    grown(sharp, tree_nodes=nodes)
    rules = {**rule, **GREEDY, **SPECULATE}
    ids, mask, images = batch_of_three(sample)
    with pytest.raises(ValueError, match="would see one of 3 answers .* one prompt at a time"):
        sharp.generate(ids, images=images, attention_mask=mask, **rules)
    one = sample(4, "image", 5)
    with pytest.raises(ValueError, match="would see one of 2 answers"):
        sampled = rules | {"do_sample": True, "num_return_sequences": 2}
        sharp.generate(one.ids, images=one.images, **sampled)
    assert len(sharp.generate(one.ids, images=one.images, **rules)) == 1


@pytest.mark.parametrize("nodes", [0, 8])
def test_rules_that_settings_stand_for_take_batches(sharp, sample, nodes):
    grown(sharp, tree_nodes=nodes)
    ids, mask, images = batch_of_three(sample)
    rules = {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])}
    rules |= {"stopping_criteria": [MaxTimeCriteria(1e6)], "no_repeat_ngram_size": 2}
    plain, fast, _ = answers(sharp, ids, images, attention_mask=mask, **rules)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("nodes", [0, 8])
def test_a_limit_of_time_holds_for_all_rows_together(sharp, sample, monkeypatch, nodes):
    """No row is left with nothing because those before it took the time of all."""
    grown(sharp, tree_nodes=nodes)
    ids, mask, images = batch_of_three(sample)
    clock = itertools.count()  # a second goes by whenever somebody looks
    monkeypatch.setattr(time, "time", lambda: next(clock))
    limits = {"max_time": 36, "max_new_tokens": 60, "pad_token_id": -7}
    _, fast, _ = answers(sharp, ids, images, attention_mask=mask, **limits)
    sizes = (fast != -7).sum(dim=1).tolist()
    assert 30 <= sum(sizes) <= 40 and min(sizes) >= 6 and (nodes or max(sizes) - min(sizes) <= 2)


def test_rows_of_a_batch_stay_apart(sharp, sample):
    grown(sharp, visual_token_num=14)
    assert_rows_stay_apart(sharp, sample)


def test_a_streamer_sees_the_answer_and_nothing_else(sharp, sample):
    grown(sharp, enable_pruning=False)
    prompt, streamer = sample(4, "image", 5), Recorder()
    output = sharp.generate(
        prompt.ids,
        images=prompt.images,
        **GREEDY,
        **SPECULATE,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    shown = streamer.puts[1:]  # after the start mark, as transformers shows it
    assert [token for put in shown for token in put] == output.sequences[0].tolist()
    assert [len(put) - 1 for put in shown] == output.logs[0].accepted and streamer.ended == 1
    ids = prompt.ids.expand(2, -1)
    with pytest.raises(ValueError, match="a streamer shows one answer, but there are 2"):
        sharp.generate(
            ids, **GREEDY, **SPECULATE, streamer=Recorder(), images=torch.cat([prompt.images] * 2)
        )


def test_scores_are_those_the_tokens_were_chosen_from(sharp, sample):
    grown(sharp)
    assert_scores_are_those_of_one_by_one(sharp, sample(4, "image", 5))


# --- caches -----------------------------------------------------------------------------------


def test_caches_hold_the_answer_and_never_move(sharp, sample, monkeypatch):
    made = counted_caches(monkeypatch)
    grown(sharp, visual_token_num=14)
    prompt = sample(4, "image", 5)
    output = sharp.generate(
        prompt.ids, images=prompt.images, **GREEDY, **SPECULATE, return_dict_in_generate=True
    )
    log = output.logs[0]
    assert len(made) == 2 * (6 + 2)  # keys and values of 6 layers and the twig's 2, once
    for _, size, twig in assert_caches_hold_the_answer(log, prompt.ids.shape[1]):
        assert size - 2 <= twig <= size - 1


def test_the_trace_describes_the_prompt_whatever_the_strategy(sharp, sample):
    grown(sharp, visual_token_num=14)
    prompt = sample(4, "image", 5)
    plain, fast = assert_traces_describe_the_prompt(sharp, prompt)
    twig_entries = 2 * (prompt.ids.shape[1] + 35)
    assert fast.kv_bytes == plain.kv_bytes + twig_entries * 2 * 32 * 4


@pytest.mark.parametrize("pruning", [True, False])
def test_a_cut_before_the_first_layer_is_in_the_trace(sharp, sample, pruning):
    """As of the playground's twig, which shares no layer."""
    grown(sharp, 0, 2, visual_token_num=14, enable_pruning=pruning)
    plain, fast = assert_traces_describe_the_prompt(sharp, sample(4, "image", 5))
    assert (0 in plain.decoder_keep) == pruning
    assert fast.decoder_keep.keys() == plain.decoder_keep.keys()


def test_the_trace_of_a_batch_has_a_row_per_prompt(sharp, sample):
    grown(sharp, visual_token_num=14)
    ids, mask, images = batch_of_three(sample)
    traces = []
    for options in ({}, SPECULATE):
        with trace_pruning(sharp) as trace:
            sharp.generate(ids, images=images, attention_mask=mask, **GREEDY, **options)
        traces.append(trace)
    plain, fast = traces
    for name in ("visual_tokens", "prompt_tokens", "kv_lengths", "importance"):
        torch.testing.assert_close(getattr(fast, name), getattr(plain, name))
    assert plain.decoder_keep and not mask.all()
    torch.testing.assert_close(fast.decoder_keep, plain.decoder_keep)
    assert fast.position_ids.shape == plain.position_ids.shape
    assert len(fast.visual_positions) == 2 and sharp.pruning_trace is None


def test_waits_for_the_device_are_one_per_guess_and_one_per_step(sharp, sample, monkeypatch):
    grown(sharp, enable_pruning=False)
    prompt, waits = sample(4, "image", 5), {"on_host": 0, "verify": 0}
    for name in waits:
        method = getattr(TokenChoice, name)

        def counted(*args, method=method, name=name):
            waits[name] += 1
            return method(*args)

        monkeypatch.setattr(TokenChoice, name, counted)
    output = sharp.generate(
        prompt.ids, images=prompt.images, **GREEDY, **SPECULATE, return_dict_in_generate=True
    )
    log = output.logs[0]
    assert waits == {"on_host": sum(map(len, log.drafts)), "verify": len(log.drafts)}


# --- sampling ---------------------------------------------------------------------------------


def test_sampled_tokens_have_the_decoders_distribution():
    """Guesses come from another distribution; what is emitted first follows the decoder's."""
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 0.5, 0.0, -1.0, 1.0], [0.0, 1.0, 0.3, 0.0, -2.0]])
    guesses = torch.tensor([[0.0, 1.5, 1.0, 0.0, -0.5]])
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    counts, pairs = torch.zeros(5), torch.zeros(5, 5)
    for _ in range(4000):
        choice = TokenChoice(LogitsProcessorList(), warpers, torch.ones(1, 1, dtype=int), [])
        token, probability, distribution = choice.guess(guesses, [])
        assert torch.isclose(probability[0], guesses.softmax(-1)[0, token[0, 0]])
        _, numbers, _ = choice.verify(logits, Guess([token], [distribution]))
        counts[numbers[0]] += 1
        if len(numbers) == 2:
            pairs[numbers[0], numbers[1]] += 1
    wanted = (logits / 0.7).softmax(dim=-1)
    assert (counts / 4000 - wanted[0]).abs().max() < 0.025
    second = pairs.sum(0) / pairs.sum()
    assert (second - wanted[1]).abs().max() < 0.04


def test_sampling_runs_and_depends_on_the_seed_alone(sharp, sample):
    grown(sharp)
    prompt = sample(4, "image", 5)
    options = dict(GREEDY, do_sample=True, temperature=0.8, top_p=0.9, **SPECULATE)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(sharp.generate(prompt.ids, images=prompt.images, **options))
    assert torch.equal(outputs[0], outputs[1]) and outputs[2].shape == (1, 12)


def test_nearly_no_temperature_is_greedy(sharp, sample):
    grown(sharp)
    prompt = sample(4, "image", 5)
    plain = sharp.generate(prompt.ids, images=prompt.images, **GREEDY)
    options = dict(GREEDY, do_sample=True, temperature=1e-4)
    sampled = sharp.generate(prompt.ids, images=prompt.images, **options, **SPECULATE)
    assert torch.equal(plain, sampled)


# --- the interface ----------------------------------------------------------------------------


def test_the_published_config_chooses_per_call(sharp, sample):
    grown(sharp, visual_token_num=14)
    prompt = sample(4, "image", 5)
    dense = build_pruner("none")
    config = {"enable_pruning": False, "generation_strategy": "self_speculative"}
    with trace_pruning(sharp) as trace:
        output = sharp.generate(prompt.ids, images=prompt.images, **GREEDY, twigvlm_config=config)
    assert not trace.decoder_keep and sharp.pruner.enable_pruning
    with trace_pruning(sharp) as trace:
        config = {"enable_pruning": True, "attention_rank": 20.0}
        sharp.generate(prompt.ids, images=prompt.images, **GREEDY, twigvlm_config=config)
    assert sum(int(n) for n in trace.visual_tokens) == 120
    with pytest.raises(ValueError, match="unknown entry 'rank' of twigvlm_config"):
        sharp.generate(prompt.ids, images=prompt.images, twigvlm_config={"rank": 1})
    with pytest.raises(ValueError, match="is out of reach"):
        sharp.generate(prompt.ids, images=prompt.images, twigvlm_config={"attention_rank": 2})
    with pytest.raises(ValueError, match="twig_K cannot change from call to call"):
        sharp.generate(prompt.ids, images=prompt.images, twigvlm_config={"twig_K": 3})
    sharp.pruner = dense
    assert torch.equal(output, sharp.generate(prompt.ids, images=prompt.images, **GREEDY))


def test_the_published_way_of_calling_gives_the_published_result(sharp, sample):
    """A tensor as always, with `predicted_tokens` and what else the release reports beside it."""
    grown(sharp, visual_token_num=14)
    prompt = sample(4, "image", 5)
    plain = sharp.generate(prompt.ids, images=prompt.images, **GREEDY)
    assert type(plain) is torch.Tensor and not hasattr(plain, "predicted_tokens")
    end = int(plain[0, 5])
    ended = {**GREEDY, "eos_token_id": end, "pad_token_id": 0}
    config = {"enable_FastV": True, "attention_rank": 14, "generation_strategy": "autoregressive"}
    for strategy in STRATEGIES:
        config["generation_strategy"] = strategy
        asked = dict(images=prompt.images, twigvlm_config=config)
        output = sharp.generate(prompt.ids, **asked, **GREEDY)
        assert isinstance(output, torch.Tensor) and torch.equal(output, plain)
        assert output.predicted_tokens == plain.tolist()
        assert type(output + 0) is torch.Tensor and output.shape == plain.shape
        cut = sharp.generate(prompt.ids, **asked, **ended)
        before = plain[0].tolist()[: plain[0].tolist().index(end)]
        assert cut.predicted_tokens == [before] and cut[0].tolist() == [*before, end]
        assert cut.num_tokens_generated == len(before)
        by_config = sharp.generate(prompt.ids, **asked, generation_config=GenerationConfig(**ended))
        assert by_config.predicted_tokens == [before]
        assert hasattr(output, "acceptance_rate") == (strategy == "self_speculative")
    made, accepted = output.total_generations, output.total_draft_matches
    assert 0 < accepted <= made and output.acceptance_rate == accepted / made
    assert 0 < output.prefill_time <= output.decoding_time
    whole = sharp.generate(prompt.ids, **asked, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(whole.sequences, plain) and whole.logs
    sharp.pruner.as_published = True  # as the loader leaves it that was given such a dict
    output = sharp.generate(prompt.ids, images=prompt.images, **GREEDY)
    assert output.predicted_tokens == plain.tolist()
    again, _ = sharp.pruner.published.for_call(sharp.pruner, {})
    assert again is sharp.pruner  # nothing is built anew


def test_every_prompt_of_a_batch_has_its_own_tokens(sharp, sample):
    grown(sharp, visual_token_num=14)
    prompts = [sample(4, "image", 5), sample(2, "image", 9)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images = torch.cat([prompt.images for prompt in prompts])
    config = {"attention_rank": 14, "generation_strategy": "self_speculative"}
    options = dict(GREEDY, images=images, attention_mask=mask)
    output = sharp.generate(ids, **options, twigvlm_config=config)
    assert output.predicted_tokens == sharp.generate(ids, **options).tolist()


def test_what_cannot_work_is_refused(sharp, sample):
    prompt = sample(4, "image", 5)

    def generate(**options):
        return sharp.generate(prompt.ids, images=prompt.images, **{**GREEDY, **options})

    with pytest.raises(ValueError, match="needs a pruning method that guesses tokens .twigvlm"):
        generate(**SPECULATE)
    grown(sharp)
    with pytest.raises(ValueError, match="unknown generation_strategy 'fast', choose from auto"):
        generate(generation_strategy="fast")
    with pytest.raises(ValueError, match="num_speculations need generation_strategy"):
        generate(num_speculations=3)
    with pytest.raises(ValueError, match="greedy search and sampling"):
        generate(**SPECULATE, num_beams=2)
    with pytest.raises(ValueError, match="needs a cache"):
        generate(**SPECULATE, use_cache=False)


def test_the_models_own_strategy_is_the_default(sharp, sample):
    grown(sharp)
    prompt = sample(4, "image", 5)
    sharp.generation_strategy = "self_speculative"
    output = sharp.generate(
        prompt.ids, images=prompt.images, **GREEDY, return_dict_in_generate=True
    )
    assert output.logs
    assert sharp.possible_strategy == "self_speculative"
    sharp.pruner = build_pruner("none")
    assert sharp.possible_strategy == "autoregressive"
