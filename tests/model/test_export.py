"""Exports: what other programs read gives the same logits there, and every number comes back."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaForConditionalGeneration,
    MistralForCausalLM,
    Qwen2ForCausalLM,
)

from llava.checkpoint_kind import values_in
from llava.config_file import read_json
from llava.llava_hf import MODULES, RELEASED
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import checkpoint as files
from llava.model.export import export, main
from llava.model.export_files import add_layout_tokens, save_tokenizer
from llava.model.qwen2_5_vl_loading import module_name
from tests.model.checkpoint_tools import CHECKPOINT, NEXT, TOWER, copy_of, load, write_adapter
from tests.paths import GOLDEN

QWEN = GOLDEN / "tiny-qwen2.5-vl-cut"
RECORDED = GOLDEN / "llava-hf" / "next.safetensors"
PROMPT = "USER: <image>\nWhat color is the ring? ASSISTANT:"


def write(source, folder, to, **options):
    export(str(source), str(folder), to, **options)
    return folder


def picture(name="img0_336x336"):
    return Image.open(GOLDEN / "images" / f"{name}.png").convert("RGB")


def weights_in(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_equal(first: dict, second: dict) -> None:
    """The same names, types and bits."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def ask(source, name="img0_336x336", **options):
    """(prompt ids, pixels, logits) of our model, loaded already or in a folder."""
    loaded = source if isinstance(source, tuple) else load(source, **options)
    tokenizer, model, processor, _ = loaded
    image = picture(name)
    pixels = process_images([image], processor, model.image_settings)
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    with torch.no_grad():
        return ids, pixels, model(ids, images=pixels, image_sizes=[image.size]).logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """LLaVA-1.5 in the layout of transformers."""
    return write(CHECKPOINT, tmp_path_factory.mktemp("export") / "hf", "llava-hf")


# The language model alone.


def test_the_language_model_gives_the_logits_of_plain_llama(tmp_path):
    folder = write(CHECKPOINT, tmp_path / "out", "llama")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = load(CHECKPOINT)[1]
    assert type(plain) is LlamaForCausalLM
    embeds = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = model(inputs_embeds=embeds).logits, plain(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)
    own = {n: t for n, t in load_file(CHECKPOINT / "model.safetensors").items() if "mm_" not in n}
    assert_equal(weights_in(folder), own)
    original = AutoTokenizer.from_pretrained(CHECKPOINT, use_fast=False)
    for fast in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast)
        assert tokenizer.is_fast == fast
        assert tokenizer(PROMPT).input_ids == original(PROMPT).input_ids
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 700


def test_an_adapter_is_merged_on_the_way(tmp_path):
    weights = load_file(CHECKPOINT / "model.safetensors")
    adapter = copy_of(CHECKPOINT, tmp_path / "llava-lora")
    before, update = write_adapter(adapter, weights)
    folder = write(adapter, tmp_path / "out", "llama", model_base=str(CHECKPOINT))
    merged = weights_in(folder)["model.layers.3.self_attn.q_proj.weight"]
    torch.testing.assert_close(merged, before + 4 * update)
    folder = write(adapter, tmp_path / "hf", "llava-hf", model_base=str(CHECKPOINT))
    again = weights_in(folder)["language_model.model.layers.3.self_attn.q_proj.weight"]
    assert torch.equal(again, merged)


def test_mistral_stays_mistral(tmp_path):
    source = copy_of(
        CHECKPOINT,
        tmp_path / "m",
        weights=True,
        architectures=["LlavaMistralForCausalLM"],
        model_type="llava_mistral",
        sliding_window=None,
        rope_theta=500.0,
    )
    plain = AutoModelForCausalLM.from_pretrained(write(source, tmp_path / "out", "llama"))
    assert type(plain) is MistralForCausalLM and plain.config.sliding_window is None
    embeds = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load(source)[1](inputs_embeds=embeds).logits
        logits = plain(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)


def test_qwen2_5_vl_without_its_tower_is_a_qwen2(tmp_path, capsys):
    folder = write(QWEN, tmp_path / "out", "llama")
    assert "positions on three axes" in capsys.readouterr().err
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(plain) is Qwen2ForCausalLM and not any(info.values())
    tokenizer, model, *_ = load(QWEN)
    ids = tokenizer("What color is it?", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=5e-5, rtol=1e-4)
    assert (
        AutoTokenizer.from_pretrained(folder)("What color?").input_ids
        == tokenizer("What color?").input_ids
    )


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("image", [True, False])
def test_a_tokenizer_json_reads_what_the_checkpoints_tokenizer_does(
    tmp_path, capsys, legacy, image
):
    own = LlamaTokenizer.from_pretrained(CHECKPOINT, legacy=legacy)
    if image:
        add_layout_tokens(own)
    save_tokenizer(own, tmp_path)
    said = capsys.readouterr().err
    there = (tmp_path / "tokenizer.json").is_file()
    assert there == (legacy or image) and ("</s>" in said) == (not legacy)
    if there:
        mark = own.convert_tokens_to_ids("<image>")
        one_turn, two_turns = PROMPT if image else "What?", "What? ASSISTANT: Red.</s>USER: And?"
        for text in (one_turn, two_turns)[: 1 + legacy]:
            found = AutoTokenizer.from_pretrained(tmp_path, use_fast=True)(text).input_ids
            assert found == tokenizer_image_token(text, own, image_token_index=mark)


# The layout of transformers.


def test_transformers_reads_an_export_and_gives_the_same_logits(exported):
    ids, pixels, expected = ask(CHECKPOINT)
    model, info = LlavaForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values())
    processor = CLIPImageProcessor.from_pretrained(exported)
    assert torch.equal(processor(picture(), return_tensors="pt").pixel_values, pixels)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer("<image>").input_ids[-1] == model.config.image_token_index == 700
    assert tokenizer.pad_token_id == model.config.pad_token_id == 701
    ids = ids.masked_fill(ids < 0, 700)
    with torch.no_grad():
        logits = model.eval()(ids, pixels, attention_mask=torch.ones_like(ids)).logits
    assert logits.shape[-1] == 704  # of 702 tokens
    torch.testing.assert_close(logits[..., :700], expected, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(ask(exported)[2], logits, atol=5e-5, rtol=1e-4)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("questions. USER: <image>\nWhat? ASSISTANT:")
    assert read_json(exported / "chat_template.json")["chat_template"]
    values = read_json(exported / "preprocessor_config.json")
    assert values["do_pad"] and values["image_processor_type"] == "LlavaImageProcessor"
    assert read_json(exported / "processor_config.json")["processor_class"] == "LlavaProcessor"


@pytest.mark.parametrize("names", [RELEASED, MODULES])
def test_every_number_comes_back(tmp_path, names):
    """A bfloat16 model with a float32 tower: there, back, and there again."""
    weights = load_file(CHECKPOINT / "model.safetensors")
    own = {name: tensor.bfloat16() for name, tensor in weights.items()}
    source = copy_of(CHECKPOINT, tmp_path / "m", torch_dtype="bfloat16", conv_mode="llava_v1")
    save_file(own, source / "model.safetensors")
    there = write(source, tmp_path / "there", "llava-hf", names=names)
    back = write(there, tmp_path / "back", "llava")
    assert_equal(weights_in(back), own)
    tower = {n: t for n, t in load_file(TOWER / "model.safetensors").items() if "vision_m" in n}
    assert_equal(weights_in(back / "vision_tower"), tower)
    again = write(back, tmp_path / "again", "llava-hf", names=names)
    assert_equal(weights_in(again), weights_in(there))
    assert (again / "config.json").read_text() == (there / "config.json").read_text()
    before, after = (read_json(folder / "config.json") for folder in (source, back))
    moved = ("mm_vision_tower", "transformers_version", "padded_vocabulary", "image_token_index")
    kept = {key: value for key, value in before.items() if key in after and key not in moved}
    assert {key: after[key] for key in kept} == kept
    assert len(kept) > 20 and after["conv_mode"] == "llava_v1"
    source_loaded, back_loaded = (load(f, torch_dtype=torch.float32) for f in (source, back))
    first, second = source_loaded[0], back_loaded[0]
    assert first.get_vocab() == second.get_vocab() and len(second) == 700
    assert first.special_tokens_map == second.special_tokens_map
    assert not (back / "chat_template.json").exists()
    assert torch.equal(ask(back_loaded)[2], ask(source_loaded)[2])


def test_next_is_as_later_versions_of_transformers_read_it(tmp_path):
    """`next.safetensors` holds what LlavaNextForConditionalGeneration of transformers 4.57.1 gave
    on this export, with its own image processor: the last position's logits for three pictures."""
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336]]  # (width, height)
    source = copy_of(NEXT, tmp_path / "m", weights=True, image_grid_pinpoints=pinpoints)
    folder = write(source, tmp_path / "hf", "llava-hf")
    values = read_json(folder / "config.json")
    assert values["image_grid_pinpoints"] == [[672, 336], [336, 672], [672, 672], [336, 1008]]
    assert values["model_type"] == "llava_next"
    images = read_json(folder / "preprocessor_config.json")
    assert images["image_processor_type"] == "LlavaNextImageProcessor"
    assert images["image_grid_pinpoints"] == values["image_grid_pinpoints"]
    names = weights_in(folder).keys()
    assert "image_newline" in names and "language_model.lm_head.weight" in names
    recorded = load_file(RECORDED)
    assert len(recorded) == 3
    loaded = load(folder)
    for name, expected in recorded.items():
        logits = ask(loaded, name)[2][0, -1]
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)
    back = write(folder, tmp_path / "back", "llava")
    assert_equal(weights_in(back), weights_in(NEXT))
    assert read_json(back / "config.json")["image_grid_pinpoints"] == pinpoints


def test_a_folder_of_others_keeps_tokens_that_are_not_the_layouts(exported, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "m")
    values = read_json(folder / "config.json")
    del values["llava_settings"]
    (folder / "config.json").write_text(json.dumps(values))
    back = write(folder, tmp_path / "plain", "llava")
    assert weights_in(back)["lm_head.weight"].shape[0] == 700 and len(load(back)[0]) == 700
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    tokenizer.add_tokens(["<box>"])
    tokenizer.save_pretrained(folder)
    back = write(folder, tmp_path / "more", "llava")
    assert "'<box>'" in capsys.readouterr().err
    assert weights_in(back)["lm_head.weight"].shape[0] == 704
    tokenizer, model, *_ = load(back)
    assert len(tokenizer) == 703 and model.lm_head.weight.shape[0] == 704
    again = write(back, tmp_path / "again", "llava-hf")
    assert_equal(weights_in(again), weights_in(folder))


def test_large_checkpoints_are_written_in_several_files(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 300_000)
    folder = write(CHECKPOINT, tmp_path / "out", "llava-hf")
    table = read_json(folder / "model.safetensors.index.json")["weight_map"]
    assert len(set(table.values())) > 2 and not (folder / "model.safetensors").exists()
    assert_equal(weights_in(folder), weights_in(exported))
    _, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


def test_values_that_transformers_does_not_save_go_along(tmp_path):
    """Released 13B models say a temperature without sampling; images may be cut in the middle."""
    source = copy_of(CHECKPOINT, tmp_path / "m", weights=True, image_aspect_ratio=None)
    values = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (source / "generation_config.json").write_text(json.dumps(values))
    folder = write(source, tmp_path / "out", "llava-hf")
    saved = read_json(folder / "generation_config.json")
    assert {key: saved[key] for key in values} == values and saved["pad_token_id"] == 701
    images = read_json(folder / "preprocessor_config.json")
    assert images["image_processor_type"] == "CLIPImageProcessor" and "do_pad" not in images
    assert values_in(folder)["image_aspect_ratio"] == "square"


def test_one_type_for_all_weights_is_an_option(tmp_path):
    folder = write(CHECKPOINT, tmp_path / "out", "llava-hf", dtype=torch.float16)
    assert {tensor.dtype for tensor in weights_in(folder).values()} == {torch.float16}
    assert read_json(folder / "config.json")["torch_dtype"] == "float16"


# Qwen2.5-VL.


@pytest.mark.parametrize("names", [RELEASED, MODULES])
def test_qwen2_5_vl_comes_back_from_either_generation_of_names(tmp_path, names):
    own = load_file(QWEN / "model.safetensors")
    there = write(QWEN, tmp_path / "there", "qwen2.5-vl", names=names)
    rename = str if names == RELEASED else module_name
    assert_equal(weights_in(there), {rename(name): tensor for name, tensor in own.items()})
    back = write(there, tmp_path / "back", "qwen2.5-vl")
    assert_equal(weights_in(back), own)
    before, after = load(QWEN), load(back)
    first, second = (loaded[1].config.to_diff_dict() for loaded in (before, after))
    assert {**first, "_name_or_path": ""} == {**second, "_name_or_path": ""}
    assert vars(before[2]) == vars(after[2]) and before[0].get_vocab() == after[0].get_vocab()
    assert before[1].generation_config.eos_token_id == after[1].generation_config.eos_token_id
    assert (back / "chat_template.json").exists()


# What cannot be.


@pytest.mark.parametrize(
    "source, to, says",
    [
        (QWEN, "llava-hf", "choose --to qwen2.5-vl or --to llama"),
        (CHECKPOINT, "qwen2.5-vl", "choose --to llava-hf or --to llama"),
        (CHECKPOINT, "llava", "is not in the layout llava-hf"),
    ],
    ids=["qwen", "llava", "ours"],
)
def test_a_layout_of_another_family_is_refused(tmp_path, source, to, says):
    with pytest.raises(ValueError, match=says):
        write(source, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_what_the_layout_has_no_words_for_is_refused_and_nothing_stays(tmp_path):
    values = {"mm_use_im_start_end": True}
    source = copy_of(CHECKPOINT, tmp_path / "m", weights=True, **values)
    with pytest.raises(ValueError, match="no words for mm_use_im_start_end True"):
        write(source, tmp_path / "out", "llava-hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_plain_language_model_has_nothing_to_take_out(tmp_path):
    plain = write(CHECKPOINT, tmp_path / "plain", "llama")
    with pytest.raises(ValueError, match="plain language model: there is nothing"):
        write(plain, tmp_path / "out", "llama")


def test_the_trained_part_of_a_method_is_left_out_and_that_is_said(tmp_path, capsys):
    source = copy_of(CHECKPOINT, tmp_path / "m", weights=True)
    torch.save({}, source / "pruner.bin")
    folder = write(source, tmp_path / "out", "llama")
    assert "pruner.bin" in capsys.readouterr().err and not (folder / "pruner.bin").exists()


def test_the_program_names_what_is_in_its_way(tmp_path, monkeypatch, capsys):
    words = ["--model-path", str(CHECKPOINT), "--save-model-path", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["export", "--to", "llama", *words])
    main()
    assert "holds LlamaForCausalLM" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="out exists already: name a new folder"):
        main()
    words[3] = str(tmp_path / "other")
    monkeypatch.setattr("sys.argv", ["export", "--from", "llava-hf", *words])
    with pytest.raises(SystemExit, match="not in the layout llava-hf"):
        main()
