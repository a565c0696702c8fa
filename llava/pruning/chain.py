"""Two methods in a row: one that acts before the decoder, then one that acts inside it.

`build_pruner("vispruner+fastv", vispruner_visual_token_num=192, fastv_visual_token_num=64)`: the
second sees the tokens that the first left. Options carry the name of their method as a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from .base import Pruner
from .interfaces import LanguageModel
from .published import Published
from .stages import DecoderStage, VisionStage

if TYPE_CHECKING:
    from typing_extensions import Self


class OfTheSecond(Published):
    """What the release of a chain's second method reads and returns in a `generate` call."""

    def for_call(self, pruner: Chain, keywords: dict) -> tuple[Chain, dict]:
        second, keywords = pruner.second.published.for_call(pruner.second, keywords)
        return (pruner if second is pruner.second else replace(pruner, second=second)), keywords

    def present(self, pruner: Chain, output, ends: set[int]):
        return pruner.second.published.present(pruner.second, output, ends)


@dataclass
class Chain(Pruner):
    """
    first:  leaves fewer tokens to the decoder and, as it is set, does nothing inside it
    second: drops tokens inside the decoder and nothing before it
    """

    first: Pruner
    second: Pruner

    published = OfTheSecond()

    def __post_init__(self):
        if type(self.first.decoder) is not DecoderStage:
            setting = self.first.before_decoder_by
            way_out = "" if setting is None else f": set {self.first.name}_{setting}"
            raise ValueError(
                f"{self.first.name} acts inside the decoder, so it cannot be the first method of "
                f"{self.name!r}{way_out}"
            )
        if isinstance(self.second, VisionStage) or not isinstance(self.second, DecoderStage):
            raise ValueError(
                f"{self.second.name} does not act inside the decoder alone, so it cannot be the "
                f"second method of {self.name!r}"
            )

    @property
    def vision(self) -> VisionStage:
        return self.first.vision

    @property
    def decoder(self) -> DecoderStage:
        return self.second.decoder

    @property
    def methods(self) -> tuple[Pruner, Pruner]:
        return self.first, self.second

    @property
    def name(self) -> str:  # type: ignore[override] # of the methods, not of the class
        return "+".join(method.name for method in self.methods)

    @property
    def named(self) -> dict[str, Pruner]:
        return {**self.first.named, **self.second.named}

    @property
    def adaptive(self) -> bool:  # type: ignore[override] # likewise
        return any(method.adaptive for method in self.methods)

    @property
    def module(self) -> nn.Module | None:  # type: ignore[override] # is never set here
        modules = {m.name: m.module for m in self.methods if m.module is not None}
        return nn.ModuleDict(modules) if modules else None

    def attach(self, model: LanguageModel) -> None:
        for method in self.methods:
            method.attach(model)

    def use_random_parts(self, model: LanguageModel) -> None:
        for method in self.methods:
            method.use_random_parts(model)

    def part_folders(self, model_path: str) -> list[str]:
        return [folder for method in self.methods for folder in method.part_folders(model_path)]

    def check_depth(self, num_layers: int) -> None:
        for method in self.methods:
            method.check_depth(num_layers)

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        self.first.check(num_patches, num_layers, crops)
        left, crops = self.left_by_first(num_patches, num_layers, crops)
        try:
            self.second.check(left, num_layers, crops)
        except ValueError as error:
            raise ValueError(
                f"{self.second.name}, on the {left * crops} tokens that {self.first.name} leaves: "
                f"{error}"
            ) from error

    def with_budget_of(self, num_tokens: int, parts: int = 1) -> Self:
        first = self.first.with_budget_of(num_tokens, parts)
        left = first.token_schedule(num_tokens // parts, 1, parts)[0]
        second = self.second.with_budget_of(left, parts)
        same = first is self.first and second is self.second
        return self if same else replace(self, first=first, second=second)

    def for_part(self, parts: int) -> Self:
        first, second = (method.for_part(parts) for method in self.methods)
        return replace(self, first=first, second=second)

    def for_crops(self, crops: int) -> Self:
        first, second = (method.for_crops(crops) for method in self.methods)
        return replace(self, first=first, second=second)

    def left_by_first(self, num_patches: int, num_layers: int, crops: int) -> tuple[int, int]:
        """(tokens per crop, crops) that the second method starts from."""
        total = self.first.token_schedule(num_patches, num_layers, crops)[0]
        return (total, 1) if total % crops else (total // crops, crops)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        left, crops = self.left_by_first(num_patches, num_layers, crops)
        return self.second.token_schedule(left, num_layers, crops)


def shared_budget(first: str, second: str, options: dict, given: dict) -> dict:
    """The options of two methods in a row where programs give several methods one budget: it is
    what the second leaves, and the first leaves twice as many unless `given`, further options, say
    otherwise.

    options: the budget, as `visual_token_num` or `visual_token_ratio`
    """
    found = {}
    for key, value in options.items():
        before = given.get(f"{first}_{key}")
        if before is None:
            before = min(1.0, 2 * value) if isinstance(value, float) else 2 * value
        found[f"{first}_{key}"] = before
        found[f"{second}_{key}"] = value / before if isinstance(value, float) else value
    return found | given


def split_options(name: str, options: dict, default: str | None = None) -> dict[str, dict]:
    """Method -> its own options, those with its name as a prefix, of the methods in "a+b".

    default: the method that options without a prefix belong to
    Raises ValueError when a method comes twice, or an option belongs to none.
    """
    names = name.split("+")
    if len(set(names)) < len(names):
        raise ValueError(f"a combination has the form METHOD+METHOD, got {name!r}")
    found: dict[str, dict] = {method: {} for method in names}
    for key, value in options.items():
        owner = next((method for method in names if key.startswith(f"{method}_")), default)
        if owner is None:
            prefixes = " or ".join(f"{method}_" for method in names)
            raise ValueError(
                f"option {key!r} of {name!r} must start with {prefixes}, the method it belongs to: "
                f"{', '.join(f'{method}_{key}' for method in names)} (as words of a command: "
                f"--pruning-arg {names[0]}_{key}={value})"
            )
        own = key.removeprefix(f"{owner}_")
        if own in found[owner]:
            raise ValueError(f"option {own!r} of {owner} is given twice")
        found[owner][own] = value
    return found
