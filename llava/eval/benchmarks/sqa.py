"""ScienceQA: accuracy over all questions and over those with an image (the published number).

python llava/eval/eval_science_qa.py --base-dir DIR --result-file A.jsonl --output-file O.jsonl \
    --output-result R.json
"""

import argparse
import json
import os
import re
from collections.abc import Iterator

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.answering.questions import Question
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import and_others, keyed, say_missing, source, unique
from llava.eval.files.records import as_int, read_json
from llava.eval.scoring.options import LETTER_ONLY

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


def evaluate(problems: dict, ids: list[str], answers: list[dict], letters: str = LETTERS) -> dict:
    """Returns accuracies and the details of every question in `ids`; unanswered ones are wrong.

    score:  accuracy on the questions with an image, or on all where none has one
    scored: those questions, and whether they are right; `count` of them, `total` in all
    Raises ValueError when there is no problem of that id, or two answers to one differ.
    """
    given, problems = unique(answers), keyed(problems)
    ids = {as_int(key): str(key) for key in ids}
    if unknown := [key for key in ids if key not in problems]:
        raise ValueError(
            f"{source(answers)}: question {ids[unknown[0]]!r}{and_others(len(unknown))} is not in "
            "problems.json"
        )
    entries, results, outputs = [], {}, {}
    for number, key in ids.items():
        answer = given.get(number, {"text": FAILED, "prompt": "Unknown"})
        letter = parse_letter(answer["text"], letters)
        choices = letters[: len(problems[number]["choices"])]
        outputs[key] = answer["text"]
        results[key] = choices.index(letter) if letter in choices else -1
        entries.append(
            {
                "question_id": key,
                "parsed_ans": letter,
                "ground_truth": letters[problems[number]["answer"]],
                "question": answer["prompt"],
                "pred": answer["text"],
                "is_multimodal": "<image>" in answer["prompt"],
            }
        )
    right = [results[key] == problems[number]["answer"] for number, key in ids.items()]
    pairs = list(zip(entries, right, strict=True))
    with_image = {e["question_id"]: ok for e, ok in pairs if e["is_multimodal"]}
    shown = list(with_image.values())
    return {
        "score": _percent(shown if shown else right),
        "accuracy": _percent(right),
        "image_accuracy": _percent(shown),
        "correct": sum(right),
        "count": len(shown) or len(ids),
        "total": len(ids),
        "sqa_results": {"correct": [], "incorrect": []}
        | {
            name: [e for e, ok in pairs if ok == wanted]
            for name, wanted in (("correct", True), ("incorrect", False))
        },
        "results": results,
        "outputs": outputs,
        "scored": with_image or {e["question_id"]: ok for e, ok in pairs},
    }


def _percent(right: list[bool]) -> float:
    return sum(right) / len(right) * 100 if right else 0.0


def report(result: dict) -> str:
    return (
        f"Total: {result['total']}, Correct: {result['correct']}, "
        f"Accuracy: {result['accuracy']:.2f}%, IMG-Accuracy: {result['image_accuracy']:.2f}%\n"
    )


def read_problems(base_dir: str, split: str) -> tuple[dict, list[str]]:
    """Returns all problems by id, and the ids of a split."""
    splits = read_json(os.path.join(base_dir, "pid_splits.json"))
    if split not in splits:
        raise ValueError(f"no split {split!r}, choose from {', '.join(splits)}")
    return read_json(os.path.join(base_dir, "problems.json")), splits[split]


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-dir", required=True, help="holds problems.json, pid_splits.json")
    parser.add_argument("--result-file", required=True)
    parser.add_argument("--output-file", required=True, help="right and wrong answers, one object")
    parser.add_argument("--output-result", required=True, help="accuracy and chosen options")
    parser.add_argument("--split", default="test")
    parser.add_argument("--options", default=LETTERS, help="letters of the options, in order")
    args = parser.parse_args()
    answers = read_answers(args.result_file, ("question_id", "prompt", "text"))
    truth = tuple(
        os.path.join(args.base_dir, name) for name in ("problems.json", "pid_splits.json")
    )
    with broken_files_named(truth, args.result_file):
        problems, ids = read_problems(args.base_dir, args.split)
        result = evaluate(problems, ids, answers, args.options)
    say_missing(answers, list(map(as_int, ids)), "they count as wrong")
    print(report(result), end="")
    with open(args.output_file, "w", encoding="utf-8") as file:
        json.dump(result["sqa_results"], file, indent=2)
    summary = {"acc": result["accuracy"], "correct": result["correct"], "count": result["total"]}
    summary |= {key: result[key] for key in ("results", "outputs")}
    with open(args.output_result, "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=2)


if __name__ == "__main__":
    main()
