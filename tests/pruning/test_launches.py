"""How many kernels a device is asked to run for every further token that a method picks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava.pruning import build_pruner
from llava.pruning.cdpruner import largest_volume
from llava.pruning.divprune import farthest_first

VIEWS = "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze alias split "
VIEWS += "split_with_sizes diagonal unbind detach unflatten _reshape_alias as_strided narrow"
PICKS, MORE = 16, 24
TOKENS = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))


class Launches(TorchDispatchMode):
    """Counts operations that compute something; views of tensors cost a device nothing."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.split("::")[1] not in VIEWS.split()
        return func(*args, **(kwargs or {}))


def launches(call, *args) -> int:
    with Launches() as mode:
        call(*args)
    return mode.count


def pick_by_volume(count: int) -> None:
    largest_volume(TOKENS, TOKENS[..., 0].abs() + 0.1, count)


def pick_farthest(count: int) -> None:
    farthest_first(TOKENS, count)


def pick_and_damp(count: int) -> None:
    pruner = build_pruner("adaptprune", visual_token_num=count)
    place = torch.arange(64).expand(2, -1)
    side = torch.full_like(place, 8)
    cells = torch.stack([torch.zeros_like(place), place // 8, place % 8, side, side], dim=2)
    pruner.pick(TOKENS[..., 0].softmax(dim=1), TOKENS, cells, count)


def drop_duplicates(count: int) -> None:
    pruner = build_pruner("vispruner", visual_token_num=8, drop_per_round=1)
    pruner.drop_duplicates(TOKENS, torch.arange(64).expand(2, -1), 64 - count)


@pytest.mark.parametrize(
    "pick",
    [pick_by_volume, pick_farthest, pick_and_damp, drop_duplicates],
    ids=lambda f: f.__name__,
)
def test_a_further_pick_costs_at_most_six_kernels(pick):
    further = launches(pick, PICKS + MORE) - launches(pick, PICKS)
    assert 0 < further <= 6 * MORE


def test_what_computes_is_counted_and_views_are_not():
    x = torch.randn(4, 4)
    assert launches(lambda: x.t()[:, 1:].unsqueeze(0).expand(2, -1, -1)) == 0
    assert launches(lambda: (x + 1).argmax(dim=1).cumsum(0)) == 3
