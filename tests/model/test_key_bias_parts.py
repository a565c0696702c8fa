"""A bias of keys in kernels, caches and the tower: a key that counts for k is k keys."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llava.model.kv_cache import KVCache, RowState
from llava.model.language_model import attention
from llava.model.language_model.attention import (
    attend,
    attend_behind,
    attention_mask,
    attention_rows,
    padded_causal_mask,
)
from llava.pruning import Pruner, VisionStage
from llava.pruning.ops import repeat_heads

SIZES = torch.tensor([1, 3, 1, 2, 1, 1])  # how many tokens each key of a merged prompt stands for


def merged_and_whole(groups: int, queries: int):
    """q, k, v and bias of merged tokens, and k, v of the tokens they stand for."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, queries, 8), *torch.randn(2, 2, groups, len(SIZES), 8)
    whole = [x.repeat_interleave(SIZES, dim=2) for x in (k, v)]
    return q, k, v, SIZES.log().expand(2, -1), whole


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("served", [True, False])
def test_a_key_with_the_logarithm_of_its_size_is_that_many_keys(
    monkeypatch, backend, groups, served
):
    monkeypatch.setattr(attention, "serves_groups", lambda *_: served)
    q, k, v, bias, whole = merged_and_whole(groups, len(SIZES))
    mask = attention_mask(None, bias, len(SIZES), q.dtype)
    # A token of the whole prompt looks at itself and the others merged with it, all of them alike.
    ends = SIZES.cumsum(0)
    seen = (torch.arange(int(ends[-1])) < ends[:, None])[None, None]
    wanted = attend(q, *whole, seen, "eager")
    torch.testing.assert_close(attend(q, k, v, mask, backend), wanted)
    one = attention_mask(None, bias, 1, q.dtype)
    assert one.shape == (2, 1, 1, len(SIZES))
    torch.testing.assert_close(attend(q[:, :, -1:], k, v, one, backend), wanted[:, :, -1:])


@pytest.mark.parametrize("groups", [4, 2])
def test_keys_that_rows_share_have_their_bias(groups):
    q, k, v, bias, _ = merged_and_whole(groups, 2)
    k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    valid = torch.tensor([[True] * 6, [True] * 4 + [False, True]])
    wanted = attend(
        q, k, v, attention_mask(padded_causal_mask(valid, 2), bias, 2, q.dtype), "eager"
    )
    own = attention_mask(padded_causal_mask(valid[:, 4:], 2), bias[:, 4:], 2, q.dtype)
    shared = k[0, :, :4], v[0, :, :4], bias[0, :4]
    out = attend_behind(q, k[:, :, 4:], v[:, :, 4:], own, shared)
    torch.testing.assert_close(out[0], wanted[0])
    torch.testing.assert_close(out[1, :, 1], wanted[1, :, 1])  # the other query is on padding


def test_recorded_rows_are_those_of_attention_with_the_bias():
    q, k, v, bias, _ = merged_and_whole(2, 6)
    valid = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    rows = torch.tensor([[5, 3], [4, 0]])
    mask = attention_mask(padded_causal_mask(valid, 6), bias, 6, q.dtype)
    out = attend(q, k, v, mask, "sdpa")
    values = repeat_heads(v, 4)
    for row, weights in zip(
        rows.T, attention_rows(q, k, rows, valid, bias=bias).unbind(2), strict=True
    ):
        own = out[torch.arange(2), :, row]
        torch.testing.assert_close((weights[:, :, None] @ values)[:, :, 0], own)
    scores = attention_rows(q, k, rows, valid, "scores", bias)
    plain = attention_rows(q, k, rows, valid, "scores")
    seen = plain > float("-inf")
    added = bias[:, None, None].expand_as(scores)
    torch.testing.assert_close(scores[seen], (plain + added)[seen])


def test_without_a_bias_no_mask_is_made():
    assert attention_mask(None, None, 6, torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_numbers_that_kernels_take_as_they_are(dtype):
    seen = padded_causal_mask(torch.tensor([[False, True, True], [True] * 3]), 3)
    mask = attention_mask(seen, None, 3, dtype)
    assert torch.equal(mask == 0, seen) and bool(mask[~seen].eq(float("-inf")).all())
    assert mask.dtype == dtype and mask.stride(-1) == 1
    assert all(step % 8 == 0 for step in mask.stride()[:-1])


def test_a_cache_adds_nothing_to_later_tokens_and_reorders_what_it_adds():
    cache = KVCache(1)
    cache.append(0, *torch.zeros(2, 2, 1, 3, 4))
    bias = torch.tensor([[0.5, 0, 1], [2, 0, 0]])
    cache.rows[0] = RowState(torch.tensor([3, 3]), 3, bias=bias)
    assert cache.rows[0].key_bias(5).tolist() == [[0.5, 0, 1, 0, 0], [2, 0, 0, 0, 0]]
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.rows[0].key_bias(4).tolist() == [[2, 0, 0, 0], [2, 0, 0, 0]]
    assert RowState(torch.tensor([3]), 3).key_bias(5) is None


class Merging(VisionStage, Pruner):
    """Each crop's patches at even places, of which the first counts for `size` tokens; with
    `copies` it is there that often instead."""

    name = "merging"

    def __init__(self, size, copies=False):
        self.size, self.copies = size, copies

    def before_tower_layer(self, index, tokens):
        if index != 1:
            return tokens
        places = torch.arange(0, tokens.positions.shape[1], 2)
        bias = torch.zeros(len(tokens.positions), 1 + len(places))
        bias[:, 1] = math.log(self.size)
        if self.copies:
            places = torch.cat([places.new_zeros(self.size - 1), places])
            bias = None
        cls, patches = tokens.hidden_states.tensor_split([1], dim=1)
        return replace(
            tokens,
            hidden_states=torch.cat([cls, patches[:, places]], dim=1),
            positions=tokens.positions[:, places],
            key_bias=bias,
        )

    def tower_extras(self, num_layers, selected):
        return {selected: frozenset({"cls_attention"})}


def crops(count):
    return torch.randn(count, 3, 84, 84, generator=torch.Generator().manual_seed(0))


def test_a_token_that_counts_for_k_in_the_tower_is_k_tokens(model):
    tower = model.get_vision_tower()
    merged, whole = (tower.tokens(crops(2), stage=Merging(3, copies)) for copies in (False, True))
    torch.testing.assert_close(merged.features, whole.features[:, 2:], atol=1e-5, rtol=1e-4)
    rows = [vision.layers[2]["cls_attention"] for vision in (merged, whole)]
    torch.testing.assert_close(rows[0][:, :, 1:], rows[1][:, :, 3:])
    torch.testing.assert_close(rows[0][:, :, 0], rows[1][:, :, :3].sum(dim=2))
    plain = tower.tokens(crops(2), stage=Merging(1))
    assert not torch.allclose(plain.features, merged.features, atol=1e-4)


class Ragged(Merging):
    """As `Merging`, with the last tokens of the second crop made padding."""

    def before_tower_layer(self, index, tokens):
        before, tokens = tokens, super().before_tower_layer(index, tokens)
        if tokens is not before and len(tokens.positions) > 1:
            valid = torch.ones_like(tokens.positions, dtype=torch.bool)
            valid[1, -4:] = False
            return replace(tokens, valid=valid)
        return tokens

    def tower_extras(self, num_layers, selected):
        return {selected: frozenset({"cls_attention", "attention_mean"})}


def test_padding_in_the_tower_changes_nothing_of_others(model):
    class Shorter(Merging):
        def before_tower_layer(self, index, tokens):
            tokens = super().before_tower_layer(index, tokens)
            if index != 1:
                return tokens
            return replace(
                tokens,
                hidden_states=tokens.hidden_states[:, :-4],
                positions=tokens.positions[:, :-4],
                key_bias=tokens.key_bias[:, :-4],
            )

        tower_extras = Ragged.tower_extras

    tower = model.get_vision_tower()
    both = tower.tokens(crops(2), stage=Ragged(3))
    alone = tower.tokens(crops(2)[1:], stage=Shorter(3))
    torch.testing.assert_close(both.features[1, :-4], alone.features[0], atol=1e-5, rtol=1e-4)
    for name in ("cls_attention", "attention_mean"):
        one, other = both.layers[2][name][1], alone.layers[2][name][0]
        torch.testing.assert_close(one[..., :-4], other)
        assert not one[..., -4:].any()


def test_without_a_bias_the_tower_asks_for_the_kernel_it_always_did(model, monkeypatch):
    asked, plain = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        asked.append(attn_mask)
        return plain(q, k, v, attn_mask=attn_mask)

    place = "llava.model.multimodal_encoder.clip_encoder.F.scaled_dot_product_attention"
    monkeypatch.setattr(place, spy)
    tower = model.get_vision_tower()
    tower.tokens(crops(1))
    assert asked == [None] * 3
    tower.tokens(crops(1), stage=Merging(3))
    assert [mask is None for mask in asked[3:]] == [True, False, False]


@pytest.mark.parametrize(
    "bias", [torch.zeros(1, 36), torch.zeros(1, 37, dtype=torch.float64)], ids=["short", "double"]
)
def test_a_bias_of_the_tower_that_does_not_fit_is_an_error(model, bias):
    class Wrong(VisionStage, Pruner):
        def before_tower_layer(self, index, tokens):
            return replace(tokens, key_bias=bias)

    with pytest.raises(ValueError, match=r"key_bias .* must be torch.float32 with one value"):
        model.get_vision_tower().tokens(crops(1), stage=Wrong())
