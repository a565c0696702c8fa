"""Buffers of a cache: what compiled steps see of them, and what beams move."""

import pytest
import torch

from llava.model import kv_cache
from llava.model.kv_cache import KVCache, RowState
from llava.pruning import build_pruner


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(kv_cache, "BUCKET", 8)


def test_a_step_sees_whole_buckets_and_never_a_whole_buffer():
    cache = KVCache(1, reserve=6)
    cache.append(0, *torch.ones(2, 1, 1, 5, 4))
    cache.rows[0] = RowState(torch.tensor([5]), 5)
    assert cache.window(0, 1) == 8
    keys, _ = cache.claim(0, 1)
    assert keys.shape[2] == 24 and keys[:, :, 5:].eq(0).all() and cache.appended(0) == 1
    for _ in range(10):
        again, _ = cache.claim(0, 1)
    assert again is keys and cache.window(0) == 16
    grown, _ = cache.claim(0, 8)
    assert grown.shape[2] > cache.window(0) == 24 and grown[:, :, :5].eq(1).all()


def test_places_that_steps_see_before_they_are_written_hold_zeros(monkeypatch):
    """Whatever made the buffer before: what is masked is multiplied by 0, and NaN stays NaN."""
    monkeypatch.setattr(
        kv_cache, "_allocate", lambda like, n: like.new_full((1, 2, n, 4), float("nan"))
    )
    prompt = torch.ones(1, 2, 5, 4)
    for grow in (
        lambda cache: None,
        lambda cache: cache.keep(0, torch.arange(3)[None], RowState(torch.tensor([3]), 3)),
        lambda cache: cache.append(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4)),
        lambda cache: [cache.claim(0, 1), cache.append(0, *torch.ones(2, 1, 2, 99, 4))],
    ):
        cache = KVCache(1, reserve=4)
        cache.append(0, prompt, prompt)
        grow(cache)
        held = cache.lengths[0]
        for buffer in cache.claim(0, 1):
            assert buffer[:, :, held:].eq(0).all() and buffer[:, :, :held].isfinite().all()


def test_beams_move_what_follows_their_prompt_alone():
    cache = KVCache(1, reserve=4, beams=2)
    prompt = torch.tensor([1.0, 1.0, 2.0, 2.0]).view(4, 1, 1, 1).expand(4, 1, 3, 2)
    cache.append(0, prompt, prompt)
    cache.rows[0] = RowState(torch.full((4,), 3), 3)
    answer = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 1, 2)
    keys, _ = cache.append(0, answer, -answer)
    buffer = keys.data_ptr()
    cache.reorder_cache(torch.tensor([1, 1, 2, 2]))
    keys, values = cache.entries(0)
    assert keys[:, 0, :, 0].tolist() == [[1, 1, 1, 1]] * 2 + [[2, 2, 2, 2]] * 2
    assert values[:, 0, 3, 0].tolist() == [-1, -1, -2, -2] and keys.data_ptr() == buffer


def test_angles_of_answers_are_those_of_their_positions(model):
    state, rotary = RowState(torch.tensor([3, 7]), 5), model.model.rotary
    for start, count in ((0, 1), (1, 1), (2, 3), (5, 1), (3, 2), (0, 2), (40, 300)):
        positions = state.next_position[:, None] + torch.arange(start, start + count)
        wanted = rotary(positions, torch.float32)
        for own, other in zip(state.rope(rotary, start, count, torch.float32), wanted, strict=True):
            assert torch.equal(own, other)


def test_of_the_newest_entries_some_stay_in_their_order():
    """In the first layers alone, whatever their lengths."""
    cache, held = KVCache(3, reserve=20), []
    for layer, length in enumerate((4, 2, 7)):
        entries = torch.randn(2, 1, 2, length + 6, 3)
        cache.append(layer, *entries[..., :length, :])
        cache.append(layer, *entries[..., length:, :])
        held.append(entries)
    for places in ([0, 2, 3], [1], []):
        first = [4, 2]
        cache.keep_of_newest(first, places)
        assert cache.lengths == [4 + len(places), 2 + len(places), 13]
        for layer, start in enumerate(first):
            order = [*range(start), *(start + place for place in places)]
            held[layer] = held[layer][..., order, :]
        for layer, wanted in enumerate(held):
            assert torch.equal(torch.stack(cache.entries(layer)), wanted)


def test_loops_written_by_hand_read_lengths_where_transformers_has_them(model, sample):
    """`past_key_values[layer][0].shape[-2]` stands in many, `get_seq_length()` in others."""
    prompt = sample(3, "image", 4)
    model.pruner = build_pruner("fastv", visual_token_num=10, layer=2)
    with torch.no_grad():
        cache = model(prompt.ids, images=prompt.images).past_key_values
        model(torch.tensor([[5]]), past_key_values=cache)
    assert cache.get_seq_length() == len(cache) == 3 + 36 + 4 + 1 + 1
    for layer, (keys, values) in enumerate(cache):
        assert keys.shape == values.shape and keys.shape[-2] == cache.get_seq_length(layer)
    assert layer == model.config.num_hidden_layers - 1
    assert keys.shape[-2] == len(cache) - 26
