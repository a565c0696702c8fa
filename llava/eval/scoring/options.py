"""Which option of a multiple-choice question an answer names.

Short answers are read much as the official scripts of MMBench read them: a letter, or else the
words of one option. Those scripts ask a language model about the rest; here it names nothing. Where
they take any capital standing alone for a letter, here punctuation or the end must follow, because
an article is not an option.
"""

import re
import string
import unicodedata

#: what asks for a letter
LETTER_ONLY = "Answer with the option's letter from the given choices directly."

ARTICLE = re.compile(r"^(?:a|an|the) (?=.)")
OPENING, CLOSING = "([{<\"'`*“‘「【", ")]}>\"'`*”’」】.,:;!?、。"
#: behind a letter that counts: punctuation or the end, but no period of an abbreviation (B.C.)
STOP = r"(?:[)\]}>:,;!?*”’」】、。]|\.(?![A-Za-z]\.)|[ \t]*[\r\n]|$)"
LEADING = re.compile(rf"^[{re.escape(OPENING)}\s]*([A-Za-z]) ?{STOP}")
#: `the answer is B`, `Answer: b`, `option (B)`; A may be an article here, the others may not
ANNOUNCED = re.compile(
    r"\b(?:answer|option|choice)\b(?: is\b| would be\b)?\s*:?\s*(?:(?:option|choice) )?"
    rf"[{re.escape(OPENING)}]*(?:([a-z]) ?{STOP}|((?-i:[B-Z]))\b(?![+#]))",
    re.IGNORECASE,
)
#: `B is correct`, `C is the right answer`
CALLED_RIGHT = re.compile(
    r"(?<![A-Za-z0-9'])([A-Z])[^\w\s]* is (?:the )?(?:correct|right|best|answer|option|choice)\b"
)
#: no choice: `A, B`, `A or B`, `A, B and C`, `A. B.`
SEVERAL = re.compile(
    r"^\W*[A-Z](?:(?:\W*(?:[,;/&\n]|\band\b|\bor\b)\W*[A-Z]\b)+|(?:[.)]\s+[A-Z]\b)+)\W*$"
)
#: what stands in front of something that is not the case
NEGATION = re.compile(
    r"(?:\b(?:not|no|never|neither|nor|without|cannot)|n['’]t)(?: (?:an?|the|be|option))* "
    rf"?[{re.escape(OPENING)}]*$|(?:不是|没有|并非)$",
    re.IGNORECASE,
)
STOPPED = re.compile(rf"(?<![A-Za-z0-9'])([A-Z]) ?{STOP}")
CAPITAL = re.compile(r"(?<![A-Za-z0-9'])[A-Z](?![A-Za-z0-9'])")


def option_letter(text: str, options: list[str]) -> str | None:
    """Returns the letter of the option that an answer names, or None.

    The first of these counts: the letter alone (`B`, `b`, `(B).`); the words of an option alone; a
    letter in front of punctuation (`B. dog`, `(B) dog`, `B: dog`); an announced one (`The answer is
    B.`, `B is correct`); the words of exactly one option inside the answer (`A dog is shown` names
    the dog, not option A); a letter in front of punctuation or the end (`I think it is B.`). An
    answer that lists options, or says that it is not one of them, does not name it.
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
    leading = [] if _lists_options(text, options, letters) else LEADING.findall(text)
    announced = [one or other for one, other in ANNOUNCED.findall(text)]
    return (
        _only(leading, letters)
        or _only(announced + CALLED_RIGHT.findall(text), letters)
        or _words_inside(text, options, letters)
        or _standing(text, letters)
    )


def _lists_options(text: str, options: list[str], letters: str) -> bool:
    """Whether several options stand in the answer, each behind its own letter."""
    places = (
        rf"(?<![A-Za-z0-9']){letter}\W{{1,3}}{re.escape(_plain(option))}"
        for letter, option in zip(letters, options, strict=True)
    )
    text = " ".join(text.split())
    return sum(bool(re.search(place, text, re.IGNORECASE)) for place in places) > 1


def _only(found: list[str], letters: str) -> str | None:
    """The one letter that was found, if it is only one and belongs to an option."""
    different = {letter.upper() for letter in found}
    return different.pop() if len(different) == 1 and different <= set(letters) else None


def _standing(text: str, letters: str) -> str | None:
    """A capital in front of punctuation or the end, if that of no other option stands alone."""
    found = [m[1] for m in STOPPED.finditer(text) if not NEGATION.search(text[: m.start()])]
    standing = {letter for letter in CAPITAL.findall(text) if letter in letters}
    return _only(found, letters) if len(standing) == 1 else None


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
    """Start and end of whole words in a text that does not deny them.

    Scripts without spaces have no word boundaries, and a single sign may be part of its opposite.
    """
    if not words or (len(words) == 1 and not words.isascii()):
        return None
    before, behind = r"(?<![a-z0-9])(?<![0-9][.,])", r"(?![a-z0-9])(?![.,][0-9])"
    found = re.finditer(f"{before}{re.escape(words)}{behind}", text)
    return next((m.span() for m in found if not NEGATION.search(text[: m.start()])), None)
