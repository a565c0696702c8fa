"""Words that were probably meant, for messages about words that nobody knows."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from difflib import get_close_matches

UNKNOWN_FLAGS = re.compile(r"unrecognized arguments: (.*)", re.S)
UNKNOWN_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)", re.S)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " (did you mean '--limit'?)" where a known word is like this one, else nothing."""
    like = {name.lower(): name for name in known}
    found = get_close_matches(word.lower(), like, n=1, cutoff=0.7)
    return f" (did you mean {like[found[0]]!r}?)" if found else ""


def suggest_options(parser: argparse.ArgumentParser) -> None:
    """Lets a parser say which option or choice may have been meant by one that it does not know."""
    plain = parser.error

    def error(message: str):
        plain(message + _hint(message, parser._option_string_actions))

    parser.error = error


def _hint(message: str, flags: Iterable[str]) -> str:
    if found := UNKNOWN_CHOICE.search(message):
        return did_you_mean(found[1], re.findall(r"[^\s,']+", found[2]))
    if found := UNKNOWN_FLAGS.search(message):
        words = (word.partition("=")[0] for word in found[1].split() if word.startswith("-"))
        hints = (did_you_mean(word, flags) for word in words)
        return next(filter(None, hints), "")
    return ""
