"""Per benchmark, what its answers add to the score: one function each, gathered in `UNITS`.

Every function takes (data folder, question file, answers) and gives each answered question's part
of the score with the image it is about (`llava.eval.bootstrap.Units`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

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
    uploads,
)
from llava.eval.bootstrap import Units, by_image, interval, mean_of, mean_where, ratio
from llava.eval.local_scores import base_index
from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator
from llava.eval.tasks import as_int, read_json, read_json_list, read_jsonl, read_table

__all__ = ["UNITS", "Units", "interval", "mean_of"]


class Images:
    """The image of every question of a file; None for a question without one."""

    def __init__(self, records: list[dict]):
        self.images = {}
        for record in records:
            image = record.get("image") or None
            key = record.get("question_id", record.get("id"))
            # Where several questions share an id, their texts tell them apart.
            self.images[key] = self.images[key, record.get("text")] = image

    def of(self, answer: dict) -> str | None:
        key = answer["question_id"]
        image = self.images.get((key, answer.get("prompt")), self.images.get(key))
        return image if image is None or isinstance(image, str) else repr(image)


def pope(data_dir: str, path: str, answers: list[dict]) -> Units:
    """F1 of every category, then their mean."""
    folder = os.path.join(data_dir, "pope", "coco")
    categories = eval_pope.outcomes(folder, read_jsonl(path), answers)
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
    pictures = {_mme_name(r["question_id"]): r.get("image") for r in read_jsonl(path)}
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
    return task, f"{image.split('.')[0]}.txt"


def textvqa(data_dir: str, path: str, answers: list[dict]) -> Units:
    file = os.path.join(data_dir, "textvqa", "TextVQA_0.5.1_val.json")
    humans = {
        (a["image_id"], a["question"].lower()): a["answers"]
        for a in eval_textvqa.read_annotations(file)
    }
    keys = [(a["question_id"], eval_textvqa.question_of(a["prompt"])) for a in answers]
    images = [str(a["question_id"]) for a in answers]  # its questions have the names of images
    return _soft_accuracy(answers, [humans[key] for key in keys], images)


def vqav2(data_dir: str, path: str, answers: list[dict]) -> Units:
    file = os.path.join(data_dir, "vqav2", "v2_mscoco_val2014_annotations.json")
    humans = {as_int(key): given for key, given in eval_vqav2.read_annotations(file).items()}
    given = [humans[as_int(answer["question_id"])] for answer in answers]
    images = Images(read_jsonl(path))
    return _soft_accuracy(answers, given, map(images.of, answers))


def vizwiz(data_dir: str, path: str, answers: list[dict]) -> Units:
    humans = eval_vizwiz.read_annotations(os.path.join(data_dir, "vizwiz", "val.json"))
    images = list(map(Images(read_jsonl(path)).of, answers))
    return _soft_accuracy(answers, [humans[image] for image in images], images)


def _soft_accuracy(answers: list[dict], humans: list[list[str]], images) -> Units:
    scorer = TextVQAAccuracyEvaluator()
    pairs = zip(answers, humans, strict=True)
    return mean_of([scorer.score(answer["text"], given) for answer, given in pairs], images)


def gqa(data_dir: str, path: str, answers: list[dict]) -> Units:
    questions = read_json(os.path.join(data_dir, "gqa", "data", "testdev_balanced_questions.json"))
    given = {entry["questionId"]: entry["prediction"] for entry in uploads.gqa(answers)}
    counted = [a for a in answers if questions.get(a["question_id"], {}).get("isBalanced")]
    keys = [answer["question_id"] for answer in counted]
    right = [given[key] == questions[key]["answer"] for key in keys]
    return mean_of(right, map(Images(read_jsonl(path)).of, counted))


def refcoco(data_dir: str, path: str, answers: list[dict]) -> Units:
    folder, name = os.path.split(path)
    file = os.path.join(folder, name.removeprefix("llava_"))
    truth = {record["question_id"]: record for record in eval_refcoco.read_annotations(file)}
    hits = (eval_refcoco.evaluate([truth[a["question_id"]]], [a]) for a in answers)
    return mean_of([hit["score"] / 100 for hit in hits], map(Images(read_jsonl(path)).of, answers))


def mmbench(data_dir: str, path: str, answers: list[dict]) -> Units:
    """A question counts once, however many rotations of its options it was asked with."""
    rows = {as_int(row["index"]): row for row in read_table(path, ("index", "answer"))}
    rounds: dict[object, list[dict]] = {}
    for answer in answers:
        rounds.setdefault(base_index(answer), []).append(answer)
    points, images = [], []
    for key, own in rounds.items():
        asked = [(rows[answer["question_id"]], answer) for answer in own]
        hits = (eval_mmbench.evaluate([row], [answer])["score"] for row, answer in asked)
        points.append(min(hits) / 100)
        images.append(_table_image(rows, rows.get(key, asked[0][0])))
    return mean_of(points, images)


def _table_image(rows: dict, row: dict) -> str | None:
    """The picture of a row; some tables name the row that has it instead."""
    image = row.get("image")
    other = rows.get(as_int(image)) if image and len(image) < 32 else None
    return other.get("image") if other else image


def seed(data_dir: str, path: str, answers: list[dict]) -> Units:
    annotation = read_json(os.path.join(data_dir, "seed_bench", "SEED-Bench.json"))
    truth = {as_int(q["question_id"]): q["answer"] for q in annotation["questions"]}
    texts = eval_seed.texts_by_id(answers)
    images = {as_int(answer["question_id"]): answer for answer in answers}
    of = Images(read_jsonl(path)).of
    asked = [key for key in texts if key in truth]
    return mean_of([texts[k] == truth[k] for k in asked], [of(images[k]) for k in asked])


def qbench(data_dir: str, path: str, answers: list[dict]) -> Units:
    records = {(r["img_path"], r["question"]): r for r in read_json_list(path, eval_qbench.FIELDS)}
    pairs = ((records[a["img_path"], a["question"]], a) for a in answers)
    hits = (eval_qbench.evaluate([record], [answer]) for record, answer in pairs)
    return mean_of([hit["score"] / 100 for hit in hits], [a["img_path"] for a in answers])


def science_qa(data_dir: str, path: str, answers: list[dict]) -> Units:
    """Those questions that the score is of: with an image, where there are any."""
    problems, _ = eval_science_qa.read_problems(os.path.join(data_dir, "scienceqa"), "test")
    shown = [a for a in answers if "<image>" in a["prompt"]] or answers
    asked = [answer["question_id"] for answer in shown]
    results = eval_science_qa.evaluate(problems, asked, shown)["results"]
    images = Images(read_json_list(path))
    return mean_of([results[k] == problems[k]["answer"] for k in asked], map(images.of, shown))


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
