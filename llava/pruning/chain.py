"""Two methods in a row: one that acts before the decoder, then one that acts inside it.

`build_pruner("vispruner+fastv", vispruner_visual_token_num=192, fastv_visual_token_num=64)`: the
second sees the tokens that the first left. Options carry the name of their method as a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .base import Pruner, overrides

BEFORE_DECODER = ("before_tower", "before_tower_layer", "after_encoder", "after_projector")


@dataclass
class Chain(Pruner):
    """
    first:  leaves fewer tokens to the decoder and does nothing inside it
    second: drops tokens inside the decoder and nothing before it
    """

    first: Pruner
    second: Pruner

    def __post_init__(self):
        if overrides(self.first, "before_layer"):
            raise ValueError(
                f"{self.first.name} acts inside the decoder, so it cannot be the first method of "
                f"{self.name!r}"
            )
        if overrides(self.second, *BEFORE_DECODER) or not overrides(self.second, "before_layer"):
            raise ValueError(
                f"{self.second.name} does not act inside the decoder alone, so it cannot be the "
                f"second method of {self.name!r}"
            )

    @property
    def methods(self) -> tuple[Pruner, Pruner]:
        return self.first, self.second

    @property
    def name(self) -> str:
        return "+".join(method.name for method in self.methods)

    @property
    def needs(self) -> frozenset[str]:
        return self.first.needs | self.second.needs

    @property
    def position_policy(self) -> str:
        policies = {method.position_policy for method in self.methods}
        return "grid" if "grid" in policies else "sequence"

    @property
    def anyres_tiles(self) -> tuple[int, int] | None:
        return self.first.anyres_tiles or self.second.anyres_tiles

    @property
    def anyres_config(self) -> dict:
        return {**self.second.anyres_config, **self.first.anyres_config}

    @property
    def reads_text(self) -> bool:
        return any(method.reads_text for method in self.methods)

    @property
    def probe_form(self) -> str:
        return self.second.probe_form

    @property
    def reads_question(self) -> bool:
        return any(method.reads_question for method in self.methods)

    @property
    def adaptive(self) -> bool:
        return any(method.adaptive for method in self.methods)

    @property
    def anyres(self) -> bool:
        return all(method.anyres for method in self.methods)

    @property
    def module(self) -> nn.Module | None:
        modules = {m.name: m.module for m in self.methods if m.module is not None}
        return nn.ModuleDict(modules) if modules else None

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

    def left_by_first(self, num_patches: int, num_layers: int, crops: int) -> tuple[int, int]:
        """(tokens per crop, crops) that the second method starts from."""
        total = self.first.token_schedule(num_patches, num_layers, crops)[0]
        return (total, 1) if total % crops else (total // crops, crops)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        left, crops = self.left_by_first(num_patches, num_layers, crops)
        return self.second.token_schedule(left, num_layers, crops)

    def attach_model(self, model) -> None:
        for method in self.methods:
            method.attach_model(model)

    def part_folders(self, model_path: str) -> list[str]:
        return [folder for method in self.methods for folder in method.part_folders(model_path)]

    def use_random_parts(self, model) -> None:
        for method in self.methods:
            method.use_random_parts(model)

    def attach(self, tower) -> None:
        for method in self.methods:
            method.attach(tower)

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        wanted = self.first.tower_extras(num_layers, selected)
        for layer, names in self.second.tower_extras(num_layers, selected).items():
            wanted = {**wanted, layer: names | wanted.get(layer, frozenset())}
        return wanted

    def before_tower(self, images, patch_size, crops=1):
        return self.first.before_tower(images, patch_size, crops)

    def before_tower_layer(self, index, tokens):
        return self.first.before_tower_layer(index, tokens)

    def after_encoder(self, vision):
        return self.first.after_encoder(vision)

    def after_projector(self, vision):
        return self.first.after_projector(vision)

    def after_layout(self, image):
        return self.second.after_layout(self.first.after_layout(image))

    def probe_layers(self, num_layers):
        return self.second.probe_layers(num_layers)

    def probe_rows(self, prefill):
        return self.second.probe_rows(prefill)

    def before_layer(self, index, prefill):
        return self.second.before_layer(index, prefill)

    def after_layers(self, prefill):
        return self.second.after_layers(prefill)

    def drafter(self, num_layers):
        return self.second.drafter(num_layers)

    def for_call(self, keywords):
        second, keywords = self.second.for_call(keywords)
        return (self if second is self.second else Chain(self.first, second)), keywords

    def present(self, output, ends):
        return self.second.present(output, ends)

    def pruned_caches(self, index, num_layers):
        return self.second.pruned_caches(index, num_layers)

    def reusable_layers(self, prefill):
        return self.second.reusable_layers(prefill)


def split_options(name: str, options: dict) -> list[tuple[str, dict]]:
    """The two methods in "a+b", each with its own options: those with its name as a prefix.

    Raises ValueError when there are not two, or an option belongs to neither.
    """
    names = name.split("+")
    if len(names) != 2 or names[0] == names[1]:
        raise ValueError(f"a combination has the form METHOD+METHOD, got {name!r}")
    prefixes = [f"{method}_" for method in names]
    for key in options:
        if not key.startswith(tuple(prefixes)):
            raise ValueError(
                f"option {key!r} of {name!r} must start with {' or '.join(prefixes)}, the method "
                "it belongs to"
            )
    own = [
        {key.removeprefix(prefix): options[key] for key in options if key.startswith(prefix)}
        for prefix in prefixes
    ]
    return list(zip(names, own, strict=True))
