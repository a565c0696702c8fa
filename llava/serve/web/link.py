"""A link to what was asked: example, question, method and budget in the query of the address."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

from .methods import BUDGET, SHARE

CHARACTERS = 1900  # of a query; the page refuses addresses of more than 2048 characters
OPTION = "option."  # before the name of a method's option


@dataclass(frozen=True)
class Link:
    """
    example:     number of the picture, from 1; None: it was none of the examples
    method:      one, or two as "a+b"; "" leaves the choice to the page
    budget:      a number of tokens, or percent where `shares`; None: the method's own
    then_budget: likewise, of the second method
    options:     name -> text, of a pair of methods with their names in front
    """

    model: str = ""
    example: int | None = None
    question: str = ""
    method: str = ""
    budget: float | None = None
    then_budget: float | None = None
    shares: bool = False
    options: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> str:
        return self.method.partition("+")[0]

    @property
    def then(self) -> str:
        return self.method.partition("+")[2]

    @classmethod
    def of(cls, model: str, example: int | None, question: str, pruning: dict | None) -> Link:
        """To a request; pruning: its field."""
        own = cls(model, example, question)
        if pruning is None:
            return own
        options, names = dict(pruning["options"]), pruning["method"].split("+")
        if pruning[BUDGET] is not None:
            options[BUDGET] = pruning[BUDGET]
        budgets, shares = [], False
        for name in names:
            prefix = f"{name}_" if len(names) > 1 else ""
            share = options.pop(f"{prefix}{SHARE}", None)
            number = options.pop(f"{prefix}{BUDGET}", None)
            shares |= share is not None
            budgets.append(number if share is None else round(100 * share, 2))
        first, then = (*budgets, None)[:2]
        texts = {name: str(value) for name, value in options.items()}
        return cls(model, example, question, pruning["method"], first, then, shares, texts)

    def query(self) -> str | None:
        """ "?model=...&example=1&..."; None where it would be too long for an address."""
        unit = "%" if self.shares else ""
        fields = {
            "model": self.model,
            "example": self.example,
            "question": self.question,
            "method": self.method,
            "budget": None if self.budget is None else f"{self.budget:g}{unit}",
            "then_budget": None if self.then_budget is None else f"{self.then_budget:g}{unit}",
        }
        fields |= {f"{OPTION}{name}": text for name, text in self.options.items()}
        query = urlencode({name: text for name, text in fields.items() if text not in (None, "")})
        return f"?{query}" if len(query) < CHARACTERS else None


def read_link(params: Mapping[str, str]) -> Link:
    """The link that the query of an address is. What is no value of a field is left out."""
    budget, shares = _budget(params.get("budget"))
    then_budget, _ = _budget(params.get("then_budget"))
    example = params.get("example", "")
    options = {
        name.removeprefix(OPTION): text for name, text in params.items() if name.startswith(OPTION)
    }
    return Link(
        params.get("model", ""),
        int(example) if example.isascii() and example.isdecimal() else None,
        params.get("question", ""),
        params.get("method", ""),
        budget,
        then_budget,
        shares,
        options,
    )


def _budget(text: str | None) -> tuple[float | None, bool]:
    """(budget, whether it is percent)"""
    if not text:
        return None, False
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        return None, False
    return (value, text.endswith("%")) if math.isfinite(value) and value > 0 else (None, False)
