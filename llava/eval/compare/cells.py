"""How a number with its interval is written in a table."""

from __future__ import annotations

from llava.eval.scoring.bootstrap import Interval, is_significant


def bold(text: str, change: Interval | None) -> str:
    """Bold where the change, of which this is the interval, is significant."""
    return f"**{text}**" if is_significant(change) else text


def in_brackets(bounds: Interval | None, sign: str = "") -> str:
    """ "[low, high]", nothing where there is no interval; sign: "+" shows it of every number."""
    return "" if bounds is None else "[" + ", ".join(f"{x:{sign}.1f}" for x in bounds) + "]"
