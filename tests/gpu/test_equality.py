"""On a device every method keeps what it keeps on the CPU, and the logits are the same."""

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.pruning.testing.tiny import make_own_grids_model, picture
from tests.conftest import make_pruner, pad_batch
from tests.gpu.sides import (
    CHECKPOINTS,
    FEW,
    METHOD_NAMES,
    TIES,
    answered,
    assert_alike,
    gpu,
    inputs_of,
    loaded,
    method_for,
    usable,
)

CPU = torch.device("cpu")
#: products of float32, summed up in another order through all layers
ATOL = {"llava-1.5": 2e-3, "llava-next": 2e-3, "qwen2.5-vl": 5e-3, "playground": 1e-2}
#: share of the largest logit that half precision may be off; bf16 has three bits less than fp16
HALF = {"fp16": 0.03, "bf16": 0.25}
OPTIONS = dict(do_sample=False, eos_token_id=-1, pad_token_id=0)


def cases():
    """(checkpoint, method, device): all on CUDA, a few on the CPU."""
    for checkpoint in CHECKPOINTS:
        for name in METHOD_NAMES:
            yield pytest.param(checkpoint, name, "cuda", marks=gpu)
    yield from (("llava-1.5", name, "cpu") for name in FEW)
    yield from (("qwen2.5-vl", "vispruner", "cpu"), ("playground", FEW[1], "cpu"))


@pytest.mark.parametrize("checkpoint, name, place", list(cases()))
def test_what_is_kept_and_said_is_what_the_cpu_keeps_and_says(checkpoint, name, place, note):
    device = usable(place)
    front = loaded(checkpoint, CPU)
    pruner = method_for(front, checkpoint, name)
    wanted = answered(front.model, inputs_of(front, checkpoint))
    other = loaded(checkpoint, device)
    own = answered(other.model, inputs_of(other, checkpoint), pruner)
    note(assert_alike(own, wanted, ATOL[checkpoint], TIES))


def some_methods():
    for name in METHOD_NAMES:
        yield pytest.param(name, "cuda", marks=gpu)
    yield from ((name, "cpu") for name in FEW)


@pytest.mark.parametrize("name, place", list(some_methods()))
def test_so_it_is_with_images_that_have_grids_of_their_own(name, place, note):
    """On a random model, whose decoder has layers enough for every method."""
    device = usable(place)
    models = [make_own_grids_model(), make_own_grids_model().to(device)]
    pruner, ids = make_pruner(name), torch.tensor([[1, 7, IMAGE_TOKEN_INDEX, 8, 9]])
    try:
        models[0].pruner = pruner
    except ValueError as error:
        pytest.skip(f"{name} does not run on this family: {error}")
    found = []
    for model, where in zip(models, (CPU, device), strict=True):
        images = [picture(6, 6, 1).to(where)]
        inputs = dict(input_ids=ids.to(where), images=images, questions=["What is it?"])
        found.append(answered(model, {**inputs, "pad_token_id": 0}, pruner))
    note(assert_alike(found[1], found[0], 1e-3, 0.1))


def halves():
    """Methods that choose nothing: a choice may turn with the last bits of half precision."""
    for name in ("none", "pool"):
        yield from (pytest.param(name, dtype, "cuda", marks=gpu) for dtype in HALF)
    yield "none", "bf16", "cpu"


@pytest.mark.parametrize("name, dtype, place", list(halves()))
def test_half_precision_stays_near_float32(name, dtype, place, note):
    device = usable(place)
    front, half = loaded("llava-1.5", device), loaded("llava-1.5", device, "--dtype", dtype)
    pruner = method_for(front, "llava-1.5", name)
    wanted = answered(front.model, inputs_of(front, "llava-1.5"), tokens=1)
    own = answered(half.model, inputs_of(half, "llava-1.5"), pruner, tokens=1)
    front.model.pruner = pruner  # its parts are in float32 again
    apart = (own.scores - wanted.scores).abs().max() / wanted.scores.abs().max()
    note(f"logits off by {apart:.2%} of the largest")
    assert apart < HALF[dtype]


def prompts(sample, device):
    """ids, mask and images of a ragged batch, one row without an image."""
    rows = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2), sample(5, seed=3)]
    ids, mask = pad_batch([row.ids for row in rows])
    images = torch.cat([row.images for row in rows if row.images is not None])
    return rows, ids.to(device), mask.to(device), images.to(device)


@pytest.mark.parametrize("name, place", list(some_methods()))
def test_rows_of_a_batch_are_answered_as_alone(make_model, sample, name, place):
    usable(place)
    model = make_model().to(place)
    model.pruner = make_pruner(name)
    rows, ids, mask, images = prompts(sample, place)
    with torch.no_grad():
        whole = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=6, **OPTIONS)
        for row, prompt in zip(whole, rows, strict=True):
            pixels = None if prompt.images is None else prompt.images.to(place)
            alone = model.generate(prompt.ids.to(place), images=pixels, max_new_tokens=6, **OPTIONS)
            assert torch.equal(row, alone[0])


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)])
def test_beams_are_those_of_the_cpu(make_model, sample, device, options):
    found = []
    for place in (CPU, device):
        model = make_model().to(place)
        model.pruner = make_pruner("fastv")
        _, ids, mask, images = prompts(sample, place)
        more = {**OPTIONS, **options, "max_new_tokens": 4}
        with torch.no_grad():
            found.append(model.generate(ids, images=images, attention_mask=mask, **more).cpu())
    assert torch.equal(*found)
