"""What a method reads and did not ask for is one sentence, not an error about `None`."""

import pytest
import torch

from llava.pruning import METHODS, ImageTokens, VisionTokens
from llava.pruning.prefill import Prefill
from llava.pruning.required import required
from llava.pruning.trace import PruningTrace


def vision(**fields) -> VisionTokens:
    places = torch.arange(4).expand(2, -1)
    return VisionTokens(torch.randn(2, 4, 3), places, grid=(2, 2), **fields)


def prefill(**fields) -> Prefill:
    places = torch.arange(3)[None]
    return Prefill(None, 5, torch.randn(1, 3, 4), places, places, places, places, None, **fields)


def test_what_is_there_comes_back_as_it_is():
    x = torch.zeros(2, 4)
    assert required(0, "nothing") == 0
    assert vision(salience=x).cue("salience") is x and vision(image_index=x).owners is x
    assert vision(layers={5: {"keys": 2 * x}, 3: {"salience": x}, 1: {}}).layer_cue("salience") is x
    assert vision(project=lambda own: own + 1).projected(x).eq(1).all()
    assert prefill(attention=x).recorded_rows is x and prefill(keys=x).recorded_keys is x


@pytest.mark.parametrize(
    "read, words",
    [
        (lambda: vision().cue("keys"), "'keys' is read but not there: .* names in `needs`"),
        (
            lambda: vision(layers={0: {"output": torch.zeros(1)}}).layer_cue("salience"),
            "'salience' of a tower layer .* names in `tower_extras`",
        ),
        (lambda: vision().owners, "set image_index"),
        (lambda: vision().projected(torch.zeros(1)), "in after_projector alone"),
        (lambda: prefill().recorded_rows, "no attention rows .* layer 5: name the layer before"),
        (lambda: prefill().recorded_keys, "no keys .* layer 5: .* form='keys'"),
        (lambda: ImageTokens(*[torch.zeros(2)] * 3, 2).crop_grid, "set its grid"),
        (lambda: PruningTrace().prompt_size, "no prompt ran"),
    ],
)
def test_what_is_missing_is_said(read, words):
    with pytest.raises(ValueError, match=words):
        read()


@pytest.mark.parametrize("name", ["glimpseprune", "twigvlm", "twigvlm_plus", "cdpruner", "eadp"])
def test_a_trained_part_is_there_once_the_method_is_assigned(name):
    with pytest.raises(ValueError, match=f"{name} .* once it is assigned to a model"):
        _ = METHODS[name]().trained
