"""Prompts and steps of decoding compiled, steps launched as graphs, say what plain ones say."""

import gc
import threading

import pytest
import torch

from llava.eval.efficiency.measure import Workload
from llava.eval.efficiency.profile import profile_tokens
from llava.eval.efficiency.random_model import build_random_model, shapes
from llava.model.language_model.compiling import check_compiler
from llava.pruning.captured import CAPTURES, SETTINGS
from llava.pruning.testing.tiny import make_own_grids_model
from llava.pruning.twigvlm import TwigVLM, grow_twig
from tests.conftest import make_pruner, pad_batch
from tests.gpu.sides import METHOD_NAMES, gpu, usable

OPTIONS = dict(do_sample=False, eos_token_id=-1, pad_token_id=0)
#: more than a bucket of the cache
LONG = 24
#: calls of the host that start something, for a token whose layers are one graph
STARTS = 60
#: bytes that another thread asks the device for, more than torch keeps ready, and how often
TAKEN, MOST_TAKEN = 2**24, 256


@pytest.fixture(autouse=True)
def compiler(request):
    usable("cuda")
    try:
        check_compiler(torch.device("cuda"))
    except RuntimeError as error:
        pytest.skip(str(error))


def both(model, inputs: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers of plain layers and of compiled ones."""
    found = []
    for compiled in (False, True):
        model.compile_decoding = compiled
        assert model.compile_prefill == compiled
        with torch.no_grad():
            out = model.generate(**inputs, **{**OPTIONS, "max_new_tokens": LONG, **options})
        found.append(out.cpu())
    model.compile_decoding = False
    return tuple(found)


def ragged(sample, cuda) -> dict:
    rows = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2), sample(5, seed=3)]
    ids, mask = pad_batch([row.ids for row in rows])
    images = torch.cat([row.images for row in rows if row.images is not None])
    return dict(input_ids=ids.to(cuda), attention_mask=mask.to(cuda), images=images.to(cuda))


@gpu
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_tokens_of_a_ragged_batch_are_those_of_plain_steps(make_model, sample, name):
    model = make_model().to("cuda")
    model.pruner = make_pruner(name)
    assert torch.equal(*both(model, ragged(sample, "cuda")))


@gpu
@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=3),
        dict(repetition_penalty=1.3),
        dict(no_repeat_ngram_size=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("mistral", [False, True])
def test_beams_and_processors_are_those_of_plain_steps(make_model, sample, options, mistral):
    model = make_model(mistral=mistral).to("cuda")
    model.pruner = make_pruner("fastv")
    assert torch.equal(*both(model, ragged(sample, "cuda"), **options))


@gpu
@pytest.mark.parametrize("nodes", [0, 60])
def test_guesses_are_those_of_plain_steps(make_model, sample, nodes):
    model = make_model()
    model.lm_head.weight.data *= 8
    pruner = TwigVLM(twig_K=2, visual_token_num=30, tree_nodes=nodes)
    pruner.module = grow_twig(model, 2, 2).requires_grad_(False)
    model = model.to("cuda")
    model.pruner = pruner
    prompt = sample(4, "image", 5)
    inputs = dict(input_ids=prompt.ids.to("cuda"), images=prompt.images.to("cuda"))
    assert torch.equal(*both(model, inputs, generation_strategy="self_speculative"))


@gpu
def test_the_other_family_says_what_plain_steps_say(sample):
    model = make_own_grids_model().to("cuda")
    model.pruner = make_pruner("none")
    assert torch.equal(*both(model, dict(input_ids=sample(9).ids.to("cuda"))))


@gpu
@pytest.mark.parametrize("modes", [("inference", "plain"), ("plain", "inference")], ids=str)
def test_graphs_are_captured_inside_and_outside_of_inference_mode(make_model, sample, modes):
    """Those of steps and those of loops, of which the third call is captured."""
    model, prompt = make_model().to("cuda"), sample(4, "image", 5)
    model.pruner = make_pruner("divprune")
    inputs = dict(input_ids=prompt.ids.to("cuda"), images=prompt.images.to("cuda"))
    wanted = model.generate(**inputs, **OPTIONS, max_new_tokens=LONG)
    CAPTURES.clear()
    gc.collect()  # what all graphs share is made with the first that there is
    for mode in modes:
        model.compile_decoding = True
        for _ in range(SETTINGS.after + 1):
            with torch.inference_mode(mode == "inference"):
                own = model.generate(**inputs, **OPTIONS, max_new_tokens=LONG)
            assert torch.equal(own, wanted)


@gpu
def test_another_thread_may_take_memory_while_a_step_is_captured(make_model, sample):
    model, held, done, failed = make_model().to("cuda"), [], threading.Event(), []

    def take():
        try:
            while not done.wait(0.001) and len(held) < MOST_TAKEN:
                held.append(torch.zeros(TAKEN, device="cuda", dtype=torch.uint8))
                held[-1].sum().item()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        assert torch.equal(*both(model, ragged(sample, "cuda")))
    finally:
        done.set()
        thread.join()
    assert held and not failed


@gpu
def test_a_token_is_started_by_few_calls_of_the_host(note):
    model = build_random_model(*shapes("small"), dtype=torch.float16, device="cuda")
    workload, found = Workload.random(model, 1, prompt_length=32, num_tokens=6), []
    for compiled in (False, True):
        model.compile_decoding = compiled
        found.append(profile_tokens(model, workload)["per_token"])
    note(f"plain {found[0]}, compiled {found[1]}")
    assert found[1]["launches"] <= STARTS and found[1]["kernels"] < found[0]["kernels"]
