"""Buffers of a cache: what compiled steps see of them, and what beams move."""

import pytest
import torch

from llava.model import kv_cache
from llava.model.kv_cache import KVCache, RowState
from llava.pruning import build_pruner
from tests.conftest import make_pruner


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


def grow_by_appending(cache: KVCache) -> None:
    cache.append(0, *torch.ones(2, 1, 2, 1, 4))


def grow_by_a_cut(cache: KVCache) -> None:
    cache.keep(0, torch.arange(4)[None], RowState(torch.tensor([4]), 4))


def grow_in_a_step(cache: KVCache) -> None:
    cache.claim(0, 1)


@pytest.mark.parametrize("grow", [grow_by_appending, grow_by_a_cut, grow_in_a_step])
def test_a_long_answer_gets_its_places_as_it_grows(grow, monkeypatch):
    """Not all that `max_new_tokens` allows at once: 16 answers of 7B may take 8 GiB then."""
    monkeypatch.setattr(kv_cache, "MOST_RESERVED", 16)
    cache = KVCache(1, reserve=10_000)
    cache.append(0, *torch.ones(2, 1, 2, 5, 4))
    cache.rows[0] = RowState(torch.tensor([5]), 5)
    grow(cache)
    assert cache._keys[0].shape[2] <= 40
    for number in range(100):
        cache.append(0, *torch.full((2, 1, 2, 1, 4), float(number)))
    keys, _ = cache.entries(0)
    assert keys[0, 0, -100:, 0].tolist() == list(range(100)) and cache._keys[0].shape[2] < 200


def test_the_rest_of_a_prompt_leaves_places_for_the_answer(monkeypatch):
    monkeypatch.setattr(kv_cache, "MOST_RESERVED", 16)
    cache = KVCache(1, reserve=50 + 10_000)
    cache.append(0, *torch.ones(2, 1, 2, 5, 4))
    cache.append(0, *torch.ones(2, 1, 2, 50, 4))
    assert cache._keys[0].shape[2] == 5 + 50 + 16


def test_buffers_of_a_caller_have_places_for_all_that_may_come(monkeypatch):
    """Graphs hold their addresses: a larger one later would be captured anew."""
    monkeypatch.setattr(kv_cache, "MOST_RESERVED", 16)
    cache, asked = KVCache(1, reserve=100), []
    cache.append(0, *torch.ones(2, 1, 2, 5, 4))

    def allocate(cache, layer, capacity):
        asked.append(capacity)
        return list(torch.zeros(2, 1, 2, capacity, 4))

    for _ in range(100):
        cache.claim(0, 1, allocate)
    assert len(asked) == 1 and asked[0] > 105


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


@pytest.mark.parametrize("name", ["none", "mustdrop"])
@pytest.mark.parametrize("later", [torch.no_grad, torch.enable_grad])
def test_an_answer_may_go_on_outside_of_inference_mode(model, sample, name, later):
    """With mustdrop the first buffers come from the prompt itself."""
    model.pruner = make_pruner(name)
    prompt, found = sample(4, "image", 5), []
    for first in (later, torch.inference_mode):
        with first():
            cache = model(prompt.ids, images=prompt.images, use_cache=True).past_key_values
            model(torch.tensor([[5]]), past_key_values=cache)
        with later():
            found.append(model(torch.tensor([[6]]), past_key_values=cache).logits)
    torch.testing.assert_close(*found)
