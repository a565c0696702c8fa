"""What pruning saves on a device: memory, waits for it, kernels and launches per token."""

import warnings

import pytest
import torch

from llava.eval.efficiency.bandwidth import copy_bandwidth
from llava.eval.efficiency.launches import count_launches
from llava.eval.efficiency.measure import (
    STAGES,
    Workload,
    llava_facts,
    make_pruner,
    time_llava,
)
from llava.eval.efficiency.memory import peak_bytes
from llava.eval.efficiency.profile import profile_tokens
from llava.eval.efficiency.random_model import build_random_model, shapes
from llava.pruning import METHODS, Pruner, build_pruner
from tests import conftest
from tests.gpu.sides import CHECKPOINTS, usable
from tests.second_device import SECOND, Elsewhere, devices
from tests.second_device import place as put

BUDGETS = (576, 192, 64)
#: kernels that a GPU may run for an operation that is counted once
SPLIT = 1.5


@pytest.fixture(scope="module")
def small():
    """A decoder of 30 million weights behind the tower of LLaVA-1.5, on the GPU."""
    usable("cuda")
    return build_random_model(*shapes("small"), dtype=torch.float16, device="cuda")


@pytest.mark.parametrize("name", ["vispruner", "fastv", "divprune"])
def test_cache_and_peak_memory_fall_with_the_tokens(cuda, small, name, note):
    workload = Workload.random(small, 8, prompt_length=32, num_tokens=2)
    cache, peaks = [], []
    for budget in BUDGETS:
        pruner = make_pruner(name, budget, small) if budget < 576 else Pruner()
        small.pruner = pruner
        cache.append(llava_facts(small, pruner, workload)["facts"]["kv_bytes"])
        peaks.append(peak_bytes(lambda: workload.run(small), cuda))
    note(
        ", ".join(
            f"{budget} tokens: cache {own / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB"
            for budget, own, peak in zip(BUDGETS, cache, peaks, strict=True)
        )
    )
    assert cache[0] > cache[1] > cache[2] and peaks[0] > peaks[1] >= peaks[2]
    if name != "fastv":  # which keeps all of them in its first layers
        tokens = [budget + 32 for budget in BUDGETS]
        assert [own / cache[0] for own in cache] == pytest.approx([n / tokens[0] for n in tokens])


def test_the_cache_falls_with_the_tokens(device):
    config, tower = shapes(str(CHECKPOINTS["llava-1.5"][0]), layers=4)
    model = build_random_model(config, tower, device=device)
    workload = Workload.random(model, 2, prompt_length=8, num_tokens=2)
    found = []
    for budget in (None, 192, 64):
        pruner = Pruner() if budget is None else make_pruner("vispruner", budget, model)
        found.append(llava_facts(model, pruner, workload)["facts"]["kv_bytes"])
    assert [own / found[0] for own in found] == pytest.approx([1, 200 / 584, 72 / 584])


def waits_of(call) -> list[str]:
    """Where the host waits for the GPU while `call()` runs, as torch sees it."""
    call()  # tables that are made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [own for own in seen if "synchronizing CUDA operation" in str(own.message)]
    return [f"{own.filename}: {own.lineno}" for own in waits]


def test_waits_are_seen(cuda):
    x = torch.arange(5, device=cuda)
    assert len(waits_of(lambda: (x + 1).sum().item())) == 1
    assert waits_of(lambda: (x + 1).sum()) == []


@pytest.mark.parametrize("name", [*METHODS.own, "vispruner+fastv", "pool+pyramiddrop"])
def test_a_prompt_waits_for_the_gpu_as_often_as_for_the_pretended_device(
    cuda, make_model, sample, name, note
):
    """What the pretended device counts is what a GPU does: its waits, and uploads from memory that
    is not pinned, for which torch waits as well."""
    prompt = sample(4, "image", 5)
    one = dict(do_sample=False, max_new_tokens=1, eos_token_id=2, pad_token_id=0)
    one |= dict(questions=["What is it?"])
    model, pruner = make_model().to(cuda), conftest.make_pruner(name)
    model.pruner = pruner
    ids, images = prompt.ids.to(cuda), prompt.images.to(cuda)
    mask = torch.ones_like(ids)

    def ask():
        with torch.no_grad():
            model.generate(ids, attention_mask=mask, images=images, **one)

    found = waits_of(ask)
    other = make_model()
    other.pruner = conftest.make_pruner(name)
    put(other, SECOND)
    with torch.no_grad(), devices() as log:
        other.generate(
            Elsewhere(prompt.ids, SECOND),
            attention_mask=Elsewhere(torch.ones_like(prompt.ids), SECOND),
            images=Elsewhere(prompt.images, SECOND),
            **one,
        )
    uploads = log.uploads
    note(f"{len(found)} waits; pretended: {len(log.waits)} and {len(uploads)} uploads")
    assert len(found) <= len(log.waits) + len(uploads), "\n".join([*found, "", *log.waits])


@pytest.mark.parametrize("name", ["none", "fastv"])
def test_a_token_runs_the_kernels_that_are_counted(cuda, small, name, note):
    pruner = build_pruner() if name == "none" else make_pruner(name, 64, small)
    workload = Workload.random(small, 1, prompt_length=32, num_tokens=6)
    counted = count_launches(small, name, pruner, workload)
    small.pruner = pruner
    found = profile_tokens(small, workload)
    per_token = found["per_token"]
    note(f"{per_token}, counted {counted.per_token}, busy {found['busy_ms']:.2f} ms")
    assert 0 < per_token["kernels"] <= SPLIT * counted.per_token
    assert found["busy_ms"] > 0 and found["top"]


def test_a_copy_is_as_fast_as_a_gpu_makes_it(cuda, note):
    found = copy_bandwidth(cuda)
    note(f"{found / 1e9:.0f} GB/s read and written")
    assert found > 2e10


def test_stages_are_timed_by_the_stream(cuda, small):
    workload = Workload.random(small, 1, prompt_length=32, num_tokens=3)
    found = time_llava(small, make_pruner("vispruner", 64, small), workload)
    assert found.keys() == STAGES.keys() and min(found.values()) > 0
    assert found["vision"] + found["select"] + found["prefill"] <= found["first_token"] * 1.01
