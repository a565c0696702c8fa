"""How far a score would move with other questions: intervals by bootstrap, paired between runs.

What is drawn again is what a benchmark counts: questions, or pairs of questions about one image.
Scores are functions of sums over these units, so that a draw costs one product of matrices.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llava.eval import (
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
)
from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator
from llava.eval.tasks import as_int, read_json, read_json_list, read_jsonl, read_table

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


def mean_of(points: list[float]) -> Units:
    """Units of a benchmark that averages points from 0 to 1."""
    sums = np.stack([np.asarray(points, dtype=float), np.ones(len(points))], axis=1)
    return Units(sums, lambda s: 100 * _ratio(s[:, 0], s[:, 1]))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotients, 0 over nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def pope(data_dir: str, path: str, answers: list[dict]) -> Units:
    """F1 of every category, then their mean."""
    folder, questions = os.path.join(data_dir, "pope", "coco"), read_jsonl(path)
    texts = {answer["question_id"]: answer["text"] for answer in answers}
    rows, files = [], eval_pope.annotation_files(folder)
    for number, (category, file) in enumerate(files.items()):
        ids = [q["question_id"] for q in questions if q["category"] == category]
        for key, label in zip(ids, eval_pope.read_labels(file), strict=False):
            if key in texts:
                said = eval_pope.is_yes(texts[key])
                row = np.zeros((len(files), 4))
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
    humans = {
        (a["image_id"], a["question"].lower()): a["answers"]
        for a in eval_textvqa.read_annotations(file)
    }
    keys = [(a["question_id"], eval_textvqa.question_of(a["prompt"])) for a in answers]
    return _soft_accuracy(answers, [humans[key] for key in keys])


def vqav2(data_dir: str, path: str, answers: list[dict]) -> Units:
    file = os.path.join(data_dir, "vqav2", "v2_mscoco_val2014_annotations.json")
    humans = eval_vqav2.read_annotations(file)
    return _soft_accuracy(answers, [humans[answer["question_id"]] for answer in answers])


def vizwiz(data_dir: str, path: str, answers: list[dict]) -> Units:
    humans = eval_vizwiz.read_annotations(os.path.join(data_dir, "vizwiz", "val.json"))
    images = {question["question_id"]: question["image"] for question in read_jsonl(path)}
    return _soft_accuracy(answers, [humans[images[a["question_id"]]] for a in answers])


def _soft_accuracy(answers: list[dict], humans: list[list[str]]) -> Units:
    scorer = TextVQAAccuracyEvaluator()
    pairs = zip(answers, humans, strict=True)
    return mean_of([scorer.score(answer["text"], given) for answer, given in pairs])


def gqa(data_dir: str, path: str, answers: list[dict]) -> Units:
    questions = read_json(os.path.join(data_dir, "gqa", "data", "testdev_balanced_questions.json"))
    texts = {a["question_id"]: a["text"].rstrip(".").lower() for a in answers}
    balanced = [key for key in texts if questions.get(key, {}).get("isBalanced")]
    return mean_of([texts[key] == questions[key]["answer"] for key in balanced])


def refcoco(data_dir: str, path: str, answers: list[dict]) -> Units:
    folder, name = os.path.split(path)
    file = os.path.join(folder, name.removeprefix("llava_"))
    truth = {record["question_id"]: record for record in eval_refcoco.read_annotations(file)}
    hits = (eval_refcoco.evaluate([truth[a["question_id"]]], [a]) for a in answers)
    return mean_of([hit["score"] / 100 for hit in hits])


def mmbench(data_dir: str, path: str, answers: list[dict]) -> Units:
    """A question counts once, however many rounds it was asked in."""
    rows = {as_int(row["index"]): row for row in read_table(path, ("index", "answer"))}
    rounds: dict[object, list[dict]] = {}
    for answer in answers:
        rounds.setdefault(answer["question_id"], []).append(answer)
    hits = (eval_mmbench.evaluate([rows[key]], own) for key, own in rounds.items())
    return mean_of([hit["score"] / 100 for hit in hits])


def seed(data_dir: str, path: str, answers: list[dict]) -> Units:
    annotation = read_json(os.path.join(data_dir, "seed_bench", "SEED-Bench.json"))
    texts = eval_seed.texts_by_id(answers)
    asked = [q for q in annotation["questions"] if as_int(q["question_id"]) in texts]
    hits = (eval_seed.evaluate({"question_type": {}, "questions": [q]}, texts) for q in asked)
    return mean_of([hit[eval_seed.TOTAL] / 100 for hit in hits])


def qbench(data_dir: str, path: str, answers: list[dict]) -> Units:
    records = {(r["img_path"], r["question"]): r for r in read_json_list(path, eval_qbench.FIELDS)}
    pairs = ((records[a["img_path"], a["question"]], a) for a in answers)
    hits = (eval_qbench.evaluate([record], [answer]) for record, answer in pairs)
    return mean_of([hit["score"] / 100 for hit in hits])


def science_qa(data_dir: str, path: str, answers: list[dict]) -> Units:
    problems, _ = eval_science_qa.read_problems(os.path.join(data_dir, "scienceqa"), "test")
    asked = [answer["question_id"] for answer in answers]
    shown = [a["question_id"] for a in answers if "<image>" in a["prompt"]] or asked
    results = eval_science_qa.evaluate(problems, asked, answers)["results"]
    return mean_of([results[key] == problems[key]["answer"] for key in shown])


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
