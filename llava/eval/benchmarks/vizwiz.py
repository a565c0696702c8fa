"""VizWiz: soft accuracy on a split whose answers are public (validation).

python -m llava.eval.benchmarks.vizwiz --annotation-file val.json --question-file llava_val.jsonl \
    --result-file A.jsonl

The answers to the test split are known to its server only, and that is closed.
"""

import os

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.benchmarks.benchmark import BUNDLE, Benchmark, Upload
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import (
    by_id,
    question_id,
    say_missing,
    source,
    texts_by_id,
    texts_to,
    unique,
)
from llava.eval.files.records import Records, complete, read_json_list, read_jsonl
from llava.eval.files.writing import write_json
from llava.eval.scoring.m4c import EvalAIAnswerProcessor, TextVQAAccuracyEvaluator
from llava.eval.scoring.units import Unit, Units, accuracy_report
from llava.program_parser import ProgramParser

FIELDS = ("question_id", "image")


def read_annotations(path: str) -> dict[str, list[str]]:
    """Returns the ten human answers by image; VizWiz asks one question per image."""
    entries = read_json_list(path, ("image", "answers"))
    return {e["image"]: [answer["answer"] for answer in e["answers"]] for e in entries}


def units(humans: dict[str, list[str]], questions: list[dict], answers: list[dict]) -> Units:
    """Returns the soft accuracy of every answer; the details hold the share in percent of those
    that are "unanswerable".

    Raises ValueError when a question has no annotated image, or two different answers.
    """
    images = {key: question["image"] for key, question in by_id(questions).items()}
    score, found, gave_up = TextVQAAccuracyEvaluator().score, [], 0
    for key, answer in unique(answers).items():
        image, text = images.get(key), answer["text"]
        if image not in humans:
            raise ValueError(
                f"{source(answers)}: question {answer['question_id']!r}: no annotation of {image!r}"
            )
        gave_up += text.strip(" \t\r\n.").lower() == "unanswerable"
        found.append(Unit(key, score(text, humans[image]), text, image))
    return Units(found, details={"said_unanswerable": 100 * gave_up / max(len(found), 1)})


def report(units: Units) -> str:
    share = units.details["said_unanswerable"]
    return f"{accuracy_report(units)}Answered 'unanswerable': {share:.2f}%\n"


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    humans = read_annotations(os.path.join(data_dir, "vizwiz/val.json"))
    return units(humans, complete(asked, FIELDS), answers)


def upload(questions: list[dict], texts: dict) -> list[dict]:
    """Returns `[{"image", "answer"}]` in question order; every question needs an answer."""
    normalise, found = EvalAIAnswerProcessor(), texts_to(questions, texts)
    pairs = list(zip(questions, found, strict=True))
    if missing := [q["question_id"] for q, text in pairs if text is None]:
        raise ValueError(f"{len(missing)} questions have no answer, e.g. {missing[0]}")
    return [{"image": q["image"], "answer": normalise(text)} for q, text in pairs]


def write_upload(data_dir: str, asked: Records, answers: list[dict], path: str) -> None:
    write_json(upload(asked, texts_by_id(answers)), path)


SOURCES = {
    "vizwiz/llava_test": BUNDLE,
    "vizwiz/llava_val": "python scripts/convert_vizwiz_to_llava.py, out of vizwiz/val.json",
    "vizwiz/": "https://vizwiz.org/tasks-and-datasets/vqa",
}
SERVER = (
    "the VizWiz server on EvalAI, which was reported closed in December 2025: score the "
    "validation split instead (SPLIT=val)"
)
BENCHMARKS = (
    Benchmark(
        "vizwiz",
        "vizwiz/llava_test.jsonl",
        "vizwiz/test",
        "accuracy",
        SOURCES,
        upload=Upload(".json", write_upload, SERVER),
    ),
    Benchmark(
        "vizwiz_val",
        "vizwiz/llava_val.jsonl",
        "vizwiz/val",
        "accuracy",
        SOURCES,
        read_units,
        report,
        truth=("vizwiz/val.json",),
    ),
)


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--annotation-file", required=True, help="val.json, with the right answers")
    parser.add_argument("--question-file", required=True, help="file of the questions")
    parser.add_argument("--result-file", required=True, help="answers file")
    args = parser.parse_args()
    questions = complete(read_jsonl(args.question_file), FIELDS)
    answers = read_answers(args.result_file)
    with broken_files_named((args.annotation_file, args.question_file), args.result_file):
        found = units(read_annotations(args.annotation_file), questions, answers)
    say_missing(answers, list(map(question_id, questions)), "the score is that of the others")
    print(report(found), end="")


if __name__ == "__main__":
    main()
