"""Tokens are chosen in fp32 also inside autocast."""

import pytest
import torch

from llava.model.language_model.attention import rows_of
from llava.pruning.attention_cues import attention_extras
from llava.pruning.base import Pruner
from llava.pruning.ops import cosines
from llava.pruning.stages import DecoderStage, VisionStage
from llava.pruning.testing.tiny import make_own_grids_model, picture
from llava.pruning.trace import trace_pruning
from tests.conftest import make_pruner
from tests.model.speculation_tools import GREEDY, SPECULATE, sharpened

RUNS = (
    *("after_encoder", "after_projector", "after_layouts"),
    *("before_prompt", "before_layer", "after_layers"),
)


def found():
    """What selections are made of: cosines, rows of an attention map, cues of a tower."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 4, 20, 8, generator=generator)
    x = torch.randn(1, 20, 16, generator=generator)
    rows = rows_of(q[:, :, -1:], k, torch.tensor([[19]]), None)
    cues = attention_extras(2, 0.5, x, x.flip(2), frozenset({"salience", "attention_mean"}))
    return [cosines(x), rows, *cues.values()]


def test_what_tokens_are_chosen_by_is_the_same_where_products_are_cast():
    alone = found()
    with torch.autocast("cpu", torch.bfloat16):
        inside = found()
    for wanted, own in zip(alone, inside, strict=True):
        assert own.dtype == torch.float32 and torch.equal(own, wanted)


class Watching(VisionStage, DecoderStage, Pruner):
    """Notes in which hooks products are cast."""

    name = "watching"

    def __init__(self):
        self.cast = {}


def watch(name):
    def hook(self, *given):
        self.cast[name] = torch.is_autocast_enabled("cpu")
        return given[-1]

    return hook


for name in RUNS:
    setattr(Watching, name, watch(name))


class WatchingTheTower(Watching):
    before_tower_layer = watch("before_tower_layer")


@pytest.mark.parametrize("family", ["llava", "own grids"])
def test_hooks_run_where_nothing_is_cast(make_model, sample, family):
    own_grids = family == "own grids"
    model, prompt = make_own_grids_model() if own_grids else make_model(), sample(4, "image", 5)
    model.pruner = pruner = Watching() if own_grids else WatchingTheTower()
    images = [picture(4, 5)] if own_grids else prompt.images
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(prompt.ids, images=images, do_sample=False, max_new_tokens=1)
        assert torch.is_autocast_enabled("cpu")
    hooks = RUNS if own_grids else (*RUNS, "before_tower_layer")
    assert pruner.cast == dict.fromkeys(hooks, False)


@pytest.mark.parametrize("name", ["twigvlm", "twigvlm_plus"])
@pytest.mark.parametrize("tree", [{}, {"tree_nodes": 6}])
def test_guesses_are_cast_like_all_other_steps_and_choose_the_same_tokens(
    make_model, sample, name, tree
):
    """The first ones are guessed inside a hook."""
    model, prompt, kept = sharpened(make_model(), 8), sample(4, "image", 5), []
    model.pruner = make_pruner(name, 14)
    with torch.autocast("cpu", torch.bfloat16):
        for options in ({}, SPECULATE | tree):
            with trace_pruning(model) as trace:
                model.generate(prompt.ids, images=prompt.images, **GREEDY, **options)
            kept.append(trace.decoder_keep)
    torch.testing.assert_close(*kept)
