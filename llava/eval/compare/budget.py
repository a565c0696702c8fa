"""How many of an image's tokens a run keeps: a number, a share of them, or all."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """
    tokens: of every image
    share:  of the tokens that an image has, above 0 and below 1
    Without either it is all of them, where images differ in how many they have.
    """

    tokens: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        """As the command line says it, in names of folders and in files: "64", "0.222", "all"."""
        known = (value for value in (self.tokens, self.share) if value is not None)
        return str(next(known, "all"))

    @property
    def label(self) -> str:
        """For people: "64", "22.2 %", "all"."""
        return str(self) if self.share is None else f"{100 * self.share:g} %"

    @property
    def title(self) -> str:
        """At the head of a table: "64 tokens", "22.2 % of the tokens", "all tokens"."""
        return f"{self.label} tokens" if self.share is None else f"{self.label} of the tokens"

    @property
    def options(self) -> dict[str, float]:
        """The option of a method that is this budget."""
        values = {"visual_token_num": self.tokens, "visual_token_ratio": self.share}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def order(self) -> tuple:
        """Larger for larger budgets of a kind: shares stand above numbers, all above both."""
        return self == Budget(), self.share or 0, self.tokens or 0

    def of(self, whole: float) -> float:
        """Tokens of an image that has `whole`."""
        return self.tokens or whole * (1 if self.share is None else self.share)


def budget_of(text: str) -> Budget:
    """The budget that a word of the command line names: with a decimal point it is a share."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = 0
    if not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of tokens such as 64 nor a share of them such as 0.222"
        )
    if isinstance(value, int):
        return Budget(tokens=value)
    return Budget(share=value) if value < 1 else Budget()
