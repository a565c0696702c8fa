"""VisPruner on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning.tokens import VisionTokens
from llava.pruning.vispruner import VisPruner


def select(pruner, features, attention):
    """Sorted patches kept of one crop."""
    features = torch.as_tensor(features, dtype=torch.float32)[None]
    vision = VisionTokens(
        features=features,
        positions=torch.arange(features.shape[1])[None],
        grid=(1, features.shape[1]),
        salience=torch.as_tensor(attention, dtype=torch.float32)[None],
    )
    return sorted(pruner.select(vision)[0].tolist())


def test_attention_alone_keeps_the_most_attended():
    pruner = VisPruner(visual_token_num=2, important_ratio=1.0)
    assert select(pruner, torch.eye(4), [0.1, 0.4, 0.2, 0.3]) == [1, 3]


def test_a_copied_patch_is_dropped_first():
    features = torch.eye(6)[[0, 0, 1, 2, 3, 4]]
    pruner = VisPruner(visual_token_num=5, important_ratio=0.0)
    assert select(pruner, features, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]) == [1, 2, 3, 4, 5]


def test_equal_attention_goes_to_the_lower_patch():
    pruner = VisPruner(visual_token_num=2, important_ratio=1.0)
    assert select(pruner, torch.eye(4), [0.25] * 4) == [0, 1]


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_every_budget_and_ratio_is_met_exactly(count, ratio):
    torch.manual_seed(0)
    pruner = VisPruner(visual_token_num=count, important_ratio=ratio, drop_per_round=3)
    kept = select(pruner, torch.randn(9, 4), torch.rand(9))
    assert len(set(kept)) == count


def test_the_important_share_is_truncated():
    pruner = VisPruner(visual_token_num=5, important_ratio=0.59)
    order = pruner.select(
        VisionTokens(
            features=torch.eye(8)[None],
            positions=torch.arange(8)[None],
            grid=(2, 4),
            salience=torch.arange(8.0).view(1, 8),
        )
    )
    assert order[0, :2].tolist() == [7, 6]


@pytest.mark.parametrize("options", [{"important_ratio": 1.5}, {"drop_per_round": 0}])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match="must"):
        VisPruner(**options)
