"""Attention of few queries on a CPU: what plain attention gives, by the way that suits."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from llava import linear
from llava.model.language_model import few_queries
from llava.model.language_model.attention import attend, causal_mask, padded_causal_mask

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setattr(few_queries, "threads", lambda: 2)


def made(queries, heads=(6, 2), keys=20, batch=2, dtype=torch.float32):
    """Queries (B, H, Q, d), and keys and values (B, G, K, d) that are part of a larger buffer."""
    generator = torch.Generator().manual_seed(queries)
    shapes = [(batch, heads[0], queries, 8)] + 2 * [(batch, heads[1], keys + 5, 8)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k[:, :, :keys], v[:, :, :keys]


def mask_of(kind, queries, keys=20):
    """A mask of 2 rows, the first with padding: None, True and False, or numbers."""
    if kind == "none":
        return None
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[0, :4] = False
    seen = padded_causal_mask(valid, queries)
    if queries > 1:
        seen = seen[:, :, -queries:]
    return seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


def plain(q, k, v, mask):
    """Attention written out."""
    q, k, v = q.float(), k.float(), v.float()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    return (scores + mask).softmax(dim=-1) @ v


def asked_kernel(monkeypatch):
    """What SDPA is called with: shapes of queries and keys, and whether heads share keys."""
    calls, own = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        calls.append((tuple(q.shape), tuple(k.shape), enable_gqa))
        return own(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["none", "bool", "numbers"])
@pytest.mark.parametrize("heads", [(6, 2), (6, 6)])
@pytest.mark.parametrize("queries", [1, 3, 16, 17])
def test_few_queries_see_what_plain_attention_shows(
    queries, heads, kind, dtype, intel, monkeypatch
):
    monkeypatch.setattr(linear, "ON_INTEL", intel)
    q, k, v = made(queries, heads, dtype=dtype)
    mask = mask_of(kind, queries)
    given = mask if mask is None or mask.dtype is torch.bool else mask.to(dtype)
    found = attend(q, k, v, given, "sdpa")
    assert found.shape == q.shape and found.dtype is dtype
    near = TOLERANCE[dtype]
    torch.testing.assert_close(found.float(), plain(q, k, v, mask), atol=near, rtol=near)


@pytest.mark.parametrize("queries, rows", [(1, 3), (4, 12), (16, 48)])
def test_heads_that_share_keys_read_them_once(queries, rows, monkeypatch):
    calls = asked_kernel(monkeypatch)
    q, k, v = made(queries)
    attend(q, k, v, mask_of("numbers", queries), "sdpa")
    assert calls == [((2, 2, rows, 8), (2, 2, 20, 8), False)]


def test_heads_that_share_keys_stay_apart_where_threads_would_wait(monkeypatch):
    monkeypatch.setattr(few_queries, "threads", lambda: 5)
    calls = asked_kernel(monkeypatch)
    attend(*made(1), None, "sdpa")
    attend(*made(1, (6, 3)), None, "sdpa")
    assert [call[2] for call in calls] == [True, False]


def test_many_queries_are_left_to_the_kernel_for_groups(monkeypatch):
    """There the mask, once for each of the heads, would be large."""
    calls = asked_kernel(monkeypatch)
    q, k, v = made(17)
    attend(q, k, v, mask_of("numbers", 17), "sdpa")
    assert calls == [((2, 6, 17, 8), (2, 2, 20, 8), True)]


@pytest.mark.parametrize(
    "dtype, intel, rows",
    [(torch.bfloat16, False, 2), (torch.bfloat16, True, 1), (torch.float32, False, 1)],
)
def test_a_single_query_in_bfloat16_is_asked_twice_where_that_is_faster(
    dtype, intel, rows, monkeypatch
):
    monkeypatch.setattr(linear, "ON_INTEL", intel)
    calls = asked_kernel(monkeypatch)
    q, k, v = made(1, (6, 6), dtype=dtype)
    attend(q, k, v, None, "sdpa")
    assert [call[0][2] for call in calls] == [rows]


def test_operations_are_counted_as_on_a_gpu(monkeypatch):
    calls = asked_kernel(monkeypatch)
    with linear.as_on_a_gpu():
        attend(*made(1), None, "sdpa")
    assert calls == [((2, 6, 1, 8), (2, 2, 20, 8), True)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_single_compiled_query_is_a_loop_over_keys_and_one_over_values(
    dtype, monkeypatch, compiler
):
    monkeypatch.setattr(linear, "ON_INTEL", False)
    torch._dynamo.reset()
    q, k, v = made(1, (6, 6), dtype=dtype)
    mask = mask_of("numbers", 1)
    run = torch.compile(attend, fullgraph=True, dynamic=False)
    found, code = torch._inductor.utils.run_and_get_code(run, q, k, v, mask.to(dtype), "sdpa")
    near = TOLERANCE[dtype]
    torch.testing.assert_close(found.float(), plain(q, k, v, mask), atol=near, rtol=near)
    assert "scaled_dot_product" not in "".join(code).replace("fused__scaled_dot_product", "")


OTHERS = [(True, 1, 6), (False, 2, 6), (False, 1, 2)]


@torch.no_grad()
@pytest.mark.parametrize("intel, queries, groups", OTHERS)
def test_other_compiled_queries_are_left_to_the_kernel(intel, queries, groups, monkeypatch):
    """On Intel's processors all; elsewhere several, and those of heads that share keys."""
    monkeypatch.setattr(linear, "ON_INTEL", intel)
    monkeypatch.setattr(few_queries, "_looped", None)
    torch._dynamo.reset()
    q, k, v = made(queries, (6, groups))
    mask = mask_of("numbers", queries)
    run = torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(run(q, k, v, mask, "sdpa"), plain(q, k, v, mask))


@torch.no_grad()
@pytest.mark.parametrize("heads", [(6, 2), (6, 6)])
def test_a_graph_for_any_number_of_queries_serves_few_of_them_too(heads, monkeypatch):
    monkeypatch.setattr(linear, "ON_INTEL", False)
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for queries in (3, 2, 17, 8, 16, 5):
        q, k, v = made(queries, heads)
        mask = mask_of("numbers", queries)
        torch.testing.assert_close(run(q, k, v, mask, "sdpa"), plain(q, k, v, mask))
    assert counter.frame_count == 1
