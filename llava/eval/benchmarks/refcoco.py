"""RefCOCO: share of boxes that overlap the true one by at least half (accuracy at IoU 0.5).

python -m llava.eval.benchmarks.refcoco --annotation-file refcoco_val.jsonl --result-file A.jsonl

Annotations are lines `{question_id, bbox: [x1, y1, x2, y2] in pixels, width, height}`. LLaVA-1.5
answers `[x1, y1, x2, y2]` in shares of the image padded to a square, so the true box moves by the
padding and is divided by the longer side before the two are compared.
"""

import re

from llava.eval.files.matching import by_id, check_known, source, unique
from llava.eval.files.records import read_jsonl
from llava.eval.scoring.cli import run_scorer

THRESHOLD = 0.5
NUMBER = r"\s*(-?\d*\.?\d+)\s*"
BOX = re.compile(rf"[\[(]{NUMBER},{NUMBER},{NUMBER},{NUMBER}[\])]")

Box = tuple[float, float, float, float]


def parse_box(text: str) -> Box | None:
    """Returns the first `[x1, y1, x2, y2]` of an answer, or None."""
    found = BOX.search(text)
    return tuple(float(number) for number in found.groups()) if found else None


def to_padded_square(box: Box, width: float, height: float) -> Box:
    """Returns a pixel box in shares of the image centred on a square of its longer side."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = box
    return (x1 + left) / side, (y1 + top) / side, (x2 + left) / side, (y2 + top) / side


def iou(first: Box, second: Box) -> float:
    """Returns the shared area of two boxes over the area they cover together."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    covered = area(first) + area(second) - shared
    return shared / covered if covered > 0 else 0.0


def area(box: Box) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def overlaps(annotations: list[dict], answers: list[dict]) -> dict[int | str, float | None]:
    """Returns the IoU of every answer by question id; None where the answer holds no box.

    Raises ValueError when a question is not annotated, or has two different answers.
    """
    truth, found = by_id(annotations), {}
    check_known(answers, truth, source(annotations))
    for key, answer in unique(answers).items():
        record, box = truth[key], parse_box(answer["text"])
        target = to_padded_square(record["bbox"], record["width"], record["height"])
        found[key] = iou(box, target) if box else None
    return found


def evaluate(annotations: list[dict], answers: list[dict]) -> dict:
    """Returns `{"score": accuracy in percent, "count", "mean_iou", "unreadable"}`."""
    found = list(overlaps(annotations, answers).values())
    values = [value or 0.0 for value in found]
    count = len(values)
    return {
        "score": 100 * sum(value >= THRESHOLD for value in values) / max(count, 1),
        "count": count,
        "mean_iou": sum(values) / max(count, 1),
        "unreadable": found.count(None),
    }


def report(result: dict) -> str:
    return (
        f"Samples: {result['count']}, without a box: {result['unreadable']}\n"
        f"Mean IoU: {result['mean_iou']:.4f}\nAcc@{THRESHOLD}: {result['score']:.2f}%\n"
    )


def read_annotations(path: str) -> list[dict]:
    return read_jsonl(path, ("question_id", "bbox", "width", "height"))


def main():
    run_scorer(__doc__, read_annotations, evaluate, report, by_id)


if __name__ == "__main__":
    main()
