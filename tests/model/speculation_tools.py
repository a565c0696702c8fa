"""What the tests of self-speculative generation share, whether guesses are a row or a tree."""

import torch
from transformers import StoppingCriteria

from llava.model import kv_cache
from llava.pruning import trace_pruning
from tests.conftest import pad_batch

GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0)
SPECULATE = dict(generation_strategy="self_speculative")
#: guesses are a row
ROW: dict[str, int] = {}


def sharpened(model, factor: float):
    """A model that is sure of its tokens and hardly changes behind layer 2: guesses are good.

    factor: by which logits grow
    """
    for layer in model.model.layers[3:]:
        layer.self_attn.o_proj.weight.data *= 0.02
        layer.mlp.down_proj.weight.data *= 0.02
    model.lm_head.weight.data *= factor
    return model


def answers(model, ids, images, tree=ROW, **options):
    """Tokens one by one and with guesses, and the logs of these."""
    options = {**GREEDY, **options}
    plain = model.generate(ids, images=images, **options)
    options |= {"return_dict_in_generate": True, **SPECULATE, **tree}
    fast = model.generate(ids, images=images, **options)
    return plain, fast.sequences, fast.logs


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape[1])
        return input_ids.shape[1] == self.length


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


def batch_of_three(sample):
    """(ids, mask, images) of two prompts with an image and one without, of several lengths."""
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2), sample(5, seed=3)]
    ids, mask = pad_batch([p.ids for p in prompts])
    return ids, mask, torch.cat([p.images for p in prompts if p.images is not None])


def assert_an_end_mark_ends_the_answer(model, prompt, place: int, tree=ROW):
    """The token at `place` of the answer is made the end mark."""
    whole = model.generate(prompt.ids, images=prompt.images, **GREEDY)[0].tolist()
    plain, fast, _ = answers(model, prompt.ids, prompt.images, tree, eos_token_id=whole[place])
    assert torch.equal(plain, fast)
    assert fast[0, -1] == whole[place] and fast.shape[1] == whole.index(whole[place]) + 1


def assert_stopping_criteria_see_every_token(model, prompt, tree=ROW):
    rules = [StopAt(6), StopAt(6)]
    outputs = [
        model.generate(
            prompt.ids, images=prompt.images, **GREEDY, stopping_criteria=[rule], **options
        )
        for rule, options in zip(rules, ({}, SPECULATE | tree), strict=True)
    ]
    assert torch.equal(*outputs) and outputs[1].shape == (1, 5)  # 6 with the start mark
    assert rules[0].seen == rules[1].seen


def assert_scores_are_those_of_one_by_one(model, prompt, tree=ROW, **rules):
    options = dict(GREEDY, output_scores=True, return_dict_in_generate=True, **rules)
    plain = model.generate(prompt.ids, images=prompt.images, **options)
    fast = model.generate(prompt.ids, images=prompt.images, **options, **SPECULATE, **tree)
    torch.testing.assert_close(
        torch.stack(fast.scores), torch.stack(plain.scores), atol=1e-3, rtol=1e-4
    )


def assert_rows_stay_apart(model, sample, tree=ROW):
    ids, mask, images = batch_of_three(sample)
    plain, fast, logs = answers(model, ids, images, tree, attention_mask=mask)
    assert torch.equal(plain, fast)
    assert len({tuple(log.accepted) for log in logs}) > 1  # they accept different numbers


def assert_traces_describe_the_prompt(model, prompt, tree=ROW):
    """The traces of an answer one by one and with guesses, whose entries are the same."""
    traces = []
    for options in ({}, SPECULATE | tree):
        with trace_pruning(model) as trace:
            model.generate(prompt.ids, images=prompt.images, **GREEDY, **options)
        traces.append(trace)
    plain, fast = traces
    for name in ("visual_tokens", "prompt_tokens", "kv_lengths"):
        ours, theirs = ([n.tolist() for n in getattr(trace, name)] for trace in traces)
        assert ours == theirs, name
    for layer, rows in plain.decoder_keep.items():
        assert rows[0].tolist() == fast.decoder_keep[layer][0].tolist()
    return plain, fast


def counted_caches(monkeypatch) -> list[int]:
    """The sizes of all caches of keys or values that are made from here on."""
    made, allocate = [], kv_cache._allocate
    monkeypatch.setattr(
        kv_cache, "_allocate", lambda like, size: made.append(size) or allocate(like, size)
    )
    return made


def assert_caches_hold_the_answer(log, length: int) -> list[tuple[int, int, int]]:
    """What layers 0, 2 and 5 hold after every step; for each step (tokens of prompt and answer
    before it, those after it, entries of the twig's first layer after it).

    length: of the prompt, with a mark for its image
    """
    size, kept = length + 35, log.kv_lengths[0][2] - log.accepted[0]
    emitted, steps = 0, []
    for accepted, lengths in zip(log.accepted, log.kv_lengths, strict=True):
        before = size + emitted
        emitted += accepted + 1
        assert lengths[0] == size + emitted - 1 and lengths[2] == kept + emitted - 1
        assert lengths[5] == length - 1 + emitted - 1
        steps.append((before, size + emitted, lengths[6]))
    return steps
