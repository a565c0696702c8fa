"""What a checkpoint folder is: decided by its config and its files, by its name as a last resort.

Models that are not supported are refused here, by name and with what to use instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from llava.config_file import earlier_words, read_config, read_json, shown
from llava.llava_hf import config_here, is_llava_hf
from llava.weight_files import WEIGHT_FILES, hub_file, tensor_file

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model"
PROJECTOR = "mm_projector"
NON_LORA = "non_lora_trainables"
#: architecture -> family of its language model
LLAVA_MODELS = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral"}
LANGUAGE_MODELS = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
#: architectures that see images without being a LLaVA
OTHER_VISION_MODELS = {"Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl"}
OTHER_FAMILIES = frozenset(OTHER_VISION_MODELS.values())
#: model_type -> family, for configs that name no architecture. "llava" alone is an early LLaVA
MODEL_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llama": "llama",
    "llava_mistral": "mistral",
    "mistral": "mistral",
    "qwen2_5_vl": "qwen2_5_vl",
}
#: settings that only configs of LLaVA have
LLAVA_KEYS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size", "mm_vision_select_layer")
SUPPORTED = (
    "supported are LLaVA-1.5 and LLaVA-NeXT (1.6) on Llama or Mistral "
    f"({', '.join(LLAVA_MODELS)}), for example liuhaotian/llava-v1.5-7b or "
    "llava-hf/llava-1.5-7b-hf, and Qwen2.5-VL "
    f"({', '.join(OTHER_VISION_MODELS)})"
)
#: architecture or model_type of other layouts -> what it is, and what to use instead
FOREIGN = {
    "Qwen2VLForConditionalGeneration": ("a Qwen2-VL model", "it is not supported"),
    "LlavaOnevisionForConditionalGeneration": ("a LLaVA-OneVision model", "it is not supported"),
    "LlavaQwenForCausalLM": ("LLaVA on a Qwen language model", "it is not supported"),
    "LlavaGemmaForCausalLM": ("LLaVA on a Gemma language model", "it is not supported"),
    "LlavaPhiForCausalLM": ("LLaVA on a Phi language model", "it is not supported"),
    "LlavaMptForCausalLM": ("LLaVA on an MPT language model", "it is not supported"),
    "LlavaMPTForCausalLM": ("LLaVA on an MPT language model", "it is not supported"),
    "LlavaMixtralForCausalLM": ("LLaVA on a Mixtral language model", "it is not supported"),
}
#: model_type of a config without an architecture -> its entry in FOREIGN
FOREIGN_TYPES = {
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "llava_qwen": "LlavaQwenForCausalLM",
    "llava_gemma": "LlavaGemmaForCausalLM",
    "llava_phi": "LlavaPhiForCausalLM",
    "llava_mpt": "LlavaMptForCausalLM",
    "llava_mixtral": "LlavaMixtralForCausalLM",
}
#: ending of the model_type in a published trained part of a method, whose config is a model's
RELEASED_PART = "_gp"
TOWER_TYPES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "clip_text_model")
#: files of other formats -> what they are
OTHER_FILES = (
    ((".gguf", ".ggml"), "a llama.cpp file (GGUF)"),
    ((".h5", ".msgpack"), "weights for TensorFlow or Flax"),
    ((".onnx",), "an ONNX export"),
    (("consolidated.00.pth", "params.json"), "weights in Meta's original layout"),
    (("model_index.json",), "a diffusion pipeline"),
    (("zero_to_fp32.py", "latest"), "a DeepSpeed checkpoint: run its zero_to_fp32.py first"),
)


@dataclass(frozen=True)
class Kind:
    """What is loaded.

    family:     language model: "llama", "mistral", or the `model_type` of a plain model;
                "qwen2_5_vl" is a family of its own
    multimodal: whether it sees images
    delta:      what the folder adds to a base: "lora", "projector", or "" for a whole model
    """

    family: str
    multimodal: bool
    delta: str = ""


def architecture_of(values: Mapping) -> str:
    """The first name in `architectures`, or ""."""
    names = values.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    return first if isinstance(first, str) else ""


def model_type_of(values: Mapping) -> str:
    kind = values.get("model_type")
    return kind if isinstance(kind, str) else ""


def is_multimodal(values: Mapping) -> bool:
    """Whether a config describes a supported model that sees images."""
    return is_llava(values) or family_in(values) in OTHER_FAMILIES


def is_llava(values: Mapping) -> bool:
    """Whether a config describes a LLaVA, in whatever words its time had for that."""
    if architecture_of(values).startswith("Llava") or model_type_of(values).startswith("llava"):
        return True
    return any(values.get(key) is not None for key in LLAVA_KEYS)


def family_in(values: Mapping) -> str | None:
    """The supported language model that a config names, if it does."""
    known = LLAVA_MODELS | LANGUAGE_MODELS | OTHER_VISION_MODELS
    return known.get(architecture_of(values)) or MODEL_TYPES.get(model_type_of(values))


def family_of(values: Mapping, source: str) -> str:
    """The language model a config describes: "llama", "mistral", "qwen2_5_vl", or a plain model's
    own type.

    The architecture decides, not `model_type`: old checkpoints say "llava", a name that belongs to
    another model in transformers. Raises ValueError for what is not supported.
    """
    architecture, kind = architecture_of(values), model_type_of(values)
    released = kind.endswith(RELEASED_PART) and kind.removesuffix(RELEASED_PART) in MODEL_TYPES
    if released or ("pruning_method" in values and not architecture):
        named = values.get("pruning_method")
        method = "a pruning method" if named is None else f"the pruning method {shown(named)}"
        raise ValueError(
            f"{source} is the trained part of {method}, not a model: name it with --pruning-arg "
            "beside the model it was trained on"
        )
    if architecture in OTHER_VISION_MODELS or not architecture and kind in OTHER_FAMILIES:
        return OTHER_VISION_MODELS.get(architecture, kind)  # nested as they are released
    nested = any(isinstance(values.get(key), dict) for key in ("text_config", "vision_config"))
    known = LLAVA_MODELS | LANGUAGE_MODELS
    if architecture in known and not nested:
        return known[architecture]
    name = architecture or FOREIGN_TYPES.get(kind, "")
    if name in FOREIGN:
        what, instead = FOREIGN[name]
        raise ValueError(f"{source} is {what} ({name}): {instead}; {SUPPORTED}")
    if kind in TOWER_TYPES:
        raise ValueError(
            f"{source} is a vision tower ({architecture or kind}), not a model: name it with "
            "--vision-tower beside the model that uses it"
        )
    if nested or is_multimodal(values) or architecture.endswith("ConditionalGeneration"):
        if kind in MODEL_TYPES and not architecture and not nested:
            return MODEL_TYPES[kind]
        raise ValueError(
            f"{source} is a {shown(architecture or kind)} model, which is not supported; "
            f"{SUPPORTED}"
        )
    if not architecture and not kind:
        raise ValueError(f"{source} names neither architectures nor a model_type; {SUPPORTED}")
    return MODEL_TYPES.get(kind, kind) if not architecture else kind


def kind_of(folder: str, base: str | None = None, model_name: str = "") -> tuple[Kind, dict]:
    """(kind, config values) of what the folder, on top of its base if it has one, amounts to.

    The values are those of the folder, or of the base where the folder has no config.json. The name
    is asked only where neither config nor files tell whether images are meant.
    Raises ValueError or FileNotFoundError with the way out for anything that cannot be loaded.
    """
    delta = delta_of(folder)
    if base is None:
        if delta and not has_weights(folder):
            raise ValueError(needs_base(folder, delta))
        values = values_in(folder, required=False)
        if not values:
            raise FileNotFoundError(f"{folder} holds no config.json, {instead_of_config(folder)}")
        family = family_of(values, folder)
        return Kind(family, is_multimodal(values)), values
    values, base_values = values_in(folder, required=False), values_in(base)
    family = family_of(base_values, base)
    if values and family_of(values, folder) != family:
        raise ValueError(
            f"{folder} belongs to a {family_of(values, folder)} model, but its base {base} is a "
            f"{family} model"
        )
    known = is_multimodal(values) or is_multimodal(base_values) or delta == "projector"
    multimodal = known or (not values and "llava" in model_name.lower())
    if multimodal and not delta:
        raise FileNotFoundError(
            f"{folder} holds neither mm_projector.bin nor an adapter to put on top of {base}"
            + (": it is a whole model, leave out the base" if has_weights(folder) else "")
        )
    return Kind(family, multimodal, delta), values or base_values


def values_in(folder: str, required: bool = True) -> dict:
    """The values of config.json in the words used here, whatever layout the folder is in; {} when
    there is none and none is required."""
    values = earlier_words(read_config(folder, required))
    if not is_llava_hf(values):
        return values
    return config_here(values, f"{folder}/config.json", os.path.abspath(folder))


def delta_of(folder: str) -> str:
    """What the files of a folder add to a base: "lora", "projector" or ""."""
    adapter = os.path.isfile(os.path.join(folder, ADAPTER_CONFIG))
    if adapter or any(tensor_file(folder, stem) for stem in (NON_LORA, ADAPTER)):
        return "lora"
    return "projector" if projector_file(folder) else ""


def projector_file(folder: str) -> str | None:
    """The trained projector in a folder, or beside one called `checkpoint-N`, where training keeps
    those of its steps: `mm_projector/checkpoint-N.bin`."""
    parent, name = os.path.split(os.path.abspath(folder))
    beside = tensor_file(os.path.join(parent, PROJECTOR), name)
    return tensor_file(folder, PROJECTOR) or (beside if name.startswith("checkpoint-") else None)


def has_weights(folder: str) -> bool:
    """Whether a folder holds a whole model."""
    return any(os.path.isfile(os.path.join(folder, n)) for pair in WEIGHT_FILES for n in pair)


def needs_base(folder: str, delta: str) -> str:
    what = "a LoRA adapter" if delta == "lora" else "a projector"
    base = None
    if os.path.isfile(path := os.path.join(folder, ADAPTER_CONFIG)):
        base = read_json(path).get("base_model_name_or_path")
    named = f" (its {ADAPTER_CONFIG} names {shown(base)})" if isinstance(base, str) else ""
    return f"{folder} is {what} without its model: pass --model-base (model_base) with it{named}"


def instead_of_config(folder: str) -> str:
    """What a folder without config.json seems to be, and what to name instead."""
    names = sorted(os.listdir(folder))
    if "snapshots" in names:  # a repository in the hub's cache: one folder for each version
        kept = sorted(os.listdir(os.path.join(folder, "snapshots")))
        names += [os.path.join("snapshots", version) for version in kept]
    inner = [n for n in names if os.path.isfile(os.path.join(folder, n, "config.json"))]
    if inner:
        return f"but its folders do: name one of {', '.join(inner[:8])}"
    for endings, what in OTHER_FILES:
        if found := next((n for n in names if n.endswith(endings)), None):
            return f"but {found}: this is {what}, which is not supported; {SUPPORTED}"
    return "so it is no checkpoint folder"


def checkpoint_config(path: str) -> dict:
    """The values of config.json of a folder or hub repository, in the words used here; {} when
    there is none to be had."""
    if os.path.isdir(path):
        return values_in(path, required=False)
    found = hub_file(path, "config.json")
    values = earlier_words(read_json(found)) if found else {}
    return config_here(values, found) if is_llava_hf(values) else values
