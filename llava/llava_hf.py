"""The layout of transformers for LLaVA ("llava-hf"): config values and names of weights, translated
into those used here and back.

Weights have two generations of names: those of the released files, which every version reads, and
those of the modules since transformers 4.52; since 5, a tower has one level less in both. Configs
nest the decoder's values in `text_config` and
the tower's in `vision_config`.
"""

from __future__ import annotations

from collections.abc import Mapping

from llava.config_file import earlier_words, pinpoints, shown
from llava.image_settings import ImageSettings

LAYOUT = "llava-hf"
LLAVA, NEXT = "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"
MODEL_TYPES = {LLAVA: "llava", NEXT: "llava_next"}
RELEASED, MODULES = "released", "modules"
GENERATIONS = (RELEASED, MODULES)
#: what the names of the tower's weights begin with here
TOWER = "model.vision_tower.vision_tower."
#: beginnings of names: here, in released files, of modules since 4.52. The first that fits counts
NAMES = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    (TOWER, "vision_tower."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
#: what the names of a CLIP's vision weights begin with, until transformers 5
VISION_PREFIX = "vision_model."
#: what they begin with behind it
VISION_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
MODULE_NAMES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
}
#: language model by its `model_type` -> architecture and `model_type` here
DECODERS = {
    "llama": ("LlavaLlamaForCausalLM", "llava_llama"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral"),
}
#: CLIP ViT-L/14 at 336 pixels: the tower of a config without `vision_config`
CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
#: resolutions (height, width) of a LLaVA-NeXT whose config lists none
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
#: token of an image in a config that names none
DEFAULT_IMAGE_ID = 32000
#: tokens that the layout adds behind the vocabulary, and what its rows are a multiple of
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
ROWS_MULTIPLE = 64
#: key of our exports for what the layout has no words for, and which of our values that is
SETTINGS = "llava_settings"
OWN_VALUES = ("conv_mode", "image_aspect_ratio", "anyres_selection", "max_sequence_length")
OWN_VALUES += ("tokenizer_model_max_length", "tokenizer_padding_side")
#: `vision_feature_select_strategy` -> `mm_vision_select_feature`
STRATEGIES = {"default": "patch", "full": "cls_patch"}


def is_llava_hf(values: Mapping) -> bool:
    """Whether a config is in this layout."""
    names = values.get("architectures")
    if isinstance(names, list) and names:
        return isinstance(names[0], str) and names[0] in MODEL_TYPES
    nested = any(isinstance(values.get(key), dict) for key in ("text_config", "vision_config"))
    return nested and values.get("model_type") in MODEL_TYPES.values()


def layout_note(values: Mapping) -> str | None:
    """A sentence on what differs from transformers for a model in this layout; None where nothing
    does."""
    if not is_llava_hf(values) or is_next(values) or SETTINGS in values:
        return None
    return (
        "Images are padded to squares, as LLaVA-1.5 was trained; the image processor of "
        "transformers cuts out the middle of those that are not square."
    )


def name_here(name: str) -> str:
    """A weight's name here, from its name in either generation; names used here stay."""
    if name.startswith((TOWER, "lm_head.")):
        return name
    for ours, theirs in NAMES:
        for start in (theirs, module_name(theirs)):
            if name.startswith(start):
                rest = name.removeprefix(start)
                return ours + (vision_name(rest) if ours == TOWER else rest)
    return name


def vision_name(name: str) -> str:
    """A vision weight's name in a CLIP, from its name there in any version of transformers."""
    return f"{VISION_PREFIX}{name}" if name.startswith(VISION_PARTS) else name


def name_there(name: str, generation: str = RELEASED) -> str:
    """A weight's name in this layout, from its name here."""
    ours, theirs = next(pair for pair in NAMES if name.startswith(pair[0]))
    start = theirs if generation == RELEASED else module_name(theirs)
    return start + name.removeprefix(ours)


def module_name(start: str) -> str:
    return MODULE_NAMES.get(start, f"model.{start}")


def config_here(values: Mapping, source: str, tower: str = ".") -> dict:
    """Our config values of a model in this layout; they are only translated, not yet checked.

    tower: folder with the model, whose config and image settings are those of its tower, too
    Raises ValueError for parts that no model here has.
    """
    values = earlier_words(values)
    text, vision = values.get("text_config"), vision_values(values, source)
    if not isinstance(text, dict):
        raise ValueError(f"{source}: text_config must be an object, not {shown(text)}")
    text = earlier_words(text)
    decoder = text.get("model_type", "llama")
    if not isinstance(decoder, str) or decoder not in DECODERS:
        raise ValueError(
            f"{source}: the language model is {shown(decoder)} (text_config), which is not "
            f"supported; choose {' or '.join(DECODERS)}"
        )
    layer = values.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise ValueError(
            f"{source}: vision_feature_layer must be one layer of the tower, not {shown(layer)}"
        )
    strategy = values.get("vision_feature_select_strategy", "default")
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ValueError(
            f"{source}: vision_feature_select_strategy must be {' or '.join(STRATEGIES)}, not "
            f"{shown(strategy)}"
        )
    for key, only in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
        if values.get(key, only) != only:
            raise ValueError(
                f"{source}: {key} must be {only}, the only value supported, not "
                f"{shown(values[key])}"
            )
    architecture, model_type = DECODERS[decoder]
    own = values.get(SETTINGS)
    own = {key: own[key] for key in OWN_VALUES if key in own} if isinstance(own, dict) else {}
    top = ("torch_dtype", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    return {
        **{key: value for key, value in text.items() if not key.startswith("_")},
        **{key: values[key] for key in top if values.get(key) is not None},
        "architectures": [architecture],
        "model_type": model_type,
        "padded_vocabulary": True,
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.get("hidden_size", 768),
        "mm_vision_tower": tower,
        "unfreeze_mm_vision_tower": True,  # its weights are among those of the model
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": STRATEGIES[strategy],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        **image_values(values, source),
        **own,
    }


def image_values(values: Mapping, source: str) -> dict:
    """How images are cut: that of LLaVA-1.5's training, or tiles of LLaVA-NeXT.

    Resolutions are (height, width) in this layout and (width, height) here.
    """
    if not is_next(values):
        return {"image_aspect_ratio": "pad"}
    given = values.get("image_grid_pinpoints") or PINPOINTS
    if isinstance(given, str) or not pinpoints(given):
        raise ValueError(
            f"{source}: image_grid_pinpoints must be a list of [height, width] in pixels, not "
            f"{shown(given)}"
        )
    return {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": turned(given),
    }


def turned(sizes) -> list[list[int]]:
    """[height, width] for [width, height], and the reverse."""
    return [[second, first] for first, second in sizes]


def is_next(values: Mapping) -> bool:
    return NEXT in (values.get("architectures") or ()) or values.get("model_type") == "llava_next"


def vision_values(values: Mapping, source: str) -> dict:
    """The values of the tower. Raises ValueError unless it is a CLIP."""
    vision = values.get("vision_config")
    vision = CLIP_LARGE if vision is None else vision
    if not isinstance(vision, dict):
        raise ValueError(f"{source}: vision_config must be an object, not {shown(vision)}")
    kind = vision.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise ValueError(
            f"{source}: the vision tower is {shown(kind)} (vision_config), only CLIP towers "
            "(clip_vision_model) are supported"
        )
    return vision


def check_words(values: Mapping, source: str) -> None:
    """Raises ValueError when our config values say what this layout has no words for."""
    tiles = values.get("image_aspect_ratio") == "anyres"
    only = {
        "mm_projector_type": ("linear", "mlp2x_gelu"),
        "mm_use_im_start_end": (False, False),
        "s2": (False, False),
        "mm_patch_merge_type": ("flat", "spatial_unpad" if tiles else "flat"),
    }
    for key, (default, fits) in only.items():
        if (value := values.get(key) or default) != fits:
            raise ValueError(
                f"{source}: the layout of transformers has no words for {key} {shown(value)}, "
                f"only for {fits!r}"
            )


def config_there(
    config, vision: Mapping, text: Mapping, rows: int, image_token: int, pad_token: int
) -> dict:
    """config.json in this layout of a model whose `config` is ours.

    vision, text: values of tower and decoder, as transformers writes them
    rows:         of the table of embeddings
    """
    ratio = getattr(config, "image_aspect_ratio", None)
    tiles = ratio == "anyres"
    architecture = NEXT if tiles else LLAVA
    strategies = {ours: theirs for theirs, ours in STRATEGIES.items()}
    selected = getattr(config, "mm_vision_select_feature", "patch")
    values = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "ignore_index": -100,
        "image_token_index": image_token,
        "pad_token_id": pad_token,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": strategies[selected],
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "torch_dtype": text["torch_dtype"],
        "vocab_size": rows,
        "text_config": {**text, "vocab_size": rows, "pad_token_id": pad_token},
        "vision_config": {**vision, "model_type": "clip_vision_model"},
    }
    if tiles:
        values["image_grid_pinpoints"] = turned(
            ImageSettings.of_checkpoint(config).image_grid_pinpoints
        )
        values["use_image_newline_parameter"] = True
    else:
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        values["image_seq_length"] = patches + (selected != "patch")  # with the class token
    own = {key: getattr(config, key, None) for key in OWN_VALUES}
    own["image_aspect_ratio"] = ratio or "square"  # said, as "pad" is what folders of others get
    values[SETTINGS] = {key: value for key, value in own.items() if value is not None}
    return values
