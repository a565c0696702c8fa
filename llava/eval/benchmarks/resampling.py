"""Per benchmark, what its answers add to the score: one function each, gathered in `UNITS`.

Every function takes (data folder, question file, answers) and gives each answered question's part
of the score with the image it is about (`llava.eval.scoring.bootstrap.Units`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from llava.eval.benchmarks import gqa as eval_gqa
from llava.eval.benchmarks import mmbench as eval_mmbench
from llava.eval.benchmarks import mme as eval_mme
from llava.eval.benchmarks import pope as eval_pope
from llava.eval.benchmarks import qbench as eval_qbench
from llava.eval.benchmarks import refcoco as eval_refcoco
from llava.eval.benchmarks import seed as eval_seed
from llava.eval.benchmarks import sqa as eval_science_qa
from llava.eval.benchmarks import textvqa as eval_textvqa
from llava.eval.benchmarks import uploads
from llava.eval.benchmarks import vizwiz as eval_vizwiz
from llava.eval.benchmarks import vqav2 as eval_vqav2
from llava.eval.benchmarks.mmbench import read_mmbench
from llava.eval.files.records import as_int, complete, read_json, read_json_list, read_jsonl
from llava.eval.scoring.bootstrap import Units, by_image, interval, mean_of, mean_where, ratio

__all__ = ["UNITS", "Units", "interval", "mean_of"]


class Images:
    """The image of every question of a file by id; None for a question without one."""

    def __init__(self, records: list[dict]):
        self.images = {}
        for record in records:
            image = record.get("image") or None
            key = as_int(record.get("question_id", record.get("id")))
            self.images[key] = image

    def of(self, key: int | str) -> str | None:
        image = self.images.get(key)
        return image if image is None or isinstance(image, str) else repr(image)


def pope(data_dir: str, path: str, answers: list[dict]) -> Units:
    """F1 of every category, then their mean."""
    folder = os.path.join(data_dir, "pope", "coco")
    questions = complete(read_jsonl(path), eval_pope.FIELDS)
    categories = eval_pope.outcomes(folder, questions, answers)
    rows, images = [], []
    for number, found in enumerate(categories.values()):
        for image, said, label in found:
            row = np.zeros((len(categories), 4))
            row[number] = (said and label, said and not label, label and not said, 1)
            rows.append(row.flatten())
            images.append(image)

    def score(sums: np.ndarray) -> np.ndarray:
        right, wrong, missed, count = np.moveaxis(sums.reshape(len(sums), -1, 4), 2, 0)
        return 100 * mean_where(ratio(2 * right, 2 * right + wrong + missed), count > 0)

    return by_image(rows, images, score)


def mme(data_dir: str, path: str, answers: list[dict]) -> Units:
    """Accuracy plus share of images with both answers right, of every task of the group."""
    truth = eval_mme.read_ground_truth(os.path.join(data_dir, "MME"))
    together = sorted(answers, key=lambda a: (str(a["question_id"]), a["prompt"]))
    lines = eval_mme.convert(truth, together)
    groups = ([t for t in tasks if lines.get(t)] for tasks in eval_mme.TASKS.values())
    tasks = next(group for group in groups if group)
    questions = complete(read_jsonl(path), ("question_id",))
    pictures = {_mme_name(r["question_id"]): r.get("image") for r in questions}
    rows, images = [], []
    for number, task in enumerate(tasks):
        names = [line.split("\t")[0] for line in lines[task]][::2]
        for name, pair in zip(names, eval_mme.right_pairs(lines[task]), strict=True):
            row = np.zeros((len(tasks), 4))
            row[number] = (sum(pair), len(pair), all(pair), 1)
            rows.append(row.flatten())
            images.append(pictures.get((task, name)) or f"{task}/{name}")

    def score(sums: np.ndarray) -> np.ndarray:
        right, asked, both, pairs = np.moveaxis(sums.reshape(len(sums), -1, 4), 2, 0)
        return 50 * mean_where(ratio(right, asked) + ratio(both, pairs), pairs > 0)

    return by_image(rows, images, score)


def _mme_name(question_id: str) -> tuple[str, str]:
    """The task of a question, and how its result lines call the image."""
    task, *_, image = str(question_id).split("/")
    return task, f"{os.path.splitext(image)[0]}.txt"


def textvqa(data_dir: str, path: str, answers: list[dict]) -> Units:
    file = os.path.join(data_dir, "textvqa", "TextVQA_0.5.1_val.json")
    found = eval_textvqa.points(eval_textvqa.read_annotations(file), answers)
    return mean_of([value for _, value in found], [str(image) for image, _ in found])


def vqav2(data_dir: str, path: str, answers: list[dict]) -> Units:
    file = os.path.join(data_dir, "vqav2", "v2_mscoco_val2014_annotations.json")
    return _mean_by_id(eval_vqav2.points(eval_vqav2.read_annotations(file), answers), path)


def vizwiz(data_dir: str, path: str, answers: list[dict]) -> Units:
    humans = eval_vizwiz.read_annotations(os.path.join(data_dir, "vizwiz", "val.json"))
    return _mean_by_id(
        eval_vizwiz.points(humans, complete(read_jsonl(path), ("question_id", "image")), answers),
        path,
    )


def gqa(data_dir: str, path: str, answers: list[dict]) -> Units:
    questions = read_json(os.path.join(data_dir, "gqa", "data", "testdev_balanced_questions.json"))
    asked = eval_gqa.asked(questions, answers)
    return _mean_by_id(eval_gqa.points(asked, uploads.gqa(answers)), path)


def refcoco(data_dir: str, path: str, answers: list[dict]) -> Units:
    folder, name = os.path.split(path)
    file = os.path.join(folder, name.removeprefix("llava_"))
    found = eval_refcoco.overlaps(eval_refcoco.read_annotations(file), answers)
    hits = {key: (value or 0.0) >= eval_refcoco.THRESHOLD for key, value in found.items()}
    return _mean_by_id(hits, path)


def seed(data_dir: str, path: str, answers: list[dict]) -> Units:
    annotation = read_json(os.path.join(data_dir, "seed_bench", "SEED-Bench.json"))
    asked = eval_seed.asked(annotation, answers)
    return _mean_by_id(eval_seed.points(asked, eval_seed.texts_by_id(answers)), path)


def science_qa(data_dir: str, path: str, answers: list[dict]) -> Units:
    """Those questions that the score is of: with an image, where there are any."""
    problems, _ = eval_science_qa.read_problems(os.path.join(data_dir, "scienceqa"), "test")
    asked = [answer["question_id"] for answer in answers]
    scored = eval_science_qa.evaluate(problems, asked, answers)["scored"]
    images = Images(read_json_list(path))
    return mean_of(list(scored.values()), [images.of(as_int(key)) for key in scored])


def _mean_by_id(points: dict[int | str, float], path: str) -> Units:
    """Units of points by question id; path: question file, which knows the images."""
    images = Images(read_jsonl(path))
    return mean_of(list(points.values()), map(images.of, points))


def mmbench(data_dir: str, path: str, answers: list[dict]) -> Units:
    """A question counts once where all its rotations were asked, else every answer does."""
    rows = read_mmbench(path)
    circles = eval_mmbench.circles(rows, answers)
    pictures = {as_int(row["index"]): row["image"] for row in rows}
    circular, points, images = eval_mmbench.is_circular(circles), [], []
    for circle in circles.values():
        own = [all(circle.right)] if circular else circle.right
        points += own
        images += [pictures[next(iter(circle.rows))]] * len(own)
    return mean_of(points, images)


def qbench(data_dir: str, path: str, answers: list[dict]) -> Units:
    found = eval_qbench.points(complete(read_json_list(path), eval_qbench.FIELDS), answers)
    return mean_of([right for _, right in found], [record["img_path"] for record, _ in found])


#: benchmark that is scored here -> its units
UNITS: dict[str, Callable[[str, str, list[dict]], Units]] = {
    "pope": pope,
    "mme": mme,
    "textvqa": textvqa,
    "vqav2": vqav2,
    "vqav2_val": vqav2,
    "gqa": gqa,
    "vizwiz_val": vizwiz,
    "sqa": science_qa,
    "mmbench": mmbench,
    "mmbench_cn": mmbench,
    "seed": seed,
    "qbench": qbench,
    "qbench_zh": qbench,
    **{
        name if split == "val" else f"{name}_{split}": refcoco
        for name, splits in (
            ("refcoco", ("val", "testA", "testB")),
            ("refcoco+", ("val", "testA", "testB")),
            ("refcocog", ("val", "test")),
        )
        for split in splits
    },
}
