"""Ways of computing the same: attention backends, few bits, guessing, streams, several devices."""

import importlib.util

import pytest
import torch

from llava.eval.efficiency.random_model import build_random_model, shapes
from llava.model.builder import load_pretrained_model
from llava.pruning import build_pruner
from llava.pruning.testing.tiny import make_own_grids_model, picture
from tests.conftest import make_pruner, pad_batch
from tests.gpu.sides import (
    answered,
    assert_alike,
    gpu,
    inputs_of,
    loaded,
    method_for,
    usable,
)
from tests.paths import GOLDEN
from tests.pruning.test_twigvlm import grown

OPTIONS = dict(do_sample=False, eos_token_id=-1, pad_token_id=0)
NAMES = ("none", "vispruner", "fastv", "pyramiddrop")
CUDA_CASES = [pytest.param(name, "cuda", marks=gpu) for name in NAMES]
#: products of float16 in another order
HALF_ATOL = 0.05


def needs(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -e '.[{extra}]'")


@pytest.mark.parametrize("name, place", [*CUDA_CASES, ("fastv", "cpu")])
def test_eager_attention_says_what_sdpa_says(place, name, note):
    device = usable(place)
    front = loaded("llava-1.5", device)
    eager = loaded("llava-1.5", device, "--attn-implementation", "eager")
    pruner = method_for(front, "llava-1.5", name)
    wanted = answered(front.model, inputs_of(front, "llava-1.5"))
    own = answered(eager.model, inputs_of(eager, "llava-1.5"), pruner)
    note(assert_alike(own, wanted, 1e-3, 0.04))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpoint", ["llava-1.5", "qwen2.5-vl", "playground"])
def test_flash_attention_says_what_sdpa_says(cuda, checkpoint, name, note):
    needs("flash_attn", "flash")
    words = "--dtype", "bf16" if checkpoint == "qwen2.5-vl" else "fp16"
    front = loaded(checkpoint, cuda, *words)
    flash = loaded(checkpoint, cuda, *words, "--attn-implementation", "flash_attention_2")
    pruner = method_for(front, checkpoint, name)
    wanted = answered(front.model, inputs_of(front, checkpoint), tokens=1)
    own = answered(flash.model, inputs_of(flash, checkpoint), pruner, tokens=1)
    note(assert_alike(own, wanted, HALF_ATOL * wanted.scores.abs().max().item(), 0.1))


@pytest.mark.parametrize("name", NAMES)
def test_flash_attention_packs_padded_rows(cuda, make_model, sample, name):
    needs("flash_attn", "flash")
    found = []
    rows = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2), sample(5, seed=3)]
    ids, mask = (x.to(cuda) for x in pad_batch([row.ids for row in rows]))
    images = torch.cat([row.images for row in rows if row.images is not None]).to(cuda)
    for backend in ("sdpa", "flash_attention_2"):
        model = make_model().to(cuda, torch.float16)
        model.config._attn_implementation = backend
        for layer in model.model.layers:
            layer.self_attn.backend = backend
        model.pruner = make_pruner(name)
        inputs = dict(input_ids=ids, attention_mask=mask, images=images.half(), pad_token_id=0)
        found.append(answered(model, inputs, tokens=1))
    assert_alike(found[1], found[0], HALF_ATOL * found[0].scores.abs().max().item(), 0.1)


@pytest.mark.parametrize("option", ["load_8bit", "load_4bit"])
def test_few_bits_answer_near_half_precision(cuda, tmp_path, option, note):
    """The package's kernels; sizes of the checkpoint as they want them."""
    needs("bitsandbytes", "quant")
    config, tower = shapes(str(GOLDEN / "tiny-qwen2.5-vl-cut"), layers=2)
    config.intermediate_size = 128
    whole = build_random_model(config, tower)
    whole.save_pretrained(tmp_path)
    for file in (GOLDEN / "tiny-qwen2.5-vl-cut").iterdir():
        if not (tmp_path / file.name).exists() and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    scores, ids = [], torch.tensor([[5, 6, 7, 8, 9]], device=cuda)
    held = []
    for options in ({}, {option: True}):
        model = load_pretrained_model(str(tmp_path), None, "qwen", device="cuda", **options)[1]
        with torch.no_grad():
            scores.append(model(ids).logits.float())
        layers = model.model.layers
        held.append(sum(p.nbytes for p in layers.parameters()))
    apart = ((scores[1] - scores[0]).abs().max() / scores[0].abs().max()).item()
    note(f"{option}: logits off by {apart:.1%}, layers hold {held[1] / held[0]:.0%} of the bytes")
    assert apart < (0.2 if option == "load_8bit" else 0.6) and held[1] < 0.75 * held[0]


@pytest.mark.parametrize("pruning", [True, False])
@pytest.mark.parametrize("nodes", [0, 60])
def test_guessed_answers_are_those_of_one_token_at_a_time(
    make_model, sample, device, pruning, nodes
):
    model = make_model()
    model.lm_head.weight.data *= 8
    pruner = grown(model, 2, 2, visual_token_num=30, enable_pruning=pruning, tree_nodes=nodes)
    model = model.to(device)
    model.pruner = pruner
    prompt = sample(4, "image", 5)
    inputs = dict(input_ids=prompt.ids.to(device), images=prompt.images.to(device))
    with torch.no_grad():
        found = [
            model.generate(**inputs, max_new_tokens=9, generation_strategy=strategy, **OPTIONS)
            for strategy in ("autoregressive", "self_speculative")
        ]
    assert torch.equal(*found)


def test_sampled_answers_follow_from_the_seed(make_model, sample, device):
    model, prompt = make_model().to(device), sample(4, "image", 5)
    model.pruner = make_pruner("vispruner")
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(
            model.generate(
                prompt.ids.to(device),
                images=prompt.images.to(device),
                max_new_tokens=8,
                pad_token_id=0,
                do_sample=True,
                temperature=1.0,
            )
        )
    assert torch.equal(*found)


@pytest.mark.parametrize("name, place", [*CUDA_CASES, ("fastv", "cpu")])
def test_the_other_family_answers_batches_as_it_answers_alone(place, name):
    device = usable(place)
    model = make_own_grids_model().to(device)
    model.pruner = make_pruner(name, 6)
    mark, images = model.config.image_token_id, [picture(4, 6, 1), picture(6, 4, 2)]
    rows = [torch.tensor([[1, mark, 7, 8, 9]]), torch.tensor([[1, 5, mark, 6]])]
    ids, mask = (x.to(device) for x in pad_batch([_marked(row, mark) for row in rows]))
    images = [own.to(device) for own in images]
    with torch.no_grad():
        whole = model.generate(ids, attention_mask=mask, images=images, max_new_tokens=5, **OPTIONS)
        for row, own, image in zip(whole, rows, images, strict=True):
            alone = model.generate(
                _marked(own, mark).to(device), images=[image], max_new_tokens=5, **OPTIONS
            )
            assert torch.equal(row, alone[0])


def _marked(ids, mark):
    """Images are -200 in the ids that this project's `generate` takes."""
    return ids.masked_fill(ids == mark, -200)


def test_a_stream_of_its_own_gives_the_same(cuda, make_model, sample):
    model, prompt = make_model().to(cuda), sample(4, "image", 5)
    for name in NAMES:
        model.pruner = make_pruner(name)
        inputs = dict(input_ids=prompt.ids.to(cuda), images=prompt.images.to(cuda))
        torch.cuda.synchronize()
        with torch.no_grad():
            wanted = model.generate(**inputs, max_new_tokens=6, **OPTIONS)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                own = model.generate(**inputs, max_new_tokens=6, **OPTIONS)
            stream.synchronize()
        assert torch.equal(own, wanted), name


@pytest.mark.parametrize("name", NAMES)
def test_two_devices_say_what_one_says(cuda, name, note):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"torch sees {torch.cuda.device_count()} CUDA device, this needs two")
    path = str(GOLDEN / "tiny-llava-v1.5")
    front = loaded("llava-1.5", cuda)
    pruner = method_for(front, "llava-1.5", name)
    wanted = answered(front.model, inputs_of(front, "llava-1.5"))
    half = front.model.config.num_hidden_layers // 2
    places = {"model.embed_tokens": 0, "model.vision_tower": 0, "model.mm_projector": 0}
    places |= {f"model.layers.{n}": int(n >= half) for n in range(2 * half)}
    places |= {"model.norm": 1, "lm_head": 1}
    model = load_pretrained_model(
        path, None, "llava", device_map=places, torch_dtype=torch.float32
    )[1]
    own = answered(model, inputs_of(front, "llava-1.5"), pruner)
    note(assert_alike(own, wanted, 1e-3, 0.04))
    front.model.pruner = build_pruner("none")
