"""The tiny random models of `llava.pruning.testing` as fixtures."""

from __future__ import annotations

import gc
import json
import os
from functools import partial

import pytest
import torch

from llava.pruning import build_pruner
from llava.pruning.testing import tiny
from llava.pruning.testing.tiny import (  # noqa: F401
    ANYRES,
    PATCH,
    PINPOINTS,
    PROCESSOR,
    SIDE,
    TINY,
    TOWER,
    make_own_grids_model,
    pad_batch,
    with_random_parts,
)
from tests.environment import forget
from tests.paths import GOLDEN

forget(os.environ)


def pytest_collection_finish(session):
    """What is imported and collected by now stays: looking at it again at every collection of
    garbage would take a third of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def compiler():
    """Skips where nothing compiles for the CPU."""
    from llava.model.language_model.compiling import check_compiler, prepare

    try:
        check_compiler(torch.device("cpu"))
    except RuntimeError as error:
        pytest.skip(str(error))
    prepare()  # or torch takes code that another kind of CPU left in its cache


@pytest.fixture(scope="session")
def tower_dir(tmp_path_factory):
    """A full CLIP folder with random weights and the tokenizer of the recorded cases."""
    source = GOLDEN / "tiny-clip-vit-l14-336"
    numbers = json.loads((source / "vocab.json").read_text())
    _, _, merges = (source / "merges.txt").read_text().partition("\n")
    words = sorted(numbers, key=numbers.get)
    return tiny.write_tower(tmp_path_factory.mktemp("tower"), words, merges)


@pytest.fixture(scope="session")
def make_model(tower_dir):
    """make_model(mistral=False, **config) -> a random model in eval mode."""
    return partial(tiny.make_model, tower_dir)


@pytest.fixture(scope="session")
def shared_model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def shared_anyres_model(make_model):
    return make_model(**ANYRES)


@pytest.fixture(scope="session")
def shared_own_grids_model():
    return make_own_grids_model()


@pytest.fixture
def own_grids_model(shared_own_grids_model):
    shared_own_grids_model.pruner = build_pruner("none")
    return shared_own_grids_model


@pytest.fixture
def model(shared_model):
    shared_model.pruner = build_pruner("none")
    return shared_model


@pytest.fixture
def anyres_model(shared_anyres_model):
    shared_anyres_model.pruner = build_pruner("none")
    return shared_anyres_model


@pytest.fixture
def sample():
    """sample(*pieces, seed=0) -> ids (1, L) of a prompt, images (n, 3, S, S)."""
    return tiny.sample


#: methods that cannot go lower on the tiny model
LEAST_BUDGET = {"twigvlm": 6, "twigvlm_plus": 6, "v2drop": 19}


def make_pruner(name: str, visual_token_num: int = 10):
    """A method with a small budget; methods without one as they are."""
    return tiny.make_pruner(name, visual_token_num, LEAST_BUDGET.get(name, 1))
