"""How many kernels every method asks a device for beyond the plain model, until the first token.

    python -m tests.pruning.kernels             # a Markdown table; takes some minutes
    python -m tests.pruning.kernels divprune    # of one method

Counted on a pretended device, as they are asked for one by one: models as deep as those of 7B, but
hardly any width, an image of 576 tokens, 50 tokens of text.
"""

from __future__ import annotations

import copy
import sys
import tempfile

import torch

from llava.pruning import METHODS, build_pruner
from llava.pruning.base import option_names
from llava.pruning.testing import tiny
from tests.second_device import SECOND, Elsewhere, devices, place

SIDE = 24  # tokens along an image
BUDGETS = 64, 192
ONE_TOKEN = dict(do_sample=False, max_new_tokens=1, eos_token_id=2, pad_token_id=0)
#: layers of the tower that see whole images
WHOLE = [7, 15, 23, 31]
#: of the tower, which some methods read as well
FOLDER = tempfile.TemporaryDirectory()


def deep_llava():
    sizes = {"num_hidden_layers": 24, "image_size": SIDE * tiny.PATCH}
    return tiny.make_model(tiny.write_tower(FOLDER.name, **sizes), num_hidden_layers=32)


def deep_qwen():
    tower = tiny.OWN_GRIDS_TOWER | {"depth": 32, "fullatt_block_indexes": WHOLE}
    return tiny.make_own_grids_model(tower, num_hidden_layers=28)


def image_of(model) -> torch.Tensor:
    own_grids = model.get_vision_tower().grid is None
    side = SIDE * tiny.PATCH
    return tiny.picture(SIDE, SIDE) if own_grids else torch.randn(3, side, side)


def pruner_of(name: str, budget: int):
    options = (
        {"visual_token_num": budget} if "visual_token_num" in option_names(METHODS[name]) else {}
    )
    return tiny.with_random_parts(build_pruner(name, **options))


def count(model, pruner, images: int = 1) -> int:
    """Kernels of a call that answers as many prompts, each with one image, with one token."""
    model = copy.deepcopy(model)
    model.pruner = pruner
    place(model, SECOND)
    ids = tiny.sample(30, "image", 20).ids.repeat(images, 1)
    pixels = [image_of(model)] * images
    if pixels[0].shape[0] == 3:
        pixels = Elsewhere(torch.stack(pixels), SECOND)
    else:
        pixels = [Elsewhere(x, SECOND) for x in pixels]
    ids, mask = (Elsewhere(x, SECOND) for x in (ids, torch.ones_like(ids)))
    questions = ["What is it?"] * images
    with torch.no_grad(), devices() as log:
        model.generate(ids, attention_mask=mask, images=pixels, questions=questions, **ONE_TOKEN)
    return log.kernels.total()


def beyond(model, name: str, budget: int, plain: int) -> str:
    try:
        return f"{count(model, pruner_of(name, budget)) - plain}"
    except ValueError:  # the method is none for this model
        return "–"


def main(names: list[str]) -> None:
    models = {"LLaVA": deep_llava(), "Qwen2.5-VL": deep_qwen()}
    for _ in range(2):  # the first call of a process has a few more, for what is computed once
        plain = {title: count(model, build_pruner("none")) for title, model in models.items()}
    columns = [f"{title}, {budget} tokens" for title in models for budget in BUDGETS]
    print("| method |", " | ".join(columns), "|")
    print("|---|" + "---:|" * len(columns))
    print("| plain |", " | ".join(f"{plain[title]}" for title in models for _ in BUDGETS), "|")
    for name in names or [name for name in METHODS if name != "none"]:
        cells = [
            beyond(model, name, budget, plain[title])
            for title, model in models.items()
            for budget in BUDGETS
        ]
        print(f"| `{name}` |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
