"""VQAv2: soft accuracy on a split whose answers are public (the test server keeps its own).

python -m llava.eval.benchmarks.vqav2 --annotation-file v2_mscoco_val2014_annotations.json \
    --result-file A.jsonl
"""

import os

from llava.eval.benchmarks.benchmark import BUNDLE, COCO, Benchmark, Upload
from llava.eval.files.matching import (
    check_known,
    keyed,
    texts_by_id,
    texts_to,
)
from llava.eval.files.records import Records, read_json, read_jsonl
from llava.eval.files.writing import write_json
from llava.eval.scoring.cli import run_scorer
from llava.eval.scoring.m4c import EvalAIAnswerProcessor, TextVQAAccuracyEvaluator
from llava.eval.scoring.units import Unit, Units

ANNOTATIONS = "vqav2/v2_mscoco_val2014_annotations.json"
FULL_TEST_SET = "vqav2/llava_vqav2_mscoco_test2015.jsonl"


def read_annotations(path: str) -> dict[int, list[str]]:
    """Returns the ten human answers by question id."""
    entries = read_json(path)["annotations"]
    return keyed({e["question_id"]: [a["answer"] for a in e["answers"]] for e in entries})


def units(humans: dict[int, list[str]], answers: list[dict]) -> Units:
    """Returns the soft accuracy of every answer.

    Raises ValueError when a question is not annotated, or has two different answers.
    """
    humans, score = keyed(humans), TextVQAAccuracyEvaluator().score
    check_known(answers, humans, "the annotations")
    texts = texts_by_id(answers).items()
    return Units([Unit(key, score(text, humans[key]), text) for key, text in texts])


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    return units(read_annotations(os.path.join(data_dir, ANNOTATIONS)), answers)


def upload(questions: list[dict], texts: dict) -> list[dict]:
    """Returns `[{"question_id", "answer"}]` in question order.

    The server wants an answer to every question of the full test set; those that were not asked
    get an empty one. Raises ValueError when an answer belongs to none.
    """
    normalise = EvalAIAnswerProcessor()
    pairs = zip(questions, texts_to(questions, texts), strict=True)
    return [{"question_id": q["question_id"], "answer": normalise(text or "")} for q, text in pairs]


def write_upload(data_dir: str, asked: Records, answers: list[dict], path: str) -> None:
    every = read_jsonl(os.path.join(data_dir, FULL_TEST_SET), ("question_id",))
    write_json(upload(every, texts_by_id(answers)), path)


_SHARED = {
    "metric": "accuracy",
    "units": read_units,
    "truth": (ANNOTATIONS,),
    "sources": {
        "vqav2/llava_": BUNDLE,
        "vqav2/llava_vqav2_mscoco_val2014": (
            "python scripts/convert_vqav2_to_llava.py, out of the official questions"
        ),
        "vqav2/test2015": f"{COCO}/test2015.zip",
        "vqav2/val2014": f"{COCO}/val2014.zip",
        "vqav2/v2_mscoco_val2014": "https://visualqa.org/download.html (annotations 2017 v2.0)",
    },
}
BENCHMARKS = (
    Benchmark(
        "vqav2",
        "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
        "vqav2/test2015",
        upload=Upload(
            ".json",
            write_upload,
            "EvalAI, VQA challenge, phase test-dev (https://eval.ai/web/challenges)",
        ),
        server_if=FULL_TEST_SET,
        hidden_images="COCO_test2015_",
        **_SHARED,
    ),
    Benchmark("vqav2_val", "vqav2/llava_vqav2_mscoco_val2014.jsonl", "vqav2/val2014", **_SHARED),
)


def main():
    run_scorer(__doc__, read_annotations, units)


if __name__ == "__main__":
    main()
