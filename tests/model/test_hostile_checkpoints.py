"""Broken and hostile checkpoints: one sentence that names the file, soon, and nothing else read."""

import json
import os
import pickle
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.config_file import MAX_JSON_BYTES
from tests.model.checkpoint_tools import CHECKPOINT, TOWER, copy_of, load, write_adapter

SECONDS = 600  # a generous "soon": what these files ask for would take hours or all memory
NAME = "model.norm.weight"


@pytest.fixture(scope="module")
def weights():
    return load_file(CHECKPOINT / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    return copy_of(CHECKPOINT, tmp_path / "my-llava", weights=True)


def refusal(folder, *args, **options) -> str:
    """The one sentence that loading ends with."""
    start = time.monotonic()
    with pytest.raises((ValueError, OSError)) as caught:
        load(folder, *args, **options)
    assert time.monotonic() - start < SECONDS
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600, message
    return message


def write_config(folder, name="config.json", **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# config.json.


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("num_attention_heads", 0, "from 1 to"),
        ("num_attention_heads", 5, "cannot be divided by num_attention_heads 5"),
        ("num_key_value_heads", 3, "cannot be divided by num_key_value_heads 3"),
        ("num_attention_heads", "4", "not '4'"),
        ("num_attention_heads", 32, "odd width"),
        ("head_dim", 64, "head_dim 64 is not supported"),
        ("num_hidden_layers", 100_000, "from 1 to 512, not 100000"),
        ("num_hidden_layers", 4.0, "a whole number"),
        ("num_hidden_layers", None, "not None"),
        ("num_hidden_layers", True, "not True"),
        ("hidden_size", 2**40, "hidden_size must be"),
        ("intermediate_size", -48, "intermediate_size must be"),
        ("vocab_size", -7, "vocab_size must be a whole number"),
        ("vocab_size", [700], "vocab_size must be"),
        ("pad_token_id", -5, "pad_token_id must be a token id"),
        ("eos_token_id", "</s>", "eos_token_id must be"),
        ("max_position_embeddings", 0, "max_position_embeddings must be"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps must be a number"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps must be a number"),
        ("rope_theta", float("inf"), "rope_theta must be"),
        ("rope_theta", 0, "rope_theta must be"),
        ("rope_theta", 10**30, "rope_theta must be"),
        ("rope_scaling", {"type": "yarn", "factor": 4}, "only kind that is supported"),
        ("rope_scaling", {"type": "linear", "factor": 0}, "only kind that is supported"),
        ("rope_scaling", "linear", "only kind that is supported"),
        ("hidden_act", "os.system", "hidden_act"),
        ("mlp_bias", True, "mlp_bias must be false"),
        ("torch_dtype", "load", "torch_dtype must be"),
        ("torch_dtype", 16, "torch_dtype must be"),
        ("architectures", "LlavaLlamaForCausalLM", "architectures must be a list"),
        ("architectures", [{}], "architectures must be a list"),
        ("model_type", {}, "model_type must be"),
        ("mm_vision_tower", ["a"], "mm_vision_tower must be"),
        ("mm_projector_type", "mlp999999999x_gelu", "1 to 16 layers"),
        ("mm_projector_type", "mlp" + "9" * 900 + "x_gelu", "1 to 16 layers"),
        ("hidden_act", "9" * 5000, "hidden_act must be a short text"),
        ("early_stopping", 7, "early_stopping"),
        ("mm_projector_type", "magic", "Unknown projector type"),
        ("mm_projector_type", 2, "mm_projector_type must be"),
        ("mm_hidden_size", 10**9, "mm_hidden_size must be"),
        ("mm_vision_select_layer", "last", "mm_vision_select_layer must be"),
        ("mm_vision_select_layer", None, "must say its mm_vision_select_layer"),
        ("is_encoder_decoder", True, "is_encoder_decoder must be false"),
        ("encoder_no_repeat_ngram_size", 10**30, "from 0 to 0"),
        ("diversity_penalty", "x", "diversity_penalty must be a number"),
        ("suppress_tokens", [10**9], "null in a file: pass it to generate"),
        ("mm_vision_select_feature", "all", "select feature"),
        ("mm_patch_merge_type", "round", "mm_patch_merge_type must be flat or"),
        ("image_aspect_ratio", "anyres_max_9", "image_aspect_ratio must be square or pad"),
        ("image_aspect_ratio", "anyres", "needs image_grid_pinpoints"),
        ("image_grid_pinpoints", "[" * 5000, "image_grid_pinpoints must be"),
        ("image_grid_pinpoints", [[336, 0]], "image_grid_pinpoints must be"),
        ("image_grid_pinpoints", [[10**9, 10**9]], "image_grid_pinpoints must be"),
        ("unfreeze_mm_vision_tower", "no", "must be true or false"),
        ("tie_word_embeddings", "no", "must be true or false"),
        ("conv_mode", 3, "conv_mode must be"),
        ("max_sequence_length", "2048", "max_sequence_length must be"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_an_impossible_value_is_named_with_what_is_possible(folder, key, value, says):
    write_config(folder, **{key: value})
    message = refusal(folder)
    assert says in message and ("config.json" in message or key.startswith("mm_") or says == key)


@pytest.mark.parametrize(
    "text, says",
    [
        ("[]", "holds a list, expected an object"),
        ("null", "holds a NoneType"),
        ("7", "holds a int"),
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ('{"a": ' * 100_000, "no valid JSON"),
        ('{"hidden_size": ' + "9" * 10_000 + "}", "no valid JSON"),
        ("\x00\x01", "no valid JSON"),
    ],
    ids=["list", "null", "number", "empty", "cut off", "deep", "many digits", "bytes"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_json_file_that_is_no_object_is_named(folder, name, text, says):
    (folder / name).write_text(text)
    message = refusal(folder)
    assert says in message and name in message


def test_other_odd_files_in_place_of_a_config_are_refused(folder):
    path = folder / "config.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert "no valid JSON" in refusal(folder)
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    assert "MiB of JSON" in refusal(folder)
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    assert "holds no config.json" in refusal(folder)
    path.unlink()
    path.symlink_to(path)
    assert "holds no config.json" in refusal(folder)


def test_a_config_with_a_byte_order_mark_or_unknown_keys_is_read(folder):
    values = json.loads((folder / "config.json").read_text())
    values |= {"to_dict": 7, "__class__": "int", "attribute_map": 3, "_attn_implementation": "x"}
    values |= {"num_labels": 10**12, "auto_map": {"AutoConfig": "x.Y"}, "pruned_heads": {"0": [1]}}
    (folder / "config.json").write_text("\ufeff" + json.dumps(values), encoding="utf-8")
    assert load(folder)[1].config.vocab_size == 700


def test_marks_of_other_editors_in_json_files_are_no_fault(folder):
    tower = copy_of(TOWER, folder.parent / "tower", weights=True)
    write_config(folder, mm_vision_tower=str(tower))
    write_config(folder, "generation_config.json", _from_model_config=True)
    names = ("config.json", "generation_config.json", "preprocessor_config.json")
    for file in filter(os.path.isfile, (part / name for part in (folder, tower) for name in names)):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    _, model, processor, _ = load(folder)
    assert processor.size and model.generation_config.eos_token_id == 2
    assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=1).shape == (1, 1)


def test_a_tower_of_another_width_than_the_projectors_is_refused(folder):
    write_config(folder, s2=True)  # features of three scales in place of one
    assert "gives features of width 96" in refusal(folder)


def test_null_is_as_good_as_no_value(folder):
    unset = ("rope_theta", "rms_norm_eps", "mm_projector_type", "max_sequence_length", "use_cache")
    write_config(folder, **dict.fromkeys(unset))
    # The tiny checkpoint has another kind of projector than the default.
    assert "mm_projector" in refusal(folder)
    write_config(folder, mm_projector_type="mlp2x_gelu")
    model, context_len = load(folder)[1::2]
    config = model.config
    assert (config.rope_theta, config.rms_norm_eps, config.use_cache) == (10000.0, 1e-6, True)
    assert context_len == 2048


@pytest.mark.parametrize(
    "values",
    [{"eos_token_id": {}}, {"num_beams": 10**9}, {"temperature": "hot"}, {"max_length": -1}],
    ids=str,
)
def test_a_generation_config_is_checked(folder, values):
    write_config(folder, "generation_config.json", **values)
    assert "generation_config.json" in refusal(folder)


# Weights.


class Bomb:
    def __reduce__(self):
        return eval, ("1",)


def looped():
    inner = {}
    inner["again"] = inner
    return {"model": inner}


def folded():
    """Each level repeats the one below it by reference: 2 ** 60 tensors in a small file."""
    value = {"a": torch.ones(1), "b": torch.ones(1)}
    for _ in range(60):
        value = {"a": value, "b": value}
    return value


BIN_CASES = {
    "none": (lambda w: w | {NAME: None}, "is a NoneType, expected a tensor"),
    "list": (lambda w: w | {NAME: [1.0]}, "is a list, expected a tensor"),
    "no dictionary": (lambda w: [*w.values()], "holds a list, expected names with tensors"),
    "one tensor": (lambda w: w[NAME], "holds a Tensor, expected names with tensors"),
    "numbers as names": (lambda w: {7: w[NAME]}, "no name of a tensor"),
    "code": (lambda w: w | {NAME: Bomb()}, "is refused"),
    "a loop": (lambda w: looped(), "nested too deeply"),
    "folded": (lambda w: folded(), "nested too deeply"),
    "stretched": (lambda w: {NAME: torch.ones(1).expand(2**40)}, "claims more numbers"),
    "sparse": (lambda w: w | {NAME: torch.eye(32).to_sparse()}, "no ordinary tensor"),
    "meta": (lambda w: w | {NAME: torch.ones(32, device="meta")}, "no ordinary tensor"),
    "huge": (lambda w: w | {NAME: torch.ones(1).expand(32)}, "claims more numbers"),
}


@pytest.mark.parametrize(
    "case, name",
    [*((case, "pytorch_model.bin") for case in BIN_CASES), ("none", "mm_projector.bin")],
)
def test_a_bin_file_of_other_things_is_refused(folder, weights, case, name):
    change, says = BIN_CASES[case]
    (folder / "model.safetensors").unlink()
    torch.save(change(weights), folder / name)
    message = refusal(folder, None if name == "pytorch_model.bin" else CHECKPOINT)
    assert says in message and name in message


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn],
)
@pytest.mark.parametrize("name", [NAME, "model.embed_tokens.weight"])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder, weights, name, dtype):
    save_file(weights | {name: weights[name].to(dtype)}, folder / "model.safetensors")
    message = refusal(folder)
    assert f"{name} holds {str(dtype)[6:]} numbers" in message and "quantised" in message


@pytest.mark.parametrize("kind", ["cut off", "empty", "text", "another length", "a folder"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_weight_file_is_named(folder, weights, kind, name):
    path = folder / name
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
        torch.save(weights, path)
    data = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
        assert "no model weights" in refusal(folder)
        return
    changed = {"cut off": data[: len(data) // 2], "empty": b"", "text": b"version https://git-lfs"}
    path.write_bytes(changed.get(kind, b"\xff" * 7 + data[7:]))
    assert name in refusal(folder)


def test_a_compressed_archive_is_not_unfolded(folder, weights):
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "plain.bin")
    with (
        zipfile.ZipFile(folder / "plain.bin") as plain,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "compressed" in refusal(folder)


def test_a_pickle_that_asks_for_all_memory_is_refused(folder):
    (folder / "model.safetensors").unlink()
    stream = b"\x80\x02c__builtin__\nbytearray\n" + pickle.dumps(2**62, 2)[2:-1] + b"\x85R."
    (folder / "pytorch_model.bin").write_bytes(stream)
    assert "pytorch_model.bin" in refusal(folder)


def test_a_model_of_more_or_other_layers_than_its_config_is_refused(folder, weights):
    write_config(folder, num_hidden_layers=31)
    assert "another kind or size: model.layers.31" in refusal(folder)
    write_config(folder, num_hidden_layers=32)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file(weights | bias, folder / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.bias" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
def test_weights_that_are_not_finite_are_refused(tmp_path, folder, weights, value):
    broken = weights[NAME].clone()
    broken[5] = value
    save_file(weights | {NAME: broken}, folder / "model.safetensors")
    assert f"{NAME} is not finite in float16" in refusal(folder, torch_dtype="float16")
    if value == 1e30:
        assert load(folder)[1] is not None
        return
    save_file(weights, folder / "model.safetensors")
    adapter = copy_of(CHECKPOINT, tmp_path / "tuned")
    write_adapter(adapter, weights)
    torch.save({"model.mm_projector.0.bias": broken}, adapter / "non_lora_trainables.bin")
    assert "is not finite" in refusal(adapter, folder)


# Indexes.


@pytest.mark.parametrize(
    "index, says",
    [
        ({"weight_map": {NAME: "../outside.safetensors"}}, "names '../outside.safetensors'"),
        ({"weight_map": {NAME: "/etc/passwd"}}, "names '/etc/passwd'"),
        ({"weight_map": {NAME: "sub/part.safetensors"}}, "in the same folder"),
        ({"weight_map": {NAME: "..\\outside.bin"}}, "in the same folder"),
        ({"weight_map": {NAME: "config.json"}}, "in the same folder"),
        ({"weight_map": {NAME: "a.safetensors\n"}}, "in the same folder"),
        ({"weight_map": {NAME: ""}}, "in the same folder"),
        ({"weight_map": {NAME: None}}, "names None"),
        ({"weight_map": {NAME: ["a.bin"]}}, "in the same folder"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "expected an object"),
        ({"weight_map": {NAME: "absent.safetensors"}}, "missing files: absent.safetensors"),
    ],
    ids=lambda value: str(value)[:48],
)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_names_files_of_its_folder_only(folder, weights, kind, index, says):
    (folder / "model.safetensors").unlink()
    save_file(weights, folder.parent / "outside.safetensors")
    torch.save(weights, folder.parent / "outside.bin")
    (folder / f"{kind}.index.json").write_text(json.dumps(index))
    message = refusal(folder)
    assert says in message and f"{kind}.index.json" in message


def test_the_index_of_a_tower_or_a_base_is_no_way_out_either(tmp_path, folder, weights):
    index = json.dumps({"weight_map": {"vision_model.x": "../../outside.safetensors"}})
    tower = copy_of(TOWER, tmp_path / "tower")
    (tower / "model.safetensors.index.json").write_text(index)
    assert "in the same folder" in refusal(folder, vision_tower=str(tower))
    base = copy_of(CHECKPOINT, tmp_path / "base")
    (base / "model.safetensors.index.json").write_text(index)
    torch.save({n: t for n, t in weights.items() if "projector" in n}, folder / "mm_projector.bin")
    assert "in the same folder" in refusal(folder, base)


def test_files_that_are_links_are_read_as_the_hub_stores_them(tmp_path, folder):
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--mine" / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = tmp_path / "models--me--mine" / "blobs" / str(number)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert load(snapshot)[1].config.vocab_size == 700


# Tokenizers, towers and adapters.


@pytest.mark.parametrize(
    "name, data",
    [
        ("tokenizer.model", b"rubbish"),
        ("tokenizer.model", b""),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"tokenizer_class": "os.system"}'),
        ("tokenizer_config.json", b'{"tokenizer_class": 7}'),
        ("tokenizer_config.json", b"\xff\xff"),
        ("special_tokens_map.json", b"[1]"),
        ("added_tokens.json", b'{"<far>": 1000000000}'),
        ("added_tokens.json", b"7"),
    ],
)
def test_a_junk_tokenizer_is_named(folder, name, data):
    (folder / name).write_bytes(data)
    message = refusal(folder)
    assert "tokenizer" in message and str(folder) in message


@pytest.mark.parametrize(
    "name, values, says",
    [
        ("config.json", {"num_attention_heads": 0}, "num_attention_heads"),
        ("config.json", {"hidden_size": 2**50}, "hidden_size"),
        ("config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ("config.json", {"image_size": 10**9}, "image_size"),
        ("config.json", {"patch_size": 0}, "patch_size"),
        ("config.json", {"patch_size": 1, "image_size": 8000}, "256 x 256 patches"),
        ("config.json", {"hidden_act": "magic"}, "describes no vision model"),
        ("config.json", {"model_type": "siglip"}, "only CLIP towers"),
        ("preprocessor_config.json", {"crop_size": {"height": 10**9, "width": 1}}, "impossible"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "impossible"),
        ("preprocessor_config.json", {"image_mean": "grey"}, "impossible"),
        ("preprocessor_config.json", {"size": "large"}, "image processor"),
    ],
    ids=str,
)
def test_a_tower_is_checked_like_a_model(tmp_path, folder, name, values, says):
    tower = copy_of(TOWER, tmp_path / "tower", weights=True)
    whole = json.loads((tower / name).read_text())
    inner = whole.get("vision_config", whole) if "model_type" not in values else whole
    inner |= values
    (tower / name).write_text(json.dumps(whole))
    message = refusal(folder, vision_tower=str(tower))
    assert says in message and str(tower) in message


def test_a_tower_without_all_of_its_weights_is_refused(tmp_path, folder):
    tower = copy_of(TOWER, tmp_path / "tower")
    tensors = load_file(TOWER / "model.safetensors")
    name = "vision_model.embeddings.class_embedding"
    save_file({n: t for n, t in tensors.items() if n != name}, tower / "model.safetensors")
    assert f"lacks 1 weights: {name}" in refusal(folder, vision_tower=str(tower))
    save_file(tensors | {name: tensors[name].long()}, tower / "model.safetensors")
    assert "int64 numbers" in refusal(folder, vision_tower=str(tower))


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"r": 0}, "must be positive numbers, not 0"),
        ({"r": None}, "must be positive numbers"),
        ({"lora_alpha": "8"}, "must be positive numbers"),
        ({"lora_alpha": float("nan")}, "must be positive numbers"),
        ({"rank_pattern": []}, None),
        ({"rank_pattern": [1]}, "must be an object"),
        ({"rank_pattern": {"(a+)+$": 1}}, "expected names of modules"),
        ({"alpha_pattern": {"(q_proj": 1}}, "expected names of modules"),
        ({"rank_pattern": {"q_proj": 0}}, "must be positive numbers"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
    ],
    ids=str,
)
def test_an_adapter_config_is_checked(tmp_path, weights, settings, says):
    folder = copy_of(CHECKPOINT, tmp_path / "tuned")
    write_adapter(folder, weights, **settings)
    if says is None:
        assert load(folder, CHECKPOINT)[1] is not None
        return
    message = refusal(folder, CHECKPOINT)
    assert says in message and "adapter_config.json" in message


def test_adapter_weights_of_another_model_are_refused(tmp_path, weights):
    folder = copy_of(CHECKPOINT, tmp_path / "tuned")
    write_adapter(folder, weights)
    name = "base_model.model.model.layers.3.self_attn.q_proj"
    for shapes in (((2, 16), (32, 2)), ((3, 32), (32, 2)), ((2,), (32, 2))):
        down, up = (torch.ones(shape) for shape in shapes)
        pair = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        save_file(pair, folder / "adapter_model.safetensors")
        assert "do not fit its shape (32, 32)" in refusal(folder, CHECKPOINT)


@pytest.mark.parametrize("rows", [703, 1])
def test_a_whole_weight_in_an_adapter_has_the_shape_of_the_models(tmp_path, weights, rows):
    """As a vocabulary that was trained with more tokens; one row would do for all of them."""
    write_adapter(tmp_path, weights)
    path = tmp_path / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.weight": torch.ones(rows, 32)}
    save_file(load_file(path) | head, path)
    message = refusal(tmp_path, CHECKPOINT)
    assert f"'lm_head.weight' has shape ({rows}, 32), the model's (700, 32)" in message
