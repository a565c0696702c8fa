"""How much of a step of self-speculation are passes of the decoder and the drafter."""

import itertools

import pytest

from llava.eval.efficiency.decode_report import rows_of
from llava.eval.efficiency.decode_run import Clock, Variant
from llava.eval.efficiency.pass_times import timed_passes
from llava.pruning import build_pruner
from tests.pruning.test_twigvlm import grown


@pytest.fixture
def guessing(make_model, sample):
    """A model that guesses, the arguments of `generate`, and how it answers."""
    model, prompt = make_model(), sample(4, "image", 5)
    model.lm_head.weight.data *= 8
    pruner = grown(model, 2, 2, visual_token_num=30, draft_stop_prob=0.0)
    inputs = dict(inputs=prompt.ids, images=prompt.images, eos_token_id=-1, max_new_tokens=30)
    return model, inputs, Variant("twigvlm, guessing", pruner, "self_speculative")


def test_a_guess_is_one_pass_unless_the_drafter_has_a_row_to_catch_up_with(guessing):
    model, inputs, variant = guessing
    ticks, kept = itertools.count(), model.model.step
    with timed_passes(model, lambda: float(next(ticks))) as passes:
        variant.answer(model, inputs, clock := Clock(lambda: 0.0, passes))
        (log,) = variant.answer(model, inputs, Clock(lambda: 0.0, passes)).logs
    assert model.model.step is kept and len(log.accepted) > 3
    expected = 0
    for before, guesses, accepted in zip(log.drafts, log.drafts[1:], log.accepted, strict=False):
        # The guesses, the last of them in the shared layers, and the verification.
        expected += len(guesses) + 2 if guesses else 2
        expected += bool(guesses) and accepted == len(before) > 0
    assert passes.seconds == expected
    assert clock.later == sum(log.accepted[1:]) + len(log.accepted) - 1


def test_a_report_says_how_fast_guessing_were_with_passes_alone(guessing):
    model, inputs, variant = guessing
    still = Variant("twigvlm, no guesses", variant.pruner, "self_speculative")
    still.options = {"num_speculations": 0}
    dense = Variant("dense", build_pruner(), "autoregressive")
    for own in (dense, still, variant):
        model.pruner = own.pruner
        own.run(model, inputs)
    variant.run_passes(model, inputs)
    row = rows_of([dense, still, variant], model, same_answers=False)[-1]
    (rate,), (plain,) = variant.pass_rates, [clock.decode_rate for clock in still.clocks]
    assert row.of_passes == pytest.approx(rate / plain) and rate > 0
