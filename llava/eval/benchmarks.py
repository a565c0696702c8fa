"""The table of benchmarks: where the files lie, how questions are read and answers scored.

Paths are relative to a data folder: that of the published bundle (`playground/data/eval`) or the
playground's own (`playground/benchmark`), which has the same layout but one folder of images.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llava.eval import (
    eval_gqa,
    eval_mmbench,
    eval_mme,
    eval_pope,
    eval_refcoco,
    eval_science_qa,
    eval_textvqa,
    eval_vqav2,
)
from llava.eval.tasks import (
    Question,
    jsonl_questions,
    mmbench_questions,
    read_json,
    read_json_list,
    read_jsonl,
    read_table,
    science_questions,
    subset,
)

JSONL_FIELDS = ("question_id", "text")
SHARED_IMAGES = "images"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    questions: question file, relative to the data folder
    images:    image folder in the published layout; unused where images are inside the questions
    metric:    what `score` is
    evaluate:  (data folder, question file, answers) -> dict with `score`, `count` and details;
               `percent` where `score` is not one
    report:    that dict -> the text the reference scorer prints
    """

    name: str
    questions: str
    images: str
    metric: str
    evaluate: Callable[[str, str, list[dict]], dict]
    report: Callable[[dict], str]
    read: Callable[[str], list[dict]] = partial(read_jsonl, fields=JSONL_FIELDS)
    to_questions: Callable = jsonl_questions

    def load_questions(self, path: str, limit: int | None = None) -> list[Question]:
        """Returns the questions of a file, or about `limit` of them."""
        records = subset(self.read(path), limit)
        return [question for record in records for question in self.to_questions(record)]

    def image_folder(self, data_dir: str) -> str:
        """Returns the folder all benchmarks share, where there is one, else the published one."""
        shared = os.path.join(data_dir, SHARED_IMAGES)
        return shared if os.path.isdir(shared) else os.path.join(data_dir, self.images)

    def score(self, data_dir: str, path: str, answers: list[dict], limit: int | None) -> dict:
        """Returns the scores of a complete set of answers to the questions of file `path`."""
        asked = [question.head for question in self.load_questions(path, limit)]
        given = [{key: a.get(key) for key in h} for a, h in zip(answers, asked, strict=False)]
        if given != asked or len(answers) != len(asked):
            raise ValueError(
                f"the answers do not belong to all {len(asked)} questions of {path}: "
                f"there are {len(answers)}, "
                f"{sum(g == a for g, a in zip(given, asked, strict=False))} of them in place"
            )
        result = self.evaluate(data_dir, path, answers)
        return {"benchmark": self.name, "metric": self.metric, "percent": result["score"]} | result


def _pope(data_dir, path, answers):
    folder = os.path.join(data_dir, "pope", "coco")
    return eval_pope.evaluate(folder, read_jsonl(path), answers)


def _textvqa(data_dir, path, answers):
    annotations = os.path.join(data_dir, "textvqa", "TextVQA_0.5.1_val.json")
    return eval_textvqa.evaluate(eval_textvqa.read_annotations(annotations), answers)


def _gqa(data_dir, path, answers):
    questions = read_json(os.path.join(data_dir, "gqa", "data", "testdev_balanced_questions.json"))
    predictions = {a["question_id"]: a["text"].rstrip(".").lower() for a in answers}
    asked = {key: questions[key] for key in questions if key in predictions}
    entries = [{"questionId": key, "prediction": text} for key, text in predictions.items()]
    return eval_gqa.evaluate(asked, entries)


def _vqav2(data_dir, path, answers):
    annotations = os.path.join(data_dir, "vqav2", "v2_mscoco_val2014_annotations.json")
    if not os.path.exists(annotations):
        raise ValueError(
            f"{annotations} is missing; answers to a test split can only be scored by the "
            "benchmark's server: scripts/convert_vqav2_for_submission.py makes its upload"
        )
    return eval_vqav2.evaluate(eval_vqav2.read_annotations(annotations), answers)


def _mmbench(data_dir, path, answers):
    return eval_mmbench.evaluate(read_table(path, ("index", "answer")), answers)


def _mme(data_dir, path, answers):
    truth = eval_mme.read_ground_truth(os.path.join(data_dir, "MME"))
    return eval_mme.evaluate(eval_mme.convert(truth, answers))


def _refcoco(data_dir, path, answers):
    annotations = os.path.join(data_dir, "refcoco", "refcoco_val.jsonl")
    return eval_refcoco.evaluate(eval_refcoco.read_annotations(annotations), answers)


def _science_qa(data_dir, path, answers):
    problems, _ = eval_science_qa.read_problems(os.path.join(data_dir, "scienceqa"), "test")
    asked = [answer["question_id"] for answer in answers]
    return eval_science_qa.evaluate(problems, asked, answers)


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "pope",
            "pope/llava_pope_test.jsonl",
            "pope/val2014",
            "F1",
            _pope,
            eval_pope.report,
        ),
        Benchmark(
            "textvqa",
            "textvqa/llava_textvqa_val_v051_ocr.jsonl",
            "textvqa/train_images",
            "accuracy",
            _textvqa,
            eval_textvqa.report,
        ),
        Benchmark(
            "gqa",
            "gqa/llava_gqa_testdev_balanced.jsonl",
            "gqa/data/images",
            "accuracy",
            _gqa,
            eval_gqa.report,
        ),
        Benchmark(
            "vqav2",
            "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
            "vqav2/test2015",
            "accuracy",
            _vqav2,
            eval_vqav2.report,
        ),
        Benchmark(
            "mmbench",
            "mmbench/mmbench_dev_20230712.tsv",
            "mmbench",
            "accuracy",
            _mmbench,
            eval_mmbench.report,
            read_table,
            partial(mmbench_questions, single_pred_prompt=True),
        ),
        Benchmark(
            "mme",
            "MME/llava_mme.jsonl",
            "MME/MME_Benchmark_release_version",
            "perception",
            _mme,
            eval_mme.report,
        ),
        Benchmark(
            "refcoco",
            "refcoco/llava_refcoco_val.jsonl",
            "refcoco/images",
            "accuracy at IoU 0.5",
            _refcoco,
            eval_refcoco.report,
        ),
        Benchmark(
            "sqa",
            "scienceqa/llava_test_CQM-A.json",
            "scienceqa/images/test",
            "accuracy on images",
            _science_qa,
            eval_science_qa.report,
            partial(read_json_list, fields=("id", "conversations")),
            partial(science_questions, single_pred_prompt=True),
        ),
    )
}
