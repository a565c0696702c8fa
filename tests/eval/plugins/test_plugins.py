"""The plug-ins of lmms-eval and VLMEvalKit, on the real packages where they are installed and on
stand-ins with their interface where they are not."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from llava.eval.plugins.model import ask, open_loop, read_pruner
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import build_pruner
from tests.paths import ROOT

CHECKPOINT = str(ROOT / "tests" / "golden" / "tiny-llava-v1.5")
IMAGES = sorted((ROOT / "tests" / "golden" / "images").glob("*.png"))[:2]
OPTIONS = {"dtype": "float32", "device": "cpu"}


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


class Lmms:
    """What lmms-eval 0.7.3 promises its models."""

    is_simple = True

    def __init__(self):
        self.task_dict = {}


class Kit:
    """What VLMEvalKit promises its models, and how it calls them."""

    def generate(self, message, dataset=None):
        return self.generate_inner([dict(part) for part in message], dataset)


def stand_in(monkeypatch, **modules):
    for name, content in modules.items():
        parts = name.split("__")
        for count in range(1, len(parts) + 1):
            path = ".".join(parts[:count])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        vars(sys.modules[".".join(parts)]).update(content)


def load(monkeypatch, name: str, package: str, **modules):
    try:
        importlib.import_module(package)
    except ImportError:
        stand_in(monkeypatch, **modules)
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def lmms(monkeypatch):
    return load(
        monkeypatch,
        "llava.eval.plugins.lmms",
        "lmms_eval.api.model",
        lmms_eval__api__model={"lmms": Lmms},
        lmms_eval__models__registry_v2={"ModelManifest": Manifest},
    )


@pytest.fixture
def shim(monkeypatch):
    return load(
        monkeypatch,
        "llava.eval.plugins.vlmeval",
        "vlmeval.vlm.base",
        vlmeval__config={"supported_VLM": {}},
        vlmeval__vlm__base={"BaseModel": Kit},
    )


@pytest.fixture(scope="module")
def expected():
    """Answers of the answer loop to two prompts with 64 tokens."""
    pruner = build_pruner("random", visual_token_num=64, seed=3)
    loop = open_loop(CHECKPOINT, pruner=pruner, **OPTIONS)
    prompts = [("What is this?", [Image.open(IMAGES[0])]), ("And that?", [Image.open(IMAGES[1])])]
    return [ask(loop, [prompt], 5)[0] for prompt in prompts]


def test_lmms_eval_gets_the_answers_of_the_answer_loop(lmms, expected):
    model = lmms.LlavaPruning(
        CHECKPOINT, "random", "64", "seed=3", batch_size="2", conv_template="auto", **OPTIONS
    )
    pictures = {"pope": {"test": [[Image.open(path)] for path in IMAGES]}}
    model.task_dict = pictures
    asked = [("What is this?", 0), ("And that?", 1), ("And that?", 1)]
    settings = [{"max_new_tokens": 5}] * 2 + [{"max_new_tokens": 5, "until": expected[1][1:3]}]
    requests = [
        SimpleNamespace(args=(text, own, lambda doc: doc, doc, "pope", "test"))
        for (text, doc), own in zip(asked, settings, strict=True)
    ]
    answers = model.generate_until(requests)
    assert answers[:2] == expected
    assert answers[2] == expected[1].split(expected[1][1:3])[0].strip()


def test_lmms_eval_may_name_options_one_by_one_and_no_method(lmms):
    model = lmms.LlavaPruning(CHECKPOINT, visual_token_num=48, important_ratio=0.25, **OPTIONS)
    expected = build_pruner("vispruner", visual_token_num=48, important_ratio=0.25)
    assert model.loop.model.pruner == expected
    with pytest.raises(TypeError, match="unknown model_args of llava_pruning: colour"):
        lmms.LlavaPruning(CHECKPOINT, colour="red", **OPTIONS)


def test_lmms_eval_may_name_what_the_release_of_glimpseprune_names(lmms, monkeypatch):
    parts = str(ROOT / "playground/checkpoints/glimpseprune-playground")
    model = lmms.LlavaPruning(
        new_modules_dir=parts,
        max_remain_ratio="0.111",
        min_remain_num=2,
        attn_implementation="eager",
        system_prompt="Be brief.",
        reasoning_prompt="\nThink.",
        use_cache="True",
        **OPTIONS,
    )
    pruner = model.loop.model.pruner
    assert (pruner.name, pruner.new_modules) == ("glimpseprune", parts)
    assert (pruner.max_remain_ratio, pruner.min_remain_num) == (0.111, 2)
    assert model.loop.model.model.layers[0].self_attn.backend == "eager"
    asked = []
    monkeypatch.setattr(lmms, "ask", lambda loop, prompts, length: asked.extend(prompts) or ["a"])
    model.task_dict = {"t": {"s": [[]]}}
    model.generate_until([SimpleNamespace(args=("What? ", {}, lambda doc: doc, 0, "t", "s"))])
    assert asked == [("What?\nThink.", [])]
    assert model.loop.front.prompt("What?").startswith("Be brief. USER: What?")
    with pytest.raises(
        ValueError, match="use_cache=False: llava_pruning works with use_cache=True"
    ):
        lmms.LlavaPruning(CHECKPOINT, use_cache=False, **OPTIONS)
    with pytest.raises(TypeError, match="unknown model_args of llava_pruning: reduce_layer"):
        lmms.LlavaPruning(CHECKPOINT, reduce_layer=18, **OPTIONS)


def test_an_adapter_is_put_on_the_checkpoint(monkeypatch):
    given = []
    monkeypatch.setattr("llava.eval.plugins.model.load_loop", given.append)
    monkeypatch.setattr("llava.eval.plugins.model.resolve_conv_mode", lambda *names: names)
    with pytest.raises(AttributeError):  # there is no loop
        open_loop("Qwen/Qwen2.5-VL-7B-Instruct", adapter_dir="a/adapter")
    assert (given[0].model_path, given[0].model_base) == (
        "a/adapter",
        "Qwen/Qwen2.5-VL-7B-Instruct",
    )
    with pytest.raises(ValueError, match="model_base and adapter_dir"):
        open_loop("a", "b", adapter_dir="c")


def test_what_lmms_evals_own_llava_model_asks_for_works():
    """Its calls, with what it passes: `multimodal`, pixels in half precision on any device, a batch
    padded on the side of the tokenizer, and the loss of a choice."""
    options = {"multimodal": True, "attn_implementation": "sdpa", "device_map": "cpu"}
    with pytest.raises(TypeError, match="customized_config"):
        load_pretrained_model(CHECKPOINT, None, "llava", **options, customized_config="a.json")
    tokenizer, model, processor, _ = load_pretrained_model(CHECKPOINT, None, "llava", **options)
    model.tie_weights()
    images = [Image.open(path).convert("RGB") for path in IMAGES]
    pixels = process_images(images, processor, model.image_settings).half()
    prompts = [
        tokenizer_image_token(f"USER: <image>\n{text} ASSISTANT:", tokenizer, return_tensors="pt")
        for text in ("What is this?", "And what is that on the table?")
    ]
    pad = tokenizer.pad_token_id
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad)
    sizes = [image.size for image in images]
    asked = dict(do_sample=False, temperature=0, top_p=None, num_beams=1, max_new_tokens=4)
    asked |= dict(use_cache=True, pad_token_id=pad)
    both = model.generate(
        ids, attention_mask=ids.ne(pad), images=pixels, image_sizes=sizes, **asked
    )
    for row, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
        picture = pixels[row : row + 1]
        alone = model.generate(prompt[None], images=picture, image_sizes=[size], **asked)
        assert torch.equal(both[row], alone[0])
    out = model(prompts[0][None], labels=prompts[0][None], images=pixels[:1], use_cache=True)
    assert out["loss"] > 0 and out["logits"].ndim == 3


def test_the_example_task_of_lmms_eval_names_what_is_there(monkeypatch):
    folder = ROOT / "scripts" / "lmms_eval"
    text = (folder / "playground_pope.yaml").read_text()
    monkeypatch.syspath_prepend(folder)
    functions = importlib.import_module("playground_pope")
    names = re.findall(r"!function playground_pope\.(\w+)", text)
    assert len(names) == 2 and all(callable(getattr(functions, name)) for name in names)
    (files,) = re.findall(r"test: (\S+)", text)
    docs = [json.loads(line) for path in ROOT.glob(files) for line in path.open()]
    assert len(docs) == 720 and {doc["label"] for doc in docs} == {"yes", "no"}
    assert functions.doc_to_visual(docs[0])[0].mode == "RGB"
    asked = {
        json.loads(line)["text"]
        for line in (ROOT / files).parent.parent.joinpath("llava_pope_test.jsonl").open()
    }
    assert {functions.doc_to_text(doc) for doc in docs} == asked


def test_every_process_of_lmms_eval_has_its_own_gpu(lmms, monkeypatch):
    """lmms-eval names no device; without one all processes would share the first GPU."""
    asked = []
    monkeypatch.setattr(lmms, "open_loop", lambda *given: asked.append(given[4]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for environment in ({}, {"WORLD_SIZE": "4", "LOCAL_RANK": "3"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        lmms.LlavaPruning(CHECKPOINT)
    lmms.LlavaPruning(CHECKPOINT, device="cuda:0")
    assert asked == [None, "cuda:1", "cuda:0"]


def test_a_choice_is_rated_by_its_loss(lmms):
    """As lmms-eval's own models do: it takes the choice with the smallest number, and it puts a
    space in front of every one."""
    model = lmms.LlavaPruning(CHECKPOINT, "fastv", 64, "layer=1", **OPTIONS)
    image = Image.open(IMAGES[0])
    model.task_dict = {"t": {"s": [[image]]}}
    requests = [
        SimpleNamespace(args=("What?", choice, lambda doc: doc, 0, "t", "s"))
        for choice in ("yes it is", " yes it is")
    ]
    (loss, greedy), spaced = model.loglikelihood(requests)
    front = model.loop.front
    prompt = front.prompt("What?", num_images=1)
    context, ids = (
        tokenizer_image_token(text, front.tokenizer, return_tensors="pt")[None]
        for text in (prompt, f"{prompt} yes it is")
    )
    labels = ids.clone()
    labels[:, : context.shape[1]] = -100
    pixels = process_images(
        [image.convert("RGB")], front.image_processor, front.model.image_settings
    )
    expected = front.model(ids, images=pixels, labels=labels, image_sizes=[image.size]).loss
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert spaced == (loss, greedy) and greedy is False


def test_the_entry_point_names_the_plug_in(lmms):
    found = lmms.manifest()
    module, name = found.simple_class_path.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name).is_simple is True
    setup = (ROOT / "setup.py").read_text()
    assert re.search(rf'"lmms_eval.models": \["{found.model_id} = {module}:manifest"\]', setup)


def test_vlmevalkit_knows_a_registered_setting_by_name(shim, expected):
    shim.register("tiny64", CHECKPOINT, "random", 64, pruning_args="seed=3", **OPTIONS)
    model = shim.supported_VLM["tiny64"](max_new_tokens=5)
    message = [
        {"type": "image", "value": str(IMAGES[0])},
        {"type": "text", "value": "What is this?"},
    ]
    assert model.generate(message) == expected[0]


QWEN = str(ROOT / "tests" / "golden" / "tiny-qwen2.5-vl-cut")


def test_qwen_answers_through_both_plug_ins_as_through_the_answer_loop(lmms, shim):
    pruner = build_pruner("random", visual_token_num=3, seed=3)
    loop = open_loop(QWEN, pruner=pruner, max_pixels=8 * 28 * 28, **OPTIONS)
    expected = [
        ask(loop, [("What is this?", [Image.open(path)])], max_new_tokens=4)[0] for path in IMAGES
    ]
    assert loop.front.picture(Image.open(IMAGES[0])).pixels[..., 0, 0].numel() <= 8
    model = lmms.LlavaPruning(
        QWEN, "random", "3", "seed=3", batch_size="2", max_pixels=str(8 * 28 * 28), **OPTIONS
    )
    model.task_dict = {"pope": {"test": [[Image.open(path)] for path in IMAGES]}}
    requests = [
        SimpleNamespace(
            args=("What is this?", {"max_new_tokens": 4}, lambda doc: doc, doc, "pope", "test")
        )
        for doc in range(2)
    ]
    assert model.generate_until(requests) == expected
    shim.register("q", QWEN, "random", 3, pruning_args="seed=3", max_pixels=6272, **OPTIONS)
    kit = shim.supported_VLM["q"](max_new_tokens=4)
    picture = {"type": "image", "value": str(IMAGES[0])}
    assert kit.generate([picture, {"type": "text", "value": "What is this?"}]) == expected[0]


def test_a_choice_of_qwen_begins_right_behind_the_template(lmms):
    """Whose last sign is a line break: a space would be another token than the model's own."""
    model = lmms.LlavaPruning(QWEN, max_pixels=6272, **OPTIONS)
    image = Image.open(IMAGES[0])
    model.task_dict = {"t": {"s": [[image]]}}
    request = SimpleNamespace(args=("What?", " yes", lambda doc: doc, 0, "t", "s"))
    ((loss, _),) = model.loglikelihood([request])
    front = model.loop.front
    prompt = front.prompt("What?", num_images=1)
    context, whole = front.encode(prompt), front.encode(prompt + "yes")
    labels = whole[None].clone()
    labels[:, : len(context)] = -100
    pixels = [front.picture(image.convert("RGB")).pixels]
    expected = front.model(whole[None], images=pixels, labels=labels).loss
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_options_come_as_strings():
    pruner = read_pruner("vispruner", "32", "important_ratio=0.25; drop_per_round=4")
    assert pruner == build_pruner(
        "vispruner", visual_token_num=32, important_ratio=0.25, drop_per_round=4
    )
    with pytest.raises(ValueError, match="unknown option 'speed'"):
        read_pruner("random", None, "speed=3")


def test_a_missing_program_is_named(monkeypatch):
    for name, package, advice in (
        ("llava.eval.plugins.lmms", "lmms_eval", "docs/Comparing.md says how to install the two"),
        ("llava.eval.plugins.vlmeval", "vlmeval", "from the folder of its run.py"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(ImportError, match=f"not installed here.*{advice}"):
            importlib.import_module(name)
