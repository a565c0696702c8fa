"""ScienceQA with GPT-4 beside LLaVA: each alone, GPT-4 with LLaVA where it gives no answer, what
GPT-4 answers when it sees both, and what a choice that is always right would give.

An answer that names no option counts as wrong; LLaVA's release draws an option at random for it.
"""

import json
import os
from typing import NamedTuple

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.benchmarks.sqa import FAILED, LETTERS, SENTENCE, parse_letter, read_problems
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import keyed, say_missing, unique
from llava.eval.files.records import Records, as_int, read_json
from llava.program_parser import ProgramParser

OURS, GPT4, COMPLEMENT, AGAIN = "LLaVA", "GPT-4", "GPT-4, else LLaVA", "GPT-4, asked again"


class Choice(NamedTuple):
    """What an answer chooses; index: -1 when it is no option of the question."""

    index: int
    text: str


def choices(problems: dict, ids: list[str], texts: dict, letters: str) -> dict[str, Choice]:
    """Returns what the answers to the questions `ids` choose; texts: by question."""
    found = {}
    for key in ids:
        text = texts.get(as_int(key), FAILED)
        letter = letter_of(text, letters)
        options = letters[: len(problems[as_int(key)]["choices"])]
        found[key] = Choice(options.index(letter) if letter in options else -1, text)
    return found


def letter_of(text: str, letters: str) -> str:
    """The option in `The answer is B.`, the form that these programs ask for, or else the one that
    `parse_letter` reads; FAILED when there is none."""
    found = SENTENCE.findall(text)
    return found[0] if len(found) == 1 else parse_letter(text, letters)


def evaluate(
    problems: dict,
    ids: list[str],
    ours: dict,
    gpt4: dict,
    requery: dict | None = None,
    letters: str = LETTERS,
) -> dict:
    """Returns the choices of every scheme by question, and how many of them are right.

    ours, gpt4: texts by question
    requery:    what GPT-4 answered when it saw both, by question; counts where they differ and it
                names an option
    """
    problems = keyed(problems)
    own, other = (choices(problems, ids, texts, letters) for texts in (ours, gpt4))
    both = {key: own[key] if other[key].index < 0 else other[key] for key in ids}
    schemes = {OURS: own, GPT4: other, COMPLEMENT: both}
    if requery is not None:
        again = choices(problems, ids, requery, letters)
        asked = {key for key in ids if own[key].index != other[key].index and again[key].index >= 0}
        schemes[AGAIN] = {key: again[key] if key in asked else both[key] for key in ids}
    truth = {key: problems[as_int(key)]["answer"] for key in ids}
    correct = {
        name: sum(chosen[key].index == truth[key] for key in ids)
        for name, chosen in schemes.items()
    }
    correct["Either"] = sum(truth[key] in (own[key].index, other[key].index) for key in ids)
    unanswered = sum(choice.index < 0 for choice in other.values())
    return {"total": len(ids), "schemes": schemes, "correct": correct, "unanswered": unanswered}


def report(result: dict) -> str:
    total = result["total"]
    lines = [f"Total: {total}, without an answer of GPT-4: {result['unanswered']}"]
    lines += [
        f"{name}: Correct: {correct}, Accuracy: {percent(correct, total):.2f}%"
        for name, correct in result["correct"].items()
    ]
    return "".join(f"{line}\n" for line in lines)


def percent(correct: int, total: int) -> float:
    return 100 * correct / total if total else 0.0


def read_texts(path: str) -> dict:
    """Texts by question, of an answers file (`.jsonl`) or of a result file of `eval_science_qa`,
    whose `outputs` they are. Raises ValueError when the file is neither."""
    if path.endswith(".jsonl"):
        return {key: answer["text"] for key, answer in unique(read_answers(path)).items()}
    result = read_json(path)
    outputs = result.get("outputs") if isinstance(result, dict) else None
    if not isinstance(outputs, dict) or not all(isinstance(t, str) for t in outputs.values()):
        raise ValueError(f"{path}: no 'outputs' that hold the text of every answer")
    return keyed(outputs)


def write_choices(result: dict, path: str) -> None:
    """Writes the choices of the last scheme as `eval_science_qa` writes those of one model."""
    name, chosen = list(result["schemes"].items())[-1]
    correct, total = result["correct"][name], result["total"]
    summary = {"acc": percent(correct, total), "correct": correct, "count": total}
    summary["results"] = {key: choice.index for key, choice in chosen.items()}
    summary["outputs"] = {key: choice.text for key, choice in chosen.items()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=2)


@errors_as_messages()
def main(doc: str, requery: bool = False) -> None:
    """The command line of both programs; doc: docstring of the program."""
    parser = ProgramParser(doc)
    parser.add_argument(
        "--base-dir", required=True, help="folder of problems.json and pid_splits.json"
    )
    parser.add_argument("--gpt4-result", required=True, help="result file, or answers (.jsonl)")
    if requery:
        parser.add_argument("--requery-result", required=True, help="answers of GPT-4 to both")
    parser.add_argument("--our-result", required=True, help="answers (.jsonl), or result file")
    if requery:
        parser.add_argument(
            "--output-result", required=True, help="file to write: what was chosen in the end"
        )
    parser.add_argument("--split", default="test", help="part of ScienceQA that was asked")
    parser.add_argument("--options", default=LETTERS, help="letters of the options, in order")
    args = parser.parse_args()
    truth = [os.path.join(args.base_dir, name) for name in ("problems.json", "pid_splits.json")]
    ours, gpt4 = read_texts(args.our_result), read_texts(args.gpt4_result)
    again = read_texts(args.requery_result) if requery else None
    with broken_files_named(truth, args.our_result):
        problems, ids = read_problems(args.base_dir, args.split)
        result = evaluate(problems, list(map(str, ids)), ours, gpt4, again, args.options)
    for path, texts in ((args.our_result, ours), (args.gpt4_result, gpt4)):
        given = Records(path, ({"question_id": key} for key in texts))
        say_missing(given, list(map(as_int, ids)), "they count as without an answer")
    print(report(result), end="")
    if requery:
        write_choices(result, args.output_result)
