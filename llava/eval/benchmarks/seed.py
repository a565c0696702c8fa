"""SEED-Bench: accuracy per question type, and over images and videos.

python -m llava.eval.benchmarks.seed --annotation-file SEED-Bench.json --result-file A.jsonl

`scripts/convert_seed_for_submission.py` prints the same and writes the leaderboard's file, too.
"""

import os

from llava.eval.benchmarks.benchmark import BUNDLE, Benchmark, Upload
from llava.eval.files.matching import by_id, check_known, texts_by_id, texts_to
from llava.eval.files.records import Records, read_json
from llava.eval.files.writing import write_jsonl
from llava.eval.scoring.cli import run_scorer
from llava.eval.scoring.units import Unit, Units, mean_by_share

KINDS = ("image accuracy", "video accuracy")
ANNOTATION = "seed_bench/SEED-Bench.json"


def units(annotation: dict, answers: list[dict]) -> Units:
    """Returns whether every question of the annotation was answered right, one without an answer
    being wrong. As in the release, an answer is right when it is the letter and nothing else.

    Raises ValueError when an answer belongs to none, or two to one question differ.
    """
    questions = by_id(annotation["questions"])
    check_known(answers, questions, "the annotation")
    types = sorted(annotation["question_type"].items(), key=lambda item: item[1])
    names = {number: name for name, number in types}
    texts = texts_by_id(answers)
    found = []
    for key, question in questions.items():
        text = texts.get(key, "")
        groups = (names[question["question_type_id"]], f"{question['data_type']} accuracy")
        found.append(Unit(key, text.strip() == question["answer"], text, groups=groups))
    return Units(found, mean_by_share, groups=(*names.values(), *KINDS))


def report(units: Units) -> str:
    scores = {name: part.percent for name, part in units.by_group().items()}
    kinds = {name: scores.pop(name) for name in KINDS}
    scores |= {"Total accuracy": units.percent} | kinds
    return "".join(f"{name}: {score:.2f}%\n" for name, score in scores.items())


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    """Of those questions that were answered."""
    found = units(read_json(os.path.join(data_dir, ANNOTATION)), answers)
    return found.only(texts_by_id(answers))


def upload(questions: list[dict], texts: dict) -> list[dict]:
    """Returns one `{"question_id", "prediction"}` per question; unanswered ones are empty.

    Raises ValueError when an answer belongs to none.
    """
    pairs = zip(questions, texts_to(questions, texts), strict=True)
    return [{"question_id": q["question_id"], "prediction": text or ""} for q, text in pairs]


def write_upload(data_dir: str, asked: Records, answers: list[dict], path: str) -> None:
    annotation = read_json(os.path.join(data_dir, ANNOTATION))
    write_jsonl(upload(annotation["questions"], texts_by_id(answers)), path)


DATA_SET = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
LEADERBOARD = "https://huggingface.co/spaces/AILab-CVC/SEED-Bench_Leaderboard"
BENCHMARKS = (
    Benchmark(
        "seed",
        "seed_bench/llava-seed-bench.jsonl",
        "seed_bench",
        "accuracy",
        {
            "seed_bench/llava": BUNDLE,
            "seed_bench": f"{DATA_SET} (images; middle frames of the videos)",
            ANNOTATION: DATA_SET,
        },
        read_units,
        report,
        truth=(ANNOTATION,),
        upload=Upload(".jsonl", write_upload, LEADERBOARD),
    ),
)


def main():
    ids = lambda annotation: by_id(annotation["questions"])  # noqa: E731
    run_scorer(__doc__, read_json, units, report, ids, missing="they count as wrong")


if __name__ == "__main__":
    main()
