"""Words that were probably meant, for messages about words that nobody knows."""

from __future__ import annotations

import re
from collections.abc import Iterable

UNKNOWN_FLAGS = re.compile(r"unrecognized arguments: (.*)", re.S)
UNKNOWN_CHOICE = re.compile(r"(invalid choice: '([^']*)') \(choose from (.*)\)", re.S)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " (did you mean '--limit'?)" where a known word is like this one, else nothing.

    Alike are words of which at most a third of the letters, and at least one, would have to be
    added, left out or swapped with a neighbour. A letter in place of another is two of these, so
    that a word of four letters with a wrong one is another word.
    """
    typed = _letters(word)
    found = [(_slips(typed, own := _letters(name)), len(own), name) for name in known]
    near = [one for one in found if one[0] <= max(1, (max(len(typed), one[1]) + 1) // 3)]
    return f" (did you mean {min(near, key=lambda one: one[0])[2]!r}?)" if near else ""


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


def _slips(one: str, other: str) -> int:
    """How many letters of `one` to add, leave out or swap with the next one, to get `other`."""
    rows = [list(range(len(other) + 1))]
    for i, a in enumerate(one):
        row = [i + 1]
        for j, b in enumerate(other):
            best = rows[i][j] if a == b else 1 + min(rows[i][j + 1], row[j])
            if i and j and a == other[j - 1] and b == one[i - 1]:
                best = min(best, 1 + rows[i - 1][j - 1])
            row.append(best)
        rows.append(row)
    return rows[-1][-1]
