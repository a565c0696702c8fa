"""LLaVA in the layout of transformers (llava-hf): it loads as it is and gives the same logits."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)

from llava.conv_mode import checkpoint_conv_mode
from llava.eval.efficiency.random_model import shapes
from llava.llava_hf import MODULES, config_here, name_here, name_there
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from llava.model.multimodal_encoder.clip_files import read_vision_model
from llava.train.model_setup import checkpoint_kind
from scripts.extract_mm_projector import extract
from tests.model.checkpoint_tools import CHECKPOINT, load
from tests.paths import GOLDEN

TOWER_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 704,
    "rms_norm_eps": 1e-5,
}
IMAGE_TOKEN, PAD_TOKEN = 700, 701
SQUARE = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
PROMPT = "USER: <image>\nWhat color is the ring? ASSISTANT:"


def write_folder(folder, decoder) -> None:
    """A model of random weights as transformers' own classes write it."""
    torch.manual_seed(0)
    config = LlavaConfig(
        CLIPVisionConfig(**TOWER_SIZES).to_dict(),
        decoder.to_dict(),
        image_token_index=IMAGE_TOKEN,
        pad_token_id=PAD_TOKEN,
    )
    model = LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        weight.data = torch.randn_like(weight) * 0.15 + name.endswith("norm.weight")
    model.save_pretrained(folder)
    tokenizer = LlamaTokenizer.from_pretrained(CHECKPOINT)
    image = AddedToken("<image>", special=True, normalized=False)
    tokenizer.add_tokens([image], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(**SQUARE).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders on Llama and Mistral."""
    root = tmp_path_factory.mktemp("llava-hf")
    write_folder(root / "llama", LlamaConfig(**SIZES))
    write_folder(root / "mistral", MistralConfig(**SIZES, sliding_window=None))
    return root


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made / "llama", tmp_path / "model")


def change(folder, part: str | None = None, **values) -> None:
    """Other values in config.json, at the top or in a part; those called None go away."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    inner = config[part] if part else config
    inner |= values
    for key in [key for key, value in inner.items() if value is None]:
        del inner[key]
    path.write_text(json.dumps(config))


def rename(folder) -> None:
    """Names of modules since transformers 4.52 in place of those of released files."""
    tensors = load_file(folder / "model.safetensors")
    later = {name_there(name_here(name), MODULES): tensor for name, tensor in tensors.items()}
    assert later.keys().isdisjoint(tensors)
    save_file(later, folder / "model.safetensors")


def logits_here(folder, **options):
    """Logits of a prompt with a square picture, of our model in `folder`."""
    tokenizer, model, processor, _ = load(folder, **options)
    picture = Image.open(GOLDEN / "images" / "img0_336x336.png")
    pixels = process_images([picture], processor, model.image_settings)
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    with torch.no_grad():
        return ids, pixels, model(ids, images=pixels, image_sizes=[picture.size]).logits


def assert_as_transformers(folder) -> None:
    """Their class on the same ids and their processor's pixels gives the same logits as ours."""
    ids, pixels, logits = logits_here(folder)
    picture = Image.open(GOLDEN / "images" / "img0_336x336.png")
    theirs = CLIPImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values
    assert torch.equal(theirs, pixels)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    ids = ids.masked_fill(ids < 0, model.config.image_token_index)
    with torch.no_grad():
        expected = model(ids, pixels, attention_mask=torch.ones_like(ids)).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("decoder", ["llama", "mistral"])
def test_a_folder_that_transformers_wrote_gives_the_logits_of_transformers(made, decoder):
    assert_as_transformers(made / decoder)
    classes = {"llama": LlavaLlamaForCausalLM, "mistral": LlavaMistralForCausalLM}
    template = {"llama": "vicuna_v1", "mistral": "mistral_instruct"}
    tokenizer, model, processor, _ = load(made / decoder, name="anything")
    assert type(model) is classes[decoder] and processor.crop_size["height"] == 56
    assert checkpoint_conv_mode(str(made / decoder)).name == template[decoder]
    # Rows beyond the tokenizer's tokens fill the table up to a multiple of 64: they stay.
    assert len(tokenizer) == 702 and model.lm_head.weight.shape[0] == 704


def test_names_of_modules_are_understood(folder):
    expected = logits_here(folder)[2]
    rename(folder)
    assert torch.equal(logits_here(folder)[2], expected)


def test_every_name_has_a_way_there_and_back(made):
    names = load_file(made / "llama" / "model.safetensors").keys() | {"image_newline"}
    ours = {name_here(name) for name in names}
    assert {name_there(name) for name in ours} == names
    assert {name_here(name_there(name, MODULES)) for name in ours} == ours
    assert {name_here(name) for name in ours} == ours


def test_several_files_load_and_a_lacking_weight_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    expected = logits_here(folder)[2]
    (folder / "model.safetensors").unlink()
    names, table = sorted(weights), {}
    for number in range(3):
        part = {name: weights[name] for name in names[number::3]}
        save_file(part, folder / f"model-{number}.safetensors")
        table |= dict.fromkeys(part, f"model-{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    assert torch.equal(logits_here(folder)[2], expected)
    for lost, says in (
        ("multi_modal_projector.linear_2.bias", "lacks 1 weights: model.mm_projector.2.bias"),
        ("vision_tower.vision_model.embeddings.class_embedding", "part of a vision tower only"),
    ):
        path = folder / table[lost]
        kept = load_file(path)
        save_file({name: tensor for name, tensor in kept.items() if name != lost}, path)
        with pytest.raises(ValueError, match=says):
            load(folder)
        save_file(kept, path)


def test_words_of_later_versions_are_understood(folder):
    change(folder, "text_config", rope_theta=5000.0)
    expected = logits_here(folder)[2]
    change(folder, "text_config", rope_theta=None, rope_parameters={"rope_theta": 5000.0})
    change(folder, torch_dtype=None, dtype="float32", image_seq_length=16)
    path = folder / "preprocessor_config.json"
    processor = {"image_processor": json.loads(path.read_text())}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    path.unlink()
    assert torch.equal(logits_here(folder)[2], expected)


@pytest.mark.parametrize("style", ["released", "modules"])
def test_transformers_5_names_the_tower_without_a_level(folder, style):
    expected = logits_here(folder)[2]
    weights = load_file(folder / "model.safetensors")
    theirs = {name_there(name_here(name), style): tensor for name, tensor in weights.items()}
    level = "vision_tower.vision_model."
    saved = {name.replace(level, "vision_tower."): tensor for name, tensor in theirs.items()}
    assert len(saved.keys() - theirs.keys()) > 50
    save_file(saved, folder / "model.safetensors")
    assert torch.equal(logits_here(folder)[2], expected)


def test_a_tower_that_transformers_5_saved_is_read(tmp_path):
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER_SIZES))
    tower.save_pretrained(tmp_path)
    level = {name.removeprefix("vision_model."): own for name, own in tower.state_dict().items()}
    save_file(level, tmp_path / "model.safetensors")
    read = read_vision_model(str(tmp_path)).state_dict()
    assert all(torch.equal(read[name], own) for name, own in tower.state_dict().items())


@pytest.mark.parametrize("decoder", ["llama", "mistral"])
@pytest.mark.parametrize(
    "words",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
    ids=str,
)
def test_stretched_positions_are_understood_in_every_version(made, tmp_path, decoder, words):
    folder = shutil.copytree(made / decoder, tmp_path / "model")
    ids, places = torch.arange(3, 12)[None], torch.arange(9)[None]
    with torch.no_grad():
        expected = load(folder)[1](ids, position_ids=places).logits
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= words
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)[1]
    assert model.config.rope_scaling == {"type": "linear", "factor": 2.0}
    with torch.no_grad():
        stretched = model(ids, position_ids=2 * places).logits
    torch.testing.assert_close(stretched, expected)


def test_positions_that_are_not_stretched_may_be_called_default(folder):
    expected = logits_here(folder)[2]
    change(folder, "text_config", rope_scaling={"rope_type": "default"})
    assert torch.equal(logits_here(folder)[2], expected)


def test_a_plain_model_of_transformers_5_keeps_the_base_of_its_rotation(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=500.0)).eval()
    model.save_pretrained(tmp_path)
    LlamaTokenizer.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    change(tmp_path, rope_theta=None, rope_scaling=None)
    change(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits, expected = load(tmp_path, name="vicuna")[1](ids).logits, model(ids).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("style", ["here", "released", "modules"])
def test_an_adapter_goes_on_top_of_it(folder, tmp_path, style):
    """Adapters trained here, and those trained on the classes of transformers, old and new."""
    name = "model.layers.1.self_attn.q_proj.weight"
    theirs = name if style == "here" else name_there(name, style)
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    stem = f"base_model.model.{theirs.removesuffix('.weight')}"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    before = load(folder)[1].state_dict()
    merged = load(adapter, folder)[1].state_dict()
    torch.testing.assert_close(merged[name], before[name] + 4 * up @ down)
    assert all(torch.equal(merged[key], before[key]) for key in before if key != name)


def test_a_method_that_reads_questions_gets_its_tower_by_option(folder):
    with pytest.raises(ValueError, match="needs the text tower"):
        load(folder, pruner="cdpruner")


def test_the_tower_is_never_rounded_through_the_type_of_the_model(folder):
    options = {"torch_dtype": torch.bfloat16, "vision_tower_dtype": torch.float32}
    state = load(folder, **options)[1].state_dict()
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        own = tensor if name.startswith("vision_tower.") else tensor.bfloat16()
        assert torch.equal(state[name_here(name)], own)


def test_its_shapes_can_be_measured_with_random_weights(folder):
    config, tower = shapes(str(folder))
    assert (config.num_hidden_layers, config.vocab_size, tower.image_size) == (3, 704, 56)


def test_its_projector_is_extracted_under_our_names(folder, tmp_path):
    extract(str(folder), str(tmp_path / "mm_projector.safetensors"))
    found = load_file(tmp_path / "mm_projector.safetensors")
    weight = load_file(folder / "model.safetensors")["multi_modal_projector.linear_2.weight"]
    assert len(found) == 4 and torch.equal(found["model.mm_projector.2.weight"], weight)


def test_images_that_are_not_square_are_padded_and_that_is_said(folder, capsys):
    model = load(folder)[1]
    assert "padded to squares" in capsys.readouterr().err
    assert model.image_settings.image_aspect_ratio == "pad"


@pytest.mark.parametrize(
    "part, values, says",
    [
        (None, {"vision_feature_layer": [-2, -5]}, "must be one layer of the tower"),
        (None, {"vision_feature_select_strategy": "mean"}, "must be default or full"),
        (None, {"projector_hidden_act": "relu"}, "projector_hidden_act must be gelu"),
        (None, {"multimodal_projector_bias": False}, "multimodal_projector_bias must be True"),
        (None, {"text_config": [1]}, "text_config must be an object"),
        ("text_config", {"model_type": "qwen2"}, "the language model is 'qwen2'"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "only CLIP towers"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling must be"),
        ("text_config", {"hidden_size": 30}, "cannot be divided by num_attention_heads"),
        ("text_config", {"num_hidden_layers": 4}, "lacks 9 weights: model.layers.3"),
    ],
    ids=str,
)
def test_what_no_model_here_has_is_refused(folder, part, values, says):
    change(folder, part, **values)
    with pytest.raises(ValueError, match=says) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("style", ["bitsandbytes", "awq"])
def test_weights_of_a_few_bits_are_refused_with_the_way_to_get_them(folder, style):
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    tensors.pop(name)
    bits = torch.zeros(8, 4, dtype=torch.uint8 if style == "bitsandbytes" else torch.int32)
    tensors[name if style == "bitsandbytes" else name.replace("weight", "qweight")] = bits
    save_file(tensors, folder / "model.safetensors")
    change(folder, quantization_config={"quant_method": style, "bits": 4})
    with pytest.raises(ValueError, match="load the original .with load_8bit or load_4bit"):
        load(folder)


def test_training_says_how_to_convert_it(folder):
    with pytest.raises(ValueError, match="python -m llava.model.export --from llava-hf"):
        checkpoint_kind(str(folder))


def test_next_values_are_those_of_the_original_layout():
    """Resolutions are height first in this layout; absent ones are those of the release."""
    values = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "text_config": {"model_type": "llama", "vocab_size": 64064},
        "image_grid_pinpoints": [[336, 672], [336, 1008]],
    }
    config = config_here(values, "config.json")
    assert config["image_grid_pinpoints"] == [[672, 336], [1008, 336]]
    assert config["image_aspect_ratio"] == "anyres" and config["mm_hidden_size"] == 1024
    assert config["mm_patch_merge_type"] == "spatial_unpad"
    del values["image_grid_pinpoints"]
    assert [1008, 336] in config_here(values, "config.json")["image_grid_pinpoints"]


def test_next_on_yi_gets_its_template(tmp_path):
    values = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "text_config": {"model_type": "llama", "vocab_size": 64064},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert checkpoint_conv_mode(str(tmp_path)).name == "chatml_direct"


def test_another_tower_brings_its_image_settings_and_the_weights_stay(folder, tmp_path):
    tower = tmp_path / "tower"
    CLIPVisionConfig(**TOWER_SIZES).save_pretrained(tower)
    CLIPImageProcessor(**SQUARE, image_mean=[0.5, 0.5, 0.5]).save_pretrained(tower)
    _, model, processor, _ = load(folder, vision_tower=str(tower))
    assert processor.image_mean == [0.5, 0.5, 0.5]
    name = "vision_tower.vision_model.embeddings.class_embedding"
    weight = load_file(folder / "model.safetensors")[name]
    assert torch.equal(model.state_dict()[name_here(name)], weight)
