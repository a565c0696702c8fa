"""Which option of a multiple-choice question an answer names.

Short answers are read much as the official scripts of MMBench read them: a letter, or else the
words of one option. Those scripts ask a language model about the rest; here it names nothing. Where
they take any capital standing alone for a letter, here punctuation or the end must follow, because
an article is not an option.
"""

import re
import string
import unicodedata

ARTICLE = re.compile(r"^(?:a|an|the) (?=.)")
OPENING, CLOSING = "([{\"'`*", ")]}\"'`*.,:;!?、。"
#: behind a letter that counts: punctuation or the end, but no period of an abbreviation (B.C.)
STOP = r"(?:[)\]}:,;!?*、。]|\.(?![A-Za-z]\.)|[ \t]*[\r\n]|$)"
LEADING = re.compile(rf"^[{re.escape(OPENING)}\s]*([A-Za-z]) ?{STOP}")
#: `the answer is B`, `Answer: b`, `option (B)`; A may be an article here, the others may not
ANNOUNCED = re.compile(
    r"\b(?:answer|option|choice)\b(?: is\b| would be\b)?\s*:?\s*(?:(?:option|choice) )?"
    rf"[{re.escape(OPENING)}]*(?:([a-z]) ?{STOP}|((?-i:[B-Z]))\b)",
    re.IGNORECASE,
)
#: no choice: `A, B`, `A or B`
SEVERAL = re.compile(r"^\W*[A-Z]\W*(?:,|/|&|\band\b|\bor\b)\W*[A-Z]\W*$")
LAST = re.compile(rf"(?<![A-Za-z0-9'])([A-Z])[{re.escape(CLOSING)}]*$")
CAPITAL = re.compile(r"(?<![A-Za-z0-9'])[A-Z](?![A-Za-z0-9'])")


def option_letter(text: str, options: list[str]) -> str | None:
    """Returns the letter of the option that an answer names, or None.

    The first of these counts: the letter alone (`B`, `b`, `(B).`); the words of an option alone; a
    letter in front of punctuation (`B. dog`, `(B) dog`, `B: dog`); an announced one (`The answer is
    B.`); the words of exactly one option inside the answer (`A dog is shown` names the dog, not
    option A); a letter at the end (`I think it is B.`).
    """
    text = unicodedata.normalize("NFKC", text).strip()
    letters = string.ascii_uppercase[: len(options)]
    bare = text.lstrip(OPENING).rstrip(CLOSING).strip().upper()
    if len(bare) == 1 and bare in letters:
        return bare
    if same := _same_words(text, options, letters):
        return same
    if SEVERAL.match(text):
        return None
    return (
        _only(LEADING.findall(text), letters)
        or _only([one or other for one, other in ANNOUNCED.findall(text)], letters)
        or _words_inside(text, options, letters)
        or _last(text, letters)
    )


def _only(found: list[str], letters: str) -> str | None:
    """The one letter that was found, if it is only one and belongs to an option."""
    different = {letter.upper() for letter in found}
    return different.pop() if len(different) == 1 and different <= set(letters) else None


def _last(text: str, letters: str) -> str | None:
    """A capital at the end, if that of no other option stands alone."""
    found = LAST.search(text)
    standing = {letter for letter in CAPITAL.findall(text) if letter in letters}
    return found[1] if found and standing == {found[1]} else None


def _exact(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", str(text)).lower().split())


def _plain(text: str) -> str:
    """Without what surrounds the words."""
    return _exact(text).lstrip(OPENING).rstrip(CLOSING).strip()


def _without_article(text: str) -> str:
    return ARTICLE.sub("", _plain(text))


def _same_words(text: str, options: list[str], letters: str) -> str | None:
    """The option that is the whole answer, in the strictest form in which there is one."""
    for form in (_exact, _plain, _without_article):
        wanted = form(text)
        same = [k for k, v in zip(letters, options, strict=True) if wanted and form(v) == wanted]
        if same:
            return same[0] if len(same) == 1 else None
    return None


def _words_inside(text: str, options: list[str], letters: str) -> str | None:
    """The only option whose words stand in the answer, not counting those inside a longer one."""
    text = _plain(text)
    places = {k: _place(_plain(option), text) for k, option in zip(letters, options, strict=True)}
    found = {key: place for key, place in places.items() if place}
    outer = [
        key
        for key, place in found.items()
        if not any(
            other != place and other[0] <= place[0] and place[1] <= other[1]
            for other in found.values()
        )
    ]
    return outer[0] if len(outer) == 1 else None


def _place(words: str, text: str) -> tuple[int, int] | None:
    """Start and end of whole words in a text.

    Scripts without spaces have no word boundaries, and a single sign may be part of its opposite.
    """
    if not words or (len(words) == 1 and not words.isascii()):
        return None
    before, behind = r"(?<![a-z0-9])(?<![0-9][.,])", r"(?![a-z0-9])(?![.,][0-9])"
    found = re.search(f"{before}{re.escape(words)}{behind}", text)
    return found.span() if found else None
