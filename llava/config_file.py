"""config.json and other JSON files of a checkpoint, checked before anything is built from them.

What a file of unknown origin may hold is said once, in `RULES` and `CHECKS`: a value of the wrong
type, size or combination is a ValueError that names the file, the key and what is possible.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

#: bytes; the largest real ones are indexes of a few megabytes
MAX_JSON_BYTES = 64 * 2**20
#: longest piece of a foreign value that an error repeats
SHOWN = 60
#: longest line that an error repeats of a library's
LONGEST = 300
#: keys of transformers' own that no model here reads; some make it allocate or change what it does
IGNORED_KEYS = ("num_labels", "id2label", "label2id", "pruned_heads", "problem_type", "auto_map")
IGNORED_KEYS += ("text_config", "vision_config", "quantization_config", "torchscript")
IGNORED_KEYS += ("return_dict", "use_return_dict")


class Rule(NamedTuple):
    """What a value must be: in words, and as a test. None stands for "not set" where allowed."""

    says: str
    holds: Callable[[Any], bool]
    or_none: bool = True


def whole(low: int, high: int, or_none: bool = False) -> Rule:
    return Rule(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
        or_none,
    )


def number(low: float, high: float = math.inf) -> Rule:
    """low <= value <= high, and finite."""
    says = f"a number from {low:g}" + (f" to {high:g}" if high < math.inf else " on")
    kinds = (int, float)
    return Rule(says, lambda v: type(v) in kinds and low <= v <= high and v < math.inf)


def choice(*values: str) -> Rule:
    return Rule(" or ".join(values), lambda value: isinstance(value, str) and value in values)


def ids(value: Any) -> bool:
    """A token id, or several."""
    values = value if isinstance(value, list) else [value]
    return all(type(v) is int and -1 <= v < 2**31 for v in values)


def pinpoints(value: Any) -> bool:
    """[[width, height], ...] in pixels, or the same as text."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if len(value) < 10_000 else None
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return False
    if not isinstance(value, list | tuple) or not 0 < len(value) <= 1000:
        return False
    return all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(side) is int and 0 < side <= 2**14 for side in pair)
        for pair in value
    )


def stretch(value: Any) -> bool:
    """Linear scaling of positions, the only kind the decoder knows."""
    if not isinstance(value, dict) or value.get("type", value.get("rope_type")) != "linear":
        return False
    return number(1e-6, 1e6).holds(value.get("factor"))


#: rules about single tokens that `generate` knows; no supported checkpoint brings any
TOKEN_RULES = ("bad_words_ids", "force_words_ids", "sequence_bias", "forced_decoder_ids")
TOKEN_RULES += ("suppress_tokens", "begin_suppress_tokens", "constraints")
TOKEN_RULES += ("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")

FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a short text", lambda value: isinstance(value, str) and len(value) <= 1000)
SIZE = whole(1, 2**18)
RULES = {
    # what the model is
    "model_type": TEXT,
    "architectures": Rule(
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
    ),
    "torch_dtype": Rule(
        "float32, float16, bfloat16 or float64",
        lambda value: (
            isinstance(value, str)
            and re.fullmatch(r"(torch\.)?(float(16|32|64)?|bfloat16|half)", value)
        ),
    ),  # fmt: skip
    "conv_mode": TEXT,
    # sizes of a decoder or tower
    "vocab_size": whole(1, 2**22),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": whole(1, 512),
    "num_attention_heads": whole(1, 2**12),
    "num_key_value_heads": whole(1, 2**12, or_none=True),
    "head_dim": whole(1, 2**12, or_none=True),
    "projection_dim": SIZE,
    "image_size": whole(1, 2**13),
    "patch_size": whole(1, 2**13),
    "num_channels": whole(3, 3),
    # how the decoder computes
    "max_position_embeddings": whole(1, 2**24),
    "hidden_act": TEXT,
    "rms_norm_eps": number(0, 1),
    "layer_norm_eps": number(0, 1),
    "initializer_range": number(0),
    "rope_theta": number(1, 1e15),
    "rope_scaling": Rule(
        'null or {"type": "linear", "factor": NUMBER}, the only kind that is supported', stretch
    ),
    "sliding_window": whole(1, 2**24, or_none=True),
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": Rule("false: biases of the MLP are not supported", lambda value: value is False),
    "use_cache": FLAG,
    "padded_vocabulary": FLAG,
    "bos_token_id": Rule("a token id", ids),
    "eos_token_id": Rule("a token id or a list of them", ids),
    "pad_token_id": Rule("a token id", ids),
    "max_sequence_length": whole(1, 2**24, or_none=True),
    "tokenizer_model_max_length": number(1),
    # how answers are generated
    "max_length": whole(1, 2**31, or_none=True),
    "max_new_tokens": whole(1, 2**31, or_none=True),
    "num_beams": whole(1, 1024, or_none=True),
    "num_return_sequences": whole(1, 1024, or_none=True),
    "do_sample": FLAG,
    "temperature": number(0, 1e9),
    "top_p": number(0, 1),
    "top_k": whole(0, 2**31, or_none=True),
    "typical_p": number(0, 1),
    "epsilon_cutoff": number(0, 1),
    "eta_cutoff": number(0, 1),
    "repetition_penalty": number(1e-3, 1e9),
    "encoder_repetition_penalty": number(1e-3, 1e9),
    "length_penalty": number(-1e9, 1e9),
    "diversity_penalty": number(0, 1e9),
    "min_length": whole(0, 2**31, or_none=True),
    "min_new_tokens": whole(0, 2**31, or_none=True),
    "num_beam_groups": whole(1, 1024, or_none=True),
    "no_repeat_ngram_size": whole(0, 1024, or_none=True),
    "encoder_no_repeat_ngram_size": whole(0, 0, or_none=True),
    "is_encoder_decoder": Rule("false: this is no decoder", lambda value: value is False),
    **dict.fromkeys(TOKEN_RULES, Rule("null in a file: pass it to generate", lambda _: False)),
    # what LLaVA adds
    "mm_vision_tower": TEXT,
    "vision_tower": TEXT,
    "mm_hidden_size": SIZE,
    "mm_projector_type": TEXT,
    "mm_vision_select_layer": whole(-512, 512, or_none=True),
    "mm_vision_select_feature": TEXT,
    "mm_patch_merge_type": choice("flat", "spatial", "spatial_unpad"),
    "image_aspect_ratio": choice("square", "pad", "anyres"),
    "image_grid_pinpoints": Rule("a list of [width, height] in pixels", pinpoints),
    "mm_use_im_start_end": FLAG,
    "mm_use_im_patch_token": FLAG,
    "unfreeze_mm_vision_tower": FLAG,
    "tune_mm_mlp_adapter": FLAG,
    "s2": FLAG,
    "s2_scales": Rule(
        "sizes in pixels with commas between them",
        lambda value: isinstance(value, str) and re.fullmatch(r"\d{1,4}(,\d{1,4}){0,7}", value),
    ),
}


def _heads(values: Mapping) -> str | None:
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    shared = values.get("num_key_value_heads") or heads
    if heads and width and width % heads:
        return f"hidden_size {width} cannot be divided by num_attention_heads {heads}"
    if heads and heads % shared:
        return f"num_attention_heads {heads} cannot be divided by num_key_value_heads {shared}"
    if heads and width and values.get("head_dim") not in (None, width // heads):
        return f"head_dim {values['head_dim']} is not supported, only hidden_size / heads is"
    if heads and width and (width // heads) % 2 and "image_size" not in values:
        return f"heads of odd width {width // heads} cannot have rotary positions"
    return None


def _projector(values: Mapping) -> str | None:
    match = re.fullmatch(r"mlp(\d+)x_gelu", values.get("mm_projector_type") or "")
    if match and not 1 <= int(match[1][:4]) <= 16:
        return f"mm_projector_type {shown(match[0])} must have 1 to 16 layers"
    return None


def _tower(values: Mapping) -> str | None:
    lacking = [k for k in ("mm_hidden_size", "mm_vision_select_layer") if values.get(k) is None]
    if values.get("mm_vision_tower") and lacking:
        return f"a model with an mm_vision_tower must say its {' and '.join(lacking)}"
    return None


def _patches(values: Mapping) -> str | None:
    size, patch = values.get("image_size"), values.get("patch_size")
    if size and patch and patch > size:
        return f"patch_size {patch} is larger than image_size {size}"
    if size and patch and size // patch > 256:
        return f"image_size {size} in patches of {patch} is more than 256 x 256 patches"
    return None


def _pinpoints(values: Mapping) -> str | None:
    if values.get("image_aspect_ratio") == "anyres" and not values.get("image_grid_pinpoints"):
        return "image_aspect_ratio anyres needs image_grid_pinpoints"
    return None


#: keys that only concern our own decoder; plain models are those of transformers
OWN_KEYS = ("rope_scaling", "head_dim", "mlp_bias", "sliding_window")
#: keys of which null says something: there is none. Null anywhere else is as good as no value
NONE_COUNTS = ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window")
#: what values must be together: each returns a sentence, or None
CHECKS = (_heads, _projector, _tower, _patches, _pinpoints)


def shown(value: Any) -> str:
    """A value of a foreign file as it may stand in an error."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def read_json(path: str) -> dict:
    """The object in a JSON file. Raises ValueError when it is damaged, huge, or no object."""
    if os.path.getsize(path) > MAX_JSON_BYTES:
        raise ValueError(f"{path} is refused: more than {MAX_JSON_BYTES >> 20} MiB of JSON")
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object: {{...}}")
    return values


def read_config(folder: str, required: bool = True) -> dict:
    """The values of config.json; {} when there is none and none is required.

    They are only known to be an object: `check_config` looks at them, once it is clear what kind
    of model they describe.
    """
    path = os.path.join(folder, "config.json")
    if os.path.isfile(path):
        return read_json(path)
    if required:
        raise FileNotFoundError(f"{folder} holds no config.json, so it is no checkpoint folder")
    return {}


def check_config(values: Mapping, source: str, plain: bool = False) -> dict:
    """The values that a model is built from, without those that are not set or not for models.

    source: the file they come from, for errors
    plain:  for a model class of transformers, which has its own ideas of what goes together
    Raises ValueError on the first impossible value.
    """
    check_rules(values, {k: r for k, r in RULES.items() if not (plain and k in OWN_KEYS)}, source)
    wrong = () if plain else filter(None, (check(values) for check in CHECKS))
    for sentence in wrong:
        raise ValueError(f"{source}: {sentence}")
    unset = {key for key in RULES if key not in NONE_COUNTS and values.get(key) is None}
    return {key: v for key, v in values.items() if key not in unset and key not in IGNORED_KEYS}


def check_rules(values: Mapping, rules: Mapping[str, Rule], source: str) -> None:
    """Raises ValueError for the first value that its rule does not allow."""
    for key, rule in rules.items():
        if key not in values or (values[key] is None and rule.or_none):
            continue
        if not rule.holds(values[key]):
            raise ValueError(f"{source}: {key} must be {rule.says}, not {shown(values[key])}")


def earlier_words(values: Mapping) -> dict:
    """The values under the names that they have in released files, where later versions of
    transformers call them `dtype`, `rope_parameters` and, inside `rope_scaling`, `rope_type`."""
    values = dict(values)
    if values.get("torch_dtype") is None and "dtype" in values:
        values["torch_dtype"] = values["dtype"]
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        if "rope_theta" in rope:
            values.setdefault("rope_theta", rope["rope_theta"])
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        values.setdefault("rope_scaling", {"rope_type": "default", **scaling})
    scaling = values.get("rope_scaling")
    if isinstance(scaling, dict) and "mrope_section" not in scaling:
        kind = scaling.get("rope_type")
        if kind == "default":  # positions as they are
            values["rope_scaling"] = None
        elif kind == "linear":
            values["rope_scaling"] = {"type": kind, "factor": scaling.get("factor")}
    return values


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line of bounded length."""
    line = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turns whatever is raised over a strange file into a ValueError that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {first_line(error)}") from error
