"""Recorded loading branches: a projector on a base model, and an unmerged LoRA adapter."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from tests.golden_cases import load_json, locate
from tests.golden_checks.e2e import LOGITS_ATOL, check_tokens, prompt_of
from tests.golden_checks.models import open_images, prepare

PROJECTOR = [
    f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
]


def check_loading(case, folder, report):
    """Both branches; the JSON says how the files are made, the npz what comes out."""
    content = load_json({"file": "loading.json"}, folder)
    with np.load(folder / "loading.npz") as arrays:
        recorded = dict(arrays)
    base = locate(case["checkpoint"], folder)
    recipes = {row["name"]: row for row in content}
    branches = {
        "projector_only_llava_llama": (write_projector, "llava-projector"),
        "lora_unmerged": (write_lora, "llava-lora"),
    }
    for name, (write, model_name) in branches.items():
        if name not in recipes:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch), base, recipes.get("lora_files"))
            tokenizer, model, processor, _ = load_pretrained_model(
                scratch, str(base), model_name, device="cpu", torch_dtype=torch.float32
            )
        report.prefix = f"{name}: "
        answer(recipes[name], folder, tokenizer, model, processor, name, recorded, report)
    report.prefix = ""


def write_projector(target: Path, base: Path, _) -> None:
    """A folder as projector pretraining leaves it: nine tenths of the base's projector."""
    weights = load_file(base / "model.safetensors")
    (target / "config.json").write_text((base / "config.json").read_text())
    torch.save({name: 0.9 * weights[name] for name in PROJECTOR}, target / "mm_projector.bin")


def write_lora(target: Path, base: Path, recipe: dict) -> None:
    """A folder as LoRA training leaves it, filled by the recorded recipe."""
    weights = load_file(base / "model.safetensors")
    config = recipe["adapter_config"]
    (target / "config.json").write_text((base / "config.json").read_text())
    (target / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": recipe["target_modules"]})
    )
    trained = {f"base_model.model.{name}": 1.1 * weights[name] for name in PROJECTOR}
    torch.save(trained, target / "non_lora_trainables.bin")
    adapter = {}
    for name, weight in weights.items():
        if name.split(".")[-2] in recipe["target_modules"]:
            module = "base_model.model." + name.removesuffix(".weight")
            adapter[f"{module}.lora_A.weight"] = (config["r"], weight.shape[1])
            adapter[f"{module}.lora_B.weight"] = (weight.shape[0], config["r"])
    # The recipe numbers the names they have in memory; ".default" does not change their order.
    adapter = {
        name: lora_values(number, *shape)
        for number, (name, shape) in enumerate(sorted(adapter.items()))
    }
    save_file(adapter, target / "adapter_model.safetensors")


def lora_values(number: int, rows: int, columns: int) -> torch.Tensor:
    i, j = np.arange(rows)[:, None], np.arange(columns)[None]
    return torch.tensor(0.05 * np.sin(1 + 0.37 * number + 0.11 * i + 0.07 * j)).float()


def answer(recipe, folder, tokenizer, model, processor, name, recorded, report):
    """The model's first logits and greedy tokens for the recorded image and question."""
    case = {"image": recipe["image"], "conv_mode": "vicuna_v1"}
    prompt = prompt_of(case, recipe["question"])
    input_ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    report.equal("input_ids", input_ids[0], recorded["input_ids"])
    report.equal("model class", type(model).__name__, "LlavaLlamaForCausalLM")
    pixels, sizes = prepare(open_images([recipe["image"]], folder), model, processor)
    output = model.generate(
        input_ids,
        images=pixels,
        image_sizes=sizes,
        do_sample=False,
        max_new_tokens=len(recorded[f"{name}_output_ids"]),
        eos_token_id=-1,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = torch.stack(output.scores, dim=1)[0]
    report.close("first_logits", scores[0], recorded[f"{name}_first_logits"], LOGITS_ATOL)
    wanted = {"output_ids": recorded[f"{name}_output_ids"]}
    check_tokens(output.sequences[0], scores, wanted, report)
