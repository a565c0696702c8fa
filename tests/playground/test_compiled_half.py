"""The playground's models in half precision: compiled prompts and towers say what plain do."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image

from llava.front_end import FrontEnd
from llava.model.builder import load_pretrained_model
from llava.model.language_model.compiling import check_compiler
from llava.pruning import build_pruner
from playground import questions, scenes
from playground.train import LLAVA
from playground.train_qwen import OUTPUT

pytestmark = pytest.mark.slow
MODELS = {"vicuna_v1": LLAVA, "qwen2_5_vl": OUTPUT}
#: unpruned, cut inside the decoder, chosen in the tower
METHODS = {"none": {}, "fastv": {"visual_token_num": 64}, "visionzip": {"visual_token_num": 64}}
#: roundings of the largest logit by which compiled layers, which round less often, may be further
#: from fp32 than plain ones on average; single logits, such as the end of the text, weigh more than
#: the others. (From each other they are further where a method has two tokens that are nearly equal
#: and leaves one here and the other there: which processor shows one depends on its products.)
STEPS = 4
#: pictures of every row: one prompt, one with several pictures, a padded batch, no picture
ROWS = [(1,), (2,), (1, 2, 0), (0,)]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=MODELS)
def front(request, dtype):
    try:
        check_compiler(torch.device("cpu"))
    except RuntimeError as error:
        pytest.skip(str(error))
    tokenizer, model, processor, _ = load_pretrained_model(
        str(MODELS[request.param]), None, "", device="cpu", torch_dtype=dtype
    )
    return FrontEnd(tokenizer, model, processor, request.param)


def asked(front, rows) -> dict:
    """Inputs of prompts with so many pictures each."""
    prompts, pictures, texts = [], [], []
    for number, count in enumerate(rows):
        shown = [scenes.make_scene(scenes.HELD_OUT_SEEDS + 10 * number + n) for n in range(count)]
        text = "What is this about?"
        if shown:
            text = questions.existence(shown[0], np.random.default_rng(number)).text
        prompts.append(front.encode(front.prompt(text, num_images=count)))
        pictures.append([front.picture(Image.fromarray(scenes.render(scene))) for scene in shown])
        texts.append(text)
    return front.inputs(prompts, pictures, texts)


@pytest.fixture(scope="module")
def exact(front):
    """The same model with the same weights in fp32."""
    return deepcopy(front.model).float()


def answers(model, method, inputs, **options):
    model.pruner = build_pruner(method, **METHODS[method])
    options |= dict(do_sample=False, output_scores=True, return_dict_in_generate=True)
    try:
        return model.generate(**inputs, **options)
    finally:
        model.pruner = build_pruner("none")


def in_fp32(value):
    """Pixels, alone or in lists, in fp32; ids as they are."""
    if isinstance(value, list):
        return [in_fp32(one) for one in value]
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_compiled_prompts_say_what_plain_ones_say(front, exact, dtype, method, rows):
    model, inputs, found = front.model, asked(front, rows), []
    try:
        for model.compile_prefill in (False, True):
            found.append(answers(model, method, inputs, max_new_tokens=8))
    finally:
        model.compile_prefill = False
    inputs = {name: in_fp32(value) for name, value in inputs.items()}
    right = answers(exact, method, inputs, max_new_tokens=1).scores[0]
    plain, compiled = found
    wanted, first = (out.scores[0].float() for out in found)
    within = STEPS * torch.finfo(dtype).eps * wanted.abs().max().item()
    assert (first - right).abs().mean() <= (wanted - right).abs().mean() + within
    apart = (first - wanted).abs()
    # From the first step on whose two best tokens are closer than that, either may be said.
    best = torch.stack(plain.scores, dim=1).float().topk(2).values
    margin = max(within, 2 * apart.max().item())
    clear = (best[..., 0] - best[..., 1] > margin).cumprod(dim=1).bool()
    assert clear[torch.tensor(rows) > 0, 0].all()  # what it was taught
    steps = min(plain.sequences.shape[1], compiled.sequences.shape[1])
    said = (out.sequences[:, :steps][clear[:, :steps]] for out in found)
    assert torch.equal(*said)
