"""Questions with boxes for GlimpsePrune: Visual-CoT's published files, or any in their layout.

A line of `gqa_cot_train.jsonl` (mapper "cot_train"):
    {"question", "answer", "image", "width", "height", "bboxs": [[x1, y1, x2, y2], ...], "dataset"}
with the picture at IMG_DIR/cot/DATASET/IMAGE. An entry of `viscot_363k.json` or of the benchmark
(mapper "cot_bench"):
    {"image": [PATH, "PATH###[x1, y1, x2, y2]"],
     "conversations": [question, box, "<image>", answer]}
with the picture at IMG_DIR/PATH.
"""

from __future__ import annotations

import ast
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import yaml

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.progress import progress

from ..samples import Findings, is_number, is_unicode, missing_files, read_rows

logger = logging.getLogger(__name__)

MAPPERS = ("cot_train", "cot_train_fullmask", "cot_bench")
BOX_TYPES = ("xyxy", "xywh", "xyxy_norm1000")
#: what Visual-CoT's conversations add to the question in order to be given a box
BOX_REQUEST = (
    "Please provide the bounding box coordinate of the region that can help you answer the "
    "question better."
)
#: keys of a data set in a yaml file; the last three do not concern training
DATASET_KEYS = (
    "json_path sampling_strategy mapper bbox_type additional_mappers prompt img_dir "
    "sampling_seed dataset_name score_funcs"
).split()


@dataclass
class BoxSample:
    """A question about a picture, with boxes (left, top, right, bottom) in its pixels around what
    the answer needs; None: all of it. score_funcs: what an answer is rewarded for; size: (width,
    height) of the picture that the boxes are of, where the file may be a smaller one; None: as it
    is."""

    question: str
    answer: str
    path: str
    boxes: list[list[float]] | None
    score_funcs: tuple[str, ...] = ()
    size: tuple[float, float] | None = None


def read_datasets(source: str, img_dir: str, seed: int) -> list[BoxSample]:
    """The samples of a yaml file with a list `datasets`, or of one JSON or JSON-lines file.

    Samples whose picture is missing are left out, with a warning that counts them. Raises
    ValueError, with file and number, for samples that lack something, and FileNotFoundError where
    a file of a list is not there.
    """
    if source.endswith((".yaml", ".yml")):
        values = read_yaml(source)
        entries = values.get("datasets")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{source}: datasets is {entries!r}, expected a list of data sets")
        if not entries:
            raise ValueError(f"{source} names no datasets")
    else:
        entries = [{"json_path": source}]
    samples = []
    for entry in entries:  # a file may occur twice, with other settings
        if unknown := sorted(set(entry) - set(DATASET_KEYS)):
            raise ValueError(
                f"{source}: unknown key {', '.join(unknown)}, choose from {', '.join(DATASET_KEYS)}"
            )
        path = entry.get("json_path")
        if isinstance(path, str) and path != source and not os.path.exists(path):
            raise FileNotFoundError(
                f"{source}: its json_path {path} is not there; name its place in a copy of "
                "this list, or the file itself (--train_dataset, DATA of the recipes)"
            )
        samples += read_dataset(entry, img_dir, seed)
    missing = missing_files(sample.path for sample in samples)
    there = [sample for sample in samples if sample.path not in missing]
    if missing:
        logger.warning(
            "%d of %d samples are left out: their picture is missing, %s for one",
            len(samples) - len(there),
            len(samples),
            min(missing),
        )
    if not there:
        raise ValueError(f"{source} leaves no sample with a picture (looked in {img_dir})")
    return there


def read_yaml(path: str) -> dict:
    """The values of a yaml file; ValueError when it holds anything else."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = yaml.safe_load(file) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not yaml: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected keys with values")
    return values


def read_dataset(entry: dict, img_dir: str, seed: int) -> list[BoxSample]:
    """The samples of one entry of `datasets`, sampled as it says."""
    mapper = entry.get("mapper")
    if mapper is not None and mapper not in MAPPERS:
        raise ValueError(f"mapper {mapper!r} is unknown, choose from {', '.join(MAPPERS)}")
    if (entry.get("additional_mappers") or []) not in ([], ["norm_bboxes"]):
        raise ValueError(
            f"additional_mappers {entry['additional_mappers']!r} are unknown, choose norm_bboxes, "
            "in a list"
        )
    path = entry.get("json_path")
    if path is None:
        raise ValueError(f"a data set names no json_path, only {', '.join(entry) or 'nothing'}")
    for key in ("json_path", "img_dir", "prompt", "bbox_type"):
        if not isinstance(value := entry.get(key) or "", str):
            raise ValueError(f"{key} is {value!r}, expected text")
    rewards = entry.get("score_funcs") or []
    if not isinstance(rewards, list) or not all(isinstance(name, str) for name in rewards):
        raise ValueError(f"score_funcs is {rewards!r}, expected a list of names")
    rows = list(enumerate(read_rows(path)))
    if mapper is None:  # what the first one is
        first = rows[0][1]
        spoken = isinstance(first, dict) and "conversations" in first
        mapper = "cot_bench" if spoken else "cot_train"
    total, rows = len(rows), sampled(rows, entry.get("sampling_strategy"), seed)
    folder, template = entry.get("img_dir") or img_dir, entry.get("prompt") or "{}"
    if "{}" not in template:
        raise ValueError(f"prompt {template!r} has no place for the question: write {{}} there")
    bbox_type = entry.get("bbox_type", "xyxy")
    read = read_conversation if mapper == "cot_bench" else read_line
    samples, findings, empty = [], Findings(path), []
    for number, row in progress(rows, os.path.basename(path), "samples"):
        try:
            sample = read(row, folder, bbox_type)
        except (KeyError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            findings.mistake(number, row, what)
            continue
        odd = [covers_nothing(box, size_of(row)) for box in sample.boxes]
        for why in sorted(set(filter(None, odd))):
            findings.note(number, row, f"samples have a box {why}")
        if odd and all(odd):
            empty.append(odd[0])
        if not sample.boxes:
            findings.note(number, row, "samples have no box: no patch is wanted")
        if sample.answer.strip():
            samples.append(sample)
        else:
            findings.note(number, row, "samples have an empty answer and are left out")
    findings.report(total)
    if rows and len(empty) == len(rows) and mapper != "cot_train_fullmask":
        raise ValueError(
            f"{path}: no box marks any of its picture, the first is {empty[0]}: is bbox_type "
            f"{bbox_type} right? Choose from {', '.join(BOX_TYPES)}"
        )
    for sample in samples:
        sample.question = template.replace("{}", sample.question)
        sample.score_funcs = tuple(rewards)
        if mapper == "cot_train_fullmask":
            sample.boxes = None
    return samples


def sampled(rows: list, strategy: str | None, seed: int) -> list:
    """Part of `rows`: "random:K" of a fixed shuffle, "first:K", "end:K"; None: all."""
    if strategy is None:
        return rows
    kind, _, number = str(strategy).partition(":")
    if kind not in ("random", "first", "end") or not number.isdigit():
        raise ValueError(
            f"sampling_strategy {strategy!r} is unknown, choose random:K, first:K or end:K"
        )
    count = int(number)
    if kind == "random":
        return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]
    return rows[:count] if kind == "first" else rows[max(len(rows) - count, 0) :]


def read_line(row: dict, folder: str, bbox_type: str) -> BoxSample:
    """A line of mapper "cot_train"."""
    path = os.path.join(folder, "cot", path_of(of(row), "dataset"), path_of(row, "image"))
    size = row["width"], row["height"]
    if not all(map(is_number, size)) or min(size) <= 0:
        raise ValueError(f"width and height are {size}, expected numbers above 0")
    if not isinstance(row["bboxs"], list):
        raise ValueError(f"bboxs is {row['bboxs']!r}, expected a list of boxes")
    boxes = [pixel_box(box, bbox_type, size) for box in row["bboxs"]]
    return BoxSample(text_of(row, "question"), text_of(row, "answer"), path, boxes, size=size)


def read_conversation(row: dict, folder: str, bbox_type: str) -> BoxSample:
    """An entry of mapper "cot_bench"; its box is always in pixels."""
    image, messages = of(row)["image"], row["conversations"]
    texts = isinstance(image, list) and all(isinstance(text, str) for text in image)
    if not texts or len(image) != 2 or "###" not in image[1]:
        raise ValueError(f"image is {image!r}, expected [PATH, 'PATH###[x1, y1, x2, y2]']")
    try:
        box = ast.literal_eval(image[1].split("###", 1)[1])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{image[1][:80]!r} does not end in a box [x1, y1, x2, y2]") from None
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"conversations is {messages!r}, expected a list of messages")
    question = text_of(of(messages[0]), "value").replace(BOX_REQUEST, "").strip()
    answer, path = text_of(of(messages[-1]), "value"), os.path.join(folder, image[0])
    return BoxSample(question, answer, path, [pixel_box(box, "xyxy", (0, 0))])


def size_of(row: dict) -> tuple[float, float] | None:
    """(width, height) of the picture, where the row says it."""
    size = row.get("width"), row.get("height")
    return size if all(map(is_number, size)) else None


def covers_nothing(box: Sequence[float], size: tuple[float, float] | None) -> str | None:
    """Why a box in pixels marks no part of a picture of `size`, if it does not."""
    left, top, right, bottom = box
    if left >= right or top >= bottom:
        return "without area"
    width, height = size or (math.inf, math.inf)
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        return "outside of its picture"
    if right <= 1 and bottom <= 1:
        return "within the first pixel, as shares from 0 to 1 are"
    return None


def of(row) -> dict:
    """`row`, if it is an object."""
    if not isinstance(row, dict):
        raise ValueError(f"is {row!r}, expected an object")
    return row


def path_of(row: dict, key: str) -> str:
    if not isinstance(row[key], str) or not row[key]:
        raise ValueError(f"{key} is {row[key]!r}, expected a path")
    return row[key]


def text_of(row: dict, key: str) -> str:
    """The text under `key`, a number in digits; a line with the mark `<image>` is dropped, as the
    prompt brings its own."""
    value = row[key]
    if not isinstance(value, str) and not is_number(value):
        raise ValueError(f"{key} is {value!r}, expected text")
    text = str(value).replace(f"{DEFAULT_IMAGE_TOKEN}\n", "")
    text = text.replace(f"\n{DEFAULT_IMAGE_TOKEN}", "")
    if DEFAULT_IMAGE_TOKEN in text:
        raise ValueError(f"{key} holds {DEFAULT_IMAGE_TOKEN} amid its text: {text[:60]!a}")
    if not is_unicode(text):
        raise ValueError(f"{key} holds half of a character (a lone surrogate): {text[:60]!a}")
    return text


def pixel_box(box: Sequence[float], bbox_type: str, size: tuple[int, int]) -> list[float]:
    """(left, top, right, bottom) in pixels of a picture of `size` (width, height)."""
    if bbox_type not in BOX_TYPES:
        raise ValueError(f"bbox_type {bbox_type!r} is unknown, choose from {', '.join(BOX_TYPES)}")
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(is_number, box)):
        raise ValueError(f"the box {box!r} is not four numbers")
    if bbox_type == "xywh":
        return [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    if bbox_type == "xyxy_norm1000":
        return [edge * side / 1000 for edge, side in zip(box, (*size, *size), strict=True)]
    return list(box)
