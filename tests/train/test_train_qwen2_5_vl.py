"""Qwen2.5-VL through `llava.train.train`: data as of LLaVA, images with grids of their own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.front_end import FrontEnd
from llava.model.language_model import modeling_llama
from llava.model.language_model.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from llava.model.qwen2_5_vl_loading import load_image_processor, load_tokenizer
from llava.train.data import make_supervised_data_module
from llava.train.sample_images import GridImages
from llava.train.train import train
from tests.paths import GOLDEN

CHECKPOINT = GOLDEN / "tiny-qwen2.5-vl-cut"
TEMPLATE = conv_templates["qwen2_5_vl"]
SIZES = {"wide.png": (150, 60), "tall.png": (64, 120), "small.png": (30, 30)}


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


SAMPLES = [
    {"id": "one", "image": "wide.png", "conversations": turns("<image>\nWhat is it?", "A ring.")},
    {
        "id": "two",
        "image": ["tall.png", "wide.png"],
        "conversations": turns(
            "<image>\nHere is one, <image> here another: which is taller?", "The first.\n\nLook.",
            "Why?", "It is.",
        ),
    },
    {"id": "text", "conversations": turns("Hello", "Hi")},
    {"id": "later", "image": "small.png", "conversations": turns("Hi", "Hi", "<image>Big?", "No")},
    {"id": "system", "system": "Be brief.", "conversations": turns("How many?", "3, é…")},
    {"id": "again", "image": "tall.png", "conversations": turns("Where?\n<image>", "Left.")},
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures and the samples about them."""
    return make_place(tmp_path_factory.mktemp("data"))


def make_place(folder):
    for number, (name, size) in enumerate(SIZES.items()):
        Image.effect_noise(size, 50 + number).convert("RGB").save(folder / name)
    (folder / "data.json").write_text(json.dumps(SAMPLES))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return readied(load_tokenizer(str(CHECKPOINT), Qwen2_5_VLConfig.from_pretrained(CHECKPOINT)))


def readied(tokenizer):
    tokenizer.padding_side, tokenizer.model_max_length = "right", 512
    return tokenizer


def make_data(place, tokenizer, samples=None, name="data.json", **args):
    if samples is not None:
        name = "changed.json"
        (place / name).write_text(json.dumps(samples))
    args = SimpleNamespace(
        data_path=str(place / name), image_folder=str(place), is_multimodal=True, **args
    )
    config, processor = Qwen2_5_VLConfig, load_image_processor(str(CHECKPOINT))
    args.sample_images = GridImages(args, processor, config.image_mark, config.image_separator)
    return make_supervised_data_module(tokenizer, args, TEMPLATE)


@pytest.fixture(scope="module")
def data(place, tokenizer):
    return make_data(place, tokenizer)


def command_line(place, output, *flags):
    words = {
        "--model_name_or_path": CHECKPOINT,
        "--data_path": place / "data.json",
        "--image_folder": place,
        "--output_dir": output,
        "--use_cpu": True,
        "--model_max_length": 512,
        "--per_device_train_batch_size": 2,
        "--learning_rate": 3e-3,
        "--lr_scheduler_type": "constant",
        "--logging_steps": 1,
        "--report_to": "none",
        "--disable_tqdm": True,
        "--max_steps": 3,
        "--save_strategy": "no",
    }
    return [*(str(word) for pair in words.items() for word in pair), *map(str, flags)]


def run(place, output, *flags):
    return train(command_line(place, output, *flags))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def answers_of(model):
    """The model's logits for a fixed prompt."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, 3, 4, 1176, generator=generator)]
    ids = torch.tensor([[5, 9, IMAGE_TOKEN_INDEX, 7, 8]])
    with torch.no_grad():
        return model.eval()(ids, images=images).logits


# --- data ---------------------------------------------------------------------------------------


def test_ids_are_those_of_the_checkpoints_chat_template(data, tokenizer):
    template = json.loads((CHECKPOINT / "chat_template.json").read_text())["chat_template"]
    for item, sample in zip(data["train_dataset"], SAMPLES, strict=True):
        messages = [{"role": "system", "content": sample["system"]}] if "system" in sample else []
        for message in sample["conversations"]:
            parts = []
            for number, text in enumerate(message["value"].split("<image>")):
                parts += [{"type": "image"}] if number else []
                parts += [{"type": "text", "text": text.removeprefix("\n") if number else text}]
            role = {"human": "user", "gpt": "assistant"}[message["from"]]
            messages.append({"role": role, "content": parts})
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        ids = torch.tensor(tokenizer(text).input_ids)
        mark = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert item["input_ids"].tolist() == ids.masked_fill(ids == mark, -200).tolist()


def test_answers_and_their_end_marks_are_learned_and_nothing_else(data, tokenizer):
    for item, sample in zip(data["train_dataset"], SAMPLES, strict=True):
        learned = item["labels"] != IGNORE_INDEX
        assert torch.equal(item["labels"][learned], item["input_ids"][learned])
        said = [m["value"] + "<|im_end|>" for m in sample["conversations"] if m["from"] == "gpt"]
        assert tokenizer.decode(item["labels"][learned]) == "".join(said)
        assert int((item["labels"] == tokenizer.eos_token_id).sum()) == len(said)


def test_a_tokenizer_without_offsets_gives_the_same_labels(data, place):
    from transformers import Qwen2Tokenizer

    slow = readied(Qwen2Tokenizer.from_pretrained(CHECKPOINT))
    for fast_item, slow_item in zip(
        data["train_dataset"], make_data(place, slow)["train_dataset"], strict=True
    ):
        assert torch.equal(fast_item["input_ids"], slow_item["input_ids"])
        assert torch.equal(fast_item["labels"], slow_item["labels"])


def test_a_training_prompt_begins_like_a_question(data, tokenizer):
    model = SimpleNamespace(config=Qwen2_5_VLConfig)
    front = FrontEnd(tokenizer, model, None, "qwen2_5_vl")
    asked = front.encode(front.prompt(SAMPLES[0]["conversations"][0]["value"])).tolist()
    assert data["train_dataset"][0]["input_ids"].tolist()[: len(asked)] == asked


def test_images_are_those_of_the_samples_in_order(data):
    dataset, collator = data["train_dataset"], data["data_collator"]
    batch = collator([dataset[i] for i in range(len(SAMPLES))])
    grids = [tuple(image.shape[:2]) for image in batch["images"]]
    assert grids == [(2, 5), (4, 2), (2, 5), (2, 2), (4, 2)]
    assert int((batch["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == 5
    blank = collator([dataset[2], dataset[4]])["images"]
    assert len(blank) == 2 and not any(image.any() for image in blank)


def test_lengths_count_the_tokens_of_every_image(data):
    words = [6, 16, 2, 4, 6, 3]
    visual = [10, 18, 0, 4, 0, 8]
    lengths = [count + own for count, own in zip(words, visual, strict=True)]
    assert data["train_dataset"].lengths == lengths
    signs = [1, 1, -1, 1, -1, 1]
    signed = [n * sign for n, sign in zip(lengths, signs, strict=True)]
    assert data["train_dataset"].modality_lengths == signed


def test_images_behind_the_cut_are_not_in_the_batch(place):
    short = readied(load_tokenizer(str(CHECKPOINT), Qwen2_5_VLConfig.from_pretrained(CHECKPOINT)))
    data = make_data(place, short)
    short.model_max_length = int((data["train_dataset"][1]["input_ids"] == -200).nonzero()[1])
    batch = data["data_collator"]([data["train_dataset"][1], data["train_dataset"][0]])
    assert [tuple(image.shape[:2]) for image in batch["images"]] == [(4, 2), (2, 5)]


def changed(number=0, **values):
    sample = {**SAMPLES[number], **values}
    return [SAMPLES[2], {key: value for key, value in sample.items() if value is not None}]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (changed(image=["wide.png", "tall.png"]), "has 2 images, but its messages hold <image> 1"),
        (changed(1, image="wide.png"), "has 1 image, but its messages hold <image> 2 times"),
        (changed(conversations=turns("What?", "A ring.")), "has an image, but no message holds"),
        (changed(conversations=turns("<image>", "<image>")), "<image> stands in an answer"),
        (changed(1, image=["wide.png", 7]), "image holds 7, expected paths"),
        (changed(1, image=["wide.png", "gone.png"]), "there is no file .*gone.png"),
        (changed(image="broken.png"), "broken.png: it is damaged or in a format"),
        (changed(image="thin.png"), "2000 x 5 pixels is too small"),
        (changed(2, conversations=turns("<|image_pad|>", "Hi")), "write <image> where an image"),
    ],
)
def test_a_mistake_is_named_with_its_sample_before_the_first_step(
    place, tokenizer, samples, message
):
    (place / "broken.png").write_text("no image")
    Image.new("RGB", (2000, 5)).save(place / "thin.png")
    named = f"sample 1 \\(id '{samples[1]['id']}'\\): .*{message}"
    with pytest.raises(ValueError, match=f"changed.json: 1 of 2 .*\n  {named}"):
        make_data(place, tokenizer, samples)


def test_answers_behind_large_images_are_missed(place, caplog):
    short = readied(load_tokenizer(str(CHECKPOINT), Qwen2_5_VLConfig.from_pretrained(CHECKPOINT)))
    short.model_max_length = 60
    make_data(place, short, [SAMPLES[0], SAMPLES[2]])
    assert "teach nothing" not in caplog.text
    Image.new("RGB", (280, 280)).save(place / "large.png")
    make_data(place, short, [{**SAMPLES[0], "image": "large.png"}, SAMPLES[2]])
    assert "teach nothing: 1 of 2, first sample 0 (id 'one')" in caplog.text


# --- the model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(CHECKPOINT).train()


def test_the_loss_of_a_batch_is_that_of_its_samples(model, data):
    items = [data["train_dataset"][i] for i in range(len(SAMPLES))]
    with torch.no_grad():
        together = model(**data["data_collator"](items)).loss
        alone = [model(**data["data_collator"]([item])).loss for item in items]
    counts = torch.tensor([int((item["labels"][1:] >= 0).sum()) for item in items])
    expected = (torch.stack(alone) * counts).sum() / counts.sum()
    assert together.item() == pytest.approx(expected.item(), abs=1e-5)


def test_no_mask_of_tokens_by_tokens_is_made(model, data, monkeypatch):
    shapes = []
    monkeypatch.setattr(modeling_llama, "padded_causal_mask", lambda *_: pytest.fail("a mask"))

    def attend(q, k, v, attn_mask=None, **options):
        shapes.append(None if attn_mask is None else attn_mask.shape)
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    items = [data["train_dataset"][i] for i in range(len(SAMPLES))]
    assert len({len(item["input_ids"]) for item in items}) > 3
    model(**data["data_collator"](items)).loss.backward()
    model.zero_grad()
    layers = model.config.num_hidden_layers + model.visual.config.depth
    assert len(shapes) >= layers and set(shapes) == {None}


def test_a_batch_of_texts_gives_the_merger_gradients_of_zeros(model, data):
    model.zero_grad()
    texts = [data["train_dataset"][i] for i in (2, 4)]
    model(**data["data_collator"](texts)).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("visual.merger"):
            assert parameter.grad is not None and not parameter.grad.any(), name
    model.zero_grad()


def test_gradient_checkpointing_changes_no_gradient(model, data):
    items = [data["train_dataset"][i] for i in (0, 1)]

    def gradients():
        model.zero_grad()
        model(**data["data_collator"](items)).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain, blocks = gradients(), []
    hook = model.visual.blocks[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = gradients()
    model.gradient_checkpointing_disable()
    hook.remove()
    model.zero_grad()
    assert len(blocks) == 2  # once more on the way back
    for name, value in plain.items():
        torch.testing.assert_close(kept[name], value, atol=1e-6, rtol=1e-4, msg=name)
