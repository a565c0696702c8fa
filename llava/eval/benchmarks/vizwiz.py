"""VizWiz: soft accuracy on a split whose answers are public (validation).

python -m llava.eval.benchmarks.vizwiz --annotation-file val.json --question-file llava_val.jsonl \
    --result-file A.jsonl

The answers to the test split are known to its server only, and that is closed.
"""

import argparse

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import by_id, question_id, say_missing, source, unique
from llava.eval.files.records import complete, read_json_list, read_jsonl
from llava.eval.scoring.m4c import TextVQAAccuracyEvaluator


def read_annotations(path: str) -> dict[str, list[str]]:
    """Returns the ten human answers by image; VizWiz asks one question per image."""
    entries = read_json_list(path, ("image", "answers"))
    return {e["image"]: [answer["answer"] for answer in e["answers"]] for e in entries}


def points(
    humans: dict[str, list[str]], questions: list[dict], answers: list[dict]
) -> dict[int | str, float]:
    """Returns the soft accuracy (0 to 1) of every answer by question id.

    Raises ValueError when a question has no annotated image, or two different answers.
    """
    images = {key: question["image"] for key, question in by_id(questions).items()}
    score, found = TextVQAAccuracyEvaluator().score, {}
    for key, answer in unique(answers).items():
        image = images.get(key)
        if image not in humans:
            raise ValueError(
                f"{source(answers)}: question {answer['question_id']!r}: no annotation of {image!r}"
            )
        found[key] = score(answer["text"], humans[image])
    return found


def evaluate(humans: dict[str, list[str]], questions: list[dict], answers: list[dict]) -> dict:
    """Returns `{"score": accuracy in percent, "count": n}` and that of unanswerable questions."""
    found = points(humans, questions, answers)
    texts = [answer["text"] for answer in unique(answers).values()]
    said = [text.strip(" \t\r\n.").lower() == "unanswerable" for text in texts]
    return {
        "score": 100 * sum(found.values()) / max(len(found), 1),
        "count": len(found),
        "said_unanswerable": 100 * sum(said) / max(len(said), 1),
    }


def report(result: dict) -> str:
    return (
        f"Samples: {result['count']}\nAccuracy: {result['score']:.2f}%\n"
        f"Answered 'unanswerable': {result['said_unanswerable']:.2f}%\n"
    )


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotation-file", required=True, help="val.json")
    parser.add_argument("--question-file", required=True)
    parser.add_argument("--result-file", required=True)
    args = parser.parse_args()
    questions = complete(read_jsonl(args.question_file), ("question_id", "image"))
    answers = read_answers(args.result_file)
    with broken_files_named((args.annotation_file, args.question_file), args.result_file):
        result = evaluate(read_annotations(args.annotation_file), questions, answers)
    say_missing(answers, list(map(question_id, questions)), "the score is that of the others")
    print(report(result), end="")


if __name__ == "__main__":
    main()
