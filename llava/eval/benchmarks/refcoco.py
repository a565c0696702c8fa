"""RefCOCO: share of boxes that overlap the true one by at least half (accuracy at IoU 0.5).

python -m llava.eval.benchmarks.refcoco --annotation-file refcoco_val.jsonl --result-file A.jsonl

Annotations are lines `{question_id, bbox: [x1, y1, x2, y2] in pixels, width, height}`. LLaVA-1.5
answers `[x1, y1, x2, y2]` in shares of the image padded to a square, so the true box moves by the
padding and is divided by the longer side before the two are compared. Qwen2.5-VL answers in pixels
of the image as it sees it, whose sides are multiples of 28. A box with a number above 2 is taken as
such, and compared there; with a `--max-pixels` below the size of the images it is another size, and
no score of these boxes is right.
"""

import os

from llava.answer_scores import Box, parse_box
from llava.eval.benchmarks.benchmark import COCO, Benchmark
from llava.eval.files.matching import by_id, check_known, source, texts_by_id
from llava.eval.files.records import Records, read_jsonl
from llava.eval.scoring.cli import run_scorer
from llava.eval.scoring.units import Unit, Units

THRESHOLD = 0.5
#: shares of an image are below, by some margin
MOST_SHARE = 2


def to_padded_square(box: Box, width: float, height: float) -> Box:
    """Returns a pixel box in shares of the image centred on a square of its longer side."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = box
    return (x1 + left) / side, (y1 + top) / side, (x2 + left) / side, (y2 + top) / side


def to_seen_pixels(box: Box, width: int, height: int) -> Box:
    """Returns a pixel box in those of the image that Qwen2.5-VL makes of it."""
    from llava.model.multimodal_encoder.qwen2_5_vl_images import smart_resize

    seen_height, seen_width = smart_resize(int(height), int(width))
    x, y = seen_width / width, seen_height / height
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def iou(first: Box, second: Box) -> float:
    """Returns the shared area of two boxes over the area they cover together."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    covered = area(first) + area(second) - shared
    return shared / covered if covered > 0 else 0.0


def area(box: Box) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def units(annotations: list[dict], answers: list[dict]) -> Units:
    """Returns whether every answered box hits; the details hold the mean IoU, how many answers
    have no box, and how many have one in pixels.

    Raises ValueError when a question is not annotated, or has two different answers.
    """
    truth, found, overlaps, unreadable, pixels = by_id(annotations), [], [], 0, 0
    check_known(answers, truth, source(annotations))
    for key, text in texts_by_id(answers).items():
        record, box = truth[key], parse_box(text)
        in_pixels = box is not None and max(box) > MOST_SHARE
        as_answered = to_seen_pixels if in_pixels else to_padded_square
        target = as_answered(record["bbox"], record["width"], record["height"])
        overlaps.append(iou(box, target) if box else 0.0)
        unreadable += box is None
        pixels += in_pixels
        found.append(Unit(key, overlaps[-1] >= THRESHOLD, text))
    mean_iou = sum(overlaps) / max(len(overlaps), 1)
    details = {"mean_iou": mean_iou, "unreadable": unreadable, "in_pixels": pixels}
    return Units(found, details=details)


def report(units: Units) -> str:
    mean_iou, unreadable = units.details["mean_iou"], units.details["unreadable"]
    pixels = units.details.get("in_pixels", 0)
    said = f", with one in pixels: {pixels}" if pixels else ""
    return (
        f"Samples: {units.count}, without a box: {unreadable}{said}\n"
        f"Mean IoU: {mean_iou:.4f}\nAcc@{THRESHOLD}: {units.percent:.2f}%\n"
    )


def read_annotations(path: str) -> list[dict]:
    return read_jsonl(path, ("question_id", "bbox", "width", "height"))


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    """The boxes of `llava_refcoco_val.jsonl` are in `refcoco_val.jsonl` beside it."""
    folder, name = os.path.split(asked.path)
    path = os.path.join(folder, name.removeprefix("llava_"))
    return units(read_annotations(path), answers)


CONVERTED = (
    "https://github.com/lichengunc/refer, then python scripts/convert_refcoco_to_llava.py --help"
)
SPLITS = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}
BENCHMARKS = tuple(
    Benchmark(
        dataset if split == "val" else f"{dataset}_{split}",
        f"refcoco/llava_{dataset}_{split}.jsonl",
        "refcoco/images",
        "accuracy at IoU 0.5",
        {"refcoco/": CONVERTED, "refcoco/images": f"{COCO}/train2014.zip"},
        read_units,
        report,
        truth=(f"refcoco/{dataset}_{split}.jsonl",),
    )
    for dataset, splits in SPLITS.items()
    for split in splits
)


def main():
    run_scorer(__doc__, read_annotations, units, report, by_id)


if __name__ == "__main__":
    main()
