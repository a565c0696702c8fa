"""Attention inside segments of a sequence, of one size or of several."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llava import segments as module
from llava.segments import Segments, attend_within, segments_of

OWNERS = torch.tensor([0, 0, 1, 0, 2, 2, 1, 3, 3, 3])


def tokens(*shape: int, **kind) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(**kind) for _ in range(3)]


def several_sizes() -> Segments:
    return segments_of(OWNERS.bincount()[OWNERS], OWNERS)


def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(v)
    for owner in OWNERS.unique():
        own = owner == OWNERS
        rows = (x[own].transpose(0, 1)[None] for x in (q, k, v))
        out[own] = F.scaled_dot_product_attention(*rows)[0].transpose(0, 1)
    return out


def test_tokens_attend_to_those_of_their_segment():
    q, k, v = tokens(len(OWNERS), 2, 8)
    torch.testing.assert_close(attend_within(q, k, v, several_sizes()), one_by_one(q, k, v))


def test_segments_of_all_sizes_are_one_call_where_torch_has_the_kernel(monkeypatch):
    calls = []

    def varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):
        assert cu_seq_q.dtype == torch.int32 and max_q == max_k == 3
        calls.append(cu_seq_q)
        parts = [slice(*ends) for ends in zip(cu_seq_q[:-1], cu_seq_q[1:], strict=True)]
        rows = [[x[part].transpose(0, 1)[None] for x in (q, k, v)] for part in parts]
        found = [F.scaled_dot_product_attention(*row)[0].transpose(0, 1) for row in rows]
        return torch.cat(found)

    monkeypatch.setattr(module, "takes_all_sizes", lambda q: True)
    monkeypatch.setattr(module, "all_sizes", lambda: varlen)
    (q, k, v), segments = tokens(len(OWNERS), 2, 8), several_sizes()
    for _ in range(2):
        torch.testing.assert_close(attend_within(q, k, v, segments), one_by_one(q, k, v))
    assert len(calls) == 2 and calls[0] is calls[1]  # places are brought to the device once
    attend_within(q, k, v, segments, torch.ones(len(OWNERS), dtype=torch.bool))
    attend_within(q[:4], k[:4], v[:4], Segments(None, None, [(2, 2)]))
    assert len(calls) == 2


def test_on_the_cpu_sizes_are_taken_one_after_the_other():
    assert not module.takes_all_sizes(tokens(1, 1, 8, dtype=torch.float16)[0])
