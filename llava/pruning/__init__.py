"""Pruning methods for visual tokens: one file per method, one table of all of them."""

from __future__ import annotations

from .adaptprune import AdaptPrune
from .base import DecoderPruner, Pruner, SelectPruner, option_names
from .cdpruner import CDPruner
from .chain import Chain, split_options
from .divprune import DivPrune
from .downsample import Downsample
from .fastervlm import FasterVLM
from .fastv import FastV
from .glimpseprune import GlimpsePrune
from .hiprune import HiPrune
from .mustdrop import MustDrop
from .nuwa import Nuwa
from .pool import Pool
from .prumerge import PruMerge
from .pyramiddrop import PyramidDrop
from .random import Random
from .sparsevlm import SparseVLM
from .tokens import ImageTokens, Prefill, TowerTokens, VisionTokens
from .trace import PruningTrace, trace_pruning
from .twigvlm import TwigVLM
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vscan import VScan

METHODS: dict[str, type[Pruner]] = {
    cls.name: cls
    for cls in (
        Pruner,
        Random,
        VisPruner,
        DivPrune,
        FastV,
        VisionZip,
        AdaptPrune,
        PyramidDrop,
        Nuwa,
        VScan,
        CDPruner,
        SparseVLM,
        FasterVLM,
        HiPrune,
        PruMerge,
        Pool,
        Downsample,
        MustDrop,
        TwigVLM,
        GlimpsePrune,
    )
}

#: constructor keywords of published repositories -> the method they belong to
LEGACY_KEYWORDS = {
    "twig": TwigVLM.name,
    "visual_token_num": VisPruner.name,
    "important_ratio": VisPruner.name,
}


def build_pruner(name: str = "none", **options) -> Pruner:
    """Returns the pruning method called `name` with its defaults overridden by `options`.

    "a+b" is method a before the decoder and method b inside it; the names are prefixes of their
    options: build_pruner("vispruner+fastv", vispruner_visual_token_num=192, fastv_layer=3).
    Raises ValueError, listing the choices, on an unknown name or option.
    """
    if "+" in name:
        return Chain(*(build_pruner(part, **own) for part, own in split_options(name, options)))
    if name not in METHODS:
        raise ValueError(f"unknown pruning method {name!r}, choose from {', '.join(METHODS)}")
    known = option_names(METHODS[name])
    if unknown := [key for key in options if key not in known]:
        raise ValueError(
            f"unknown option {', '.join(map(repr, unknown))} for pruning method {name!r}, "
            f"choose from {', '.join(known) or 'none (it has no options)'}"
        )
    return METHODS[name](**options)


def no_drafter(strategy: str, pruner: Pruner) -> str:
    """What to say to someone who wants a strategy that needs a drafter with a method without."""
    able = [name for name, cls in METHODS.items() if cls.drafter is not Pruner.drafter]
    return (
        f"generation_strategy {strategy!r} needs a pruning method that guesses tokens "
        f"({', '.join(able)}); the one in use is {pruner.name!r}"
    )


def pruner_from_keywords(pruner: Pruner | str | None, keywords: dict) -> Pruner:
    """The method that `load_pretrained_model(..., pruner=, **keywords)` asks for.

    Removes the keywords of published repositories (`LEGACY_KEYWORDS`) from `keywords`; without
    `pruner` the first of them selects the method it comes from. None is as good as not given.
    """
    options = {key: keywords.pop(key) for key in LEGACY_KEYWORDS if key in keywords}
    options = {key: value for key, value in options.items() if value is not None}
    if isinstance(pruner, Pruner):
        if options:
            raise ValueError(f"{', '.join(options)} given beside a finished pruner {pruner!r}")
        return pruner
    if pruner is None:
        pruner = LEGACY_KEYWORDS[next(iter(options))] if options else "none"
    return build_pruner(pruner, **options)


__all__ = [
    "METHODS",
    "Chain",
    "DecoderPruner",
    "ImageTokens",
    "Prefill",
    "Pruner",
    "PruningTrace",
    "SelectPruner",
    "TowerTokens",
    "VisionTokens",
    "build_pruner",
    "no_drafter",
    "pruner_from_keywords",
    "trace_pruning",
]
