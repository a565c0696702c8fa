"""Which prompt template a checkpoint gets, and why: its config decides, its name comes last.

A template belongs to the weights, not to the folder they happen to be in: a renamed copy must give
the same answers.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from llava.checkpoint_kind import checkpoint_config, is_multimodal
from llava.conversation import conv_templates

#: key of config.json that names the template; training writes it
CONFIG_KEY = "conv_mode"
AUTO = "auto"
DEFAULT = "vicuna_v1"
#: vocabulary of Yi, the language model of LLaVA-1.6-34B; added tokens may follow
YI_VOCABULARY = range(64000, 64064)
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
    """The template (`ConvMode`) of a checkpoint.

    config:     values of its config.json, or a loaded model's `config`; None: not known
    model_name: asked last
    given:      what the user asked for; None and "auto" leave the choice to the checkpoint

    In this order: what was given; `conv_mode` in the config; the kind of language model and of
    projector that the config describes; the name; `vicuna_v1`.
    Raises ValueError on a template that does not exist.
    """
    if given not in (None, AUTO):
        return ConvMode(_known(given, "conv mode", (AUTO,)), "asked for", "given")
    values = config if isinstance(config, Mapping) else vars(config or object)
    if values.get(CONFIG_KEY):
        name = _known(values[CONFIG_KEY], f"{CONFIG_KEY} in config.json")
        return ConvMode(name, f"{CONFIG_KEY} in config.json", "config")
    return _by_shape(values) or _by_name(model_name) or ConvMode(
        DEFAULT, "the default, as neither config.json nor the name says more", "default"
    )  # fmt: skip


def conv_mode_of(
    model_path: str,
    model_base: str | None = None,
    model_name: str = "",
    given: str | None = None,
) -> ConvMode:
    """The template of the checkpoint at `model_path`, see `choose_conv_mode`.

    Says the choice in one line on stderr, unless it was given or followed from the name.
    model_base: asked where a projector or adapter comes without a config of its own
    """
    if given not in (None, AUTO):
        return choose_conv_mode(given=given)
    config = checkpoint_config(model_path) or (checkpoint_config(model_base) if model_base else {})
    choice = choose_conv_mode(config, model_name)
    announce(choice)
    return choice


def announce(choice: ConvMode) -> None:
    """One line on stderr, unless the name or the user decided; of several processes one speaks."""
    if choice.source not in ("given", "name") and os.environ.get("RANK", "0") == "0":
        print(choice, file=sys.stderr)


def is_plain_name(model_name: str) -> bool:
    """Whether the name says that a projector was trained on captions and nothing was tuned then."""
    words = re.split(r"[^a-z0-9]+", model_name.lower())
    return "plain" in words and "finetune" not in model_name.lower()


def _known(name: str, what: str, others: tuple[str, ...] = ()) -> str:
    if name not in conv_templates:
        choices = ", ".join([*others, *conv_templates])
        raise ValueError(f"unknown {what} {name!r}, choose from {choices}")
    return name


def _by_shape(values: Mapping) -> ConvMode | None:
    """What the kinds of language model and projector say; None when several templates fit."""
    architecture = next(iter(values.get("architectures") or ()), "")
    kind = architecture if architecture.startswith("Llava") else values.get("model_type", "")
    if not is_multimodal(values):
        return None
    if "mistral" in kind.lower():
        return ConvMode("mistral_instruct", "config.json describes a Mistral model", "shape")
    if values.get("vocab_size") in YI_VOCABULARY:
        return ConvMode("chatml_direct", "config.json describes a Yi model", "shape")
    projector = str(values.get("mm_projector_type") or "")
    if re.fullmatch(r"mlp\d+x_gelu", projector) or values.get("image_aspect_ratio") == "anyres":
        reason = "config.json describes a LLaVA-1.5 or LLaVA-NeXT model"
        return ConvMode("vicuna_v1", reason, "shape")
    return None


def _by_name(model_name: str) -> ConvMode | None:
    name, reason = model_name.lower(), f"by the name {model_name}"
    found = next((mode for pattern, mode in NAMES if re.search(pattern, name)), None)
    if found in (None, "llava_v0", "vicuna_v1") and ("mmtag" in name or is_plain_name(name)):
        found = "v1_mmtag" if found == "vicuna_v1" else "v0_mmtag"
    return found and ConvMode(found, reason, "name")
