"""Words that were probably meant, for messages about words that nobody knows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

#: share of its letters that a word has in common with one that was meant: of "nope" and "none" it
#: is 0.75, and they are two words
ALIKE = 0.8
UNKNOWN_FLAGS = re.compile(r"unrecognized arguments: (.*)", re.S)
UNKNOWN_CHOICE = re.compile(r"(invalid choice: '([^']*)') \(choose from (.*)\)", re.S)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " (did you mean '--limit'?)" where a known word is like this one, else nothing."""
    like = {_letters(name): name for name in known}
    found = get_close_matches(_letters(word), like, n=1, cutoff=ALIKE)
    return f" (did you mean {like[found[0]]!r}?)" if found else ""


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """Returns "unknown KIND 'WORD'" with the word that was probably meant; where none is near, with
    all there are."""
    known = list(known)
    hint = did_you_mean(word, known) or f", choose from {', '.join(known)}"
    return f"unknown {kind} {word!r}{hint}"


def with_hint(message: str, flags: Iterable[str]) -> str:
    """Returns a message of argparse about an unknown option or choice with `did_you_mean`, which
    takes the place of a list of choices; any other message as it is.

    flags: options that the program has
    """
    if found := UNKNOWN_CHOICE.search(message):
        meant = did_you_mean(found[2], re.findall(r"[^\s,']+", found[3]))
        return message.replace(found[0], f"{found[1]}{meant}") if meant else message
    if found := UNKNOWN_FLAGS.search(message):
        words = (word.partition("=")[0] for word in found[1].split() if word.startswith("-"))
        hints = (did_you_mean(word, flags) for word in words)
        return message + next(filter(None, hints), "")
    return message


def _letters(word: str) -> str:
    """A word without what does not tell it from others: dashes in front, capitals, underscores."""
    return word.lower().replace("_", "-").lstrip("-")
