"""What layers are built of."""

import pytest
import torch

from llava import blocks
from llava.blocks import GatedMLP, in_pieces


@pytest.mark.parametrize("shape", [(2, 5, 8), (10, 8), (1, 1, 8)])
def test_pieces_are_put_together_again(monkeypatch, shape):
    monkeypatch.setattr(blocks, "PIECE", 3)
    torch.manual_seed(0)
    x, mlp, seen = torch.randn(shape), GatedMLP(8, 12), []

    def watched(part):
        seen.append(part.shape[:-1].numel())
        return mlp(part)

    with torch.no_grad():
        torch.testing.assert_close(in_pieces(watched, x), mlp(x))
    assert max(seen) <= 3 and sum(seen) == x.shape[:-1].numel()


def test_where_gradients_are_recorded_there_is_one_piece(monkeypatch):
    monkeypatch.setattr(blocks, "PIECE", 3)
    seen = []
    in_pieces(lambda part: seen.append(part.shape) or part, torch.zeros(2, 5, 8))
    assert seen == [(2, 5, 8)]
