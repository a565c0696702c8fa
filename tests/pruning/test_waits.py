"""How often the host waits for the device until the first token of an answer is there."""

import pytest
import torch

from llava.pruning import METHODS
from tests.conftest import PINPOINTS, SIDE, make_pruner
from tests.second_device import SECOND, Elsewhere, devices, place

CHAINS = ["vispruner+fastv", "pool+pyramiddrop"]
ONE_TOKEN = dict(do_sample=False, max_new_tokens=1, eos_token_id=2, pad_token_id=0)
#: one for the ids of the prompt, one for whether the answer is at its end
PLAIN, ANY_METHOD = 2, 4


def waits(model, name, ids, images, **options) -> list[str]:
    """Of a call that answers one prompt with one token, all of it on the device."""
    model.pruner = make_pruner(name, 50 if isinstance(images, list) else 10)
    place(model, SECOND)
    mask, ids = (Elsewhere(x, SECOND) for x in (torch.ones_like(ids), ids))
    with torch.no_grad(), devices() as log:
        model.generate(ids, attention_mask=mask, images=images, **options, **ONE_TOKEN)
    return log.waits


def check(found: list[str], name: str) -> None:
    assert 0 < len(found) <= (PLAIN if name == "none" else ANY_METHOD), "\n".join(found)


@pytest.mark.parametrize("name", [*METHODS, *CHAINS])
def test_a_prompt_with_one_image_waits_no_more_than_it_has_to(make_model, sample, name):
    prompt = sample(4, "image", 5)
    images = Elsewhere(prompt.images, SECOND)
    check(waits(make_model(), name, prompt.ids, images, questions=["What is it?"]), name)


@pytest.mark.parametrize("name", [n for n in [*METHODS, *CHAINS] if n != "prumerge"])
def test_nor_does_an_image_that_is_cut_into_tiles(make_model, sample, name):
    tiled = {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    model = make_model(image_aspect_ratio="anyres", **tiled)
    tiles = make_pruner(name, 50).vision.anyres_tiles is not None
    crops, size = (5, (2 * SIDE, 2 * SIDE)) if tiles else (3, (SIDE, SIDE // 2))
    images = [Elsewhere(torch.randn(crops, 3, SIDE, SIDE), SECOND)]
    options = dict(image_sizes=[size], questions=["What is it?"])
    check(waits(model, name, sample(4, "image", 5).ids, images, **options), name)


def test_every_kind_of_wait_is_counted():
    x = Elsewhere(torch.tensor([3, 0, 5]), SECOND)
    ways = [
        lambda: x.tolist(),
        lambda: x[0].item(),
        lambda: bool(x[0]),
        lambda: x.cpu(),
        lambda: torch.zeros(3).copy_(x),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.masked_select(x > 0),
        lambda: torch.bincount(x),
        lambda: x.unique(),
        lambda: x.repeat_interleave(x),
        lambda: torch.equal(x, x),
    ]
    for way in ways:
        with devices() as log:
            way()
        assert len(log.waits) == 1, log.waits
    with devices() as log:
        (x + 1).sum().to(SECOND)[None].argsort().repeat_interleave(2)
        torch.tensor([1, 2], device=SECOND)
    assert log.waits == []
