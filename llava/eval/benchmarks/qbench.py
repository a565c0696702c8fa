"""Q-Bench, perception (LLVisionQA): questions on image quality with two to four options.

python -m llava.eval.benchmarks.qbench --question-file llvisionqa_dev.json --result-file A.jsonl

Right answers are public for the development split. The official evaluation reads long answers with
a language model; here an answer must name the letter or repeat the option.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.answering.questions import Question
from llava.eval.benchmarks.benchmark import Benchmark
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import source, unique
from llava.eval.files.records import Records, complete, read_json_list
from llava.eval.scoring.options import option_letter
from llava.eval.scoring.units import Unit, Units, accuracy_report
from llava.program_parser import ProgramParser

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

    def answer_line(
        self, text: str, answer_id: str, model_id: str, metadata: dict | None = None
    ) -> dict:
        line = super().answer_line(text, answer_id, model_id, metadata)
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


def units(records: list[dict], answers: list[dict]) -> Units:
    """Returns whether every answer is right, by type and concern.

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
        kind, concern = record.get("type"), record.get("concern")
        groups = f"type: {TYPES.get(kind, kind)}", f"concern: {CONCERNS.get(concern, concern)}"
        found.append(Unit(key, right, answer["text"], record["img_path"], groups))
    return Units(found)


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    return units(complete(asked, FIELDS), answers)


def _benchmark(name: str, questions: str, lang: str, public: bool) -> Benchmark:
    return Benchmark(
        name,
        f"qbench/{questions}",
        "qbench/images_llvisionqa",
        "accuracy",
        {"qbench/": "https://github.com/Q-Future/Q-Bench (LLVisionQA)"},
        read_units if public else None,
        unit_of=question_key,
        read=read_json_list,
        to_questions=partial(qbench_questions, lang=lang),
        program=("model_vqa_qbench", "--lang", lang),
    )


BENCHMARKS = (
    _benchmark("qbench", "llvisionqa_dev.json", "en", public=True),
    _benchmark("qbench_test", "llvisionqa_test.json", "en", public=False),
    _benchmark("qbench_zh", "质衡-问答-验证集.json", "zh", public=True),
    _benchmark("qbench_zh_test", "质衡-问答-测试集.json", "zh", public=False),
)


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--question-file", required=True, help="questions with right answers")
    parser.add_argument("--result-file", required=True, help="answers file")
    args = parser.parse_args()
    records = complete(read_json_list(args.question_file), FIELDS)
    answers = read_answers(args.result_file, (*FIELDS, "text"))
    with broken_files_named((args.question_file,), args.result_file):
        found = units(records, answers)
    given = set(map(question_key, answers))
    if missing := [record for record in records if question_key(record) not in given]:
        print(
            f"note: {args.result_file}: {len(missing)} of {len(records)} questions have no answer, "
            f"such as {missing[0]['question']!r} about {missing[0]['img_path']}: the score is that "
            "of the others",
            file=sys.stderr,
        )
    print(accuracy_report(found), end="")


if __name__ == "__main__":
    main()
