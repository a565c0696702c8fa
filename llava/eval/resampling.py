"""How far a score would move with other questions: intervals by bootstrap, paired between runs.

What is drawn again is what a benchmark counts: questions, or pairs of questions about one image.
Scores are functions of sums over these units, so that a draw costs one product of matrices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from llava.eval import (
    eval_gqa,
    eval_mmbench,
    eval_mme,
    eval_pope,
    eval_qbench,
    eval_refcoco,
    eval_science_qa,
    eval_seed,
    eval_textvqa,
    eval_vizwiz,
    eval_vqav2,
    uploads,
)
from llava.eval.tasks import read_json, read_json_list, read_jsonl

DRAWS = 2000
LEVEL = 0.95


@dataclass
class Units:
    """One set of answers as its benchmark counts it.

    sums:  (U, K) what every unit adds to the sums the score is made of
    score: (R, K) sums -> (R,) scores in percent of the maximum
    """

    sums: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    @property
    def percent(self) -> float:
        return float(self.score(self.sums.sum(axis=0, keepdims=True))[0])

    def draws(self, seed: int, count: int = DRAWS) -> np.ndarray:
        """(count,) scores of as many units drawn with replacement; equal seeds draw alike."""
        size = len(self.sums)
        drawn = np.random.default_rng(seed).integers(size, size=(count, size))
        times = np.zeros((count, size))
        np.add.at(times, (np.arange(count)[:, None], drawn), 1)
        return self.score(times @ self.sums)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the draws."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def mean_of(points: Collection[float]) -> Units:
    """Units of a benchmark that averages points from 0 to 1."""
    sums = np.stack([np.asarray(list(points), dtype=float), np.ones(len(points))], axis=1)
    return Units(sums, lambda s: 100 * _ratio(s[:, 0], s[:, 1]))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotients, 0 over nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def pope(data_dir: str, path: str, answers: list[dict]) -> Units:
    """F1 of every category, then their mean."""
    folder, questions = os.path.join(data_dir, "pope", "coco"), read_jsonl(path, eval_pope.FIELDS)
    found = eval_pope.outcomes(folder, questions, answers)
    rows = []
    for number, outcomes in enumerate(found.values()):
        for _, said, label in outcomes:
            row = np.zeros((len(found), 4))
            row[number] = (said and label, said and not label, label and not said, 1)
            rows.append(row.flatten())

    def score(sums: np.ndarray) -> np.ndarray:
        right, wrong, missed, count = np.moveaxis(sums.reshape(len(sums), -1, 4), 2, 0)
        f1 = _ratio(2 * right, 2 * right + wrong + missed)
        return 100 * _ratio((f1 * (count > 0)).sum(axis=1), (count > 0).sum(axis=1).astype(float))

    return Units(np.array(rows), score)


def mme(data_dir: str, path: str, answers: list[dict]) -> Units:
    """Accuracy plus share of images with both answers right, of every task of the group."""
    truth = eval_mme.read_ground_truth(os.path.join(data_dir, "MME"))
    lines = eval_mme.convert(truth, answers)
    groups = ([t for t in tasks if lines.get(t)] for tasks in eval_mme.TASKS.values())
    tasks = next(group for group in groups if group)
    rows = []
    for number, task in enumerate(tasks):
        for pair in eval_mme.right_pairs(lines[task]):
            row = np.zeros((len(tasks), 4))
            row[number] = (sum(pair), len(pair), all(pair), 1)
            rows.append(row.flatten())

    def score(sums: np.ndarray) -> np.ndarray:
        right, asked, both, images = np.moveaxis(sums.reshape(len(sums), -1, 4), 2, 0)
        return 50 * (_ratio(right, asked) + _ratio(both, images)).mean(axis=1)

    return Units(np.array(rows), score)


def textvqa(data_dir: str, path: str, answers: list[dict]) -> Units:
    file = os.path.join(data_dir, "textvqa", "TextVQA_0.5.1_val.json")
    found = eval_textvqa.points(eval_textvqa.read_annotations(file), answers)
    return mean_of([value for _, value in found])


def vqav2(data_dir: str, path: str, answers: list[dict]) -> Units:
    file = os.path.join(data_dir, "vqav2", "v2_mscoco_val2014_annotations.json")
    return mean_of(eval_vqav2.points(eval_vqav2.read_annotations(file), answers).values())


def vizwiz(data_dir: str, path: str, answers: list[dict]) -> Units:
    humans = eval_vizwiz.read_annotations(os.path.join(data_dir, "vizwiz", "val.json"))
    return mean_of(eval_vizwiz.points(humans, read_jsonl(path), answers).values())


def gqa(data_dir: str, path: str, answers: list[dict]) -> Units:
    questions = read_json(os.path.join(data_dir, "gqa", "data", "testdev_balanced_questions.json"))
    questions = eval_gqa.asked(questions, answers)
    return mean_of(eval_gqa.points(questions, uploads.gqa(answers)).values())


def refcoco(data_dir: str, path: str, answers: list[dict]) -> Units:
    folder, name = os.path.split(path)
    file = os.path.join(folder, name.removeprefix("llava_"))
    overlaps = eval_refcoco.overlaps(eval_refcoco.read_annotations(file), answers)
    return mean_of([(value or 0.0) >= eval_refcoco.THRESHOLD for value in overlaps.values()])


def mmbench(data_dir: str, path: str, answers: list[dict]) -> Units:
    """A question counts once where all its rotations were asked, else every row does."""
    circles = eval_mmbench.circles(eval_mmbench.read_rows(path), answers)
    if eval_mmbench.is_circular(circles):
        return mean_of([all(circle.right) for circle in circles.values()])
    return mean_of([right for circle in circles.values() for right in circle.right])


def seed(data_dir: str, path: str, answers: list[dict]) -> Units:
    annotation = read_json(os.path.join(data_dir, "seed_bench", "SEED-Bench.json"))
    asked = eval_seed.asked(annotation, answers)
    return mean_of(eval_seed.points(asked, eval_seed.texts_by_id(answers)).values())


def qbench(data_dir: str, path: str, answers: list[dict]) -> Units:
    records = read_json_list(path, eval_qbench.FIELDS)
    return mean_of([right for _, right in eval_qbench.points(records, answers)])


def science_qa(data_dir: str, path: str, answers: list[dict]) -> Units:
    problems, _ = eval_science_qa.read_problems(os.path.join(data_dir, "scienceqa"), "test")
    asked = [answer["question_id"] for answer in answers]
    return mean_of(eval_science_qa.evaluate(problems, asked, answers)["scored"].values())


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
