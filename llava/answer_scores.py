"""Scores of free-form answers from 0 to 1: a judge's verdict, equal texts, a letter, a box.

Evaluation on Visual-CoT and the rewards of GlimpsePrune+ use the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

#: what the published verdicts come from
JUDGE_MODEL = "Qwen/Qwen2.5-32B-Instruct-GPTQ-Int8"
SYSTEM = (
    "\nYou are responsible for proofreading the answers, you need to give a score to the model's "
    "answer by referring to the standard answer, based on the given question. The full score is 1 "
    "point and the minimum score is 0 points. Please output the score in the form "
    '"score: <score>". The evaluation criteria require that the closer the model\'s answer is to '
    "the standard answer, the higher the score.\n"
)
USER = "\nquestion: {question}\nstandard answer: {answer}\nmodel's answer: {text}\n"
SCORE = re.compile(r"score: ([\d\.]+)")
BOX = re.compile(r"\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\]")
NUMBER = r"\s*(-?\d*\.?\d+)\s*"
ANY_BOX = re.compile(rf"[\[(]{NUMBER},{NUMBER},{NUMBER},{NUMBER}[\])]")
#: a capital letter that stands alone, or a small one that a bracket, dot or colon ends
LETTER = re.compile(r"(?<![\w.])(?:([A-H])(?!\w)|([a-h])(?=[).:]|\s*$))")

Box = tuple[float, float, float, float]


def judge_question(question: str, answer: str, text: str) -> tuple[str, str]:
    """The system and the user text that ask a judge about `text`, the right one being `answer`."""
    return SYSTEM, USER.format(question=question, answer=answer, text=text)


def scores_in(reply: str) -> list[str]:
    return SCORE.findall(reply.lower())


def judged_score(reply: str) -> float:
    """The score in a judge's reply, within 0 and 1; 0 when it does not name exactly one."""
    found = scores_in(reply)
    try:
        return min(max(float(found[0].rstrip(".")), 0.0), 1.0) if len(found) == 1 else 0.0
    except ValueError:  # such as "1.0.1"
        return 0.0


def precision_match(text: str, answer: str) -> float:
    """1 when the texts are equal up to case and surrounding space."""
    return float(text.strip().lower() == answer.strip().lower())


def single_choice(text: str, answer: str) -> float:
    """1 when the first letter of an option in `text` is that of `answer`."""
    found = LETTER.search(text.strip())
    letter = "" if found is None else found[1] or found[2]
    return float(letter.upper() == answer.strip().upper()[:1] != "")


def first_box(text: str) -> Box:
    """The first [x1, y1, x2, y2] of whole numbers in a text; zeros where there is none."""
    found = BOX.search(text)
    return (0.0, 0.0, 0.0, 0.0) if found is None else tuple(map(float, found.groups()))


def parse_box(text: str) -> Box | None:
    """The first [x1, y1, x2, y2] of any numbers in a text, such as the shares that LLaVA answers;
    None where there is none."""
    found = ANY_BOX.search(text)
    return None if found is None else tuple(map(float, found.groups()))


def one_box_format(text: str) -> float:
    """1 when a text holds exactly one box."""
    return float(len(BOX.findall(text)) == 1)


def share_box_iou(text: str, answer: str) -> float:
    """`box_iou` of the first boxes of any numbers in two texts; 0 for a text without one."""
    ours, wanted = parse_box(text), parse_box(answer)
    return 0.0 if ours is None or wanted is None else box_iou(ours, wanted)


def box_iou(ours: Sequence[float], wanted: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 for those without area."""
    width = min(ours[2], wanted[2]) - max(ours[0], wanted[0])
    height = min(ours[3], wanted[3]) - max(ours[1], wanted[1])
    common = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (ours, wanted)]
    return common / (sum(areas) - common + 1e-8)
