"""Questions about a scene, one function per task; each returns a Question or None if none fits.

The wording and the suffixes are those of the benchmark's question files, so training and
evaluation ask the same things in the same words.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from playground.scenes import COLORS, KINDS, SIGN_COLORS, WORDS, Scene, Sign, Thing

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
BOX = (
    "Please provide the bounding box coordinate of the region this sentence describes: the {name}."
)
DESCRIBE = "Describe the image."
PLURALS = {kind: kind if kind == "dice" else kind + "s" for kind in KINDS}
MARGIN = 24  # px between the centres of two things before one is called left of or above another
SIDES = ("left of", "right of", "above", "below")
COUNTS = tuple(str(number) for number in range(8))


@dataclass(frozen=True)
class Question:
    """One question: text with its suffix, and the short answer."""

    task: str
    text: str
    answer: str
    kind: str = ""  # finer type inside the task
    options: tuple[str, ...] = ()
    box: tuple[float, ...] = field(default=())

    @property
    def bare(self) -> str:
        """The text without the suffix."""
        return self.text.split("\n")[0]


def existence(scene: Scene, rng: np.random.Generator, **wanted) -> Question:
    """POPE: is a named thing there? Half yes; half of the no share a colour and a kind."""
    yes = wanted.get("yes", bool(rng.random() < 0.5))
    if yes:
        name = _pick(rng, scene.things).name
    else:
        name = _pick(rng, absent(scene, near=bool(rng.random() < 0.5)))
    return _short("existence", f"Is there a {name} in the image?", _yes(yes))


def absent(scene: Scene, near: bool) -> list[str]:
    """Names of things that are not there; near: both colour and kind occur in the scene."""
    colors = {thing.color for thing in scene.things} if near else COLORS
    kinds = {thing.kind for thing in scene.things} if near else KINDS
    present = {thing.name for thing in scene.things}
    names = [f"{color} {kind}" for color in colors for kind in kinds]
    missing = sorted(name for name in names if name not in present)
    return missing or absent(scene, near=False)


def attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    """GQA: the colour of a kind that occurs once, or the kind of a colour that occurs once."""
    if rng.random() < 0.5:
        things = _unique(scene, "kind")
        if not things:
            return None
        thing = _pick(rng, things)
        return _short("attribute", f"What color is the {thing.kind}?", thing.color, "color")
    things = _unique(scene, "color")
    if not things:
        return None
    thing = _pick(rng, things)
    return _short("attribute", f"What is the {thing.color} thing?", thing.kind, "kind")


def relation(scene: Scene, rng: np.random.Generator, **wanted) -> Question | None:
    """GQA: yes/no on the place of two things, or which of the two lies further to a side."""
    pair = [scene.things[i] for i in rng.permutation(len(scene.things))[:2]]
    side = _pick(rng, _true_sides(*pair) or [""])
    if not side:
        return None
    names = [short_name(scene, x) if wanted.get("short") else x.name for x in pair]
    if wanted.get("choose", rng.random() < 0.4):
        if pair[0].kind == pair[1].kind:
            return None
        text = {"left of": "further left", "right of": "further right"}
        text |= {"above": "higher", "below": "lower"}
        first, second = (names[i] for i in rng.permutation(2))
        question = f"Which is {text[side]}, the {first} or the {second}?"
        return _short("relation", question, pair[0].kind, "choose")
    yes = wanted.get("yes", bool(rng.random() < 0.5))
    asked = side if yes else SIDES[SIDES.index(side) ^ 1]
    question = f"Is the {names[0]} {asked} the {names[1]}?"
    return _short("relation", question, _yes(yes), "verify")


def counting(scene: Scene, rng: np.random.Generator) -> Question:
    """VQAv2: how many things, of one colour or of one kind."""
    what = rng.random()
    if what < 0.34:
        return _short("counting", "How many things are there?", str(len(scene.things)), "all")
    here = rng.random() < 0.85
    if what < 0.67:
        color = _pick(rng, scene.things).color if here else _pick(rng, list(COLORS))
        number = sum(thing.color == color for thing in scene.things)
        return _short("counting", f"How many {color} things are there?", str(number), "color")
    kind = _pick(rng, scene.things).kind if here else _pick(rng, KINDS)
    number = sum(thing.kind == kind for thing in scene.things)
    return _short("counting", f"How many {PLURALS[kind]} are there?", str(number), "kind")


def reading(scene: Scene, rng: np.random.Generator) -> Question | None:
    """TextVQA: the text of a sign; two signs are told apart by their colour."""
    if not scene.signs:
        return None
    sign = _pick(rng, scene.signs)
    name = sign.name if len(scene.signs) > 1 or rng.random() < 0.3 else "sign"
    kind = "number" if sign.text.isdigit() else "word"
    text = f"What is written on the {name}?\nReference OCR token: "
    return _short("reading", text, sign.text, kind)


def options(scene: Scene, rng: np.random.Generator) -> Question | None:
    """MMBench: an attribute question with three or four options to choose a letter from."""
    question = attribute(scene, rng)
    if question is None:
        return None
    pool = list(COLORS) if question.kind == "color" else list(KINDS)
    pool.remove(question.answer)
    size = int(rng.integers(3, 5))
    values = [question.answer, *(pool[i] for i in rng.permutation(len(pool))[: size - 1])]
    values = [values[i] for i in rng.permutation(size)]
    lines = "".join(f"\n{letter}. {value}" for letter, value in zip("ABCD", values, strict=False))
    answer = "ABCD"[values.index(question.answer)]
    text = question.bare + lines + LETTER
    return Question("options", text, answer, question.kind, tuple(values))


def statement(scene: Scene, rng: np.random.Generator, kind: str, yes: bool) -> Question | None:
    """MME: one yes/no question of a category (existence, count, position, color, OCR)."""
    if kind == "existence":
        return _retask("statement", kind, existence(scene, rng, yes=yes))
    if kind == "position":
        found = relation(scene, rng, yes=yes, choose=False)
        return found and _retask("statement", kind, found)
    if kind == "count":
        number = len(scene.things)
        others = [n for n in range(3, 8) if n != number]
        asked = number if yes else _pick(rng, others)
        text = f"Are there {asked} things in the image?"
    elif kind == "color":
        things = _unique(scene, "kind")
        if not things:
            return None
        thing = _pick(rng, things)
        color = thing.color if yes else _pick(rng, [c for c in COLORS if c != thing.color])
        text = f"Is the {thing.kind} {color}?"
    elif kind == "OCR":
        if len(scene.signs) != 1:
            return None
        written = scene.signs[0].text
        text = f"Is {written if yes else _other_text(written, rng)} written on the sign?"
    else:
        raise ValueError(f"unknown category {kind!r}; possible: {', '.join(STATEMENTS)}")
    return _short("statement", text, _yes(yes), kind)


STATEMENTS = ("existence", "count", "position", "color", "OCR")


def any_statement(scene: Scene, rng: np.random.Generator) -> Question | None:
    """One MME question of a random category; existence and position have their own tasks."""
    return statement(scene, rng, _pick(rng, ("count", "color", "OCR")), bool(rng.random() < 0.5))


def box(scene: Scene, rng: np.random.Generator, short: bool = False) -> Question:
    """RefCOCO: the box of a named thing or sign, as shares of the side of the padded square."""
    item = _pick(rng, (*scene.things, *scene.signs))
    shares = box_shares(scene, item.box)
    answer = "[" + ", ".join(f"{share:.2f}" for share in shares) + "]"
    kind = "thing" if isinstance(item, Thing) else "sign"
    name = short_name(scene, item) if short else item.name
    return Question("box", BOX.format(name=name), answer, kind, box=shares)


def box_shares(scene: Scene, box: tuple[int, int, int, int]) -> tuple[float, ...]:
    """Edges as shares of the side of the square that the picture is padded to."""
    side = max(scene.size)
    left, top = ((side - length) // 2 for length in scene.size)
    return tuple((edge + pad) / side for edge, pad in zip(box, (left, top) * 2, strict=True))


def short_box(scene: Scene, rng: np.random.Generator) -> Question:
    """Training only: a box asked for by the shortest name, found with one attribute to look for."""
    return box(scene, rng, short=True)


def short_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Training only: a relation of things called by their shortest names."""
    return relation(scene, rng, short=True)


def short_name(scene: Scene, item: Thing | Sign) -> str:
    """The kind or the colour where it tells the item from all others, else its full name."""
    if isinstance(item, Sign):
        return "sign" if len(scene.signs) == 1 else item.name
    if item in _unique(scene, "kind"):
        return item.kind
    return f"{item.color} thing" if item in _unique(scene, "color") else item.name


def description(scene: Scene, rng: np.random.Generator) -> Question:
    """Full sentences: every thing from left to right, then the signs."""
    things = sorted(scene.things, key=lambda thing: thing.box[0])
    names = [f"a {thing.name}" for thing in things]
    text = "There is " + ", ".join(names[:-1]) + " and " + names[-1] + "."
    for sign in sorted(scene.signs, key=lambda sign: sign.box[0]):
        text += f" The {sign.name} says {sign.text}."
    return Question("description", DESCRIBE, text)


# Turns per picture in the training conversations.
MIX: dict[Callable, int] = {
    existence: 2,
    attribute: 2,
    relation: 3,
    short_relation: 3,
    counting: 3,
    reading: 2,
    options: 2,
    any_statement: 2,
    box: 3,
    short_box: 4,
    description: 1,
}


def ask(scene: Scene, rng: np.random.Generator, mix: dict[Callable, int] = MIX) -> list[Question]:
    """A shuffled list of different questions in the given mix."""
    asked: dict[str, Question] = {}
    for task, times in mix.items():
        for _ in range(times):
            for _ in range(4):
                question = task(scene, rng)
                if question is not None and question.text not in asked:
                    asked[question.text] = question
                    break
    found = list(asked.values())
    return [found[i] for i in rng.permutation(len(found))]


def _short(task: str, text: str, answer: str, kind: str = "") -> Question:
    return Question(task, text + SHORT, answer, kind)


def _retask(task: str, kind: str, question: Question) -> Question:
    return Question(task, question.text, question.answer, kind)


def _yes(value: bool) -> str:
    return "Yes" if value else "No"


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _unique(scene: Scene, field_name: str) -> list[Thing]:
    """Things whose colour (or kind) occurs once."""
    values = [getattr(thing, field_name) for thing in scene.things]
    return [thing for thing in scene.things if values.count(getattr(thing, field_name)) == 1]


def _true_sides(one: Thing, other: Thing) -> list[str]:
    """Every side of the other on which the first clearly lies."""
    dx = (one.box[0] + one.box[2] - other.box[0] - other.box[2]) / 2
    dy = (one.box[1] + one.box[3] - other.box[1] - other.box[3]) / 2
    shifts = (-dx, dx, -dy, dy)
    return [side for side, shift in zip(SIDES, shifts, strict=True) if shift >= MARGIN]


def _other_text(text: str, rng: np.random.Generator) -> str:
    if text.isdigit():
        low = 10 ** (len(text) - 1)
        return _pick(rng, [str(n) for n in range(low, 10 * low) if str(n) != text])
    return _pick(rng, [word for word in WORDS if word != text])


def vocabulary() -> set[str]:
    """Every word of the questions and answers but the signs' texts, for the tokenizer."""
    return {*COLORS, *KINDS, *PLURALS.values(), *SIGN_COLORS}
