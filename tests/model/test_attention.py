"""Kernels of attention: which one is asked, and that all of them give the same."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from llava import linear
from llava.model.language_model import attention
from llava.model.language_model.attention import (
    Packing,
    attend,
    padded_causal_mask,
    serves_groups,
)
from llava.pruning import METHODS
from tests.conftest import TINY, make_pruner, pad_batch
from tests.second_device import No64

GREEDY = dict(do_sample=False, max_new_tokens=3, eos_token_id=-1, pad_token_id=0)


def varlen(calls):
    """flash_attn_varlen_func in plain torch: rows of different lengths, one behind the other."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        for ends, tokens, longest in (
            (cu_seqlens_q, q, max_seqlen_q),
            (cu_seqlens_k, k, max_seqlen_k),
        ):
            assert ends.dtype == torch.int32 and ends.is_contiguous() and isinstance(longest, int)
            assert ends[0] == 0 and ends[-1] == len(tokens) and int(ends.diff().amax()) == longest
        assert q.ndim == 3 and k.shape == v.shape and q.shape[1] % k.shape[1] == 0
        assert all(x.stride(-1) == 1 for x in (q, k, v)) and causal
        calls.append(len(q))
        out, ends = torch.empty_like(q), cu_seqlens_q.tolist()
        for start, stop in zip(ends, ends[1:], strict=False):
            row = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
            out[start:stop] = attend(*row, None, "sdpa")[0].transpose(0, 1)
        return out

    return flash_attn_varlen_func


@pytest.fixture
def flash(monkeypatch):
    """Stands in for the package flash-attn, with the arguments of its functions; counts tokens."""
    calls = []
    module = types.ModuleType("flash_attn")

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, None, "sdpa").transpose(1, 2)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, varlen(calls)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.mark.parametrize("groups", [4, 2])
def test_packed_rows_are_what_the_mask_says(flash, groups):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 6, 8), *torch.randn(2, 3, groups, 6, 8)
    valid = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1]]).bool()
    packed = Packing.of(valid, (4, 6, 1))
    assert packed.ends.tolist() == [0, 4, 10, 11] and packed.longest == 6
    out = attend(q, k, v, None, "flash_attention_2", packed)
    wanted = attend(q, k, v, padded_causal_mask(valid, 6), "sdpa")
    torch.testing.assert_close(out.transpose(1, 2)[valid], wanted.transpose(1, 2)[valid])
    assert not out.transpose(1, 2)[~valid].any()


@pytest.mark.parametrize("method", ["none", "fastv", "glimpseprune", "mustdrop"])
@pytest.mark.parametrize("mistral", [False, True])
def test_padded_batches_of_flash_attention_have_no_mask(
    make_model, sample, flash, monkeypatch, method, mistral
):
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2), sample(5, seed=3)]
    ids, mask = pad_batch([p.ids for p in prompts])
    images = torch.cat([p.images for p in prompts if p.images is not None])
    found = []
    for backend in ("sdpa", "flash_attention_2"):
        model = make_model(mistral=mistral)
        model.config._attn_implementation = backend
        for layer in model.model.layers:
            layer.self_attn.backend = backend
        model.pruner = make_pruner(method)
        if backend != "sdpa":

            def single(valid, count):
                assert count == 1  # steps of one token may still want a mask
                return padded_causal_mask(valid, count)

            place = sys.modules["llava.model.language_model.modeling_llama"]
            monkeypatch.setattr(place, "padded_causal_mask", single)
        out = model.generate(
            ids,
            images=images,
            attention_mask=mask,
            output_scores=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
        found.append(out)
    assert torch.equal(found[0].sequences, found[1].sequences)
    for one, other in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert len(flash) == 6


@pytest.mark.parametrize("method", ["none", "fastv", "sparsevlm"])
def test_layers_that_see_the_same_tokens_share_one_mask_of_numbers(
    model, sample, monkeypatch, method
):
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2)]
    ids, mask = pad_batch([p.ids for p in prompts])
    images = torch.cat([p.images for p in prompts])
    model.pruner, masks = make_pruner(method), []
    sdpa = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **kwargs):
        if q.shape[1] == TINY["num_attention_heads"]:  # of the decoder
            masks.append(attn_mask)
        return sdpa(q, k, v, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    model.generate(ids, images=images, attention_mask=mask, **{**GREEDY, "max_new_tokens": 1})
    masks = [own for own in masks if own is not None]
    stages = {"none": 1, "fastv": 2, "sparsevlm": 4}[method]
    assert len(masks) == 6 and all(own.dtype == torch.float32 for own in masks)
    assert len({own.data_ptr() for own in masks[:-1]}) <= stages
    assert masks[-1].shape[2] == 1 < masks[0].shape[2]  # only the last token asks in the last layer


CAPABILITIES = {
    # device, capability, half precision, masked -> groups are served
    ("cuda", (7, 5), True, False): False,
    ("cuda", (7, 5), True, True): False,
    ("cuda", (8, 0), True, False): True,
    ("cuda", (8, 9), True, True): False,
    ("cuda", (8, 6), False, False): False,
    ("cuda", (9, 0), True, True): True,
    ("cuda", (9, 0), False, True): False,
    ("mps", None, True, False): False,
    ("cpu", None, False, True): True,
}


@pytest.mark.parametrize("case", CAPABILITIES, ids=str)
def test_heads_are_repeated_where_no_fast_kernel_serves_groups(monkeypatch, case):
    kind, capability, half, masked = case
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype = torch.float16 if half else torch.float32
    asked = serves_groups(torch.device(kind), dtype, masked)
    assert asked is CAPABILITIES[case]


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_heads_give_what_groups_give(monkeypatch, masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), *torch.randn(2, 2, 2, 5, 8)
    mask = padded_causal_mask(torch.tensor([[True] * 5, [False] + [True] * 4]), 5)
    wanted = attend(q, k, v, mask if masked else None, "sdpa")
    asked = []

    def spy(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        asked.append((k.shape[1], enable_gqa, None if attn_mask is None else attn_mask.dtype))
        out = plain(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return out.transpose(1, 2).contiguous().transpose(1, 2)  # as a GPU's kernels have it lie

    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "serves_groups", lambda *_: False)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(linear, "OWN_WAYS", False)
    out = attend(q, k, v, mask if masked else None, "sdpa")
    torch.testing.assert_close(out, wanted)
    kind = torch.bool if masked else None
    assert asked == [(4, False, kind)]
    # A step of decoding repeats nothing: its queries are taken group by group.
    one = attend(q[:, :, -1:], k, v, mask[:, :, -1:] if masked else None, "sdpa")
    torch.testing.assert_close(one, wanted[:, :, -1:])
    assert asked[1] == (2, False, kind)


@pytest.mark.parametrize("name", [*sorted(METHODS), "vispruner+fastv"])
def test_no_method_needs_float64(model, sample, name):
    """MPS has none."""
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2)]
    ids, mask = pad_batch([p.ids for p in prompts])
    images = torch.cat([p.images for p in prompts])
    model.pruner = make_pruner(name)
    with No64():
        model.generate(ids, images=images, attention_mask=mask, **GREEDY)
        model.generate(ids, images=images, attention_mask=mask, **{**GREEDY, "do_sample": True})


OPTIONS = {
    "adaptprune": dict(keep_ratio=0.3),
    "fastv": dict(ratio=0.4),
    "prumerge": dict(reduction_ratio=0.2, plus=True),
    "glimpseprune": dict(max_remain_ratio=0.3, visual_token_num=20),
    "random": dict(seed=3),
    "vscan": {},
    "nuwa": dict(stage2="attention"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_needs_float64(model, anyres_model, sample, name):
    prompt = sample(4, "image", 5)
    pruner = make_pruner(name)
    for key, value in OPTIONS[name].items():
        setattr(pruner, key, value)
    model.pruner = pruner
    with No64():
        model.generate(prompt.ids, images=prompt.images, **GREEDY)
        if name == "vscan":
            anyres_model.pruner = make_pruner(name, 50)
            crops = [torch.randn(3, 3, 84, 84)]
            anyres_model.generate(prompt.ids, images=crops, image_sizes=[(42, 84)], **GREEDY)
