"""What the config of a Qwen2.5-VL checkpoint may say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from operator import eq

from ..config_file import (
    SIZE,
    Rule,
    check_config,
    check_rules,
    earlier_words,
    number,
    shown,
    whole,
)

#: what no default may stand for: another value would give answers all the same, wrong ones
NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "rope_theta",
    "intermediate_size",
    "num_key_value_heads",
    "image_token_id",
    "vision_config",
)
#: settings of the released models that are fixed here, and may be repeated by a file
FIXED: dict[str, int | str] = {
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_chans": 3,
    "in_channels": 3,
    "hidden_act": "silu",
}
#: what a file that does not say it means in transformers, where that is another value than here
UNSAID = {"rms_norm_eps": 1e-5}
UNSAID_VISION = {"tokens_per_second": 4}
VISION_RULES = {
    "depth": whole(1, 512),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "out_hidden_size": SIZE,
    "num_heads": whole(1, 2**12),
    "patch_size": whole(1, 2**10),
    "window_size": whole(1, 2**14),
    "tokens_per_second": number(0, 1e3),
    "fullatt_block_indexes": Rule(
        "a list of layers",
        lambda value: isinstance(value, list) and all(type(v) is int and v >= 0 for v in value),
        or_none=False,
    ),
    **{
        key: Rule(f"{value}, the only value supported", partial(eq, value))
        for key, value in FIXED.items()
    },
}
TEXT_RULES = {
    "rope_scaling": Rule(
        '{"type": "mrope", "mrope_section": [TIME, HEIGHT, WIDTH]}',
        lambda value: sections_of(value) is not None,
        or_none=False,
    ),
    "use_sliding_window": Rule("false: sliding windows are not supported", lambda v: v is False),
    "image_token_id": whole(0, 2**22),
    "video_token_id": whole(0, 2**22),
    "vision_start_token_id": whole(0, 2**22),
    "vision_end_token_id": whole(0, 2**22),
}


def sections_of(scaling) -> list[int] | None:
    """Frequencies of each axis in a `rope_scaling`; None when it describes something else. Files
    saved by later versions of transformers call the type "default"."""
    if not isinstance(scaling, dict):
        return None
    kind = scaling.get("type", scaling.get("rope_type"))
    sections = scaling.get("mrope_section")
    if kind not in ("mrope", "default") or not isinstance(sections, list) or len(sections) != 3:
        return None
    fits = all(type(count) is int and 0 <= count < 2**12 for count in sections)
    return sections if fits else None


def flat(values: Mapping) -> dict:
    """With those of the decoder beside the others, and under the names of released files: later
    versions of transformers keep them in `text_config`."""
    inner = values.get("text_config")
    values = earlier_words(values)
    return {**earlier_words(inner), **values} if isinstance(inner, dict) else values


def check_own(values: Mapping, source: str) -> None:
    """Raises ValueError for the first of what this family has beside other ones that is
    impossible; values: `flat` ones, of which a config needs not say all."""
    check_rules(values, TEXT_RULES, source)
    vision = values["vision_config"]
    if not isinstance(vision, dict):
        raise ValueError(f"{source}: vision_config must be an object, not {shown(vision)}")
    check_rules(vision, VISION_RULES, f"{source}: vision_config")
    if sentence := impossible_tower(vision, values):
        raise ValueError(f"{source}: vision_config: {sentence}")


def checked_config(values: Mapping, source: str) -> dict:
    """The values that the model is built from. Raises ValueError for the first impossible one."""
    values = with_unsaid(flat(values), UNSAID)
    if lacking := [key for key in NEEDED if values.get(key) is None]:
        raise ValueError(f"{source} does not say {' and '.join(lacking)}")
    if "rope_scaling" not in values:
        raise ValueError(f"{source} does not say rope_scaling")
    own = ("rope_scaling", "vision_config")
    checked = check_config({k: v for k, v in values.items() if k not in own}, source)
    check_own(values, source)
    vision = values["vision_config"]
    vision = {key: value for key, value in vision.items() if key in VISION_RULES}
    vision = with_unsaid(vision, UNSAID_VISION)
    return {**checked, "rope_scaling": values["rope_scaling"], "vision_config": vision}


def with_unsaid(values: Mapping, unsaid: Mapping) -> dict:
    """With those of `unsaid` that the values leave out."""
    return {**values, **{key: v for key, v in unsaid.items() if values.get(key) is None}}


def impossible_tower(vision: Mapping, values: Mapping) -> str | None:
    """What is wrong with the sizes of a tower together; None when nothing is."""
    width, heads = vision.get("hidden_size", 1280), vision.get("num_heads", 16)
    if width % heads or width // heads % 4:
        return f"hidden_size {width} must give each of {heads} heads a width divisible by 4"
    if vision.get("out_hidden_size", values["hidden_size"]) != values["hidden_size"]:
        return (
            f"out_hidden_size {vision['out_hidden_size']} is not the hidden_size "
            f"{values['hidden_size']} of the language model"
        )
    block = 2 * vision.get("patch_size", 14)
    if vision.get("window_size", 112) % block:
        return f"window_size {vision['window_size']} is no multiple of {block}, a block of patches"
    return None
