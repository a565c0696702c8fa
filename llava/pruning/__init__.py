"""Pruning methods for visual tokens: one file per method, one table of all of them."""

from __future__ import annotations

from ..spelling import did_you_mean
from .adaptprune import AdaptPrune
from .base import DecoderPruner, Pruner, SelectPruner, option_names, two_budgets
from .cdpruner import CDPruner
from .chain import Chain, shared_budget, split_options
from .choice import (
    BUDGETS,
    all_names,
    as_published,
    choose,
    open_group,
    the_one_of,
    translate,
)
from .dart import DART
from .divprune import DivPrune
from .downsample import Downsample
from .eadp import EADP
from .fastervlm import FasterVLM
from .fastv import FastV
from .glimpseprune import GlimpsePrune
from .hiprune import HiPrune
from .holov import HoloV
from .idpruner import IDPruner
from .mmtok import MMTok
from .mustdrop import MustDrop
from .nuwa import Nuwa
from .option_types import check_types
from .pool import Pool
from .prefill import Prefill
from .prumerge import PruMerge
from .published import Published
from .pyramiddrop import PyramidDrop
from .random import Random
from .registry import Methods
from .restore import Restore
from .scope import Scope
from .sinkpruner import SinkPruner
from .sparsevlm import SparseVLM
from .stages import DecoderStage, Probe, VisionStage, fills
from .tokens import ImageTokens, TowerTokens, VisionTokens
from .tops import TOPS
from .trace import PruningTrace, trace_pruning
from .twigvlm import TwigVLM
from .twigvlm_plus import TwigVLMPlus
from .v2drop import V2Drop
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vscan import VScan

#: name -> class, ours and those of installed packages
METHODS = Methods(
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
    TwigVLMPlus,
    GlimpsePrune,
    Scope,
    HoloV,
    IDPruner,
    MMTok,
    EADP,
    Restore,
    DART,
    V2Drop,
    TOPS,
    SinkPruner,
)

#: entry of a published dict of options that belongs to the model
STRATEGY = "generation_strategy"
#: the method that a budget alone means, in every program
DEFAULT_METHOD = VisPruner.name


def build_pruner(name: str = "none", **options) -> Pruner:
    """Returns the pruning method called `name` with its defaults overridden by `options`.

    "a+b" is method a before the decoder and method b inside it; the names are prefixes of their
    options: build_pruner("vispruner+fastv", vispruner_visual_token_num=192, fastv_layer=3). Where a
    is a wrapper it works around b, and options without a prefix are its own:
    build_pruner("restore+vispruner", visual_token_num=64, vispruner_important_ratio=0.6); a third
    method may act inside the decoder.
    Raises ValueError, listing the choices, on an unknown name or option, on a value of another type
    than the option has, and with the cause where the package that brings a method cannot be used.
    """
    if "+" in name:
        return build_combination(name, options)
    method = METHODS.usable(name)
    if method.wraps and isinstance(options.get("base"), str):
        options = {**options, "base": build_pruner(options["base"])}
    options, known = translate(method, options), option_names(method)
    if unknown := [key for key in options if key not in known]:
        if (why := method.declines.get(unknown[0])) is not None:
            raise ValueError(f"{name} does not take {unknown[0]}: {why}")
        meant = did_you_mean(unknown[0], known)
        raise ValueError(
            f"unknown option {', '.join(map(repr, unknown))} for pruning method {name!r}"
            + (meant or f", choose from {', '.join(known) or 'none (it has no options)'}")
        )
    if len(given := [options[key] for key in BUDGETS if options.get(key) is not None]) > 1:
        raise ValueError(two_budgets(*given))
    try:
        made = method(**options)
    except (TypeError, OverflowError):  # of a value that the method did arithmetic with
        check_types(method, options)
        raise
    values = {key: getattr(made, key) for key in options}  # some are converted
    unset = [key for key in BUDGETS if values.get(key) is None]  # of the two one is
    check_types(method, {key: value for key, value in values.items() if key not in unset})
    return made


def build_combination(name: str, options: dict) -> Pruner:
    """`build_pruner` of "a+b"."""
    rows, (first, *others) = in_a_row(name), name.split("+")
    if wrapper := next((own for own in others if own in METHODS and METHODS[own].wraps), None):
        raise ValueError(wrapper_behind(name, wrapper))
    if len(rows) > 2 or not all(name.split("+")):
        raise ValueError(f"a combination has the form METHOD+METHOD, got {name!r}")
    own = split_options(name, options, default=first if len(rows) == 1 else None)
    made = []
    for row in rows:
        method, *inner = row.split("+")
        given = own[method]
        if inner and "base" in given:
            raise ValueError(f"{name!r} names the base of {method}: leave the option base out")
        if inner:
            given = {**given, "base": build_pruner(inner[0], **own[inner[0]])}
        made.append(build_pruner(method, **given))
    return Chain(*made) if len(made) == 2 else made[0]


def wrapper_behind(name: str, wrapper: str) -> str:
    """What to say to someone who writes a wrapper, `wrapper`, behind another method."""
    ordered = "+".join([wrapper, *(own for own in name.split("+") if own != wrapper)])
    return (
        f"{name!r}: {wrapper} works around the method that is named behind it, so it comes first: "
        f"{ordered}"
    )


def build_with_budget(name: str, budget: dict, **options) -> Pruner:
    """As `build_pruner`, for programs that give several methods the same budget: of "a+b" it is
    what b leaves, and a leaves twice as many unless an option says otherwise.

    budget: `visual_token_num` or `visual_token_ratio`, or nothing
    """
    rows = in_a_row(name)
    if len(rows) == 2:
        first, second = (row.partition("+")[0] for row in rows)
        return build_pruner(name, **shared_budget(first, second, budget, options))
    return build_pruner(name, **{**options, **budget})


def in_a_row(name: str) -> list[str]:
    """The methods that "a+b" puts in a row; a wrapper and the method in it are one of them."""
    first, *others = name.split("+")
    if others and first in METHODS and METHODS[first].wraps:
        return [f"{first}+{others[0]}", *others[1:]]
    return [first, *others]


def option_prefixes(name: str) -> list[tuple[str, str]]:
    """(method, prefix of its options) of everything that `name` consists of; options of a wrapper
    need none where no method follows."""
    parts = name.split("+")
    if len(parts) == 1:
        return [(name, "")]
    found = [(part, f"{part}_") for part in parts]
    return [(parts[0], ""), *found] if len(in_a_row(name)) == 1 else found


def can_draft(method: type[Pruner | DecoderStage]) -> bool:
    """Whether methods of a class can guess tokens."""
    return issubclass(method, DecoderStage) and fills(method, DecoderStage, "drafter")


def no_drafter(strategy: str, pruner: Pruner) -> str:
    """What to say to someone who wants a strategy that needs a drafter with a method without."""
    able = [name for name, method in METHODS.items() if can_draft(method)]
    return (
        f"generation_strategy {strategy!r} needs a pruning method that guesses tokens "
        f"({', '.join(able)}); the one in use is {pruner.name!r}"
    )


def all_option_names() -> list[str]:
    """Every name that an option of any method goes by."""
    return all_names(METHODS)


def guess_method(options: dict) -> tuple[str, dict]:
    """(method, its options) that options mean which came without a method: as in the published
    programs, which know one method each.

    A budget alone means `DEFAULT_METHOD`, an option that one method alone has that method, no
    options "none". Other packages are asked only where ours lack an option, so that installing one
    changes no command. Raises ValueError when several methods have all of them, or none has.
    """
    if not options:
        return Pruner.name, {}
    ours = set(options) <= set(all_names(METHODS.own))
    name = choose(METHODS.own if ours else METHODS, options, DEFAULT_METHOD)
    return name, as_published(METHODS[name], options)


def take_options(keywords: dict, parts: tuple[str, ...] = ()) -> tuple[str | None, dict]:
    """(method whose published dict of options is among them or None, options), all taken out of
    `keywords`. Options that are None count as not given.

    parts: the methods that were named. What installed packages call their options may mean
    something else to a loader, so theirs count where the method was named. The
    `generation_strategy` in a published dict goes back into `keywords`.
    """
    methods = {**METHODS.own, **{part: METHODS[part] for part in parts if part in METHODS}}
    prefixes = tuple(f"{part}_" for part in parts) if len(parts) > 1 else ()
    known = all_names(methods)
    names = [key for key in keywords if key in known or key.startswith(prefixes)]
    owner, options = None, {key: keywords.pop(key) for key in names}
    for name, method in methods.items():
        group = method.published.group
        if group not in keywords:
            continue
        if (entries := keywords.pop(group)) is None:
            continue
        found = open_group(method, entries, (STRATEGY,))
        if STRATEGY in found:
            keywords[STRATEGY] = found.pop(STRATEGY)
        sharing = [key for key, other in methods.items() if other.published.group == group]
        named = [key for key in sharing if key in parts]
        found = {**options, **found}
        owner = named[0] if named else the_one_of(sharing, methods, found) or name
        options = translate(methods[owner], found)
    return owner, {key: value for key, value in options.items() if value is not None}


def pruner_from_keywords(pruner: Pruner | str | None, keywords: dict) -> Pruner:
    """The method that `load_pretrained_model(..., pruner=, **keywords)` asks for.

    Removes the options of methods from `keywords`, under our names and published ones; without
    `pruner` they say which method is meant (`guess_method`). None is as good as not given. With a
    published dict of options, `generate` returns what the release does.
    """
    parts = pruner.split("+") if isinstance(pruner, str) else ()
    owner, options = take_options(keywords, tuple(parts))
    if isinstance(pruner, Pruner):
        if owner or options:
            given = ", ".join(options) or (owner and METHODS[owner].published.group)
            raise ValueError(f"{given} given beside a finished pruner {pruner!r}")
        return pruner
    if owner and pruner not in (None, owner):
        group = METHODS[owner].published.group
        raise ValueError(f"{group} belongs to the method {owner!r}, but pruner is {pruner!r}")
    name = pruner or owner
    if name is None:
        name, options = guess_method(options)
    made = build_pruner(name, **options)
    if owner:
        made.as_published = True
    return made


__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "Chain",
    "DecoderPruner",
    "DecoderStage",
    "ImageTokens",
    "Prefill",
    "Probe",
    "Pruner",
    "PruningTrace",
    "Published",
    "SelectPruner",
    "TowerTokens",
    "VisionStage",
    "VisionTokens",
    "all_option_names",
    "build_pruner",
    "build_with_budget",
    "can_draft",
    "fills",
    "guess_method",
    "in_a_row",
    "no_drafter",
    "option_prefixes",
    "pruner_from_keywords",
    "trace_pruning",
]
