"""Qwen2.5-VL from a folder: what is read, in which layouts, and what is refused."""

from __future__ import annotations

import json
import shutil
from copy import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

from llava.conv_mode import checkpoint_conv_mode
from llava.eval import run_llava
from llava.eval.model_vqa_loader import main as answer_questions
from llava.front_end import FrontEnd
from llava.model import Qwen2_5_VLForConditionalGeneration  # as users know it
from llava.model.language_model.qwen2_5_vl import Qwen2_5_VLConfig
from llava.pruning.picture import OUTLINE
from llava.serve.cli import Chat
from llava.train.qwen2_5_vl_family import save_preprocessor
from tests.model.checkpoint_tools import load, same
from tests.paths import GOLDEN

CHECKPOINT = GOLDEN / "tiny-qwen2.5-vl-cut"
PICTURE = GOLDEN / "images" / "img1_640x360.png"


@pytest.fixture(scope="module")
def weights():
    return load_file(CHECKPOINT / "model.safetensors")


@pytest.fixture(scope="module")
def loaded():
    return load(CHECKPOINT, name="anything")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(CHECKPOINT, tmp_path / "model")


def change(folder, file: str = "config.json", **values) -> None:
    """Other values in a JSON file of a checkpoint; those called None go away."""
    path = folder / file
    old = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in old.items() if value is not None}))


def change_tower(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text())["vision_config"] | values
    change(folder, vision_config=config)


def answer(tokenizer, model, processor, question: str = "What color is it?") -> list[int]:
    """Ids of an answer; ends of it count as other tokens."""
    front = FrontEnd(tokenizer, model, processor, "qwen2_5_vl")
    ids, picture = front.encode(front.prompt(question, 1)), front.picture(Image.open(PICTURE))
    inputs = front.inputs([ids], [[picture]], [question])
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1}
    return model.generate(**inputs, **options)[0].tolist()


def test_a_released_folder_loads_under_any_name(loaded, weights):
    tokenizer, model, processor, context_len = loaded
    assert type(model) is Qwen2_5_VLForConditionalGeneration and same(model, weights)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, as in the 3B model
    assert tokenizer.padding_side == "left" and tokenizer.is_fast
    assert (processor.min_pixels, processor.max_pixels) == (3136, 12845056)
    assert context_len == 32768 and model.pruner.name == "none"
    assert model.generation_config.eos_token_id == [642, 640]
    assert checkpoint_conv_mode(str(CHECKPOINT)).name == "qwen2_5_vl"


def test_later_names_of_weights_and_config_are_understood(folder, weights, loaded):
    renamed = {
        f"model.{name}"
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in weights.items()
    }
    save_file(renamed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] |= {"type": "default", "rope_type": "default"}
    top = ("architectures", "model_type", "vision_config", "image_token_id", "video_token_id")
    text = {key: value for key, value in config.items() if key not in top}
    text["model_type"] = "qwen2_5_vl_text"
    config = {key: config[key] for key in top} | {"text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    change(
        folder,
        "preprocessor_config.json",
        min_pixels=None,
        max_pixels=None,
        size={"shortest_edge": 3136, "longest_edge": 12845056},
    )
    model = load(folder)
    assert same(model[1], weights) and model[2].max_pixels == 12845056
    assert answer(*model[:3]) == answer(*loaded[:3])


def test_a_folder_that_transformers_5_saved_is_understood(folder, weights, loaded):
    """Released names of weights again, other words of the config."""
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"] | {
        "dtype": "float32",
        "initializer_range": 0.02,
        "model_type": "qwen2_5_vl_vision",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    }
    sections = config["rope_scaling"]["mrope_section"]
    top = ("architectures", "model_type", "image_token_id", "video_token_id", "vision_token_id")
    top += ("vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    moved = {*top, "vision_config", "rope_scaling", "rope_theta", "torch_dtype"}
    text = {key: value for key, value in config.items() if key not in moved} | {
        "dtype": "float32",
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
        "model_type": "qwen2_5_vl_text",
        "pad_token_id": None,
        "rope_parameters": {
            "mrope_section": sections,
            "rope_theta": config["rope_theta"],
            "rope_type": "default",
            "type": "mrope",
        },
        "sliding_window": None,
        "use_cache": True,
    }
    config = {key: config[key] for key in top if key in config} | {"dtype": "float32"}
    config |= {"text_config": text, "vision_config": vision, "transformers_version": "5.19.0"}
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    assert same(model[1], weights) and answer(*model[:3]) == answer(*loaded[:3])


def test_several_files_of_weights_are_read(folder, weights):
    (folder / "model.safetensors").unlink()
    names, shards = sorted(weights), {}
    for number in (0, 1):
        part = {name: weights[name] for name in names[number::2]}
        save_file(part, folder / f"model-{number}.safetensors")
        shards |= dict.fromkeys(part, f"model-{number}.safetensors")
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load(folder)[1], weights)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_an_adapter_is_merged_into_its_base(tmp_path, weights, prefix):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "qkv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    visual = "visual." if prefix == "model." else "model.visual."
    names = {
        f"{prefix}layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj.weight",
        f"{visual}blocks.3.attn.qkv": "visual.blocks.3.attn.qkv.weight",
    }
    tensors, expected = {}, {}
    for theirs, ours in names.items():
        rows, columns = weights[ours].shape
        down, up = torch.randn(2, columns), torch.randn(rows, 2)
        tensors[f"base_model.model.{theirs}.lora_A.weight"] = down
        tensors[f"base_model.model.{theirs}.lora_B.weight"] = up
        expected[ours] = weights[ours] + 4 * up @ down
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    state = load(tmp_path, CHECKPOINT)[1].state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(state[name], expected.get(name, weight), atol=1e-5, rtol=1e-5)


def test_the_transformers_way_gives_the_same_model(weights):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    assert type(model) is Qwen2_5_VLForConditionalGeneration and same(model, weights)


def test_what_was_saved_loads_with_its_image_settings(loaded, weights, tmp_path):
    tokenizer, model, processor, _ = loaded
    processor = copy(processor)
    processor.max_pixels = 100 * 28 * 28
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same(again[1], weights) and vars(again[2]) == vars(processor)
    assert answer(*again[:3]) == answer(tokenizer, model, processor)


def test_vocab_and_merges_do_where_tokenizer_json_does_not(folder, loaded):
    (folder / "tokenizer.json").write_text('{"version": "9.0", "model": {"type": "Later"}}')
    tokenizer = load(folder)[0]
    assert type(tokenizer) is Qwen2Tokenizer and tokenizer.padding_side == "left"
    text = "<|im_start|>user\n<|vision_start|><|image_pad|>Where is the ring?\n\n It's 42 km…"
    assert tokenizer(text).input_ids == loaded[0](text).input_ids
    for name in ("tokenizer.json", "vocab.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="no tokenizer can be loaded from"):
        load(folder)


def save_tokenizer_as_transformers_5(folder) -> None:
    """Merges as pairs, special tokens in a list of another name, and no other files."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    pairs = [merge.split(" ") for merge in values["model"]["merges"]]
    values["model"] |= {"merges": pairs, "ignore_merges": False}
    path.write_text(json.dumps(values))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = settings.pop("additional_special_tokens")
    change(folder, "tokenizer_config.json", additional_special_tokens=None)
    change(folder, "tokenizer_config.json", extra_special_tokens=special, backend="tokenizers")


def test_a_tokenizer_that_transformers_5_saved_is_read(folder, loaded):
    save_tokenizer_as_transformers_5(folder)
    before = sorted(path.name for path in folder.iterdir())
    tokenizer = load(folder)[0]
    text = "<|im_start|>user\n<|vision_start|><|image_pad|>Where is the ring?\n\n It's 42 km…"
    assert tokenizer(text).input_ids == loaded[0](text).input_ids
    assert tokenizer.all_special_ids == loaded[0].all_special_ids
    assert (tokenizer.padding_side, tokenizer.name_or_path) == ("left", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == before
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["merges"][0] = ["a b", "c"]  # which "a b c" cannot say
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="put vocab.json and merges.txt of the original model"):
        load(folder)


def test_image_settings_are_read_from_the_file_of_transformers_5(folder, tmp_path):
    path = folder / "preprocessor_config.json"
    own = json.loads(path.read_text()) | {"size": {"shortest_edge": 784, "longest_edge": 15680}}
    own = {key: value for key, value in own.items() if key not in ("min_pixels", "max_pixels")}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    assert load(folder)[2].max_pixels == 12845056  # of the file that says nothing else
    path.unlink()
    processor = load(folder)[2]
    assert (processor.min_pixels, processor.max_pixels) == (784, 15680)
    save_preprocessor(str(folder), str(tmp_path), processor)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == own["size"]
    own["size"]["longest_edge"] = "many"
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    with pytest.raises(ValueError, match="processor_config.json: max_pixels must be"):
        load(folder)


def test_values_that_a_config_leaves_out_are_those_of_transformers(folder):
    """Its defaults are not those of Qwen2, nor those of the released models."""
    change(folder, rms_norm_eps=None)
    change_tower(folder, tokens_per_second=None)
    config = load(folder)[1].config
    assert (config.rms_norm_eps, config.vision_config.tokens_per_second) == (1e-5, 4)


def test_messages_are_rendered_wherever_the_template_is(folder, loaded):
    """In the tokenizer's config, in a file of its own, or nowhere."""
    parts = [{"type": "image"}, {"text": "Where?"}, {"type": "video"}, {"image": PICTURE}]
    asked = [{"role": "user", "content": parts}, {"role": "assistant", "content": "There."}]
    chats = asked, [{"role": "system", "content": [{"text": "Be brief."}]}, *asked[:1]]

    def rendered(tokenizer) -> list[str]:
        return [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=open_end)
            for chat in chats
            for open_end in (True, False)
        ]

    change(folder, "tokenizer_config.json", chat_template=None)
    assert rendered(load(folder)[0]) == rendered(loaded[0])  # from chat_template.json
    (folder / "chat_template.json").unlink()
    assert rendered(load(folder)[0]) == rendered(loaded[0])
    (folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}!")
    assert rendered(load(folder)[0])[0] == "user!"


@pytest.mark.parametrize(
    "values, says",
    [
        ({"rope_theta": None}, "does not say rope_theta"),
        ({"vision_config": None}, "does not say vision_config"),
        ({"rope_scaling": None}, "does not say rope_scaling"),
        ({"vision_config": []}, "vision_config must be an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling must be"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "3 frequencies"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8, -1, 1]}}, "rope_scaling must be"),
        ({"use_sliding_window": True}, "sliding windows are not supported"),
        ({"hidden_size": 66}, "cannot be divided by num_attention_heads"),
        ({"num_key_value_heads": 3}, "cannot be divided by num_key_value_heads"),
        ({"image_token_id": 651}, r"<\|image_pad\|> is token 652"),
        ({"video_token_id": "x"}, "video_token_id must be a whole number"),
        ({"vocab_size": 600}, "belongs to another model"),
        ({"num_hidden_layers": 2}, "lacks 12 weights: model.layers.1"),
        ({"tie_word_embeddings": False}, "lacks 1 weights: lm_head.weight"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(folder, values, says):
    change(folder, **values)
    with pytest.raises(ValueError, match=says) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling must be"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_scaling must be"),
        ({"text_config": {"use_sliding_window": True}}, "sliding windows are not supported"),
        ({"use_sliding_window": True}, "sliding windows are not supported"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act must be silu"),
        ({"vision_config": {"window_size": 100}}, "window_size 100 is no multiple of 28"),
    ],
    ids=str,
)
def test_the_config_class_refuses_what_the_loader_refuses(values, says):
    with pytest.raises(ValueError, match=says):
        Qwen2_5_VLConfig(**values)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"num_heads": 3}, "width divisible by 4"),
        ({"num_heads": 16}, "width divisible by 4"),
        ({"out_hidden_size": 32}, "is not the hidden_size 64"),
        ({"window_size": 100}, "is no multiple of 28"),
        ({"fullatt_block_indexes": 7}, "fullatt_block_indexes must be a list of layers"),
        ({"spatial_merge_size": 4}, "must be 2, the only value supported"),
        ({"hidden_act": "gelu"}, "must be silu, the only value supported"),
        ({"depth": 10**9}, "depth must be a whole number"),
        ({"depth": 9}, "lacks 12 weights: visual.blocks.8"),
        ({"depth": 7}, "holds 12 weights that a model of its config.json does not"),
    ],
    ids=str,
)
def test_impossible_towers_are_refused(folder, values, says):
    change_tower(folder, **values)
    with pytest.raises(ValueError, match=says):
        load(folder)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"patch_size": 16}, "has patch_size 16, config.json 14"),
        ({"min_pixels": 10**6, "max_pixels": 10**5}, "are more than max_pixels"),
        ({"max_pixels": "many"}, "max_pixels must be"),
        ({"image_std": [1, 0, 1]}, "three numbers above 0"),
        ({"merge_size": 4}, "the only value supported"),
    ],
    ids=str,
)
def test_impossible_image_settings_are_refused(folder, values, says):
    change(folder, "preprocessor_config.json", **values)
    with pytest.raises(ValueError, match=says):
        load(folder)


def test_what_is_not_there_yet_is_refused_before_the_weights_are_read(folder):
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match="cdpruner needs 'text_tower'.*vispruner"):
        load(folder, pruner="cdpruner")
    with pytest.raises(ValueError, match="prumerge needs 'cls_key'.*vispruner"):
        load(folder, pruner="prumerge")
    with pytest.raises(ValueError, match="brings its own vision tower"):
        load(folder, vision_tower="elsewhere")
    (folder / "mm_projector.bin").write_bytes(b"not read")
    with pytest.raises(ValueError, match="has no other parts to put on top"):
        load(folder, CHECKPOINT)


# Programs.


def run(monkeypatch, capsys, program, *words) -> str:
    monkeypatch.setattr("sys.argv", ["program", *map(str, words)])
    program()
    return capsys.readouterr().out.strip()


def test_run_llava_asks_it_in_its_own_template(monkeypatch, capsys, loaded):
    asked, generate = [], Qwen2_5_VLForConditionalGeneration.generate

    def listen(model, input_ids, **options):
        ids = input_ids[0].masked_fill(input_ids[0] < 0, model.config.image_token_id)
        asked.append((loaded[0].decode(ids), [tuple(image.shape) for image in options["images"]]))
        generate(model, input_ids, **options)
        return loaded[0]("Both", return_tensors="pt").input_ids

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "generate", listen)
    words = ["--model-path", CHECKPOINT, "--image-file", PICTURE, "--query", "What color is it?"]
    words += ["--temperature", 0, "--max-new-tokens", 4, "--device", "cpu"]
    assert run(monkeypatch, capsys, run_llava.main, *words) == "Both"
    words[3:6] = [f"{PICTURE},{PICTURE}", "--query", "<image-placeholder> or <image-placeholder>?"]
    assert run(monkeypatch, capsys, run_llava.main, *words) == "Both"
    mark, shape = "<|vision_start|><|image_pad|><|vision_end|>", (13, 23, 4, 1176)
    template = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}"
    template += "<|im_end|>\n<|im_start|>assistant\n"
    assert asked == [
        (template.format(f"{mark}What color is it?"), [shape]),
        (template.format(f"{mark} or {mark}?"), [shape, shape]),
    ]
    with pytest.raises(SystemExit, match="cdpruner needs 'text_tower'.*the vision tower of Qwen"):
        run(monkeypatch, capsys, run_llava.main, *words, "--pruning-method", "cdpruner")


def test_the_chat_puts_the_mark_of_the_image_right_before_the_question(loaded):
    front = FrontEnd(*loaded[:3], "qwen2_5_vl")
    picture = front.picture(Image.open(PICTURE))
    talk = Chat(front, picture, {"do_sample": False, "max_new_tokens": 3})
    talk.ask("What?")
    talk.ask("And now?")
    first, _, second, _ = (text for _, text in talk.conversation.messages)
    assert first == "<|vision_start|><image><|vision_end|>What?" and second == "And now?"


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("reuse", ["--reuse", "--no-reuse"])
def test_benchmark_programs_ask_it(monkeypatch, capsys, tmp_path, reuse, share):
    """The same prompts as of `run_llava`, in batches of images of different sizes, plain and with a
    method."""
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked = [("img0_336x336", "What?"), ("img2_300x480", "Is it red?"), ("img0_336x336", "Why?")]
    lines = [
        json.dumps({"question_id": number, "image": f"{image}.png", "text": text})
        for number, (image, text) in enumerate(asked)
    ]
    questions.write_text("\n".join(lines))
    prompts, generate = [], Qwen2_5_VLForConditionalGeneration.generate_from

    def listen(model, prompt, **options):
        rows = zip(prompt.token_ids, prompt.attention_mask, strict=True)
        prompts.extend(row[own].tolist() for row, own in rows)
        return generate(model, prompt, **options)

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "generate_from", listen)
    words = ["--model-path", CHECKPOINT, "--question-file", questions, "--answers-file", answers]
    words += ["--image-folder", PICTURE.parent, "--max_new_tokens", 2, "--batch-size", 3, reuse]
    words += ["--max-pixels", 28 * 28 * 64]
    if share is not None:
        words += ["--pruning-method", "vispruner", "--visual-token-ratio", share]
    run(monkeypatch, capsys, answer_questions, *words)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == 3
    if share is not None:
        assert [line["metadata"]["visual_tokens_unpruned"] for line in lines] == [64, 60, 64]
    tokenizer, seen = load(CHECKPOINT)[0], {}
    for ids in prompts:
        text = tokenizer.decode([i for i in ids if i != 652]).partition("<|im_start|>user\n")[2]
        seen[text] = ids.count(652)
    form = "<|vision_start|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    tokens = {"img0_336x336": 64, "img2_300x480": 60}
    kept = {image: round((share or 1) * count) for image, count in tokens.items()}
    assert seen == {form.format(text): kept[image] for image, text in asked}


def test_a_picture_shows_the_tokens_that_stay_where_they_are(monkeypatch, capsys, tmp_path):
    words = ["--model-path", CHECKPOINT, "--image-file", PICTURE, "--query", "What?"]
    words += ["--max-new-tokens", 1, "--device", "cpu", "--temperature", 0]
    words += ["--pruning-method", "fastervlm", "--show-pruning", tmp_path / "kept.png"]
    run(monkeypatch, capsys, run_llava.main, *words, "--visual-token-ratio", 0.222)
    sheet = np.asarray(Image.open(tmp_path / "kept.png").convert("RGB")).astype(int)
    outline = (np.abs(sheet - OUTLINE).sum(axis=2) == 0).sum()
    with Image.open(PICTURE) as picture:
        width, height = picture.size
    cell = 560 / max(width, height) * np.array([width / 23, height / 13])  # of 13 x 23 tokens
    kept = round(0.222 * 13 * 23)
    assert abs(outline / (2 * cell.sum() * kept) - 1) < 0.1


def test_bounds_of_the_image_area_are_options(monkeypatch, capsys):
    words = ["--model-path", CHECKPOINT, "--image-file", PICTURE, "--query", "What?"]
    words += ["--max-new-tokens", 1, "--device", "cpu"]
    with pytest.raises(SystemExit, match="max_pixels 100 leave no size"):
        run(monkeypatch, capsys, run_llava.main, *words, "--max-pixels", 100)
    words[1] = GOLDEN / "tiny-llava-v1.5"
    with pytest.raises(SystemExit, match="--min-pixels: images for .* have one size, its own"):
        run(monkeypatch, capsys, run_llava.main, *words, "--min-pixels", 100)
