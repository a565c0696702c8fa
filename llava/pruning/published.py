"""How the published programs of a method use it, so that they run here as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """The interface of a method's release; a method without one has none of this.

    options:     names that its programs and loaders give to options -> ours
    meaning:     options whose name means another one where its programs are used as they were, that
                 is where nobody named the method
    environment: environment variables by which its scripts set options -> our options
    group:       keyword that holds several options in a dict
    positional:  options that its scripts take by place
    """

    options: Mapping[str, str] = field(default_factory=dict)
    meaning: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    positional: tuple[str, ...] = ("visual_token_num",)

    def __post_init__(self):
        for name in ("options", "meaning", "environment"):
            if not isinstance(value := getattr(self, name), Mapping):
                raise TypeError(f"{name} of Published must be a dict, not {value!r}")

    def can_mean(self, options: Mapping[str, object]) -> bool:
        """Whether options that other methods have as well may mean this one, by their values; they
        have the names they have here."""
        return True

    def for_call(self, pruner, keywords: dict) -> tuple:
        """The method and the keywords of one `generate` call, from the method in use and those that
        the caller gave: the release may have keywords of its own."""
        return pruner, keywords

    def present(self, pruner, output, ends: set[int]):
        """What `generate` returns: `output` (ids, or an output object), or what callers of the
        release expect. ends: ids of tokens that end an answer"""
        return output
