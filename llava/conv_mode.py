"""Which prompt template a checkpoint gets, and why: its config decides, its name comes last.

A template belongs to the weights, not to the folder they happen to be in: a renamed copy must give
the same answers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from llava.checkpoint_kind import checkpoint_config, family_in, is_multimodal
from llava.conversation import conv_templates
from llava.log_output import say
from llava.weight_files import check_checkpoint_name

#: key of config.json that names the template; training writes it
CONFIG_KEY = "conv_mode"
AUTO = "auto"
DEFAULT = "vicuna_v1"
#: template -> the one whose images stand in tags
TAGGED = {"llava_v0": "v0_mmtag", "v0": "v0_mmtag", "vicuna_v1": "v1_mmtag", "v1": "v1_mmtag"}
TAGGED["llava_v1"] = "v1_mmtag"
#: vocabulary of Yi, the language model of LLaVA-1.6-34B; added tokens may follow
YI_VOCABULARY = range(64000, 64065)
#: what a name may say. Short words count only when they stand alone: "prompt" holds an "mpt"
NAMES = (
    (r"llama-?2(?!\d)", "llava_llama_2"),
    (r"m[ia]xtral.*hermes|hermes.*m[ia]xtral", "chatml_direct"),
    (r"mistral|mixtral", "mistral_instruct"),
    (r"(?<![a-z0-9])34b(?![a-z0-9])", "chatml_direct"),
    (r"(?<![a-z0-9])v0(?![0-9])", "llava_v0"),
    (r"v1", "vicuna_v1"),
    (r"(?<![a-z0-9])mpt(?![a-z0-9])", "mpt"),
)


class ConvMode(NamedTuple):
    """name: of a template in `conv_templates`; reason: for people; source: what decided"""

    name: str
    reason: str
    source: str

    def __str__(self) -> str:
        return f"prompt template {self.name}: {self.reason}"


def choose_conv_mode(config: Any = None, model_name: str = "", given: str | None = None):
    """The template (a `ConvMode`) of a checkpoint.

    config:     values of its config.json, or a loaded model's `config`; None: not known
    model_name: asked last
    given:      what the user asked for; None and "auto" leave the choice to the checkpoint

    In this order: what was given; `conv_mode` in the config; the kind of language model and of
    projector that the config describes; the name; `vicuna_v1`.
    Raises ValueError on a template that does not exist.
    """
    values = config if isinstance(config, Mapping) else config.to_dict() if config else {}
    if given not in (None, AUTO):
        if given in TAGGED and is_plain(values, model_name):
            return ConvMode(TAGGED[given], f"{given} of a plain projector", "tagged")
        return ConvMode(_known(given, "conv mode", (AUTO,)), "asked for", "given")
    if values.get(CONFIG_KEY):
        name = _known(values[CONFIG_KEY], f"{CONFIG_KEY} in config.json")
        return ConvMode(name, f"{CONFIG_KEY} in config.json", "config")
    known = _by_shape(values) or _by_name(model_name, is_plain(values, model_name))
    return known or ConvMode(DEFAULT, "neither config.json nor the name says which", "default")


def checkpoint_conv_mode(
    model_path: str | None,
    model_base: str | None = None,
    model_name: str = "",
    given: str | None = None,
) -> ConvMode:
    """The template of the checkpoint at `model_path`, a folder or hub repository, not yet loaded.

    model_base: asked where a projector or adapter comes without a config of its own
    Raises OSError for what is neither a folder nor can be a repository.
    """
    if given not in (None, AUTO):
        _known(given, "conv mode", (AUTO,))  # before a look at the hub
    for path in filter(None, (model_path, model_base)):
        check_checkpoint_name(path)
    config = next(filter(None, map(checkpoint_config, filter(None, (model_path, model_base)))), {})
    return choose_conv_mode(config, model_name, given)


def resolve_conv_mode(
    conv_mode: str | None,
    model_name: str,
    model_path: str | None = None,
    model_base: str | None = None,
    compare: bool = False,
) -> str:
    """The name of the template for a program's `--conv-mode`; raises ValueError on an unknown one.

    "auto" and None are what the checkpoint at `model_path` says of itself, with the reason in one
    line. A projector without a tuned language model behind it, called "plain", was trained with
    the `_mmtag` variant of its template.
    compare: another template than the checkpoint's own is said, and used all the same
    """
    choice = checkpoint_conv_mode(model_path, model_base, model_name, conv_mode)
    announce(choice)
    if compare and choice.source == "given":
        own = checkpoint_conv_mode(model_path, model_base, model_name).name
        if own != choice.name:
            print(
                f"[WARNING] the auto inferred conversation mode is {own}, while `--conv-mode` is "
                f"{choice.name}, using {choice.name}",
                file=sys.stderr,
            )
    return choice.name


def announce(choice: ConvMode) -> None:
    """Says what was chosen, unless the name or the user decided."""
    if choice.source not in ("given", "name"):
        say(choice)


def is_plain(values: Mapping, model_name: str) -> bool:
    """Whether only a projector was trained, on captions, as names with "plain" say: not where the
    config knows better."""
    if values.get("tune_mm_mlp_adapter") is False:
        return False
    words = re.split(r"[^a-z0-9]+", model_name.lower())
    return "plain" in words and "finetune" not in model_name.lower()


def _known(name: str, what: str, others: tuple[str, ...] = ()) -> str:
    if not isinstance(name, str) or name not in conv_templates:
        choices = ", ".join([*others, *conv_templates])
        raise ValueError(f"unknown {what} {name!r}, choose from {choices}")
    return name


def _by_shape(values: Mapping) -> ConvMode | None:
    """What the kinds of language model and projector say; None when several templates fit."""
    if not is_multimodal(values):
        return None
    if family_in(values) == "qwen2_5_vl":
        return ConvMode("qwen2_5_vl", "config.json describes a Qwen2.5-VL model", "shape")
    if family_in(values) == "mistral":
        return ConvMode("mistral_instruct", "config.json describes a Mistral model", "shape")
    if values.get("vocab_size") in YI_VOCABULARY:
        return ConvMode("chatml_direct", "config.json describes a Yi model", "shape")
    projector = str(values.get("mm_projector_type") or "")
    if re.fullmatch(r"mlp\d+x_gelu", projector) or values.get("image_aspect_ratio") == "anyres":
        reason = "config.json describes a LLaVA-1.5 or LLaVA-NeXT model"
        return ConvMode("vicuna_v1", reason, "shape")
    return None


def _by_name(model_name: str, plain: bool) -> ConvMode | None:
    name, reason = model_name.lower(), f"by the name {model_name}"
    found = next((mode for pattern, mode in NAMES if re.search(pattern, name)), None)
    if found in (None, "llava_v0", "vicuna_v1") and ("mmtag" in name or plain):
        found = TAGGED[found or "llava_v0"]
    return found and ConvMode(found, reason, "name")
