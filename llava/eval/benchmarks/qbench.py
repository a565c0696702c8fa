"""Q-Bench, perception (LLVisionQA): questions on image quality with two to four options.

python -m llava.eval.benchmarks.qbench --question-file llvisionqa_dev.json --result-file A.jsonl

Right answers are public for the development split. The official evaluation reads long answers with
a language model; here an answer must name the letter or repeat the option.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.answering.questions import Question
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import source, unique
from llava.eval.files.records import complete, read_json_list
from llava.eval.scoring.options import option_letter

FIELDS = ("question", "img_path", "candidates")
INSTRUCTION = {
    "en": "Choose between one of the options as follows:",
    "zh": "在下列选项中选择一个:",
}
TYPES = {0: "yes or no", 1: "what", 2: "how"}
CONCERNS = {
    0: "distortion",
    1: "other",
    2: "in-context distortion",
    3: "in-context other",
}


@dataclass
class QBenchQuestion(Question):
    """A question whose answer line repeats its record, the answer in `response`."""

    record: dict = field(default_factory=dict)

    def answer_line(self, text: str, answer_id: str, model_id: str) -> dict:
        line = super().answer_line(text, answer_id, model_id)
        return {**self.record, "response": text} | line


def qbench_questions(record: dict, lang: str = "en") -> Iterator[Question]:
    """Q-Bench: `{type, concern, question, img_path, candidates, correct_ans?}`."""
    options = "".join(
        f"{letter}. {text}\n" for letter, text in zip("ABCD", record["candidates"], strict=False)
    )
    text = f"{record['question']}\n{INSTRUCTION[lang]}\n{options}"
    head = {"question_id": record["img_path"], "prompt": text}
    yield QBenchQuestion(head, text, [record["img_path"]], record=record)


def question_key(record: dict) -> tuple:
    """What identifies a question, in the question file and in the answers, which repeat it."""
    return record["img_path"], record["question"], tuple(record["candidates"])


def points(records: list[dict], answers: list[dict]) -> list[tuple[dict, bool]]:
    """Returns (question, whether it was answered right) of every answered question.

    Raises ValueError when an answer belongs to no question, or two to one question differ.
    """
    known = {question_key(record): record for record in records}
    found = []
    for key, answer in unique(answers, question_key).items():
        if key not in known:
            raise ValueError(
                f"{source(answers)}: the question {key[1]!r} about {key[0]} is not in "
                f"{source(records)}"
            )
        record, candidates = known[key], known[key]["candidates"]
        letter = option_letter(answer["text"], candidates)
        right = letter is not None and candidates["ABCD".index(letter)] == record["correct_ans"]
        found.append((record, right))
    return found


def evaluate(records: list[dict], answers: list[dict]) -> dict:
    """Returns the accuracy in percent, by type and concern as well."""
    groups = defaultdict(list)
    for record, right in points(records, answers):
        groups["all"].append(right)
        groups[f"type: {TYPES.get(record.get('type'), record.get('type'))}"].append(right)
        groups[f"concern: {CONCERNS.get(record.get('concern'), record.get('concern'))}"].append(
            right
        )
    scores = {name: 100 * sum(hits) / len(hits) for name, hits in sorted(groups.items())}
    return {"score": scores.pop("all", 0.0), "count": len(groups["all"]), "groups": scores}


def report(result: dict) -> str:
    lines = [f"  {name}: {score:.2f}%\n" for name, score in result["groups"].items()]
    return f"Samples: {result['count']}\nAccuracy: {result['score']:.2f}%\n" + "".join(lines)


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question-file", required=True)
    parser.add_argument("--result-file", required=True)
    args = parser.parse_args()
    records = complete(read_json_list(args.question_file), FIELDS)
    answers = read_answers(args.result_file, (*FIELDS, "text"))
    with broken_files_named((args.question_file,), args.result_file):
        result = evaluate(records, answers)
    given = set(map(question_key, answers))
    if missing := [record for record in records if question_key(record) not in given]:
        print(
            f"note: {args.result_file}: {len(missing)} of {len(records)} questions have no answer, "
            f"such as {missing[0]['question']!r} about {missing[0]['img_path']}: the score is that "
            "of the others",
            file=sys.stderr,
        )
    print(report(result), end="")


if __name__ == "__main__":
    main()
