"""How many kernels a decoder layer costs for every token."""

import pytest
import torch

from llava.blocks import RMSNorm, rope_of, rotate
from llava.model.kv_cache import KVCache
from llava.model.language_model.layers import Step
from tests.kernels import kernels

#: 7 products, 2 norms with their weights, 2 rotations of 3, attention and 2 writes to the cache,
#: 2 of the gated MLP, 2 residual sums
LAYER = 24


@pytest.mark.parametrize("mistral", [False, True])
def test_a_layer_costs_no_more_kernels_for_a_token(make_model, mistral):
    decoder = make_model(mistral=mistral).model
    cache, x = KVCache(6, reserve=4), torch.randn(1, 1, decoder.config.hidden_size)
    step = Step(decoder.rotary(torch.tensor([[7]]), x.dtype))

    @torch.inference_mode()
    def token():
        decoder.layers[0](x, step, cache)

    token()
    token()  # from here on there is a buffer
    found = kernels(token)
    assert len(found) <= LAYER, found


def test_views_are_not_counted_and_what_writes_is():
    x = torch.randn(4, 4)
    assert kernels(lambda: x.t()[:, 1:].unsqueeze(0).expand(2, -1, -1).float().to(x.device)) == []
    assert kernels(lambda: (x + 1).argmax(dim=1).cumsum(0)) == ["add", "argmax", "cumsum"]
    assert kernels(lambda: x[:2].copy_(x[2:])) == ["copy_"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_rounds_before_its_weight_is_multiplied(dtype):
    torch.manual_seed(0)
    norm, x = RMSNorm(64, 1e-5).to(dtype), torch.randn(3, 64).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-5)
    wanted = norm.weight * normed.to(dtype)
    tolerance = dict(atol=1e-6, rtol=1e-6) if dtype == torch.float32 else dict(atol=0, rtol=0)
    torch.testing.assert_close(norm(x), wanted, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_turns_pairs_of_values_by_their_angle(dtype):
    x, angles = torch.randn(5, 3, 8), torch.randn(5, 1, 4)
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.cat([pairs.real, pairs.imag], dim=-1)
    rope = rope_of(angles, torch.float32)
    turned = rotate(x.to(dtype), rope)
    assert turned.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(turned.float(), wanted, atol=tolerance, rtol=tolerance)
    assert len(kernels(lambda: rotate(x, rope))) == 3
