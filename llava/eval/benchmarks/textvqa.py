"""TextVQA: soft accuracy of answers about text in images.

python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file A.jsonl
"""

import os
import re
import sys
from collections import Counter

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.benchmarks.benchmark import BUNDLE, Benchmark
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import question_id, source, unique
from llava.eval.files.records import Records, as_int, read_json
from llava.eval.scoring.m4c import TextVQAAccuracyEvaluator
from llava.eval.scoring.units import Unit, Units, accuracy_report
from llava.program_parser import ProgramParser

ANNOTATIONS = "textvqa/TextVQA_0.5.1_val.json"
OCR_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def question_of(prompt: str) -> str:
    """Returns the question, in lower case, out of a recorded prompt with or without OCR tokens."""
    lines = prompt.replace("\r\n", "\n").split("\n")
    if prompt.startswith("OCR tokens: "):
        question = OCR_PROMPT.search(prompt)[1]
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        question = lines[1] if lines[0].startswith("Reference OCR token:") else lines[0]
    elif len(lines) == 2:
        question = lines[0]
    else:
        raise ValueError(f"its recorded prompt {prompt!r} holds no question")
    return question.lower()


def question_key(answer: dict) -> tuple[int | str, str]:
    """Image and question that an answer belongs to."""
    return question_id(answer), question_of(answer["prompt"])


def units(annotations: list[dict], answers: list[dict]) -> Units:
    """Returns the soft accuracy of every answer; a question counts as often as it is annotated.

    Raises ValueError when it is not annotated, or has two different answers.
    """
    humans = {_annotated(a): a["answers"] for a in annotations}
    times = Counter(map(_annotated, annotations))
    found = unique(answers, question_key)
    given = Counter(map(question_key, answers))
    if lost := [key for key in found if key not in humans]:
        image, question = lost[0]
        raise ValueError(
            f"{source(answers)}: no annotation for image {image!r} and question {question!r}"
        )
    score = TextVQAAccuracyEvaluator().score
    return Units(
        [
            Unit(
                key,
                score(answer["text"], humans[key]),
                answer["text"],
                str(key[0]),
                weight=min(given[key], times[key]),
            )
            for key, answer in found.items()
        ]
    )


def _annotated(annotation: dict) -> tuple[int | str, str]:
    return as_int(annotation["image_id"]), annotation["question"].lower()


def report(units: Units) -> str:
    return f"{accuracy_report(units)}\n"


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    return units(read_annotations(os.path.join(data_dir, ANNOTATIONS)), answers)


def _first_missing(annotations: list[dict], answers: list[dict]) -> str:
    given = set(map(question_key, answers))
    image, question = next(key for key in map(_annotated, annotations) if key not in given)
    return f"{question!r} about image {image!r}"


def read_annotations(path: str) -> list[dict]:
    return read_json(path)["data"]


FILES = "https://dl.fbaipublicfiles.com/textvqa"
BENCHMARKS = (
    Benchmark(
        "textvqa",
        "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        "textvqa/train_images",
        "accuracy",
        {
            "textvqa/llava_": BUNDLE,
            "textvqa/TextVQA": f"{FILES}/data/TextVQA_0.5.1_val.json",
            "textvqa/train_images": f"{FILES}/images/train_val_images.zip",
        },
        read_units,
        report,
        truth=(ANNOTATIONS,),
        unit_of=question_key,
    ),
)


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument(
        "--annotation-file", required=True, help="TextVQA_0.5.1_val.json, with the right answers"
    )
    parser.add_argument("--result-file", help="answers file")
    parser.add_argument("--result-dir", help="score every .jsonl file of a folder")
    args = parser.parse_args()
    files = [args.result_file] if args.result_file else []
    if args.result_dir:
        files += [
            os.path.join(args.result_dir, name) for name in sorted(os.listdir(args.result_dir))
        ]
    if not any(path.endswith(".jsonl") for path in files):
        raise ValueError(
            "nothing to score: name a --result-file, or a --result-dir with .jsonl files"
        )
    with broken_files_named((args.annotation_file,), args.annotation_file):
        annotations = read_annotations(args.annotation_file)
    for path in files:
        if not path.endswith(".jsonl"):
            print(f"Skipping {os.path.basename(path)}")
            continue
        print(os.path.splitext(os.path.basename(path))[0])
        answers = read_answers(path, ("question_id", "prompt", "text"))
        with broken_files_named((args.annotation_file,), path):
            found = units(annotations, answers)
        if rest := len(annotations) - found.count:
            print(
                f"note: {path}: {rest} of {len(annotations)} questions have no answer, such as "
                f"{_first_missing(annotations, answers)}: the accuracy is that of the others",
                file=sys.stderr,
            )
        print(report(found), end="")


if __name__ == "__main__":
    main()
