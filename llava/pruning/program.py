"""Lists the methods; or says what a setting of the named ones means: tokens per decoder layer,
operations and cache, on published model sizes.

    llava methods                                            all of them, by where they act
    llava methods vispruner --visual-token-num 192
    llava methods vispruner fastv                            one after the other
    llava methods vispruner+fastv --pruning-arg fastv_layer=3 --text-tokens 60

A budget is that of LLaVA-1.5, whose images have 576 tokens. LLaVA-NeXT, whose images have up to
five crops of 576, is shown with five times as many if those fit.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from ..errors import errors_as_messages
from ..program_parser import ProgramParser, Several
from . import METHODS, Pruner
from .about import (
    GROUPS,
    group_name,
    how_it_chooses,
    is_trained,
    sentence_about,
    settings_in_words,
    where_it_acts,
)
from .cli import add_option_args, names_in_words, pruner_from_args
from .cost import FORMULAS, DecoderShape, kv_cache_bytes, prefill_flops
from .registry import Unusable

SIZES = {
    "7B": DecoderShape(4096, 11008, num_layers=32, num_heads=32, num_kv_heads=32),
    "13B": DecoderShape(5120, 13824, num_layers=40, num_heads=40, num_kv_heads=40),
}
#: crops of an image in each version of LLaVA
CROPS = {"LLaVA-1.5": 1, "LLaVA-NeXT": 5}
IMAGE_SIZE, PATCH_SIZE = 336, 14  # pixels, CLIP ViT-L/14-336


@dataclass
class Plan:
    """What one image costs in the prefill.

    tokens:  visual tokens entering each layer
    entries: cache entries of visual tokens after the prefill
    """

    tokens: list[int]
    entries: int

    @classmethod
    def of(cls, pruner: Pruner, shape: DecoderShape, crops: int) -> Plan:
        """Raises ValueError when the method cannot run there."""
        num_patches, num_layers = (IMAGE_SIZE // PATCH_SIZE) ** 2, shape.num_layers
        pruner.check(num_patches, num_layers, crops)
        tokens = pruner.token_schedule(num_patches, num_layers, crops)
        held = list(tokens)
        for layer in range(num_layers):
            for earlier in pruner.decoder.pruned_caches(layer, num_layers):
                held[earlier] = held[layer]
        return cls(tokens, sum(held))

    @property
    def average(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    def runs(self) -> str:
        """The tokens of neighbouring layers with the same number: "0-1: 576, 2-31: 64"."""
        parts = []
        for number, group in groupby(range(len(self.tokens)), key=self.tokens.__getitem__):
            layers = list(group)
            span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
            parts.append(f"{span}: {number}")
        return ", ".join(parts)

    def flops(self, shape: DecoderShape, text: int, formula: str) -> float:
        return prefill_flops(shape, [number + text for number in self.tokens], formula)

    def kv_bytes(self, shape: DecoderShape, text: int) -> int:
        return kv_cache_bytes(shape, self.entries + text * shape.num_layers)


DOES_NOT_RUN = "does not run here: "


def describe(pruner: Pruner, shape: DecoderShape, crops: int, text: int) -> Iterator[str]:
    """Lines about a method on one model; `text` text tokens stand beside those of the image."""
    dense = Plan.of(Pruner(), shape, crops)
    try:
        plan = Plan.of(pruner, shape, crops)
    except ValueError as error:
        yield f"{DOES_NOT_RUN}{error}"
        return
    most = "at most " if pruner.adaptive else ""
    yield f"tokens entering layer {most}{plan.runs()}"
    share = plan.average / dense.average
    yield f"average over layers: {most}{plan.average:.1f} of {dense.average:.0f} ({share:.1%})"
    for formula, label in FORMULAS.items():
        own, all_tokens = (p.flops(shape, text, formula) for p in (plan, dense))
        yield f"{label}: {own / 1e12:.3f} T of {all_tokens / 1e12:.3f} T ({own / all_tokens:.1%})"
    own, all_tokens = (p.kv_bytes(shape, text) for p in (plan, dense))
    yield f"KV cache, 16 bit: {own / 2**20:.1f} MiB of {all_tokens / 2**20:.1f} MiB"


def sizes(layers: int | None = None) -> Iterator[tuple[str, DecoderShape]]:
    """(title, shape) of the published sizes; with a number of layers those that have so many, or,
    where none has, all of them cut or extended to it."""
    own = [shape for shape in SIZES.values() if layers in (None, shape.num_layers)]
    for name, shape in SIZES.items():
        if shape in own:
            yield f"{name}, {shape.num_layers} layers", shape
        elif layers is not None and not own:
            wide = f"as wide as {name} ({shape.hidden_size}), {layers} layers"
            yield wide, replace(shape, num_layers=layers)


def parse_args(arguments: list[str] | None) -> Namespace:
    parser = ProgramParser(__doc__, whole=True)
    text = f"{names_in_words()} (default: the method that the options belong to, or the list)"
    parser.add_argument("names", metavar="METHOD", nargs="*", action=Several, default=[], help=text)
    parser.add_argument(
        *("--methods", "--pruning-method"),
        metavar="METHOD",
        action=Several,
        default=[],
        help="another way to name methods, as in other programs",
    )
    add_option_args(parser)
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="decoder layers: 32 shows 7B alone, 40 shows 13B alone, another number both with so "
        "many (default: both as they are)",
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        default=0,
        metavar="N",
        help="text tokens counted beside those of the image (default: 0)",
    )
    args = parser.parse_args(arguments)
    args.names += args.methods
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers ({args.layers}) must be at least 1")
    if args.text_tokens < 0:
        parser.error(f"--text-tokens ({args.text_tokens}) must be at least 0")
    return args


def listing() -> Iterator[str]:
    """A line about every method, group by group: what it does, or why it cannot be used."""
    methods = METHODS.items()
    lines = {name: f"  {name:<14} {how_it_chooses(method)}." for name, method in methods}
    broken = {name: method for name, method in methods if issubclass(method, Unusable)}
    groups = {
        name: (where_it_acts(method), is_trained(method))
        for name, method in methods
        if name not in broken
    }
    for group in GROUPS:
        if members := [lines[name] for name, own in groups.items() if own == group]:
            yield from (f"{group_name(*group).capitalize()}", *members, "")
    if broken:
        yield from ("Not usable here", *(f"  {n:<14} {m.reason}" for n, m in broken.items()), "")
    yield "llava methods METHOD explains one; two in a row are METHOD+METHOD."


@errors_as_messages()
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    if not (args.names or args.pruning_arg or args.visual_token_num):
        print("\n".join(listing()))
        return
    try:
        named = dict.fromkeys(args.names or [None])
        pruners = [pruner_from_args(Namespace(**vars(args), pruning_method=name)) for name in named]
    except ValueError as error:
        sys.exit(f"error: {error}")
    runs = []
    for number, pruner in enumerate(pruners):
        print(end="\n\n" if number else "")
        runs.append(explain(pruner, args))
    if not all(runs):
        sys.exit(1)


def explain(pruner: Pruner, args: Namespace) -> bool:
    """Prints what a setting means; returns whether it runs on any of the models."""
    for part in pruner.name.split("+"):
        print(sentence_about(METHODS[part]))
    print(*settings_in_words(pruner), sep="\n")
    runs = False
    for version, crops in CROPS.items():
        for title, shape in sizes(args.layers):
            own, note = at_the_same_share(pruner, shape, crops)
            print(f"\n{version} {title}{note}")
            for line in describe(own, shape, crops, args.text_tokens):
                print(f"  {line}")
                runs |= not line.startswith(DOES_NOT_RUN)
    return runs


def at_the_same_share(pruner: Pruner, shape: DecoderShape, crops: int) -> tuple[Pruner, str]:
    """The setting for an image of several crops, and what to say of it: its number of tokens times
    as many, unless the method has none, or so many do not fit."""
    scaled = pruner.for_crops(crops)
    if settings_in_words(scaled) == settings_in_words(pruner):
        return pruner, ""
    try:
        Plan.of(scaled, shape, crops)
    except ValueError:
        return pruner, ""
    return scaled, f" ({crops} crops of an image, so {crops} times the budget)"
