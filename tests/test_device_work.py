"""What a device is asked to do for a prompt and for every further token: kernels, waits, uploads.

On a pretended device, so that no GPU is needed. Numbers may fall; where one has to rise, the limit
here says by how much.
"""

import pytest
import torch

from llava.pruning import METHODS
from llava.pruning.testing.tiny import make_own_grids_model, picture
from tests.conftest import ANYRES, SIDE, make_pruner, pad_batch
from tests.model.test_decode_step import SPECULATE
from tests.pruning.test_twigvlm import grown
from tests.second_device import SECOND, Elsewhere, devices, place

FAMILIES = ("llava", "mistral", "next", "own grids")
GREEDY = dict(do_sample=False, eos_token_id=2, pad_token_id=0)
LAYERS = 6
#: kernels of a layer for a further token; attention counts as the several that it consists of here
PER_LAYER = 36
#: beyond the layers: embedding, last norm, head, choosing the token, whether the answer ends
PER_TOKEN = 40
#: and where tokens stand for others, so that their keys weigh more
PER_BIAS = 20
#: for a tree of guesses: growing it, masks and positions of its levels, what of it is accepted
PER_TREE = 240
#: and where rules look at each token of the way
PER_RULED_TREE = 90
#: waits for a further token: whether the answer has ended
WAITS = 1
#: rules that a tree is walked by; the same kernels for all that look at each token
RULES = [
    {},
    pytest.param({"repetition_penalty": 1.3}, marks=pytest.mark.slow),
    pytest.param({"do_sample": True}, marks=pytest.mark.slow),
]
#: answers of these lengths are compared
SHORT, LONG = 5, 8


def on(x):
    return [on(own) for own in x] if isinstance(x, list) else Elsewhere(x, SECOND)


def asked(make_model, sample, family: str, batch: bool = False) -> tuple:
    """(model, keywords of `generate`): one prompt or two of different lengths, one image each."""
    if family == "own grids":
        model = make_own_grids_model()
        rows = [sample(4, "image", 5).ids, sample(2, "image", 3, seed=1).ids]
        images = [picture(6, 6, 1), picture(6, 6, 2)]
    else:
        model = make_model(mistral=family == "mistral", **(ANYRES if family == "next" else {}))
        prompts = [sample(4, "image", 5), sample(2, "image", 3, seed=1)]
        rows, images = [p.ids for p in prompts], [p.images for p in prompts]
        if family == "next":
            images = [torch.randn(3, 3, SIDE, SIDE) for _ in prompts]
        else:
            images = torch.cat(images)
    count = 2 if batch else 1
    ids, mask = pad_batch(rows[:count])
    inputs = dict(input_ids=on(ids), attention_mask=on(mask), images=on(images[:count]))
    if family == "next":
        inputs["image_sizes"] = [(SIDE, SIDE // 2)] * count
    return model, inputs | {"questions": ["What is it?"] * count}


def log_of(model, inputs: dict, tokens: int, **options):
    with torch.no_grad(), devices() as log:
        # No token ends the answer, but whether one does is asked.
        model.generate(**inputs, **GREEDY, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    return log


def further_token(model, inputs: dict, **options) -> tuple[float, float, float]:
    """(kernels, waits, uploads) of one further token."""
    place(model, SECOND)
    log_of(model, inputs, 2, **options)  # what is made once
    few, many = (log_of(model, inputs, tokens, **options) for tokens in (SHORT, LONG))
    sizes = [(log.kernels.total(), len(log.waits), len(log.uploads)) for log in (few, many)]
    return tuple((b - a) / (LONG - SHORT) for a, b in zip(*sizes, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [False, True])
def test_a_further_token_asks_for_few_kernels_and_one_wait(make_model, sample, family, batch):
    model, inputs = asked(make_model, sample, family, batch)
    model.pruner = make_pruner("none")
    kernels, waits, uploads = further_token(model, inputs)
    assert LAYERS < kernels <= LAYERS * PER_LAYER + PER_TOKEN
    assert waits <= WAITS and uploads == 0


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_a_token_behind_a_pruned_prompt_asks_for_no_more(make_model, sample, name):
    model, inputs = asked(make_model, sample, "llava")
    model.pruner = make_pruner(name)
    kernels, waits, uploads = further_token(model, inputs)
    assert kernels <= LAYERS * PER_LAYER + PER_TOKEN + PER_BIAS
    assert waits <= WAITS and uploads == 0


def guessed(model, inputs, tokens: int, rule: dict) -> tuple:
    """(what `generate` returns, what the devices did) for answers of so many tokens."""
    options = GREEDY | {"eos_token_id": None, "max_new_tokens": tokens, **rule}
    with torch.no_grad(), devices() as log:
        return model.generate(**inputs, **options, **SPECULATE), log


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_step_of_speculation_waits_once_for_every_guess_and_once_for_all(
    make_model, sample, rule
):
    model, inputs = asked(make_model, sample, "llava")
    grown(model, 2, 2, visual_token_num=30, draft_stop_prob=0.0)
    place(model, SECOND)
    place(model.pruner.module, SECOND)
    logs, waits, uploads = [], [], []
    for tokens in (SHORT, 3 * LONG):
        out, log = guessed(model, inputs, tokens, rule)
        logs.append(out.logs[0])
        waits.append(len(log.waits))
        uploads.append(len(log.uploads))
    steps = len(logs[1].accepted) - len(logs[0].accepted)
    assert steps > 1 and any(logs[1].drafts)
    guesses = [sum(map(len, own.drafts)) for own in logs]
    assert waits[1] - waits[0] <= guesses[1] - guesses[0] + steps
    assert uploads[0] == uploads[1]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_step_with_a_tree_of_guesses_waits_once(make_model, sample, rule):
    model, inputs = asked(make_model, sample, "llava")
    grown(model, 2, 2, visual_token_num=30, tree_nodes=60)
    place(model, SECOND)
    place(model.pruner.module, SECOND)
    logs, counts = [], []
    for tokens in (SHORT, 5 * LONG):
        out, log = guessed(model, inputs, tokens, rule)
        logs.append(out.logs[0])
        counts.append((len(log.waits), len(log.uploads), log.kernels.total()))
    steps = len(logs[1].accepted) - len(logs[0].accepted)
    waits, uploads, kernels = (b - a for a, b in zip(*counts, strict=True))
    assert steps > 1 and waits == steps and uploads == 0
    # The newest token and the levels of guesses in the shared layers and those of the twig, the
    # nodes in the shared layers, all of them in the others.
    layers = 4 * (2 + 2) + LAYERS
    assert kernels / steps <= layers * PER_LAYER + PER_TREE + (PER_RULED_TREE if rule else 0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_step_of_a_batch_with_trees_waits_once_for_all_rows(make_model, sample, rule):
    model, inputs = asked(make_model, sample, "llava", batch=True)
    grown(model, 2, 2, visual_token_num=30, tree_nodes=20)
    place(model, SECOND)
    place(model.pruner.module, SECOND)
    steps, counts = [], []
    for tokens in (SHORT, 5 * LONG):
        out, log = guessed(model, inputs, tokens, rule)
        steps.append(max(len(own.accepted) for own in out.logs))
        counts.append((len(log.waits), len(log.uploads)))
    waits, uploads = (b - a for a, b in zip(*counts, strict=True))
    assert steps[1] - steps[0] > 1 and waits == steps[1] - steps[0] and uploads == 0


def test_mixed_devices_and_host_values_are_refused_and_uploads_and_kernels_counted():
    x, host = Elsewhere(torch.arange(6.0), SECOND), torch.arange(3)
    with devices() as log:
        with pytest.raises(RuntimeError, match="add: tensors on different devices"):
            x + torch.ones(6)
        with pytest.raises(TypeError, match="copy it to the host"):
            x.numpy()
    with devices() as log:
        y = (x * 2).view(2, 3).t() + 1
        y.sum(), x + 1.0
    assert log.kernels == {"mul": 1, "add": 2, "sum": 1} and not log.uploads
    with devices() as log:
        host.to(SECOND), torch.tensor([1, 2], device=SECOND), x[host]
    assert len(log.uploads) == 3 and not log.waits
