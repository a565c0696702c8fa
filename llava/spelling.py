"""Words that were probably meant, for messages about words that nobody knows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

UNKNOWN_FLAGS = re.compile(r"unrecognized arguments: (.*)", re.S)
UNKNOWN_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)", re.S)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " (did you mean '--limit'?)" where a known word is like this one, else nothing."""
    like = {name.lower(): name for name in known}
    found = get_close_matches(word.lower(), like, n=1, cutoff=0.65)
    return f" (did you mean {like[found[0]]!r}?)" if found else ""


def option_hint(message: str, flags: Iterable[str]) -> str:
    """Returns `did_you_mean` of the option or choice that a message of argparse complains about.

    flags: options that the program has
    """
    if found := UNKNOWN_CHOICE.search(message):
        return did_you_mean(found[1], re.findall(r"[^\s,']+", found[2]))
    if found := UNKNOWN_FLAGS.search(message):
        words = (word.partition("=")[0] for word in found[1].split() if word.startswith("-"))
        hints = (did_you_mean(word, flags) for word in words)
        return next(filter(None, hints), "")
    return ""
