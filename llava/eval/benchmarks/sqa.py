"""ScienceQA: accuracy over all questions and over those with an image (the published number).

python llava/eval/eval_science_qa.py --base-dir DIR --result-file A.jsonl --output-file O.jsonl \
    --output-result R.json
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.answering.questions import Question
from llava.eval.benchmarks.benchmark import BUNDLE, Benchmark
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import (
    and_others,
    keyed,
    say_missing,
    source,
    unique,
)
from llava.eval.files.records import Records, as_int, read_json, read_json_list
from llava.eval.files.writing import write_json
from llava.eval.scoring.options import LETTER_ONLY
from llava.eval.scoring.units import VALUE, Unit, Units, mean_by_share
from llava.program_parser import ProgramParser

FAILED = "FAILED"
SENTENCE = re.compile(r"The answer is ([A-Z]).")
LETTERS = "ABCDE"


def science_questions(record: dict, single_pred_prompt: bool = False) -> Iterator[Question]:
    """ScienceQA: `{id, image?, conversations}`; the recorded prompt shows if it has an image."""
    text = record["conversations"][0]["value"].replace("<image>", "").strip()
    if single_pred_prompt:
        text += "\n" + LETTER_ONLY
    images = [record["image"]] if record.get("image") else []
    prompt = "<image>\n" + text if images else text
    yield Question({"question_id": record["id"], "prompt": prompt}, text, images)


def parse_letter(text: str, letters: str = LETTERS) -> str:
    """Returns the option letter an answer names, or `FAILED`; the rules of the release."""
    text = text.strip("\t\r\n")
    if text in letters and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    found = SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def units(problems: dict, ids: list[str], answers: list[dict], letters: str = LETTERS) -> Units:
    """Returns whether every question in `ids` was answered right, one without an answer being
    wrong. Those with an image make the score, or all where none has one.

    Details: the accuracies, and the files that the program writes. Raises ValueError when there is
    no problem of that id, or two answers to one differ.
    """
    given, problems = unique(answers), keyed(problems)
    ids = {as_int(key): str(key) for key in ids}
    if unknown := [key for key in ids if key not in problems]:
        raise ValueError(
            f"{source(answers)}: question {ids[unknown[0]]!r}{and_others(len(unknown))} is not in "
            "problems.json"
        )
    found, entries, results, outputs = [], {"correct": [], "incorrect": []}, {}, {}
    for number, key in ids.items():
        answer = given.get(number, {"text": FAILED, "prompt": "Unknown"})
        letter = parse_letter(answer["text"], letters)
        choices = letters[: len(problems[number]["choices"])]
        outputs[key] = answer["text"]
        results[key] = choices.index(letter) if letter in choices else -1
        right = results[key] == problems[number]["answer"]
        shown = "<image>" in answer["prompt"]
        entry = {
            "question_id": key,
            "parsed_ans": letter,
            "ground_truth": letters[problems[number]["answer"]],
            "question": answer["prompt"],
            "pred": answer["text"],
            "is_multimodal": shown,
        }
        entries["correct" if right else "incorrect"].append(entry)
        found.append(Unit(number, right, answer["text"], weight=int(shown)))
    every = Units([unit._replace(weight=1) for unit in found], mean_by_share)
    shown = Units(found, mean_by_share)
    details = {
        "accuracy": every.percent,
        "image_accuracy": shown.percent,
        "correct": every.sums[VALUE],
        "total": len(found),
        "sqa_results": entries,
        "results": results,
        "outputs": outputs,
    }
    return replace(shown if shown.count else every, details=details)


def report(units: Units) -> str:
    return (
        "Total: {total}, Correct: {correct}, Accuracy: {accuracy:.2f}%, "
        "IMG-Accuracy: {image_accuracy:.2f}%\n"
    ).format(**units.details)


def read_problems(base_dir: str, split: str) -> tuple[dict, list[str]]:
    """Returns all problems by id, and the ids of a split."""
    splits = read_json(os.path.join(base_dir, "pid_splits.json"))
    if split not in splits:
        raise ValueError(f"no split {split!r}, choose from {', '.join(splits)}")
    return read_json(os.path.join(base_dir, "problems.json")), splits[split]


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    """Of those questions that were answered."""
    problems, _ = read_problems(os.path.join(data_dir, "scienceqa"), "test")
    return units(problems, [answer["question_id"] for answer in answers], answers)


BENCHMARKS = (
    Benchmark(
        "sqa",
        "scienceqa/llava_test_CQM-A.json",
        "scienceqa/images/test",
        "accuracy on images",
        {
            "scienceqa/llava_": BUNDLE,
            "scienceqa/": (
                "https://github.com/lupantech/ScienceQA (data/scienceqa and the test images)"
            ),
        },
        read_units,
        report,
        truth=("scienceqa/problems.json", "scienceqa/pid_splits.json"),
        read=read_json_list,
        to_questions=partial(science_questions, single_pred_prompt=True),
        program=("model_vqa_science", "--single-pred-prompt"),
    ),
)


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument(
        "--base-dir", required=True, help="folder of problems.json and pid_splits.json"
    )
    parser.add_argument("--result-file", required=True, help="answers file")
    parser.add_argument(
        "--output-file", required=True, help="file to write: right and wrong answers, one object"
    )
    parser.add_argument(
        "--output-result", required=True, help="file to write: accuracy and chosen options"
    )
    parser.add_argument("--split", default="test", help="part of ScienceQA that was asked")
    parser.add_argument("--options", default=LETTERS, help="letters of the options, in order")
    args = parser.parse_args()
    answers = read_answers(args.result_file, ("question_id", "prompt", "text"))
    truth = tuple(
        os.path.join(args.base_dir, name) for name in ("problems.json", "pid_splits.json")
    )
    with broken_files_named(truth, args.result_file):
        problems, ids = read_problems(args.base_dir, args.split)
        found = units(problems, ids, answers, args.options)
    say_missing(answers, list(map(as_int, ids)), "they count as wrong")
    print(report(found), end="")
    details = found.details
    write_json(details["sqa_results"], args.output_file, indent=2)
    summary = {"acc": details["accuracy"], "correct": details["correct"], "count": details["total"]}
    summary |= {key: details[key] for key in ("results", "outputs")}
    write_json(summary, args.output_result, indent=2)


if __name__ == "__main__":
    main()
